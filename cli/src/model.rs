// SPDX-License-Identifier: GPL-2.0

//! A snapshot as plain data. The field names are those of `--json` and stay.

use std::collections::BTreeMap;

use exitmeter_meter::{
    phase::Phase,
    reader::{Snapshot, VcpuRecord},
    reasons::Isa,
};
use serde::Serialize;

use crate::names::{Candidate, VmNames};

pub mod delta;
mod ledger;

#[cfg(feature = "export")]
pub(crate) use ledger::sum_if_known;
pub use ledger::{Counts, Cycles, Label, Ledger, ReasonRow, Sort};

/// Version of the data format. It grows when a field goes or changes its meaning.
pub const FORMAT: u32 = 1;

/// All data of a snapshot, or the difference of two snapshots.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// Time between the two snapshots, for a difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Span>,
    /// The host and its meter.
    pub host: HostReport,
    /// vCPUs that run or ran unmetered.
    pub unmetered_vcpus: u64,
    /// Running VMs, by VM number.
    pub vms: Vec<Vm>,
    /// Sums over the vCPUs that are gone.
    pub departed: Departed,
}

/// A time span.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Span {
    /// Length, in TSC ticks.
    pub ticks: u64,
    /// Length, in seconds, if the TSC's frequency is known.
    pub seconds: Option<f64>,
}

/// Source of the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Meter {
    /// The kernel module. A tick is a tick of the TSC.
    Module,
    /// The BPF programs. A tick is a nanosecond of the kernel's monotonic clock.
    Bpf,
}

/// The host and its meter.
#[derive(Clone, Debug, Serialize)]
pub struct HostReport {
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// `module` or `bpf`.
    pub source: Meter,
    /// TSC frequency, in kHz, if known.
    pub tsc_khz: Option<u32>,
    /// True if the TSC runs at one constant rate on all CPUs.
    pub tsc_stable: bool,
    /// The meter's life number. A new one means that the numbers began anew.
    pub life: u64,
    /// TSC at which the module was loaded.
    pub loaded_tsc: u64,
    /// TSC at which the snapshot began.
    pub snapshot_tsc: u64,
    /// Leaf map that guests see: 0, 2021 or 2022.
    pub leaf_map: Option<u32>,
    /// True if guests read the sums of the whole host.
    pub host_scope: bool,
}

/// A running VM.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// VM number, unique while the module is loaded.
    pub vm: u64,
    /// KVM's name for the VM.
    pub name: String,
    /// Thread that created the VM (`kvm->userspace_pid`). For most VMMs this is their process.
    pub pid: u32,
    /// Names that the VMM was given, if known. They are known for VMs of this host and in
    /// recordings.
    pub vmm: VmNames,
    /// Time that the numbers cover: since the first event of the oldest vCPU, or since the earlier
    /// snapshot.
    pub span: Span,
    /// Nanoseconds that KVM polled before it let the vCPUs sleep, by KVM's own count, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled_ns: Option<u64>,
    /// Sums over the vCPUs.
    #[serde(flatten)]
    pub ledger: Ledger,
    /// vCPUs of the VM.
    pub vcpus: Vec<VcpuReport>,
}

/// A vCPU.
#[derive(Clone, Debug, Serialize)]
pub struct VcpuReport {
    /// vCPU id in its VM.
    pub vcpu: u32,
    /// TSC at the first event; for a difference, at its beginning.
    pub first_tsc: u64,
    /// TSC at the latest transition; for a difference, at its end.
    pub last_tsc: u64,
    /// Name of the current phase; `blocked` if the source does not distinguish the two sleeps.
    #[serde(rename = "phase")]
    pub phase_name: Option<&'static str>,
    /// Current phase.
    #[serde(skip)]
    pub phase: Option<Phase>,
    /// Ticks since the latest transition. They are not booked on a row yet, except in a difference.
    pub phase_ticks: u64,
    /// Row that the current phase will be booked on.
    pub latest: Option<Label>,
    /// Nanoseconds that KVM polled before it let the vCPU sleep, by KVM's own count, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled_ns: Option<u64>,
    /// Numbers of the vCPU.
    #[serde(flatten)]
    pub ledger: Ledger,
}

