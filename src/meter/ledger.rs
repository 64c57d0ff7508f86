// SPDX-License-Identifier: GPL-2.0

//! The ledger of one vCPU: every TSC tick of its life in exactly one cell.
//!
//! A ledger has one writer at a time, the thread that holds the vCPU. So the writer needs
//! no locked instruction: it loads, adds and stores. `core::sync::atomic` is used rather
//! than the kernel's atomics because those are an out-of-line call per operation on
//! kernels without inline helpers, measured at 95 ticks an exit.
//!
//! A reason takes a row at the vCPU's first exit for it. A Linux guest exits for some 20 of the 176
//! reasons that have a slot, so a ledger has room for [`REASONS`] rows and [`OWN_HISTOGRAMS`]
//! histograms, and fits into 16 KiB with all that the registry keeps beside it.

#[cfg(not(loom))]
use core::mem::offset_of;
use core::ptr::{from_ref, NonNull};

use super::{
    atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering},
    histogram::BUCKETS,
    phase::Phase,
    reasons::{Slot, SLOTS},
    tables::{Tables, TablesCopy},
};

use Ordering::Relaxed;

mod copy;
mod reader;
mod writer;
pub use copy::{LedgerCopy, Slots, Totals};
pub use reader::{Copying, More};
pub use writer::{NoSupply, Supply};

/// Tables of a ledger that is copied, and the buffer for their copy.
pub type WithTables<'a, 'b> = Option<(&'a Tables, &'b mut TablesCopy)>;

/// Rows of a ledger.
const ROWS: usize = 60;

/// Maximum number of reasons of one vCPU that have rows of their own. [`Slot::START`] and
/// [`Slot::OTHER`] have one more each. Exits for further reasons are counted in the row of
/// [`Slot::OTHER`].
pub const REASONS: usize = ROWS - 2;

/// Number of reasons that have their histogram in the ledger itself.
pub const OWN_HISTOGRAMS: usize = 20;

/// Number of reasons that have their histogram in [`MoreHistograms`].
const MORE_HISTOGRAMS: usize = 16;

/// Maximum number of reasons of one vCPU that have a histogram. A later reason has none, but all other
/// numbers.
pub const HISTOGRAMS: usize = OWN_HISTOGRAMS + MORE_HISTOGRAMS;

/// Default and maximum number of attempts of [`Ledger::copy`].
///
/// With 20 reasons in use and 300 to 1500 ticks between transitions, 99.9% of copies take up to 6
/// attempts if the CPUs share a cache, and up to 20 if they do not. 24 failed attempts take 4 µs and
/// 35 µs beside a transition every 300 ticks, 30 µs and 100 µs beside a writer that does nothing but
/// transitions (`make stress`).
pub const TRIES: u32 = 24;

/// Value of `carried` for a vCPU without an exit since its latest entry: the next kernel ticks belong
/// to no exit.
const CLOSED: u64 = u64::MAX;

/// The numbers of one reason. They fill one cache line.
#[repr(C, align(64))]
#[derive(Debug)]
struct Row {
    /// VM exits.
    exits: AtomicU64,
    /// TSC ticks by phase, for each phase but [`Phase::Waiting`].
    cycles: [AtomicU64; Phase::Waiting as usize],
    /// Maximum kernel ticks of one exit.
    max: AtomicU64,
    /// Histogram of the row's samples.
    histogram: AtomicPtr<Histogram>,
}

impl Row {
    /// Return the TSC ticks in a phase other than [`Phase::Waiting`].
    #[inline(always)]
    fn cycles(&self, phase: Phase) -> &AtomicU64 {
        let place = match phase {
            Phase::Waiting => 0,
            _ => phase as usize,
        };
        // SAFETY: The numbers of phases are below that of `Waiting`, which is the last one.
        unsafe { self.cycles.get_unchecked(place) }
    }
}

/// Copy of the numbers of one row.
///
/// `struct sums` of cli/bpf/ledger.h has the same numbers in the same order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowCopy {
    /// VM exits.
    pub exits: u64,
    /// VM exits from a nested guest, an L2. They are among `exits`.
    pub nested_exits: u64,
    /// TSC ticks by phase, in the order of [`Phase::ALL`].
    pub cycles: [u64; Phase::COUNT],
    /// Maximum kernel ticks of one exit, up to the entry after it.
    pub max: u64,
}

