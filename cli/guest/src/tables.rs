// SPDX-License-Identifier: GPL-2.0

//! Reader of the details of one vCPU's exits: those of the vCPU that it runs on.

use exitmeter_meter::{
    detail::Kind,
    leaves::{
        tables::{pair, word, Description, Head, Place, DESCRIPTION},
        Registers,
    },
    phase::Phase,
    reader::{Missed, TableRow},
    reasons::Isa,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_USER},
};

use crate::{cpuid_reason, is_meter, Cpuid, IDENTIFY, INTERFACE, TABLES};

/// Number of queries by leaf, from 0x4FFFFFF0 on.
pub type Asked = [u64; 6];

/// First version of the leaves that has tables.
const VERSION: u32 = 3;

/// Number of attempts to read an entry that is replaced meanwhile.
const TRIES: usize = 3;

/// A slow exit of this vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowExit {
    /// Reason and detail.
    pub head: Head,
    /// Number of the exit among the vCPU's, since the tables began.
    pub sequence: u64,
    /// Ticks since the exit.
    pub ago: u64,
    /// Ticks by [`Phase`], 0 in the guest phase.
    pub ticks: [u64; Phase::COUNT],
    /// Number of times that the scheduler took the vCPU off its CPU.
    pub scheduled_out: u32,
    /// KVM_EXIT_*, if the exit went to user space.
    pub user_exit: Option<u32>,
    /// RIP of the guest, if known.
    pub rip: Option<u64>,
}

/// Return the index, counted from 0x4FFFFFF0, of the exitmeter leaf that an entry's exits queried.
pub fn leaf_of(isa: Isa, reason: Reason, detail_kind: u8, key: u64) -> Option<usize> {
    if reason != Reason::Code(cpuid_reason(isa)) || detail_kind != Kind::Cpuid as u8 {
        return None;
    }
    let leaf = key.checked_sub(IDENTIFY.into())?;
    (leaf <= u64::from(TABLES - IDENTIFY)).then_some(leaf as usize)
}

/// Reader of the tables of the vCPU that it runs on. The thread must stay on this vCPU: elsewhere,
/// it would read other tables.
///
/// The numbers are those that the vCPU would have without the reader: the queries so far are
/// subtracted from the rows that count them.
#[derive(Debug)]
pub struct TableReader<C> {
    cpuid: C,
    isa: Isa,
    asked: Asked,
}

impl<C: Cpuid> TableReader<C> {
    /// Create a reader. `isa` is the vendor whose exit reasons the codes are.
    pub fn new(cpuid: C, isa: Isa) -> Self {
        Self {
            cpuid,
            isa,
            asked: Asked::default(),
        }
    }

