// SPDX-License-Identifier: GPL-2.0

//! The tables of one vCPU: its exits by what they were about, by which code of the guest's caused
//! them, and by why they went to user space.
//!
//! Tables stand beside a [`Ledger`], and are written in the same transitions. When they begin, they
//! take down what the ledger has counted so far: the baseline. So the exits and ticks of a reason
//! that no row has are the ledger's, less the baseline, less the rows: rows and these others sum
//! to the reason's, to the tick, and nothing is counted twice. A row that has to give way is simply
//! overwritten: what it had falls to the others.
//!
//! # Which rows are kept
//!
//! Details and code are kept by Space-Saving (Metwally, Agrawal, El Abbadi: "Efficient Computation
//! of Frequent and Top-k Elements in Data Streams", ICDT 2005) in sets of [`WAYS`] rows. A key
//! belongs to one set. A new key takes the place of the row of the fewest exits in its set, those
//! that the row may have missed included. So each key that is in no row has had at most as many
//! exits as that row; with this the new row begins, as the most that it may have missed. Of ticks a
//! row may have missed at most all that was lost in its set before it came. A row of a set in which
//! nothing was lost is exact.
//!
//! A guest chooses keys, and can fill its own table with rubbish. It takes no longer for that, and
//! the sums stay exact.

use super::{
    atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    detail,
    ledger::Ledger,
    phase::Phase,
    reasons::{Slot, SLOTS},
    slow::{Slow, NO_DETAIL},
};

mod copy;
pub use copy::{CodeCopy, DetailCopy, Others, TablesCopy, UserCopy};

/// Rows of a set.
pub const WAYS: usize = 4;
/// Sets of details, as a power of two.
const DETAIL_POWER: u32 = 6;
/// Sets of code, as a power of two.
const CODE_POWER: u32 = 6;
/// Rows of details.
pub const DETAILS: usize = WAYS << DETAIL_POWER;
/// Rows of code.
pub const CODES: usize = WAYS << CODE_POWER;
/// Rows of exits to user space.
pub const USERS: usize = 32;

/// The odd number nearest to 2^64 divided by the golden ratio: a multiplication by it spreads keys
/// over the high bits (Knuth, "The Art of Computer Programming", volume 3, 6.4).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The most that the tables of one vCPU take, in bytes.
pub const MOST_BYTES: usize = 48 * 1024;

/// Where a key of details holds its tag.
const TAG: u32 = detail::BITS;
/// Where a tag holds that the exit came from a nested guest: above the reason.
const CODE_NESTED: u32 = 8;

/// A row of details: one cache line.
#[repr(C, align(64))]
#[derive(Debug)]
struct Detail {
    /// Reason, nested or not, and detail; 0 for a row that is free.
    key: AtomicU64,
    exits: AtomicU64,
    kernel: AtomicU64,
    user: AtomicU64,
    missed_exits: AtomicU64,
    missed_kernel: AtomicU64,
    missed_user: AtomicU64,
    /// Ticks that were lost in the set: in its first row the kernel's, in the second user space's.
    lost: AtomicU64,
}

/// A row of code.
#[repr(C)]
#[derive(Debug)]
struct Code {
    rip: AtomicU64,
    /// Reason, and nested or not; 0 for a row that is free.
    tag: AtomicU64,
    exits: AtomicU64,
    kernel: AtomicU64,
    missed_exits: AtomicU64,
    missed_kernel: AtomicU64,
}

/// A row of exits to user space.
#[repr(C)]
#[derive(Debug)]
struct User {
    /// Reason, and why; 0 for a row that is free.
    tag: AtomicU64,
    exits: AtomicU64,
    ticks: AtomicU64,
}

/// What a ledger had of one reason when the tables began.
#[derive(Debug)]
struct Baseline {
    exits: AtomicU64,
    kernel: AtomicU64,
    user: AtomicU64,
}

