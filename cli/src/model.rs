// SPDX-License-Identifier: GPL-2.0

//! A snapshot as plain data. Its field names are those of `--json`, and stay.

use std::collections::BTreeMap;

use exitmeter_meter::{
    phase::Phase,
    reader::{Snapshot, Vcpu as VcpuRecord},
    reasons::Isa,
};
use serde::Serialize;

use crate::names::{Given, Known};

pub mod delta;
mod ledger;

#[cfg(feature = "export")]
pub(crate) use ledger::both;
pub use ledger::{Cycles, Label, Ledger, ReasonRow, Sort};

/// The version of the data's shape: grows when a field goes or changes its meaning.
pub const FORMAT: u32 = 1;

/// All that a snapshot says, or what happened between two.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// The time between two snapshots, when the numbers are of that alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Span>,
    /// The host and its meter.
    pub host: Host,
    /// vCPUs that run, or ran, without being metered.
    pub unmetered_vcpus: u64,
    /// The VMs that run, by their numbers.
    pub vms: Vec<Vm>,
    /// The sums of the vCPUs that are gone.
    pub departed: Departed,
}

/// A time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Span {
    /// In TSC ticks.
    pub ticks: u64,
    /// In seconds, when the TSC's frequency is known.
    pub seconds: Option<f64>,
}

/// The meter that kept the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Meter {
    /// The kernel module. A tick is one of the TSC.
    Module,
    /// The BPF program. A tick is a nanosecond of the kernel's monotonic clock.
    Bpf,
}

/// The host and its meter.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// `module` or `bpf`.
    pub source: Meter,
    /// TSC frequency, when it is known.
    pub tsc_khz: Option<u32>,
    /// Whether the TSC runs at one rate, alike on all CPUs.
    pub tsc_stable: bool,
    /// The number of the meter's life: another one when its numbers have begun anew.
    pub life: u64,
    /// TSC when the module was loaded.
    pub loaded_tsc: u64,
    /// TSC when the snapshot was begun.
    pub snapshot_tsc: u64,
    /// The leaf map that guests see: 0, 2021 or 2022.
    pub leaf_map: Option<u32>,
    /// Whether guests read the sums of the host.
    pub host_scope: bool,
}

/// A VM that runs.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// Its number: unique while the module is loaded.
    pub vm: u64,
    /// KVM's name for it.
    pub name: String,
    /// The thread that made it (`kvm->userspace_pid`): for most VMMs their process.
    pub pid: u32,
    /// What its VMM was told about it, when that is known: it is of VMs that run on this host, and
    /// of recordings.
    pub vmm: Given,
    /// The time that its numbers are of: since the first event of its oldest vCPU, or since
    /// the earlier snapshot.
    pub span: Span,
    /// Nanoseconds that KVM polled before it let its vCPUs sleep, by KVM's own count, when it is
    /// known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled_ns: Option<u64>,
    /// The sums of its vCPUs.
    #[serde(flatten)]
    pub ledger: Ledger,
    /// Its vCPUs.
    pub vcpus: Vec<Vcpu>,
}

/// A vCPU.
#[derive(Clone, Debug, Serialize)]
pub struct Vcpu {
    /// Its id in its VM.
    pub vcpu: u32,
    /// TSC at its first event; of an interval, at its beginning.
    pub first_tsc: u64,
    /// TSC at its latest transition; of an interval, at its end.
    pub last_tsc: u64,
    /// The phase it has been in since then, `blocked` when the two sleeps are not told apart.
    #[serde(rename = "phase")]
    pub phase_name: Option<&'static str>,
    /// The same as a phase.
    #[serde(skip)]
    pub phase: Option<Phase>,
    /// Ticks from then to the snapshot: not yet booked on any row, but for the rows of an
    /// interval.
    pub phase_ticks: u64,
    /// What that phase will be booked on.
    pub latest: Option<Label>,
    /// Nanoseconds that KVM polled before it let the vCPU sleep, by KVM's own count, when it is
    /// known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled_ns: Option<u64>,
    /// Its numbers.
    #[serde(flatten)]
    pub ledger: Ledger,
}

/// The vCPUs that are gone.
#[derive(Clone, Debug, Serialize)]
pub struct Departed {
    /// How many there were.
    pub vcpus_gone: u64,
    /// Nanoseconds that KVM polled before it let them sleep, by KVM's own count, when it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled_ns: Option<u64>,
    /// Their sums.
    #[serde(flatten)]
    pub ledger: Ledger,
}

