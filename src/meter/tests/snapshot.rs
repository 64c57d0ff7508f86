// SPDX-License-Identifier: GPL-2.0

//! Tests of the snapshot: written and read, saved, of a later version, and damaged.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use exitmeter_meter::{
    detail,
    histogram::{bucket, quantile, Buckets, EMPTY},
    leaves::LeafMap,
    ledger::{Ledger, LedgerCopy, NoSupply, Totals},
    phase::Phase,
    reader::{Counter, Error, Kind, Missed, Snapshot, TableRow, Unit},
    reasons::{self, Isa, Slot},
    slow::Leaving,
    snapshot::{
        size_for, BufferTooSmall, Encoder, HostHeader, Identity, Reason, MINOR, TABLE_CODE,
        TABLE_DETAILS, TABLE_RING, TABLE_SLOWEST, TABLE_USER,
    },
    tables::{About, Tables, TablesCopy},
};
use proptest::prelude::*;

/// Step between the sizes that are tried where all matter. Miri takes a thousand times as long.
const STEP: usize = if cfg!(miri) { 487 } else { 1 };

/// Maximum numbers of vCPUs in a snapshot, and of exits of each, where both are random.
const VCPUS: usize = if cfg!(miri) { 3 } else { 8 };
const EXITS: usize = if cfg!(miri) { 8 } else { 60 };

/// One snapshot of each version, as the module wrote it. They never change: the tools of tomorrow
/// must read the snapshots of today.
const SAVED: &[u8] = include_bytes!("snapshot-1.3.bin");
const SAVED_1_2: &[u8] = include_bytes!("snapshot-1.2.bin");
const SAVED_1_1: &[u8] = include_bytes!("snapshot-1.1.bin");
const SAVED_1_0: &[u8] = include_bytes!("snapshot-1.0.bin");

/// A snapshot of version 1.0 from the module on an emulated AMD host: a VM whose guest writes to a
/// port that its VMM answers slowly, and a VM that is gone, which executed CPUID 100 times.
const FROM_AMD: &[u8] = include_bytes!("snapshot-1.0-amd.bin");

const HOST: HostHeader = HostHeader {
    isa: Isa::Vmx,
    leaf_map: LeafMap::Map2021,
    host_scope: false,
    by_bpf: false,
    tsc_khz: 2_400_000,
    tsc_stable: true,
    loaded: 1_000_000,
    now: 60_000_000_000,
    clock_offset: 0,
    life: 0x1122_3344_5566_7788,
};

fn identity(vm: u64, pid: u32, vcpu: u32) -> Identity {
    let mut name = [0; 48];
    let text = format!("kvm-{pid}");
    name[..text.len()].copy_from_slice(text.as_bytes());
    Identity {
        vm,
        name,
        pid,
        vcpu,
    }
}

fn ledger() -> Box<Ledger> {
    // SAFETY: All-zero bytes are a valid ledger.
    Box::new(unsafe { core::mem::zeroed() })
}

fn copy(ledger: &Ledger) -> LedgerCopy {
    let mut copy = LedgerCopy::new();
    assert!(ledger.try_copy(&mut copy));
    copy
}

/// Codes of CPUID and HLT. Each second exit with one of them comes from a nested guest.
const NESTED: [u32; 2] = [10, 12];

/// Make a vCPU that began at `now`. Each of (code, exits, kernel ticks, phase, ticks) adds that
/// many exits with that many kernel ticks each and ticks in the phase, each after 40 000 ticks of
/// guest.
///
/// It has tables. Each exit but those with code 1 has a detail, from its code and its number modulo
/// 3. Unless `no_rip` is set, each comes from one of two places.
fn vcpu_with(
    mut now: u64,
    life: &[(u32, u64, u64, Phase, u64)],
    no_rip: bool,
) -> (LedgerCopy, Box<TablesCopy>) {
    let ledger = ledger();
    // SAFETY: All-zero bytes are valid tables.
    let tables: Box<Tables> = Box::new(unsafe { core::mem::zeroed() });
    tables.prepare();
    // A wait for the host is as long.
    tables.slow().set_limit(1_900_000);
    ledger.begin(now, Phase::User);
    now += 2_000_000;
    ledger.resume(now);
    now += 9_000;
    ledger.entry(now);
    let mut cpu = 3;
    for &(code, exits, kernel, phase, ticks) in life {
        for number in 0..exits {
            now += 40_000;
            let slot = reasons::slot(Isa::Vmx, code);
            let about = About {
                slot,
                nested: NESTED.contains(&code) && number % 2 == 1,
                key: (code != 1)
                    .then_some(detail::key_of(slot, (u64::from(code) << 8) + number % 3)),
                rip: (!no_rip).then_some(0xffff_ffff_8100_0000 + number % 2),
            };
            ledger.exit_with::<true>(&tables, now, &about, NoSupply);
            // One of the kernel's ticks comes after all else.
            now += kernel - 1;
            if phase != Phase::Kernel {
                let leaving = Leaving {
                    phase,
                    to_user: (phase == Phase::User).then_some(2),
                };
                ledger.leave_with(&tables, now, leaving, || cpu);
                now += ticks;
                // Waits end on another CPU.
                cpu = if phase == Phase::Waiting { 5 } else { 3 };
                ledger.resume_with(&tables, now);
            }
            now += 1;
            ledger.entry_with(&tables, now, || cpu);
        }
    }
    let (mut copy, mut copies) = (LedgerCopy::new(), Box::new(TablesCopy::new()));
    assert!(ledger.try_copy_with(&mut copy, &mut Some((&tables, &mut copies))));
    (copy, copies)
}

/// Contents of a snapshot: vCPUs, and those that are gone.
struct Sample {
    vcpus: Vec<(Identity, LedgerCopy, Box<TablesCopy>)>,
    gone: Totals,
}

