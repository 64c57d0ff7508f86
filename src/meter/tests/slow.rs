// SPDX-License-Identifier: GPL-2.0

//! Tests of the recorder of slow exits against a plain list of all exits.
#![cfg(not(loom))]

use exitmeter_meter::{
    detail,
    ledger::{Ledger, LedgerCopy, NoSupply},
    phase::Phase,
    reasons::{self, Isa, Slot},
    slow::{Leaving, Slow, SlowCopy, SlowExit, KEPT, MAX_BYTES, RING, WINDOW},
    tables::{About, Tables, TablesCopy},
};
use proptest::prelude::*;

/// Maximum number of steps in one run. Miri takes a thousand times as long.
const STEPS: usize = if cfg!(miri) { 40 } else { 600 };

/// Next event. Events that cannot happen in the vCPU's state are skipped.
#[derive(Clone, Copy, Debug)]
enum Step {
    Exit {
        key: u8,
        nested: bool,
    },
    Enter,
    Leave {
        phase: u8,
        why: u16,
    },
    Resume {
        cpu: u16,
    },
    Rebase {
        now: u32,
    },
    Ask,
    /// A number of exits that the kernel handles, with lengths that depend on the ticks.
    Usual {
        count: u8,
    },
}

/// An exit of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plain {
    sequence: u64,
    exited: u64,
    slot: Slot,
    nested: bool,
    detail: Option<u64>,
    rip: u64,
    ticks: [u64; Phase::COUNT],
    outs: u32,
    why: Option<u16>,
    cpus: [Option<u16>; 2],
}

impl Plain {
    fn length(&self) -> u64 {
        self.ticks.iter().sum::<u64>() - self.ticks[Phase::Halted as usize]
    }

    fn of(exit: &SlowExit) -> Self {
        let mut ticks = [0; Phase::COUNT];
        for phase in Phase::ALL {
            ticks[phase as usize] = exit.ticks(phase);
        }
        let plain = Self {
            sequence: exit.sequence,
            exited: exit.exited,
            slot: exit.slot().expect("a reason"),
            nested: exit.is_nested(),
            detail: exit.detail(),
            rip: exit.rip,
            ticks,
            outs: exit.outs,
            why: exit.user_exit(),
            cpus: exit.cpus(),
        };
        assert_eq!(plain.length(), exit.length());
        plain
    }
}

/// A vCPU with a recorder, and all its exits.
struct Metered {
    ledger: Box<Ledger>,
    tables: Box<Tables>,
    copies: Box<(LedgerCopy, TablesCopy)>,
    now: u64,
    phase: Phase,
    cpu: u16,
    limit: u64,
    exits: Vec<Plain>,
    /// End of each exit; `None` for an exit that has not ended.
    ended: Vec<Option<u64>>,
    /// Set while the latest exit has not ended.
    is_open: bool,
    /// Number of the first exit of the ring.
    ring_from: usize,
    /// Number of the exit that froze the ring.
    frozen: Option<usize>,
    asked: bool,
    /// Start of the current window and of the one before.
    windows: [u64; 2],
    /// Set after a read past the window's time: it ends at the next entry at the latest.
    is_over: bool,
    asked_for: usize,
}

impl Drop for Metered {
    fn drop(&mut self) {
        // SAFETY: No thread uses them any more.
        unsafe { self.ledger.set_tables(std::ptr::null_mut()) };
    }
}

impl Metered {
    fn new(limit: u64) -> Self {
        // SAFETY: All-zero bytes are a valid ledger, valid tables and empty copies.
        let (ledger, tables, copies): (Box<Ledger>, Box<Tables>, Box<(LedgerCopy, TablesCopy)>) = unsafe {
            (
                Box::new(core::mem::zeroed()),
                Box::new(core::mem::zeroed()),
                Box::new(core::mem::zeroed()),
            )
        };
        tables.prepare();
        tables.slow().set_limit(limit);
        // SAFETY: They stay until `self` is dropped.
        unsafe { ledger.set_tables((&raw const *tables).cast_mut()) };
        ledger.begin(1000, Phase::Kernel);
        Self {
            ledger,
            tables,
            copies,
            now: 1000,
            phase: Phase::Kernel,
            cpu: 3,
            limit,
            exits: Vec::new(),
            ended: Vec::new(),
            is_open: false,
            ring_from: 0,
            frozen: None,
            asked: false,
            windows: [0; 2],
            is_over: false,
            asked_for: 0,
        }
    }

