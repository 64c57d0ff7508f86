// SPDX-License-Identifier: GPL-2.0

//! Tables of one vCPU: its exits by detail, by the guest code that caused them, and by the reason why they
//! went to user space.
//!
//! A vCPU's tables are written in the same transitions as its [`Ledger`]. When they begin, they record
//! the ledger's numbers at that time: the baseline. The others of a reason, its exits and
//! ticks that no row holds, are the ledger's, less the baseline, less the rows. So rows and others
//! sum to the reason's numbers, to the tick, and nothing is counted twice. A row that has to give
//! way is simply overwritten: its numbers fall to the others.
//!
//! # Eviction
//!
//! Details and code use Space-Saving (Metwally, Agrawal, El Abbadi: "Efficient Computation of
//! Frequent and Top-k Elements in Data Streams", ICDT 2005) in sets of [`WAYS`] rows. A key belongs
//! to one set. A new key takes the row of its set with the fewest exits, counting those that the
//! row may have missed. So a key without a row has had at most as many exits as that row. The new
//! row begins with this number, as the most that it may have missed. Of ticks, a row may have
//! missed at most all that its set lost before the row began. A row of a set that lost nothing is
//! exact.
//!
//! A guest mostly repeats itself. So each set of details caches its latest row, and each reason
//! caches some of its rows of code. An exit is compared with these first; the search of its sets is
//! out of line.
//!
//! A guest chooses keys, and can fill its own table with rubbish. That takes no longer, and the
//! sums stay exact.

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
/// Latest rows of code that each reason caches, as a power of two.
const LATEST_POWER: u32 = 2;
/// Rows of details.
pub const DETAILS: usize = WAYS << DETAIL_POWER;
/// Rows of code.
pub const CODES: usize = WAYS << CODE_POWER;
/// Rows of exits to user space.
pub const USERS: usize = 32;

/// Multiplier that spreads keys over the high bits: GOLDEN_RATIO_32 of linux/hash.h, from the
/// golden ratio (Knuth, "The Art of Computer Programming", volume 3, 6.4).
const SPREAD: u32 = 0x61c8_8647;

/// Upper bound for the size of one vCPU's tables, in bytes.
pub const MAX_BYTES: usize = 48 * 1024;

/// A row of details: one cache line.
#[repr(C, align(64))]
#[derive(Debug)]
struct Detail {
    /// Key of its exits: see [`detail::key`]. 0 in a free row.
    key: AtomicU64,
    exits: AtomicU64,
    kernel: AtomicU64,
    user: AtomicU64,
    missed_exits: AtomicU64,
    missed_kernel: AtomicU64,
    missed_user: AtomicU64,
    /// Ticks that the set lost: in its first row kernel ticks, in the second user ticks.
    lost: AtomicU64,
}

/// A row of code.
#[repr(C)]
#[derive(Debug)]
struct Code {
    rip: AtomicU64,
    /// See [`ReasonBits`].
    which: AtomicU32,
    unused: AtomicU32,
    /// 0 in a free row.
    exits: AtomicU64,
    kernel: AtomicU64,
    missed_exits: AtomicU64,
    missed_kernel: AtomicU64,
}

/// A row of exits to user space.
#[repr(C)]
#[derive(Debug)]
struct User {
    /// See [`user_tag`]; 0 in a free row.
    tag: AtomicU64,
    exits: AtomicU64,
    ticks: AtomicU64,
}

/// Numbers of one reason in the ledger when the tables began.
#[derive(Debug)]
struct Baseline {
    exits: AtomicU64,
    kernel: AtomicU64,
    user: AtomicU64,
}

/// An exit, as the callback describes it.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// Its exit reason.
    pub slot: Slot,
    /// Set if it came from a nested guest, an L2.
    pub nested: bool,
    /// Its detail: see [`detail::key`].
    pub key: Option<u64>,
    /// Guest RIP; `None` when the guest's registers are encrypted.
    pub rip: Option<u64>,
}

/// Keys of an exit, in few words, so that they pass between functions in registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys {
    pub(super) which: ReasonBits,
    /// See [`slow::key`].
    pub(super) key: u64,
    /// 0 where it cannot be read, as `which` says.
    pub(super) rip: u64,
}

/// Exit reason of an exit: its slot, with flags above for a nested guest and for an unreadable RIP.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReasonBits(u32);