impl Sample {
    /// Two VMs, one with two vCPUs; one more that is gone; and one unmetered vCPU. Keeps only each
    /// `fewer`th exit, but at least one of each reason.
    fn new(fewer: u64) -> Self {
        use Phase::{Halted, Kernel, Preempted, User, Waiting};
        let vcpu_with = |now, life: &[(u32, u64, u64, Phase, u64)], no_rip| {
            let life = life.iter().map(|&(code, exits, kernel, phase, ticks)| {
                (code, exits.div_ceil(fewer), kernel, phase, ticks)
            });
            vcpu_with(now, &life.collect::<Vec<_>>(), no_rip)
        };
        let (mut first, its_tables) = vcpu_with(
            2_000_000,
            &[
                (1, 5191, 2_100, Kernel, 0),
                (32, 4645, 1_480, Kernel, 0),
                (30, 974, 3_730, User, 21_000),
                (10, 868, 1_147, Kernel, 0),
                (48, 480, 9_800, Kernel, 0),
                (48, 9, 9_800, Waiting, 2_000_000),
                (12, 300, 1_900, Halted, 4_000_000),
                (7, 125, 900, Preempted, 310_000),
                (0xffff, 2, 800, Kernel, 0),
            ],
            false,
        );
        let (mut second, other_tables) = vcpu_with(
            3_000_000,
            &[
                (32, 120, 5_100, Kernel, 0),
                (12, 400, 2_900, Halted, 9_000_000),
                (12, 10, 41_000, Halted, 9_000_000),
            ],
            true,
        );
        (first.polled, second.polled) = (150_000, 600_000);
        let (mut departed, _) = vcpu_with(
            5_000_000,
            &[(10, 1002, 1_147, Kernel, 0), (30, 1000, 3_730, User, 9_000)],
            false,
        );
        departed.polled = 7_000;
        let mut gone = Totals::new();
        gone.fold(&departed);
        let (idle, no_tables) = vcpu_with(4_000_000, &[], false);
        Self {
            vcpus: vec![
                (identity(1, 1234, 0), first, its_tables),
                (identity(1, 1234, 1), second, other_tables),
                (identity(2, 1300, 0), idle, no_tables),
            ],
            gone,
        }
    }

    fn write(&self, buffer: &mut [u8]) -> Result<usize, BufferTooSmall> {
        let mut encoder = Encoder::new(buffer, HOST);
        for (identity, copy, tables) in &self.vcpus {
            encoder.vcpu(identity, copy);
            encoder.tables(copy, tables, true);
        }
        encoder.set_details_on(1);
        encoder.finish(&self.gone, 1)
    }

    fn bytes(&self) -> Vec<u8> {
        let BufferTooSmall { needed } = self.write(&mut []).unwrap_err();
        let mut bytes = vec![0xaa; needed];
        assert_eq!(self.write(&mut bytes), Ok(needed));
        bytes
    }
}

#[test]
#[cfg_attr(
    miri,
    ignore = "its 15 000 exits take Miri hours; fewer are written by another test"
)]
fn module_writes_the_saved_snapshot() {
    let bytes = Sample::new(1).bytes();
    if std::env::var_os("EXITMETER_SAVE").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/snapshot-1.3.bin");
        std::fs::write(path, &bytes).unwrap();
    }
    assert!(bytes == SAVED);
}

/// Checks the offsets of the documentation, as numbers.
#[test]
fn fields_have_the_documented_offsets() {
    let number = |offset: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&SAVED[offset..offset + size]);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(&SAVED[..8], b"ExitMetr");
    let totals = 864 + 3 * 112 + (9 + 3 + 1) * 600;
    let columns = totals + 112 + 3 * 600;
    let header: [(usize, usize, u64); 27] = [
        (8, 2, 1),
        (10, 2, 3),
        (12, 4, 160),
        (16, 8, SAVED.len() as u64),
        (24, 4, 1),
        (28, 4, 1),
        (32, 8, 1_000_000),
        (40, 8, 60_000_000_000),
        (48, 4, 2_400_000),
        (52, 4, 2021),
        (56, 8, 1),
        (64, 8, 1),
        (72, 8, 160),
        (80, 4, 11),
        (84, 4, 64),
        (88, 8, 864),
        (96, 4, 3),
        (100, 4, 112),
        (104, 8, totals),
        (112, 4, 600),
        (120, 8, 0x1122_3344_5566_7788),
        (128, 8, columns),
        (136, 4, 12 + 13 + 12),
        (140, 4, 1),
        (144, 8, columns + 37 * 64),
        (152, 4, 2),
        (156, 4, 32),
    ];
    for (offset, size, value) in header {
        assert_eq!(number(offset, size), value, "header, offset {offset}");
    }
    assert!(SAVED[116..120].iter().all(|byte| *byte == 0));

    let descriptors: [(&str, u64, [u64; 4], u64, u64); 11] = [
        ("exits", 1, [1, 0, 0, 0], 8, 1),
        ("guest", 2, [1, 0, 0, 0], 16, 1),
        ("kernel", 2, [1, 0, 0, 0], 24, 1),
        ("user", 2, [1, 0, 0, 0], 32, 1),
        ("blocked", 2, [1, 0, 0, 0], 40, 1),
        ("preempted", 2, [1, 0, 0, 0], 48, 1),
        ("kernel_max", 2, [3, 0, 0, 0], 56, 1),
        ("nested_exits", 1, [1, 0, 0, 0], 64, 1),
        ("kernel_histogram", 2, [2, 1, 6, 0], 72, 64),
        ("halted", 2, [1, 0, 0, 0], 584, 1),
        ("waiting", 2, [1, 0, 0, 0], 592, 1),
    ];
    for (place, (name, unit, kind, offset, len)) in descriptors.into_iter().enumerate() {
        let at = 160 + 64 * place;
        assert_eq!(number(at, 4), unit, "{name}");
        assert_eq!([4, 5, 6, 7].map(|byte| number(at + byte, 1)), kind);
        assert_eq!((number(at + 8, 4), number(at + 12, 4)), (offset, len));
        assert_eq!(&SAVED[at + 16..][..name.len()], name.as_bytes());
        assert!(SAVED[at + 16 + name.len()..at + 64].iter().all(|b| *b == 0));
    }

    // The second vCPU, behind the first and its 9 rows.
    let first = 864;
    let at = first + 112 + 9 * 600;
    let record: [(usize, usize, u64); 12] = [
        (0, 4, 112 + 3 * 600),
        (4, 4, 3),
        (8, 8, 1),
        (16, 4, 1234),
        (20, 4, 1),
        (24, 8, 3_000_000),
        (
            32,
            8,
            3_000_000 + 2_009_000 + 120 * 45_100 + 400 * 9_042_900 + 10 * 9_081_000,
        ),
        (40, 4, 0),
        (44, 4, 0),
        (48, 4, 12),
        (52, 4, 0),
        (104, 8, 600_000),
    ];
    for (offset, size, value) in record {
        assert_eq!(number(at + offset, size), value, "record, offset {offset}");
    }
    assert_eq!(&SAVED[at + 56..at + 65], b"kvm-1234\0");
    let row = at + 112;
    let hlt = 400 * 2_900 + 10 * 41_000;
    let slept = 410 * 9_000_000;
    let rows: [[u64; 10]; 3] = [
        [0, 12, 410, 409 * 40_000, hlt, 0, slept, 0, 41_000, 205],
        [0, 32, 120, 120 * 40_000, 120 * 5_100, 0, 0, 0, 5_100, 0],
        [1, 0, 0, 40_000, 9_000, 2_000_000, 0, 0, 0, 0],
    ];
    // From 2048, 4096 and 32768 on: two buckets per power of two, the first one of 2^6.
    let histograms: [&[(usize, u64)]; 3] = [&[(10, 400), (18, 10)], &[(12, 120)], &[]];
    for (place, [kind, code, numbers @ ..]) in rows.into_iter().enumerate() {
        let row = row + 600 * place;
        assert_eq!([number(row, 4), number(row + 4, 4)], [kind, code]);
        for (counter, value) in numbers.into_iter().enumerate() {
            assert_eq!(number(row + 8 + 8 * counter, 8), value, "{place} {counter}");
        }
        let mut histogram = EMPTY;
        for &(bucket, samples) in histograms[place] {
            histogram[bucket] = samples;
        }
        for (bucket, samples) in histogram.into_iter().enumerate() {
            let at = row + 72 + 8 * bucket;
            assert_eq!(number(at, 8), samples, "{place}, bucket {bucket}");
        }
        let slept = if place == 0 { slept } else { 0 };
        assert_eq!([number(row + 584, 8), number(row + 592, 8)], [slept, 0]);
    }
    // The first vCPU's EPT_VIOLATION, with 9 waits of KVM: both kinds of sleep and their sum.
    let row = (0..9).map(|place| first + 112 + 600 * place);
    let row = row
        .into_iter()
        .find(|row| number(row + 4, 4) == 48)
        .unwrap();
    let sleeps = [584, 592, 40].map(|offset| number(row + offset, 8));
    assert_eq!(sleeps, [0, 9 * 2_000_000, 9 * 2_000_000]);
    // The totals: nothing but the polling.
    let totals = 864 + 3 * 112 + (9 + 3 + 1) * 600;
    assert!(SAVED[totals + 8..totals + 104]
        .iter()
        .all(|byte| *byte == 0));
    assert_eq!(number(totals + 104, 8), 7_000);
}

