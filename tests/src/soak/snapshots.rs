//! Snapshots as fast as they can be taken, while vCPUs run.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use tiny_guests::{Config, Machine, Mode, Program};

use super::part_of;
use crate::{
    cases::Case,
    host::meter::{Meter, Vcpu},
};

/// For how many seconds.
const SECONDS: u64 = 60;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::with(
        "log_queries=0",
        "soak: snapshots while 4 vCPUs run, each balanced and none behind the one before",
        || beside_vcpus(Duration::from_secs(part_of(SECONDS))),
    )
    .within(600)]
}

fn beside_vcpus(time: Duration) -> Result<()> {
    let done = AtomicBool::new(false);
    let (mut snapshots, mut ledgers) = (0_u64, 0_u64);
    thread::scope(|scope| {
        let guests: Vec<_> = [Program::Cpuid, Program::OutUser]
            .map(|program| {
                let done = &done;
                scope.spawn(move || -> Result<()> {
                    let mut machine = Machine::new(Config {
                        vcpus: 2,
                        ..Config::new(program, Mode::Long, 2_000)
                    })?;
                    while !done.load(Ordering::Relaxed) {
                        machine.run()?;
                        // The same vCPUs once more, from their beginning.
                        machine.rewind()?;
                    }
                    Ok(())
                })
            })
            .into();
        let result = (|| {
            let mut latest: BTreeMap<(u64, u32), Vcpu> = BTreeMap::new();
            let started = Instant::now();
            while started.elapsed() < time {
                // Each ledger is checked as it is read.
                let meter = Meter::read()?;
                snapshots += 1;
                for vcpu in meter.vcpus {
                    ledgers += 1;
                    let key = (vcpu.vm, vcpu.id);
                    if let Some(before) = latest.get(&key) {
                        not_behind(before, &vcpu)?;
                    }
                    latest.insert(key, vcpu);
                }
            }
            ensure!(latest.len() >= 4, "{} vCPUs ran", latest.len());
            anyhow::Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        for guest in guests {
            guest.join().ok().context("a guest's thread panicked")??;
        }
        result
    })?;
    println!(
        "{snapshots} snapshots in {:.0} s, {ledgers} ledgers in them, all balanced to the tick, none behind the one before",
        time.as_secs_f64()
    );
    Ok(())
}

/// No number of a vCPU falls.
pub(super) fn not_behind(before: &Vcpu, after: &Vcpu) -> Result<()> {
    ensure!(
        after.life >= before.life && after.numbers.is_not_behind(&before.numbers),
        "the numbers of vCPU {} of {} fell: {before:?} and then {after:?}",
        after.id,
        after.name
    );
    Ok(())
}
