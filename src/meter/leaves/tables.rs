// SPDX-License-Identifier: GPL-2.0

//! CPUID leaf by which a guest reads the details of the asking vCPU's exits, entry by entry.
//!
//! An answer has 128 bits, so an entry takes several queries: each reads one of its words. Between
//! two queries the vCPU exits, because every query is an exit. A number only grows, so words of
//! different moments still fit together, unless another entry has replaced this one. A reader that
//! reads the first word again, and the word with the bound, sees whether that happened.
//!
//! All answers come from the tables of the asking vCPU, in its own thread, between two of its
//! transitions. So nothing changes meanwhile, except that the vCPU may leave its CPU and come back.

use super::{high, low, Registers};
use crate::meter::{
    clamp::clamp,
    detail::{self, Kind},
    ledger::Ledger,
    phase::Phase,
    reasons::{self, Isa, Slot, SLOTS},
    slow::{self, SlowExit},
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_RING, TABLE_SLOWEST, TABLE_USER},
    tables::{Tables, CODES, DETAILS, USERS},
};

/// The table that describes the others.
pub const DESCRIPTION: u32 = 0;

/// Words of an entry. Each is a pair of numbers, except the first one.
pub mod word {
    /// The entry's [`Head`](super::Head).
    pub const HEAD: u32 = 0;
    /// Exits, and kernel ticks.
    pub const COUNTS: u32 = 1;
    /// User ticks, and the bound for exits.
    pub const USER: u32 = 2;
    /// The bounds for kernel and user ticks.
    pub const MISSED: u32 = 3;

    /// For a slow exit: its number on this vCPU, and the ticks since then.
    pub const WHEN: u32 = 1;
    /// For a slow exit: kernel and user ticks.
    pub const SPENT: u32 = 2;
    /// For a slow exit: halted and waiting ticks.
    pub const SLEPT: u32 = 3;
    /// For a slow exit: preempted ticks; the number of times it was scheduled out, with KVM_EXIT_*
    /// from bit 32 on, where all ones mean none.
    pub const LOST: u32 = 4;
    /// For a slow exit: the RIP. Only at CPL 0.
    pub const RIP: u32 = 5;
}

/// Target of a query, from ecx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Kind of table, as in a snapshot, or [`DESCRIPTION`]. 8 bits.
    pub table: u32,
    /// One of [`word`]. 8 bits.
    pub word: u32,
    /// The entry. In a query for a head, the first entry from there on. 16 bits.
    pub index: u32,
}

impl Place {
    /// Decode ecx.
    pub const fn from_subleaf(subleaf: u32) -> Self {
        Self {
            table: subleaf >> 24,
            word: subleaf >> 16 & 0xff,
            index: subleaf & 0xffff,
        }
    }

    /// Encode as ecx.
    pub const fn subleaf(self) -> u32 {
        self.table << 24 | (self.word & 0xff) << 16 | self.index & 0xffff
    }
}

/// Description of the tables of the asking vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Set if the host keeps details.
    pub is_on: bool,
    /// Set if this vCPU has tables.
    pub has_tables: bool,
    /// Set if its RIP cannot be read.
    pub lacks_rip: bool,
    /// Set if code is answered, because the guest's kernel asks.
    pub tells_code: bool,
    /// Set if vectors of the host are answered.
    pub tells_host: bool,
    /// Set if the ring is frozen.
    pub is_frozen: bool,
    /// Times that the host has turned details on or off. A reader that finds another number reads
    /// other tables.
    pub switches: u32,
    /// Ticks since the tables began.
    pub age: u64,
}

impl Description {
    /// Encode as an answer.
    pub const fn to_registers(self) -> Registers {
        let bits = [
            self.is_on,
            self.has_tables,
            self.lacks_rip,
            self.tells_code,
            self.tells_host,
            self.is_frozen,
        ];
        let [a, b, c, d, e, f] = bits;
        let eax = a as u32
            | (b as u32) << 1
            | (c as u32) << 2
            | (d as u32) << 3
            | (e as u32) << 4
            | (f as u32) << 5;
        Registers {
            eax,
            ebx: self.switches,
            ecx: low(self.age),
            edx: high(self.age),
        }
    }