impl RowCopy {
    const EMPTY: Self = Self::from_numbers([0; Self::NUMBERS]);

    /// Count of its numbers, which have 8 bytes each.
    pub const NUMBERS: usize = size_of::<Self>() / size_of::<u64>();

    /// Create a copy from its numbers, in the order of the fields.
    pub const fn from_numbers(numbers: [u64; Self::NUMBERS]) -> Self {
        let [exits, nested_exits, cycles @ .., max] = numbers;
        Self {
            exits,
            nested_exits,
            cycles,
            max,
        }
    }

    /// Return the TSC ticks in a phase.
    pub fn cycles(&self, phase: Phase) -> u64 {
        self.cycles.get(phase as usize).copied().unwrap_or(0)
    }

    /// Add the numbers of another row.
    fn add(&mut self, other: &RowCopy) {
        let Self {
            exits,
            nested_exits,
            cycles,
            max,
        } = self;
        *exits = exits.wrapping_add(other.exits);
        *nested_exits = nested_exits.wrapping_add(other.nested_exits);
        for (to, from) in cycles.iter_mut().zip(other.cycles) {
            *to = to.wrapping_add(from);
        }
        *max = other.max.max(*max);
    }
}

/// Samples by bucket: see [`crate::histogram`].
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Histogram([AtomicU64; BUCKETS]);

/// Histograms of a vCPU that exits for more reasons than [`OWN_HISTOGRAMS`]. All-zero bytes are
/// histograms without samples.
#[repr(C)]
#[derive(Debug)]
pub struct MoreHistograms([Histogram; MORE_HISTOGRAMS]);

/// The place of a row: its offset from the first row, in bytes. An offset costs the hot path fewer
/// instructions than an index.
///
/// # Invariants
///
/// The place is the number of a row, below [`ROWS`], times the size of a row.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(usize);

impl Place {
    /// Return the place of the row with a number, or of the last row for a greater number.
    fn of(number: usize) -> Self {
        // INVARIANT: The number is below `ROWS`, and multiplied by the size of a row.
        Self(number.min(ROWS - 1).wrapping_mul(size_of::<Row>()))
    }

    /// Return the number of the row.
    #[inline(always)]
    const fn number(self) -> usize {
        self.0 / size_of::<Row>()
    }
}

/// The ledger of one vCPU.
///
/// All-zero bytes are a valid ledger that has not begun, so that it can be made in zeroed
/// memory without a copy on a small stack.
///
/// Each transition has a TSC of its own, at least one tick after the one before. The writer stores it
/// in `begun` before it writes anything of the transition, and in `last` after all of it. So a reader
/// that first reads `last`, then the rows, then `begun`, and finds the same number in both, has read a
/// consistent state.
///
/// # Invariants
///
/// - Once the ledger has begun, the cells of all rows sum to `last - first` between two transitions.
/// - The first `taken` rows are in use, each by the reason in `slots`. Row 0 is [`Slot::START`]'s.
/// - `row` and all of `places` hold the value of a `Place`. For each slot, `places` has that of its
///   row; or 0 while it has none; or that of the row of [`Slot::OTHER`], which then counts its exits.
/// - A row in use points to a histogram of this ledger or of `more`. So does a row with a `max` other
///   than 0.
/// - `tables` is null or points to tables, which live at least until the end of a transition that has
///   found them here. `more` is null or points to histograms, which live as long as the vCPU.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Ledger {
    begun: AtomicU64,
    last: AtomicU64,
    /// Kernel ticks of the latest exit that were booked before the vCPU last left its CPU, or
    /// [`CLOSED`]. An entry sets it to 0.
    carried: AtomicU64,
    /// Place of the row of the latest exit.
    row: AtomicU32,
    phase: AtomicU32,
    first: AtomicU64,
    /// Rows in use.
    taken: AtomicU32,
    /// The vCPU's tables, while there are some.
    tables: AtomicPtr<Tables>,
    /// More histograms, once the vCPU has needed some.
    more: AtomicPtr<MoreHistograms>,
    /// Place of each slot's row.
    places: [AtomicU16; SLOTS],
    /// Slot of each row.
    slots: [AtomicU8; ROWS],
    rows: [Row; ROWS],
    /// Exits from a nested guest, an L2, by row.
    nested: [AtomicU64; ROWS],
    /// TSC ticks in [`Phase::Waiting`], by row. A row has no room for them, and transitions into or out
    /// of that phase are rare.
    waiting: [AtomicU64; ROWS],
    /// Histograms by row, from row 1 on. The first one takes the samples of rows without a histogram, and
    /// nobody reads it.
    histograms: [Histogram; 1 + OWN_HISTOGRAMS],
}

