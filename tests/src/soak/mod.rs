// SPDX-License-Identifier: GPL-2.0

//! What takes too long for every day: the module under load, under faults, under attack.
//!
//! Cases as the others are, run by `system-tests --soak`. Each prints its figures.

mod churn;
mod clock;
mod hostile;
mod loading;
mod random;
mod snapshots;
mod starving;

pub use churn::{bequeath, worker};

use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{ensure, Result};
use tiny_guests::{Config, Machine, Mode, Program};

use crate::{
    cases::Case,
    host::{self, meter::Meter},
};

/// The environment variable by which a case learns how much of its work to do, in percent.
pub const PERCENT: &str = "EXITMETER_SOAK_PERCENT";

/// That part of `count` which is to be done, at least 1.
fn part_of(count: u64) -> u64 {
    let percent = env::var(PERCENT).ok().and_then(|text| text.parse().ok());
    (count * percent.unwrap_or(100_u64) / 100).max(1)
}

/// Does `work` again and again until `done`; how often.
fn keep_on(done: &AtomicBool, mut work: impl FnMut() -> Result<()>) -> Result<u64> {
    let mut times = 0;
    while !done.load(Ordering::Relaxed) {
        work()?;
        times += 1;
    }
    Ok(times)
}

/// Runs the same VM again and again until `done`, each time from its beginning; how often.
fn keep_running(done: &AtomicBool, config: Config) -> Result<u64> {
    let mut machine = Machine::new(config)?;
    keep_on(done, || {
        machine.run()?;
        Ok(machine.rewind()?)
    })
}

/// Has this process open up to `count` files, of which each vCPU is one.
fn may_open_files(count: u64) -> Result<()> {
    let files = libc::rlimit {
        rlim_cur: count,
        rlim_max: count,
    };
    // SAFETY: The limits are only read.
    let ret = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files) };
    ensure!(ret == 0, "no more files may be opened than usual");
    Ok(())
}

/// Demands that a guest that comes now is metered, every exit; no other may be there.
fn is_metered_whole() -> Result<()> {
    let mut machine = Machine::new(Config::new(Program::Cpuid, Mode::Long, 50))?;
    machine.run()?;
    let meter = Meter::read()?;
    let numbers = &meter.only()?.numbers;
    let cpuid = numbers.exits_of(host::pick(10, 0x72)?);
    ensure!(cpuid == 50, "{cpuid} CPUID exits of 50 are metered");
    Ok(())
}

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        loading::cases(),
        churn::cases(),
        hostile::cases(),
        snapshots::cases(),
        clock::cases(),
        starving::cases(),
        // They look back at all of them.
        crate::cases::final_cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
