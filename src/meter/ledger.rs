// SPDX-License-Identifier: GPL-2.0

//! The ledger of one vCPU: every TSC tick of its life in exactly one cell.
//!
//! A ledger has one writer at a time, the thread that holds the vCPU. So the writer needs
//! no locked instruction: it loads, adds and stores. `core::sync::atomic` is used rather
//! than the kernel's atomics because those are an out-of-line call per operation on
//! kernels without inline helpers, measured at 95 ticks an exit.

#[cfg(not(loom))]
use core::mem::offset_of;

use super::{
    atomic::{add, fence, mark, own, AtomicPtr, AtomicU32, AtomicU64, Ordering},
    histogram::{bucket, usual_bucket, BUCKETS},
    parts,
    phase::Phase,
    reasons::{Slot, SLOTS},
    slow::{Leaving, Taken},
    tables::{self, About, Keys, Tables, TablesCopy, Which},
};

use Ordering::Relaxed;

mod copy;
use copy::{set, slots_in};
pub use copy::{LedgerCopy, RowCopy, Slots, Totals};

/// Tables of a ledger that is copied, and room for their copy.
pub type WithTables<'a, 'b> = Option<(&'a Tables, &'b mut TablesCopy)>;

/// A copy that is to be made of a ledger, and of the vCPU's tables where that is wanted.
#[derive(Debug)]
pub struct Copying<'a> {
    /// What is copied.
    pub ledger: &'a Ledger,
    /// Room for it.
    pub out: &'a mut LedgerCopy,
    /// The tables, and room for them.
    pub tables: WithTables<'a, 'a>,
}

impl Copying<'_> {
    /// Try once; return false when a transition came between.
    pub fn try_copy(&mut self) -> bool {
        self.ledger.try_copy_with(self.out, &mut self.tables)
    }

    /// Try up to so many times, as [`Ledger::copy`].
    pub fn copy(&mut self, tries: u32) -> Option<u32> {
        self.ledger.copy_with(tries, self.out, &mut self.tables)
    }
}

/// Words of the bitmap of rows in use.
const WORDS: usize = SLOTS.div_ceil(64);

/// Reasons of one vCPU that can have a histogram. Linux guests cause some 20, and KVM has
/// handlers for 60; a reason that comes when all are taken has none, and its other numbers
/// all the same.
pub const HISTOGRAMS: usize = 33;

/// The usual attempts of [`Ledger::copy`] before it gives up, and the most.
///
/// With 20 reasons in use and 300 to 1500 ticks between transitions, 99.9% of copies take up to 6
/// of them where the CPUs share a cache and up to 20 where they do not. All in vain take 4 µs and
/// 35 µs beside a transition each 300 ticks, 30 µs and 100 µs beside a writer that does nothing
/// but transitions: `make stress`.
pub const TRIES: u32 = 24;

/// A step back of the clock that no skew between CPUs explains, in TSC ticks: some 20 s. The
/// clock has begun anew.
const RESTARTED: u64 = 1 << 36;

/// The numbers of a row: eight, one cache line, so that an exit writes to few of them.
const ROW: usize = 8;
/// How many bytes these take.
const ROW_BYTES: usize = ROW * size_of::<AtomicU64>();
/// How many numbers all rows have.
const ROWS: usize = SLOTS * ROW;
/// How many numbers all rows and histograms have, with one more that nobody reads, for the
/// samples of rows without a histogram.
const CELLS: usize = ROWS + (1 + HISTOGRAMS) * BUCKETS;

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
    /// Where the row's histogram begins, counted from the first one; 0 while it has none.
    Histogram = 7,
}

/// A row, by how many bytes from the first one it begins: that takes the hot path the fewest
/// instructions.
///
/// # Invariants
///
/// The number is that of a slot times [`ROW_BYTES`]; it fits into 32 bits.
#[derive(Clone, Copy)]
struct Row(usize);

impl Row {
    #[inline(always)]
    const fn of(slot: Slot) -> Self {
        // INVARIANT: By what is computed.
        Self(slot.index() * ROW_BYTES)
    }

    /// Return its slot: there is always one.
    #[inline(always)]
    const fn slot(self) -> Option<Slot> {
        Slot::from_index(self.0 / ROW_BYTES)
    }
}

/// The ledger of one vCPU.
///
/// All-zero bytes are a valid ledger that has not begun, so that it can be made in zeroed
/// memory without a copy on a small stack.
///
/// Each transition has a TSC of its own, at least one tick after the one before. It stands in
/// `begun` before anything of the transition is written, and in `last` after all of it. So a
/// reader that finds in `begun`, afterwards, what it found in `last` before, has read what
/// belongs together.
///
/// # Invariants
///
/// - Once it has begun, the cells of all rows sum to `last - first` between two transitions,
///   and only rows whose bit in `used` is set are other than zero.
/// - `row` holds the number of a `Row`, and the cell `Column::Histogram` of a row a
///   multiple of [`BUCKETS`] up to that of [`HISTOGRAMS`].
/// - `tables` is null or points to tables, which stay for as long as a transition takes that has
///   found them here.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Ledger {
    begun: AtomicU64,
    last: AtomicU64,
    /// Kernel ticks of the latest exit that were booked before the vCPU last left its CPU, or
    /// [`CLOSED`]. 0 from an entry to the next such time.
    carried: AtomicU64,
    /// The row of the latest exit.
    row: AtomicU32,
    phase: AtomicU32,
    first: AtomicU64,
    /// How many histograms are taken.
    taken: AtomicU32,
    used: [AtomicU64; WORDS],
    /// The vCPU's tables, while there are some.
    tables: AtomicPtr<Tables>,
    cells: Cells,
    /// By slot: of its exits, those from a nested guest.
    nested: [AtomicU64; SLOTS],
    /// By slot: TSC ticks in [`Phase::Waiting`], for which a row has no room. A transition
    /// into or out of that phase is rare.
    waiting: [AtomicU64; SLOTS],
}

/// By row and column; then the histograms. The rows begin a cache line each.
#[repr(C, align(64))]
#[derive(Debug)]
struct Cells([AtomicU64; CELLS]);

/// The kernel ticks to come are not those of an exit: there was none since the latest entry.
const CLOSED: u64 = u64::MAX;

// cli/bpf/ledger.h has the same struct, with these numbers.
#[cfg(not(loom))]
const _: () = {
    assert!(offset_of!(Ledger, first) == 32);
    assert!(offset_of!(Ledger, used) == 48);
    assert!(offset_of!(Ledger, cells) == 128);
    assert!(offset_of!(Ledger, nested) == 28928);
    assert!(offset_of!(Ledger, waiting) == 30352);
    assert!(size_of::<Ledger>() == 31808);
};

impl Ledger {
    #[inline(always)]
    fn at(&self, row: Row, column: u32) -> &AtomicU64 {
        let first = self.cells.0.as_ptr();
        let column = column as usize & (ROW - 1);
        // SAFETY: By the invariant of `Row` that row is there, and the column is one of it.
        unsafe { &*first.byte_add(row.0).add(column) }
    }

