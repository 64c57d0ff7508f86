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

/// The numbers of a row: eight, one cache line, so that an exit writes to few of them.
const ROW: usize = 8;
/// How many numbers all rows have.
const CELLS: usize = SLOTS * ROW;

/// A number of a row.
#[repr(u8)]
#[derive(Clone, Copy)]
enum Column {
    /// Exits.
    Exits = 0,
    /// TSC ticks in the first phase; those of the others follow.
    Cycles = 1,
    /// The most kernel ticks that one exit took.
    Max = 6,
    /// The number of the row's histogram, counted from 1; 0 while it has none.
    Histogram = 7,
}

/// The place of a cell.
///
/// # Invariants
///
/// The number, that of its row times [`ROW`] and its column, is below [`CELLS`].
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(u32);

impl Place {
    #[inline(always)]
    const fn of(slot: Slot, column: Column) -> Self {
        // INVARIANT: A slot is below SLOTS, and a column below ROW.
        Self((slot.index() * ROW + column as usize) as u32)
    }

    /// Where the ticks of a phase are booked, in the row of this cell.
    #[inline(always)]
    const fn of_phase(self, phase: Phase) -> Self {
        self.beside((Column::Cycles as u32).wrapping_add(phase as u32))
    }

    /// The cell in another column of the same row.
    #[inline(always)]
    const fn beside(self, column: u32) -> Self {
        const LAST: u32 = ROW as u32 - 1;
        // INVARIANT: The row stays, and the column is below ROW.
        Self((self.0 & !LAST) | (column & LAST))
    }

    /// The phase whose ticks the cell holds, as a number.
    #[inline(always)]
    const fn phase(self) -> u32 {
        (self.0 % ROW as u32).wrapping_sub(Column::Cycles as u32)
    }
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
    /// The [`Place`] that time is booked on now.
    booking: AtomicU32,
    /// How many histograms are taken.
    taken: AtomicU32,
    last: AtomicU64,
    first: AtomicU64,
    /// Kernel ticks of the latest exit that were booked before the vCPU last left its CPU, or
    /// [`CLOSED`]. 0 from an entry to the next such time.
    carried: AtomicU64,
    used: [AtomicU64; WORDS],
    /// By row and column; the rows begin a cache line each.
    cells: [AtomicU64; CELLS],
    histograms: [Histogram; HISTOGRAMS],
}

/// The kernel ticks to come are not those of an exit: there was none since the latest entry.
const CLOSED: u64 = u64::MAX;

/// Adds to a cell that only this thread writes.
#[inline(always)]
fn add(cell: &AtomicU64, value: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(value), Relaxed);
}

impl Ledger {
    #[inline(always)]
    fn cell(&self, place: Place) -> &AtomicU64 {
        // SAFETY: By the invariant of `Place`.
        unsafe { self.cells.get_unchecked(place.0 as usize) }
    }

    #[inline(always)]
    fn booking(&self) -> Place {
        // INVARIANT: Nothing but places is ever stored there, and 0 is one.
        Place(self.booking.load(Relaxed))
    }

    fn use_row(&self, slot: Slot) {
        if let Some(word) = self.used.get(slot.index() / 64) {
            let bit = 1_u64.wrapping_shl(slot.index() as u32 % 64);
            word.store(word.load(Relaxed) | bit, Relaxed);
        }
    }

    #[inline(always)]
    fn histogram(&self, row: Place) -> Option<&Histogram> {
        let number = self.cell(row.beside(Column::Histogram as u32));
        let number = number.load(Relaxed) as usize;
        self.histograms.get(number.wrapping_sub(1))
    }

    /// Begins a change that a reader sees whole or not at all; what `end_change` takes.
    #[inline(always)]
    fn begin_change(&self) -> u32 {
        let seq = self.seq.load(Relaxed);
        self.seq.store(seq.wrapping_add(1), Relaxed);
        // ORDERING: The odd number is visible before anything of the change.
        fence(Ordering::Release);
        seq
    }

    #[inline(always)]
    fn end_change(&self, seq: u32) {
        // ORDERING: The change is visible before the even number.
        self.seq.store(seq.wrapping_add(2), Ordering::Release);
    }

    /// Books the time since the last transition where it belongs; that place and the time.
    /// Time that seems to go backwards, as between CPUs whose clocks part, counts as none.
    #[inline(always)]
    fn book(&self, now: u64) -> (Place, u64) {
        let last = self.last.load(Relaxed);
        let now = now.max(last);
        let ticks = now.wrapping_sub(last);
        let booking = self.booking();
        add(self.cell(booking), ticks);
        self.last.store(now, Relaxed);
        (booking, ticks)
    }

    #[inline(always)]
    fn book_on(&self, place: Place) {
        self.booking.store(place.0, Relaxed);
    }

    /// The vCPU's first event, at TSC `now`, after which it is in `phase`.
    pub fn begin(&self, now: u64, phase: Phase) {
        let seq = self.begin_change();
        self.first.store(now, Relaxed);
        self.last.store(now, Relaxed);
        // The one row that gets cycles without an exit.
        self.use_row(Slot::START);
        self.book_on(Place::of(Slot::START, Column::Exits).of_phase(phase));
        if phase != Phase::Guest {
            self.carried.store(CLOSED, Relaxed);
        }
        self.end_change(seq);
    }

