// SPDX-License-Identifier: GPL-2.0

//! The guest's table, answered by the module's own code from a saved snapshot, on a CPU where each
//! query is an exit as well.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod saved;

use exitmeter::{guest::Sweep, output::TextOptions, stat::Counters};
use exitmeter_guest::{cpuid_reason, Cpuid, Error, Meter};
use exitmeter_meter::{
    leaves::{LeafMap, Leaves, Numbers, Registers, NESTED},
    phase::Phase,
    reader::{Row, Snapshot},
    reasons::{self, Isa, Slot},
    snapshot::Reason,
};

const SNAPSHOT: &[u8] = include_bytes!("../../src/meter/tests/snapshot-1.2.bin");

/// Life of the meter.
const LIFE: u64 = 77 << 32 | 5;

/// Cost of a query, in kernel ticks.
const COST: u64 = 1000;

/// Numbers that the host has of the VM, with the queries so far.
struct Held<'a> {
    rows: Vec<Row<'a>>,
    asked: u64,
}

impl Held<'_> {
    /// Return the numbers before any query.
    fn before(&self) -> Held<'_> {
        let rows = self.rows.clone();
        Held { rows, asked: 0 }
    }

    fn is_cpuid(slot: Slot) -> bool {
        slot == reasons::slot(Isa::Vmx, cpuid_reason(Isa::Vmx))
    }

    fn sum(&self, slot: Slot, of: impl Fn(&Row<'_>) -> u64) -> u64 {
        let rows = self.rows.iter();
        rows.filter(|row| row.reason() == Reason::of(Isa::Vmx, slot))
            .map(of)
            .sum()
    }
}

impl Numbers for Held<'_> {
    fn exits(&self, slot: Slot) -> u64 {
        // A query counts itself before it is answered.
        let own = if Self::is_cpuid(slot) { self.asked } else { 0 };
        self.sum(slot, |row| row.exits()) + own
    }
    fn nested_exits(&self, slot: Slot) -> u64 {
        self.sum(slot, |row| row.nested_exits().unwrap())
    }
    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        // The cost of a query is booked when the guest runs on.
        let own = match phase {
            Phase::Kernel if Self::is_cpuid(slot) => self.asked.saturating_sub(1) * COST,
            _ => 0,
        };
        self.sum(slot, |row| row.cycles(phase)) + own
    }
}

/// A CPU whose host has the module.
struct Metered<'a> {
    held: Held<'a>,
    leaves: Leaves,
}

impl Cpuid for Metered<'_> {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        self.held.asked += 1;
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
        held: Held {
            rows: vm.flat_map(|vcpu| vcpu.rows()).collect(),
            asked: 0,
        },
        leaves: Leaves {
            map,
            isa: Isa::Vmx,
            life: LIFE,
        },
    }
}

#[test]
fn the_guest_reads_what_the_host_holds() {
    for map in [LeafMap::Map2021, LeafMap::Map2022] {
        let mut cpu = metered(map);
        let sweep = Sweep::read(&mut cpu, Isa::Vmx).unwrap();
        assert_eq!(sweep.leaf_map, map as u32);
        assert_eq!(sweep.queries, cpu.held.asked);
        let held = cpu.held.before();
        assert_eq!(sweep.ledger.reasons.len(), 7);
        for row in &sweep.ledger.reasons {
            let slot = reasons::slot(Isa::Vmx, row.label.code.unwrap());
            assert_eq!(row.exits, held.exits(slot));
            assert_eq!(row.nested_exits, Some(held.nested_exits(slot)));
            for phase in Phase::ALL {
                assert_eq!(row.cycles.of(phase), held.cycles(phase, slot).into());
            }
        }
    }
}

/// A second reader finds the queries of the first one, and no other difference.
#[test]
fn one_sweep_after_the_other_balances() {
    let mut cpu = metered(LeafMap::Map2021);
    let mut meter = Meter::find(&mut cpu, Isa::Vmx).unwrap();
    let mut rows = Vec::new();
    meter.read(|row| rows.push(row));
    let cost = meter.cost();
    let queries = meter.queries();
    assert_eq!((queries, cost), (cpu.held.asked, cpu.held.asked * COST));
    let mut place = 0;
    let mut meter = Meter::find(&mut cpu, Isa::Vmx).unwrap();
    meter.read(|row| {
        let mut before = rows[place];
        place += 1;
        if row.code == cpuid_reason(Isa::Vmx) {
            before.exits += queries;
            before.cycles[Phase::Kernel as usize] += cost;
        }
        assert_eq!(row, before);
    });
    assert_eq!(place, rows.len());
}

