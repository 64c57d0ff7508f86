// SPDX-License-Identifier: GPL-2.0

//! Runs guests that cause the exits whose cost is measured.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{ensure, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tiny_guests::{pin, Config, Mode, Program, TinyVm};

/// A kind of exit, by how KVM handles it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// CPUID: handled in KVM, through the function that exitmeter redirects.
    Cpuid,
    /// WBINVD: handled in KVM, through its whole exit dispatch.
    Wbinvd,
    /// INVD: handled in KVM's fastpath, which reenters the guest before the dispatch.
    Invd,
    /// WRMSR: handled in KVM, and an event of its own for tools that trace MSRs.
    Wrmsr,
    /// IN from the speaker's port: handled in KVM, and an event of its own for tools that trace ports.
    InKernel,
    /// OUT: handled in user space.
    OutUser,
    /// First access to a page: an EPT violation or a nested page fault.
    Touch,
}

impl Exit {
    /// Return the column's title.
    pub fn title(self) -> &'static str {
        match self {
            Exit::Cpuid => "CPUID",
            Exit::Wbinvd => "WBINVD",
            Exit::Invd => "INVD (fastpath)",
            Exit::Wrmsr => "WRMSR",
            Exit::InKernel => "IN in KVM",
            Exit::OutUser => "OUT to user",
            Exit::Touch => "EPT/NPT fault",
        }
    }

    fn program(self) -> Program {
        match self {
            Exit::Cpuid => Program::Cpuid,
            Exit::Wbinvd => Program::Wbinvd,
            Exit::Invd => Program::Invd,
            Exit::Wrmsr => Program::Wrmsr,
            Exit::InKernel => Program::InKernel,
            Exit::OutUser => Program::OutUser,
            Exit::Touch => Program::Touch,
        }
    }

    /// Measure TSC ticks per exit, including the guest's loop around it: the mean of `count` exits.
    ///
    /// The result is the difference of two guests, one of which exits `count` times more often, so
    /// the cost of a vCPU's start and end cancels out.
    pub fn ticks(self, count: u32) -> Result<f64> {
        let few = short_count(count);
        let [short, long] = [few, few + count].map(|count| run(self.program(), count));
        Ok(long?.saturating_sub(short?) as f64 / f64::from(count))
    }

    /// Return the number of exits of the measured kind that [`Exit::ticks`] causes.
    pub fn caused(count: u32) -> u64 {
        2 * u64::from(short_count(count)) + u64::from(count)
    }
}

/// Return how often the shorter of the two guests exits.
fn short_count(count: u32) -> u32 {
    count / 10
}

/// Return the TSC, read after all earlier instructions.
fn now() -> u64 {
    // SAFETY: Every x86-64 CPU has both.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

/// Run a guest and return the TSC ticks from before its start until after its end.
fn run(program: Program, count: u32) -> Result<u64> {
    let mut machine = TinyVm::new(Config::new(program, Mode::Long, count))?;
    let start = AtomicU64::new(0);
    machine.run_with(|_| {
        pin(0)?;
        start.store(now(), Relaxed);
        Ok(())
    })?;
    let end = now();
    ensure!(start.load(Relaxed) != 0, "the guest did not start");
    Ok(end.saturating_sub(start.load(Relaxed)))
}