    /// Decode an answer.
    pub const fn from_registers(answer: Registers) -> Self {
        let Registers { eax, ebx, .. } = answer;
        Self {
            is_on: eax & 1 != 0,
            has_tables: eax & 2 != 0,
            lacks_rip: eax & 4 != 0,
            tells_code: eax & 8 != 0,
            tells_host: eax & 16 != 0,
            is_frozen: eax & 32 != 0,
            switches: ebx,
            age: pair(answer).1,
        }
    }
}

/// First word of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Place of the entry.
    pub index: u32,
    /// Exit reason.
    pub reason: Reason,
    /// For details and slow exits: a number of [`Kind`].
    pub detail_kind: u8,
    /// Set if the exits come from a nested guest, an L2.
    pub nested: bool,
    /// Set if this is the entry of the reason's others.
    pub others: bool,
    /// Set if the entry lacks nothing.
    pub exact: bool,
    /// For a slow exit: its RIP is unknown, or not disclosed.
    pub no_rip: bool,
    /// Set if the ring froze for this exit.
    pub culprit: bool,
    /// For the slowest exits: set if it belongs to the window before the current one.
    pub previous: bool,
    /// The detail, the RIP, or KVM_EXIT_* of kvm_run; 0 for others.
    pub key: u64,
}

/// Shifts and flags in ebx.
const KIND: u32 = 16;
const KIND_BITS: u32 = 0x1f;
const REASON: u32 = 21;
const NESTED: u32 = 1 << 24;
const OTHERS: u32 = 1 << 25;
const EXACT: u32 = 1 << 26;
const NO_RIP: u32 = 1 << 27;
const CULPRIT: u32 = 1 << 28;
const PREVIOUS: u32 = 1 << 29;
/// Set in each head, so that none looks like [`Registers::UNDEFINED`].
const IS_HEAD: u32 = 1 << 31;

const fn flag(flag: u32, is_set: bool) -> u32 {
    if is_set {
        flag
    } else {
        0
    }
}

impl Head {
    const fn new(index: usize, reason: Reason) -> Self {
        Self {
            index: index as u32,
            reason,
            detail_kind: Kind::None as u8,
            nested: false,
            others: false,
            exact: true,
            no_rip: false,
            culprit: false,
            previous: false,
            key: 0,
        }
    }

    /// Encode as an answer.
    pub const fn to_registers(self) -> Registers {
        let (kind, code) = match self.reason {
            Reason::Code(code) => (0, code),
            Reason::Start => (1, 0),
            Reason::Other => (2, 0),
        };
        let ebx = self.index & 0xffff
            | (self.detail_kind as u32 & KIND_BITS) << KIND
            | kind << REASON
            | flag(NESTED, self.nested)
            | flag(OTHERS, self.others)
            | flag(EXACT, self.exact)
            | flag(NO_RIP, self.no_rip)
            | flag(CULPRIT, self.culprit)
            | flag(PREVIOUS, self.previous)
            | IS_HEAD;
        Registers {
            eax: code,
            ebx,
            ecx: low(self.key),
            edx: high(self.key),
        }
    }

    /// Decode an answer, or return `None` where there is no entry.
    pub const fn from_registers(answer: Registers) -> Option<Self> {
        let Registers { eax, ebx, .. } = answer;
        if ebx & IS_HEAD == 0 {
            return None;
        }
        Some(Self {
            index: ebx & 0xffff,
            reason: match ebx >> REASON & 3 {
                0 => Reason::Code(eax),
                1 => Reason::Start,
                _ => Reason::Other,
            },
            detail_kind: (ebx >> KIND & KIND_BITS) as u8,
            nested: ebx & NESTED != 0,
            others: ebx & OTHERS != 0,
            exact: ebx & EXACT != 0,
            no_rip: ebx & NO_RIP != 0,
            culprit: ebx & CULPRIT != 0,
            previous: ebx & PREVIOUS != 0,
            key: pair(answer).1,
        })
    }
}

/// Decode an answer as two numbers.
pub const fn pair(answer: Registers) -> (u64, u64) {
    let Registers { eax, ebx, ecx, edx } = answer;
    (
        (ebx as u64) << 32 | eax as u64,
        (edx as u64) << 32 | ecx as u64,
    )
}

