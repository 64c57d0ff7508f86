// SPDX-License-Identifier: GPL-2.0

//! What watches exits while they are measured: exitmeter, and what there is besides.

mod bpf;
mod exitmeter;
mod ftrace;
mod perf;

pub use perf::FOLDER as PERF_FOLDER;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A meter.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Meter {
    /// Nobody watches.
    None,
    /// exitmeter as it loads.
    Exitmeter,
    /// exitmeter with details=1: each exit is told with what it was about.
    ExitmeterDetails,
    /// exitmeter with details=1 and slow_us: a ring of the last exits as well.
    ExitmeterRing,
    /// exitmeter with leaf_map=0: nothing redirects KVM's CPUID.
    ExitmeterNoLeaves,
    /// exitmeter's BPF programs, in place of the module.
    ExitmeterBpf,
    /// exitmeter's callbacks alone, which return at once.
    OnlyHooks,
    /// exitmeter's clock and ledger alone, in which nothing but the transitions is written.
    OnlyTransitions,
    /// These with exits counted by reason.
    OnlyCounts,
    /// These with ticks booked by phase and reason.
    OnlyPhases,
    /// These with histograms.
    OnlyHistograms,
    /// BPF that counts by reason, on the raw tracepoint.
    BpfCountRaw,
    /// BPF that counts by reason, on the tracepoint, as bcc's kvmexit does.
    BpfCount,
    /// BPF from exit to entry, a histogram by reason, on the raw tracepoints.
    BpfLatencyRaw,
    /// BPF from exit to entry, a histogram by reason, on the tracepoints.
    BpfLatency,
    /// BPF that counts by reason and guest RIP, on the tracepoint.
    BpfCode,
    /// BPF that counts by reason and guest RIP, with the time to the entry, on the tracepoints.
    BpfCodeTime,
    /// A hist trigger of ftrace on kvm_exit, keyed by reason.
    FtraceHist,
    /// kvm_exit and kvm_entry in ftrace's ring buffer.
    FtraceRing,
    /// perf stat -e kvm:kvm_exit.
    PerfStat,
    /// perf kvm stat record.
    PerfKvmStat,
}

impl Meter {
    /// What heads its row.
    pub fn title(self) -> &'static str {
        match self {
            Meter::None => "no meter",
            Meter::Exitmeter => "exitmeter",
            Meter::ExitmeterDetails => "exitmeter, details=1",
            Meter::ExitmeterRing => "exitmeter, details=1 slow_us",
            Meter::ExitmeterNoLeaves => "exitmeter, leaf_map=0",
            Meter::ExitmeterBpf => "exitmeter by BPF",
            Meter::OnlyHooks => "its hooks alone",
            Meter::OnlyTransitions => "hooks, clock, ledger's head",
            Meter::OnlyCounts => "these and counts",
            Meter::OnlyPhases => "these and phases",
            Meter::OnlyHistograms => "these and histograms",
            Meter::BpfCountRaw => "BPF count, raw tracepoint",
            Meter::BpfCount => "BPF count, tracepoint (kvmexit)",
            Meter::BpfLatencyRaw => "BPF latency, raw tracepoints",
            Meter::BpfLatency => "BPF latency, tracepoints",
            Meter::BpfCode => "BPF count by reason and RIP",
            Meter::BpfCodeTime => "BPF count and time by these",
            Meter::FtraceHist => "ftrace hist trigger",
            Meter::FtraceRing => "ftrace ring buffer, exit + entry",
            Meter::PerfStat => "perf stat -e kvm:kvm_exit",
            Meter::PerfKvmStat => "perf kvm stat record",
        }
    }
}

impl Meter {
    /// The part of exitmeter that this build of it has alone, as its Kbuild names it.
    pub fn part(self) -> Option<&'static str> {
        match self {
            Meter::OnlyHooks => Some("hooks"),
            Meter::OnlyTransitions => Some("transitions"),
            Meter::OnlyCounts => Some("counts"),
            Meter::OnlyPhases => Some("phases"),
            Meter::OnlyHistograms => Some("histograms"),
            _ => None,
        }
    }
}

/// Where the host has the builds of exitmeter with one part alone: `PART.ko`.
pub const PARTS_FOLDER: &str = "/usr/local/lib/exitmeter-parts";

/// What a meter saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Exits, all VMs and reasons; `None` from a part of exitmeter that does not count.
    pub exits: Option<u64>,
    /// What else it left behind.
    pub remark: Option<String>,
}

/// A meter that watches.
pub trait Watch {
    /// Ends it, and gives what it saw.
    fn stop(self: Box<Self>) -> Result<Seen>;
}

/// Starts a meter; from the return on it watches every exit.
pub fn start(meter: Meter) -> Result<Option<Box<dyn Watch>>> {
    Ok(match meter {
        Meter::None => None,
        Meter::Exitmeter => Some(Box::new(exitmeter::Loaded::new(&["log_queries=0"])?)),
        Meter::ExitmeterDetails => Some(Box::new(exitmeter::Loaded::new(&[
            "log_queries=0",
            "details=1",
        ])?)),
        // No exit takes as long, so that the ring does not freeze.
        Meter::ExitmeterRing => Some(Box::new(exitmeter::Loaded::new(&[
            "log_queries=0",
            "details=1",
            "slow_us=1000000000",
        ])?)),
        Meter::ExitmeterNoLeaves => Some(Box::new(exitmeter::Loaded::new(&["leaf_map=0"])?)),
        Meter::ExitmeterBpf => Some(Box::new(exitmeter::ByBpf::new()?)),
        Meter::OnlyHooks
        | Meter::OnlyTransitions
        | Meter::OnlyCounts
        | Meter::OnlyPhases
        | Meter::OnlyHistograms => Some(Box::new(exitmeter::Loaded::part(meter)?)),
        Meter::BpfCountRaw => Some(Box::new(bpf::Program::count(bpf::Hook::Raw)?)),
        Meter::BpfCount => Some(Box::new(bpf::Program::count(bpf::Hook::Event)?)),
        Meter::BpfLatencyRaw => Some(Box::new(bpf::Program::latency(bpf::Hook::Raw)?)),
        Meter::BpfLatency => Some(Box::new(bpf::Program::latency(bpf::Hook::Event)?)),
        Meter::BpfCode => Some(Box::new(bpf::Program::code(false)?)),
        Meter::BpfCodeTime => Some(Box::new(bpf::Program::code(true)?)),
        Meter::FtraceHist => Some(Box::new(ftrace::Hist::new()?)),
        Meter::FtraceRing => Some(Box::new(ftrace::Ring::new()?)),
        Meter::PerfStat => Some(Box::new(perf::Perf::stat()?)),
        Meter::PerfKvmStat => Some(Box::new(perf::Perf::kvm_stat_record()?)),
    })
}