/// What an exit tells beside its reason.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// It came from a nested guest, an L2.
    pub nested: bool,
    /// What it was about: see [`detail::of`].
    pub detail: Option<u64>,
    /// Where the guest was; `None` when its registers are encrypted.
    pub rip: Option<u64>,
}

/// The keys of an exit, as few words: they go from function to function in registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys {
    /// See [`Tag`].
    pub(super) tag: Tag,
    /// `None` for an exit without a detail.
    pub(super) detail: Option<u64>,
    /// 0 where it cannot be read, as the tag says.
    pub(super) rip: u64,
}

/// Which reason an exit is of, from 1, and in bits above that whether it came from a nested guest
/// and whether its RIP can be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tag(u64);

/// Where a tag holds that the RIP cannot be read.
const NO_RIP: u32 = CODE_NESTED + 1;

impl About {
    /// Return the keys of an exit of a reason.
    #[inline(always)]
    pub(super) fn keys(&self, slot: Slot) -> Keys {
        let tag = reason_of(slot)
            | u64::from(self.nested) << CODE_NESTED
            | u64::from(self.rip.is_none()) << NO_RIP;
        Keys {
            tag: Tag(tag),
            // The bit for the RIP falls out of the word.
            detail: self.detail.map(|detail| detail | tag << TAG),
            rip: self.rip.unwrap_or(0),
        }
    }
}

impl Keys {
    /// Return reason, nested or not, and detail as one word.
    #[inline(always)]
    pub(super) fn whole(&self) -> u64 {
        match self.detail {
            Some(detail) => detail,
            None => self.tag.0 << TAG | NO_DETAIL,
        }
    }
}

impl Tag {
    /// Return true if the exit came from a nested guest.
    #[inline(always)]
    pub(super) const fn is_nested(self) -> bool {
        self.0 >> CODE_NESTED & 1 != 0
    }

    /// Return the row of the ledger.
    #[inline(always)]
    pub(super) fn slot(self) -> Slot {
        slot_of(self.0 & ((1 << CODE_NESTED) - 1)).unwrap_or(Slot::OTHER)
    }

    #[inline(always)]
    const fn has_rip(self) -> bool {
        self.0 >> NO_RIP == 0
    }
}

/// The rows of an exit.
///
/// # Invariants
///
/// They are how many bytes from the first row of its table a row begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    detail: u32,
    code: u32,
}

/// The tables of one vCPU. All-zero bytes are some that have not begun.
///
/// The first row of each table is nobody's: what has no row is booked there, and never read.
///
/// # Invariants
///
/// - `detail`, `code` and `user` are how many bytes from the first row of its table a row begins.
/// - They are in no row, or in one of the ledger's latest reason; `user` alone may lag behind.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Tables {
    /// For the platform, once the tables are let go. Comes first, as `kvfree_rcu()` demands.
    retired: [AtomicUsize; 2],
    /// TSC when the tables began.
    since: AtomicU64,
    has_begun: AtomicU32,
    detail: AtomicU32,
    code: AtomicU32,
    user: AtomicU32,
    /// An exit came without RIP.
    lacks_rip: AtomicU32,
    details_in_use: [AtomicU64; DETAILS / 64],
    codes_in_use: [AtomicU64; CODES / 64],
    /// By set: kernel ticks that were lost.
    code_lost: [AtomicU64; 1 << CODE_POWER],
    details: [Detail; 1 + DETAILS],
    codes: [Code; 1 + CODES],
    users: [User; 1 + USERS],
    baseline: [Baseline; SLOTS],
    /// By reason: exits to user space that have no row.
    other_users: [AtomicU64; SLOTS],
    slow: Slow,
}

const _: () = assert!(size_of::<Tables>() <= MOST_BYTES);

/// Adds to a cell that only this thread writes.
#[inline(always)]
fn add(cell: &AtomicU64, value: u64) {
    cell.store(cell.load(Relaxed).wrapping_add(value), Relaxed);
}