/// A reader that assumes another vendor's CPU still gets each exit right.
#[test]
fn a_wrong_vendor_costs_three_queries() {
    let mut cpu = metered(LeafMap::Map2021);
    let mut meter = Meter::find(&mut cpu, Isa::Svm).unwrap();
    assert_eq!(meter.isa(), Isa::Vmx);
    let mut told = None;
    meter.read(|row| told = Some(row).filter(|row| row.code == 10));
    let cost = meter.cost();
    let told = told.unwrap();
    assert_eq!(cost, (cpu.held.asked - 3) * COST);
    let held = cpu.held.before();
    let slot = reasons::slot(Isa::Vmx, 10);
    assert_eq!(told.exits, held.exits(slot));
    assert_eq!(
        told.cycles(Phase::Kernel),
        held.cycles(Phase::Kernel, slot) + 3 * COST
    );
}

/// Queries that failed before, in another way on the same CPU, are subtracted as well.
#[test]
fn queries_before_the_meter_was_found_are_subtracted() {
    let mut cpu = metered(LeafMap::Map2021);
    for _ in 0..3 {
        cpu.ask(0x4fff_fff0, 0);
    }
    let mut meter = Meter::find(&mut cpu, Isa::Vmx).unwrap().with_earlier(3);
    let exits = meter.exits(10);
    let cost = meter.cost();
    let queries = meter.queries();
    assert_eq!(queries, cpu.held.asked);
    assert_eq!(cost, (queries - 3) * COST);
    let slot = reasons::slot(Isa::Vmx, 10);
    assert_eq!(exits, cpu.held.before().exits(slot));
}

#[test]
fn the_table_matches_the_saved_text() {
    let sweep = Sweep::read(&mut metered(LeafMap::Map2021), Isa::Vmx).unwrap();
    saved::compare(&sweep.text(TextOptions::default()), "guest.txt");
    let narrow = TextOptions {
        width: Some(80),
        ..TextOptions::default()
    };
    let text = sweep.text(narrow);
    assert!(
        text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );
}

/// A host whose module does not report nested exits, or has none.
#[test]
fn without_nested_exits_there_is_no_column_of_them() {
    struct Plain(Registers, Metered<'static>);
    impl Cpuid for Plain {
        fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
            let answer = self.1.ask(leaf, subleaf);
            match (leaf, subleaf & NESTED) {
                (0x4fff_fff3, NESTED) => self.0,
                _ => answer,
            }
        }
    }
    for (answer, told) in [
        (Registers::UNDEFINED, None),
        (Registers::default(), Some(0)),
    ] {
        let mut plain = Plain(answer, metered(LeafMap::Map2021));
        let sweep = Sweep::read(&mut plain, Isa::Vmx).unwrap();
        assert_eq!(
            (sweep.ledger.exits, sweep.ledger.nested_exits),
            (13_122, told)
        );
        assert!(!sweep.text(TextOptions::default()).contains("nested"));
    }
}

#[test]
fn without_a_meter_there_is_an_error() {
    let read = |map| Sweep::read(&mut metered(map), Isa::Vmx);
    assert!(matches!(read(LeafMap::Off), Err(Error::NoVm)));

    /// A VM on another host.
    struct Elsewhere;
    impl Cpuid for Elsewhere {
        fn ask(&mut self, leaf: u32, _: u32) -> Registers {
            Registers {
                ecx: u32::from(leaf == 1) << 31,
                ..Registers::default()
            }
        }
    }
    let read = Sweep::read(&mut Elsewhere, Isa::Vmx);
    assert!(matches!(read, Err(Error::NoMeter)));

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
    let read = |leaf, change| Sweep::read(&mut Odd(leaf, change), Isa::Vmx).unwrap_err();
    assert!(matches!(
        read(0x4fff_fff0, |answer| answer.edx = 0),
        Error::NoVm
    ));
    assert_eq!(
        read(0x4fff_fff1, |answer| answer.eax = 4).to_string(),
        "the host's meter has version 4 of its CPUID leaves, this tool reads versions 1 to 3: \
         use the tool that came with the module"
    );
    assert_eq!(
        read(0x4fff_fff1, |answer| answer.ebx = 3).to_string(),
        "the host's meter names an unknown instruction set extension, 3"
    );
}

