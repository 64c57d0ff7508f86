// SPDX-License-Identifier: GPL-2.0

//! The emulated hosts that there are.

use std::fmt;

/// An emulated host.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Host {
    /// VT-x, by Bochs.
    Intel,
    /// SVM, by QEMU's TCG.
    Amd,
}

impl Host {
    /// KVM's module for it.
    pub fn kvm(self) -> &'static str {
        match self {
            Self::Intel => "kvm-intel",
            Self::Amd => "kvm-amd",
        }
    }

    /// The model of its CPU when no other is asked for, in its emulator's words.
    pub fn model(self) -> &'static str {
        match self {
            // The newest without posted interrupts, with which Linux guests do not get theirs in Bochs.
            Self::Intel => "corei7_ivy_bridge_3770k",
            Self::Amd => "EPYC",
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intel => "intel",
            Self::Amd => "amd",
        })
    }
}

/// What a host looks like.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Which host.
    pub host: Host,
    /// The model of its CPU, in its emulator's words.
    pub model: Option<String>,
    /// How many CPUs.
    pub cpus: u32,
    /// How much memory, in MiB.
    pub memory: u32,
    /// AMD only: let the TSC count instructions, so that the same work takes the same number of ticks.
    pub icount: bool,
    /// More for its kernel's command line.
    pub append: String,
}

impl Machine {
    /// What its kernel is told.
    pub fn command_line(&self) -> String {
        // The console takes time, so it gets what matters: warnings and worse. The whole log comes by messages.
        let mut line = String::from(
            "console=ttyS0,115200 rdinit=/init loglevel=5 log_buf_len=2M random.trust_cpu=on \
             mitigations=off tsc=reliable i8042.nokbd i8042.noaux",
        );
        // The console is written by a thread of the kernel's. On a CPU that is stuck it does not run, so what the
        // kernel says about that comes out only with a panic.
        line.push_str(" softlockup_panic=1 hung_task_panic=1 sysctl.kernel.panic_on_rcu_stall=1");
        // On a busy machine an emulated timer is late, and the kernel would think that it is none.
        line.push_str(" no_timer_check");
        if self.host == Host::Intel {
            // Its seconds take longer than ours, and no load of ours makes it late.
            line.push_str(" watchdog_thresh=5");
        }
        if !self.append.is_empty() {
            line.push(' ');
            line.push_str(&self.append);
        }
        line
    }
}