/// Reads a cell that only this thread writes. Others only read it, so there is no race; and unlike
/// the load of an atomic this one can be part of the compare.
#[cfg(not(loom))]
#[inline(always)]
fn own(cell: &AtomicU64) -> u64 {
    // SAFETY: The cell is there, and nobody else writes to it.
    unsafe { cell.as_ptr().read() }
}

#[cfg(loom)]
fn own(cell: &AtomicU64) -> u64 {
    cell.load(Relaxed)
}

/// Sets the bit of a row, counted from the first that is somebody's.
fn mark(bits: &[AtomicU64], row: usize) {
    if let Some(word) = bits.get(row / 64) {
        let bit = 1_u64.wrapping_shl(row as u32 % 64);
        word.store(word.load(Relaxed) | bit, Relaxed);
    }
}

/// The reason as keys hold it: never 0, so that no key is.
#[inline(always)]
const fn reason_of(slot: Slot) -> u64 {
    (slot.index() as u64).wrapping_add(1)
}

/// Return the row of a ledger that a key's reason is.
const fn slot_of(reason: u64) -> Option<Slot> {
    Slot::from_index((reason as usize).wrapping_sub(1))
}

impl Tables {
    /// Room for the platform, once nobody uses the tables any more.
    pub fn room(&self) -> &[AtomicUsize; 2] {
        &self.retired
    }

    /// The recorder of slow exits, which stands beside them.
    #[inline(always)]
    pub fn slow(&self) -> &Slow {
        &self.slow
    }

    #[inline(always)]
    fn detail_at(&self, offset: u32) -> &Detail {
        // SAFETY: By the invariant of `Tables`, or of who computes it, a row is there.
        unsafe { &*self.details.as_ptr().byte_add(offset as usize) }
    }

    #[inline(always)]
    fn code_at(&self, offset: u32) -> &Code {
        // SAFETY: As above.
        unsafe { &*self.codes.as_ptr().byte_add(offset as usize) }
    }

    #[inline(always)]
    fn user_at(&self, offset: u32) -> &User {
        // SAFETY: As above.
        unsafe { &*self.users.as_ptr().byte_add(offset as usize) }
    }

    /// Return the rows of an exit; `None` where it has none yet.
    #[inline(always)]
    pub(super) fn rows_of(&self, keys: &Keys) -> Option<Rows> {
        let detail = match keys.detail {
            None => 0,
            Some(key) => self.find_detail(key)?,
        };
        let code = match keys.tag.has_rip() {
            true => self.find_code(keys.rip, keys.tag.0)?,
            false if self.lacks_rip.load(Relaxed) == 0 => return None,
            false => 0,
        };
        Some(Rows { detail, code })
    }

    /// Return the rows of an exit at TSC `now`, which gets those that it has not. In the ledger's
    /// transition, before the ledger counts the exit.
    pub(super) fn rows_for(&self, ledger: &Ledger, now: u64, keys: &Keys) -> Rows {
        let detail = match keys.detail {
            None => 0,
            Some(key) => self
                .find_detail(key)
                .unwrap_or_else(|| self.new_detail(ledger, now, key)),
        };
        let code = match keys.tag.has_rip() {
            true => self
                .find_code(keys.rip, keys.tag.0)
                .unwrap_or_else(|| self.new_code(ledger, now, keys.rip, keys.tag.0)),
            false => {
                self.lacks_rip.store(1, Relaxed);
                0
            }
        };
        Rows { detail, code }
    }

    /// Take an exit into its rows, in the ledger's transition.
    #[inline(always)]
    pub(super) fn take_exit(&self, rows: Rows) {
        // INVARIANT: By that of `Rows`.
        self.detail.store(rows.detail, Relaxed);
        self.code.store(rows.code, Relaxed);
        add(&self.detail_at(rows.detail).exits, 1);
        add(&self.code_at(rows.code).exits, 1);
    }

    /// Return where the set of a detail begins.
    #[inline(always)]
    fn detail_set(key: u64) -> u32 {
        const ROW: u32 = size_of::<Detail>() as u32;
        let set = (key.wrapping_mul(SPREAD) >> (64 - DETAIL_POWER)) as u32;
        // A set has WAYS rows, behind the first of the table.
        set.wrapping_mul(WAYS as u32 * ROW).wrapping_add(ROW)
    }