/// Offsets and sizes, in bytes, by their names in cli/bpf/ledger.h. It declares the same structs in
/// C, and compiles only with these numbers.
#[cfg(not(loom))]
pub const C_LAYOUT: [(&str, usize); 12] = [
    ("LEDGER_FIRST", offset_of!(Ledger, first)),
    ("LEDGER_TABLES", offset_of!(Ledger, tables)),
    ("LEDGER_PLACES", offset_of!(Ledger, places)),
    ("LEDGER_SLOTS", offset_of!(Ledger, slots)),
    ("LEDGER_ROWS", offset_of!(Ledger, rows)),
    ("LEDGER_NESTED", offset_of!(Ledger, nested)),
    ("LEDGER_WAITING", offset_of!(Ledger, waiting)),
    ("LEDGER_HISTOGRAMS", offset_of!(Ledger, histograms)),
    ("LEDGER_SIZE", size_of::<Ledger>()),
    ("MORE_HISTOGRAMS_SIZE", size_of::<MoreHistograms>()),
    ("ROW_SIZE", size_of::<Row>()),
    ("SUMS_SIZE", size_of::<RowCopy>()),
];

/// Version of the structs in [`C_LAYOUT`]. It changes with their numbers: a tool must not read the
/// ledgers of BPF programs that another version of the tool has left running.
pub const C_VERSION: u64 = 5;

// The numbers of `C_VERSION`.
#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Row>() == 64);
    assert!(offset_of!(Ledger, first) == 32);
    assert!(offset_of!(Ledger, tables) == 48);
    assert!(offset_of!(Ledger, places) == 64);
    assert!(offset_of!(Ledger, slots) == 420);
    assert!(offset_of!(Ledger, rows) == 512);
    assert!(offset_of!(Ledger, nested) == 4352);
    assert!(offset_of!(Ledger, waiting) == 4832);
    assert!(offset_of!(Ledger, histograms) == 5312);
    assert!(size_of::<Ledger>() == 16064);
    assert!(size_of::<MoreHistograms>() == 8192);
    assert!(size_of::<RowCopy>() == 72);
    // A place fits into 16 bits, a slot into 8.
    assert!(ROWS * size_of::<Row>() <= u16::MAX as usize && SLOTS <= 256);
};

impl Ledger {
    #[inline(always)]
    fn row_at(&self, place: Place) -> &Row {
        // SAFETY: By the invariant of `Place` there is a row.
        unsafe { &*self.rows.as_ptr().byte_add(place.0) }
    }

    /// Return the place of the latest exit's row.
    #[inline(always)]
    fn place(&self) -> Place {
        // INVARIANT: By that of `Ledger`.
        Place(self.row.load(Relaxed) as usize)
    }

    /// Return the TSC ticks of a row in a phase.
    fn cycles_at(&self, place: Place, phase: Phase) -> u64 {
        match phase {
            Phase::Waiting => beside(&self.waiting, place),
            _ => self.row_at(place).cycles(phase).load(Relaxed),
        }
    }

    /// Copy the numbers of a row.
    #[inline]
    fn copy_row(&self, place: Place) -> RowCopy {
        let row = self.row_at(place);
        RowCopy {
            exits: row.exits.load(Relaxed),
            nested_exits: beside(&self.nested, place),
            cycles: Phase::ALL.map(|phase| self.cycles_at(place, phase)),
            max: row.max.load(Relaxed),
        }
    }

    /// Return the slot that has a row.
    #[inline(always)]
    fn slot_at(&self, place: Place) -> Option<Slot> {
        let slot = self.slots.get(place.number())?.load(Relaxed);
        Slot::from_index(slot.into())
    }

    /// Return the slot of the latest exit: [`Slot::OTHER`] if its reason has no row of its own.
    #[inline(always)]
    pub(super) fn slot(&self) -> Option<Slot> {
        self.slot_at(self.place())
    }

    /// Return true if the vCPU has had its first event. For the thread that holds the vCPU.
    pub fn has_begun(&self) -> bool {
        self.taken.load(Relaxed) != 0
    }