/// Flag in [`ReasonBits`]: the exit came from a nested guest. [`Tables::lacks_rip`] uses it too.
const IS_NESTED: u32 = 1 << 8;
/// Flag in [`ReasonBits`]: the RIP cannot be read.
const NO_RIP: u32 = 1 << 9;
/// Bits of the slot in [`ReasonBits`].
const SLOT: u32 = IS_NESTED - 1;

impl About {
    /// Return the exit's key. Without a detail, the key has bits for the reason alone.
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
            which: ReasonBits(which),
            key: self.whole_key(),
            rip: self.rip.unwrap_or(0),
        }
    }
}

impl ReasonBits {
    /// Return true if the exit came from a nested guest.
    #[inline(always)]
    pub(super) const fn is_nested(self) -> bool {
        self.0 & IS_NESTED != 0
    }

    /// Return the bits and the key of the same exit as one of [`Slot::OTHER`], without the detail of its
    /// own reason. For an exit that the ledger counts in that slot's row.
    pub(super) fn as_other(self, key: u64) -> (Self, u64) {
        if self.slot() == Slot::OTHER {
            return (self, key);
        }
        let which = self.0 & !SLOT | Slot::OTHER.index() as u32;
        (Self(which), slow::key(Slot::OTHER, self.is_nested()))
    }

    /// Return the index of the slot.
    #[inline(always)]
    const fn index(self) -> u32 {
        self.0 & SLOT
    }

    /// Return the slot.
    #[inline(always)]
    pub(super) fn slot(self) -> Slot {
        Slot::from_index(self.index() as usize).unwrap_or(Slot::OTHER)
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
/// `detail` and `code` are byte offsets of a row from the first row of its table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    detail: usize,
    code: usize,
}

/// Tables of one vCPU. All-zero bytes are tables that have not begun, once they are prepared.
///
/// The first row of each table is a dummy: exits without a row are booked there, and nobody reads
/// it. The last row of code is another dummy.
///
/// # Invariants
///
/// - `detail`, `code` and `user` are byte offsets of a row from the first row of its table.
/// - Each is the offset of a dummy, or of a row of the ledger's latest reason; only `user` may lag
///   behind, but not in user space.
/// - `latest_details` and `latest_codes` are such offsets too, each of a row in use or of a dummy.
/// - A row that `latest_codes` caches for a reason holds exits of that reason that came from no
///   nested guest; a dummy that it holds has a RIP that belongs elsewhere in it.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Tables {
    /// Room for the platform, once the tables are released. Comes first, as `kvfree_rcu()` demands.
    retired: [AtomicUsize; 2],
    /// TSC when the tables began.
    since: AtomicU64,
    has_begun: AtomicU32,
    detail: AtomicU32,
    code: AtomicU32,
    user: AtomicU32,
    /// Nonzero if an exit came without RIP; [`IS_NESTED`] holds for the latest of these.
    lacks_rip: AtomicU32,
    /// Offset of the latest row, by set.
    latest_details: [AtomicU16; 1 << DETAIL_POWER],
    /// Offset of the latest row of code, by reason and place.
    latest_codes: [[AtomicU16; 1 << LATEST_POWER]; SLOTS],
    codes_in_use: [AtomicU64; CODES / 64],
    /// Kernel ticks lost, by set.
    code_lost: [AtomicU64; 1 << CODE_POWER],
    /// Exits to user space without a row, by reason.
    other_users: [AtomicU64; SLOTS],
    /// Each row begins a cache line, so the tables stand where this wastes no room.
    details: [Detail; 1 + DETAILS],
    codes: [Code; 2 + CODES],
    users: [User; 1 + USERS],
    baseline: [Baseline; SLOTS],
    slow: Slow,
    details_in_use: [AtomicU64; DETAILS / 64],
}

// Loom's atomics are larger.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Tables>() <= MAX_BYTES);
// cli/bpf/tables.h has the same offsets.
#[cfg(not(loom))]
const _: () = {
    assert!(core::mem::offset_of!(Tables, codes_in_use) == 1600);
    assert!(core::mem::offset_of!(Tables, details) == 3584);
    assert!(core::mem::offset_of!(Tables, users) == 32416);
    assert!(core::mem::offset_of!(Tables, slow) == 37480);
    assert!(size_of::<Tables>() == 47232);
};
// A row's offset fits in 16 bits.
#[cfg(not(loom))]
const _: () = assert!(size_of::<[Detail; 1 + DETAILS]>() <= 1 << 16);
#[cfg(not(loom))]
const _: () = assert!(size_of::<[Code; 2 + CODES]>() <= 1 << 16);