    /// Return where the row of a key is, if it has one.
    #[inline(always)]
    fn find_detail(&self, key: u64) -> Option<u32> {
        let mut offset = Self::detail_set(key);
        for _ in 0..WAYS {
            if own(&self.detail_at(offset).key) == key {
                return Some(offset);
            }
            offset = offset.wrapping_add(size_of::<Detail>() as u32);
        }
        None
    }

    /// Give a key a row of its set; return where it is.
    #[cold]
    #[inline(never)]
    fn new_detail(&self, ledger: &Ledger, now: u64, key: u64) -> u32 {
        const ROW: u32 = size_of::<Detail>() as u32;
        self.begin(ledger, now);
        let first = Self::detail_set(key);
        let mut chosen = (first, u64::MAX);
        let mut offset = first;
        for _ in 0..WAYS {
            let row = self.detail_at(offset);
            if row.key.load(Relaxed) == 0 {
                // The first row is nobody's.
                mark(
                    &self.details_in_use,
                    (offset / ROW).wrapping_sub(1) as usize,
                );
                row.key.store(key, Relaxed);
                return offset;
            }
            let weight = row
                .exits
                .load(Relaxed)
                .saturating_add(row.missed_exits.load(Relaxed));
            if weight < chosen.1 {
                chosen = (offset, weight);
            }
            offset = offset.wrapping_add(ROW);
        }
        let (offset, missed) = chosen;
        let row = self.detail_at(offset);
        let kernel_lost = &self.detail_at(first).lost;
        let user_lost = &self.detail_at(first.wrapping_add(ROW)).lost;
        add(kernel_lost, row.kernel.load(Relaxed));
        add(user_lost, row.user.load(Relaxed));
        row.key.store(key, Relaxed);
        row.missed_exits.store(missed, Relaxed);
        row.missed_kernel.store(kernel_lost.load(Relaxed), Relaxed);
        row.missed_user.store(user_lost.load(Relaxed), Relaxed);
        for cell in [&row.exits, &row.kernel, &row.user] {
            cell.store(0, Relaxed);
        }
        offset
    }

    /// Return which set a place in the guest's code belongs to.
    #[inline(always)]
    fn code_set(rip: u64, tag: u64) -> u32 {
        let mixed = (rip ^ tag << 48).wrapping_mul(SPREAD);
        (mixed >> (64 - CODE_POWER)) as u32
    }

    /// Return where the row of a place in the guest's code is, if it has one.
    #[inline(always)]
    fn find_code(&self, rip: u64, tag: u64) -> Option<u32> {
        const ROW: u32 = size_of::<Code>() as u32;
        let set = Self::code_set(rip, tag);
        // As in `detail_set`.
        let mut offset = set.wrapping_mul(WAYS as u32 * ROW).wrapping_add(ROW);
        for _ in 0..WAYS {
            let row = self.code_at(offset);
            if own(&row.rip) == rip && own(&row.tag) == tag {
                return Some(offset);
            }
            offset = offset.wrapping_add(ROW);
        }
        None
    }

