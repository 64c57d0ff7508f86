// SPDX-License-Identifier: GPL-2.0

//! Copies of a vCPU's tables, and what their rows leave to the others.

use crate::meter::{
    atomic::{AtomicU64, Ordering::Relaxed},
    detail,
    ledger::LedgerCopy,
    phase::Phase,
    reasons::{Slot, SLOTS},
    slow::SlowCopy,
};

use super::{Code, Detail, ReasonBits, Tables, User, CODES, DETAILS, REASON_SHIFT, USERS};

/// Copy of a row of details.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DetailCopy {
    pub(super) key: u64,
    /// Exits since the row began.
    pub exits: u64,
    /// Kernel ticks of these.
    pub kernel: u64,
    /// User ticks of these.
    pub user: u64,
    /// Upper bound for exits of the same detail among the others.
    pub missed_exits: u64,
    /// Upper bound for kernel ticks of these.
    pub missed_kernel: u64,
    /// Upper bound for user ticks of these.
    pub missed_user: u64,
}

impl DetailCopy {
    const EMPTY: Self = Self {
        key: 0,
        exits: 0,
        kernel: 0,
        user: 0,
        missed_exits: 0,
        missed_kernel: 0,
        missed_user: 0,
    };

    /// Return the slot of the reason.
    pub fn slot(&self) -> Option<Slot> {
        detail::slot_of(self.key)
    }

    /// Return true if the exits came from a nested guest.
    pub fn is_nested(&self) -> bool {
        self.key & detail::NESTED != 0
    }

    /// Return the detail of the exits.
    pub fn detail(&self) -> u64 {
        detail::detail_of(self.key)
    }
}

/// Copy of a row of code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeCopy {
    /// Guest RIP.
    pub rip: u64,
    pub(super) which: u32,
    /// Exits since the row began.
    pub exits: u64,
    /// Kernel ticks of these.
    pub kernel: u64,
    /// Upper bound for exits at the same RIP among the others.
    pub missed_exits: u64,
    /// Upper bound for kernel ticks of these.
    pub missed_kernel: u64,
}

impl CodeCopy {
    const EMPTY: Self = Self {
        rip: 0,
        which: 0,
        exits: 0,
        kernel: 0,
        missed_exits: 0,
        missed_kernel: 0,
    };

    /// Return the slot of the reason.
    pub fn slot(&self) -> Option<Slot> {
        Some(ReasonBits(self.which).slot())
    }

    /// Return true if the exits came from a nested guest.
    pub fn is_nested(&self) -> bool {
        ReasonBits(self.which).is_nested()
    }
}

/// Copy of a row of exits to user space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserCopy {
    pub(super) tag: u64,
    /// Exits to user space.
    pub exits: u64,
    /// User ticks after these.
    pub ticks: u64,
}

impl UserCopy {
    const EMPTY: Self = Self {
        tag: 0,
        exits: 0,
        ticks: 0,
    };

    /// Return the slot of the reason.
    pub fn slot(&self) -> Option<Slot> {
        Slot::from_index(((self.tag >> REASON_SHIFT) as usize).wrapping_sub(1))
    }

    /// Return KVM_EXIT_*, as KVM reported it to user space.
    pub fn why(&self) -> u16 {
        self.tag as u16
    }
}

/// Others of a reason: its exits and ticks since the tables began that no row holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Exits.
    pub exits: u64,
    /// Kernel ticks.
    pub kernel: u64,
    /// User ticks.
    pub user: u64,
}

impl Others {
    /// Return true if nothing is left.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(super) const fn less(self, exits: u64, kernel: u64, user: u64) -> Self {
        Self {
            exits: self.exits.wrapping_sub(exits),
            kernel: self.kernel.wrapping_sub(kernel),
            user: self.user.wrapping_sub(user),
        }
    }
}