/// A reader of version 1.0 still finds both kinds of sleep, as one phase.
#[test]
fn each_phase_has_its_number_in_a_record() {
    use Phase::{Guest, Halted, Kernel, Preempted, User, Waiting};
    for (phase, expected) in [
        (Guest, [0, 0]),
        (Kernel, [1, 0]),
        (User, [2, 0]),
        (Halted, [3, 0]),
        (Waiting, [3, 1]),
        (Preempted, [4, 0]),
    ] {
        let ledger = ledger();
        ledger.begin(100, phase);
        let mut bytes = vec![0; size_for(1, 1)];
        let host = HostHeader {
            clock_offset: u64::MAX - 29,
            ..HOST
        };
        let mut encoder = Encoder::new(&mut bytes, host);
        encoder.vcpu(&identity(1, 1, 0), &copy(&ledger));
        let size = encoder.finish(&Totals::new(), 0).unwrap();
        let number = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        assert_eq!([number(864 + 40), number(864 + 52)], expected);
        let snapshot = Snapshot::parse(&bytes[..size]).unwrap();
        let vcpu = snapshot.vcpus().next().unwrap();
        assert_eq!(vcpu.phase(), Some(phase));
        // Its times are in the snapshot's clock, here 30 ticks behind.
        assert_eq!((vcpu.first(), vcpu.last()), (70, 70));
    }
}

/// Check the part of the sample that all versions have.
fn reads_back(snapshot: &Snapshot<'_>) {
    assert_eq!(snapshot.isa(), Isa::Vmx);
    assert_eq!(snapshot.leaf_map(), Some(LeafMap::Map2021));
    assert_eq!(snapshot.tsc_khz(), Some(2_400_000));
    assert!(snapshot.tsc_is_stable() && !snapshot.host_scope());
    assert_eq!(
        (snapshot.loaded(), snapshot.now()),
        (1_000_000, 60_000_000_000)
    );
    assert_eq!((snapshot.unmetered(), snapshot.departed()), (1, 1));
    let counters: Vec<_> = snapshot.counters().collect();
    assert!(matches!(
        counters[0],
        Counter {
            name: "exits",
            unit: Unit::Events,
            kind: Kind::Sum,
            len: 1,
            ..
        }
    ));

    let vcpus: Vec<_> = snapshot.vcpus().collect();
    let who: Vec<_> = vcpus
        .iter()
        .map(|vcpu| (vcpu.vm(), vcpu.name(), vcpu.pid(), vcpu.id()))
        .collect();
    assert_eq!(
        who,
        [
            (1, "kvm-1234", 1234, 0),
            (1, "kvm-1234", 1234, 1),
            (2, "kvm-1300", 1300, 0)
        ]
    );
    assert!(vcpus.iter().all(|vcpu| vcpu.balances()));
    assert_eq!(vcpus[0].latest(), Some(Reason::Other));
    assert_eq!(vcpus[0].phase(), Some(Phase::Guest));
    assert_eq!(vcpus[2].latest(), Some(Reason::Start));
    let rows: Vec<_> = vcpus[0]
        .rows()
        .map(|row| (row.reason(), row.exits(), row.cycles(Phase::Kernel)))
        .collect();
    assert_eq!(rows[0], (Reason::Code(1), 5191, 5191 * 2_100));
    assert_eq!(rows[7], (Reason::Other, 2, 1600));
    assert_eq!(rows[8], (Reason::Start, 0, 9_000));
    let totals: Vec<_> = snapshot.totals().collect();
    assert_eq!(
        (totals[1].reason(), totals[1].exits()),
        (Reason::Code(30), 1000)
    );
    assert_eq!(
        totals[1].numbers(&counters[3]).collect::<Vec<_>>(),
        [9_000_000]
    );
}

#[test]
fn saved_snapshot_reads_back() {
    let snapshot = Snapshot::parse(SAVED).unwrap();
    assert_eq!(snapshot.version(), (1, 3));
    reads_back(&snapshot);
    has_all_of_1_2(&snapshot);
}

#[test]
fn saved_version_1_2_reads_back() {
    let snapshot = Snapshot::parse(SAVED_1_2).unwrap();
    assert_eq!(snapshot.version(), (1, 2));
    reads_back(&snapshot);
    has_all_of_1_2(&snapshot);
    assert!(!snapshot.has_tables() && snapshot.tables().next().is_none());
}