    /// Give a place in the guest's code a row of its set; return where it is.
    #[cold]
    #[inline(never)]
    fn new_code(&self, ledger: &Ledger, now: u64, rip: u64, tag: u64) -> u32 {
        const ROW: u32 = size_of::<Code>() as u32;
        self.begin(ledger, now);
        let set = Self::code_set(rip, tag);
        let mut offset = set.wrapping_mul(WAYS as u32 * ROW).wrapping_add(ROW);
        let mut chosen = (offset, u64::MAX);
        for _ in 0..WAYS {
            let row = self.code_at(offset);
            if row.tag.load(Relaxed) == 0 {
                mark(&self.codes_in_use, (offset / ROW).wrapping_sub(1) as usize);
                row.rip.store(rip, Relaxed);
                row.tag.store(tag, Relaxed);
                return offset;
            }
            let weight = row
                .exits
                .load(Relaxed)
                .saturating_add(row.missed_exits.load(Relaxed));
            if weight < chosen.1 {
                chosen = (offset, weight);
            }
            offset = offset.wrapping_add(ROW);
        }
        let (offset, missed) = chosen;
        let row = self.code_at(offset);
        let mut lost = 0;
        if let Some(cell) = self.code_lost.get(set as usize) {
            add(cell, row.kernel.load(Relaxed));
            lost = cell.load(Relaxed);
        }
        row.rip.store(rip, Relaxed);
        row.tag.store(tag, Relaxed);
        row.missed_exits.store(missed, Relaxed);
        row.missed_kernel.store(lost, Relaxed);
        for cell in [&row.exits, &row.kernel] {
            cell.store(0, Relaxed);
        }
        offset
    }

    /// Take down what the ledger has so far, unless that was done. Each table is empty at first, so
    /// the first exit that needs a row comes here.
    fn begin(&self, ledger: &Ledger, now: u64) {
        if self.has_begun.load(Relaxed) != 0 {
            return;
        }
        for slot in ledger.slots() {
            if let Some(baseline) = self.baseline.get(slot.index()) {
                baseline.exits.store(ledger.exits(slot), Relaxed);
                let ticks = |phase| ledger.cycles(phase, slot);
                baseline.kernel.store(ticks(Phase::Kernel), Relaxed);
                baseline.user.store(ticks(Phase::User), Relaxed);
            }
        }
        self.since.store(now, Relaxed);
        self.has_begun.store(1, Relaxed);
    }

    /// Book kernel ticks on the rows of the latest exit.
    #[inline(always)]
    pub(super) fn book_kernel(&self, ticks: u64) {
        add(&self.detail_at(self.detail.load(Relaxed)).kernel, ticks);
        add(&self.code_at(self.code.load(Relaxed)).kernel, ticks);
    }

    /// Book ticks of a phase, by its number, on the rows of the latest exit, which was of a reason.
    #[inline(always)]
    pub(super) fn book(&self, slot: Option<Slot>, phase: u32, ticks: u64) {
        if phase == Phase::Kernel as u32 {
            self.book_kernel(ticks);
        } else if phase == Phase::User as u32 {
            add(&self.detail_at(self.detail.load(Relaxed)).user, ticks);
            let row = self.user_at(self.user.load(Relaxed));
            // The latest exit to user space may be of another reason than the latest exit.
            if slot.map(reason_of) == Some(row.tag.load(Relaxed) >> 16) {
                add(&row.ticks, ticks);
            }
        }
    }

    /// Take an exit to user space, for `why`: KVM_EXIT_* (linux/kvm.h), in 16 bits.
    pub(super) fn leave_to_user(&self, slot: Option<Slot>, why: u16) {
        const ROW: u32 = size_of::<User>() as u32;
        let Some(slot) = slot else {
            return;
        };
        if self.has_begun.load(Relaxed) == 0 {
            return;
        }
        let tag = reason_of(slot) << 16 | u64::from(why);
        let mut offset = ROW;
        for _ in 0..USERS {
            let row = self.user_at(offset);
            match row.tag.load(Relaxed) {
                0 => row.tag.store(tag, Relaxed),
                other if other != tag => {
                    offset = offset.wrapping_add(ROW);
                    continue;
                }
                _ => {}
            }
            add(&row.exits, 1);
            // INVARIANT: That row is there.
            self.user.store(offset, Relaxed);
            return;
        }
        // INVARIANT: The first row.
        self.user.store(0, Relaxed);
        if let Some(cell) = self.other_users.get(slot.index()) {
            add(cell, 1);
        }
    }

    /// Go on at `now` by a clock that has begun anew; it was `then` by the one before.
    pub(super) fn rebase(&self, then: u64, now: u64) {
        let age = then.wrapping_sub(self.since.load(Relaxed));
        self.since.store(now.wrapping_sub(age), Relaxed);
    }
}
