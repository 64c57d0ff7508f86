// SPDX-License-Identifier: GPL-2.0

//! The metrics of a host: which families there are, with which labels. docs/fleet.md lists them.

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use exitmeter_meter::phase::Phase;

use super::{
    details::Counters,
    exposition::{Exposition, Family, Kind, Labels},
    sums::{cycles, ticks, Key, Row, Sums, Vm},
};
use crate::{
    model::{Cycles, Label},
    names::Book,
    spread::Spread,
    why::tables::Numbers,
};

/// The bounds of what an exit costs, in seconds. They are the same on all hosts, so that histograms can be summed.
pub const BOUNDS: [f64; 12] = [
    0.000_000_5,
    0.000_001,
    0.000_002,
    0.000_004,
    0.000_008,
    0.000_016,
    0.000_032,
    0.000_064,
    0.000_128,
    0.000_512,
    0.004_096,
    0.032_768,
];

const UP: Family = Family {
    name: "exitmeter_up",
    kind: Kind::Gauge,
    unit: None,
    help: "Whether the meter could be read: 1, or 0.",
};
const BUILD: Family = Family {
    name: "exitmeter_build",
    kind: Kind::Info,
    unit: None,
    help: "The version of this exporter.",
};
const METER: Family = Family {
    name: "exitmeter_meter",
    kind: Kind::Info,
    unit: None,
    help:
        "What keeps the numbers (module or bpf), and whose exit reasons they are by (vmx or svm).",
};
const METER_START: Family = Family {
    name: "exitmeter_meter_start_time_seconds",
    kind: Kind::Gauge,
    unit: Some("seconds"),
    help: "When the meter began, since 1970: its counters begin anew there.",
};
const READ: Family = Family {
    name: "exitmeter_read_duration_seconds",
    kind: Kind::Gauge,
    unit: Some("seconds"),
    help: "How long it took to read the meter for this scrape.",
};
const VCPUS: Family = Family {
    name: "exitmeter_vcpus",
    kind: Kind::Gauge,
    unit: None,
    help: "The vCPUs that run metered.",
};
const UNMETERED: Family = Family {
    name: "exitmeter_unmetered_vcpus",
    kind: Kind::Counter,
    unit: None,
    help: "The vCPUs that run, or ran, without being metered.",
};
const DEPARTED: Family = Family {
    name: "exitmeter_departed_vcpus",
    kind: Kind::Counter,
    unit: None,
    help: "The vCPUs that were metered and are gone.",
};
const HOST_EXITS: Family = Family {
    name: "exitmeter_host_exits",
    kind: Kind::Counter,
    unit: None,
    help: "VM exits of all VMs, those that are gone too.",
};
const HOST_KERNEL: Family = Family {
    name: "exitmeter_host_kernel_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that KVM spent on exits, of all VMs, those that are gone too.",
};
const HOST_USER: Family = Family {
    name: "exitmeter_host_user_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that the VMMs spent on exits, of all VMs, those that are gone too.",
};
const HOST_PHASE: Family = Family {
    name: "exitmeter_host_phase_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time of all vCPUs by phase, those that are gone too, without the phase that each is in.",
};
const HOST_POLLED: Family = Family {
    name: "exitmeter_host_polled_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Of the kernel's time that for which KVM polled before it let vCPUs sleep, by KVM's own count.",
};
const HOST_DURATION: Family = Family {
    name: "exitmeter_host_exit_duration_seconds",
    kind: Kind::Histogram,
    unit: Some("seconds"),
    help: "What single exits cost in the kernel, without sleep, preemption and user space.",
};
const VM_INFO: Family = Family {
    name: "exitmeter_vm",
    kind: Kind::Info,
    unit: None,
    help: "What is known of a VM: KVM's name, its process, and what its VMM was told.",
};
const VM_START: Family = Family {
    name: "exitmeter_vm_start_time_seconds",
    kind: Kind::Gauge,
    unit: Some("seconds"),
    help: "When the meter first saw the VM, since 1970: its counters begin there.",
};
const VM_VCPUS: Family = Family {
    name: "exitmeter_vm_vcpus",
    kind: Kind::Gauge,
    unit: None,
    help: "The metered vCPUs of a VM.",
};
const EXITS: Family = Family {
    name: "exitmeter_exits",
    kind: Kind::Counter,
    unit: None,
    help: "VM exits of a VM by reason.",
};
const NESTED: Family = Family {
    name: "exitmeter_nested_exits",
    kind: Kind::Counter,
    unit: None,
    help: "Of the exits of a VM those from a guest of its own.",
};
const KERNEL: Family = Family {
    name: "exitmeter_kernel_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that KVM spent on a VM's exits by reason.",
};
const USER: Family = Family {
    name: "exitmeter_user_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that the VMM spent on a VM's exits by reason.",
};
const PHASE: Family = Family {
    name: "exitmeter_phase_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time of a VM's vCPUs by phase, with the phase that each is in: their sum is the time for which they were there.",
};
const POLLED: Family = Family {
    name: "exitmeter_polled_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Of the kernel's time that for which KVM polled before it let a VM's vCPUs sleep, by KVM's own count.",
};
const DURATION: Family = Family {
    name: "exitmeter_exit_duration_seconds",
    kind: Kind::Histogram,
    unit: Some("seconds"),
    help: "What single exits of a VM cost in the kernel, without sleep, preemption and user space.",
};
/// Which times of a reason are told: the families of VMs and of the host, and the ticks.
const BY_REASON: [(&Family, &Family, Phase); 2] = [
    (&KERNEL, &HOST_KERNEL, Phase::Kernel),
    (&USER, &HOST_USER, Phase::User),
];
const VCPU_EXITS: Family = Family {
    name: "exitmeter_vcpu_exits",
    kind: Kind::Counter,
    unit: None,
    help: "VM exits of a vCPU.",
};
const VCPU_PHASE: Family = Family {
    name: "exitmeter_vcpu_phase_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time of a vCPU by phase.",
};
const DETAILED: Family = Family {
    name: "exitmeter_detailed_vcpus",
    kind: Kind::Gauge,
    unit: None,
    help: "The metered vCPUs of which details are kept now.",
};
const DETAIL_EXITS: Family = Family {
    name: "exitmeter_detail_exits",
    kind: Kind::Counter,
    unit: None,
    help: "VM exits of a VM by what they were about, since this exporter saw its details.",
};
const DETAIL_KERNEL: Family = Family {
    name: "exitmeter_detail_kernel_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that KVM spent on a VM's exits by what they were about.",
};
const DETAIL_USER: Family = Family {
    name: "exitmeter_detail_user_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that the VMM spent on a VM's exits by what they were about.",
};