    #[inline(always)]
    fn cell(&self, row: Row, column: Column) -> &AtomicU64 {
        self.at(row, column as u32)
    }

    /// The ticks of a row in a phase other than [`Phase::Waiting`].
    #[inline(always)]
    fn phase_cell(&self, row: Row, phase: Phase) -> &AtomicU64 {
        self.at(row, (Column::Cycles as u32).wrapping_add(phase as u32))
    }

    #[inline(always)]
    fn waiting_cell(&self, slot: Slot) -> &AtomicU64 {
        // SAFETY: By the invariant of `Slot` its index is below SLOTS.
        unsafe { self.waiting.get_unchecked(slot.index()) }
    }

    #[inline(always)]
    fn row(&self) -> Row {
        // INVARIANT: By that of `Ledger`.
        Row(self.row.load(Relaxed) as usize)
    }

    /// A cell of the histogram of a row.
    ///
    /// # Safety
    ///
    /// `bucket` must be below [`BUCKETS`].
    #[inline(always)]
    unsafe fn samples(&self, row: Row, bucket: usize) -> &AtomicU64 {
        // SAFETY: As in `begin_transition`.
        let histogram = unsafe { own(self.cell(row, Column::Histogram)) } as u32;
        let place = histogram.wrapping_add(bucket as u32) as usize;
        // SAFETY: By the invariant of `Ledger` that histogram is there, and by the contract of
        // this function the bucket is one of it.
        unsafe { self.cells.0.get_unchecked(place.wrapping_add(ROWS)) }
    }

    fn use_row(&self, slot: Slot) {
        mark(&self.used, slot.index());
    }

    /// Begins a transition at TSC `now`; the time since the last one.
    ///
    /// `None` when no time has passed, or seems to have gone backwards, as between CPUs whose
    /// clocks part: then nothing has begun, and the transition is to happen at
    /// [`Self::one_tick_on`].
    #[inline(always)]
    fn begin_transition(&self, now: u64) -> Option<u64> {
        // SAFETY: This thread holds the vCPU, so nobody else writes its ledger.
        let last = unsafe { own(&self.last) };
        if now <= last {
            return None;
        }
        self.begun.store(now, Relaxed);
        // ORDERING: Who sees anything of the transition sees that it has begun.
        fence(Ordering::Release);
        Some(now.wrapping_sub(last))
    }

    /// Return the TSC of a transition for which the clock, at `now`, stands still or goes back:
    /// one tick after the latest one. A clock that begins anew is followed.
    #[cold]
    fn one_tick_on(&self, now: u64) -> u64 {
        let next = self.last.load(Relaxed).wrapping_add(1);
        if next.wrapping_sub(now) < RESTARTED {
            return next;
        }
        self.rebase(next, now);
        now.wrapping_add(1)
    }

    /// Book the time up to `then` on the present phase, and go on at `now` by a clock that has
    /// begun anew. `then` and `now` are one moment, by the clock before and after.
    ///
    /// `first` moves with the clock, and may lie before its zero: differences are modulo 2^64.
    pub fn rebase(&self, then: u64, now: u64) {
        // Another CPU may have measured, whose clock was behind.
        let then = then.max(self.last.load(Relaxed));
        let ticks = then.wrapping_sub(self.last.load(Relaxed));
        self.begun.store(now, Relaxed);
        // ORDERING: As in `begin_transition`.
        fence(Ordering::Release);
        let phase = self.phase.load(Relaxed);
        self.book(phase, ticks);
        let life = then.wrapping_sub(self.first.load(Relaxed));
        self.first.store(now.wrapping_sub(life), Relaxed);
        let carried = self.carried.load(Relaxed);
        if phase == Phase::Kernel as u32 && carried != CLOSED {
            self.carried.store(carried.wrapping_add(ticks), Relaxed);
        }
        // SAFETY: This is a transition, or no other CPU runs.
        if let Some(tables) = unsafe { self.tables() } {
            tables.book(phase, ticks);
            tables.rebase(then, now);
            let last = self.last.load(Relaxed);
            tables.slow().rebase(last, then, now, phase);
        }
        self.end_transition(now);
    }

    /// Return the vCPU's tables, if there are some.
    ///
    /// # Safety
    ///
    /// They may be used in a transition of the vCPU's own thread, or while something else keeps
    /// them.
    #[inline(always)]
    pub unsafe fn tables(&self) -> Option<&Tables> {
        // ORDERING: Who finds them finds them zeroed.
        // SAFETY: By the invariant of `Ledger`, and the contract of this function.
        unsafe { self.tables.load(Ordering::Acquire).as_ref() }
    }

    /// Give the vCPU tables, or with null none; return those it had.
    ///
    /// # Safety
    ///
    /// The tables must stay for as long as they are here, and those that are returned for as long
    /// as a transition may take that has found them.
    pub unsafe fn set_tables(&self, tables: *mut Tables) -> *mut Tables {
        // ORDERING: See `tables`.
        self.tables.swap(tables, Ordering::AcqRel)
    }

    /// The row of the latest exit.
    #[inline(always)]
    pub(super) fn slot(&self) -> Option<Slot> {
        self.row().slot()
    }

    #[inline(always)]
    fn end_transition(&self, now: u64) {
        // ORDERING: Who sees that it has ended sees all of it.
        self.last.store(now, Ordering::Release);
    }

    /// A ledger that has not begun, where loom's atomics are none of zeroed memory.
    #[cfg(loom)]
    #[allow(clippy::new_without_default, reason = "of the models alone")]
    pub fn new() -> Box<Self> {
        let mut ledger = Box::<Self>::new_uninit();
        let at = ledger.as_mut_ptr();
        // SAFETY: Every field is written once, in place, as a model's stack is small.
        unsafe {
            for word in [
                &raw mut (*at).begun,
                &raw mut (*at).last,
                &raw mut (*at).carried,
                &raw mut (*at).first,
            ] {
                word.write(AtomicU64::new(0));
            }
            for word in [
                &raw mut (*at).row,
                &raw mut (*at).phase,
                &raw mut (*at).taken,
            ] {
                word.write(AtomicU32::new(0));
            }
            let fill = |first: *mut AtomicU64, count| {
                for place in 0..count {
                    first.add(place).write(AtomicU64::new(0));
                }
            };
            (&raw mut (*at).tables).write(AtomicPtr::new(core::ptr::null_mut()));
            fill((&raw mut (*at).used).cast(), WORDS);
            fill((&raw mut (*at).cells.0).cast(), CELLS);
            fill((&raw mut (*at).nested).cast(), SLOTS);
            fill((&raw mut (*at).waiting).cast(), SLOTS);
            ledger.assume_init()
        }
    }

    /// Return true if the vCPU has had its first event. For the thread that holds the vCPU.
    pub fn has_begun(&self) -> bool {
        self.used() != [0; WORDS]
    }

