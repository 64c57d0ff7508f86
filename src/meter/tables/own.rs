// SPDX-License-Identifier: GPL-2.0

//! Reads of tables by the thread that holds the vCPU, between two transitions: row by row, without
//! copying all.

use crate::meter::{
    atomic::{AtomicU64, Ordering::Relaxed},
    detail,
    ledger::Ledger,
    phase::Phase,
    reasons::Slot,
    snapshot::{TABLE_CODE, TABLE_DETAILS},
};

use super::{CodeCopy, DetailCopy, Others, Tables, UserCopy, USERS};

/// Return the marked places, from `from` on.
fn marked_from(bits: &[AtomicU64], from: usize) -> impl Iterator<Item = usize> + '_ {
    let mut at = from;
    core::iter::from_fn(move || loop {
        let word = bits.get(at / 64)?.load(Relaxed) >> (at % 64);
        if word != 0 {
            let found = at.wrapping_add(word.trailing_zeros() as usize);
            at = found.wrapping_add(1);
            return Some(found);
        }
        at = (at | 63).wrapping_add(1);
    })
}

/// Sum the exits, kernel ticks and user ticks of rows.
fn sum(rows: impl Iterator<Item = [u64; 3]>) -> [u64; 3] {
    rows.fold([0; 3], |[a, b, c], [exits, kernel, user]| {
        [
            a.wrapping_add(exits),
            b.wrapping_add(kernel),
            c.wrapping_add(user),
        ]
    })
}

impl Tables {
    /// Return true if the tables have begun.
    pub fn has_begun(&self) -> bool {
        self.has_begun.load(Relaxed) != 0
    }

    /// Return the TSC when the tables began.
    pub fn since(&self) -> u64 {
        self.since.load(Relaxed)
    }

    /// Return true if the guest's RIP cannot be read.
    pub fn lacks_rip(&self) -> bool {
        self.lacks_rip.load(Relaxed) != 0
    }

    /// Return the places of rows in use, from `from` on, in the table with a number of the snapshot
    /// format.
    pub fn in_use_from(&self, table: u32, from: usize) -> impl Iterator<Item = usize> + '_ {
        let bits: &[AtomicU64] = match table {
            TABLE_DETAILS => &self.details_in_use,
            TABLE_CODE => &self.codes_in_use,
            _ => &[],
        };
        // The third kind has no bitmap: its rows are in use from the first one on.
        let rest = match table {
            TABLE_DETAILS | TABLE_CODE => 0..0,
            _ => from..USERS,
        };
        marked_from(bits, from).chain(rest)
    }

    /// Return a row of details in use, by its place.
    pub fn detail(&self, index: usize) -> Option<DetailCopy> {
        // The first row is a dummy.
        let row = self.details.get(index.wrapping_add(1))?.copied();
        (row.key != 0).then_some(row)
    }

    /// Return a row of code in use, by its place.
    pub fn code(&self, index: usize) -> Option<CodeCopy> {
        let row = self.codes.get(index.wrapping_add(1))?.copied();
        (row.exits != 0).then_some(row)
    }

    /// Return a row of exits to user space in use, by its place.
    pub fn user(&self, index: usize) -> Option<UserCopy> {
        let row = self.users.get(index.wrapping_add(1))?.copied();
        (row.tag != 0).then_some(row)
    }

    /// Return the numbers of a reason since the tables began.
    pub fn since_begun(&self, ledger: &Ledger, slot: Slot) -> Others {
        let Some(before) = self.baseline.get(slot.index()) else {
            return Others::default();
        };
        let ticks = |phase| ledger.cycles(phase, slot);
        Others {
            exits: ledger.exits(slot).wrapping_sub(before.exits.load(Relaxed)),
            kernel: ticks(Phase::Kernel).wrapping_sub(before.kernel.load(Relaxed)),
            user: ticks(Phase::User).wrapping_sub(before.user.load(Relaxed)),
        }
    }

    /// Return the others of a reason in a kind of table. A row of details for which `is_shown` returns
    /// false is one of the others.
    ///
    /// Rows are read first: if the vCPU leaves its CPU meanwhile, the total has grown, and the
    /// difference is not negative.
    pub fn others(
        &self,
        ledger: &Ledger,
        table: u32,
        slot: Slot,
        is_shown: impl Fn(u64) -> bool,
    ) -> Others {
        let [exits, kernel, user] = match table {
            TABLE_DETAILS => {
                let rows = self.details.iter().skip(1).filter(|row| {
                    let key = row.key.load(Relaxed);
                    detail::slot_of(key) == Some(slot) && is_shown(detail::detail_of(key))
                });
                sum(rows.map(|row| {
                    let row = row.copied();
                    [row.exits, row.kernel, row.user]
                }))
            }
            TABLE_CODE => {
                let rows = self.codes.iter().skip(1).map(|row| row.copied());
                // A free row is all zero.
                let rows = rows.filter(|row| row.slot() == Some(slot));
                sum(rows.map(|row| [row.exits, row.kernel, 0]))
            }
            _ => {
                let rows = self.users.iter().skip(1).map(|row| row.copied());
                let rows = rows.filter(|row| row.slot() == Some(slot));
                sum(rows.map(|row| [0, 0, row.ticks]))
            }
        };
        let all = self.since_begun(ledger, slot);
        match table {
            TABLE_DETAILS => all.less(exits, kernel, user),
            TABLE_CODE => Others { user: 0, ..all }.less(exits, kernel, 0),
            _ => Others {
                exits: self
                    .other_users
                    .get(slot.index())
                    .map_or(0, |cell| cell.load(Relaxed)),
                kernel: 0,
                ..all
            }
            .less(0, 0, user),
        }
    }
}