    fn copy(&mut self) -> &SlowCopy {
        let (ledger, tables) = &mut *self.copies;
        tables.clear();
        let copied = self
            .ledger
            .try_copy_with(ledger, &mut Some((&self.tables, &mut *tables)));
        assert!(copied && ledger.balances());
        self.copies.1.slow()
    }

    /// Let ticks pass in the current phase.
    fn pass(&mut self, ticks: u64) {
        self.now = self.now.wrapping_add(ticks);
        if let (true, Some(exit)) = (self.is_open, self.exits.last_mut()) {
            exit.ticks[self.phase as usize] += ticks;
        }
    }

    fn exit(&mut self, key: u8, nested: bool) {
        let about = about(key, nested);
        match self.limit {
            0 => self
                .ledger
                .exit_with::<false>(&self.tables, self.now, &about, NoSupply),
            _ => self
                .ledger
                .exit_with::<true>(&self.tables, self.now, &about, NoSupply),
        }
        if self.exits.is_empty() {
            self.windows = [self.now; 2];
        }
        self.exits.push(Plain {
            sequence: self.exits.len() as u64,
            exited: self.now,
            slot: slot(key),
            nested,
            detail: detail_of(key),
            rip: about.rip.unwrap_or(0),
            ticks: [0; Phase::COUNT],
            outs: 0,
            why: None,
            cpus: [Some(self.cpu); 2],
        });
        self.ended.push(None);
        self.is_open = true;
        self.phase = Phase::Kernel;
        self.asked_for += 1;
    }

    fn enter(&mut self) {
        let cpu = self.cpu.into();
        self.ledger.entry_with(&self.tables, self.now, || cpu);
        self.phase = Phase::Guest;
        if !core::mem::replace(&mut self.is_open, false) {
            return;
        }
        let latest = self.exits.len() - 1;
        self.exits[latest].cpus[1] = Some(self.cpu);
        self.ended[latest] = Some(self.now);
        let is_slow = self.limit != 0 && self.exits[latest].length() > self.limit;
        if is_slow && self.frozen.is_none() {
            self.frozen = Some(latest);
            self.asked = false;
        }
    }

    fn leave(&mut self, phase: Phase, why: u16) {
        let to_user = (phase == Phase::User).then_some(why);
        let leaving = Leaving { phase, to_user };
        let cpu = self.cpu.into();
        // The module does the same.
        match phase {
            Phase::User => {
                let why = || leaving.to_user;
                self.ledger
                    .leave_to_user_with(&self.tables, self.now, why, || cpu);
            }
            _ => self
                .ledger
                .leave_with(&self.tables, self.now, leaving, || cpu),
        }
        if let (true, Some(exit)) = (self.is_open, self.exits.last_mut()) {
            exit.outs += u32::from(phase != Phase::User);
            exit.why = to_user.or(exit.why);
        }
        self.phase = phase;
    }

    fn resume(&mut self, cpu: u16) {
        self.ledger.resume_with(&self.tables, self.now);
        self.cpu = cpu;
        self.phase = Phase::Kernel;
    }

    fn rebase(&mut self, now: u64) {
        self.ledger.rebase(self.now, now);
        let shift = now.wrapping_sub(self.now);
        let times = self
            .exits
            .iter_mut()
            .map(|exit| &mut exit.exited)
            .chain(self.ended.iter_mut().flatten())
            .chain(&mut self.windows);
        for time in times {
            *time = time.wrapping_add(shift);
        }
        self.now = now;
    }