fn has_all_of_1_2(snapshot: &Snapshot<'_>) {
    assert_eq!(snapshot.life(), 0x1122_3344_5566_7788);
    let polled: Vec<_> = snapshot.vcpus().map(|vcpu| vcpu.polled()).collect();
    assert_eq!(polled, [Some(150_000), Some(600_000), Some(0)]);
    assert_eq!(snapshot.departed_polled(), Some(7_000));
    assert!(snapshot.separates_waits());
    let slept = |phase| {
        let rows = || snapshot.vcpus().flat_map(|vcpu| vcpu.rows());
        rows().map(|row| row.cycles(phase)).sum::<u64>()
    };
    let halted = 300 * 4_000_000 + 410 * 9_000_000;
    assert_eq!(
        (slept(Phase::Halted), slept(Phase::Waiting)),
        (halted, 18_000_000)
    );
    let counters: Vec<_> = snapshot.counters().collect();
    let kinds: Vec<_> = counters[6..].iter().map(|c| (c.name, c.kind)).collect();
    assert_eq!(
        kinds,
        [
            ("kernel_max", Kind::Maximum),
            ("nested_exits", Kind::Sum),
            (
                "kernel_histogram",
                Kind::Histogram {
                    parts_power: 1,
                    first_power: 6
                }
            ),
            ("halted", Kind::Sum),
            ("waiting", Kind::Sum),
        ]
    );
    let hlt = snapshot.vcpus().nth(1).unwrap().rows().next().unwrap();
    let histogram = hlt.histogram().unwrap();
    assert_eq!((hlt.reason(), hlt.max()), (Reason::Code(12), Some(41_000)));
    assert_eq!(
        (histogram[bucket(2_900)], histogram[bucket(41_000)]),
        (400, 10)
    );
    assert_eq!((hlt.exits(), hlt.nested_exits()), (410, Some(205)));
    assert!(hlt.numbers(&counters[7]).eq([205]));
    assert!(hlt.numbers(&counters[8]).eq(histogram));
    let totals: Vec<_> = snapshot.totals().map(|row| row.nested_exits()).collect();
    assert_eq!(totals, [Some(501), Some(0), Some(0)]);
    // 2457 and 39321 stand for [2048, 3072) and [32768, 49152).
    let quantiles = [50, 97, 98].map(|percent| quantile(&histogram, 41_000, percent));
    assert_eq!(quantiles, [Some(2_457), Some(2_457), Some(39_321)]);
}

/// Check that versions before 1.2 return `None` for what they lack, instead of 0.
fn has_nothing_of_1_2(snapshot: &Snapshot<'_>) {
    assert_eq!(snapshot.life(), snapshot.loaded());
    assert!(!snapshot.separates_waits());
    assert_eq!(snapshot.departed_polled(), None);
    assert!(snapshot.vcpus().all(|vcpu| vcpu.polled().is_none()));
    let rows = || snapshot.vcpus().flat_map(|vcpu| vcpu.rows());
    assert!(rows().all(|row| row.cycles(Phase::Waiting) == 0));
    // Both kinds of sleep as one.
    let blocked = snapshot
        .counters()
        .find(|counter| counter.name == "blocked");
    let blocked = blocked.unwrap();
    let slept = 300 * 4_000_000 + 410 * 9_000_000;
    let sums = [
        rows().map(|row| row.cycles(Phase::Halted)).sum::<u64>(),
        rows().flat_map(|row| row.numbers(&blocked)).sum::<u64>(),
    ];
    assert_eq!(sums, [slept, slept]);
}

#[test]
fn saved_version_1_1_reads_back() {
    let snapshot = Snapshot::parse(SAVED_1_1).unwrap();
    assert_eq!(snapshot.version(), (1, 1));
    assert_eq!(snapshot.counters().count(), 9);
    reads_back(&snapshot);
    has_nothing_of_1_2(&snapshot);
    let rows = || snapshot.vcpus().flat_map(|vcpu| vcpu.rows());
    assert!(rows().all(|row| row.max().is_some() && row.histogram().is_some()));
}

#[test]
fn saved_version_1_0_reads_back() {
    let snapshot = Snapshot::parse(SAVED_1_0).unwrap();
    assert_eq!(snapshot.version(), (1, 0));
    assert_eq!(snapshot.counters().count(), 6);
    reads_back(&snapshot);
    has_nothing_of_1_2(&snapshot);
    let rows = || snapshot.vcpus().flat_map(|vcpu| vcpu.rows());
    assert_eq!(rows().count(), 9 + 3 + 1);
    assert!(rows().all(|row| row.max().is_none() && row.histogram().is_none()));
    assert!(rows().all(|row| row.nested_exits().is_none()));
}

/// A counter of version 1.1 or later with another unit, kind or size is not taken for ours.
#[test]
fn other_buckets_are_not_read_as_ours() {
    let max = 160 + 6 * 64;
    let nested = max + 64;
    let histogram = nested + 64;
    let reads_with = |offset: usize, byte: u8| {
        let mut bytes = SAVED.to_vec();
        bytes[offset] = byte;
        let snapshot = Snapshot::parse(&bytes).unwrap();
        let row = snapshot.totals().next().unwrap();
        (
            row.max().is_some(),
            row.nested_exits().is_some(),
            row.histogram().is_some(),
        )
    };
    assert_eq!(reads_with(histogram + 4, 2), (true, true, true));
    // Its unit, kind, parts, first power, length and name.
    for (place, byte) in [(0, 1), (4, 4), (5, 2), (6, 5), (12, 63), (16, b'q')] {
        let known = reads_with(histogram + place, byte);
        assert_eq!(known, (true, true, false), "{place}");
    }
    for (place, byte) in [(0, 1), (4, 1), (12, 2), (16, b'q')] {
        assert_eq!(
            reads_with(max + place, byte),
            (false, true, true),
            "{place}"
        );
    }
    for (place, byte) in [(0, 2), (4, 3), (12, 2), (16, b'q')] {
        let known = reads_with(nested + place, byte);
        assert_eq!(known, (true, false, true), "{place}");
    }
    // Without one of the two, only the sum of both kinds of sleep is read.
    for sleep in [histogram + 64, histogram + 128] {
        for (place, byte) in [(0, 1), (4, 3), (12, 2), (16, b'q')] {
            let mut bytes = SAVED.to_vec();
            bytes[sleep + place] = byte;
            if place == 12 {
                // Two numbers, so that they lie inside of the row.
                bytes[sleep + 8] -= 8;
            }
            let snapshot = Snapshot::parse(&bytes).unwrap();
            let rows = || snapshot.vcpus().flat_map(|vcpu| vcpu.rows());
            assert!(!snapshot.separates_waits());
            assert!(rows().all(|row| row.cycles(Phase::Waiting) == 0));
            let slept = rows().map(|row| row.cycles(Phase::Halted)).sum::<u64>();
            assert_eq!(slept, 300 * 4_000_000 + 410 * 9_000_000 + 9 * 2_000_000);
        }
    }
}

#[test]
fn snapshot_of_a_real_module_reads_back() {
    let snapshot = Snapshot::parse(FROM_AMD).unwrap();
    assert_eq!(snapshot.bytes().len(), FROM_AMD.len());
    assert_eq!(snapshot.isa(), Isa::Svm);
    assert!(snapshot.loaded() < snapshot.now() && snapshot.tsc_khz() > Some(1_000_000));
    let vcpus: Vec<_> = snapshot.vcpus().collect();
    assert_eq!(vcpus.len(), 1);
    assert_eq!((vcpus[0].name(), vcpus[0].pid()), ("kvm-97", 97));
    assert_eq!(vcpus[0].phase(), Some(Phase::User));
    assert_eq!(vcpus[0].latest(), Some(Reason::Code(0x7b)));
    assert!(vcpus[0].balances());
    let cpuid = snapshot
        .totals()
        .find(|row| row.reason() == Reason::Code(0x72));
    assert_eq!(cpuid.map(|row| row.exits()), Some(100));
    assert_eq!((snapshot.departed(), snapshot.unmetered()), (1, 0));
}

