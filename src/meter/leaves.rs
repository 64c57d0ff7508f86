// SPDX-License-Identifier: GPL-2.0

//! CPUID leaves by which a guest reads its own exits.
//!
//! The four upper leaves, 0x4FFFFFFC to 0x4FFFFFFF, are those of the course CMPE 283, in one of the
//! two orders that it used. With 0x4FFFFFF0 to 0x4FFFFFF5, a guest's tool reads everything without
//! guessing.

use core::fmt;

use super::{
    clamp::clamp,
    phase::Phase,
    reasons::{self, Isa, Slot},
};

pub mod tables;
use tables::{Description, Place, DESCRIPTION};

/// Version of the answers, as the leaves report it.
pub const INTERFACE_VERSION: u32 = 3;

/// Bit in ecx of leaf 0x4FFFFFF3: count only exits from a nested guest.
pub const NESTED: u32 = 1 << 16;

/// Split ecx of leaf 0x4FFFFFF3 into the reason and the flag for exits from a nested guest. SVM's
/// negative codes have that bit set themselves.
const fn split_nested(subleaf: u32) -> (u32, bool) {
    match subleaf & 0xffff_0000 {
        NESTED => (subleaf & 0xffff, true),
        _ => (subleaf, false),
    }
}

/// Number of phases that leaf 0x4FFFFFF2 knows.
const PHASES_OF_QUERIES: usize = 7;

/// Return the name of a phase of leaf 0x4FFFFFF2, and the phases that it sums. The first five are
/// those of version 1, in which the two kinds of sleep were one phase.
pub const fn phases_of_query(number: u32) -> Option<(&'static str, &'static [Phase])> {
    Some(match number {
        0 => (Phase::Guest.name(), &[Phase::Guest]),
        1 => (Phase::Kernel.name(), &[Phase::Kernel]),
        2 => (Phase::User.name(), &[Phase::User]),
        3 => ("blocked", &[Phase::Halted, Phase::Waiting]),
        4 => (Phase::Preempted.name(), &[Phase::Preempted]),
        5 => (Phase::Halted.name(), &[Phase::Halted]),
        6 => (Phase::Waiting.name(), &[Phase::Waiting]),
        _ => return None,
    })
}

/// Order of the four upper leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafMap {
    /// No leaf is answered.
    Off = 0,
    /// The order of the course in 2021, in spring 2022 and mostly in 2023.
    Map2021 = 2021,
    /// The order of the course in fall 2022.
    Map2022 = 2022,
}

impl LeafMap {
    /// Return the map with a number: 0, 2021 or 2022.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(LeafMap::Off),
            2021 => Some(LeafMap::Map2021),
            2022 => Some(LeafMap::Map2022),
            _ => None,
        }
    }
}

/// Query of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// eax = highest leaf, ebx:ecx:edx = "ExitMeter".
    Identify,
    /// eax = version, ebx = 1 VMX or 2 SVM, ecx = number of reasons, edx = leaf map.
    Interface,
    /// ecx = reason | phase << 16: edx:eax = cycles.
    PhaseCycles,
    /// ecx = reason: edx:eax = exits; with bit 16 of ecx set, only those from a nested guest.
    Exits64,
    /// edx:eax = number of the meter's life.
    Life,
    /// ecx = table << 24 | word << 16 | entry: see [`tables`].
    Tables,
    /// eax = total exits, low half; ebx = high half.
    TotalExits,
    /// ebx = high, ecx = low half of the cycles spent processing all exits.
    TotalCycles,
    /// ecx = reason: eax = number of such exits, low half; ebx = high half.
    ReasonExits,
    /// ecx = reason: ebx = high, ecx = low half of the cycles spent processing them.
    ReasonCycles,
}

impl Query {
    /// Return true if the kernel log gets a line for the query. For tables, only the query for the
    /// description does, once per reading: the entries take hundreds more.
    pub const fn is_logged(self, subleaf: u32) -> bool {
        match self {
            Query::Tables => Place::from_subleaf(subleaf).table == DESCRIPTION,
            _ => true,
        }
    }
}

