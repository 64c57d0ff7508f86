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
//! A guest mostly repeats itself. So each set of details knows its latest row, and so does each
//! reason for some of its code. An exit is compared with these alone before its sets are searched,
//! out of line.
//!
//! A guest chooses keys, and can fill its own table with rubbish. It takes no longer for that, and
//! the sums stay exact.

use super::{
    atomic::{
        self,
        add,
        mark,
        AtomicU16,
        AtomicU32,
        AtomicU64,
        AtomicUsize,
        Cell,
        Ordering::Relaxed, //
    },
    detail,
    ledger::Ledger,
    phase::Phase,
    reasons::{Slot, SLOTS},
    slow::{self, Exited, Slow},
};

mod copy;
mod own;
pub use copy::{CodeCopy, DetailCopy, Others, TablesCopy, UserCopy};

/// Rows of a set.
pub const WAYS: usize = 4;
/// Sets of details, as a power of two.
const DETAIL_POWER: u32 = 6;
/// Sets of code, as a power of two.
const CODE_POWER: u32 = 6;
/// How many latest rows of code each reason knows, as a power of two.
const LATEST_POWER: u32 = 2;
/// Rows of details.
pub const DETAILS: usize = WAYS << DETAIL_POWER;
/// Rows of code.
pub const CODES: usize = WAYS << CODE_POWER;
/// Rows of exits to user space.
pub const USERS: usize = 32;

/// A multiplication by this spreads keys over the high bits: GOLDEN_RATIO_32 of linux/hash.h, from
/// the golden ratio (Knuth, "The Art of Computer Programming", volume 3, 6.4).
const SPREAD: u32 = 0x61c8_8647;

/// The most that the tables of one vCPU take, in bytes.
pub const MOST_BYTES: usize = 48 * 1024;

/// A row of details: one cache line.
#[repr(C, align(64))]
#[derive(Debug)]
struct Detail {
    /// Its exits' key: see [`detail::key`]. 0 for a row that is free.
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
    /// See [`Which`].
    which: AtomicU32,
    unused: AtomicU32,
    /// 0 for a row that is free.
    exits: AtomicU64,
    kernel: AtomicU64,
    missed_exits: AtomicU64,
    missed_kernel: AtomicU64,
}

/// A row of exits to user space.
#[repr(C)]
#[derive(Debug)]
struct User {
    /// See [`user_tag`]; 0 for a row that is free.
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

/// What an exit tells.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// Its reason.
    pub slot: Slot,
    /// It came from a nested guest, an L2.
    pub nested: bool,
    /// What it was about: see [`detail::key`].
    pub key: Option<u64>,
    /// Where the guest was; `None` when its registers are encrypted.
    pub rip: Option<u64>,
}

/// The keys of an exit, as few words: they go from function to function in registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys {
    pub(super) which: Which,
    /// See [`slow::key`].
    pub(super) key: u64,
    /// 0 where it cannot be read, as `which` tells.
    pub(super) rip: u64,
}

/// Which reason an exit is of: its row in the ledger, and in bits above that whether it came from a
/// nested guest and whether its RIP cannot be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Which(u32);

/// Where that holds that the exit came from a nested guest. So does [`Tables::lacks_rip`].
const IS_NESTED: u32 = 1 << 8;
/// Where that holds that the RIP cannot be read.
const NO_RIP: u32 = 1 << 9;
/// The bits of a row's place.
const SLOT: u32 = IS_NESTED - 1;

impl About {
    /// Return the exit's key, also where it has no detail: a number that has bits for the reason alone.
    #[inline(always)]
    pub fn whole_key(&self) -> u64 {
        match (self.key, self.nested) {
            (Some(key), false) => key,
            (Some(key), true) => key | detail::NESTED,
            (None, nested) => slow::key(self.slot, nested),
        }
    }

    /// Return the keys of the exit.
    #[inline(always)]
    pub(super) fn keys(&self) -> Keys {
        let mut which = self.slot.index() as u32;
        if self.nested {
            which |= IS_NESTED;
        }
        if self.rip.is_none() {
            which |= NO_RIP;
        }
        Keys {
            which: Which(which),
            key: self.whole_key(),
            rip: self.rip.unwrap_or(0),
        }
    }
}