#[test]
fn any_buffer_size_is_safe_and_measured() {
    let sample = Sample::new(1000);
    let bytes = sample.bytes();
    let needed = bytes.len();
    // The tables come last.
    let before_tables = size_for(3, 9 + 3 + 1 + 3) as u64;
    assert_eq!(bytes[128..136], before_tables.to_le_bytes());
    for size in (0..needed).step_by(STEP) {
        assert_eq!(
            sample.write(&mut vec![0; size]),
            Err(BufferTooSmall { needed })
        );
    }
    let mut roomy = vec![0xaa; needed + 100];
    assert_eq!(sample.write(&mut roomy), Ok(needed));
    assert!(roomy[..needed] == *bytes);
    assert_eq!(Snapshot::parse(&roomy).unwrap().bytes(), bytes);
}

/// A snapshot as a later minor version could write it: everything is larger, a histogram stands
/// before the known counters, and a row has an unknown kind.
fn later() -> Vec<u8> {
    const HEADER: usize = 192;
    const DESCRIPTOR: usize = 80;
    const HEAD: usize = 120;
    const ROW: usize = 8 + 8 * (64 + 6);
    const TABLES_HEAD: usize = 40;
    fn u32s(bytes: &mut [u8], at: usize, values: &[u32]) {
        for (place, value) in values.iter().enumerate() {
            bytes[at + 4 * place..][..4].copy_from_slice(&value.to_le_bytes());
        }
    }
    fn u64s(bytes: &mut [u8], at: usize, values: &[u64]) {
        for (place, value) in values.iter().enumerate() {
            bytes[at + 8 * place..][..8].copy_from_slice(&value.to_le_bytes());
        }
    }
    let records = HEADER + 7 * DESCRIPTOR;
    let record = HEAD + 2 * ROW + 16;
    let totals = records + record;
    let columns = totals + HEAD;
    let tables = columns + 3 * DESCRIPTOR;
    let size = tables + TABLES_HEAD + 16 + 48 + 16 + 2 * 64 + 8;
    let mut bytes = vec![0xee; size];
    bytes[..8].copy_from_slice(b"ExitMetr");
    bytes[8..12].copy_from_slice(&[1, 0, 9, 0]);
    u32s(&mut bytes, 12, &[HEADER as u32]);
    u64s(&mut bytes, 16, &[size as u64]);
    u32s(&mut bytes, 24, &[0, 2]);
    u64s(&mut bytes, 32, &[5, 6]);
    u32s(&mut bytes, 48, &[0, 2040]);
    u64s(&mut bytes, 56, &[0, 0, HEADER as u64]);
    u32s(&mut bytes, 80, &[7, DESCRIPTOR as u32]);
    u64s(&mut bytes, 88, &[records as u64]);
    u32s(&mut bytes, 96, &[1, HEAD as u32]);
    u64s(&mut bytes, 104, &[totals as u64]);
    u32s(&mut bytes, 112, &[ROW as u32]);
    u64s(&mut bytes, 128, &[columns as u64]);
    u32s(&mut bytes, 136, &[3, 0]);
    u64s(&mut bytes, 144, &[tables as u64]);
    u32s(&mut bytes, 152, &[1, TABLES_HEAD as u32]);
    let names = [
        "kernel_histogram",
        "exits",
        "guest",
        "kernel",
        "user",
        "blocked",
        "preempted",
    ];
    for (place, name) in names.into_iter().enumerate() {
        let at = HEADER + place * DESCRIPTOR;
        let offset = if place == 0 { 8 } else { 8 * (64 + place) };
        let (kind, len) = if place == 0 { (2, 64) } else { (1, 1) };
        u32s(&mut bytes, at, &[2, kind, offset as u32, len]);
        bytes[at + 16..][..48].fill(0);
        bytes[at + 16..][..name.len()].copy_from_slice(name.as_bytes());
    }
    u32s(&mut bytes, records, &[record as u32, 2]);
    u64s(&mut bytes, records + 24, &[100, 121]);
    bytes[records + 56..][..48].copy_from_slice(&[b'x'; 48]);
    let rows = records + HEAD;
    u32s(&mut bytes, rows, &[7, 3]);
    u32s(&mut bytes, rows + ROW, &[0, 0x72]);
    u64s(&mut bytes, rows + ROW + 8, &(100..164).collect::<Vec<_>>());
    u64s(&mut bytes, rows + ROW + 8 * 65, &[1, 2, 3, 4, 5, 7]);
    u32s(&mut bytes, totals, &[HEAD as u32, 0]);

    // Columns: one of an unknown table, an unknown one, and exits.
    for (place, (table, name)) in [(9, "exits"), (2, "joules"), (2, "exits")]
        .into_iter()
        .enumerate()
    {
        let at = columns + place * DESCRIPTOR;
        u32s(
            &mut bytes,
            at,
            &[1, 1 | table << 24, 24 + 8 * place as u32, 1],
        );
        bytes[at + 16..][..48].fill(0);
        bytes[at + 16..][..name.len()].copy_from_slice(name.as_bytes());
    }
    u32s(&mut bytes, tables, &[(size - tables) as u32, 0]);
    u64s(&mut bytes, tables + 8, &[77]);
    u32s(&mut bytes, tables + 16, &[2, 0]);
    let other = tables + TABLES_HEAD;
    u32s(&mut bytes, other, &[9, 16 + 48, 48, 1]);
    let code = other + 16 + 48;
    u32s(&mut bytes, code, &[2, 16 + 2 * 64 + 8, 64, 2]);
    u32s(&mut bytes, code + 16, &[8, 8]);
    u32s(&mut bytes, code + 16 + 64, &[0, 0x72, 0, 0]);
    u64s(&mut bytes, code + 16 + 64 + 16, &[0x1234, 1, 2, 3]);
    bytes
}