/// The four registers that CPUID writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl Registers {
    /// Answer for a reason that is not defined.
    pub const UNDEFINED: Registers = Registers {
        eax: 0,
        ebx: 0,
        ecx: 0,
        edx: u32::MAX,
    };
}

/// Numbers that a guest may read.
pub trait Numbers {
    /// VM exits of a slot.
    fn exits(&self, slot: Slot) -> u64;
    /// TSC ticks of a slot in a phase.
    fn cycles(&self, phase: Phase, slot: Slot) -> u64;

    /// VM exits of a slot from a nested guest, an L2.
    fn nested_exits(&self, slot: Slot) -> u64;

    /// VM exits of all slots.
    fn total_exits(&self) -> u64 {
        Slot::all().fold(0, |sum, slot| sum.saturating_add(self.exits(slot)))
    }

    /// TSC ticks of all slots in a phase.
    fn total_cycles(&self, phase: Phase) -> u64 {
        Slot::all().fold(0, |sum, slot| sum.saturating_add(self.cycles(phase, slot)))
    }
}

/// Settings of the leaves.
#[derive(Clone, Copy, Debug)]
pub struct Leaves {
    /// Order of the four upper leaves.
    pub map: LeafMap,
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// Number of the meter's life: never 0, and a new one when the numbers start over.
    pub life: u64,
}

const fn low(number: u64) -> u32 {
    number as u32
}

const fn high(number: u64) -> u32 {
    (number >> 32) as u32
}

impl Leaves {
    /// Return true for the 16 leaves that include all answered leaves. Any other CPUID costs no
    /// more than this test.
    #[inline(always)]
    pub const fn may_answer(leaf: u32) -> bool {
        leaf & !0xf == 0x4fff_fff0
    }

    /// Return the query of a leaf, or `None` for a leaf that is not answered.
    pub fn classify(&self, leaf: u32) -> Option<Query> {
        let swapped = match self.map {
            LeafMap::Off => return None,
            LeafMap::Map2021 => false,
            LeafMap::Map2022 => true,
        };
        Some(match (leaf, swapped) {
            (0x4fff_fff0, _) => Query::Identify,
            (0x4fff_fff1, _) => Query::Interface,
            (0x4fff_fff2, _) => Query::PhaseCycles,
            (0x4fff_fff3, _) => Query::Exits64,
            (0x4fff_fff4, _) => Query::Life,
            (0x4fff_fff5, _) => Query::Tables,
            (0x4fff_ffff, false) | (0x4fff_fffc, true) => Query::TotalExits,
            (0x4fff_fffe, false) | (0x4fff_fffd, true) => Query::TotalCycles,
            (0x4fff_fffd, false) | (0x4fff_fffe, true) => Query::ReasonExits,
            (0x4fff_fffc, false) | (0x4fff_ffff, true) => Query::ReasonCycles,
            _ => return None,
        })
    }

    /// Return the slot of a reason that a guest named, if it is defined.
    fn slot(&self, reason: u32) -> Option<Slot> {
        if !reasons::is_defined(self.isa, reason) {
            return None;
        }
        Slot::from_index(clamp(
            reasons::slot(self.isa, reason).index(),
            reasons::SLOTS,
        ))
    }