/// What a scrape has.
#[derive(Debug)]
pub struct Scrape<'a> {
    /// The numbers.
    pub sums: &'a Sums,
    /// The label of each VM that is told, by its number.
    pub labels: &'a BTreeMap<u64, String>,
    /// What is known of each VM.
    pub names: &'a Book,
    /// What the exits of each VM were about, when that was asked for.
    pub details: Option<&'a BTreeMap<u64, Counters>>,
    /// When the meter began, since 1970.
    pub begun: Duration,
    /// How long it took to read the meter.
    pub took: Duration,
    /// Whether counters have the moment of their beginning, where the format has that.
    pub created: bool,
}

/// Bytes of a line, on the average.
const LINE: usize = 90;

/// A VM that is told.
struct Told<'a> {
    label: &'a str,
    number: u64,
    vm: &'a Vm,
    /// When it began: seconds since 1970.
    began: f64,
}

/// A scrape as it is written.
struct Writer<'a> {
    to: &'a mut Exposition,
    scrape: &'a Scrape<'a>,
    /// When the meter began: seconds since 1970.
    begun: f64,
    reasons: &'a BTreeMap<Key, String>,
    vms: &'a [Told<'a>],
}

/// Write whether the meter could be read: all that there is when it could not.
pub fn write_up(to: &mut Exposition, is_up: bool) {
    to.family(&UP);
    to.sample(&UP, &[], u8::from(is_up));
    to.family(&BUILD);
    to.sample(&BUILD, &[("version", env!("CARGO_PKG_VERSION"))], 1);
}

