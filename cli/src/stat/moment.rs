// SPDX-License-Identifier: GPL-2.0

//! What the host held at a moment, and what happened between two.

use std::io::{self, Read, Write};

use exitmeter_guest::{cpuid_reason, Cpuid, Error, Isa, Meter, Phase, Row};
use exitmeter_meter::reasons::SLOTS;
use rustix::time::{clock_gettime, ClockId};

/// What the host held when a reader began to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Whose reasons.
    pub isa: Isa,
    /// Reasons with exits, by when they were read.
    pub rows: Vec<Row>,
    /// How many questions the reader asked. None of them is in the rows.
    pub queries: u64,
    /// The kernel ticks that these cost.
    pub cost: u64,
    /// When the first one was asked.
    pub begun: Clock,
    /// When the last one was answered.
    pub ended: Clock,
}

/// A time on two clocks of this guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// TSC ticks.
    pub tsc: u64,
    /// Nanoseconds.
    pub nanos: u64,
}

impl Clock {
    /// The time now. To ask for it is no exit.
    fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        Self {
            // SAFETY: Every CPU of 64 bits has RDTSC, and Linux lets everybody use it.
            tsc: unsafe { core::arch::x86_64::_rdtsc() },
            // The monotonic clock is not below 0, and stays below 2^63 ns for 292 years.
            nanos: (time.tv_sec as u64)
                .wrapping_mul(1_000_000_000)
                .wrapping_add(time.tv_nsec as u64),
        }
    }
}

/// How many numbers a row takes when it is passed on.
const NUMBERS: usize = 4 + Phase::COUNT;

impl Moment {
    /// One with room for all rows, so that [`Self::read`] needs no more memory.
    pub fn new(isa: Isa) -> Self {
        Self {
            isa,
            rows: Vec::with_capacity(SLOTS),
            queries: 0,
            cost: 0,
            begun: Clock::default(),
            ended: Clock::default(),
        }
    }

    /// Reads all there is.
    ///
    /// # Errors
    ///
    /// When there is no meter.
    pub fn read(&mut self, cpuid: impl Cpuid) -> Result<(), Error> {
        self.begun = Clock::now();
        let mut meter = Meter::find(cpuid, self.isa)?;
        self.isa = meter.isa();
        self.rows.clear();
        meter.read(|row| self.rows.push(row));
        self.cost = meter.cost();
        self.queries = meter.queries();
        self.ended = Clock::now();
        Ok(())
    }

    /// Passes it on to another process; takes no memory but the stack.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let times = [self.begun, self.ended].map(|clock| [clock.tsc, clock.nanos]);
        let head = [self.isa as u64, self.queries, self.cost];
        for number in head.into_iter().chain(times.into_iter().flatten()) {
            to.write_all(&number.to_ne_bytes())?;
        }
        for row in &self.rows {
            let known = u64::from(row.nested_exits.is_some());
            let nested = row.nested_exits.unwrap_or(0);
            let fixed = [row.code.into(), row.exits, known, nested];
            for number in fixed.into_iter().chain(row.cycles) {
                to.write_all(&number.to_ne_bytes())?;
            }
        }
        Ok(())
    }

    /// What another process has passed on, up to the end.
    pub fn receive(from: &mut impl Read) -> io::Result<Self> {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes)?;
        let mut numbers = bytes.chunks_exact(8).map(|bytes| {
            let mut number = [0; 8];
            number.copy_from_slice(bytes);
            u64::from_ne_bytes(number)
        });
        let moment = || {
            let isa = match numbers.next()? {
                1 => Isa::Vmx,
                2 => Isa::Svm,
                _ => return None,
            };
            let mut moment = Self::new(isa);
            (moment.queries, moment.cost) = (numbers.next()?, numbers.next()?);
            for clock in [&mut moment.begun, &mut moment.ended] {
                (clock.tsc, clock.nanos) = (numbers.next()?, numbers.next()?);
            }
            let rest: Vec<u64> = numbers.collect();
            for row in rest.chunks(NUMBERS) {
                let [code, exits, known, nested, cycles @ ..] =
                    <[u64; NUMBERS]>::try_from(row).ok()?;
                moment.rows.push(Row {
                    code: u32::try_from(code).ok()?,
                    exits,
                    nested_exits: (known != 0).then_some(nested),
                    cycles,
                });
            }
            Some(moment)
        };
        let cut_off = || io::Error::from(io::ErrorKind::UnexpectedEof);
        (moment)().ok_or_else(cut_off)
    }

    /// What happened since an earlier moment, but for its reader's questions, by reason. Ticks of
    /// the guest phase of CPUID exits still hold the time between those.
    pub fn since(&self, earlier: &Self) -> Vec<Row> {
        let rows = self.rows.iter().map(|row| {
            let old = earlier.rows.iter().find(|old| old.code == row.code);
            let old = old.copied().unwrap_or(Row {
                exits: 0,
                nested_exits: row.nested_exits.map(|_| 0),
                cycles: [0; Phase::COUNT],
                ..*row
            });
            let (queries, cost) = if row.code == cpuid_reason(self.isa) {
                (earlier.queries, earlier.cost)
            } else {
                (0, 0)
            };
            // A sum shrinks when a vCPU of the VM goes.
            let mut new = *row;
            new.exits = row.exits.saturating_sub(old.exits).saturating_sub(queries);
            new.nested_exits = row
                .nested_exits
                .zip(old.nested_exits)
                .map(|(new, old)| new.saturating_sub(old));
            for (new, old) in new.cycles.iter_mut().zip(old.cycles) {
                *new = new.saturating_sub(old);
            }
            let kernel = &mut new.cycles[Phase::Kernel as usize];
            *kernel = kernel.saturating_sub(cost);
            new
        });
        rows.filter(|row| row.exits != 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(code: u32, exits: u64, kernel: u64) -> Row {
        Row {
            code,
            exits,
            nested_exits: (code % 2 == 0).then_some(exits / 2),
            cycles: [5, kernel, 7, 8, 9],
        }
    }

    fn moment(rows: Vec<Row>) -> Moment {
        Moment {
            isa: Isa::Svm,
            rows,
            queries: 100,
            cost: 150_000,
            begun: Clock { tsc: 1, nanos: 2 },
            ended: Clock { tsc: 3, nanos: 4 },
        }
    }

    #[test]
    fn a_moment_survives_its_passage() {
        let sent = moment(vec![row(3, u64::MAX, 1), row(0x72, 2, 1 << 63)]);
        let mut bytes = Vec::new();
        sent.write(&mut bytes).expect("memory");
        assert_eq!(Moment::receive(&mut &bytes[..]).expect("whole"), sent);
        bytes.truncate(bytes.len() - 8);
        assert!(Moment::receive(&mut &bytes[..]).is_err());
        assert!(Moment::receive(&mut io::empty()).is_err());
    }

    #[test]
    fn the_readers_questions_are_no_difference() {
        let before = moment(vec![row(0x72, 1_000, 2_000_000), row(0x60, 10, 20_000)]);
        let after = moment(vec![
            row(0x72, 1_107, 2_160_500),
            row(0x60, 10, 20_000),
            row(0x78, 4, 40),
        ]);
        let told = after.since(&before);
        assert_eq!(told.len(), 2);
        let cpuid = told[0];
        assert_eq!((cpuid.exits, cpuid.cycles), (7, [0, 10_500, 0, 0, 0]));
        assert_eq!(told[1], row(0x78, 4, 40));
    }
}