impl Which {
    /// Return true if the exit came from a nested guest.
    #[inline(always)]
    pub(super) const fn is_nested(self) -> bool {
        self.0 & IS_NESTED != 0
    }

    /// Return the same and the key of an exit that the ledger counts in the row of
    /// [`Slot::OTHER`]. Its detail, if it has one, would be another reason's.
    pub(super) fn as_other(self, key: u64) -> (Self, u64) {
        if self.slot() == Slot::OTHER {
            return (self, key);
        }
        let which = self.0 & !SLOT | Slot::OTHER.index() as u32;
        (Self(which), slow::key(Slot::OTHER, self.is_nested()))
    }

    /// Return the place of the row of the ledger.
    #[inline(always)]
    const fn place(self) -> u32 {
        self.0 & SLOT
    }

    /// Return the row of the ledger.
    #[inline(always)]
    pub(super) fn slot(self) -> Slot {
        Slot::from_index(self.place() as usize).unwrap_or(Slot::OTHER)
    }

    #[inline(always)]
    const fn has_rip(self) -> bool {
        self.0 & NO_RIP == 0
    }
}

/// The rows of an exit.
///
/// # Invariants
///
/// `detail` and `code` are how many bytes from the first row of its table a row begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    detail: usize,
    code: usize,
}

/// The tables of one vCPU. All-zero bytes are some that have not begun, once they are prepared.
///
/// The first row of each table is nobody's: what has no row is booked there, and never read. So is
/// the last row of code.
///
/// # Invariants
///
/// - `detail`, `code` and `user` are how many bytes from the first row of its table a row begins.
/// - They are in no row, or in one of the ledger's latest reason; `user` alone may lag behind, but
///   not in user space.
/// - So are `latest_details` and `latest_codes`, each in a row that is in use, or in nobody's.
/// - A row that `latest_codes` has for a reason is one of exits for that, and of no nested guest's;
///   nobody's row that it has there holds a RIP which belongs elsewhere in it.
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
    /// Other than 0 if an exit came without RIP; [`IS_NESTED`] tells of the latest of these.
    lacks_rip: AtomicU32,
    /// By set: where its latest row begins.
    latest_details: [AtomicU16; 1 << DETAIL_POWER],
    /// By reason and place: where the latest row of code for it begins.
    latest_codes: [[AtomicU16; 1 << LATEST_POWER]; SLOTS],
    codes_in_use: [AtomicU64; CODES / 64],
    /// By set: kernel ticks that were lost.
    code_lost: [AtomicU64; 1 << CODE_POWER],
    /// By reason: exits to user space that have no row.
    other_users: [AtomicU64; SLOTS],
    /// Their rows begin a cache line each, so they stand where no room is lost by that.
    details: [Detail; 1 + DETAILS],
    codes: [Code; 2 + CODES],
    users: [User; 1 + USERS],
    baseline: [Baseline; SLOTS],
    slow: Slow,
    details_in_use: [AtomicU64; DETAILS / 64],
}

// Loom's atomics are larger.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Tables>() <= MOST_BYTES);
// cli/bpf/tables.h says the same.
#[cfg(not(loom))]
const _: () = {
    assert!(core::mem::offset_of!(Tables, codes_in_use) == 1600);
    assert!(core::mem::offset_of!(Tables, details) == 3584);
    assert!(core::mem::offset_of!(Tables, users) == 32416);
    assert!(core::mem::offset_of!(Tables, slow) == 37480);
    assert!(size_of::<Tables>() == 47232);
};
// Where a row begins has room in 16 bits.
#[cfg(not(loom))]
const _: () = assert!(size_of::<[Detail; 1 + DETAILS]>() <= 1 << 16);
#[cfg(not(loom))]
const _: () = assert!(size_of::<[Code; 2 + CODES]>() <= 1 << 16);