    /// Answer a query; `subleaf` comes from ecx. [`Query::Tables`] needs more than numbers: see
    /// [`tables::TableQuery`].
    pub fn answer(&self, query: Query, subleaf: u32, numbers: &impl Numbers) -> Registers {
        let none = Registers::default();
        match query {
            Query::Identify => Registers {
                eax: 0x4fff_ffff,
                ebx: u32::from_le_bytes(*b"Exit"),
                ecx: u32::from_le_bytes(*b"Mete"),
                edx: u32::from_le_bytes(*b"r\0\0\0"),
            },
            Query::Interface => Registers {
                eax: INTERFACE_VERSION,
                ebx: self.isa as u32,
                ecx: reasons::defined_count(self.isa),
                edx: self.map as u32,
            },
            Query::TotalExits => {
                let exits = numbers.total_exits();
                Registers {
                    eax: low(exits),
                    ebx: high(exits),
                    ..none
                }
            }
            Query::TotalCycles => {
                let cycles = numbers.total_cycles(Phase::Kernel);
                Registers {
                    ebx: high(cycles),
                    ecx: low(cycles),
                    ..none
                }
            }
            Query::ReasonExits => match self.slot(subleaf) {
                None => Registers::UNDEFINED,
                Some(slot) => {
                    let exits = numbers.exits(slot);
                    Registers {
                        eax: low(exits),
                        ebx: high(exits),
                        ..none
                    }
                }
            },
            Query::ReasonCycles => match self.slot(subleaf) {
                None => Registers::UNDEFINED,
                Some(slot) => {
                    let cycles = numbers.cycles(Phase::Kernel, slot);
                    Registers {
                        ebx: high(cycles),
                        ecx: low(cycles),
                        ..none
                    }
                }
            },
            Query::Exits64 => {
                let (reason, nested) = split_nested(subleaf);
                let Some(slot) = self.slot(reason) else {
                    return Registers::UNDEFINED;
                };
                let exits = match nested {
                    false => numbers.exits(slot),
                    true => numbers.nested_exits(slot),
                };
                Registers {
                    eax: low(exits),
                    edx: high(exits),
                    ..none
                }
            }
            Query::Life => Registers {
                eax: low(self.life),
                edx: high(self.life),
                ..none
            },
            Query::Tables => Registers::UNDEFINED,
            Query::PhaseCycles => {
                let number = (subleaf >> 16) as usize;
                let phases = phases_of_query(clamp(number, PHASES_OF_QUERIES) as u32);
                let phases = phases.filter(|_| number < PHASES_OF_QUERIES);
                match (self.slot(subleaf & 0xffff), phases) {
                    (Some(slot), Some((_, phases))) => {
                        let cycles = phases.iter().map(|phase| numbers.cycles(*phase, slot));
                        let cycles = cycles.fold(0, u64::saturating_add);
                        Registers {
                            eax: low(cycles),
                            edx: high(cycles),
                            ..none
                        }
                    }
                    _ => Registers::UNDEFINED,
                }
            }
        }
    }
}