/// The vCPUs that are gone.
#[derive(Clone, Debug, Serialize)]
pub struct Departed {
    /// Number of vCPUs.
    pub vcpus_gone: u64,
    /// Nanoseconds that KVM polled before it let them sleep, by KVM's own count, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled_ns: Option<u64>,
    /// Sums over the vCPUs.
    #[serde(flatten)]
    pub ledger: Ledger,
}

impl Report {
    /// Convert a snapshot.
    pub fn new(snapshot: &Snapshot<'_>) -> Self {
        let isa = snapshot.isa();
        let mut vms: BTreeMap<u64, Vm> = BTreeMap::new();
        for record in snapshot.vcpus() {
            vms.entry(record.vm())
                .or_insert_with(|| Vm {
                    vm: record.vm(),
                    name: record.name().to_owned(),
                    pid: record.pid(),
                    vmm: VmNames::default(),
                    span: Span::of(0, None),
                    polled_ns: None,
                    ledger: Ledger::default(),
                    vcpus: Vec::new(),
                })
                .vcpus
                .push(VcpuReport::new(snapshot, &record));
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
            host: HostReport {
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
    /// Create a span of `ticks` TSC ticks.
    pub fn of(ticks: u64, khz: Option<u32>) -> Self {
        Self {
            ticks,
            seconds: khz.map(|khz| ticks as f64 / (f64::from(khz) * 1000.0)),
        }
    }

    /// Return the rate per second of `count` events; `None` if the span in seconds is unknown or 0.
    pub fn per_second(&self, count: u64) -> Option<f64> {
        let seconds = self.seconds.filter(|seconds| *seconds > 0.0)?;
        Some(count as f64 / seconds)
    }
}

impl Vm {
    /// Return the VM's name for people, followed by KVM's name.
    pub fn label(&self) -> String {
        self.vmm.label(&self.name)
    }

    /// Return the VM's name for people in a short form.
    pub fn short(&self) -> String {
        self.vmm.short(&self.name)
    }

    /// Return all names of the VM, for a search.
    pub fn candidate(&self) -> Candidate<'_> {
        Candidate {
            vm: self.vm,
            kvm: &self.name,
            pid: self.pid,
            given: &self.vmm,
        }
    }

    /// Set the VM's numbers to the sums over its vCPUs.
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
        let mut ledger = Ledger::new(isa, snapshot.separates_waits(), snapshot.totals());
        ledger.separate_polling(isa, snapshot.departed_polled(), snapshot.tsc_khz());
        Self {
            vcpus_gone: snapshot.departed(),
            polled_ns: snapshot.departed_polled(),
            ledger,
        }
    }
}

impl VcpuReport {
    fn new(snapshot: &Snapshot<'_>, record: &VcpuRecord<'_>) -> Self {
        let isa = snapshot.isa();
        let mut ledger = Ledger::new(isa, snapshot.separates_waits(), record.rows());
        ledger.separate_polling(isa, record.polled(), snapshot.tsc_khz());
        Self {
            vcpu: record.id(),
            first_tsc: record.first(),
            last_tsc: record.last(),
            phase_name: record.phase().map(|phase| ledger.cycles.name(phase)),
            phase: record.phase(),
            // The snapshot's time is its beginning, and this record may be a bit later.
            phase_ticks: snapshot.now().saturating_sub(record.last()),
            latest: record.latest().map(|reason| Label::new(isa, reason)),
            polled_ns: record.polled(),
            ledger,
        }
    }
}

/// Serialize a number as hexadecimal digits, because readers of JSON keep only 53 bits of a number.
pub(crate) fn hexadecimal<S: serde::Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{number:#x}"))
}

/// Serialize a number like [`hexadecimal`], if it is known.
pub(crate) fn optional_hexadecimal<S: serde::Serializer>(
    number: &Option<u64>,
    to: S,
) -> Result<S::Ok, S::Error> {
    number.map(|number| format!("{number:#x}")).serialize(to)
}

/// Serialize an ISA by its name.
pub(crate) fn isa_name<S: serde::Serializer>(isa: &Isa, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(isa.name())
}