/// Read a cell of a vCPU's tables, in a transition of that vCPU.
#[inline(always)]
fn read_owned<C: Cell>(cell: &C) -> C::Value {
    // SAFETY: Only transitions write to tables, and there is one at a time.
    unsafe { atomic::read_owned(cell) }
}

/// Return the set of `1 << power` that a key belongs to, by its low half.
#[inline(always)]
const fn set_of(key: u32, power: u32) -> usize {
    (key.wrapping_mul(SPREAD) >> (32 - power)) as usize
}

/// Return the set of code for a RIP and a reason.
#[inline(always)]
const fn code_set(rip: u64, slot: u32) -> usize {
    set_of((rip as u32).wrapping_add(slot << 3), CODE_POWER)
}

/// Return the place in `latest_codes` for a RIP.
#[inline(always)]
const fn latest_code(rip: u64) -> usize {
    set_of(rip as u32, LATEST_POWER)
}

/// Offset of the dummy in the last row of code. Its RIP belongs to another place of `latest_codes`
/// than the RIP of the first dummy, which is 0.
const LAST_CODE: usize = (1 + CODES) * size_of::<Code>();
/// RIP in the last dummy.
const LAST_RIP: u64 = 1;
const _: () = assert!(latest_code(0) != latest_code(LAST_RIP));

/// Return the offset of a dummy for a place of `latest_codes`: its RIP belongs elsewhere.
const fn no_code(place: usize) -> usize {
    match place == latest_code(0) {
        true => LAST_CODE,
        false => 0,
    }
}

/// Return the offset of a set whose rows take `row` bytes. Sets follow the table's first row.
const fn start_of(set: usize, row: usize) -> usize {
    set.wrapping_mul(WAYS * row).wrapping_add(row)
}

/// Return the offsets of a set's rows.
fn rows_of(set: usize, row: usize) -> impl Iterator<Item = usize> {
    let start = start_of(set, row);
    (0..WAYS).map(move |way| start.wrapping_add(way.wrapping_mul(row)))
}

/// Choose the row of a set for a new key: a free row, or the one with the fewest exits. Return its
/// offset and, for a row in use, its exits, which is the most that the new key may have had before.
/// `exits` returns a row's exits plus those that it may have missed, or `None` for a free row.
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

/// Return the exits of a row, plus those that it may have missed.
fn all_exits(exits: &AtomicU64, missed: &AtomicU64) -> u64 {
    read_owned(exits).saturating_add(read_owned(missed))
}

/// Shift of the reason in the tag of exits to user space.
const REASON_SHIFT: u32 = 16;

/// Return the tag of exits to user space: the index of the reason's slot, from 1 as no tag is 0,
/// and `why`.
#[inline(always)]
pub(super) const fn user_tag(slot: u8, why: u16) -> u64 {
    let reason = (slot as u32).wrapping_add(1);
    (reason << REASON_SHIFT | why as u32) as u64
}

impl Tables {
    /// Return the room for the platform, once nobody uses the tables any more.
    pub fn room(&self) -> &[AtomicUsize; 2] {
        &self.retired
    }

    /// Return the recorder of slow exits.
    #[inline(always)]
    pub fn slow(&self) -> &Slow {
        &self.slow
    }

    /// Return true if the vCPU has a ring of its latest exits.
    #[inline(always)]
    pub fn has_ring(&self) -> bool {
        self.slow.has_ring()
    }

