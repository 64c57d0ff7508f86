// SPDX-License-Identifier: GPL-2.0

//! Kinds of emulated hosts.

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
    /// Return the name of KVM's module for the host.
    pub fn kvm_module(self) -> &'static str {
        match self {
            Self::Intel => "kvm-intel",
            Self::Amd => "kvm-amd",
        }
    }

    /// Return the default CPU model, as its emulator names it.
    pub fn model(self) -> &'static str {
        match self {
            // The newest model without posted interrupts. With them, Linux guests in Bochs lose interrupts.
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

/// Hardware of a host and its kernel's command line.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Kind of host.
    pub host: Host,
    /// CPU model, as its emulator names it.
    pub model: Option<String>,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory, in MiB.
    pub memory: u32,
    /// AMD only: let the TSC count instructions, so that the same work takes the same number of ticks.
    pub icount: bool,
    /// Text to append to its kernel's command line.
    pub append: String,
}

impl Machine {
    /// Return the command line of the host's kernel.
    pub fn command_line(&self) -> String {
        // The console is slow, so it only gets warnings and worse. The whole log comes by messages.
        let mut line = String::from(
            "console=ttyS0,115200 rdinit=/init loglevel=5 log_buf_len=2M random.trust_cpu=on \
             mitigations=off tsc=reliable i8042.nokbd i8042.noaux",
        );
        // A kernel thread writes the console. It does not run on a stuck CPU, so the report about that CPU only gets
        // out with a panic.
        line.push_str(" softlockup_panic=1 hung_task_panic=1 sysctl.kernel.panic_on_rcu_stall=1");
        // On a busy machine an emulated timer is late, and the kernel would take it for a broken one.
        line.push_str(" no_timer_check");
        if self.host == Host::Intel {
            // Its seconds take longer than real ones, and load on this machine does not make it late.
            line.push_str(" watchdog_thresh=5");
        }
        if !self.append.is_empty() {
            line.push(' ');
            line.push_str(&self.append);
        }
        line
    }
}
