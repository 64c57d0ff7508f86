// SPDX-License-Identifier: GPL-2.0

//! Differences between two snapshots, made from the module's own ledgers.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;

use exitmeter::{
    model::{delta::Error, Report},
    output::TextOptions,
    report::{csv, text, Selection},
};
use exitmeter_meter::{
    leaves::LeafMap,
    ledger::{Ledger, LedgerCopy, Totals},
    phase::Phase,
    reader::Snapshot,
    reasons::{self, Isa},
    snapshot::{BufferTooSmall, Encoder, HostHeader, Identity},
};
use proptest::prelude::*;

const LOADED: u64 = 1_000;

/// A host whose vCPUs come, live and go on a test's command.
struct World {
    now: u64,
    loaded: u64,
    life: u64,
    vcpus: BTreeMap<u32, Box<Ledger>>,
    gone: Totals,
    /// Exits by vCPU and code since the test last cleared them.
    exits: BTreeMap<(u32, u32), u64>,
}

/// Event of a vCPU, after some ticks.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// Exit with a code, and an entry this many ticks later.
    Exit(u32, u64),
    /// Exit, a time in a phase, and an entry.
    Away(u32, Phase, u64),
    /// Exit, and no return from a phase.
    Leave(u32, Phase),
    /// End of the vCPU. A later vCPU with the same number is another one.
    Go,
}

fn copy(ledger: &Ledger) -> LedgerCopy {
    let mut copy = LedgerCopy::new();
    assert!(ledger.try_copy(&mut copy));
    copy
}

impl World {
    fn new() -> Self {
        Self {
            now: 2_000,
            loaded: LOADED,
            life: 1,
            vcpus: BTreeMap::new(),
            gone: Totals::new(),
            exits: BTreeMap::new(),
        }
    }

    fn apply(&mut self, vcpu: u32, after: u64, event: Event) {
        self.now += after + 1;
        if matches!(event, Event::Go) {
            if let Some(ledger) = self.vcpus.remove(&vcpu) {
                self.gone.fold(&copy(&ledger));
            }
            return;
        }
        let now = &mut self.now;
        let ledger = self.vcpus.entry(vcpu).or_insert_with(|| {
            // SAFETY: All-zero bytes are a valid ledger.
            let ledger: Box<Ledger> = Box::new(unsafe { core::mem::zeroed() });
            ledger.begin(*now, Phase::User);
            ledger
        });
        // Bring the vCPU into the guest first.
        if copy(ledger).phase() != Phase::Guest {
            *now += 1;
            ledger.resume(*now);
            *now += 1;
            ledger.entry(*now);
        }
        let (Event::Exit(code, _) | Event::Away(code, ..) | Event::Leave(code, _)) = event else {
            return;
        };
        *now += 1;
        ledger.exit(*now, reasons::slot(Isa::Vmx, code));
        *self.exits.entry((vcpu, code)).or_default() += 1;
        *now += 1;
        match event {
            Event::Exit(_, ticks) => {
                *now += ticks;
                ledger.entry(*now);
            }
            Event::Away(_, phase, ticks) => {
                ledger.leave(*now, phase);
                *now += ticks + 1;
                ledger.resume(*now);
                *now += 1;
                ledger.entry(*now);
            }
            Event::Leave(_, phase) => ledger.leave(*now, phase),
            Event::Go => {}
        }
    }

    fn write(&self, buffer: &mut [u8]) -> Result<usize, BufferTooSmall> {
        let host = HostHeader {
            isa: Isa::Vmx,
            leaf_map: LeafMap::Map2021,
            host_scope: false,
            by_bpf: false,
            tsc_khz: 1_000_000,
            tsc_stable: true,
            loaded: self.loaded,
            now: self.now,
            clock_offset: 0,
            life: self.life,
        };
        let mut encoder = Encoder::new(buffer, host);
        for (vcpu, ledger) in &self.vcpus {
            let identity = Identity {
                vm: 1 + u64::from(*vcpu % 2),
                name: [b'v'; 48],
                pid: 7,
                vcpu: *vcpu,
            };
            encoder.vcpu(&identity, &copy(ledger));
        }
        encoder.finish(&self.gone, 0)
    }

