// SPDX-License-Identifier: GPL-2.0

//! Measures how cost grows with the number of vCPUs, from 1 to 4096: an exit with its entry, the
//! look-up of a vCPU that is not in its CPU's cache, and a snapshot.
//!
//! This runs the module's code in user space: `cargo bench -p bench`. The vCPUs take turns, so with
//! many of them their ledgers no longer fit into the processor's caches. Cache misses make the
//! cost grow; the number of instructions stays the same.

#![expect(missing_docs, reason = "criterion's macros make functions without any")]

use std::{hint::black_box, time::Duration};

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use exitmeter_meter::{
    hash_table::{HashEntry, HashTable},
    leaves::LeafMap,
    ledger::{Ledger, LedgerCopy, Totals, TRIES},
    phase::Phase,
    reasons::{slot, Isa},
    snapshot::{size_for, Encoder, HostHeader, Identity, NAME_SIZE},
};

const COUNTS: [usize; 4] = [1, 16, 256, 4096];

/// Distance between vCPUs in memory, in bytes: two pages, as struct vcpu_vmx is larger than one.
const VCPU_STRIDE: usize = 8192;

/// Exit reasons that a Linux guest causes most.
const REASONS: [u32; 4] = [1, 10, 30, 48];

fn ledgers(count: usize) -> Vec<Box<Ledger>> {
    let make = |_| {
        // SAFETY: All-zero bytes are a valid ledger, as `Ledger` promises.
        let ledger: Box<Ledger> = Box::new(unsafe { std::mem::zeroed() });
        ledger.begin(0, Phase::Kernel);
        ledger.entry(1);
        ledger
    };
    (0..count).map(make).collect()
}

/// Measure an exit and the entry after it. The vCPUs take turns.
fn exit_and_entry(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("exit and entry");
    for count in COUNTS {
        let ledgers = ledgers(count);
        let (mut turn, mut now) = (0, 1_u64);
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| {
                turn = (turn + 1) % count;
                now += 3000;
                let reason = REASONS[turn % REASONS.len()];
                ledgers[turn].exit(now, slot(Isa::Vmx, black_box(reason)));
                ledgers[turn].entry(now + 1000);
            })
        });
    }
}

/// Measure the look-up in a hash table that has room for 4096 vCPUs.
fn look_up(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("look-up");
    for count in COUNTS {
        let entries: Vec<HashEntry> = (0..4 * 4096).map(|_| HashEntry::default()).collect();
        let table = HashTable::new(&entries);
        let key = |number: usize| 0xffff_8880_0000_0000 + number * VCPU_STRIDE;
        for number in 0..count {
            table
                .insert(key(number), number + 2)
                .expect("there is room");
        }
        let mut turn = 0;
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| {
                turn = (turn + 1) % count;
                table.get(black_box(key(turn)))
            })
        });
    }
}

/// Measure a snapshot of vCPUs with four reasons each.
fn snapshot(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snapshot");
    group.measurement_time(Duration::from_secs(3));
    for count in COUNTS {
        let ledgers = ledgers(count);
        for ledger in &ledgers {
            for (now, reason) in (0..).zip(REASONS) {
                ledger.exit(10 + now * 3000, slot(Isa::Vmx, reason));
                ledger.entry(1000 + now * 3000);
            }
        }
        let identity = Identity {
            vm: 1,
            name: [b'x'; NAME_SIZE],
            pid: 1,
            vcpu: 0,
        };
        let host = || HostHeader {
            isa: Isa::Vmx,
            leaf_map: LeafMap::Map2021,
            host_scope: false,
            by_bpf: false,
            tsc_khz: 3_000_000,
            tsc_stable: true,
            loaded: 0,
            now: 1,
            clock_offset: 0,
            life: 1,
        };
        let mut copy = Box::new(LedgerCopy::new());
        let gone = Box::new(Totals::new());
        let mut buffer = vec![0; size_for(count + 1, 5 * count)];
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| {
                let mut encoder = Encoder::new(&mut buffer, host());
                for ledger in &ledgers {
                    ledger.copy(TRIES, &mut copy).expect("nobody writes it");
                    encoder.vcpu(&identity, &copy);
                }
                encoder
                    .finish(&gone, 0)
                    .expect("the buffer is large enough")
            })
        });
    }
}

criterion_group!(vcpus, exit_and_entry, look_up, snapshot);
criterion_main!(vcpus);