/// A host whose meter begins anew after a number of queries.
struct Renewed {
    cpu: Metered<'static>,
    after: u64,
}

impl Cpuid for Renewed {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        if self.cpu.held.asked == self.after {
            self.cpu.leaves.life += 1;
        }
        self.cpu.ask(leaf, subleaf)
    }
}

#[test]
fn a_meter_that_begins_anew_is_an_error() {
    let all = {
        let mut cpu = metered(LeafMap::Map2021);
        Sweep::read(&mut cpu, Isa::Vmx).unwrap().queries
    };
    // Before the reader knows the life, and while it reads; after its last query nothing is wrong.
    for (after, anew) in [
        (0, false),
        (5, true),
        (60, true),
        (all - 1, true),
        (all, false),
    ] {
        let cpu = metered(LeafMap::Map2021);
        let read = Sweep::read(Renewed { cpu, after }, Isa::Vmx);
        match read {
            Ok(sweep) => {
                assert!(!anew, "{after}");
                assert_eq!(sweep.life, Some(LIFE + u64::from(after == 0)));
            }
            Err(error) => {
                assert!(anew && error == Error::NewLife, "{after}: {error}");
                assert!(error.to_string().starts_with("the meter began anew "));
            }
        }
    }
}

/// Counters of two lives have no difference.
#[test]
fn counters_of_two_lives_have_no_difference() {
    let counters = |cpu: &mut Renewed| {
        let mut counters = Counters::new(Isa::Vmx);
        counters.read(cpu).unwrap();
        counters
    };
    let all = {
        let mut cpu = metered(LeafMap::Map2021);
        let mut counters = Counters::new(Isa::Vmx);
        counters.read(&mut cpu).unwrap();
        counters.queries
    };
    for (after, known) in [
        // Before the first reading, in it, between the two, in the second one, and never.
        (0, true),
        (all / 2, false),
        (all, false),
        (all + all / 2, false),
        (u64::MAX, true),
    ] {
        let cpu = metered(LeafMap::Map2021);
        let mut cpu = Renewed { cpu, after };
        let (before, after_it) = (counters(&mut cpu), counters(&mut cpu));
        let rows = after_it.since(&before);
        // The readers' own queries are the only exits.
        assert_eq!(rows.map(|rows| rows.len()), known.then_some(0), "{after}");
    }
}

/// A host of the first version of the leaves, which knows one sleep and no life.
struct First(Metered<'static>);

impl Cpuid for First {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        let mut answer = self.0.ask(leaf, subleaf);
        match (leaf, subleaf >> 16) {
            (0x4fff_fff1, _) => answer.eax = 1,
            (0x4fff_fff2, 5..) => return Registers::UNDEFINED,
            // KVM itself answers this leaf.
            (0x4fff_fff4, _) => return Registers::default(),
            _ => {}
        }
        answer
    }
}

#[test]
fn a_host_of_the_first_version_is_read() {
    let mut first = First(metered(LeafMap::Map2021));
    let sweep = Sweep::read(&mut first, Isa::Vmx).unwrap();
    assert_eq!((sweep.interface, sweep.life), (1, None));
    let held = first.0.held.before();
    for row in &sweep.ledger.reasons {
        let slot = reasons::slot(Isa::Vmx, row.label.code.unwrap());
        let [halted, waiting] = [Phase::Halted, Phase::Waiting];
        let slept = held.cycles(halted, slot) + held.cycles(waiting, slot);
        assert_eq!(row.cycles.halted, slept.into());
        assert_eq!((row.cycles.waiting, row.cycles.separates_waits), (0, false));
    }
    let text = sweep.text(TextOptions::default());
    assert!(text.contains("\nblocked    4,908,000,000 "), "{text}");
    assert!(!text.contains("halted") && !text.contains("waiting"));
    let json = serde_json::to_value(&sweep).unwrap();
    assert_eq!(json["cycles"]["blocked"], 4_908_000_000_u64);
    assert_eq!(json["cycles"].get("halted"), None);
    assert_eq!(json.get("life"), None);
}