/// Copy of a vCPU's tables, taken at the same moment as the copy of its ledger. All-zero bytes are
/// a copy of tables that have not begun.
#[derive(Clone, Debug)]
pub struct TablesCopy {
    has_begun: u32,
    /// Nonzero if an exit came without RIP.
    pub(super) lacks_rip: u32,
    /// TSC when the tables began.
    pub since: u64,
    detail_count: usize,
    code_count: usize,
    user_count: usize,
    details: [DetailCopy; DETAILS],
    codes: [CodeCopy; CODES],
    users: [UserCopy; USERS],
    baseline: [Others; SLOTS],
    other_users: [u64; SLOTS],
    slow: SlowCopy,
}

impl TablesCopy {
    /// Create a copy of tables that have not begun.
    pub const fn new() -> Self {
        Self {
            has_begun: 0,
            lacks_rip: 0,
            since: 0,
            detail_count: 0,
            code_count: 0,
            user_count: 0,
            details: [DetailCopy::EMPTY; DETAILS],
            codes: [CodeCopy::EMPTY; CODES],
            users: [UserCopy::EMPTY; USERS],
            baseline: [Others {
                exits: 0,
                kernel: 0,
                user: 0,
            }; SLOTS],
            other_users: [0; SLOTS],
            slow: SlowCopy::new(),
        }
    }

    /// Return the copy of the recorder of slow exits.
    pub fn slow(&self) -> &SlowCopy {
        &self.slow
    }

    /// Make this a copy of tables that have not begun.
    pub fn clear(&mut self) {
        self.has_begun = 0;
    }

    /// Return true if the tables have begun.
    pub fn has_begun(&self) -> bool {
        self.has_begun != 0
    }

    /// Return true if the guest's RIP cannot be read.
    pub fn lacks_rip(&self) -> bool {
        self.lacks_rip != 0
    }

    /// Return the rows of details.
    pub fn details(&self) -> &[DetailCopy] {
        self.details.get(..self.detail_count).unwrap_or_default()
    }

    /// Return the rows of code.
    pub fn codes(&self) -> &[CodeCopy] {
        self.codes.get(..self.code_count).unwrap_or_default()
    }

    /// Return the rows of exits to user space.
    pub fn users(&self) -> &[UserCopy] {
        self.users.get(..self.user_count).unwrap_or_default()
    }

    /// Return the numbers of a reason since the tables began, by the ledger copied at the same
    /// moment.
    fn since_begun(&self, ledger: &LedgerCopy, slot: Slot) -> Others {
        let row = ledger.row(slot);
        let before = self.baseline.get(slot.index()).copied().unwrap_or_default();
        Others {
            exits: row.exits,
            kernel: row.cycles(Phase::Kernel),
            user: row.cycles(Phase::User),
        }
        .less(before.exits, before.kernel, before.user)
    }

    /// Return the others of a reason in the table of details.
    pub fn other_details(&self, ledger: &LedgerCopy, slot: Slot) -> Others {
        let rows = self.details().iter().filter(|row| row.slot() == Some(slot));
        rows.fold(self.since_begun(ledger, slot), |others, row| {
            others.less(row.exits, row.kernel, row.user)
        })
    }

    /// Return the others of a reason in the table of code, which has no user ticks.
    pub fn other_codes(&self, ledger: &LedgerCopy, slot: Slot) -> Others {
        let all = Others {
            user: 0,
            ..self.since_begun(ledger, slot)
        };
        let rows = self.codes().iter().filter(|row| row.slot() == Some(slot));
        rows.fold(all, |others, row| others.less(row.exits, row.kernel, 0))
    }

    /// Return the others of a reason in the table of exits to user space. Its exits are those to
    /// user space, and it has no kernel ticks.
    pub fn other_users(&self, ledger: &LedgerCopy, slot: Slot) -> Others {
        let all = Others {
            exits: self.other_users.get(slot.index()).copied().unwrap_or(0),
            kernel: 0,
            user: self.since_begun(ledger, slot).user,
        };
        let rows = self.users().iter().filter(|row| row.slot() == Some(slot));
        rows.fold(all, |others, row| others.less(0, 0, row.ticks))
    }
}