/// Encode two numbers as an answer.
pub const fn from_pair(one: u64, other: u64) -> Registers {
    Registers {
        eax: low(one),
        ebx: high(one),
        ecx: low(other),
        edx: high(other),
    }
}

/// The asking vCPU, and its permissions.
#[derive(Clone, Copy, Debug)]
pub struct TableQuery<'a> {
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// Ledger of the vCPU.
    pub ledger: &'a Ledger,
    /// Tables of the vCPU, if it has some.
    pub tables: Option<&'a Tables>,
    /// See [`Description::switches`].
    pub switches: u32,
    /// Current time, in ticks of the clock.
    pub now: u64,
    /// Set if the guest's kernel asks: it may read RIPs.
    pub at_cpl_0: bool,
    /// Set if guests read the sums of the whole host: they may read the host's vectors.
    pub host_scope: bool,
}

/// A row, as the words of an entry.
struct EntryWords {
    head: Head,
    counts: (u64, u64),
    user: (u64, u64),
    missed: (u64, u64),
}

/// Return true if a detail is about the host: the vector of an interrupt, an NMI or a machine
/// check, which belongs to the host when it makes a guest exit.
fn is_of_host(kind: Kind, key: u64) -> bool {
    /// Types of the interruption information (SDM, "Information for VM Exits Due to Vectored
    /// Events"), and the vector of a machine check.
    const INTERRUPT: u64 = 0;
    const NMI: u64 = 2;
    const MACHINE_CHECK: u64 = 18;
    let class = key >> 8 & 7;
    kind == Kind::Vector && (class == INTERRUPT || class == NMI || key & 0xff == MACHINE_CHECK)
}

impl<'a> TableQuery<'a> {
    /// Answer a query.
    pub fn answer(&self, place: Place) -> Registers {
        if place.table == DESCRIPTION {
            return self.describe().to_registers();
        }
        let tables = self.tables.filter(|tables| tables.has_begun());
        let answer = tables.and_then(|tables| match place.table {
            TABLE_DETAILS | TABLE_CODE | TABLE_USER => self.row(tables, place),
            TABLE_SLOWEST | TABLE_RING => self.slow(tables, place),
            _ => None,
        });
        answer.unwrap_or(Registers::UNDEFINED)
    }

    fn describe(&self) -> Description {
        let tables = self.tables.filter(|tables| tables.has_begun());
        Description {
            // An odd number of switches leaves details on.
            is_on: self.switches & 1 != 0,
            has_tables: tables.is_some(),
            lacks_rip: tables.is_some_and(Tables::lacks_rip),
            tells_code: self.at_cpl_0,
            tells_host: self.host_scope,
            is_frozen: tables.is_some_and(|tables| tables.slow().is_frozen()),
            switches: self.switches,
            age: tables.map_or(0, |tables| self.now.wrapping_sub(tables.since())),
        }
    }

    /// Return the maximum number of rows in a table. The others follow, by the slots of their reasons.
    const fn rows(table: u32) -> usize {
        match table {
            TABLE_DETAILS => DETAILS,
            TABLE_CODE => CODES,
            _ => USERS,
        }
    }

    /// Answer from a row, or from the others of a reason.
    fn row(&self, tables: &Tables, place: Place) -> Option<Registers> {
        if place.table == TABLE_CODE && !self.at_cpl_0 {
            return None;
        }
        let rows = Self::rows(place.table);
        let index = place.index as usize;
        let end = rows.wrapping_add(SLOTS);
        if index >= end {
            return None;
        }
        let index = clamp(index, end);
        let row = if place.word == word::HEAD {
            let row = tables
                .in_use_from(place.table, index)
                .find_map(|index| self.row_at(tables, place.table, index));
            match row {
                Some(row) => row,
                None => self.others_from(tables, place.table, index.saturating_sub(rows))?,
            }
        } else if index < rows {
            self.row_at(tables, place.table, clamp(index, rows))?
        } else {
            let slot = Slot::from_index(clamp(index.wrapping_sub(rows), SLOTS))?;
            self.others_of(tables, place.table, slot, place.word)?
        };
        Some(match place.word {
            word::HEAD => row.head.to_registers(),
            word::COUNTS => from_pair(row.counts.0, row.counts.1),
            word::USER => from_pair(row.user.0, row.user.1),
            word::MISSED => from_pair(row.missed.0, row.missed.1),
            _ => return None,
        })
    }