#[test]
fn additions_of_a_later_version_are_skipped() {
    let bytes = later();
    let snapshot = Snapshot::parse(&bytes).unwrap();
    assert_eq!(snapshot.version(), (1, 9));
    assert_eq!(
        (snapshot.leaf_map(), snapshot.tsc_khz(), snapshot.isa()),
        (None, None, Isa::Svm)
    );
    let vcpu = snapshot.vcpus().next().unwrap();
    assert_eq!(vcpu.name(), "x".repeat(48));
    assert_eq!((vcpu.phase(), vcpu.latest()), (None, None));
    let rows: Vec<_> = vcpu.rows().collect();
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].reason(), rows[0].exits()), (Reason::Code(0x72), 1));
    assert_eq!(
        Phase::ALL.map(|phase| rows[0].cycles(phase)),
        [2, 3, 4, 5, 7, 0]
    );
    assert!(!snapshot.separates_waits());
    // The header is larger than ours; version 1.2's fields stand there now.
    assert_eq!(vcpu.polled(), Some(0xeeee_eeee_eeee_eeee));
    assert!(vcpu.balances());
    let histogram = snapshot.counters().next().unwrap();
    assert_eq!(
        (histogram.kind, histogram.unit),
        (
            Kind::Histogram {
                parts_power: 0,
                first_power: 0
            },
            Unit::Ticks
        )
    );
    assert_eq!((rows[0].max(), rows[0].histogram()), (None, None));
    assert_eq!(rows[0].nested_exits(), None);
    assert!(rows[0].numbers(&histogram).eq(100..164));
    assert_eq!(snapshot.totals().count(), 0);

    let tables: Vec<_> = snapshot.tables().collect();
    assert_eq!((tables.len(), tables[0].vcpu, tables[0].since), (1, 0, 77));
    assert!(tables[0].has(9) && tables[0].has(TABLE_CODE) && !tables[0].has(TABLE_DETAILS));
    let entries: Vec<_> = tables[0].entries().collect();
    let expected = TableRow {
        table: TABLE_CODE,
        reason: Reason::Code(0x72),
        detail_kind: 0,
        nested: false,
        others: false,
        key: 0x1234,
        exits: 3,
        kernel: None,
        user: None,
        missed: Missed::default(),
    };
    assert_eq!(entries, [expected]);
}

/// Sums over all exits, and the fields that distinguish entries.
#[test]
fn tables_read_back() {
    let snapshot = Snapshot::parse(SAVED).unwrap();
    assert!(snapshot.has_tables());
    assert_eq!(snapshot.without_tables(), 1);
    let tables: Vec<_> = snapshot.tables().collect();
    let who: Vec<_> = tables.iter().map(|it| (it.vcpu, it.no_rip)).collect();
    // The third one has not had an exit.
    assert_eq!(who.len(), 2);
    assert!(who.contains(&(0, false)) && who.contains(&(1, true)));
    for tables in &tables {
        let vcpu = snapshot.vcpus().nth(tables.vcpu).unwrap();
        let begun = vcpu.first() + 2_009_000 + 40_000;
        assert_eq!(tables.since, begun);
        for row in vcpu.rows().filter(|row| row.reason() != Reason::Start) {
            for table in [TABLE_DETAILS, TABLE_CODE] {
                let entries = tables
                    .entries()
                    .filter(|entry| (entry.table, entry.reason) == (table, row.reason()));
                let mut sums = [0; 3];
                for entry in entries {
                    assert_eq!(entry.missed, Missed::default());
                    sums[0] += entry.exits;
                    sums[1] += entry.kernel.unwrap();
                    sums[2] += entry.user.unwrap_or(0);
                }
                let user = row.cycles(Phase::User);
                let user = if table == TABLE_CODE { 0 } else { user };
                assert_eq!(sums, [row.exits(), row.cycles(Phase::Kernel), user]);
            }
        }
    }
    let first = tables.iter().find(|it| it.vcpu == 0).unwrap();
    let of = |table, code| -> Vec<_> {
        let of_table = first.entries().filter(|entry| entry.table == table);
        let of_reason = of_table.filter(|entry| entry.reason == Reason::Code(code));
        of_reason
            .map(|entry| (entry.key, entry.nested, entry.others, entry.exits))
            .collect()
    };
    // Exits without a detail all belong to the others.
    assert_eq!(of(TABLE_DETAILS, 1), [(0, false, true, 5191)]);
    let mut msrs = of(TABLE_DETAILS, 32);
    msrs.sort_unstable();
    assert_eq!(
        msrs,
        [
            (1 << 32 | 0x2000, false, false, 1549),
            (1 << 32 | 0x2001, false, false, 1548),
            (1 << 32 | 0x2002, false, false, 1548)
        ]
    );
    // CPUID: each second one comes from a nested guest.
    let mut code = of(TABLE_CODE, 10);
    code.sort_unstable();
    assert_eq!(
        code,
        [
            (0xffff_ffff_8100_0000, false, false, 434),
            (0xffff_ffff_8100_0001, true, false, 434)
        ]
    );
    assert_eq!(of(TABLE_USER, 30), [(2, false, false, 974)]);
    let user = first
        .entries()
        .find(|entry| entry.table == TABLE_USER)
        .unwrap();
    assert_eq!((user.user, user.kernel), (Some(974 * 21_000), None));
    let msr = first
        .entries()
        .find(|entry| entry.reason == Reason::Code(32))
        .unwrap();
    assert_eq!(msr.detail_kind, 2);
}

/// The slowest exits, and the ones before an exit that was too slow.
#[test]
fn slow_exits_read_back() {
    let snapshot = Snapshot::parse(SAVED).unwrap();
    let tables: Vec<_> = snapshot.tables().collect();
    let first = tables.iter().find(|it| it.vcpu == 0).unwrap();
    let vcpu = snapshot.vcpus().next().unwrap();
    assert!(first.is_frozen);
    assert_eq!(first.window_begun, Some(first.since));
    let (slowest, ring): (Vec<_>, Vec<_>) =
        first.slow().partition(|exit| exit.table == TABLE_SLOWEST);
    assert_eq!((slowest.len(), ring.len()), (16, 64));
    assert!(ring.iter().all(|exit| exit.table == TABLE_RING));
    // 9 waits, and 7 preempted exits.
    let waits: Vec<_> = slowest
        .iter()
        .filter(|exit| exit.reason == Reason::Code(48))
        .collect();
    assert_eq!(waits.len(), 9);
    for exit in &waits {
        assert_eq!(
            (exit.length(), exit.ticks(Phase::Waiting)),
            (2_009_800, 2_000_000)
        );
        assert_eq!((exit.scheduled_out, exit.user_exit), (1, None));
        // The first one moved to another CPU, and those after it stayed there.
        assert!(matches!(exit.cpus, [Some(3 | 5), Some(5)]));
        assert!(!exit.is_culprit && !exit.is_previous && !exit.nested);
    }
    assert!(slowest
        .iter()
        .filter(|exit| exit.reason != Reason::Code(48))
        .all(|exit| exit.reason == Reason::Code(7) && exit.ticks(Phase::Preempted) == 310_000));
    // The ring: up to the first wait, after faults that the kernel handled.
    let (culprit, before) = ring.split_last().unwrap();
    assert!(culprit.is_culprit && culprit.reason == Reason::Code(48));
    assert_eq!(culprit.sequence, 5191 + 4645 + 974 + 868 + 480);
    assert_eq!(culprit.length(), 2_009_800);
    assert_eq!(
        (culprit.detail_kind, culprit.rip),
        (4, Some(0xffff_ffff_8100_0000))
    );
    for (place, exit) in before.iter().enumerate() {
        assert!(!exit.is_culprit && exit.reason == Reason::Code(48));
        assert_eq!(exit.sequence + 63 - place as u64, culprit.sequence);
        assert_eq!(culprit.time - exit.time, (63 - place as u64) * 49_800);
        assert_eq!((exit.length(), exit.ticks(Phase::Kernel)), (9_800, 9_800));
        assert_eq!(exit.cpus, [Some(3), Some(3)]);
    }
    // For the second vCPU, which slept only by its own wish; its registers are encrypted.
    let second = tables.iter().find(|it| it.vcpu == 1).unwrap();
    assert!(!second.is_frozen);
    assert!(second.slow().all(|exit| exit.rip.is_none()));
    let lengths: Vec<_> = second
        .slow()
        .filter(|exit| exit.table == TABLE_SLOWEST)
        .map(|exit| exit.length())
        .collect();
    assert_eq!(
        lengths.iter().filter(|length| **length == 41_000).count(),
        10
    );
    let latest = second.slow().last().unwrap();
    assert_eq!(latest.ticks(Phase::Halted), 9_000_000);
    assert_eq!(
        latest.time + 9_041_000,
        snapshot.vcpus().nth(1).unwrap().last()
    );
    assert!(vcpu.last() > culprit.time);
}