    /// Take the vCPU's first event, at TSC `now`, after which it is in `phase`.
    pub fn begin(&self, now: u64, phase: Phase) {
        self.begun.store(now, Relaxed);
        // ORDERING: As in `begin_transition`.
        fence(Ordering::Release);
        self.first.store(now, Relaxed);
        // The one row that gets cycles without an exit.
        self.use_row(Slot::START);
        self.row.store(Row::of(Slot::START).0 as u32, Relaxed);
        self.phase.store(phase as u32, Relaxed);
        if phase != Phase::Guest {
            self.carried.store(CLOSED, Relaxed);
        }
        self.end_transition(now);
    }

    /// A VM exit: the guest's phase ends.
    #[inline(always)]
    pub fn exit(&self, now: u64, slot: Slot) {
        self.exit_from::<false>(now, slot);
    }

    /// A VM exit of a vCPU that has tables. `RING` tells whether it has a ring of its last exits.
    #[inline(always)]
    pub fn exit_with<const RING: bool>(&self, tables: &Tables, now: u64, about: &About) {
        if let Err(key) = self.exit_like_before::<RING>(tables, now, about) {
            self.exit_otherwise(tables, now, about, key);
        }
    }

    /// A VM exit of a vCPU that has tables, if that has the latest rows and the clock goes on; else
    /// nothing has happened, and the exit's key is returned.
    ///
    /// # Errors
    ///
    /// The key: the exit is one for [`Self::exit_otherwise`].
    #[inline(always)]
    pub fn exit_like_before<const RING: bool>(
        &self,
        tables: &Tables,
        now: u64,
        about: &About,
    ) -> Result<(), u64> {
        let (key, rows) = match (about.nested, about.rip) {
            (false, Some(rip)) => tables.latest_rows(about.slot, about.key, rip),
            _ => (about.whole_key(), None),
        };
        if let Some(rows) = rows.filter(|_| !RING || tables.slow().has_room()) {
            if let Some(ticks) = self.begin_transition(now) {
                tables.take_exit(rows);
                if RING {
                    tables.slow().take_exit(&Taken {
                        now,
                        guest: ticks,
                        key,
                        rip: about.rip.unwrap_or(0),
                    });
                }
                let row = self.change_to_kernel(about.slot, ticks);
                if parts::COUNTS {
                    add(self.cell(row, Column::Exits), 1);
                }
                self.end_transition(now);
                return Ok(());
            }
        }
        Err(key)
    }

    /// Any other VM exit of a vCPU that has tables.
    #[inline(always)]
    pub fn exit_otherwise(&self, tables: &Tables, now: u64, about: &About, key: u64) {
        let Keys { which, rip, .. } = about.keys();
        self.exit_anew(rip, now, which, key, tables);
    }

    /// A VM exit of a vCPU that has tables, but may have no row for it; or the clock stands still.
    /// All goes in registers, and in those that it is in before.
    #[inline(never)]
    fn exit_anew(&self, rip: u64, now: u64, which: Which, key: u64, tables: &Tables) {
        let mut now = now;
        let ticks = match self.begin_transition(now) {
            Some(ticks) => ticks,
            None => {
                now = self.one_tick_on(now);
                self.begin_transition(now).unwrap_or(0)
            }
        };
        let rows = tables.rows_for(self, now, &Keys { which, key, rip });
        tables.take_exit(rows);
        let slow = tables.slow();
        slow.see_to_window(now);
        if slow.has_ring() {
            slow.make_room();
            slow.take_exit(&Taken {
                now,
                guest: ticks,
                key,
                rip,
            });
        }
        self.count_exit(now, which.slot(), ticks, which.is_nested());
    }

    /// A VM exit from a nested guest, an L2.
    #[inline(never)]
    pub fn exit_from_nested(&self, now: u64, slot: Slot) {
        self.exit_from::<true>(now, slot);
    }