impl Report {
    /// The data of a snapshot.
    pub fn new(snapshot: &Snapshot<'_>) -> Self {
        let isa = snapshot.isa();
        let mut vms: BTreeMap<u64, Vm> = BTreeMap::new();
        for record in snapshot.vcpus() {
            vms.entry(record.vm())
                .or_insert_with(|| Vm {
                    vm: record.vm(),
                    name: record.name().to_owned(),
                    pid: record.pid(),
                    vmm: Given::default(),
                    span: Span::of(0, None),
                    polled_ns: None,
                    ledger: Ledger::default(),
                    vcpus: Vec::new(),
                })
                .vcpus
                .push(Vcpu::new(snapshot, &record));
        }
        for vm in vms.values_mut() {
            vm.vcpus.sort_by_key(|vcpu| vcpu.vcpu);
            vm.sum_up();
            let first = vm.vcpus.iter().map(|vcpu| vcpu.first_tsc).min();
            let ticks = first.map_or(0, |first| snapshot.now().saturating_sub(first));
            vm.span = Span::of(ticks, snapshot.tsc_khz());
        }
        Self {
            format: FORMAT,
            interval: None,
            host: Host {
                isa,
                tsc_khz: snapshot.tsc_khz(),
                tsc_stable: snapshot.tsc_is_stable(),
                life: snapshot.life(),
                loaded_tsc: snapshot.loaded(),
                snapshot_tsc: snapshot.now(),
                leaf_map: snapshot.leaf_map().map(|map| map as u32),
                host_scope: snapshot.host_scope(),
                source: match snapshot.by_bpf() {
                    true => Meter::Bpf,
                    false => Meter::Module,
                },
            },
            unmetered_vcpus: snapshot.unmetered(),
            vms: vms.into_values().collect(),
            departed: Departed::new(snapshot),
        }
    }
}

impl Span {
    /// So many ticks of a TSC.
    pub fn of(ticks: u64, khz: Option<u32>) -> Self {
        Self {
            ticks,
            seconds: khz.map(|khz| ticks as f64 / (f64::from(khz) * 1000.0)),
        }
    }

    /// How often something happened each second; `None` when the time is not known, or none
    /// passed.
    pub fn per_second(&self, count: u64) -> Option<f64> {
        let seconds = self.seconds.filter(|seconds| *seconds > 0.0)?;
        Some(count as f64 / seconds)
    }
}

impl Vm {
    /// Return its name for people, with KVM's.
    pub fn label(&self) -> String {
        self.vmm.label(&self.name)
    }

    /// Return its name for people where there is little room.
    pub fn short(&self) -> String {
        self.vmm.short(&self.name)
    }

    /// Return all that it may be called.
    pub fn known(&self) -> Known<'_> {
        Known {
            vm: self.vm,
            kvm: &self.name,
            pid: self.pid,
            given: &self.vmm,
        }
    }

    /// Makes its numbers the sums of its vCPUs.
    pub fn sum_up(&mut self) {
        let mut polled = self.vcpus.iter().map(|vcpu| vcpu.polled_ns);
        self.polled_ns = polled.try_fold(0_u64, |sum, polled| Some(sum.saturating_add(polled?)));
        let rows = self.vcpus.iter().flat_map(|vcpu| &vcpu.ledger.reasons);
        self.ledger = Ledger::of(rows.copied());
    }
}

impl Departed {
    fn new(snapshot: &Snapshot<'_>) -> Self {
        let isa = snapshot.isa();
        let mut ledger = Ledger::new(isa, snapshot.has_waits(), snapshot.totals());
        ledger.take_polling_apart(isa, snapshot.gone_polled(), snapshot.tsc_khz());
        Self {
            vcpus_gone: snapshot.gone(),
            polled_ns: snapshot.gone_polled(),
            ledger,
        }
    }
}

impl Vcpu {
    fn new(snapshot: &Snapshot<'_>, record: &VcpuRecord<'_>) -> Self {
        let isa = snapshot.isa();
        let mut ledger = Ledger::new(isa, snapshot.has_waits(), record.rows());
        ledger.take_polling_apart(isa, record.polled(), snapshot.tsc_khz());
        Self {
            vcpu: record.id(),
            first_tsc: record.first(),
            last_tsc: record.last(),
            phase_name: record.phase().map(|phase| ledger.cycles.name(phase)),
            phase: record.phase(),
            // The snapshot's time is that of its beginning: this vCPU may be a bit later.
            phase_ticks: snapshot.now().saturating_sub(record.last()),
            latest: record.latest().map(|reason| Label::new(isa, reason)),
            polled_ns: record.polled(),
            ledger,
        }
    }
}

/// Writes an ISA by its name.
pub(crate) fn isa_name<S: serde::Serializer>(isa: &Isa, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(isa.name())
}
