// SPDX-License-Identifier: GPL-2.0

//! The ledger of one vCPU: every TSC tick of its life in exactly one cell.
//!
//! A ledger has one writer at a time, the thread that holds the vCPU. So the writer needs
//! no locked instruction: it loads, adds and stores. `core::sync::atomic` is used rather
//! than the kernel's atomics because those are an out-of-line call per operation on
//! kernels without inline helpers, measured at 95 ticks an exit.

use core::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};

use super::{
    histogram::{bucket, BUCKETS},
    phase::Phase,
    reasons::{Slot, SLOTS},
};

use Ordering::Relaxed;

mod copy;
use copy::slots_in;
pub use copy::{LedgerCopy, RowCopy, Totals};

/// Words of the bitmap of rows in use.
const WORDS: usize = SLOTS.div_ceil(64);

/// How many reasons of a vCPU can have a histogram. Linux guests cause some 20, and KVM has
/// handlers for 60; a reason that comes when all are taken has none, and its other numbers
/// all the same.
pub const HISTOGRAMS: usize = 40;

/// What is metered of one exit reason. One cache line: an exit writes to few of them.
#[repr(C, align(64))]
#[derive(Debug)]
struct Row {
    exits: AtomicU64,
    cycles: [AtomicU64; Phase::COUNT],
    /// The most kernel cycles that one exit took.
    max: AtomicU64,
    /// The number of its histogram, counted from 1; 0 while it has none.
    histogram: AtomicU32,
}