/// Write all metrics of a host.
pub fn write(to: &mut Exposition, scrape: &Scrape<'_>) {
    // A text that grows is copied, and there twice meanwhile.
    let vms = scrape.sums.vms.values();
    let lines: usize = vms.map(|vm| 12 + 3 * vm.rows.len()).sum();
    to.reserve(lines * LINE);
    let rows = scrape.sums.all.iter();
    let reasons = rows.map(|(key, row)| (*key, reason(&row.label)));
    let reasons: BTreeMap<_, _> = reasons.collect();
    let vms = scrape.labels.iter().filter_map(|(number, label)| {
        let vm = scrape.sums.vms.get(number)?;
        Some(Told {
            label,
            number: *number,
            vm,
            began: scrape.since_1970(vm.first),
        })
    });
    let vms: Vec<_> = vms.collect();
    write_up(to, true);
    let mut writer = Writer {
        to,
        scrape,
        begun: scrape.since_1970(scrape.sums.head.loaded),
        reasons: &reasons,
        vms: &vms,
    };
    writer.meter();
    writer.host();
    writer.vms();
    writer.vcpus();
    writer.details();
}

/// Return a reason as a label: its name, or its number.
fn reason(label: &Label) -> String {
    match (label.name, label.code) {
        (Some(name), _) => name.to_owned(),
        (None, Some(code)) => format!("{code:#x}"),
        (None, None) => label.kind.to_owned(),
    }
}

impl Scrape<'_> {
    /// Return a TSC as whole seconds since 1970: the two clocks do not agree further.
    fn since_1970(&self, tsc: u64) -> f64 {
        let age = tsc.saturating_sub(self.sums.head.loaded);
        let age = self.seconds(age.into()).unwrap_or(0.0);
        (self.begun.as_secs_f64() + age).round()
    }

    /// Return ticks as seconds; `None` when the clock's rate is not known.
    fn seconds(&self, ticks: u128) -> Option<f64> {
        let khz = self.sums.head.tsc_khz?;
        Some(ticks as f64 / (f64::from(khz) * 1000.0))
    }

    /// Return seconds as ticks.
    fn ticks(&self, seconds: f64) -> u64 {
        let khz = self.sums.head.tsc_khz.unwrap_or(0);
        // A bound is some hundredths of a second, so it fits.
        (seconds * f64::from(khz) * 1000.0) as u64
    }
}