    /// Return the vCPU's tables, if it has any.
    ///
    /// # Safety
    ///
    /// The caller may use them only in a transition, on the vCPU's own thread, or while something else
    /// keeps them alive.
    #[inline(always)]
    pub unsafe fn tables(&self) -> Option<&Tables> {
        // ORDERING: A thread that finds the tables finds them zeroed.
        // SAFETY: By the invariant of `Ledger`, and the contract of this function.
        unsafe { self.tables.load(Ordering::Acquire).as_ref() }
    }

    /// Set the vCPU's tables, or with null take them away. Return the previous ones.
    ///
    /// # Safety
    ///
    /// The tables must live for as long as they are set. The previous ones must live until the end of a
    /// transition that may have found them.
    pub unsafe fn set_tables(&self, tables: *mut Tables) -> *mut Tables {
        // ORDERING: See `tables`.
        self.tables.swap(tables, Ordering::AcqRel)
    }

    /// Return the histograms that a [`Supply`] gave, which the caller frees.
    ///
    /// # Safety
    ///
    /// No thread may write or copy the ledger any more.
    pub unsafe fn take_more(&self) -> Option<NonNull<MoreHistograms>> {
        NonNull::new(self.more.swap(core::ptr::null_mut(), Relaxed))
    }

    /// Create a ledger that has not begun, for loom: its atomics are not valid in zeroed memory.
    #[cfg(loom)]
    #[allow(clippy::new_without_default, reason = "for the models alone")]
    pub fn new() -> Box<Self> {
        use core::ptr::null_mut;

        let mut ledger = Box::<Self>::new_uninit();
        let at = ledger.as_mut_ptr();
        /// Write `count` atomics from `first` on.
        ///
        /// # Safety
        ///
        /// They must be there.
        unsafe fn fill<T>(first: *mut T, count: usize, new: impl Fn() -> T) {
            for place in 0..count {
                // SAFETY: By the contract of this function.
                unsafe { first.add(place).write(new()) };
            }
        }
        // SAFETY: Every field is written once, in place, as a model's stack is small.
        unsafe {
            let zero = || AtomicU64::new(0);
            for word in [
                &raw mut (*at).begun,
                &raw mut (*at).last,
                &raw mut (*at).carried,
                &raw mut (*at).first,
            ] {
                word.write(zero());
            }
            for word in [
                &raw mut (*at).row,
                &raw mut (*at).phase,
                &raw mut (*at).taken,
            ] {
                word.write(AtomicU32::new(0));
            }
            (&raw mut (*at).tables).write(AtomicPtr::new(null_mut()));
            (&raw mut (*at).more).write(AtomicPtr::new(null_mut()));
            fill((&raw mut (*at).places).cast(), SLOTS, || AtomicU16::new(0));
            fill((&raw mut (*at).slots).cast(), ROWS, || AtomicU8::new(0));
            for number in 0..ROWS {
                let row = (&raw mut (*at).rows).cast::<Row>().add(number);
                (&raw mut (*row).exits).write(zero());
                fill(
                    (&raw mut (*row).cycles).cast(),
                    Phase::Waiting as usize,
                    zero,
                );
                (&raw mut (*row).max).write(zero());
                (&raw mut (*row).histogram).write(AtomicPtr::new(null_mut()));
            }
            fill((&raw mut (*at).nested).cast(), ROWS, zero);
            fill((&raw mut (*at).waiting).cast(), ROWS, zero);
            for number in 0..=OWN_HISTOGRAMS {
                let histogram = (&raw mut (*at).histograms).cast::<Histogram>().add(number);
                fill(histogram.cast(), BUCKETS, zero);
            }
            let ledger = ledger.assume_init();
            // This names all fields, so that the compiler asks for a new one. Write it above, too.
            let Self {
                begun: _,
                last: _,
                carried: _,
                row: _,
                phase: _,
                first: _,
                taken: _,
                tables: _,
                more: _,
                places: _,
                slots: _,
                rows: _,
                nested: _,
                waiting: _,
                histograms: _,
            } = &*ledger;
            ledger
        }
    }
}

/// Return the number of a row in an array beside the rows.
fn beside(cells: &[AtomicU64; ROWS], place: Place) -> u64 {
    let cell = cells.get(place.number());
    cell.map_or(0, |cell| cell.load(Relaxed))
}

impl Histogram {
    /// Return the address, as a row stores it.
    fn address(&self) -> *mut Self {
        from_ref(self).cast_mut()
    }
}

#[cfg(test)]
mod tests;