/// Exits of one reason by the kernel cycles that each took.
#[repr(C, align(64))]
#[derive(Debug)]
struct Histogram([AtomicU64; BUCKETS]);

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
    /// How many histograms are taken.
    taken: AtomicU32,
    last: AtomicU64,
    first: AtomicU64,
    /// The latest exit has not been followed by an entry yet: one more than what its row's
    /// kernel cell held when it came. 0 after the entry.
    open: AtomicU64,
    used: [AtomicU64; WORDS],
    rows: [Row; SLOTS],
    histograms: [Histogram; HISTOGRAMS],
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

    /// A reason occurs that has not occurred before.
    #[cold]
    fn first_exit(&self, slot: Slot) {
        self.use_row(slot);
        let taken = self.taken.load(Relaxed);
        if (taken as usize) < HISTOGRAMS {
            self.taken.store(taken.wrapping_add(1), Relaxed);
            let number = taken.wrapping_add(1);
            self.row(slot).histogram.store(number, Relaxed);
        }
    }

    /// At an entry: takes the kernel cycles since the latest exit as one sample, if that exit
    /// has not been entered from before.
    #[inline(always)]
    fn sample(&self, row: &Row) {
        let open = self.open.load(Relaxed);
        if open == 0 {
            return;
        }
        self.open.store(0, Relaxed);
        let kernel = row.cycles[Phase::Kernel as usize].load(Relaxed);
        let ticks = kernel.wrapping_sub(open.wrapping_sub(1));
        if ticks > row.max.load(Relaxed) {
            row.max.store(ticks, Relaxed);
        }
        if let Some(Histogram(buckets)) = self.histogram(row) {
            if let Some(samples) = buckets.get(bucket(ticks)) {
                add(samples, 1);
            }
        }
    }

    #[inline(always)]
    fn histogram(&self, row: &Row) -> Option<&Histogram> {
        let number = row.histogram.load(Relaxed) as usize;
        self.histograms.get(number.wrapping_sub(1))
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
    /// go backwards, as between CPUs whose clocks part, counts as none. Returns the row that
    /// it was booked on.
    #[inline(always)]
    fn transition(&self, now: u64, next: Phase) -> &Row {
        let last = self.last.load(Relaxed);
        let now = now.max(last);
        let row = self.row(self.current());
        if let Some(cell) = row.cycles.get(self.phase.load(Relaxed) as usize) {
            add(cell, now.wrapping_sub(last));
        }
        self.last.store(now, Relaxed);
        self.phase.store(next as u32, Relaxed);
        row
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
            let row = self.row(slot);
            let before = row.exits.load(Relaxed);
            if before == 0 {
                self.first_exit(slot);
            }
            row.exits.store(before.wrapping_add(1), Relaxed);
            let kernel = row.cycles[Phase::Kernel as usize].load(Relaxed);
            self.open.store(kernel.wrapping_add(1), Relaxed);
        });
    }

    /// A VM entry.
    #[inline(always)]
    pub fn entry(&self, now: u64) {
        self.change(|| {
            let row = self.transition(now, Phase::Guest);
            self.sample(row);
        });
    }

    /// The vCPU leaves its CPU, for the phase `phase`.
    #[inline]
    pub fn leave(&self, now: u64, phase: Phase) {
        self.change(|| {
            self.transition(now, phase);
        });
    }

    /// The vCPU is back on a CPU, in KVM.
    #[inline]
    pub fn resume(&self, now: u64) {
        self.change(|| {
            self.transition(now, Phase::Kernel);
        });
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
            let row = self.row(slot);
            let numbers = RowCopy {
                exits: row.exits.load(Relaxed),
                cycles: row.cycles.each_ref().map(|cell| cell.load(Relaxed)),
                max: row.max.load(Relaxed),
            };
            let histogram = self.histogram(row).map(|Histogram(buckets)| buckets);
            out.set_row(slot, numbers, row.histogram.load(Relaxed), histogram);
        }
        // ORDERING: What precedes is read before the number is read again.
        fence(Ordering::Acquire);
        self.seq.load(Relaxed) == seq
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

    /// What the module keeps of a vCPU beside its ledger takes less than this many bytes.
    const BESIDE: usize = 512;

    #[test]
    fn a_row_is_one_cache_line_and_a_vcpu_takes_32_kib_at_most() {
        assert_eq!((size_of::<Row>(), size_of::<Histogram>()), (64, 512));
        assert!(size_of::<Ledger>() + BESIDE <= 32 * 1024);
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
            prop_assert_eq!(copy.rows().map(|(_, row, _)| row.exits).sum::<u64>(), exits);
            let mut totals = Totals::new();
            totals.fold(&copy);
            totals.fold(&copy);
            prop_assert_eq!(totals.rows().map(|(_, row, _)| row.exits).sum::<u64>(), 2 * exits);
        }
    }

    proptest! {
        /// Each exit that is followed by an entry is one sample, of the kernel ticks between
        /// them, whatever sleep, preemption and user space come between.
        #[test]
        fn an_exit_is_one_sample_of_its_kernel_ticks(
            exits in proptest::collection::vec(
                (0..SLOTS, proptest::collection::vec((0_u64..1 << 20, 0_u64..1 << 30), 1..4)),
                0..200,
            )
        ) {
            let ledger = ledger();
            let mut now = 1000_u64;
            let mut expected = std::collections::BTreeMap::<usize, Vec<u64>>::new();
            ledger.begin(now, Phase::Kernel);
            ledger.entry(now);
            for (place, parts) in exits {
                now += 50;
                ledger.exit(now, Slot::from_index(place).expect("below SLOTS"));
                for (number, (kernel, away)) in parts.iter().enumerate() {
                    now += kernel;
                    if number > 0 {
                        ledger.leave(now, Phase::User);
                        now += away;
                        ledger.resume(now);
                    }
                }
                ledger.entry(now);
                let sample = parts.iter().map(|(kernel, _)| kernel).sum();
                expected.entry(place).or_default().push(sample);
            }
            let mut copy = LedgerCopy::new();
            prop_assert!(ledger.try_copy(&mut copy));
            let mut with_histogram = 0;
            for (slot, row, histogram) in copy.rows() {
                let Some(samples) = expected.get(&slot.index()) else {
                    prop_assert_eq!(slot, Slot::START);
                    continue;
                };
                prop_assert_eq!(row.cycles[Phase::Kernel as usize], samples.iter().sum::<u64>());
                prop_assert_eq!(Some(&row.max), samples.iter().max());
                if *histogram != [0; BUCKETS] {
                    with_histogram += 1;
                    let mut buckets = [0; BUCKETS];
                    for sample in samples {
                        buckets[bucket(*sample)] += 1;
                    }
                    prop_assert_eq!(histogram, &buckets);
                }
            }
            prop_assert_eq!(with_histogram, expected.len().min(HISTOGRAMS));
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