    fn report(&self) -> Report {
        let BufferTooSmall { needed } = self.write(&mut []).unwrap_err();
        let mut bytes = vec![0; needed];
        self.write(&mut bytes).unwrap();
        Report::new(&Snapshot::parse(&bytes).unwrap())
    }
}

fn phases() -> impl Strategy<Value = Phase> {
    prop_oneof![
        Just(Phase::User),
        Just(Phase::Halted),
        Just(Phase::Waiting),
        Just(Phase::Preempted)
    ]
}

fn events() -> impl Strategy<Value = Vec<(u32, u64, Event)>> {
    let code = || prop_oneof![Just(1_u32), Just(10), Just(12), Just(30)];
    let event = prop_oneof![
        8 => (code(), 0_u64..200_000).prop_map(|(code, ticks)| Event::Exit(code, ticks)),
        4 => (code(), phases(), 0_u64..200_000).prop_map(|(code, phase, ticks)| Event::Away(code, phase, ticks)),
        2 => (code(), phases()).prop_map(|(code, phase)| Event::Leave(code, phase)),
        1 => Just(Event::Go),
    ];
    proptest::collection::vec((0_u32..4, 0_u64..100_000, event), 0..60)
}

proptest! {
    #[test]
    fn every_tick_and_exit_of_an_interval_is_in_one_place(
        before in events(),
        after in events(),
        rest in 0_u64..1_000_000,
    ) {
        let mut world = World::new();
        for (vcpu, ticks, event) in before {
            // The number of a vCPU that goes is not used again.
            world.apply(vcpu, ticks, event);
        }
        world.now += rest;
        let earlier = world.report();
        let there: Vec<u32> = world.vcpus.keys().copied().collect();
        world.exits.clear();
        // In the second half, too, vCPUs that go do not come back: numbers are used once.
        let mut went = Vec::new();
        for (vcpu, ticks, event) in after {
            if !went.contains(&vcpu) {
                world.apply(vcpu, ticks, event);
            }
            if matches!(event, Event::Go) {
                went.push(vcpu);
            }
        }
        world.now += rest / 2;
        let later = world.report();
        let delta = later.since(&earlier).unwrap();
        let interval = delta.interval.unwrap();
        prop_assert_eq!(interval.ticks, later.host.snapshot_tsc - earlier.host.snapshot_tsc);

        let mut told: BTreeMap<(u32, u32), u64> = BTreeMap::new();
        for vcpu in delta.vms.iter().flat_map(|vm| &vm.vcpus) {
            // The ticks of a vCPU sum to the interval, or to its life if that is shorter.
            let life = vcpu.last_tsc - vcpu.first_tsc;
            prop_assert_eq!(vcpu.ledger.cycles.sum(), u128::from(life));
            if there.contains(&vcpu.vcpu) {
                prop_assert_eq!(life, interval.ticks);
            } else {
                prop_assert!(life <= interval.ticks);
            }
            for row in vcpu.ledger.reasons.iter().filter(|row| row.exits != 0) {
                told.insert((vcpu.vcpu, row.label.code.unwrap()), row.exits);
                let spread = row.spread.unwrap();
                prop_assert!(spread.count() <= row.exits + 1);
                prop_assert!(spread.quantile(100) <= Some(spread.max));
            }
        }
        // Exits that are not with the running vCPUs are with those that are gone.
        let sum = |exits: &BTreeMap<(u32, u32), u64>, gone: bool| {
            let of = exits.iter().filter(|((vcpu, _), _)| world.vcpus.contains_key(vcpu) != gone);
            of.map(|(_, exits)| exits).sum::<u64>()
        };
        let live: BTreeMap<_, _> = world.exits.iter()
            .filter(|((vcpu, _), _)| world.vcpus.contains_key(vcpu))
            .map(|(key, exits)| (*key, *exits))
            .collect();
        prop_assert_eq!(told, live);
        prop_assert_eq!(delta.departed.ledger.exits, sum(&world.exits, true));
        prop_assert_eq!(
            delta.departed.vcpus_gone,
            later.departed.vcpus_gone - earlier.departed.vcpus_gone
        );
    }
}