impl Default for TablesCopy {
    fn default() -> Self {
        Self::new()
    }
}

impl Detail {
    /// Return a copy of the row.
    #[inline]
    pub(super) fn copied(&self) -> DetailCopy {
        DetailCopy {
            key: self.key.load(Relaxed),
            exits: self.exits.load(Relaxed),
            kernel: self.kernel.load(Relaxed),
            user: self.user.load(Relaxed),
            missed_exits: self.missed_exits.load(Relaxed),
            missed_kernel: self.missed_kernel.load(Relaxed),
            missed_user: self.missed_user.load(Relaxed),
        }
    }
}

impl Code {
    /// Return a copy of the row.
    #[inline]
    pub(super) fn copied(&self) -> CodeCopy {
        CodeCopy {
            rip: self.rip.load(Relaxed),
            which: self.which.load(Relaxed),
            exits: self.exits.load(Relaxed),
            kernel: self.kernel.load(Relaxed),
            missed_exits: self.missed_exits.load(Relaxed),
            missed_kernel: self.missed_kernel.load(Relaxed),
        }
    }
}

impl User {
    /// Return a copy of the row.
    #[inline]
    pub(super) fn copied(&self) -> UserCopy {
        UserCopy {
            tag: self.tag.load(Relaxed),
            exits: self.exits.load(Relaxed),
            ticks: self.ticks.load(Relaxed),
        }
    }
}

/// Call `copy` for each row in use, until it returns false. Return the number of rows copied.
fn each_in_use(bits: &[AtomicU64], mut copy: impl FnMut(usize, usize) -> bool) -> usize {
    let mut count = 0_usize;
    for (place, word) in bits.iter().enumerate() {
        let mut word = word.load(Relaxed);
        while word != 0 {
            let row = place
                .wrapping_mul(64)
                .wrapping_add(word.trailing_zeros() as usize);
            word &= word.wrapping_sub(1);
            if !copy(count, row) {
                return count;
            }
            count = count.wrapping_add(1);
        }
    }
    count
}

impl Tables {
    /// Copy the tables, in the same window as the ledger. `undisturbed` returns true while that
    /// window still holds; otherwise the copy ends early.
    pub(in crate::meter) fn copy(&self, out: &mut TablesCopy, undisturbed: impl Fn() -> bool) {
        out.has_begun = self.has_begun.load(Relaxed);
        if out.has_begun == 0 {
            return;
        }
        out.since = self.since.load(Relaxed);
        out.lacks_rip = self.lacks_rip.load(Relaxed);
        out.detail_count = each_in_use(&self.details_in_use, |count, row| {
            // Skip the dummy in the first row.
            let from = self.details.get(row.wrapping_add(1));
            if let (Some(from), Some(to)) = (from, out.details.get_mut(count)) {
                *to = from.copied();
            }
            undisturbed()
        });
        out.code_count = each_in_use(&self.codes_in_use, |count, row| {
            let from = self.codes.get(row.wrapping_add(1));
            if let (Some(from), Some(to)) = (from, out.codes.get_mut(count)) {
                *to = from.copied();
            }
            undisturbed()
        });
        out.user_count = 0;
        for (from, to) in self.users.iter().skip(1).zip(&mut out.users) {
            *to = from.copied();
            if to.tag == 0 {
                break;
            }
            out.user_count = out.user_count.wrapping_add(1);
        }
        for (from, to) in self.baseline.iter().zip(&mut out.baseline) {
            *to = Others {
                exits: from.exits.load(Relaxed),
                kernel: from.kernel.load(Relaxed),
                user: from.user.load(Relaxed),
            };
        }
        for (from, to) in self.other_users.iter().zip(&mut out.other_users) {
            *to = from.load(Relaxed);
        }
        self.slow.copy(&mut out.slow, undisturbed);
    }
}
