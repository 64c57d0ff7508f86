// SPDX-License-Identifier: GPL-2.0

//! The exits whose cost is measured.

use std::{
    io, mem,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use anyhow::{ensure, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tiny_guests::{Config, Machine, Mode, Program};

/// An exit, by what KVM does with it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// CPUID: in KVM, through the function that exitmeter redirects.
    Cpuid,
    /// WBINVD: in KVM, through the whole of its exit dispatch.
    Wbinvd,
    /// INVD: in KVM's fastpath, which goes back into the guest before the dispatch.
    Invd,
    /// WRMSR: in KVM, and an event of its own for who traces MSRs.
    Wrmsr,
    /// IN from the speaker's port: in KVM, and an event of its own for who traces ports.
    InKernel,
    /// OUT: out to user space and back.
    OutUser,
    /// A page that was never touched: an EPT violation, or a nested page fault.
    Touch,
}

impl Exit {
    /// What heads its column.
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

    /// TSC ticks of one exit, the guest's loop around it included: the mean of `count`.
    ///
    /// What a vCPU's start and end cost falls out, as the difference of two guests is
    /// taken, of which one exits `count` times more.
    pub fn ticks(self, count: u32) -> Result<f64> {
        let few = short(count);
        let [short, long] = [few, few + count].map(|count| run(self.program(), count));
        Ok(long?.saturating_sub(short?) as f64 / f64::from(count))
    }

    /// How many exits of its own kind [`Exit::ticks`] causes.
    pub fn known(count: u32) -> u64 {
        2 * u64::from(short(count)) + u64::from(count)
    }
}

/// How often the shorter of two guests exits.
fn short(count: u32) -> u32 {
    count / 10
}

/// The TSC now, read when all before it is done.
fn now() -> u64 {
    // SAFETY: Every x86-64 CPU has both.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}

/// Runs a guest; TSC ticks from before its start until after its end.
fn run(program: Program, count: u32) -> Result<u64> {
    let mut machine = Machine::new(Config::new(program, Mode::Long, count))?;
    let start = AtomicU64::new(0);
    machine.run_with(|_| {
        pin()?;
        start.store(now(), Relaxed);
        Ok(())
    })?;
    let end = now();
    ensure!(start.load(Relaxed) != 0, "the guest did not start");
    Ok(end.saturating_sub(start.load(Relaxed)))
}

/// Keeps this thread on the host's first CPU.
fn pin() -> io::Result<()> {
    // SAFETY: All-zero bytes are an empty set; CPU 0 is inside it, and the call reads it.
    let ret = unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    if ret == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