#[test]
fn a_maximum_of_an_interval_is_exact_when_it_grew() {
    let mut world = World::new();
    world.apply(0, 0, Event::Exit(10, 5_000));
    let first = world.report();
    world.apply(0, 0, Event::Exit(10, 1_000));
    let second = world.report();
    world.apply(0, 0, Event::Exit(10, 9_000));
    let third = world.report();
    let spread = |later: &Report, earlier: &Report| {
        let delta = later.since(earlier).unwrap();
        let row = delta.vms[0].ledger.reasons[0];
        assert_eq!((row.exits, row.label.code), (1, Some(10)));
        let spread = row.spread.unwrap();
        (spread.max, spread.max_exact, spread.count())
    };
    // A cost of 1001 ticks falls into the bucket from 768 on, and is read as 877.
    assert_eq!(spread(&second, &first), (877, false, 1));
    assert_eq!(spread(&third, &second), (9_001, true, 1));
}

#[test]
fn a_long_sleep_counts_in_each_interval() {
    let mut world = World::new();
    world.apply(0, 0, Event::Leave(12, Phase::Halted));
    world.apply(1, 0, Event::Leave(48, Phase::Waiting));
    let first = world.report();
    world.now += 1_000_000;
    let second = world.report();
    let delta = second.since(&first).unwrap();
    let [one, other] = [0, 1].map(|vm| &delta.vms[vm].vcpus[0].ledger);
    // vCPU 1 is in VM 2, vCPU 0 in VM 1.
    assert_eq!((one.cycles.halted, one.cycles.waiting), (1_000_000, 0));
    assert_eq!((other.cycles.halted, other.cycles.waiting), (0, 1_000_000));
    for ledger in [one, other] {
        assert_eq!(ledger.cycles.blocked(), 1_000_000);
        assert_eq!(ledger.cycles.sum(), 1_000_000);
        assert_eq!(ledger.exits, 0);
    }
}

#[test]
fn snapshots_of_different_lives_are_refused() {
    let mut world = World::new();
    world.apply(0, 0, Event::Exit(10, 5_000));
    world.apply(0, 0, Event::Exit(10, 5_000));
    let first = world.report();
    world.now += 10;
    let second = world.report();
    assert_eq!(first.since(&second).unwrap_err(), Error::Order);
    let mut fewer = second.clone();
    fewer.vms[0].vcpus[0].ledger.reasons[0].counts.exits -= 1;
    assert_eq!(
        fewer.since(&first).unwrap_err(),
        Error::Backwards(format!("{} vCPU 0", "v".repeat(48)))
    );
    let mut none = second.clone();
    none.vms[0].vcpus[0].ledger.reasons.clear();
    assert!(matches!(
        none.since(&first).unwrap_err(),
        Error::Backwards(_)
    ));
    world.life += 1;
    let anew = world.report().since(&first).unwrap_err();
    assert_eq!(anew, Error::NewLife);
    assert_eq!(anew.to_string(), "the meter began anew");
    // Without a life, as before version 1.2, the time of loading identifies it.
    world.life = 0;
    let first = world.report();
    world.loaded += 1;
    assert_eq!(world.report().since(&first).unwrap_err(), Error::NewLife);
}

