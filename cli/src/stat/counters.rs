// SPDX-License-Identifier: GPL-2.0

//! The counters of a VM at a moment, and their difference between two moments.

use std::io::{self, Read, Write};

use exitmeter_guest::{cpuid_reason, Cpuid, Error, Isa, Meter, Phase, ReasonNumbers};
use exitmeter_meter::reasons::SLOTS;
use rustix::time::{clock_gettime, ClockId};

/// Counters that the host gave to a reader, with the cost of reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// Life of the meter when the reader began, if the host reports it.
    pub life: Option<u64>,
    /// True if the meter began anew before the last query was answered.
    pub torn: bool,
    /// Reasons with exits, each at the time when it was read.
    pub rows: Vec<ReasonNumbers>,
    /// Number of the reader's own queries. They are not in the rows.
    pub queries: u64,
    /// Kernel ticks that these queries cost.
    pub cost: u64,
    /// Time of the first query.
    pub begun: Clock,
    /// Time of the last answer.
    pub ended: Clock,
}

/// Time on two clocks of this guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// TSC, in ticks.
    pub tsc: u64,
    /// Monotonic clock, in nanoseconds.
    pub nanos: u64,
}

impl Clock {
    /// Read both clocks. Reading causes no exit.
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

/// Numbers of a row on its way to another process.
const ROW_NUMBERS: usize = 4 + Phase::COUNT;

impl Counters {
    /// Create empty counters with room for all rows, so that [`Self::read`] allocates nothing.
    pub fn new(isa: Isa) -> Self {
        Self {
            isa,
            life: None,
            torn: false,
            rows: Vec::with_capacity(SLOTS),
            queries: 0,
            cost: 0,
            begun: Clock::default(),
            ended: Clock::default(),
        }
    }

    /// Read all counters.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no meter.
    pub fn read(&mut self, cpuid: impl Cpuid) -> Result<(), Error> {
        self.begun = Clock::now();
        let mut meter = Meter::find(cpuid, self.isa)?;
        self.isa = meter.isa();
        self.life = meter.life();
        self.rows.clear();
        meter.read(|row| self.rows.push(row));
        self.torn = meter.check_life().is_err();
        self.cost = meter.cost();
        self.queries = meter.queries();
        self.ended = Clock::now();
        Ok(())
    }

    /// Send the counters to another process. Allocates nothing.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let times = [self.begun, self.ended].map(|clock| [clock.tsc, clock.nanos]);
        // No life has the number 0.
        let life = self.life.unwrap_or(0);
        let (isa, torn) = (self.isa as u64, self.torn.into());
        let head = [isa, life, torn, self.queries, self.cost];
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

    /// Receive the counters that another process sent, up to the end of the file.
    pub fn receive(from: &mut impl Read) -> io::Result<Self> {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes)?;
        let mut numbers = bytes.chunks_exact(8).map(|bytes| {
            let mut number = [0; 8];
            number.copy_from_slice(bytes);
            u64::from_ne_bytes(number)
        });
        let counters = || {
            let isa = match numbers.next()? {
                1 => Isa::Vmx,
                2 => Isa::Svm,
                _ => return None,
            };
            let mut counters = Self::new(isa);
            counters.life = Some(numbers.next()?).filter(|life| *life != 0);
            counters.torn = numbers.next()? != 0;
            let separates_waits = counters.life.is_some();
            (counters.queries, counters.cost) = (numbers.next()?, numbers.next()?);
            for clock in [&mut counters.begun, &mut counters.ended] {
                (clock.tsc, clock.nanos) = (numbers.next()?, numbers.next()?);
            }
            let rest: Vec<u64> = numbers.collect();
            for row in rest.chunks(ROW_NUMBERS) {
                let [code, exits, known, nested, cycles @ ..] =
                    <[u64; ROW_NUMBERS]>::try_from(row).ok()?;
                counters.rows.push(ReasonNumbers {
                    code: u32::try_from(code).ok()?,
                    exits,
                    nested_exits: (known != 0).then_some(nested),
                    cycles,
                    separates_waits,
                });
            }
            Some(counters)
        };
        let cut_off = || io::Error::from(io::ErrorKind::UnexpectedEof);
        counters().ok_or_else(cut_off)
    }

