// SPDX-License-Identifier: GPL-2.0

//! The ledger of one vCPU: every TSC tick of its life in exactly one cell.
//!
//! A ledger has one writer at a time, the thread that holds the vCPU. So the writer needs
//! no locked instruction: it loads, adds and stores. `core::sync::atomic` is used rather
//! than the kernel's atomics because those are an out-of-line call per operation on
//! kernels without inline helpers, measured at 95 ticks an exit.

use core::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};

use super::{
    leaves::Numbers,
    phase::Phase,
    reasons::{Slot, SLOTS},
};

use Ordering::Relaxed;

/// Words of the bitmap of rows in use.
const WORDS: usize = SLOTS.div_ceil(64);

/// What is metered of one exit reason. One cache line: an exit writes to few of them.
#[repr(C, align(64))]
#[derive(Debug)]
struct Row {
    exits: AtomicU64,
    cycles: [AtomicU64; Phase::COUNT],
    /// Room for the counters to come, so that a row stays one line.
    spare: [AtomicU64; 2],
}

/// The ledger of one vCPU.
///
/// All-zero bytes are a valid ledger that has not begun, so that it can be made in zeroed
/// memory without a copy on a small stack.
///
/// # Invariants
///
/// Once it has begun, the cells of all rows sum to `last - first` whenever `seq` is even,
/// and only rows whose bit in `used` is set are other than zero.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Ledger {
    seq: AtomicU32,
    phase: AtomicU32,
    slot: AtomicU32,
    last: AtomicU64,
    first: AtomicU64,
    used: [AtomicU64; WORDS],
    rows: [Row; SLOTS],
}

/// Adds to a cell that only this thread writes.
#[inline(always)]
fn add(cell: &AtomicU64, value: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(value), Relaxed);
}

impl Ledger {
    #[inline(always)]
    fn row(&self, slot: Slot) -> &Row {
        // SAFETY: By the invariant of `Slot` its index is below SLOTS.
        unsafe { self.rows.get_unchecked(slot.index()) }
    }

    #[inline(always)]
    fn current(&self) -> Slot {
        Slot::from_index(self.slot.load(Relaxed) as usize).unwrap_or(Slot::OTHER)
    }

    #[inline]
    fn use_row(&self, slot: Slot) {
        if let Some(word) = self.used.get(slot.index() / 64) {
            let bit = 1_u64.wrapping_shl(slot.index() as u32 % 64);
            word.store(word.load(Relaxed) | bit, Relaxed);
        }
    }

    /// Runs one change of the ledger so that a reader sees it whole or not at all.
    #[inline(always)]
    fn change(&self, change: impl FnOnce()) {
        let seq = self.seq.load(Relaxed);
        self.seq.store(seq.wrapping_add(1), Relaxed);
        // ORDERING: The odd number is visible before anything of the change.
        fence(Ordering::Release);
        change();
        // ORDERING: The change is visible before the even number.
        self.seq.store(seq.wrapping_add(2), Ordering::Release);
    }

    /// Books the time since the last transition and begins a phase. Time that seems to
    /// go backwards, as between CPUs whose clocks part, counts as none.
    #[inline(always)]
    fn transition(&self, now: u64, next: Phase) {
        let last = self.last.load(Relaxed);
        let now = now.max(last);
        let cells = &self.row(self.current()).cycles;
        if let Some(cell) = cells.get(self.phase.load(Relaxed) as usize) {
            add(cell, now.wrapping_sub(last));
        }
        self.last.store(now, Relaxed);
        self.phase.store(next as u32, Relaxed);
    }

    /// The vCPU's first event, at TSC `now`, after which it is in `phase`.
    pub fn begin(&self, now: u64, phase: Phase) {
        self.change(|| {
            self.first.store(now, Relaxed);
            self.last.store(now, Relaxed);
            self.phase.store(phase as u32, Relaxed);
            self.slot.store(Slot::START.index() as u32, Relaxed);
            // The one row that gets cycles without an exit.
            self.use_row(Slot::START);
        });
    }

