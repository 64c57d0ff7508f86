// SPDX-License-Identifier: GPL-2.0

//! Settings of a VM, and errors.

use std::time::Duration;

use crate::{
    catalogue::{Mode, Program},
    window::{FRESH, QUERIES, QUERY, WINDOW},
};

/// Maximum number of vCPUs of a VM in real mode: each has a window of 64 KiB in the first MiB.
pub const MAX_VCPUS: u8 = 15;

/// Maximum number of vCPUs of a VM in 64-bit mode: their windows lie below `FRESH`.
pub const MAX_LONG_VCPUS: u8 = (FRESH / WINDOW) as u8;

/// Maximum number of queries of a guest: its window holds no more.
pub const MAX_QUERIES: u32 = ((WINDOW - QUERIES) / QUERY) as u32;

/// Maximum number of pages that the vCPUs of a VM touch together: 128 MiB.
pub const MAX_PAGES: u32 = 32 * 1024;

/// Error of a VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to KVM failed.
    #[error("KVM refused to {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// A call to the kernel failed.
    #[error("the kernel refused to {0}")]
    Kernel(&'static str, #[source] std::io::Error),
    /// The settings do not go together.
    #[error("{0}")]
    Settings(String),
    /// The caller stopped the guest.
    #[error("the guest was stopped")]
    Stopped,
    /// The guest ended in a way that no guest here does.
    #[error("vCPU {vcpu} ended with {what}")]
    Guest {
        /// Number of the vCPU.
        vcpu: u8,
        /// End of the vCPU, in words.
        what: String,
    },
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Settings of a VM.
#[derive(Clone, Debug)]
pub struct Config {
    /// Program of every vCPU.
    pub program: Program,
    /// CPU mode.
    pub mode: Mode,
    /// Loop iterations, at least 1. For [`Program::Query`], the number of queries.
    pub count: u32,
    /// Number of vCPUs, from 1 to [`MAX_VCPUS`] in real mode and [`MAX_LONG_VCPUS`] in the others.
    pub vcpus: u8,
    /// Time that the VMM sleeps at each OUT that reaches it.
    pub vmm_pause: Duration,
    /// Number of the only OUT at which it sleeps, from 1; `None` for each OUT.
    pub vmm_pause_on: Option<u64>,
    /// True if a vCPU's thread moves to the host's next CPU at each OUT that reaches the VMM.
    pub change_cpus: bool,
    /// Interval at which the VMM sends the interrupt that ends a HLT.
    pub hlt_time: Duration,
    /// True if the VMM reads a vCPU's registers and writes them back each time it gets control, by
    /// an exit or by a signal.
    pub rewrite_registers: bool,
    /// Queries of every vCPU, for [`Program::Query`].
    pub queries: Vec<Registers64>,
}

impl Config {
    /// Configure one vCPU that loops `count` times, under a VMM that does not sleep.
    pub fn new(program: Program, mode: Mode, count: u32) -> Self {
        Self {
            program,
            mode,
            count,
            vcpus: 1,
            vmm_pause: Duration::ZERO,
            vmm_pause_on: None,
            change_cpus: false,
            hlt_time: Duration::from_millis(5),
            rewrite_registers: false,
            queries: Vec::new(),
        }
    }

    /// Configure one vCPU that makes `queries`.
    pub fn query(mode: Mode, queries: Vec<Registers64>) -> Self {
        Self {
            queries,
            ..Self::new(Program::Query, mode, 0)
        }
    }

    /// Return the loop iterations of each vCPU.
    pub fn loops(&self) -> u32 {
        match self.program {
            Program::Query => self.queries.len() as u32,
            _ => self.count,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Settings(text));
        if !self.program.runs_in(self.mode) {
            return fail(format!(
                "{:?} does not run in this mode; choose mode long",
                self.program
            ));
        }
        if self.loops() == 0 {
            return fail("a guest loops at least once".into());
        }
        let most = match self.mode {
            Mode::Real => MAX_VCPUS,
            Mode::Long | Mode::User => MAX_LONG_VCPUS,
        };
        if !(1..=most).contains(&self.vcpus) {
            return fail(format!("a VM has 1 to {most} vCPUs in this mode"));
        }
        if self.program == Program::Query && self.loops() > MAX_QUERIES {
            return fail(format!("a guest asks at most {MAX_QUERIES} queries"));
        }
        if self.fresh_pages() > u64::from(MAX_PAGES) {
            return fail(format!("a VM touches at most {MAX_PAGES} pages"));
        }
        if self.program == Program::HltKernel && self.vcpus != 1 {
            return fail("KVM's PIC interrupts the first vCPU alone; use one vCPU".into());
        }
        Ok(())
    }

    pub(crate) fn fresh_pages(&self) -> u64 {
        match self.program {
            Program::Touch | Program::Look | Program::Call => {
                u64::from(self.count) * u64::from(self.vcpus)
            }
            _ => 0,
        }
    }

    /// Return true if KVM must emulate the interrupt controllers.
    pub(crate) fn has_irqchip(&self) -> bool {
        matches!(self.program, Program::HltKernel | Program::InKernel)
    }
}

/// Four registers: RAX, RBX, RCX, RDX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers64 {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
}

impl Registers64 {
    /// Create the input of CPUID: the leaf in RAX, the subleaf in RCX, and in all other bits a
    /// pattern that an answer must not keep.
    pub fn cpuid(leaf: u32, subleaf: u32) -> Self {
        const JUNK: u64 = 0xdead_beef_0000_0000;
        Self {
            rax: JUNK | u64::from(leaf),
            rbx: JUNK | 0xbbbb_bbbb,
            rcx: JUNK | u64::from(subleaf),
            rdx: JUNK | 0xdddd_dddd,
        }
    }
}