/// A reader without permission for the guest's code gets all else.
#[test]
fn code_is_left_out_without_permission() {
    let sample = Sample::new(100);
    let mut bytes = vec![0; sample.bytes().len()];
    let mut encoder = Encoder::new(&mut bytes, HOST);
    let (identity, copy, tables) = &sample.vcpus[0];
    encoder.vcpu(identity, copy);
    encoder.tables(copy, tables, false);
    let size = encoder.finish(&sample.gone, 0).unwrap();
    let snapshot = Snapshot::parse(&bytes[..size]).unwrap();
    let tables = snapshot.tables().next().unwrap();
    assert!(tables.has(TABLE_DETAILS) && tables.has(TABLE_USER) && !tables.has(TABLE_CODE));
    assert!(tables.entries().all(|entry| entry.key < 1 << 40));
    assert!(tables.slow().count() > 16);
    assert!(tables.slow().all(|exit| exit.rip.is_none()));
    let rip = 0xffff_ffff_8100_0000_u64.to_le_bytes();
    assert!(!bytes[..size].windows(8).any(|word| word[2..] == rip[2..]));
}

/// Read all that can be read.
fn read_all(bytes: &[u8]) -> Result<u64, Error> {
    let snapshot = Snapshot::parse(bytes)?;
    let mut sum = snapshot.now() ^ snapshot.departed() ^ snapshot.unmetered();
    sum ^= snapshot.life() ^ snapshot.departed_polled().unwrap_or(0);
    let mut add = |value: u64| sum = sum.wrapping_add(value);
    let counters: Vec<_> = snapshot.counters().collect();
    for vcpu in snapshot.vcpus() {
        add(vcpu.vm() ^ vcpu.first() ^ u64::from(vcpu.pid() ^ vcpu.id()));
        add(vcpu.name().len() as u64 + u64::from(vcpu.balances()));
        add(vcpu.phase().map_or(0, |phase| phase as u64));
        add(u64::from(vcpu.latest().is_some()));
        add(vcpu.polled().unwrap_or(0));
    }
    for row in snapshot
        .totals()
        .chain(snapshot.vcpus().flat_map(|vcpu| vcpu.rows()))
    {
        add(row.exits());
        add(row.max().unwrap_or(0));
        add(row.nested_exits().unwrap_or(0));
        add(row.histogram().map_or(0, |buckets| buckets[0]));
        for phase in Phase::ALL {
            add(row.cycles(phase));
        }
        for counter in &counters {
            row.numbers(counter).for_each(&mut add);
        }
    }
    for tables in snapshot.tables() {
        add(tables.vcpu as u64 ^ tables.since ^ u64::from(tables.no_rip));
        for entry in tables.entries() {
            add(entry.key ^ entry.exits ^ entry.kernel.unwrap_or(0) ^ entry.user.unwrap_or(0));
            add(entry.missed.exits ^ entry.missed.kernel ^ entry.missed.user);
        }
        add(u64::from(tables.is_frozen) ^ tables.window_begun.unwrap_or(0));
        for exit in tables.slow() {
            add(exit.length() ^ exit.time ^ exit.sequence ^ exit.rip.unwrap_or(0));
            add(exit.detail ^ exit.scheduled_out ^ exit.user_exit.unwrap_or(0));
            exit.cpus.into_iter().flatten().for_each(&mut add);
        }
    }
    Ok(sum)
}

#[test]
fn truncation_is_reported() {
    for size in (0..SAVED.len()).step_by(STEP) {
        let error = read_all(&SAVED[..size]).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { found, .. } if found == size as u64),
            "{size}: {error}"
        );
    }
}

#[test]
fn errors_are_sentences() {
    let with = |offset: usize, bytes: &[u8]| {
        let mut changed = SAVED.to_vec();
        changed[offset..offset + bytes.len()].copy_from_slice(bytes);
        read_all(&changed).unwrap_err().to_string()
    };
    assert_eq!(
        read_all(&SAVED[..1000]).unwrap_err().to_string(),
        format!(
            "the snapshot is truncated: it has 1000 bytes and should have {}",
            SAVED.len()
        )
    );
    assert_eq!(
        read_all(b"#!/bin/sh").unwrap_err().to_string(),
        "this is not a snapshot of exitmeter"
    );
    assert_eq!(
        with(8, &[2, 0, 5, 0]),
        "the snapshot has version 2.5, this tool reads version 1: \
         use the tool that came with the module"
    );
    assert_eq!(
        with(28, &[9]),
        "the snapshot names an unknown instruction set extension, 9"
    );
    let damaged = |what| format!("the snapshot is damaged: {what}");
    assert_eq!(with(12, &[127]), damaged("its header is too small"));
    assert_eq!(with(75, &[1]), damaged("its descriptors lie outside of it"));
    assert_eq!(with(84, &[0]), damaged("its descriptors lie outside of it"));
    assert_eq!(
        with(100, &[8]),
        damaged("its records or rows are too small")
    );
    assert_eq!(
        with(160 + 8, &[81, 2]),
        damaged("a counter lies outside of its row")
    );
    for (offset, byte) in [(90, 1), (97, 1), (106, 1), (864, 0), (866, 1), (868, 10)] {
        assert_eq!(
            with(offset, &[byte]),
            damaged("a record lies outside of it"),
            "{offset}"
        );
    }
    assert_eq!(
        with(160 + 64 + 16, b"q"),
        "the snapshot lacks the counter 'guest'"
    );
}

