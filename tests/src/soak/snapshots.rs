// SPDX-License-Identifier: GPL-2.0

//! Snapshots taken as fast as possible while vCPUs run.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use tiny_guests::{Config, Mode, Program, TinyVm, MAX_LONG_VCPUS};

use super::{raise_file_limit, repeat_until, run_until, scaled};
use crate::{
    cases::Case,
    host::{
        self, codes,
        meter::{read_device, MeterSnapshot, MeteredVcpu},
        task,
    },
};

/// Length of a case, in seconds.
const SECONDS: u64 = 60;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "log_queries=0",
            "soak: in snapshots of 4 running vCPUs each ledger balances, and no number falls",
            || beside_vcpus(Duration::from_secs(scaled(SECONDS))),
        )
        .within(600),
        Case::with_module(
            "log_queries=0",
            "soak: snapshots while vCPUs come and go lose no number, and count none twice",
            || beside_churn(Duration::from_secs(scaled(SECONDS))),
        )
        .within(600),
        Case::with_module(
            "log_queries=0",
            "soak: a snapshot of 4096 vCPUs",
            of_4096_vcpus,
        )
        .within(600),
    ]
}

/// Check that the sum of live and departed vCPUs' exits never falls between snapshots. It would fall if a
/// vCPU were in the records and in the totals in one snapshot, or in neither in a later one.
fn beside_churn(time: Duration) -> Result<()> {
    // There are more vCPUs than a snapshot copies at a time, so others come and go while it is taken.
    let _resting = (0..4)
        .map(|_| {
            let mut machine = TinyVm::new(Config {
                vcpus: 15,
                ..Config::new(Program::OutUser, Mode::Long, 5)
            })?;
            machine.run()?;
            anyhow::Ok(machine)
        })
        .collect::<Result<Vec<_>>>()?;
    let done = AtomicBool::new(false);
    let (mut snapshots, mut vms) = (0_u64, 0_u64);
    thread::scope(|scope| {
        let churn = scope.spawn(|| -> Result<u64> {
            let mut vms = 0;
            repeat_until(&done, || {
                let some = |program| {
                    TinyVm::new(Config {
                        vcpus: 4,
                        ..Config::new(program, Mode::Long, 20)
                    })
                };
                // In every second round the older VM goes first, otherwise the younger one.
                let (mut one, mut other) = (some(Program::Cpuid)?, some(Program::OutUser)?);
                one.run()?;
                other.run()?;
                if vms % 4 == 0 {
                    drop(one);
                }
                vms += 2;
                Ok(())
            })?;
            Ok(vms)
        });
        let result = (|| {
            let mut before = MeterSnapshot::read()?.exits();
            let started = Instant::now();
            while started.elapsed() < time {
                let now = MeterSnapshot::read()?.exits();
                snapshots += 1;
                for (code, count) in &before {
                    let exits = now.get(code).copied().unwrap_or(0);
                    ensure!(
                        exits >= *count,
                        "exits of reason {code} fell from {count} to {exits}"
                    );
                }
                before = now;
            }
            anyhow::Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        vms = task::join(churn)?;
        result
    })?;
    println!("{snapshots} snapshots while {vms} VMs came and went; no number fell");
    Ok(())
}

fn beside_vcpus(time: Duration) -> Result<()> {
    let done = AtomicBool::new(false);
    let (mut snapshots, mut ledgers) = (0_u64, 0_u64);
    thread::scope(|scope| {
        let guests: Vec<_> = [Program::Cpuid, Program::OutUser]
            .map(|program| {
                let done = &done;
                let config = Config {
                    vcpus: 2,
                    ..Config::new(program, Mode::Long, 2_000)
                };
                scope.spawn(move || run_until(done, config))
            })
            .into();
        let result = (|| {
            let mut latest: BTreeMap<(u64, u32), MeteredVcpu> = BTreeMap::new();
            let started = Instant::now();
            while started.elapsed() < time {
                // `MeterSnapshot::read` checks each ledger.
                let meter = MeterSnapshot::read()?;
                snapshots += 1;
                for vcpu in meter.vcpus {
                    ledgers += 1;
                    let key = (vcpu.vm, vcpu.id);
                    if let Some(before) = latest.get(&key) {
                        check_none_fell(before, &vcpu)?;
                    }
                    latest.insert(key, vcpu);
                }
            }
            ensure!(latest.len() >= 4, "{} vCPUs ran", latest.len());
            anyhow::Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        for guest in guests {
            task::join(guest)?;
        }
        result
    })?;
    println!(
        "{snapshots} snapshots in {:.0} s with {ledgers} ledgers, all balanced to the tick; no number fell",
        time.as_secs_f64()
    );
    Ok(())
}

/// Run as many vCPUs as are metered by default, and check that one snapshot holds all of them.
fn of_4096_vcpus() -> Result<()> {
    const VCPUS: u64 = 4096;
    // Each VM has its own 4 MiB, so VMs of few vCPUs would exceed the host's memory.
    const EACH: u8 = MAX_LONG_VCPUS;
    raise_file_limit(2 * VCPUS)?;
    let cpuid = codes::cpuid()?;
    let mut machines = Vec::new();
    let mut left = VCPUS;
    while left > 0 {
        let vcpus = left.min(u64::from(EACH)) as u8;
        left -= u64::from(vcpus);
        let mut machine = TinyVm::new(Config {
            vcpus,
            ..Config::new(Program::Cpuid, Mode::Long, 5)
        })
        .with_context(|| format!("{left} vCPUs are still to be created"))?;
        machine.run()?;
        machines.push(machine);
    }
    let mut bytes = Vec::new();
    let mut ticks = Vec::new();
    for _ in 0..5 {
        let began = host::tsc();
        bytes = read_device()?;
        ticks.push(host::tsc() - began);
    }
    ticks.sort_unstable();
    let meter = MeterSnapshot::read()?;
    let own = meter.own();
    ensure!(
        own.len() as u64 == VCPUS && meter.unmetered == 0,
        "{} of {VCPUS} vCPUs are metered, {} ran unmetered",
        own.len(),
        meter.unmetered
    );
    for vcpu in &own {
        let exits = vcpu.numbers.exits_of(cpuid);
        ensure!(exits == 5, "{exits} CPUID exits of 5 are metered");
    }
    println!(
        "{VCPUS} vCPUs in {} kB, read in {} ticks of this host's TSC (the median of 5)",
        bytes.len() / 1000,
        ticks[ticks.len() / 2]
    );
    Ok(())
}

/// Check that no number of a vCPU fell.
pub(super) fn check_none_fell(before: &MeteredVcpu, after: &MeteredVcpu) -> Result<()> {
    ensure!(
        after.life >= before.life && after.numbers.none_fell_since(&before.numbers),
        "the numbers of vCPU {} of {} fell: {before:?} and then {after:?}",
        after.id,
        after.name
    );
    Ok(())
}