    /// Return the kind and key of a detail, as in a snapshot, or `None` if this guest may not read it.
    fn detail(&self, slot: Slot, detail: u64) -> Option<(Kind, u64)> {
        let code = reasons::code(self.isa, slot).unwrap_or(u32::MAX);
        let (kind, key) = detail::to_wire(self.isa, code, detail);
        (self.host_scope || !is_of_host(kind, key)).then_some((kind, key))
    }

    /// Return a row that is in use and that this guest may read.
    fn row_at(&self, tables: &Tables, table: u32, index: usize) -> Option<EntryWords> {
        let head = |slot| Head::new(index, Reason::of(self.isa, slot));
        match table {
            TABLE_DETAILS => {
                let row = tables.detail(index)?;
                let slot = row.slot()?;
                let (kind, key) = self.detail(slot, row.detail())?;
                Some(EntryWords {
                    head: Head {
                        detail_kind: kind as u8,
                        nested: row.is_nested(),
                        exact: row.missed_exits == 0,
                        key,
                        ..head(slot)
                    },
                    counts: (row.exits, row.kernel),
                    user: (row.user, row.missed_exits),
                    missed: (row.missed_kernel, row.missed_user),
                })
            }
            TABLE_CODE => {
                let row = tables.code(index)?;
                Some(EntryWords {
                    head: Head {
                        nested: row.is_nested(),
                        exact: row.missed_exits == 0,
                        key: row.rip,
                        ..head(row.slot()?)
                    },
                    counts: (row.exits, row.kernel),
                    user: (0, row.missed_exits),
                    missed: (row.missed_kernel, 0),
                })
            }
            _ => {
                let row = tables.user(index)?;
                Some(EntryWords {
                    head: Head {
                        key: row.why().into(),
                        ..head(row.slot()?)
                    },
                    counts: (row.exits, 0),
                    user: (row.ticks, 0),
                    missed: (0, 0),
                })
            }
        }
    }

    /// Return the head of the others of the first reason, from slot `from` on, that has had exits or
    /// ticks since the tables began.
    fn others_from(&self, tables: &Tables, table: u32, from: usize) -> Option<EntryWords> {
        let occurred = self.ledger.slots().filter(|slot| {
            slot.index() >= from && !tables.since_begun(self.ledger, *slot).is_empty()
        });
        let slot = occurred.min_by_key(|slot| slot.index())?;
        self.others_of(tables, table, slot, word::HEAD)
    }

    /// Return the others of a reason. For the head alone no other word is computed, because that would
    /// read each row.
    fn others_of(&self, tables: &Tables, table: u32, slot: Slot, word: u32) -> Option<EntryWords> {
        let index = Self::rows(table).wrapping_add(slot.index());
        let head = Head {
            others: true,
            ..Head::new(index, Reason::of(self.isa, slot))
        };
        let mut row = EntryWords {
            head,
            counts: (0, 0),
            user: (0, 0),
            missed: (0, 0),
        };
        if word == word::HEAD {
            return Some(row);
        }
        let others = tables.others(self.ledger, table, slot, |detail| {
            self.detail(slot, detail).is_some()
        });
        row.counts = (others.exits, others.kernel);
        row.user.0 = others.user;
        Some(row)
    }

    /// Answer from a slow exit.
    fn slow(&self, tables: &Tables, place: Place) -> Option<Registers> {
        let of_ring = place.table == TABLE_RING;
        let end = match of_ring {
            true => slow::RING,
            false => slow::KEPT.wrapping_mul(2),
        };
        let index = place.index as usize;
        if index >= end {
            return None;
        }
        let index = clamp(index, end);
        let at = |index| match of_ring {
            true => tables.slow().frozen_exit(index),
            false => tables.slow().kept_exit(index),
        };
        if place.word == word::HEAD {
            let (index, exit) = (index..end).find_map(|index| Some((index, at(index)?)))?;
            return Some(self.slow_head(tables, of_ring, index, &exit).to_registers());
        }
        let exit = at(index)?;
        let ticks = |phase| exit.ticks(phase);
        Some(match place.word {
            word::WHEN => from_pair(exit.sequence, self.now.wrapping_sub(exit.exited)),
            word::SPENT => from_pair(ticks(Phase::Kernel), ticks(Phase::User)),
            word::SLEPT => from_pair(ticks(Phase::Halted), ticks(Phase::Waiting)),
            word::LOST => {
                let why = exit.user_exit().map_or(u32::MAX, u32::from);
                from_pair(
                    ticks(Phase::Preempted),
                    u64::from(why) << 32 | u64::from(exit.outs),
                )
            }
            word::RIP if self.at_cpl_0 && !tables.lacks_rip() => from_pair(exit.rip, 0),
            _ => return None,
        })
    }