    /// Take a step after some ticks, if it can happen.
    fn take(&mut self, step: Step, ticks: u64) {
        match (step, self.phase) {
            (Step::Exit { key, nested }, Phase::Guest) => {
                self.pass(ticks);
                self.exit(key, nested);
            }
            (Step::Enter, Phase::Kernel) => {
                self.pass(ticks);
                self.enter();
            }
            (Step::Leave { phase, why }, Phase::Kernel | Phase::Guest) => {
                self.pass(ticks);
                let phases = [Phase::User, Phase::Halted, Phase::Preempted, Phase::Waiting];
                self.leave(phases[usize::from(phase) % 4], why);
            }
            (Step::Resume { cpu }, phase) if !matches!(phase, Phase::Kernel | Phase::Guest) => {
                self.pass(ticks);
                self.resume(cpu);
            }
            (Step::Rebase { now }, _) => {
                self.pass(ticks);
                self.rebase(now.into());
            }
            (Step::Usual { count }, Phase::Guest) => {
                let mut random = ticks | 1;
                for _ in 0..count {
                    random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    // Few are long.
                    let length =
                        (random >> 40 & 0x3ff) << (random >> 52 & 15) >> (random >> 56 & 7);
                    usual(self, 1 + length);
                }
                return;
            }
            (Step::Ask, _) => {
                self.tables.slow().ask();
                self.asked = self.frozen.is_some();
                self.asked_for = 0;
            }
            _ => return,
        }
        self.follow(matches!(step, Step::Enter));
    }

    /// Check whether a window has begun, and whether the ring has thawed.
    fn follow(&mut self, entered: bool) {
        if self.exits.is_empty() {
            return;
        }
        let was_exit = self.ended.last() == Some(&None);
        let (asked, frozen) = (self.asked, self.frozen);
        let slow = self.copy();
        let (begun, is_frozen) = (slow.window_begun().expect("a window"), slow.is_frozen());
        if frozen.is_some() && !is_frozen {
            assert!(asked, "a ring thaws only when asked");
            self.frozen = None;
            self.asked = false;
            // The window starts with the exit that turned it, or with the next one.
            self.ring_from = self.exits.len() - usize::from(was_exit);
        }
        assert!(
            !self.asked || self.asked_for <= 16,
            "a ring is not given for 16 exits"
        );
        if begun != self.windows[0] {
            let age = begun.wrapping_sub(self.windows[0]);
            assert!(age >= WINDOW, "a window ended after {age} ticks");
            assert_eq!(begun, self.now);
            self.windows = [begun, self.windows[0]];
            self.is_over = false;
        }
        assert!(!entered || !self.is_over, "a window does not end");
    }

    /// Read the recorder, as a snapshot does.
    fn read(&mut self) {
        self.copy();
        let last = self.copies.0.last;
        self.tables.slow().end_window_after(last);
        self.is_over |= last.wrapping_sub(self.windows[0]) >= WINDOW;
    }

    /// Compare the recorder with the list.
    fn check(&mut self) {
        if self.exits.is_empty() {
            return;
        }
        let (now, last, in_guest) = (self.now, self.now, self.phase == Phase::Guest);
        self.read();
        let slow = self.copy().clone();
        let age = |time: u64| now.wrapping_sub(time);
        for is_current in [true, false] {
            let ages = match is_current {
                true => 0..=age(self.windows[0]),
                false => age(self.windows[0]) + 1..=age(self.windows[1]),
            };
            let mut lengths: Vec<u64> = self
                .exits
                .iter()
                .zip(&self.ended)
                .filter(|(_, ended)| ended.is_some_and(|ended| ages.contains(&age(ended))))
                .map(|(exit, _)| exit.length())
                .collect();
            lengths.sort_unstable_by(|one, other| other.cmp(one));
            lengths.truncate(KEPT);
            let mut kept: Vec<u64> = slow
                .slowest(is_current)
                .map(|exit| {
                    let plain = &self.exits[exit.sequence as usize];
                    assert_eq!(&Plain::of(&exit), plain);
                    exit.length()
                })
                .collect();
            kept.sort_unstable_by(|one, other| other.cmp(one));
            assert_eq!(kept, lengths, "current: {is_current}");
        }
        if self.limit == 0 {
            assert_eq!(slow.ring(last, in_guest).count(), 0);
            assert_eq!(slow.culprit(), None);
            return;
        }
        // The latest exit takes a place of the ring before it has ended.
        let until = self.frozen.map_or(self.exits.len(), |culprit| culprit + 1);
        let from = self.ring_from.max(until.saturating_sub(RING));
        let until = match self.frozen {
            None if !in_guest => until.saturating_sub(1).max(from),
            _ => until,
        };
        let ring: Vec<Plain> = slow
            .ring(last, in_guest)
            .map(|exit| Plain::of(&exit))
            .collect();
        assert_eq!(ring, self.exits[from..until]);
        assert_eq!(slow.culprit(), self.frozen.map(|culprit| culprit as u64));
    }
}

