// SPDX-License-Identifier: GPL-2.0

//! Starts and stops the meters that watch exits while they are measured: exitmeter and others.

mod bpf;
mod exitmeter;
mod ftrace;
mod perf;

pub use perf::FOLDER as PERF_FOLDER;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A meter to measure.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Meter {
    /// No meter.
    None,
    /// exitmeter with its default parameters.
    Exitmeter,
    /// exitmeter with details=1.
    ExitmeterDetails,
    /// exitmeter with details=1 and slow_us, so with a ring of the last exits.
    ExitmeterRing,
    /// exitmeter with leaf_map=0, so without the redirect of KVM's CPUID.
    ExitmeterNoLeaves,
    /// exitmeter's BPF programs instead of the module.
    ExitmeterBpf,
    /// exitmeter's hooks alone: their callbacks return at once.
    OnlyHooks,
    /// exitmeter's hooks, its clock and a ledger that records only transitions.
    OnlyTransitions,
    /// The same, with exits counted by reason.
    OnlyCounts,
    /// The same, with ticks booked by phase and reason.
    OnlyPhases,
    /// The same, with histograms.
    OnlyHistograms,
    /// BPF on the raw tracepoint that counts by reason.
    BpfCountRaw,
    /// BPF on the tracepoint that counts by reason, as bcc's kvmexit does.
    BpfCount,
    /// BPF on the raw tracepoints: a histogram by reason of the time from exit to entry.
    BpfLatencyRaw,
    /// BPF on the tracepoints: a histogram by reason of the time from exit to entry.
    BpfLatency,
    /// BPF on the tracepoint that counts by reason and guest RIP.
    BpfCode,
    /// BPF on the tracepoints that counts by reason and guest RIP and adds up the time to the entry.
    BpfCodeTime,
    /// ftrace's hist trigger on kvm_exit, keyed by reason.
    FtraceHist,
    /// kvm_exit and kvm_entry in ftrace's ring buffer.
    FtraceRing,
    /// `perf stat -e kvm:kvm_exit`.
    PerfStat,
    /// `perf kvm stat record`.
    PerfKvmStat,
}

impl Meter {
    /// Return the title of the meter's line in the results.
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

    /// Return the only part of exitmeter in this build of the module, as Kbuild names it.
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

/// Folder of the builds that contain a single part of exitmeter, `PART.ko`, in the host.
pub const PARTS_FOLDER: &str = "/usr/local/lib/exitmeter-parts";

/// Exits that a meter counted.
#[derive(Debug, Default)]
pub struct CountedExits {
    /// Exits of all VMs and reasons; `None` from a part of exitmeter that does not count.
    pub exits: Option<u64>,
    /// Further output of the meter, such as the size of its data.
    pub remark: Option<String>,
}

/// A running meter.
pub trait RunningMeter {
    /// Stop the meter, and return the exits that it counted.
    fn stop(self: Box<Self>) -> Result<CountedExits>;
}

/// Start a meter. When this returns, the meter watches every exit.
pub fn start(meter: Meter) -> Result<Option<Box<dyn RunningMeter>>> {
    Ok(match meter {
        Meter::None => None,
        Meter::Exitmeter => Some(Box::new(exitmeter::Loaded::new(&["log_queries=0"])?)),
        Meter::ExitmeterDetails => Some(Box::new(exitmeter::Loaded::new(&[
            "log_queries=0",
            "details=1",
        ])?)),
        // No exit takes this long, so the ring never freezes.
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
        Meter::BpfCountRaw => Some(Box::new(bpf::Attached::count(
            bpf::AttachPoint::RawTracepoint,
        )?)),
        Meter::BpfCount => Some(Box::new(bpf::Attached::count(
            bpf::AttachPoint::TraceEvent,
        )?)),
        Meter::BpfLatencyRaw => Some(Box::new(bpf::Attached::latency(
            bpf::AttachPoint::RawTracepoint,
        )?)),
        Meter::BpfLatency => Some(Box::new(bpf::Attached::latency(
            bpf::AttachPoint::TraceEvent,
        )?)),
        Meter::BpfCode => Some(Box::new(bpf::Attached::code(false)?)),
        Meter::BpfCodeTime => Some(Box::new(bpf::Attached::code(true)?)),
        Meter::FtraceHist => Some(Box::new(ftrace::Hist::new()?)),
        Meter::FtraceRing => Some(Box::new(ftrace::Ring::new()?)),
        Meter::PerfStat => Some(Box::new(perf::Perf::stat()?)),
        Meter::PerfKvmStat => Some(Box::new(perf::Perf::kvm_stat_record()?)),
    })
}