/// A query and its answer, formatted in the words of the course.
#[derive(Clone, Copy, Debug)]
pub struct LogLine {
    /// The leaf that the guest asked for.
    pub leaf: u32,
    /// The query of that leaf.
    pub query: Query,
    /// The guest's ecx.
    pub subleaf: u32,
    /// The answer that the guest got.
    pub answer: Registers,
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Registers { eax, ebx, ecx, edx } = self.answer;
        let join = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let reason = match self.query {
            Query::PhaseCycles => self.subleaf & 0xffff,
            Query::Exits64 => split_nested(self.subleaf).0,
            _ => self.subleaf,
        };
        write!(f, "CPUID({:#010X})", self.leaf)?;
        if matches!(
            self.query,
            Query::ReasonExits | Query::ReasonCycles | Query::Exits64 | Query::PhaseCycles
        ) {
            write!(f, ", exit number {reason}")?;
            if self.answer == Registers::UNDEFINED {
                return write!(f, " is not defined");
            }
            if let Some(name) = reasons::name(self.isa, reason) {
                write!(f, " ({name})")?;
            }
        }
        match self.query {
            Query::Identify => write!(f, ", identity"),
            Query::Interface => write!(f, ", interface version {eax}"),
            Query::Life => write!(f, ", life {}", join(edx, eax)),
            Query::Tables => {
                let described = Description::from_registers(self.answer);
                write!(
                    f,
                    ", details {}",
                    if described.is_on { "on" } else { "off" }
                )
            }
            Query::TotalExits => write!(f, ", exits={}", join(ebx, eax)),
            Query::TotalCycles => write!(f, ", total time in vmm: {} cycles", join(ebx, ecx)),
            Query::ReasonExits => write!(f, " exits={}", join(ebx, eax)),
            Query::ReasonCycles => write!(f, " time in vmm: {} cycles", join(ebx, ecx)),
            Query::Exits64 if split_nested(self.subleaf).1 => {
                write!(f, " exits from nested guests={}", join(edx, eax))
            }
            Query::Exits64 => write!(f, " exits={}", join(edx, eax)),
            Query::PhaseCycles => {
                let phase = phases_of_query(self.subleaf >> 16).map_or("?", |(name, _)| name);
                write!(f, " phase {phase}: {} cycles", join(edx, eax))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers that identify their cells.
    struct Marked;

    impl Numbers for Marked {
        fn exits(&self, slot: Slot) -> u64 {
            1 << 40 | slot.index() as u64
        }
        fn nested_exits(&self, slot: Slot) -> u64 {
            7 << 40 | slot.index() as u64
        }
        fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
            (phase as u64 + 2) << 36 | slot.index() as u64
        }
    }

    const VMX: Leaves = Leaves {
        map: LeafMap::Map2021,
        isa: Isa::Vmx,
        life: 5 << 32 | 9,
    };

    fn log_line(leaf: u32, subleaf: u32, answer: Registers) -> String {
        let query = VMX.classify(leaf).expect("ours");
        LogLine {
            leaf,
            query,
            subleaf,
            answer,
            isa: Isa::Vmx,
        }
        .to_string()
    }

    #[test]
    fn maps_order_the_leaves_as_the_course_did() {
        let order = |map| {
            [0xf_u32, 0xe, 0xd, 0xc].map(|leaf| Leaves { map, ..VMX }.classify(0x4fff_fff0 | leaf))
        };
        use Query::{ReasonCycles as Rc, ReasonExits as Re, TotalCycles as Tc, TotalExits as Te};
        assert_eq!(order(LeafMap::Map2021), [Te, Tc, Re, Rc].map(Some));
        assert_eq!(order(LeafMap::Map2022), [Rc, Re, Tc, Te].map(Some));
        assert_eq!(order(LeafMap::Off), [None; 4]);
        assert_eq!(LeafMap::from_number(2023), None);
    }

    /// Covers all 2^32 leaves: the 16 values of the low nibble, and two values for all others.
    #[test]
    fn classifies_only_the_defined_leaves() {
        // Miri takes a thousand times as long.
        let step = if cfg!(miri) { 0xf_fffd } else { 1 };
        for map in [LeafMap::Off, LeafMap::Map2021, LeafMap::Map2022] {
            let leaves = Leaves { map, ..VMX };
            let is_ours = |leaf| Leaves::may_answer(leaf) && leaves.classify(leaf).is_some();
            for base in (0..=0x0fff_ffff_u32).step_by(step).map(|base| base << 4) {
                if base != 0x4fff_fff0 {
                    assert!(!is_ours(base) && !is_ours(base | 0xf));
                    assert!(leaves.classify(base).is_none());
                }
            }
            for low in 0..16 {
                let ours = map != LeafMap::Off && (!(6..=11).contains(&low));
                assert_eq!(is_ours(0x4fff_fff0 | low), ours);
            }
        }
    }

    #[test]
    fn answers_queries_and_formats_log_lines() {
        let ask = |leaf, subleaf| VMX.answer(VMX.classify(leaf).expect("ours"), subleaf, &Marked);
        let exits = ask(0x4fff_fffd, 10);
        assert_eq!(
            exits,
            Registers {
                eax: 10,
                ebx: 1 << 8,
                ecx: 0,
                edx: 0
            }
        );
        assert_eq!(
            ask(0x4fff_fffc, 48),
            Registers {
                eax: 0,
                ebx: 3 << 4,
                ecx: 48,
                edx: 0
            }
        );
        assert_eq!(
            ask(0x4fff_fff3, 12),
            Registers {
                eax: 12,
                ebx: 0,
                ecx: 0,
                edx: 1 << 8
            }
        );
        assert_eq!(
            ask(0x4fff_fff3, NESTED | 12),
            Registers {
                eax: 12,
                ebx: 0,
                ecx: 0,
                edx: 7 << 8
            }
        );
        assert_eq!(ask(0x4fff_fff3, 2 << 16 | 12), Registers::UNDEFINED);
        let svm = Leaves {
            isa: Isa::Svm,
            ..VMX
        };
        let invalid = svm.answer(Query::Exits64, u32::MAX, &Marked);
        assert_eq!(
            (invalid.edx, invalid == Registers::UNDEFINED),
            (1 << 8, false)
        );
        // Each phase is marked by its number in `Phase`, plus 2; 3 is the sum of both kinds of
        // sleep.
        let phases = [2, 3, 4, 5 + 7, 6, 5, 7];
        for (number, marks) in phases.into_iter().enumerate() {
            let answer = ask(0x4fff_fff2, (number as u32) << 16 | 12);
            let rows = if number == 3 { 2 * 12 } else { 12 };
            let (low, high) = (answer.eax, answer.edx);
            assert_eq!((low, high), (rows, marks << 4), "phase {number}");
            assert_eq!((answer.ebx, answer.ecx), (0, 0));
        }
        let names: Vec<_> = (0..)
            .map_while(phases_of_query)
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names.len(), PHASES_OF_QUERIES);
        assert_eq!(names[3..], ["blocked", "preempted", "halted", "waiting"]);
        assert_eq!(ask(0x4fff_fff2, 7 << 16 | 12), Registers::UNDEFINED);
        assert_eq!(
            ask(0x4fff_fff4, 12),
            Registers {
                eax: 9,
                ebx: 0,
                ecx: 0,
                edx: 5
            }
        );
        assert_eq!(
            log_line(0x4fff_fff4, 0, ask(0x4fff_fff4, 0)),
            "CPUID(0x4FFFFFF4), life 21474836489"
        );
        assert_eq!(
            log_line(0x4fff_fff2, 3 << 16 | 12, ask(0x4fff_fff2, 3 << 16 | 12)),
            "CPUID(0x4FFFFFF2), exit number 12 (HLT) phase blocked: 824633720856 cycles"
        );
        assert_eq!(
            ask(0x4fff_fff1, 0),
            Registers {
                eax: 3,
                ebx: 1,
                ecx: reasons::defined_count(Isa::Vmx),
                edx: 2021
            }
        );
        let identity = ask(0x4fff_fff0, 0);
        let text: Vec<u8> = [identity.ebx, identity.ecx, identity.edx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(text, b"ExitMeter\0\0\0");
        assert_eq!(
            log_line(
                0x4fff_fffd,
                10,
                Registers {
                    eax: 1002,
                    ..Registers::default()
                }
            ),
            "CPUID(0x4FFFFFFD), exit number 10 (CPUID) exits=1002"
        );
        assert_eq!(
            log_line(
                0x4fff_fffe,
                0,
                Registers {
                    ecx: 3_871_824_973,
                    ..Registers::default()
                }
            ),
            "CPUID(0x4FFFFFFE), total time in vmm: 3871824973 cycles"
        );
        assert_eq!(
            log_line(
                0x4fff_ffff,
                0,
                Registers {
                    eax: 18840,
                    ..Registers::default()
                }
            ),
            "CPUID(0x4FFFFFFF), exits=18840"
        );
    }

    proptest! {
        #[test]
        fn answers_defined_reasons_only(reason in any::<u32>(), low in 0_u32..128) {
            for reason in [reason, low] {
                for isa in [Isa::Vmx, Isa::Svm] {
                    let leaves = Leaves { isa, ..VMX };
                    let answer = leaves.answer(Query::ReasonExits, reason, &Marked);
                    if reasons::is_defined(isa, reason) {
                        let slot = reasons::slot(isa, reason).index() as u32;
                        prop_assert_eq!(answer, Registers { eax: slot, ebx: 1 << 8, ecx: 0, edx: 0 });
                    } else {
                        prop_assert_eq!(answer, Registers::UNDEFINED);
                    }
                }
            }
        }
    }
}