/// On a host of 256 vCPUs at 3 GHz that has run for 300 days, the sums of ticks exceed 64 bits.
#[test]
fn sums_of_a_large_host_do_not_wrap() {
    const KHZ: u64 = 3_000_000;
    const LIFE: u64 = 300 * 24 * 3600 * KHZ * 1000;
    const VCPUS: u32 = 256;
    let ledger = || -> LedgerCopy {
        // SAFETY: All-zero bytes are a valid ledger.
        let ledger: Box<Ledger> = Box::new(unsafe { core::mem::zeroed() });
        ledger.begin(0, Phase::Kernel);
        ledger.entry(1);
        // A quarter of its life in the guest, a quarter asleep, half in the kernel.
        ledger.exit(LIFE / 4, reasons::slot(Isa::Vmx, 12));
        ledger.leave(LIFE / 4 + LIFE / 2, Phase::Halted);
        ledger.resume(LIFE);
        copy(&ledger)
    };
    let write = |buffer: &mut [u8], gone: &Totals| {
        let host = HostHeader {
            isa: Isa::Vmx,
            leaf_map: LeafMap::Map2021,
            host_scope: false,
            by_bpf: false,
            tsc_khz: KHZ as u32,
            tsc_stable: true,
            loaded: 0,
            now: LIFE,
            clock_offset: 0,
            life: 1,
        };
        let mut encoder = Encoder::new(buffer, host);
        for vcpu in 0..VCPUS {
            let identity = Identity {
                vm: 1,
                name: [b'v'; 48],
                pid: 7,
                vcpu,
            };
            encoder.vcpu(&identity, &ledger());
        }
        encoder.finish(gone, 0)
    };
    let report = |gone: &Totals| {
        let BufferTooSmall { needed } = write(&mut [], gone).unwrap_err();
        let mut bytes = vec![0; needed];
        write(&mut bytes, gone).unwrap();
        Report::new(&Snapshot::parse(&bytes).unwrap())
    };
    let whole = report(&Totals::new());
    let cycles = whole.vms[0].ledger.cycles;
    assert_eq!(cycles.sum(), u128::from(LIFE) * u128::from(VCPUS));
    assert!(cycles.sum() > u128::from(u64::MAX));
    let table = text(&whole, &Selection::default(), TextOptions::default());
    let shares: Vec<f64> = table
        .split_whitespace()
        .filter_map(|word| word.strip_suffix('%')?.parse().ok())
        .collect();
    assert!(shares.len() > 1000 && shares.iter().all(|share| *share <= 100.0));
    let plain: String = table.chars().filter(|letter| *letter != ',').collect();
    let words: Vec<_> = plain.split_whitespace().collect();
    for phase in [
        ["guest", "4976639999999999744", "25.0%"],
        ["kernel", "9953280000000000256", "50.0%"],
        ["halted", "4976640000000000000", "25.0%"],
    ] {
        assert!(words.windows(3).any(|words| words == phase), "{phase:?}");
    }
    let values = csv(&whole, &Selection::default());
    assert!(
        values.contains(",0.999999") || values.contains(",1.000000"),
        "{values}"
    );
    // The module's sums of vCPUs that are gone saturate.
    let mut gone = Totals::new();
    gone.fold(&ledger());
    let BufferTooSmall { needed } = write(&mut [], &gone).unwrap_err();
    let mut bytes = vec![0; needed];
    write(&mut bytes, &gone).unwrap();
    let totals = u64::from_le_bytes(*bytes[104..].first_chunk().unwrap());
    // Kernel ticks of the first row behind the head.
    let kernel = usize::try_from(totals).unwrap() + 112 + 24;
    bytes[kernel..kernel + 8].fill(0xff);
    let full = Report::new(&Snapshot::parse(&bytes).unwrap());
    let row = full.departed.ledger.reasons[0];
    assert_eq!(row.cycles.kernel, u128::from(u64::MAX));
    assert!(row.cycles.is_full(Phase::Kernel) && !row.cycles.is_full(Phase::User));
    let table = text(&full, &Selection::default(), TextOptions::default());
    assert!(table.contains(" 18,446,744,073,709,551,615+ "), "{table}");
    let json = serde_json::to_value(row).unwrap();
    assert_eq!(json["cycles"]["at_least"], serde_json::json!(["kernel"]));
}