    /// A VM exit.
    #[inline(always)]
    pub fn exit(&self, now: u64, slot: Slot) {
        self.change(|| {
            self.transition(now, Phase::Kernel);
            self.slot.store(slot.index() as u32, Relaxed);
            let exits = &self.row(slot).exits;
            let before = exits.load(Relaxed);
            if before == 0 {
                self.use_row(slot);
            }
            exits.store(before.wrapping_add(1), Relaxed);
        });
    }

    /// A VM entry.
    #[inline(always)]
    pub fn entry(&self, now: u64) {
        self.change(|| self.transition(now, Phase::Guest));
    }

    /// The vCPU leaves its CPU, for the phase `phase`.
    #[inline]
    pub fn leave(&self, now: u64, phase: Phase) {
        self.change(|| self.transition(now, phase));
    }

    /// The vCPU is back on a CPU, in KVM.
    #[inline]
    pub fn resume(&self, now: u64) {
        self.change(|| self.transition(now, Phase::Kernel));
    }

    /// Exits counted in a row.
    pub fn exits(&self, slot: Slot) -> u64 {
        self.row(slot).exits.load(Relaxed)
    }

    /// TSC ticks in a cell.
    pub fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        match self.row(slot).cycles.get(phase as usize) {
            Some(cell) => cell.load(Relaxed),
            None => 0,
        }
    }

    /// The rows in use, as a bitmap.
    fn used(&self) -> [u64; WORDS] {
        let mut used = [0; WORDS];
        for (to, from) in used.iter_mut().zip(&self.used) {
            *to = from.load(Relaxed);
        }
        used
    }

    /// Exits counted in all rows.
    pub fn total_exits(&self) -> u64 {
        slots_in(self.used()).fold(0, |sum, slot| sum.wrapping_add(self.exits(slot)))
    }

    /// TSC ticks of a phase in all rows.
    pub fn total_cycles(&self, phase: Phase) -> u64 {
        slots_in(self.used()).fold(0, |sum, slot| sum.wrapping_add(self.cycles(phase, slot)))
    }

    /// Copies the ledger whole, as of one moment between two transitions.
    ///
    /// Waits while the writer is within a transition, some ten instructions that the module's
    /// callbacks run with preemption off. So the caller must not have interrupted one.
    pub fn copy(&self, out: &mut LedgerCopy) {
        while !self.try_copy(out) {
            core::hint::spin_loop();
        }
    }

    /// Tries once to copy the ledger whole; `false` when a transition came between.
    ///
    /// Only rows in use are read, so the window is short and a reader wins soon even
    /// against a vCPU that does nothing but exit. A writer is never held up.
    pub fn try_copy(&self, out: &mut LedgerCopy) -> bool {
        // ORDERING: What follows is read after the number.
        let seq = self.seq.load(Ordering::Acquire);
        if seq & 1 != 0 {
            return false;
        }
        out.phase = self.phase.load(Relaxed);
        out.slot = self.slot.load(Relaxed);
        out.first = self.first.load(Relaxed);
        out.last = self.last.load(Relaxed);
        out.used = self.used();
        for slot in slots_in(out.used) {
            let from = self.row(slot);
            if let Some(to) = out.rows.get_mut(slot.index()) {
                to.exits = from.exits.load(Relaxed);
                for (to, from) in to.cycles.iter_mut().zip(&from.cycles) {
                    *to = from.load(Relaxed);
                }
            }
        }
        // ORDERING: What precedes is read before the number is read again.
        fence(Ordering::Acquire);
        self.seq.load(Relaxed) == seq
    }
}

/// The rows whose bits are set.
fn slots_in(used: [u64; WORDS]) -> impl Iterator<Item = Slot> {
    Slot::all().filter(move |slot| {
        used.get(slot.index() / 64)
            .is_some_and(|word| word.wrapping_shr(slot.index() as u32 % 64) & 1 != 0)
    })
}