impl Writer<'_> {
    /// Write a number, and for a counter when it began.
    fn number(&mut self, family: &Family, labels: Labels<'_>, value: impl Display, began: f64) {
        self.to.sample(family, labels, value);
        if self.scrape.created && family.kind == Kind::Counter {
            self.to.created(family, labels, began);
        }
    }

    /// Write a time, if the clock's rate is known.
    fn time(&mut self, family: &Family, labels: Labels<'_>, ticks: u128, began: f64) {
        if let Some(seconds) = self.scrape.seconds(ticks) {
            self.number(family, labels, seconds, began);
        }
    }

    /// Write a family of the host that has one number.
    fn one(&mut self, family: &Family, value: impl Display) {
        self.to.family(family);
        self.number(family, &[], value, self.begun);
    }

    /// Write what single exits of a reason cost.
    fn spread(
        &mut self,
        family: &Family,
        labels: Labels<'_>,
        (spread, cycles): (Option<&Spread>, &Cycles),
        began: f64,
    ) {
        let (Some(spread), Some(sum)) = (spread, self.scrape.seconds(cycles.kernel)) else {
            return;
        };
        let counts = spread.up_to(BOUNDS.map(|bound| self.scrape.ticks(bound)));
        let counts: Vec<_> = BOUNDS.into_iter().zip(counts).collect();
        self.to
            .histogram(family, labels, &counts, spread.count(), sum);
        if self.scrape.created {
            self.to.created(family, labels, began);
        }
    }

    fn meter(&mut self) {
        let sums = self.scrape.sums;
        let source = if sums.head.by_bpf { "bpf" } else { "module" };
        let labels = [("source", source), ("isa", sums.head.isa.name())];
        self.to.family(&METER);
        self.to.sample(&METER, &labels, 1);
        self.one(&METER_START, self.begun);
        self.one(&READ, self.scrape.took.as_secs_f64());
        self.one(&VCPUS, sums.vcpus());
        self.one(&UNMETERED, sums.head.unmetered);
        self.one(&DEPARTED, sums.head.gone);
    }

    fn host(&mut self) {
        let (sums, reasons, began) = (self.scrape.sums, self.reasons, self.begun);
        // All of these have the same keys, in the same order.
        let rows = || sums.all.values().zip(reasons.values());
        self.to.family(&HOST_EXITS);
        for (row, reason) in rows() {
            self.number(&HOST_EXITS, &[("reason", reason)], row.exits, began);
        }
        for (_, family, phase) in BY_REASON {
            self.to.family(family);
            for (row, reason) in rows() {
                let ticks = row.cycles.of(phase);
                if ticks != 0 {
                    self.time(family, &[("reason", reason)], ticks, began);
                }
            }
        }
        self.to.family(&HOST_PHASE);
        for (phase, ticks) in ticks(&cycles(&sums.all)) {
            self.time(&HOST_PHASE, &[("phase", phase)], ticks, began);
        }
        if let Some(polled) = sums.polled_ns {
            self.one(&HOST_POLLED, polled as f64 / 1e9);
        }
        self.to.family(&HOST_DURATION);
        for (row, reason) in rows() {
            let spread = (row.spread.as_ref(), &row.cycles);
            self.spread(&HOST_DURATION, &[("reason", reason)], spread, began);
        }
    }

    fn vms(&mut self) {
        self.to.family(&VM_INFO);
        for told in self.vms {
            let given = self.scrape.names.vm(told.number);
            let pid = told.vm.pid.to_string();
            let labels = [
                ("vm", told.label),
                ("kvm", &told.vm.name),
                ("pid", &pid),
                ("name", given.name.as_deref().unwrap_or_default()),
                ("uuid", given.uuid.as_deref().unwrap_or_default()),
                ("manager", given.manager.as_deref().unwrap_or_default()),
                ("id", given.id.as_deref().unwrap_or_default()),
                ("unit", given.unit.as_deref().unwrap_or_default()),
            ];
            self.to.sample(&VM_INFO, &labels, 1);
        }
        self.each_vm(&VM_START, |told| Some(told.began));
        self.each_vm(&VM_VCPUS, |told| Some(told.vm.vcpus as f64));
        self.to.family(&EXITS);
        for told in self.vms {
            for (reason, row) in self.rows(told.vm) {
                let labels = [("vm", told.label), ("reason", reason)];
                self.number(&EXITS, &labels, row.exits, told.began);
            }
        }
        self.each_vm(&NESTED, |told| {
            let rows = told.vm.rows.values();
            let nested = rows.map(|row| row.nested_exits);
            let nested: Option<u64> = nested.sum();
            nested.map(|nested| nested as f64)
        });
        for (family, _, phase) in BY_REASON {
            self.to.family(family);
            for told in self.vms {
                for (reason, row) in self.rows(told.vm) {
                    let ticks = row.cycles.of(phase);
                    if ticks != 0 {
                        let labels = [("vm", told.label), ("reason", reason)];
                        self.time(family, &labels, ticks, told.began);
                    }
                }
            }
        }
        self.to.family(&PHASE);
        for told in self.vms {
            for (phase, ticks) in ticks(&told.vm.cycles()) {
                let labels = [("vm", told.label), ("phase", phase)];
                self.time(&PHASE, &labels, ticks, told.began);
            }
        }
        self.each_vm(&POLLED, |told| Some(told.vm.polled_ns? as f64 / 1e9));
        let spreads = |told: &Told<'_>| told.vm.rows.values().any(|row| row.spread.is_some());
        if self.vms.iter().any(spreads) {
            self.to.family(&DURATION);
        }
        for told in self.vms.iter().filter(|told| spreads(told)) {
            for (reason, row) in self.rows(told.vm) {
                let labels = [("vm", told.label), ("reason", reason)];
                let spread = (row.spread.as_deref(), &row.cycles);
                self.spread(&DURATION, &labels, spread, told.began);
            }
        }
    }

    fn vcpus(&mut self) {
        if self.vms.iter().all(|told| told.vm.each.is_empty()) {
            return;
        }
        self.to.family(&VCPU_EXITS);
        for told in self.vms {
            for (id, (exits, _)) in &told.vm.each {
                let labels = [("vm", told.label), ("vcpu", &*id.to_string())];
                self.number(&VCPU_EXITS, &labels, exits, told.began);
            }
        }
        self.to.family(&VCPU_PHASE);
        for told in self.vms {
            for (id, (_, cycles)) in &told.vm.each {
                let id = id.to_string();
                for (phase, ticks) in ticks(cycles) {
                    let labels = [("vm", told.label), ("vcpu", &id), ("phase", phase)];
                    self.time(&VCPU_PHASE, &labels, ticks, told.began);
                }
            }
        }
    }

    fn details(&mut self) {
        let Some(details) = self.scrape.details else {
            return;
        };
        self.one(&DETAILED, self.scrape.sums.detailed);
        type Value = fn(&Writer<'_>, &Numbers) -> Option<f64>;
        let families: [(&Family, Value); 3] = [
            (&DETAIL_EXITS, |_, numbers| Some(numbers.exits as f64)),
            (&DETAIL_KERNEL, |to, numbers| {
                to.scrape.seconds(numbers.kernel)
            }),
            (&DETAIL_USER, |to, numbers| to.scrape.seconds(numbers.user)),
        ];
        for (family, value) in families {
            self.to.family(family);
            for told in self.vms {
                let Some(counters) = details.get(&told.number) else {
                    continue;
                };
                let began = self.scrape.since_1970(counters.since);
                for ((key, words), numbers) in &counters.rows {
                    // Time that there is not has no series, as that of reasons.
                    let value = value(self, numbers).filter(|value| *value != 0.0);
                    if let (Some(reason), Some(value)) = (self.reasons.get(key), value) {
                        let labels = [("vm", told.label), ("reason", reason), ("detail", words)];
                        self.number(family, &labels, value, began);
                    }
                }
            }
        }
    }

    /// Write a family that has a number for each VM.
    fn each_vm(&mut self, family: &Family, of: impl Fn(&Told<'_>) -> Option<f64>) {
        self.to.family(family);
        for told in self.vms {
            if let Some(value) = of(told) {
                self.number(family, &[("vm", told.label)], value, told.began);
            }
        }
    }
}

impl<'a> Writer<'a> {
    /// Return the rows of a VM, with the names of their reasons.
    fn rows(&self, vm: &'a Vm) -> impl Iterator<Item = (&'a str, &'a Row)> + use<'a> {
        let reasons = self.reasons;
        vm.rows.iter().filter_map(move |(key, row)| {
            let reason = reasons.get(key)?;
            Some((reason.as_str(), row))
        })
    }
}