    /// Return true if the meter began anew after `earlier`, so that the numbers cannot be
    /// subtracted. On a host that does not report its life, numbers that shrink show it.
    fn began_anew_since(&self, earlier: &Self) -> bool {
        let shrinks = |old: &ReasonNumbers| {
            let new = self.rows.iter().find(|row| row.code == old.code);
            new.map_or(0, |row| row.exits) < old.exits
        };
        self.torn
            || self.life != earlier.life
            || self.life.is_none() && earlier.rows.iter().any(shrinks)
    }

    /// Return the difference from `earlier` by reason, without the queries of the earlier reader.
    /// Ticks of the guest phase of CPUID exits still hold the time between those queries. Return
    /// `None` if the meter began anew in between.
    pub fn since(&self, earlier: &Self) -> Option<Vec<ReasonNumbers>> {
        if self.began_anew_since(earlier) {
            return None;
        }
        let rows = self.rows.iter().map(|row| {
            let old = earlier.rows.iter().find(|old| old.code == row.code);
            let old = old.copied().unwrap_or(ReasonNumbers {
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
        Some(rows.filter(|row| row.exits != 0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(code: u32, exits: u64, kernel: u64) -> ReasonNumbers {
        ReasonNumbers {
            code,
            exits,
            nested_exits: (code % 2 == 0).then_some(exits / 2),
            cycles: [5, kernel, 7, 8, 9, 10],
            separates_waits: true,
        }
    }

    fn counters(rows: Vec<ReasonNumbers>) -> Counters {
        Counters {
            isa: Isa::Svm,
            life: Some(7),
            torn: false,
            rows,
            queries: 100,
            cost: 150_000,
            begun: Clock { tsc: 1, nanos: 2 },
            ended: Clock { tsc: 3, nanos: 4 },
        }
    }

    #[test]
    fn sent_counters_are_received() {
        let sent = counters(vec![row(3, u64::MAX, 1), row(0x72, 2, 1 << 63)]);
        let mut bytes = Vec::new();
        sent.write(&mut bytes).expect("memory");
        assert_eq!(Counters::receive(&mut &bytes[..]).expect("whole"), sent);
        bytes.truncate(bytes.len() - 8);
        assert!(Counters::receive(&mut &bytes[..]).is_err());
        assert!(Counters::receive(&mut io::empty()).is_err());
    }

    #[test]
    fn queries_of_the_reader_are_subtracted() {
        let before = counters(vec![row(0x72, 1_000, 2_000_000), row(0x60, 10, 20_000)]);
        let after = counters(vec![
            row(0x72, 1_107, 2_160_500),
            row(0x60, 10, 20_000),
            row(0x78, 4, 40),
        ]);
        let rows = after.since(&before).expect("one life");
        assert_eq!(rows.len(), 2);
        let cpuid = rows[0];
        assert_eq!((cpuid.exits, cpuid.cycles), (7, [0, 10_500, 0, 0, 0, 0]));
        assert_eq!(rows[1], row(0x78, 4, 40));
    }

    #[test]
    fn different_lives_have_no_difference() {
        let before = counters(vec![row(0x72, 1_000, 2_000_000), row(0x60, 10, 20_000)]);
        let with = |life, torn, rows: &[ReasonNumbers]| Counters {
            life,
            torn,
            ..counters(rows.to_vec())
        };
        let same = before.rows.as_slice();
        assert!(with(Some(7), false, same).since(&before).is_some());
        assert!(with(Some(8), false, same).since(&before).is_none());
        assert!(with(None, false, same).since(&before).is_none());
        assert!(with(Some(7), true, same).since(&before).is_none());
        // A sum shrinks when a vCPU of the VM goes. The life tells this from a new beginning.
        assert!(with(Some(7), false, &same[..1]).since(&before).is_some());
        let before = with(None, false, same);
        assert!(with(None, false, same).since(&before).is_some());
        assert!(with(None, false, &same[..1]).since(&before).is_none());
        assert!(with(None, false, &[row(0x72, 5, 9), same[1]])
            .since(&before)
            .is_none());
    }
}
