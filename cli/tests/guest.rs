// SPDX-License-Identifier: GPL-2.0

//! The guest's table, answered by the module's own code from a saved snapshot.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use exitmeter::guest::{Cpuid, Error, Sweep};
use exitmeter_meter::{
    leaves::{LeafMap, Leaves, Numbers, Registers, NESTED},
    phase::Phase,
    reader::{Row, Snapshot},
    reasons::{self, Isa, Slot},
    snapshot::Reason,
};

const SNAPSHOT: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.1.bin");

/// What the host holds of the VM.
struct Held<'a>(Vec<Row<'a>>);

impl Held<'_> {
    fn sum(&self, slot: Slot, of: impl Fn(&Row<'_>) -> u64) -> u64 {
        let rows = self.0.iter();
        rows.filter(|row| row.reason() == Reason::of(Isa::Vmx, slot))
            .map(of)
            .sum()
    }
}

impl Numbers for Held<'_> {
    fn exits(&self, slot: Slot) -> u64 {
        self.sum(slot, |row| row.exits())
    }
    fn nested_exits(&self, slot: Slot) -> u64 {
        self.sum(slot, |row| row.nested_exits().unwrap())
    }
    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        self.sum(slot, |row| row.cycles(phase))
    }
}

/// A CPU whose host has the module.
struct Metered<'a> {
    held: Held<'a>,
    leaves: Leaves,
}

impl Cpuid for Metered<'_> {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        match self.leaves.classify(leaf) {
            Some(query) => self.leaves.answer(query, subleaf, &self.held),
            None => Registers::default(),
        }
    }
}

fn metered(map: LeafMap) -> Metered<'static> {
    let snapshot = Snapshot::parse(SNAPSHOT).unwrap();
    let vm = snapshot.vcpus().filter(|vcpu| vcpu.vm() == 1);
    Metered {
        held: Held(vm.flat_map(|vcpu| vcpu.rows()).collect()),
        leaves: Leaves { map, isa: Isa::Vmx },
    }
}

#[test]
fn the_guest_reads_what_the_host_holds() {
    for map in [LeafMap::Map2021, LeafMap::Map2022] {
        let mut cpu = metered(map);
        let sweep = Sweep::read(&mut cpu).unwrap();
        assert_eq!(sweep.leaf_map, map as u32);
        assert_eq!(sweep.ledger.reasons.len(), 7);
        for row in &sweep.ledger.reasons {
            let slot = reasons::slot(Isa::Vmx, row.label.code.unwrap());
            assert_eq!(row.exits, cpu.held.exits(slot));
            assert_eq!(row.nested_exits, Some(cpu.held.nested_exits(slot)));
            for phase in Phase::ALL {
                assert_eq!(row.cycles.of(phase), cpu.held.cycles(phase, slot));
            }
        }
    }
}

#[test]
fn the_table_in_full() {
    let sweep = Sweep::read(&mut metered(LeafMap::Map2021)).unwrap();
    assert_eq!(
        sweep.text(),
        "\
code  reason              exits  nested      cycles  per exit  share
   1  EXTERNAL_INTERRUPT  5,191       0  10,901,100     2,100  36.3%
  32  MSR_WRITE           4,765       0   7,486,600     1,571  24.9%
  48  EPT_VIOLATION         489       0   4,792,200     9,800  15.9%
  30  IO_INSTRUCTION        974       0   3,633,020     3,730  12.1%
  12  HLT                   710     355   2,140,000     3,014   7.1%
  10  CPUID                 868     434     995,596     1,147   3.3%
   7  INTERRUPT_WINDOW      125       0     112,500       900   0.4%

13,122 exits, 30,061,016 cycles; reading them took 122 CPUID exits of its own
"
    );
}

/// A host whose module does not tell nested exits, or has none to tell.
#[test]
fn without_nested_exits_there_is_no_column_of_them() {
    struct Plain(Registers);
    impl Cpuid for Plain {
        fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
            match (leaf, subleaf & NESTED) {
                (0x4fff_fff3, NESTED) => self.0,
                _ => metered(LeafMap::Map2021).ask(leaf, subleaf),
            }
        }
    }
    for (answer, told) in [
        (Registers::UNDEFINED, None),
        (Registers::default(), Some(0)),
    ] {
        let sweep = Sweep::read(&mut Plain(answer)).unwrap();
        assert_eq!(
            (sweep.ledger.exits, sweep.ledger.nested_exits),
            (13_122, told)
        );
        assert!(!sweep.text().contains("nested"));
    }
}

#[test]
fn without_a_meter_there_is_an_error() {
    let read = |map| Sweep::read(&mut metered(map));
    assert!(matches!(read(LeafMap::Off), Err(Error::NoMeter)));

    /// A CPU that changes one register of one answer.
    struct Odd(u32, fn(&mut Registers));
    impl Cpuid for Odd {
        fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
            let mut answer = metered(LeafMap::Map2021).ask(leaf, subleaf);
            if leaf == self.0 {
                self.1(&mut answer);
            }
            answer
        }
    }
    let read = |leaf, change| Sweep::read(&mut Odd(leaf, change)).unwrap_err();
    assert!(matches!(
        read(0x4fff_fff0, |answer| answer.edx = 0),
        Error::NoMeter
    ));
    assert_eq!(
        read(0x4fff_fff1, |answer| answer.eax = 2).to_string(),
        "the host's meter has version 2 of its CPUID leaves, this tool reads version 1: \
         use the tool that came with the module"
    );
    assert_eq!(
        read(0x4fff_fff1, |answer| answer.ebx = 3).to_string(),
        "the host's meter names an unknown instruction set extension, 3"
    );
}