fn slot(key: u8) -> Slot {
    reasons::slot(Isa::Vmx, [10, 30, 12, 48][usize::from(key) % 4])
}

/// Return the detail of a key's exits: the third reason has none, and one detail of the second is
/// 0.
fn detail_of(key: u8) -> Option<u64> {
    (key % 4 != 2).then_some(u64::from(key / 4) << (detail::BITS - 6))
}

fn about(key: u8, nested: bool) -> About {
    About {
        slot: slot(key),
        nested,
        key: detail_of(key).map(|detail| detail::key_of(slot(key), detail)),
        rip: Some(0xffff_ffff_8100_0000 + u64::from(key)),
    }
}

fn steps() -> impl Strategy<Value = Vec<(Step, u64)>> {
    let step = prop_oneof![
        12 => (0..64_u8, prop::bool::weighted(0.1)).prop_map(|(key, nested)| Step::Exit { key, nested }),
        12 => Just(Step::Enter),
        3 => (0..4_u8, 0..40_u16).prop_map(|(phase, why)| Step::Leave { phase, why }),
        4 => (0..6_u16).prop_map(|cpu| Step::Resume { cpu }),
        1 => any::<u32>().prop_map(|now| Step::Rebase { now: now / 2 + 1 }),
        1 => Just(Step::Ask),
        1 => (1..120_u8).prop_map(|count| Step::Usual { count }),
    ];
    let ticks = prop_oneof![
        60 => 1..3000_u64,
        6 => 1..40_000_000_u64,
        1 => 1..WINDOW,
    ];
    prop::collection::vec((step, ticks), 1..STEPS)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 300 }))]

    #[test]
    fn recorder_matches_the_list(
        steps in steps(),
        limit in prop_oneof![Just(0), (10..27_u32).prop_map(|power| 1 << power)],
    ) {
        let mut metered = Metered::new(limit);
        for (number, (step, ticks)) in steps.into_iter().enumerate() {
            metered.take(step, ticks);
            if number % 8 == 0 {
                metered.check();
            }
        }
        metered.check();
    }
}

/// Take an exit of `ticks` kernel ticks.
fn usual(metered: &mut Metered, ticks: u64) {
    metered.take(
        Step::Exit {
            key: 1,
            nested: false,
        },
        100,
    );
    metered.take(Step::Enter, ticks);
}

#[test]
fn recorder_takes_at_most_10_kib() {
    assert!(size_of::<Slow>() <= MAX_BYTES, "{}", size_of::<Slow>());
}

#[test]
fn guests_own_sleep_is_not_slow() {
    let mut metered = Metered::new(1_000_000);
    metered.take(Step::Enter, 5);
    for _ in 0..3 {
        metered.take(
            Step::Exit {
                key: 2,
                nested: false,
            },
            100,
        );
        metered.take(Step::Leave { phase: 1, why: 0 }, 500);
        metered.take(Step::Resume { cpu: 5 }, 1 << 33);
        metered.take(Step::Enter, 500);
    }
    metered.check();
    let slow = metered.copy();
    assert!(!slow.is_frozen());
    let all: Vec<_> = slow.slowest(true).chain(slow.slowest(false)).collect();
    assert_eq!(all.len(), 3);
    assert!(all.iter().all(|exit| exit.length() == 1000));
    // The same sleep on behalf of the host does.
    metered.take(
        Step::Exit {
            key: 2,
            nested: false,
        },
        100,
    );
    metered.take(Step::Leave { phase: 3, why: 0 }, 500);
    metered.take(Step::Resume { cpu: 3 }, 2_000_000);
    metered.take(Step::Enter, 500);
    metered.check();
    assert_eq!(metered.copy().culprit(), Some(3));
}