    fn slow_head(&self, tables: &Tables, of_ring: bool, index: usize, exit: &SlowExit) -> Head {
        let slot = exit.slot().unwrap_or(Slot::OTHER);
        let detail = exit.detail().and_then(|detail| self.detail(slot, detail));
        let (kind, key) = detail.unwrap_or((Kind::None, 0));
        Head {
            detail_kind: kind as u8,
            nested: exit.is_nested(),
            no_rip: !self.at_cpl_0 || tables.lacks_rip(),
            // The culprit is the last exit of the ring.
            culprit: of_ring && index == slow::RING.wrapping_sub(1),
            previous: !of_ring && index >= slow::KEPT,
            key,
            ..Head::new(index, Reason::of(self.isa, slot))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reason() -> impl Strategy<Value = Reason> {
        prop_oneof![
            any::<u32>().prop_map(Reason::Code),
            Just(Reason::Start),
            Just(Reason::Other),
        ]
    }

    proptest! {
        #[test]
        fn place_round_trips(subleaf: u32) {
            prop_assert_eq!(Place::from_subleaf(subleaf).subleaf(), subleaf);
        }

        #[test]
        fn head_round_trips(
            index in 0_u32..1 << 16,
            reason in reason(),
            detail_kind in 0_u8..32,
            flags: [bool; 6],
            key: u64,
        ) {
            let [nested, others, exact, no_rip, culprit, previous] = flags;
            let head = Head {
                index, reason, detail_kind, nested, others, exact, no_rip, culprit, previous, key,
            };
            let answer = head.to_registers();
            prop_assert_eq!(Head::from_registers(answer), Some(head));
            prop_assert_ne!(answer, Registers::UNDEFINED);
        }

        #[test]
        fn description_round_trips(flags: [bool; 6], switches: u32, age: u64) {
            let [is_on, has_tables, lacks_rip, tells_code, tells_host, is_frozen] = flags;
            let described = Description {
                is_on, has_tables, lacks_rip, tells_code, tells_host, is_frozen, switches, age,
            };
            let answer = described.to_registers();
            prop_assert_eq!(Description::from_registers(answer), described);
        }

        #[test]
        fn pair_round_trips(one: u64, other: u64) {
            prop_assert_eq!(pair(from_pair(one, other)), (one, other));
        }
    }

    /// Checks the bits that docs/interface.md lists.
    #[test]
    fn bits_match_the_documentation() {
        assert_eq!(
            Place {
                table: 1,
                word: 2,
                index: 3
            }
            .subleaf(),
            0x0102_0003
        );
        let head = Head {
            detail_kind: Kind::Msr as u8,
            nested: true,
            key: 1 << 32 | 0x6e0,
            ..Head::new(3, Reason::Code(32))
        };
        let answer = head.to_registers();
        assert_eq!(answer.eax, 32);
        assert_eq!(answer.ebx, 1 << 31 | 1 << 26 | 1 << 24 | 2 << 16 | 3);
        assert_eq!((answer.ecx, answer.edx), (0x6e0, 1));
        assert_eq!(Head::from_registers(Registers::UNDEFINED), None);
    }

    #[test]
    fn recognizes_details_about_the_host() {
        for (kind, key, is) in [
            (Kind::Vector, 0xec, true),
            (Kind::Vector, 2 | 2 << 8, true),
            (Kind::Vector, 18 | 3 << 8, true),
            (Kind::Vector, 14 | 3 << 8, false),
            (Kind::Eoi, 0xec, false),
            (Kind::Msr, 0, false),
        ] {
            assert_eq!(is_of_host(kind, key), is, "{kind:?} {key:#x}");
        }
    }
}