/// The numbers of one row, at rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCopy {
    /// VM exits.
    pub exits: u64,
    /// TSC ticks by phase, in the order of [`Phase::ALL`].
    pub cycles: [u64; Phase::COUNT],
}

impl RowCopy {
    fn add(&mut self, other: &RowCopy) {
        self.exits = self.exits.wrapping_add(other.exits);
        for (to, from) in self.cycles.iter_mut().zip(other.cycles) {
            *to = to.wrapping_add(from);
        }
    }
}

/// A copy of a ledger, all of one moment. All-zero bytes are a valid, empty one.
#[derive(Clone, Debug)]
pub struct LedgerCopy {
    phase: u32,
    slot: u32,
    /// TSC at the vCPU's first event.
    pub first: u64,
    /// TSC at its latest transition.
    pub last: u64,
    used: [u64; WORDS],
    rows: [RowCopy; SLOTS],
}

impl LedgerCopy {
    /// An empty copy.
    pub const fn new() -> Self {
        const EMPTY: RowCopy = RowCopy {
            exits: 0,
            cycles: [0; Phase::COUNT],
        };
        Self {
            phase: 0,
            slot: 0,
            first: 0,
            last: 0,
            used: [0; WORDS],
            rows: [EMPTY; SLOTS],
        }
    }

    /// The phase the vCPU was in.
    pub fn phase(&self) -> Phase {
        Phase::from_number(self.phase).unwrap_or(Phase::Kernel)
    }

    /// The row of its latest exit.
    pub fn slot(&self) -> Slot {
        Slot::from_index(self.slot as usize).unwrap_or(Slot::OTHER)
    }

    /// The rows in use.
    pub fn rows(&self) -> impl Iterator<Item = (Slot, &RowCopy)> {
        slots_in(self.used).filter_map(|slot| Some((slot, self.rows.get(slot.index())?)))
    }

    /// Whether the cells sum to the time from first to last event, to the tick.
    pub fn balances(&self) -> bool {
        let mut sum = 0_u64;
        for (_, row) in self.rows() {
            for cycles in row.cycles {
                sum = sum.wrapping_add(cycles);
            }
        }
        sum == self.last.wrapping_sub(self.first)
    }
}

impl Default for LedgerCopy {
    fn default() -> Self {
        Self::new()
    }
}

/// The numbers of many vCPUs, those that are gone above all. Its user keeps writers apart by
/// a lock. All-zero bytes are valid totals of nothing.
#[derive(Clone, Debug)]
pub struct Totals {
    /// How many vCPUs were folded in.
    pub vcpus: u64,
    rows: [RowCopy; SLOTS],
}

impl Totals {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self {
            vcpus: 0,
            rows: LedgerCopy::new().rows,
        }
    }

    /// Adds a vCPU's numbers.
    pub fn fold(&mut self, ledger: &LedgerCopy) {
        self.vcpus = self.vcpus.wrapping_add(1);
        for (slot, from) in ledger.rows() {
            if let Some(to) = self.rows.get_mut(slot.index()) {
                to.add(from);
            }
        }
    }

    /// Adds other totals.
    pub fn add(&mut self, other: &Totals) {
        self.vcpus = self.vcpus.wrapping_add(other.vcpus);
        for (to, from) in self.rows.iter_mut().zip(&other.rows) {
            to.add(from);
        }
    }

    /// The numbers of one row.
    pub fn row(&self, slot: Slot) -> RowCopy {
        self.rows.get(slot.index()).copied().unwrap_or_default()
    }

    /// The rows that are other than zero.
    pub fn rows(&self) -> impl Iterator<Item = (Slot, &RowCopy)> {
        Slot::all()
            .filter_map(|slot| Some((slot, self.rows.get(slot.index())?)))
            .filter(|(_, row)| **row != RowCopy::default())
    }
}

impl Numbers for Totals {
    fn exits(&self, slot: Slot) -> u64 {
        self.row(slot).exits
    }

    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        let row = self.row(slot);
        row.cycles.get(phase as usize).copied().unwrap_or(0)
    }
}