#[test]
fn window_ends_with_the_entry_after_a_read() {
    let mut metered = Metered::new(0);
    metered.take(Step::Enter, 5);
    for _ in 0..KEPT {
        usual(&mut metered, 100_000);
    }
    metered.read();
    // None of these is above the floor, nor do its rows change.
    let begun = metered.windows[0];
    metered.take(
        Step::Exit {
            key: 1,
            nested: false,
        },
        WINDOW,
    );
    metered.take(Step::Enter, 1000);
    usual(&mut metered, 1000);
    metered.check();
    assert_eq!(metered.windows[0], begun);
    assert!(metered
        .copy()
        .slowest(true)
        .all(|exit| exit.length() == 100_000));
    for _ in 0..3 {
        usual(&mut metered, 1000);
    }
    metered.check();
    let slow = metered.copy();
    assert_eq!(slow.slowest(false).count(), KEPT);
    assert!(slow.slowest(false).all(|exit| exit.length() == 100_000));
    assert_eq!(slow.slowest(true).count(), 3);
    assert!(slow.slowest(true).all(|exit| exit.length() == 1000));
}

#[test]
fn window_ends_with_an_exit_of_other_rows() {
    let mut metered = Metered::new(0);
    metered.take(Step::Enter, 5);
    for _ in 0..KEPT {
        usual(&mut metered, 100_000);
    }
    metered.take(
        Step::Exit {
            key: 5,
            nested: false,
        },
        WINDOW,
    );
    assert_eq!(metered.windows[0], metered.now);
    metered.take(Step::Enter, 1000);
    metered.check();
    assert_eq!(metered.copy().slowest(true).count(), 1);
}

#[test]
fn no_ring_without_a_limit() {
    let mut metered = Metered::new(0);
    metered.take(Step::Enter, 5);
    for ticks in [1000, 50_000_000_000] {
        usual(&mut metered, ticks);
        metered.take(
            Step::Exit {
                key: 2,
                nested: true,
            },
            100,
        );
        metered.take(Step::Leave { phase: 0, why: 2 }, 300);
        metered.take(Step::Resume { cpu: 1 }, 5_000_000);
        metered.take(Step::Enter, 300);
    }
    metered.check();
    let now = metered.now;
    let slow = metered.copy();
    assert!(!slow.is_frozen());
    assert_eq!(slow.ring(now, true).count(), 0);
}

#[test]
fn frozen_ring_ends_with_the_culprit() {
    let mut metered = Metered::new(1_000_000);
    metered.take(Step::Enter, 5);
    for _ in 0..100 {
        usual(&mut metered, 1000);
    }
    metered.take(
        Step::Exit {
            key: 1,
            nested: false,
        },
        100,
    );
    metered.take(Step::Leave { phase: 0, why: 2 }, 300);
    metered.take(Step::Resume { cpu: 1 }, 5_000_000);
    metered.take(Step::Enter, 300);
    for _ in 0..100 {
        usual(&mut metered, 9_000_000);
    }
    metered.check();
    let slow = metered.copy();
    assert_eq!(slow.culprit(), Some(100));
    let ring: Vec<_> = slow.ring(0, true).collect();
    assert_eq!(ring.len(), RING);
    let culprit = ring.last().expect("64 exits");
    assert_eq!(culprit.ticks(Phase::User), 5_000_000);
    assert_eq!(culprit.ticks(Phase::Kernel), 600);
    assert_eq!(culprit.user_exit(), Some(2));
    assert_eq!(culprit.cpus(), [Some(3), Some(1)]);
    // The ring thaws when that is asked for, and freezes again.
    metered.take(Step::Ask, 1);
    for _ in 0..17 {
        usual(&mut metered, 500);
    }
    usual(&mut metered, 2_000_000);
    metered.check();
    assert_eq!(metered.copy().culprit(), Some(218));
}

#[test]
fn entry_without_an_exit_ends_no_exit() {
    let mut metered = Metered::new(1_000_000);
    metered.take(Step::Enter, 5);
    usual(&mut metered, 1000);
    // The entry failed: the vCPU goes to user space, and comes back for another entry.
    metered.take(Step::Leave { phase: 0, why: 9 }, 100);
    metered.take(Step::Resume { cpu: 1 }, 50_000_000);
    metered.take(Step::Enter, 60_000_000);
    usual(&mut metered, 2000);
    metered.check();
    let now = metered.now;
    let slow = metered.copy();
    assert!(!slow.is_frozen());
    let mut lengths: Vec<_> = slow.slowest(true).map(|exit| exit.length()).collect();
    lengths.sort_unstable();
    assert_eq!(lengths, [1000, 2000]);
    let ring = slow.ring(now, true);
    let lengths: Vec<_> = ring.map(|exit| exit.length()).collect();
    assert_eq!(lengths, [1000, 2000]);
}