proptest! {
    // PROPTEST_CASES sets Miri's number, as for all other tests.
    #![proptest_config(match cfg!(miri) {
        true => ProptestConfig::default(),
        false => ProptestConfig::with_cases(4000),
    })]

    #[test]
    fn reader_survives_damaged_bytes(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        later_version in any::<bool>(),
        place in 0..3,
    ) {
        let mut bytes = if later_version { later() } else { SAVED.to_vec() };
        // Mostly at offsets and sizes: at the start, and in the tables.
        let (from, reach) = match place {
            0 => (0, bytes.len()),
            1 => (0, 960),
            _ => {
                let tables = u64::from_le_bytes(*bytes[144..].first_chunk().unwrap()) as usize;
                // The columns, and the start of the tables.
                let from = tables - 3 * 64;
                (from, (bytes.len() - from).min(4000))
            }
        };
        for (place, byte) in damage {
            bytes[from + place.index(reach)] = byte;
        }
        let _ = read_all(&bytes);
    }

    #[test]
    fn reader_survives_any_bytes(tail in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = read_all(&tail);
        let mut bytes = SAVED[..160].to_vec();
        bytes.extend_from_slice(&tail);
        bytes[16..24].copy_from_slice(&(160 + tail.len() as u64).to_le_bytes());
        let _ = read_all(&bytes);
    }

    #[test]
    fn any_ledgers_read_back(
        lives in proptest::collection::vec(
            proptest::collection::vec((0..Slot::START.index(), 0_u64..1 << 50, 0_u32..6), 0..EXITS),
            0..VCPUS,
        ),
        isa in prop_oneof![Just(Isa::Vmx), Just(Isa::Svm)],
    ) {
        let mut copies = Vec::new();
        let mut totals = Totals::new();
        for life in &lives {
            let (ledger, mut now) = (ledger(), 7);
            ledger.begin(now, Phase::Kernel);
            for &(slot, ticks, phase) in life {
                now += ticks;
                let slot = Slot::from_index(slot).unwrap();
                if ticks % 5 == 0 {
                    ledger.exit_from_nested(now, slot);
                } else {
                    ledger.exit(now, slot);
                }
                ledger.leave(now + 1, Phase::from_number(phase).unwrap());
                if ticks % 3 != 0 {
                    ledger.resume(now + 2);
                    now += ticks / 2;
                    ledger.entry(now);
                }
            }
            copies.push(copy(&ledger));
            totals.fold(copies.last().unwrap());
        }
        let mut bytes = vec![0; size_for(8, 9 * reasons::SLOTS)];
        let mut encoder = Encoder::new(&mut bytes, HostHeader { isa, ..HOST });
        for (number, copy) in copies.iter().enumerate() {
            encoder.vcpu(&identity(number as u64, 1, number as u32), copy);
        }
        let size = encoder.finish(&totals, 0).unwrap();

        let snapshot = Snapshot::parse(&bytes[..size]).unwrap();
        prop_assert_eq!(snapshot.vcpus().count(), copies.len());
        prop_assert_eq!(snapshot.departed(), copies.len() as u64);
        for (number, (vcpu, copy)) in snapshot.vcpus().zip(&copies).enumerate() {
            prop_assert_eq!(vcpu.vm(), number as u64);
            prop_assert_eq!((vcpu.first(), vcpu.last()), (copy.first, copy.last));
            prop_assert_eq!(vcpu.phase(), Some(copy.phase()));
            prop_assert_eq!(vcpu.latest(), Some(Reason::of(isa, copy.slot())));
            prop_assert!(vcpu.balances());
            prop_assert_eq!(vcpu.rows().count(), copy.rows().count());
            for (row, (slot, numbers, histogram)) in vcpu.rows().zip(copy.rows()) {
                prop_assert_eq!(row.reason(), Reason::of(isa, slot));
                prop_assert_eq!(row.exits(), numbers.exits);
                prop_assert_eq!(row.nested_exits(), Some(numbers.nested_exits));
                prop_assert_eq!(Phase::ALL.map(|phase| row.cycles(phase)), numbers.cycles);
                prop_assert_eq!(row.max(), Some(numbers.max));
                prop_assert_eq!(row.histogram(), Some(*histogram));
            }
        }
        let exits = |rows: &mut dyn Iterator<Item = u64>| rows.sum::<u64>();
        prop_assert_eq!(
            exits(&mut snapshot.totals().map(|row| row.exits())),
            exits(&mut totals.rows().map(|(_, row, _)| row.exits))
        );
        let nested = lives.iter().flatten().filter(|(_, ticks, _)| ticks % 5 == 0).count();
        prop_assert_eq!(
            exits(&mut snapshot.totals().filter_map(|row| row.nested_exits())),
            nested as u64
        );
        // The totals have each sample of the vCPUs once, and the maximum of all.
        let samples = |histogram: Option<Buckets>| histogram.unwrap().iter().sum::<u64>();
        let rows = || snapshot.vcpus().flat_map(|vcpu| vcpu.rows());
        prop_assert_eq!(
            rows().map(|row| samples(row.histogram())).sum::<u64>(),
            snapshot.totals().map(|row| samples(row.histogram())).sum::<u64>()
        );
        prop_assert_eq!(
            rows().filter_map(|row| row.max()).max().unwrap_or(0),
            snapshot.totals().filter_map(|row| row.max()).max().unwrap_or(0)
        );
    }
}

/// docs/interface.md lists each counter with its place in a row, and the module's documentation
/// names each.
#[test]
fn documentation_has_the_counters() {
    let page = include_str!("../../../docs/interface.md");
    let source = include_str!("../snapshot.rs");
    let snapshot = Snapshot::parse(SAVED).unwrap();
    let mut offset = 8;
    for counter in snapshot.counters() {
        let unit = match counter.unit {
            Unit::Events => "events",
            Unit::Ticks => "TSC ticks",
            unit => panic!("{unit:?}"),
        };
        let kind = match counter.kind {
            Kind::Sum => "sum",
            Kind::Maximum => "maximum",
            Kind::Histogram { .. } => "histogram",
            kind => panic!("{kind:?}"),
        };
        let (name, len) = (counter.name, counter.len);
        let line = format!("\n| `{name}` | {unit} | {kind} | {offset} | {len} | 1.");
        assert!(page.contains(&line), "{line}");
        offset += 8 * len;
        let mut documentation = source.lines().filter(|line| line.starts_with("//!"));
        assert!(
            documentation.any(|line| line.contains(&format!("`{name}`"))),
            "{name}"
        );
    }
    let version = format!("minor version, {MINOR}: ");
    assert!(page.contains(&version) && source.contains(&version));
}

/// docs/interface.md has the same tables as the module's documentation.
#[test]
fn documentation_has_the_tables_of_the_source() {
    let page = include_str!("../../../docs/interface.md");
    let source = include_str!("../snapshot.rs");
    let lines: Vec<_> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//! |"))
        .collect();
    assert!(lines.len() > 50);
    for line in lines {
        assert!(page.contains(&format!("\n|{line}\n")), "{line}");
    }
}