    /// Return the number of queries made, by leaf.
    pub fn asked(&self) -> Asked {
        self.asked
    }

    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        let place = leaf.wrapping_sub(IDENTIFY) as usize;
        if let Some(asked) = self.asked.get_mut(place) {
            *asked = asked.wrapping_add(1);
        }
        self.cpuid.ask(leaf, subleaf)
    }

    /// Query the description of the tables. Return `None` if the vCPU is not metered, or the meter
    /// has no tables.
    pub fn describe(&mut self) -> Option<Description> {
        if !is_meter(self.ask(IDENTIFY, 0)) || self.ask(INTERFACE, 0).eax < VERSION {
            return None;
        }
        let answer = self.word(DESCRIPTION, 0, 0);
        Some(Description::from_registers(answer))
    }

    fn word(&mut self, table: u32, word: u32, index: u32) -> Registers {
        let place = Place { table, word, index };
        self.ask(TABLES, place.subleaf())
    }

    fn pair(&mut self, table: u32, word: u32, index: u32) -> (u64, u64) {
        pair(self.word(table, word, index))
    }

    /// Read a table of details, of code, or of exits to user space, with the others of each reason
    /// last. The table of code is empty unless the guest's kernel asks.
    ///
    /// If a row is replaced meanwhile, its exits may count twice: in the row and among the others.
    pub fn read(&mut self, table: u32, mut each: impl FnMut(TableRow)) {
        let mut index = 0;
        while let Some((next, entry)) = self.entry(table, index) {
            index = next;
            if entry.exits != 0 || entry.user.unwrap_or(0) != 0 || entry.kernel.unwrap_or(0) != 0 {
                each(entry);
            }
        }
    }

    /// Read the first entry from an index on, and return the next index as well.
    fn entry(&mut self, table: u32, index: u32) -> Option<(u32, TableRow)> {
        let mut read = None;
        for _ in 0..TRIES {
            let answer = self.word(table, word::HEAD, index);
            // The index of an entry is never below the one asked for.
            let head = Head::from_registers(answer).filter(|head| head.index >= index)?;
            let at = head.index;
            let bound = match head.exact {
                true => 0,
                false => self.pair(table, word::USER, at).1,
            };
            let (exits, kernel) = self.pair(table, word::COUNTS, at);
            let (exits, kernel) = self.subtract_queries(&head, table, exits, kernel);
            let mut missed = Missed {
                exits: bound,
                kernel: 0,
                user: 0,
            };
            if !head.exact {
                (missed.kernel, missed.user) = self.pair(table, word::MISSED, at);
            }
            let (user, bound_then) = match table == TABLE_CODE && head.exact {
                true => (0, 0),
                false => self.pair(table, word::USER, at),
            };
            read = Some((
                at.wrapping_add(1),
                TableRow {
                    table,
                    reason: head.reason,
                    detail_kind: head.detail_kind,
                    nested: head.nested,
                    others: head.others,
                    key: head.key,
                    exits,
                    kernel: (table != TABLE_USER).then_some(kernel),
                    user: (table != TABLE_CODE).then_some(user),
                    missed,
                },
            ));
            // A row that was replaced and came back has a greater bound.
            let stayed = head.exact || bound == bound_then;
            if head.others || stayed && self.word(table, word::HEAD, at) == answer {
                break;
            }
        }
        read
    }

    /// Subtract the queries so far from a row that counts them.
    fn subtract_queries(&self, head: &Head, table: u32, exits: u64, kernel: u64) -> (u64, u64) {
        let leaf = match table == TABLE_DETAILS && !head.others {
            true => leaf_of(self.isa, head.reason, head.detail_kind, head.key),
            false => None,
        };
        let own = leaf.and_then(|leaf| self.asked.get(leaf)).copied();
        subtract_own(exits, kernel, own.unwrap_or(0))
    }

    /// Read the slowest exits, or the ring of the last exits if it is frozen, by the table's kind.
    pub fn read_slow(&mut self, table: u32, mut each: impl FnMut(SlowExit)) {
        let mut index = 0;
        while let Some(exit) = self.slow(table, index) {
            index = exit.head.index.wrapping_add(1);
            each(exit);
        }
    }

    fn slow(&mut self, table: u32, index: u32) -> Option<SlowExit> {
        let mut read = None;
        for _ in 0..TRIES {
            let answer = self.word(table, word::HEAD, index);
            let head = Head::from_registers(answer).filter(|head| head.index >= index)?;
            let at = head.index;
            let (sequence, ago) = self.pair(table, word::WHEN, at);
            let (kernel, user) = self.pair(table, word::SPENT, at);
            let (halted, waiting) = self.pair(table, word::SLEPT, at);
            let (preempted, lost) = self.pair(table, word::LOST, at);
            let rip = match head.no_rip {
                true => None,
                false => Some(self.pair(table, word::RIP, at).0),
            };
            let mut ticks = [0; Phase::COUNT];
            for (phase, spent) in [
                (Phase::Kernel, kernel),
                (Phase::User, user),
                (Phase::Halted, halted),
                (Phase::Waiting, waiting),
                (Phase::Preempted, preempted),
            ] {
                if let Some(cell) = ticks.get_mut(phase as usize) {
                    *cell = spent;
                }
            }
            let why = (lost >> 32) as u32;
            read = Some(SlowExit {
                head,
                sequence,
                ago,
                ticks,
                scheduled_out: lost as u32,
                user_exit: (why != u32::MAX).then_some(why),
                rip,
            });
            // Another exit may have taken its place.
            if self.pair(table, word::WHEN, at).0 == sequence {
                break;
            }
        }
        read
    }
}

/// Subtract exits, and the same fraction of the kernel ticks.
fn subtract_own(exits: u64, kernel: u64, own: u64) -> (u64, u64) {
    let left = exits.saturating_sub(own);
    if own == 0 {
        return (exits, kernel);
    }
    let part = u128::from(kernel)
        .wrapping_mul(left.into())
        .checked_div(exits.into())
        .unwrap_or(0);
    (left, part as u64)
}