/// Reads a cell of a vCPU's tables, in a transition of that vCPU.
#[inline(always)]
fn own<C: Cell>(cell: &C) -> C::Value {
    // SAFETY: Only transitions write to tables, and there is one at a time.
    unsafe { atomic::own(cell) }
}

/// Return the set of `1 << power` that a key belongs to, by its low half.
#[inline(always)]
const fn set_of(key: u32, power: u32) -> usize {
    (key.wrapping_mul(SPREAD) >> (32 - power)) as usize
}

/// Return the set of code that a place belongs to, where exits are of a reason.
#[inline(always)]
const fn code_set(rip: u64, slot: u32) -> usize {
    set_of((rip as u32).wrapping_add(slot << 3), CODE_POWER)
}

/// Return which of the latest rows of code of a reason is for a place in the guest's code.
#[inline(always)]
const fn latest_code(rip: u64) -> usize {
    set_of(rip as u32, LATEST_POWER)
}

/// Where nobody's last row of code begins. The RIP in it belongs to other places of `latest_codes`
/// than that of the first one, which is 0.
const LAST_CODE: usize = (1 + CODES) * size_of::<Code>();
/// The RIP in that row.
const LAST_RIP: u64 = 1;
const _: () = assert!(latest_code(0) != latest_code(LAST_RIP));

/// Return which of nobody's rows of code is for a place of `latest_codes`: one with a RIP that
/// belongs elsewhere.
const fn no_code(place: usize) -> usize {
    match place == latest_code(0) {
        true => LAST_CODE,
        false => 0,
    }
}

/// Return where a set begins, whose rows take `row` bytes: behind the first row of the table.
const fn start_of(set: usize, row: usize) -> usize {
    set.wrapping_mul(WAYS * row).wrapping_add(row)
}

/// Return where the rows of a set begin.
fn rows_of(set: usize, row: usize) -> impl Iterator<Item = usize> {
    let start = start_of(set, row);
    (0..WAYS).map(move |way| start.wrapping_add(way.wrapping_mul(row)))
}

/// Return which row of a set a new key takes: a free one, or the one of the fewest exits. Of that
/// also how many these are, which is how many of the new key's there may have been before. `exits`
/// counts those of a row, with those that it may have missed, and gives `None` for a free one.
fn choose(set: usize, row: usize, exits: impl Fn(usize) -> Option<u64>) -> (usize, Option<u64>) {
    let mut chosen = (start_of(set, row), u64::MAX);
    for offset in rows_of(set, row) {
        match exits(offset) {
            None => return (offset, None),
            Some(exits) if exits < chosen.1 => chosen = (offset, exits),
            Some(_) => {}
        }
    }
    (chosen.0, Some(chosen.1))
}

/// Return the exits of a row, with those that it may have missed.
fn all_exits(exits: &AtomicU64, missed: &AtomicU64) -> u64 {
    own(exits).saturating_add(own(missed))
}

/// Where a tag of exits to user space has the reason.
const REASON_SHIFT: u32 = 16;

