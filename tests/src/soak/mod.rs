// SPDX-License-Identifier: GPL-2.0

//! Cases that run for long: the module under load, with failing allocations, and under attack.
//!
//! `system-tests --soak` runs them in place of the other cases. Each prints its figures.

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
use tiny_guests::{Config, Mode, Program, TinyVm};

use crate::{
    cases::Case,
    host::{codes, meter::MeterSnapshot},
};

/// Environment variable with the share of its work that a case does, in percent.
pub const PERCENT: &str = "EXITMETER_SOAK_PERCENT";

/// Scale `count` by [`PERCENT`], to at least 1.
fn scaled(count: u64) -> u64 {
    let percent = env::var(PERCENT).ok().and_then(|text| text.parse().ok());
    (count * percent.unwrap_or(100_u64) / 100).max(1)
}

/// Repeat `work` until `done` is set, and return the number of repetitions.
fn repeat_until(done: &AtomicBool, mut work: impl FnMut() -> Result<()>) -> Result<u64> {
    let mut times = 0;
    while !done.load(Ordering::Relaxed) {
        work()?;
        times += 1;
    }
    Ok(times)
}

/// Run the same VM from its beginning until `done` is set, and return the number of runs.
fn run_until(done: &AtomicBool, config: Config) -> Result<u64> {
    let mut machine = TinyVm::new(config)?;
    repeat_until(done, || {
        machine.run()?;
        Ok(machine.rewind()?)
    })
}

/// Raise this process's limit of open files to `count`. Each vCPU is a file.
fn raise_file_limit(count: u64) -> Result<()> {
    let files = libc::rlimit {
        rlim_cur: count,
        rlim_max: count,
    };
    // SAFETY: The limits are only read.
    let ret = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files) };
    ensure!(ret == 0, "no more files may be opened than usual");
    Ok(())
}

/// Check that every exit of a new guest is metered. This process may have no other vCPU.
fn check_fully_metered() -> Result<()> {
    let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 50))?;
    machine.run()?;
    let meter = MeterSnapshot::read()?;
    let numbers = &meter.only()?.numbers;
    let cpuid = numbers.exits_of(codes::cpuid()?);
    ensure!(cpuid == 50, "{cpuid} CPUID exits of 50 are metered");
    Ok(())
}

/// Return all cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        loading::cases(),
        churn::cases(),
        hostile::cases(),
        snapshots::cases(),
        clock::cases(),
        starving::cases(),
        // These judge all the others.
        crate::cases::final_cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