    /// A VM exit.
    #[inline(always)]
    pub fn exit(&self, now: u64, slot: Slot) {
        let seq = self.begin_change();
        self.book(now);
        let exits = Place::of(slot, Column::Exits);
        let before = self.cell(exits).load(Relaxed);
        self.cell(exits).store(before.wrapping_add(1), Relaxed);
        self.book_on(exits.of_phase(Phase::Kernel));
        if before == 0 {
            return self.end_first_exit(seq, slot);
        }
        self.end_change(seq);
    }

    /// Ends the change of an exit whose reason has not occurred before.
    #[cold]
    #[inline(never)]
    fn end_first_exit(&self, seq: u32, slot: Slot) {
        self.use_row(slot);
        let taken = self.taken.load(Relaxed);
        if (taken as usize) < HISTOGRAMS {
            let number = taken.wrapping_add(1);
            self.taken.store(number, Relaxed);
            let cell = self.cell(Place::of(slot, Column::Histogram));
            cell.store(number.into(), Relaxed);
        }
        self.end_change(seq);
    }

    /// A VM entry: the kernel ticks since the latest exit become one sample.
    #[inline(always)]
    pub fn entry(&self, now: u64) {
        let seq = self.begin_change();
        let (booking, ticks) = self.book(now);
        self.book_on(booking.of_phase(Phase::Guest));
        if self.carried.load(Relaxed) != 0 {
            return self.end_interrupted_exit(seq, booking, ticks);
        }
        self.sample(booking, ticks);
        self.end_change(seq);
    }

    #[inline(always)]
    fn sample(&self, row: Place, ticks: u64) {
        let max = self.cell(row.beside(Column::Max as u32));
        if ticks > max.load(Relaxed) {
            max.store(ticks, Relaxed);
        }
        if let Some(Histogram(buckets)) = self.histogram(row) {
            if let Some(samples) = buckets.get(bucket(ticks)) {
                add(samples, 1);
            }
        }
    }

    /// Ends the change of an entry after an exit in the course of which the vCPU left its CPU.
    #[inline(never)]
    fn end_interrupted_exit(&self, seq: u32, row: Place, ticks: u64) {
        let carried = self.carried.load(Relaxed);
        self.carried.store(0, Relaxed);
        if carried != CLOSED {
            self.sample(row, ticks.wrapping_add(carried));
        }
        self.end_change(seq);
    }

    /// The vCPU leaves its CPU, for the phase `phase`.
    #[inline]
    pub fn leave(&self, now: u64, phase: Phase) {
        let seq = self.begin_change();
        let (booking, ticks) = self.book(now);
        self.book_on(booking.of_phase(phase));
        let carried = self.carried.load(Relaxed);
        if booking == booking.of_phase(Phase::Guest) {
            // An entry that was not followed by an exit, as one that failed.
            self.carried.store(CLOSED, Relaxed);
        } else if booking == booking.of_phase(Phase::Kernel) && carried != CLOSED {
            self.carried.store(carried.wrapping_add(ticks), Relaxed);
        }
        self.end_change(seq);
    }

    /// The vCPU is back on a CPU, in KVM.
    #[inline]
    pub fn resume(&self, now: u64) {
        let seq = self.begin_change();
        let (booking, _) = self.book(now);
        self.book_on(booking.of_phase(Phase::Kernel));
        self.end_change(seq);
    }

    /// Exits counted in a row.
    pub fn exits(&self, slot: Slot) -> u64 {
        self.cell(Place::of(slot, Column::Exits)).load(Relaxed)
    }

    /// TSC ticks in a cell.
    pub fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        let row = Place::of(slot, Column::Exits);
        self.cell(row.of_phase(phase)).load(Relaxed)
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
        let booking = self.booking();
        out.slot = booking.0 / ROW as u32;
        out.phase = booking.phase();
        out.first = self.first.load(Relaxed);
        out.last = self.last.load(Relaxed);
        out.used = self.used();
        for slot in slots_in(out.used) {
            let row = Place::of(slot, Column::Exits);
            let number = self.cell(Place::of(slot, Column::Histogram));
            let numbers = RowCopy {
                exits: self.exits(slot),
                cycles: Phase::ALL.map(|phase| self.cycles(phase, slot)),
                max: self.cell(Place::of(slot, Column::Max)).load(Relaxed),
            };
            let histogram = self.histogram(row).map(|Histogram(buckets)| buckets);
            out.set_row(slot, numbers, number.load(Relaxed) as u32, histogram);
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
        assert_eq!((8 * ROW, size_of::<Histogram>()), (64, 512));
        assert_eq!(core::mem::offset_of!(Ledger, cells) % 64, 0);
        let phases_end = Column::Cycles as usize + Phase::COUNT;
        assert_eq!(phases_end, Column::Max as usize);
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