/// Return the tag of exits to user space: the index of the reason's slot, from 1 as no tag is 0,
/// and why.
#[inline(always)]
pub(super) const fn user_tag(slot: u8, why: u16) -> u64 {
    let reason = (slot as u32).wrapping_add(1);
    (reason << REASON_SHIFT | why as u32) as u64
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

    /// Return true if the vCPU has a ring of its last exits.
    #[inline(always)]
    pub fn has_ring(&self) -> bool {
        self.slow.has_ring()
    }

    #[inline(always)]
    fn detail_at(&self, offset: usize) -> &Detail {
        // SAFETY: By the invariant of `Tables`, or of who computes it, a row is there.
        unsafe { &*self.details.as_ptr().byte_add(offset) }
    }

    #[inline(always)]
    fn code_at(&self, offset: usize) -> &Code {
        // SAFETY: As above.
        unsafe { &*self.codes.as_ptr().byte_add(offset) }
    }

    #[inline(always)]
    fn user_at(&self, offset: usize) -> &User {
        // SAFETY: As above.
        unsafe { &*self.users.as_ptr().byte_add(offset) }
    }

    /// Return where the latest row of code is noted, for exits of a reason at a place.
    #[inline(always)]
    fn latest_code(&self, slot: Slot, rip: u64) -> &AtomicU16 {
        // SAFETY: By the invariant of `Slot` its index is below SLOTS, and the place is below the
        // power of 2.
        unsafe {
            self.latest_codes
                .get_unchecked(slot.index())
                .get_unchecked(latest_code(rip))
        }
    }

    /// Make all-zero bytes tables that have not begun.
    pub fn prepare(&self) {
        self.code_at(LAST_CODE).rip.store(LAST_RIP, Relaxed);
        for latest_codes in &self.latest_codes {
            for (place, latest) in latest_codes.iter().enumerate() {
                // INVARIANT: That row is nobody's, with a RIP that belongs elsewhere.
                latest.store(no_code(place) as u16, Relaxed);
            }
        }
    }

    /// Return the rows of an exit that is none of a nested guest, if each is a latest one; `None`
    /// where they are to be looked for. If there are some, the reason has had an exit. With them
    /// the exit's key, also where it has no detail: see [`slow::key`].
    #[inline(always)]
    pub(super) fn latest_rows(
        &self,
        slot: Slot,
        key: Option<u64>,
        rip: u64,
    ) -> (u64, Option<Rows>) {
        let (key, detail) = match key {
            None => (slow::key(slot, false), 0),
            Some(key) => {
                let set = set_of(key as u32, DETAIL_POWER);
                // SAFETY: The set is below the power of 2 of their number.
                let latest = own(unsafe { self.latest_details.get_unchecked(set) }).into();
                if own(&self.detail_at(latest).key) != key {
                    return (key, None);
                }
                (key, latest)
            }
        };
        let code = own(self.latest_code(slot, rip)).into();
        // By the invariant of `Tables` the row is of that reason, or not at that place.
        if own(&self.code_at(code).rip) != rip {
            return (key, None);
        }
        (key, Some(Rows { detail, code }))
    }

    /// Return the rows of an exit at TSC `now`, which gets those that it has not. In the ledger's
    /// transition, before the ledger counts the exit.
    pub(super) fn rows_for(&self, ledger: &Ledger, now: u64, keys: &Keys) -> Rows {
        self.begin(ledger, now);
        let detail = match slow::has_detail(keys.key) {
            false => 0,
            true => {
                let (key, set) = (keys.key, set_of(keys.key as u32, DETAIL_POWER));
                let row = self
                    .find_detail(set, key)
                    .unwrap_or_else(|| self.new_detail(set, key));
                if let Some(latest) = self.latest_details.get(set) {
                    // INVARIANT: The row is there, and in use.
                    latest.store(row as u16, Relaxed);
                }
                row
            }
        };
        let code = match keys.which.has_rip() {
            true => {
                let (rip, which) = (keys.rip, keys.which);
                let set = code_set(rip, which.place());
                let row = self
                    .find_code(set, rip, which)
                    .unwrap_or_else(|| self.new_code(set, rip, which));
                if !which.is_nested() {
                    // INVARIANT: As above; and it is of that reason.
                    let latest = self.latest_code(which.slot(), rip);
                    latest.store(row as u16, Relaxed);
                }
                row
            }
            false => {
                self.lacks_rip.store(keys.which.0, Relaxed);
                0
            }
        };
        Rows { detail, code }
    }

    /// Take an exit into its rows, in the ledger's transition.
    #[inline(always)]
    pub(super) fn take_exit(&self, rows: Rows) {
        // INVARIANT: By that of `Rows`.
        self.detail.store(rows.detail as u32, Relaxed);
        self.code.store(rows.code as u32, Relaxed);
        add(&self.detail_at(rows.detail).exits, 1);
        add(&self.code_at(rows.code).exits, 1);
    }

    /// Return where the row of a key is, if its set has one.
    fn find_detail(&self, set: usize, key: u64) -> Option<usize> {
        rows_of(set, size_of::<Detail>()).find(|&offset| own(&self.detail_at(offset).key) == key)
    }

    /// Give a key a row of its set; return where it is.
    #[cold]
    #[inline(never)]
    fn new_detail(&self, set: usize, key: u64) -> usize {
        const ROW: usize = size_of::<Detail>();
        let (offset, missed) = choose(set, ROW, |offset| {
            let row = self.detail_at(offset);
            (own(&row.key) != 0).then(|| all_exits(&row.exits, &row.missed_exits))
        });
        let row = self.detail_at(offset);
        match missed {
            // The first row is nobody's.
            None => mark(&self.details_in_use, (offset / ROW).wrapping_sub(1)),
            Some(missed) => {
                let first = start_of(set, ROW);
                let kernel_lost = &self.detail_at(first).lost;
                let user_lost = &self.detail_at(first.wrapping_add(ROW)).lost;
                add(kernel_lost, own(&row.kernel));
                add(user_lost, own(&row.user));
                row.missed_exits.store(missed, Relaxed);
                row.missed_kernel.store(own(kernel_lost), Relaxed);
                row.missed_user.store(own(user_lost), Relaxed);
                for cell in [&row.exits, &row.kernel, &row.user] {
                    cell.store(0, Relaxed);
                }
            }
        }
        row.key.store(key, Relaxed);
        offset
    }

    /// Return where the row of a place in the guest's code is, if its set has one.
    fn find_code(&self, set: usize, rip: u64, which: Which) -> Option<usize> {
        rows_of(set, size_of::<Code>()).find(|&offset| {
            let row = self.code_at(offset);
            // All bytes of a free row are 0, which is a place of the first reason as well.
            own(&row.rip) == rip && own(&row.which) == which.0 && own(&row.exits) != 0
        })
    }

    /// Give a place in the guest's code a row of its set; return where it is.
    #[cold]
    #[inline(never)]
    fn new_code(&self, set: usize, rip: u64, which: Which) -> usize {
        const ROW: usize = size_of::<Code>();
        let (offset, missed) = choose(set, ROW, |offset| {
            let row = self.code_at(offset);
            (own(&row.exits) != 0).then(|| all_exits(&row.exits, &row.missed_exits))
        });
        let row = self.code_at(offset);
        match missed {
            None => mark(&self.codes_in_use, (offset / ROW).wrapping_sub(1)),
            Some(missed) => {
                self.forget_code(offset, Which(own(&row.which)), own(&row.rip));
                let mut lost = 0;
                if let Some(cell) = self.code_lost.get(set) {
                    add(cell, own(&row.kernel));
                    lost = own(cell);
                }
                row.missed_exits.store(missed, Relaxed);
                row.missed_kernel.store(lost, Relaxed);
                for cell in [&row.exits, &row.kernel] {
                    cell.store(0, Relaxed);
                }
            }
        }
        row.rip.store(rip, Relaxed);
        row.which.store(which.0, Relaxed);
        offset
    }

    /// Take a row of code that another place gets out of the latest ones.
    fn forget_code(&self, offset: usize, which: Which, rip: u64) {
        let latest = self.latest_code(which.slot(), rip);
        if usize::from(own(latest)) == offset {
            // INVARIANT: That row is nobody's, with a RIP that belongs elsewhere.
            latest.store(no_code(latest_code(rip)) as u16, Relaxed);
        }
    }

    /// Take down what the ledger has so far, unless that was done. No row is a latest one at first,
    /// so the first exit comes here.
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
        self.slow.begin(now);
    }

    /// Return what the latest exit was; `None` if it came before the tables began.
    pub(super) fn latest_exit(&self, ledger: &Ledger) -> Option<Exited> {
        if self.has_begun.load(Relaxed) == 0 {
            return None;
        }
        let slot = ledger.slot().unwrap_or(Slot::OTHER);
        let (which, rip) = match own(&self.code) {
            0 => (self.lacks_rip.load(Relaxed), 0),
            code => {
                let row = self.code_at(code as usize);
                (own(&row.which), own(&row.rip))
            }
        };
        let key = match own(&self.detail) {
            0 => slow::key(slot, Which(which).is_nested()),
            detail => own(&self.detail_at(detail as usize).key),
        };
        let before = |slot: Slot| match self.baseline.get(slot.index()) {
            Some(baseline) => baseline.exits.load(Relaxed),
            None => 0,
        };
        let exits = ledger.slots().fold(0_u64, |sum, slot| {
            let since = ledger.exits(slot).wrapping_sub(before(slot));
            sum.wrapping_add(since)
        });
        Some(Exited {
            sequence: exits.wrapping_sub(1),
            key,
            rip,
        })
    }

    /// Book kernel ticks on the rows of the latest exit.
    #[inline(always)]
    pub(super) fn book_kernel(&self, ticks: u64) {
        add(&self.detail_at(own(&self.detail) as usize).kernel, ticks);
        add(&self.code_at(own(&self.code) as usize).kernel, ticks);
    }

    /// Book ticks in user space on the rows of the latest exit.
    #[inline(always)]
    pub(super) fn book_user(&self, ticks: u64) {
        add(&self.detail_at(own(&self.detail) as usize).user, ticks);
        add(&self.user_at(own(&self.user) as usize).ticks, ticks);
    }

    /// Book ticks of a phase, by its number, on the rows of the latest exit.
    pub(super) fn book(&self, phase: u32, ticks: u64) {
        if phase == Phase::Kernel as u32 {
            self.book_kernel(ticks);
        } else if phase == Phase::User as u32 {
            self.book_user(ticks);
        }
    }

    /// Return where the row of exits to user space with a tag is, if it is that of the latest one.
    #[inline(always)]
    pub(super) fn latest_user(&self, tag: u64) -> Option<usize> {
        let row = own(&self.user) as usize;
        (own(&self.user_at(row).tag) == tag).then_some(row)
    }

    /// Count an exit to user space in its row, which is that of the latest one.
    #[inline(always)]
    pub(super) fn count_user(&self, row: usize) {
        add(&self.user_at(row).exits, 1);
    }

    /// Take an exit to user space, by a reason, for `why`: KVM_EXIT_* (linux/kvm.h), in 16 bits;
    /// `None` for one that is not KVM_RUN's.
    pub(super) fn leave_to_user(&self, slot: Option<Slot>, why: Option<u16>) {
        let row = self.user_row(slot, why);
        if let (0, Some(slot), Some(_)) = (row, slot, why) {
            if self.has_begun.load(Relaxed) != 0 {
                if let Some(cell) = self.other_users.get(slot.index()) {
                    add(cell, 1);
                }
            }
        }
        if why.is_some() {
            add(&self.user_at(row).exits, 1);
        }
        // INVARIANT: By what was returned.
        self.user.store(row as u32, Relaxed);
    }

    /// Return where the row of exits to user space is that the time there belongs to, which is one
    /// of the latest reason; the first row's place if there is none.
    fn user_row(&self, slot: Option<Slot>, why: Option<u16>) -> usize {
        const ROW: usize = size_of::<User>();
        let Some(slot) = slot.filter(|_| self.has_begun.load(Relaxed) != 0) else {
            return 0;
        };
        let Some(why) = why else {
            // It was there before, for that reason, or for another one.
            let row = own(&self.user) as usize;
            let tag = own(&self.user_at(row).tag);
            return match tag >> REASON_SHIFT == user_tag(slot.index() as u8, 0) >> REASON_SHIFT {
                true => row,
                false => 0,
            };
        };
        let tag = user_tag(slot.index() as u8, why);
        let mut offset = ROW;
        for _ in 0..USERS {
            let row = self.user_at(offset);
            match own(&row.tag) {
                0 => row.tag.store(tag, Relaxed),
                other if other != tag => {
                    offset = offset.wrapping_add(ROW);
                    continue;
                }
                _ => {}
            }
            return offset;
        }
        0
    }

    /// Go on at `now` by a clock that has begun anew; it was `then` by the one before.
    pub(super) fn rebase(&self, then: u64, now: u64) {
        let age = then.wrapping_sub(self.since.load(Relaxed));
        self.since.store(now.wrapping_sub(age), Relaxed);
    }
}