    #[inline(always)]
    fn detail_at(&self, offset: usize) -> &Detail {
        // SAFETY: By the invariant of `Tables`, or of the caller that computed it, a row is there.
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

    /// Return the cache of the latest row of code, for exits of a reason at a RIP.
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

    /// Turn all-zero bytes into tables that have not begun.
    pub fn prepare(&self) {
        self.code_at(LAST_CODE).rip.store(LAST_RIP, Relaxed);
        for latest_codes in &self.latest_codes {
            for (place, latest) in latest_codes.iter().enumerate() {
                // INVARIANT: That row is a dummy, with a RIP that belongs elsewhere.
                latest.store(no_code(place) as u16, Relaxed);
            }
        }
    }

    /// Return the rows of an exit that came from no nested guest, if both are cached; `None` if the
    /// sets must be searched. If rows are returned, the reason has had an exit before. Return the
    /// exit's key as well: see [`slow::key`] for an exit without a detail.
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
                let latest = read_owned(unsafe { self.latest_details.get_unchecked(set) }).into();
                if read_owned(&self.detail_at(latest).key) != key {
                    return (key, None);
                }
                (key, latest)
            }
        };
        let code = read_owned(self.latest_code(slot, rip)).into();
        // By the invariant of `Tables` the row is of that reason, or has a RIP of another place.
        if read_owned(&self.code_at(code).rip) != rip {
            return (key, None);
        }
        (key, Some(Rows { detail, code }))
    }

    /// Return the rows of an exit at TSC `now`, and create missing ones. Call in the ledger's
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
                let set = code_set(rip, which.index());
                let row = self
                    .find_code(set, rip, which)
                    .unwrap_or_else(|| self.new_code(set, rip, which));
                if !which.is_nested() {
                    // INVARIANT: As above; and the row is of that reason.
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

    /// Count an exit in its rows, in the ledger's transition.
    #[inline(always)]
    pub(super) fn take_exit(&self, rows: Rows) {
        // INVARIANT: By the invariant of `Rows`.
        self.detail.store(rows.detail as u32, Relaxed);
        self.code.store(rows.code as u32, Relaxed);
        add(&self.detail_at(rows.detail).exits, 1);
        add(&self.code_at(rows.code).exits, 1);
    }

    /// Return the offset of the row with a key, if its set has one.
    fn find_detail(&self, set: usize, key: u64) -> Option<usize> {
        rows_of(set, size_of::<Detail>())
            .find(|&offset| read_owned(&self.detail_at(offset).key) == key)
    }

    /// Give a key a row of its set. Return its offset.
    #[cold]
    #[inline(never)]
    fn new_detail(&self, set: usize, key: u64) -> usize {
        const ROW: usize = size_of::<Detail>();
        let (offset, missed) = choose(set, ROW, |offset| {
            let row = self.detail_at(offset);
            (read_owned(&row.key) != 0).then(|| all_exits(&row.exits, &row.missed_exits))
        });
        let row = self.detail_at(offset);
        match missed {
            // The first row is a dummy.
            None => mark(&self.details_in_use, (offset / ROW).wrapping_sub(1)),
            Some(missed) => {
                let first = start_of(set, ROW);
                let kernel_lost = &self.detail_at(first).lost;
                let user_lost = &self.detail_at(first.wrapping_add(ROW)).lost;
                add(kernel_lost, read_owned(&row.kernel));
                add(user_lost, read_owned(&row.user));
                row.missed_exits.store(missed, Relaxed);
                row.missed_kernel.store(read_owned(kernel_lost), Relaxed);
                row.missed_user.store(read_owned(user_lost), Relaxed);
                for cell in [&row.exits, &row.kernel, &row.user] {
                    cell.store(0, Relaxed);
                }
            }
        }
        row.key.store(key, Relaxed);
        offset
    }

    /// Return the offset of the row for a RIP, if its set has one.
    fn find_code(&self, set: usize, rip: u64, which: ReasonBits) -> Option<usize> {
        rows_of(set, size_of::<Code>()).find(|&offset| {
            let row = self.code_at(offset);
            // All bytes of a free row are 0, which is also RIP 0 of the first reason.
            read_owned(&row.rip) == rip
                && read_owned(&row.which) == which.0
                && read_owned(&row.exits) != 0
        })
    }

    /// Give a RIP a row of its set. Return its offset.
    #[cold]
    #[inline(never)]
    fn new_code(&self, set: usize, rip: u64, which: ReasonBits) -> usize {
        const ROW: usize = size_of::<Code>();
        let (offset, missed) = choose(set, ROW, |offset| {
            let row = self.code_at(offset);
            (read_owned(&row.exits) != 0).then(|| all_exits(&row.exits, &row.missed_exits))
        });
        let row = self.code_at(offset);
        match missed {
            None => mark(&self.codes_in_use, (offset / ROW).wrapping_sub(1)),
            Some(missed) => {
                self.forget_code(
                    offset,
                    ReasonBits(read_owned(&row.which)),
                    read_owned(&row.rip),
                );
                let mut lost = 0;
                if let Some(cell) = self.code_lost.get(set) {
                    add(cell, read_owned(&row.kernel));
                    lost = read_owned(cell);
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

    /// Drop a row of code from the cache, because another RIP gets it.
    fn forget_code(&self, offset: usize, which: ReasonBits, rip: u64) {
        let latest = self.latest_code(which.slot(), rip);
        if usize::from(read_owned(latest)) == offset {
            // INVARIANT: That row is a dummy, with a RIP that belongs elsewhere.
            latest.store(no_code(latest_code(rip)) as u16, Relaxed);
        }
    }

    /// Record the ledger's numbers as the baseline, once. No row is cached at first, so the first
    /// exit comes here.
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

    /// Return the latest exit, or `None` if it came before the tables began.
    pub(super) fn latest_exit(&self, ledger: &Ledger) -> Option<Exited> {
        if self.has_begun.load(Relaxed) == 0 {
            return None;
        }
        let slot = ledger.slot().unwrap_or(Slot::OTHER);
        let (which, rip) = match read_owned(&self.code) {
            0 => (self.lacks_rip.load(Relaxed), 0),
            code => {
                let row = self.code_at(code as usize);
                (read_owned(&row.which), read_owned(&row.rip))
            }
        };
        let key = match read_owned(&self.detail) {
            0 => slow::key(slot, ReasonBits(which).is_nested()),
            detail => read_owned(&self.detail_at(detail as usize).key),
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
        add(
            &self.detail_at(read_owned(&self.detail) as usize).kernel,
            ticks,
        );
        add(&self.code_at(read_owned(&self.code) as usize).kernel, ticks);
    }

    /// Book ticks in user space on the rows of the latest exit.
    #[inline(always)]
    pub(super) fn book_user(&self, ticks: u64) {
        add(
            &self.detail_at(read_owned(&self.detail) as usize).user,
            ticks,
        );
        add(&self.user_at(read_owned(&self.user) as usize).ticks, ticks);
    }

    /// Book ticks of a phase, by its number, on the rows of the latest exit.
    pub(super) fn book(&self, phase: u32, ticks: u64) {
        if phase == Phase::Kernel as u32 {
            self.book_kernel(ticks);
        } else if phase == Phase::User as u32 {
            self.book_user(ticks);
        }
    }

    /// Return the offset of the row of exits to user space with a tag, if the latest exit has that
    /// row.
    #[inline(always)]
    pub(super) fn latest_user(&self, tag: u64) -> Option<usize> {
        let row = read_owned(&self.user) as usize;
        (read_owned(&self.user_at(row).tag) == tag).then_some(row)
    }

    /// Count an exit to user space in its row, the row of the latest one.
    #[inline(always)]
    pub(super) fn count_user(&self, row: usize) {
        add(&self.user_at(row).exits, 1);
    }

    /// Count an exit to user space of a reason. `why` is KVM_EXIT_* (linux/kvm.h), in 16 bits, or
    /// `None` if the vCPU was not in KVM_RUN.
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
        // INVARIANT: By what `user_row` returned.
        self.user.store(row as u32, Relaxed);
    }

    /// Return the offset of the row that user time belongs to, which is a row of the latest reason,
    /// or 0 if there is none.
    fn user_row(&self, slot: Option<Slot>, why: Option<u16>) -> usize {
        const ROW: usize = size_of::<User>();
        let Some(slot) = slot.filter(|_| self.has_begun.load(Relaxed) != 0) else {
            return 0;
        };
        let Some(why) = why else {
            // The vCPU has been in user space before, for that reason or another one.
            let row = read_owned(&self.user) as usize;
            let tag = read_owned(&self.user_at(row).tag);
            return match tag >> REASON_SHIFT == user_tag(slot.index() as u8, 0) >> REASON_SHIFT {
                true => row,
                false => 0,
            };
        };
        let tag = user_tag(slot.index() as u8, why);
        let mut offset = ROW;
        for _ in 0..USERS {
            let row = self.user_at(offset);
            match read_owned(&row.tag) {
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

    /// Move to a restarted clock, which reads `now`; the old clock read `then`.
    pub(super) fn rebase(&self, then: u64, now: u64) {
        let age = then.wrapping_sub(self.since.load(Relaxed));
        self.since.store(now.wrapping_sub(age), Relaxed);
    }
}