impl Default for Totals {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;

    fn ledger() -> Box<Ledger> {
        // SAFETY: All-zero bytes are a valid ledger.
        Box::new(unsafe { core::mem::zeroed() })
    }

    #[test]
    fn a_row_is_one_cache_line_and_a_ledger_stays_small() {
        assert_eq!(size_of::<Row>(), 64);
        assert!(size_of::<Ledger>() <= 32 * 1024);
    }

    #[test]
    fn each_phase_gets_its_time() {
        let ledger = ledger();
        let (start, cpuid) = (
            Slot::START,
            super::super::reasons::slot(super::super::reasons::Isa::Vmx, 10),
        );
        ledger.begin(100, Phase::Kernel);
        ledger.entry(110);
        ledger.exit(130, cpuid);
        ledger.leave(131, Phase::Blocked);
        ledger.resume(1131);
        ledger.leave(1133, Phase::User);
        ledger.resume(1140);
        ledger.leave(1141, Phase::Preempted);
        ledger.resume(1200);
        ledger.entry(1201);
        assert_eq!(ledger.cycles(Phase::Kernel, start), 10);
        assert_eq!(ledger.cycles(Phase::Guest, start), 20);
        assert_eq!(ledger.cycles(Phase::Kernel, cpuid), 1 + 2 + 1 + 1);
        assert_eq!(ledger.cycles(Phase::Blocked, cpuid), 1000);
        assert_eq!(ledger.cycles(Phase::User, cpuid), 7);
        assert_eq!(ledger.cycles(Phase::Preempted, cpuid), 59);
        assert_eq!(ledger.exits(cpuid), 1);
    }

    proptest! {
        #[test]
        fn transitions_in_any_order_lose_and_invent_nothing(
            events in proptest::collection::vec((0_u8..4, any::<i16>(), 0..SLOTS, 2_u32..5), 0..400)
        ) {
            let ledger = ledger();
            let mut now = 1_u64 << 40;
            let mut exits = 0;
            ledger.begin(now, Phase::Guest);
            for (event, step, slot, phase) in events {
                // A step back now and then: clocks that part.
                now = now.wrapping_add_signed(i64::from(step) + 8000);
                match event {
                    0 => {
                        ledger.exit(now, Slot::from_index(slot).expect("below SLOTS"));
                        exits += 1;
                    }
                    1 => ledger.entry(now),
                    2 => ledger.leave(now, Phase::from_number(phase).expect("a phase")),
                    _ => ledger.resume(now),
                }
            }
            let mut copy = LedgerCopy::new();
            prop_assert!(ledger.try_copy(&mut copy));
            prop_assert!(copy.balances());
            prop_assert_eq!(copy.rows().map(|(_, row)| row.exits).sum::<u64>(), exits);
            let mut totals = Totals::new();
            totals.fold(&copy);
            totals.fold(&copy);
            prop_assert_eq!(totals.rows().map(|(_, row)| row.exits).sum::<u64>(), 2 * exits);
        }
    }

    #[test]
    fn a_reader_beside_a_writer_sees_a_balance() {
        let (ledger, done) = (ledger(), AtomicBool::new(false));
        ledger.begin(0, Phase::Guest);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for now in (0..3_000_000_u64).step_by(3) {
                    let slot = Slot::from_index(now as usize % 60).expect("below SLOTS");
                    ledger.exit(now, slot);
                    ledger.entry(now + 2);
                }
                done.store(true, Ordering::Release);
            });
            let (mut copy, mut copies) = (LedgerCopy::new(), 0);
            while !done.load(Ordering::Acquire) {
                if ledger.try_copy(&mut copy) {
                    assert!(copy.balances());
                    copies += 1;
                }
            }
            while !ledger.try_copy(&mut copy) {}
            assert!(copy.balances() && copies < usize::MAX);
            assert_eq!(copy.last, 2_999_999);
        });
    }
}