    #[inline(always)]
    fn exit_from<const NESTED: bool>(&self, now: u64, slot: Slot) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_exit::<NESTED>(now, Row::of(slot));
        };
        self.count_exit(now, slot, ticks, NESTED);
    }

    /// Count an exit after `ticks` in the guest, and end the transition.
    #[inline(always)]
    fn count_exit(&self, now: u64, slot: Slot, ticks: u64, nested: bool) {
        let row = self.change_to_kernel(slot, ticks);
        if nested {
            add(self.nested_cell(slot), 1);
        }
        if parts::COUNTS {
            let exits = self.cell(row, Column::Exits);
            // SAFETY: As in `begin_transition`.
            if unsafe { own(exits) } == 0 {
                return self.end_first_exit(now);
            }
            add(exits, 1);
        }
        self.end_transition(now);
    }

    /// Book `ticks` in the guest, and have the vCPU in the kernel for an exit of a reason; return
    /// its row.
    #[inline(always)]
    fn change_to_kernel(&self, slot: Slot, ticks: u64) -> Row {
        if parts::PHASES {
            add(self.phase_cell(self.row(), Phase::Guest), ticks);
        }
        let row = Row::of(slot);
        self.row.store(row.0 as u32, Relaxed);
        self.phase.store(Phase::Kernel as u32, Relaxed);
        row
    }

    #[inline(always)]
    fn nested_cell(&self, slot: Slot) -> &AtomicU64 {
        // SAFETY: By the invariant of `Slot` its index is below SLOTS.
        unsafe { self.nested.get_unchecked(slot.index()) }
    }

    /// The row of an exit comes here, and not its slot, so that the usual way needs no copy of the slot.
    #[cold]
    #[inline(never)]
    fn late_exit<const NESTED: bool>(&self, now: u64, row: Row) {
        if let Some(slot) = row.slot() {
            self.exit_from::<NESTED>(self.one_tick_on(now), slot);
        }
    }

    /// Ends the transition of the latest exit, whose reason has not occurred before.
    #[cold]
    #[inline(never)]
    fn end_first_exit(&self, now: u64) {
        let row = self.row();
        if let Some(slot) = row.slot() {
            self.use_row(slot);
        }
        add(self.cell(row, Column::Exits), 1);
        let taken = self.taken.load(Relaxed);
        if (taken as usize) < HISTOGRAMS {
            let taken = taken.wrapping_add(1);
            self.taken.store(taken, Relaxed);
            // INVARIANT: At most HISTOGRAMS times BUCKETS.
            let place = u64::from(taken).wrapping_mul(BUCKETS as u64);
            self.cell(row, Column::Histogram).store(place, Relaxed);
        }
        self.end_transition(now);
    }

    /// A VM entry: the kernel's phase ends, and its ticks since the latest exit become one
    /// sample.
    #[inline(always)]
    pub fn entry(&self, now: u64) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_entry(now);
        };
        let row = self.enter_after(ticks);
        if parts::HISTOGRAMS {
            // SAFETY: As in `begin_transition`.
            if unsafe { own(&self.carried) } != 0 {
                return self.end_unusual_exit(now, row, ticks);
            }
            let Some(bucket) = usual_bucket(ticks) else {
                return self.end_unusual_exit(now, row, ticks);
            };
            self.sample(row, ticks, bucket);
        }
        self.end_transition(now);
    }

    /// A VM entry of a vCPU that has tables. `cpu` tells the CPU.
    #[inline(always)]
    pub fn entry_with(&self, tables: &Tables, now: u64, cpu: impl FnOnce() -> u32) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_entry_with(tables, now, cpu());
        };
        tables.book_kernel(ticks);
        let row = self.enter_after(ticks);
        // Where the kernel's ticks are carried over, that is 0.
        if ticks > tables.slow().floor() {
            return self.end_exit_with(tables, now, row, ticks, cpu());
        }
        if parts::HISTOGRAMS {
            let Some(bucket) = usual_bucket(ticks) else {
                return self.end_unusual_exit(now, row, ticks);
            };
            self.sample(row, ticks, bucket);
        }
        self.end_transition(now);
    }

    /// Have the vCPU in the guest after `ticks` in the kernel; return the row of its latest exit.
    #[inline(always)]
    fn enter_after(&self, ticks: u64) -> Row {
        let row = self.row();
        if parts::PHASES {
            add(self.phase_cell(row, Phase::Kernel), ticks);
        }
        self.phase.store(Phase::Guest as u32, Relaxed);
        row
    }

    #[cold]
    #[inline(never)]
    fn late_entry(&self, now: u64) {
        self.entry(self.one_tick_on(now));
    }

    #[cold]
    #[inline(never)]
    fn late_entry_with(&self, tables: &Tables, now: u64, cpu: u32) {
        self.entry_with(tables, self.one_tick_on(now), || cpu);
    }

    /// Ends the transition of an entry by a CPU, after an exit in the course of which the vCPU left
    /// its CPU, or that may be one of the slowest.
    #[inline(never)]
    fn end_exit_with(&self, tables: &Tables, now: u64, row: Row, ticks: u64, cpu: u32) {
        let carried = self.carried.load(Relaxed);
        self.carried.store(0, Relaxed);
        let slow = tables.slow();
        if carried == CLOSED {
            slow.end_none(now, cpu);
            return self.end_transition(now);
        }
        let kernel = ticks.wrapping_add(carried);
        if parts::HISTOGRAMS {
            self.sample(row, kernel, bucket(kernel));
        }
        if slow.is_to_be_told(now, kernel) {
            return self.end_slow_exit(tables, now, kernel, carried != 0, cpu);
        }
        slow.end(cpu);
        self.end_transition(now);
    }

    /// Ends the transition of an entry by a CPU, after an exit of so many kernel ticks that may be
    /// one of the slowest. `left` tells whether the vCPU has left its CPU meanwhile.
    #[inline(never)]
    fn end_slow_exit(&self, tables: &Tables, now: u64, kernel: u64, left: bool, cpu: u32) {
        let slow = tables.slow();
        if let Some(exited) = tables.latest_exit(self) {
            slow.tell(&exited, now, kernel, left, cpu);
        }
        slow.end(cpu);
        self.end_transition(now);
    }

    /// Ends the transition of an entry after an exit in the course of which the vCPU left its
    /// CPU, after one that took less or more than exits do, or after none.
    #[inline(never)]
    fn end_unusual_exit(&self, now: u64, row: Row, ticks: u64) {
        let carried = self.carried.load(Relaxed);
        self.carried.store(0, Relaxed);
        if carried != CLOSED {
            let ticks = ticks.wrapping_add(carried);
            self.sample(row, ticks, bucket(ticks));
        }
        self.end_transition(now);
    }

    /// Takes the sample of an exit, into the bucket that it belongs to.
    #[inline(always)]
    fn sample(&self, row: Row, ticks: u64, bucket: usize) {
        let max = self.cell(row, Column::Max);
        // SAFETY: As in `begin_transition`.
        if ticks > unsafe { own(max) } {
            max.store(ticks, Relaxed);
        }
        // SAFETY: `bucket` and `usual_bucket` give no other ones.
        add(unsafe { self.samples(row, bucket) }, 1);
    }

    /// The vCPU leaves its CPU, for the phase `phase`.
    #[inline(always)]
    pub fn leave(&self, now: u64, phase: Phase) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_leave(now, phase);
        };
        self.leave_after(now, phase, ticks);
    }

    /// A vCPU that has tables leaves its CPU, which `cpu` tells.
    #[inline(always)]
    pub fn leave_with(
        &self,
        tables: &Tables,
        now: u64,
        leaving: Leaving,
        cpu: impl FnOnce() -> u32,
    ) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_leave_with(tables, now, leaving, cpu());
        };
        self.leave_otherwise_with(tables, now, ticks, leaving, cpu());
    }

    /// A vCPU that has tables leaves its CPU, which `cpu` tells, for user space; why is told as in
    /// [`Leaving`].
    #[inline(always)]
    pub fn leave_to_user_with(
        &self,
        tables: &Tables,
        now: u64,
        why: impl FnOnce() -> Option<u16>,
        cpu: impl FnOnce() -> u32,
    ) {
        const { assert!(ROW_BYTES << 10 == 1 << tables::REASON_SHIFT) };
        let leaving = |to_user| Leaving {
            phase: Phase::User,
            to_user,
        };
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_leave_with(tables, now, leaving(why()), cpu());
        };
        // Apart, so that the usual way has nothing to do for the others.
        if self.phase.load(Relaxed) != Phase::Kernel as u32 {
            return self.leave_otherwise_with(tables, now, ticks, leaving(why()), cpu());
        }
        let Some(why) = why() else {
            return self.leave_otherwise_with(tables, now, ticks, leaving(None), cpu());
        };
        // As `tables::user_tag`, without a look at which reason it is.
        let row = self.row.load(Relaxed).wrapping_add(ROW_BYTES as u32);
        let tag = u64::from(row << 10 | u32::from(why));
        let Some(row) = tables.latest_user(tag) else {
            return self.leave_otherwise_with(tables, now, ticks, leaving(Some(why)), cpu());
        };
        tables.book_kernel(ticks);
        tables.count_user(row);
        tables.slow().leave_to_user(why);
        self.leave_kernel(now, Phase::User, ticks);
    }

    /// As above, to elsewhere than to user space for what it was there for last, or from elsewhere
    /// than from KVM.
    #[inline(never)]
    fn leave_otherwise_with(
        &self,
        tables: &Tables,
        now: u64,
        ticks: u64,
        leaving: Leaving,
        cpu: u32,
    ) {
        let left = self.phase.load(Relaxed);
        let slow = tables.slow();
        tables.book(left, ticks);
        if left == Phase::Kernel as u32 {
            slow.leave(leaving, cpu);
        } else if left == Phase::Guest as u32 {
            slow.leave_guest(self.last.load(Relaxed));
        } else {
            slow.pass(left, ticks);
        }
        if leaving.phase == Phase::User {
            tables.leave_to_user(self.slot(), leaving.to_user);
        }
        self.leave_after(now, leaving.phase, ticks);
    }

    /// Have the vCPU off its CPU after `ticks` of the present phase, and end the transition.
    #[inline(always)]
    fn leave_after(&self, now: u64, phase: Phase, ticks: u64) {
        if self.phase.load(Relaxed) != Phase::Kernel as u32 {
            return self.leave_outside(now, phase, ticks);
        }
        self.leave_kernel(now, phase, ticks);
    }

    /// Have the vCPU off its CPU after `ticks` in KVM, and end the transition.
    #[inline(always)]
    fn leave_kernel(&self, now: u64, phase: Phase, ticks: u64) {
        if parts::PHASES {
            add(self.phase_cell(self.row(), Phase::Kernel), ticks);
        }
        self.phase.store(phase as u32, Relaxed);
        let carried = self.carried.load(Relaxed);
        if carried != CLOSED {
            self.carried.store(carried.wrapping_add(ticks), Relaxed);
        }
        self.end_transition(now);
    }

    /// Slow path of [`Self::leave`]: the vCPU was not in KVM, after `ticks` of another phase.
    #[cold]
    #[inline(never)]
    fn leave_outside(&self, now: u64, phase: Phase, ticks: u64) {
        let left = self.phase.load(Relaxed);
        self.book(left, ticks);
        self.phase.store(phase as u32, Relaxed);
        if left == Phase::Guest as u32 {
            // An entry that was not followed by an exit, as one that failed.
            self.carried.store(CLOSED, Relaxed);
        }
        self.end_transition(now);
    }

    #[cold]
    #[inline(never)]
    fn late_leave(&self, now: u64, phase: Phase) {
        self.leave(self.one_tick_on(now), phase);
    }

    #[cold]
    #[inline(never)]
    fn late_leave_with(&self, tables: &Tables, now: u64, leaving: Leaving, cpu: u32) {
        self.leave_with(tables, self.one_tick_on(now), leaving, || cpu);
    }

    /// The vCPU is back on a CPU, in KVM.
    #[inline(always)]
    pub fn resume(&self, now: u64) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_resume(now);
        };
        self.resume_after(now, ticks);
    }

    /// A vCPU that has tables is back on a CPU, in KVM.
    #[inline(always)]
    pub fn resume_with(&self, tables: &Tables, now: u64) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_resume_with(tables, now);
        };
        if self.phase.load(Relaxed) != Phase::User as u32 {
            return self.resume_otherwise_with(tables, now, ticks);
        }
        tables.book_user(ticks);
        tables.slow().pass_user(ticks);
        if parts::PHASES {
            add(self.phase_cell(self.row(), Phase::User), ticks);
        }
        self.phase.store(Phase::Kernel as u32, Relaxed);
        self.end_transition(now);
    }

    /// As above, from elsewhere than user space.
    #[inline(never)]
    fn resume_otherwise_with(&self, tables: &Tables, now: u64, ticks: u64) {
        let left = self.phase.load(Relaxed);
        tables.book(left, ticks);
        match left == Phase::Guest as u32 {
            true => tables.slow().leave_guest(self.last.load(Relaxed)),
            false => tables.slow().pass(left, ticks),
        }
        self.resume_after(now, ticks);
    }

    /// Have the vCPU on a CPU after `ticks` of the present phase, and end the transition.
    #[inline(always)]
    fn resume_after(&self, now: u64, ticks: u64) {
        let left = self.phase.load(Relaxed);
        if left == Phase::Waiting as u32 {
            return self.resume_from_waiting(now, ticks);
        }
        if parts::PHASES {
            let column = (Column::Cycles as u32).wrapping_add(left);
            add(self.at(self.row(), column), ticks);
        }
        self.phase.store(Phase::Kernel as u32, Relaxed);
        self.end_transition(now);
    }

    /// Slow path of [`Self::resume`]: the vCPU waited for `ticks`.
    #[cold]
    #[inline(never)]
    fn resume_from_waiting(&self, now: u64, ticks: u64) {
        self.book(Phase::Waiting as u32, ticks);
        self.phase.store(Phase::Kernel as u32, Relaxed);
        self.end_transition(now);
    }

    #[cold]
    #[inline(never)]
    fn late_resume(&self, now: u64) {
        self.resume(self.one_tick_on(now));
    }

    #[cold]
    #[inline(never)]
    fn late_resume_with(&self, tables: &Tables, now: u64) {
        self.resume_with(tables, self.one_tick_on(now));
    }

    /// Book ticks on the latest reason and the phase of a number.
    fn book(&self, phase: u32, ticks: u64) {
        if !parts::PHASES {
            return;
        }
        let row = self.row();
        if phase == Phase::Waiting as u32 {
            if let Some(cell) = self.waiting.get(row.0 / ROW_BYTES) {
                add(cell, ticks);
            }
            return;
        }
        let column = (Column::Cycles as u32).wrapping_add(phase);
        add(self.at(row, column), ticks);
    }

    /// Exits counted in a row.
    pub fn exits(&self, slot: Slot) -> u64 {
        self.cell(Row::of(slot), Column::Exits).load(Relaxed)
    }

    /// Exits counted in a row that came from a nested guest.
    pub fn nested_exits(&self, slot: Slot) -> u64 {
        self.nested_cell(slot).load(Relaxed)
    }

    /// TSC ticks in a cell.
    pub fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        match phase {
            Phase::Waiting => self.waiting_cell(slot),
            _ => self.phase_cell(Row::of(slot), phase),
        }
        .load(Relaxed)
    }

    /// The rows in use, as a bitmap.
    fn used(&self) -> [u64; WORDS] {
        let mut used = [0; WORDS];
        for (to, from) in used.iter_mut().zip(&self.used) {
            *to = from.load(Relaxed);
        }
        used
    }

    /// The rows in use. For sums over many ledgers.
    pub fn slots(&self) -> Slots {
        slots_in(self.used())
    }

    /// Exits counted in all rows.
    pub fn total_exits(&self) -> u64 {
        self.slots()
            .fold(0, |sum, slot| sum.wrapping_add(self.exits(slot)))
    }

    /// TSC ticks of a phase in all rows.
    pub fn total_cycles(&self, phase: Phase) -> u64 {
        self.slots()
            .fold(0, |sum, slot| sum.wrapping_add(self.cycles(phase, slot)))
    }

    /// Copy the ledger whole, as of one moment between two transitions; return the number of
    /// failed attempts, or `None` when none of `tries` succeeds. A writer is never held up.
    ///
    /// An attempt fails when a transition begins meanwhile. Histograms are most of a ledger, so
    /// each is copied by itself, and copied anew only while its reason goes on exiting: what
    /// has to stand still is the rows alone. A vCPU that exits by many reasons as fast as it
    /// can still may not stand still for as long. Then the copy has to be made where it
    /// cannot be disturbed: on the vCPU's own CPU, by [`Self::try_copy`].
    pub fn copy(&self, tries: u32, out: &mut LedgerCopy) -> Option<u32> {
        self.copy_with(tries, out, &mut None)
    }

    /// As [`Self::copy`], with the vCPU's tables as of the same moment.
    pub fn copy_with(
        &self,
        tries: u32,
        out: &mut LedgerCopy,
        tables: &mut WithTables<'_, '_>,
    ) -> Option<u32> {
        if tries == 0 {
            return None;
        }
        if self.try_copy_with(out, tables) {
            return Some(0);
        }
        for failed in 1..tries {
            self.copy_histograms(out);
            if self.copy_rest(out, tables) {
                return Some(failed);
            }
        }
        None
    }

    /// Try once to copy the ledger whole; return `false` when a transition came between.
    pub fn try_copy(&self, out: &mut LedgerCopy) -> bool {
        self.try_copy_with(out, &mut None)
    }

    /// As [`Self::try_copy`], with the vCPU's tables as of the same moment.
    pub fn try_copy_with(&self, out: &mut LedgerCopy, tables: &mut WithTables<'_, '_>) -> bool {
        out.sampled = [0; SLOTS];
        self.copy_rest(out, tables)
    }

    /// Try once to copy all but those histograms that `out` has as they are now.
    fn copy_rest(&self, out: &mut LedgerCopy, tables: &mut WithTables<'_, '_>) -> bool {
        // ORDERING: What follows is read after this, and so is at least as new.
        let last = self.last.load(Ordering::Acquire);
        out.phase = self.phase.load(Relaxed);
        out.slot = self.row.load(Relaxed) / ROW_BYTES as u32;
        out.first = self.first.load(Relaxed);
        out.last = last;
        out.used = self.used();
        let mut copied = [0_u64; WORDS];
        for slot in slots_in(out.used) {
            let row = Row::of(slot);
            let numbers = RowCopy {
                exits: self.exits(slot),
                nested_exits: self.nested_exits(slot),
                cycles: Phase::ALL.map(|phase| self.cycles(phase, slot)),
                max: self.cell(row, Column::Max).load(Relaxed),
            };
            let kernel = numbers.cycles(Phase::Kernel);
            if self.copy_histogram(slot, kernel, out) {
                set(&mut copied, slot);
            }
            out.set_row(slot, numbers);
            // In vain already. The next attempt then begins right behind a transition.
            if self.begun.load(Relaxed) != last {
                break;
            }
        }
        if let Some((tables, to)) = tables {
            tables.copy(to, || self.begun.load(Relaxed) == last);
        }
        // ORDERING: What precedes is read before this, and so is not newer.
        fence(Ordering::Acquire);
        let undisturbed = self.begun.load(Relaxed) == last;
        if !undisturbed {
            for slot in slots_in(copied) {
                out.set_sampled(slot, 0);
            }
        }
        undisturbed
    }

    /// Try once for each histogram to copy it by itself.
    fn copy_histograms(&self, out: &mut LedgerCopy) {
        for slot in self.slots() {
            // ORDERING: As in `copy_rest`, for the window of one row.
            let last = self.last.load(Ordering::Acquire);
            let kernel = self.cycles(Phase::Kernel, slot);
            let copied = self.copy_histogram(slot, kernel, out);
            // ORDERING: As in `copy_rest`.
            fence(Ordering::Acquire);
            if copied && self.begun.load(Relaxed) != last {
                out.set_sampled(slot, 0);
            }
        }
    }

    /// Copy the histogram of a row that has booked `kernel` ticks in the kernel phase, unless
    /// `out` has it; return true if it was copied.
    ///
    /// Each sample comes with at least one tick of the kernel phase. So two undisturbed windows
    /// that find the same ticks find the same samples.
    #[inline]
    fn copy_histogram(&self, slot: Slot, kernel: u64, out: &mut LedgerCopy) -> bool {
        let row = Row::of(slot);
        let number = self.cell(row, Column::Histogram).load(Relaxed) as usize / BUCKETS;
        out.set_number(slot, number);
        // All-zero bytes are no histogram, so none is of 0.
        let sampled = kernel.wrapping_add(1);
        if number == 0 || out.sampled(slot) == sampled {
            return false;
        }
        out.set_sampled(slot, sampled);
        // Looked up with care, as a ledger may be memory that another program writes.
        let first = number.wrapping_mul(BUCKETS).wrapping_add(ROWS);
        let samples = self.cells.0.get(first..).unwrap_or_default();
        out.set_histogram(number, |bucket| {
            samples.get(bucket).map_or(0, |cell| cell.load(Relaxed))
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{collections::HashMap, sync::atomic::AtomicBool};

    use crate::meter::histogram::Buckets;

    fn ledger() -> Box<Ledger> {
        // SAFETY: All-zero bytes are a valid ledger.
        Box::new(unsafe { core::mem::zeroed() })
    }

    /// The most of what is told of one ledger. Miri takes some tenths of a second for each call.
    const EVENTS: usize = if cfg!(miri) { 20 } else { 400 };

    /// What the module keeps of a vCPU beside its ledger takes less than this many bytes.
    const BESIDE: usize = 512;

    #[test]
    fn a_row_is_one_cache_line_and_a_vcpu_takes_32_kib_at_most() {
        assert_eq!((8 * ROW, (8 * ROWS) % 64, 8 * BUCKETS % 64), (64, 0, 0));
        assert_eq!(core::mem::offset_of!(Ledger, cells) % 64, 0);
        // What an exit and an entry touch besides cells.
        assert!(core::mem::offset_of!(Ledger, first) <= 64);
        // All phases but `Waiting`.
        let phases_end = Column::Cycles as usize + Phase::Waiting as usize;
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
        ledger.leave(131, Phase::Halted);
        ledger.resume(1131);
        ledger.leave(1133, Phase::User);
        ledger.resume(1140);
        ledger.leave(1141, Phase::Preempted);
        ledger.resume(1200);
        ledger.leave(1201, Phase::Waiting);
        ledger.resume(1500);
        ledger.entry(1501);
        assert_eq!(ledger.cycles(Phase::Kernel, start), 10);
        assert_eq!(ledger.cycles(Phase::Guest, start), 20);
        assert_eq!(ledger.cycles(Phase::Kernel, cpuid), 1 + 2 + 1 + 1 + 1);
        assert_eq!(ledger.cycles(Phase::Waiting, cpuid), 299);
        assert_eq!(ledger.cycles(Phase::Halted, cpuid), 1000);
        assert_eq!(ledger.cycles(Phase::User, cpuid), 7);
        assert_eq!(ledger.cycles(Phase::Preempted, cpuid), 59);
        assert_eq!(ledger.exits(cpuid), 1);
    }

    /// What a ledger is to hold, in the plainest words, and by nothing of it.
    struct Model {
        phase: Phase,
        /// The row of the latest exit.
        latest: usize,
        first: u64,
        last: u64,
        rows: HashMap<usize, RowCopy>,
        /// Kernel ticks of the latest exit so far, while they may become a sample.
        sample: Option<u64>,
        /// The rows with a histogram, in the order in which they got it.
        histograms: Vec<(usize, Buckets)>,
    }

    impl Model {
        fn begin(now: u64, phase: Phase) -> Self {
            Self {
                phase,
                latest: Slot::START.index(),
                first: now,
                last: now,
                rows: HashMap::new(),
                sample: (phase == Phase::Guest).then_some(0),
                histograms: Vec::new(),
            }
        }

        fn row(&mut self) -> &mut RowCopy {
            self.rows.entry(self.latest).or_default()
        }

        /// Books the time since the latest transition, on the latest exit; how long it was. A
        /// clock that stands or goes back counts as one tick.
        fn spend(&mut self, now: u64, phase: Phase) -> u64 {
            let now = now.max(self.last + 1);
            let ticks = now - self.last;
            self.last = now;
            self.row().cycles[phase as usize] += ticks;
            ticks
        }

        /// Whoever exits was in the guest, whatever was told of it.
        fn exit(&mut self, now: u64, slot: usize, nested: bool) {
            self.spend(now, Phase::Guest);
            (self.phase, self.latest) = (Phase::Kernel, slot);
            let row = self.row();
            row.exits += 1;
            row.nested_exits += u64::from(nested);
            if row.exits == 1 && self.histograms.len() < HISTOGRAMS {
                self.histograms.push((slot, [0; BUCKETS]));
            }
        }

        /// Whoever enters was in the kernel.
        fn entry(&mut self, now: u64) {
            let ticks = self.spend(now, Phase::Kernel);
            self.phase = Phase::Guest;
            if let Some(before) = self.sample.replace(0) {
                let (latest, sample) = (self.latest, before + ticks);
                let row = self.row();
                row.max = row.max.max(sample);
                for (slot, histogram) in &mut self.histograms {
                    histogram[bucket(sample)] += u64::from(*slot == latest);
                }
            }
        }

        fn leave(&mut self, now: u64, phase: Phase) {
            let left = self.phase;
            let ticks = self.spend(now, left);
            self.phase = phase;
            self.sample = match left {
                Phase::Guest => None,
                Phase::Kernel => self.sample.map(|before| before + ticks),
                _ => self.sample,
            };
        }

        fn resume(&mut self, now: u64) {
            self.spend(now, self.phase);
            self.phase = Phase::Kernel;
        }

        /// The host slept, in whatever the vCPU was doing.
        fn sleep(&mut self, until: u64) {
            let ticks = until - self.last;
            self.last = until;
            let phase = self.phase;
            self.row().cycles[phase as usize] += ticks;
            if phase == Phase::Kernel {
                self.sample = self.sample.map(|before| before + ticks);
            }
        }

        /// Have an event happen to the model at `now`, and to the ledger by its clock.
        fn tell(&mut self, ledger: &Ledger, (now, clock): (u64, u64), event: &Event) {
            let (event, _, slot, phase, nested) = *event;
            let phase = Phase::from_number(phase).expect("a phase");
            match event {
                0 => {
                    let at = Slot::from_index(slot).expect("below SLOTS");
                    if nested {
                        ledger.exit_from_nested(clock, at);
                    } else {
                        ledger.exit(clock, at);
                    }
                    self.exit(now, slot, nested);
                }
                1 => {
                    ledger.entry(clock);
                    self.entry(now);
                }
                2 => {
                    ledger.leave(clock, phase);
                    self.leave(now, phase);
                }
                _ => {
                    ledger.resume(clock);
                    self.resume(now);
                }
            }
        }

        /// Demand that the ledger holds what the model does, with a clock that is `offset` behind.
        fn demand(&self, ledger: &Ledger, offset: u64) -> Result<(), TestCaseError> {
            let mut copy = LedgerCopy::new();
            prop_assert!(ledger.try_copy(&mut copy));
            prop_assert!(copy.balances());
            let times = [copy.first, copy.last].map(|time| time.wrapping_add(offset));
            prop_assert_eq!(times, [self.first, self.last]);
            prop_assert_eq!(
                (copy.phase(), copy.slot().index()),
                (self.phase, self.latest)
            );
            let mut totals = Totals::new();
            totals.fold(&copy);
            totals.fold(&copy);
            let copied: HashMap<_, _> = copy
                .rows()
                .map(|(slot, row, _)| (slot.index(), *row))
                .collect();
            let mut sums = RowCopy::default();
            for slot in Slot::all() {
                let due = self.rows.get(&slot.index()).copied().unwrap_or_default();
                prop_assert_eq!(copied.get(&slot.index()).copied().unwrap_or_default(), due);
                let histogram = self.histograms.iter().find(|(row, _)| *row == slot.index());
                prop_assert_eq!(
                    copy.histogram(slot),
                    histogram.map_or(&[0; BUCKETS], |(_, it)| it)
                );
                // What a guest's query reads, without a copy.
                prop_assert_eq!(
                    (ledger.exits(slot), ledger.nested_exits(slot)),
                    (due.exits, due.nested_exits)
                );
                prop_assert_eq!(
                    Phase::ALL.map(|phase| ledger.cycles(phase, slot)),
                    due.cycles
                );
                let twice = RowCopy {
                    exits: 2 * due.exits,
                    nested_exits: 2 * due.nested_exits,
                    cycles: due.cycles.map(|ticks| 2 * ticks),
                    max: due.max,
                };
                prop_assert_eq!(totals.row(slot), twice);
                sums.exits += due.exits;
                for (sum, ticks) in sums.cycles.iter_mut().zip(due.cycles) {
                    *sum += ticks;
                }
            }
            prop_assert_eq!(ledger.total_exits(), sums.exits);
            prop_assert_eq!(
                Phase::ALL.map(|phase| ledger.total_cycles(phase)),
                sums.cycles
            );
            Ok(())
        }
    }

    /// Its kind, the step of the clock to it, its row, its phase, and whether it is of a nested guest.
    type Event = (u8, i16, usize, u32, bool);

    fn event() -> impl Strategy<Value = Event> {
        (0_u8..4, any::<i16>(), 0..SLOTS, 2_u32..6, any::<bool>())
    }

    proptest! {
        #[test]
        fn transitions_in_any_order_lose_and_invent_nothing(
            begins_in in 0_u32..6,
            events in proptest::collection::vec(event(), 0..EVENTS)
        ) {
            let ledger = ledger();
            let mut now = 1_u64 << 40;
            let begins_in = Phase::from_number(begins_in).expect("a phase");
            ledger.begin(now, begins_in);
            let mut model = Model::begin(now, begins_in);
            for event in events {
                // A step back now and then: clocks that part.
                now = now.wrapping_add_signed(i64::from(event.1) + 8000);
                model.tell(&ledger, (now, now), &event);
            }
            model.demand(&ledger, 0)?;
        }
    }

    proptest! {
        /// As if the clock had gone on, but for what a ledger that is not told of it cannot know:
        /// how long the host slept.
        #[test]
        fn a_clock_that_begins_anew_loses_and_invents_nothing(
            begins_in in 0_u32..6,
            events in proptest::collection::vec(
                (event(), 0_u8..8, 0_u64..1 << 48, 0_u64..1 << 40),
                0..EVENTS,
            )
        ) {
            let ledger = ledger();
            let (mut now, mut offset) = (1_u64 << 40, 0_u64);
            let begins_in = Phase::from_number(begins_in).expect("a phase");
            ledger.begin(now, begins_in);
            let mut model = Model::begin(now, begins_in);
            for (event, anew, clock, slept) in events {
                let last = model.last.wrapping_sub(offset);
                match anew {
                    // The host says so.
                    0 => {
                        now = now.max(model.last) + slept;
                        ledger.rebase(now.wrapping_sub(offset), clock);
                        model.sleep(now);
                        offset = now.wrapping_sub(clock);
                        model.demand(&ledger, offset)?;
                    }
                    // The ledger finds it.
                    1 if last >= RESTARTED => {
                        let clock = clock % (last + 2 - RESTARTED);
                        now = model.last + 1;
                        model.sleep(now);
                        offset = now.wrapping_sub(clock);
                    }
                    _ => now = now.wrapping_add_signed(i64::from(event.1) + 8000),
                }
                let clock = now.wrapping_sub(offset);
                // Before its zero there is no clock.
                if clock < 1 << 63 {
                    model.tell(&ledger, (now, clock), &event);
                }
            }
            model.demand(&ledger, offset)?;
        }
    }

    /// A halted vCPU whose host slept for an hour, and a transition 7 ticks after the clock began
    /// anew.
    #[test]
    fn a_sleep_is_on_the_phase_and_what_follows_has_its_true_time() {
        const HOUR: u64 = 3600 * 3_000_000_000;
        let hlt = Slot::from_index(12).expect("below SLOTS");
        for phase in Phase::ALL {
            let ledger = ledger();
            ledger.begin(1 << 50, Phase::Guest);
            ledger.exit((1 << 50) + 10, hlt);
            match phase {
                Phase::Kernel => {}
                Phase::Guest => ledger.entry((1 << 50) + 11),
                _ => ledger.leave((1 << 50) + 11, phase),
            }
            let before = ledger.cycles(phase, hlt);
            let last = ledger.last.load(Relaxed);
            ledger.rebase(last + HOUR, 3);
            assert_eq!(ledger.cycles(phase, hlt), before + HOUR, "{phase:?}");
            // It began before the clock's zero.
            assert!(ledger.first.load(Relaxed) > 1 << 63);
            match phase {
                Phase::Guest => ledger.exit(10, hlt),
                Phase::Kernel => ledger.entry(10),
                _ => ledger.resume(10),
            }
            let row = if phase == Phase::Guest { 2 } else { 1 };
            assert_eq!(ledger.cycles(phase, hlt), before + HOUR + 7, "{phase:?}");
            assert_eq!(ledger.exits(hlt), row);
            let mut copy = LedgerCopy::new();
            assert!(ledger.try_copy(&mut copy) && copy.balances());
            assert_eq!(copy.last, 10);
        }
    }

    #[test]
    fn a_clock_begins_anew_by_more_than_clocks_part() {
        const LAST: u64 = 1 << 50;
        for (back, last) in [
            (1, LAST + 1),
            (RESTARTED - 2, LAST + 1),
            (RESTARTED - 1, LAST - (RESTARTED - 1) + 1),
            (LAST, 1),
        ] {
            let ledger = ledger();
            ledger.begin(LAST, Phase::Kernel);
            ledger.entry(LAST - back);
            assert_eq!(ledger.last.load(Relaxed), last, "{back} ticks back");
            // By a clock that it follows, time is what it is.
            ledger.exit(last + 1000, Slot::OTHER);
            assert_eq!(ledger.cycles(Phase::Guest, Slot::START), 1000);
            let mut copy = LedgerCopy::new();
            assert!(ledger.try_copy(&mut copy) && copy.balances());
        }
    }

    /// The CPU that measures the sleep may be behind the vCPU's.
    #[test]
    fn a_sleep_that_ends_before_the_latest_transition_takes_no_time() {
        let ledger = ledger();
        ledger.begin(1000, Phase::Halted);
        ledger.rebase(900, 5);
        assert_eq!(ledger.total_cycles(Phase::Halted), 0);
        ledger.resume(25);
        assert_eq!(ledger.total_cycles(Phase::Halted), 20);
        let mut copy = LedgerCopy::new();
        assert!(ledger.try_copy(&mut copy) && copy.balances());
    }

    proptest! {
        /// Each exit that is followed by an entry is one sample, of the kernel ticks between
        /// them, whatever sleep, preemption and user space come between.
        #[test]
        fn an_exit_is_one_sample_of_its_kernel_ticks(
            exits in proptest::collection::vec(
                (
                    0..Slot::START.index(),
                    any::<bool>(),
                    proptest::collection::vec((1_u64..1 << 20, 1_u64..1 << 30), 1..4),
                ),
                0..EVENTS / 2,
            )
        ) {
            let ledger = ledger();
            let mut now = 1000_u64;
            let mut expected = std::collections::BTreeMap::<usize, Vec<u64>>::new();
            ledger.begin(now, Phase::Kernel);
            ledger.entry(now);
            for (place, nested, parts) in exits {
                now += 50;
                let slot = Slot::from_index(place).expect("below SLOTS");
                if nested {
                    ledger.exit_from_nested(now, slot);
                } else {
                    ledger.exit(now, slot);
                }
                for (number, (kernel, away)) in parts.iter().enumerate() {
                    if number > 0 {
                        ledger.leave(now, Phase::User);
                        now += away;
                        ledger.resume(now);
                    }
                    now += kernel;
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
        // Miri takes seconds for each exit, as the reader runs in turns with the writer.
        const END: u64 = if cfg!(miri) { 60 } else { 3_000_000 };
        let (ledger, done) = (ledger(), AtomicBool::new(false));
        ledger.begin(0, Phase::Guest);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for now in (0..END).step_by(3) {
                    let slot = Slot::from_index(now as usize % 60).expect("below SLOTS");
                    // The rows of even places have only exits from nested guests.
                    if slot.index() % 2 == 0 {
                        ledger.exit_from_nested(now, slot);
                    } else {
                        ledger.exit(now, slot);
                    }
                    ledger.entry(now + 2);
                }
                done.store(true, Ordering::Release);
            });
            let nested_as_told = |copy: &LedgerCopy| {
                copy.rows().all(|(slot, row, _)| {
                    row.nested_exits == if slot.index() % 2 == 0 { row.exits } else { 0 }
                })
            };
            let (mut copy, mut copies) = (LedgerCopy::new(), 0);
            while !done.load(Ordering::Acquire) {
                if ledger.try_copy(&mut copy) {
                    assert!(copy.balances() && nested_as_told(&copy));
                    copies += 1;
                }
            }
            while !ledger.try_copy(&mut copy) {}
            assert!(copy.balances() && nested_as_told(&copy) && copies < usize::MAX);
            assert_eq!(copy.last, END - 1);
        });
    }
}
