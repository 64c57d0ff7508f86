// SPDX-License-Identifier: GPL-2.0

//! Metrics of a host: the families and their labels. docs/fleet.md lists them.

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use exitmeter_meter::phase::Phase;

use super::{
    details::Counters,
    exposition::{Exposition, Family, Kind, Labels},
    sums::{cycles, ticks, CompactRow, Key, Sums, Vm},
};
use crate::{
    model::{Cycles, Label},
    names::NameBook,
    spread::Spread,
    why::tables::Numbers,
};

/// Bounds of the histograms of exit cost, in seconds. They are the same on all hosts, so that
/// histograms can be added.
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
    help: "1 if the meter could be read, else 0.",
};
const BUILD: Family = Family {
    name: "exitmeter_build",
    kind: Kind::Info,
    unit: None,
    help: "Version of this exporter.",
};
const METER: Family = Family {
    name: "exitmeter_meter",
    kind: Kind::Info,
    unit: None,
    help:
        "Source of the numbers (module or bpf), and instruction set of the exit reasons (vmx or svm).",
};
const METER_START: Family = Family {
    name: "exitmeter_meter_start_time_seconds",
    kind: Kind::Gauge,
    unit: Some("seconds"),
    help: "Start time of the meter since 1970. Its counters begin there.",
};
const READ: Family = Family {
    name: "exitmeter_read_duration_seconds",
    kind: Kind::Gauge,
    unit: Some("seconds"),
    help: "Time that it took to read the meter for this scrape.",
};
const VCPUS: Family = Family {
    name: "exitmeter_vcpus",
    kind: Kind::Gauge,
    unit: None,
    help: "vCPUs that are metered now.",
};
const UNMETERED: Family = Family {
    name: "exitmeter_unmetered_vcpus",
    kind: Kind::Counter,
    unit: None,
    help: "vCPUs that run or ran unmetered.",
};
const DEPARTED: Family = Family {
    name: "exitmeter_departed_vcpus",
    kind: Kind::Counter,
    unit: None,
    help: "Metered vCPUs that are gone.",
};
const HOST_EXITS: Family = Family {
    name: "exitmeter_host_exits",
    kind: Kind::Counter,
    unit: None,
    help: "VM exits of all VMs, including those that are gone.",
};
const HOST_KERNEL: Family = Family {
    name: "exitmeter_host_kernel_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that KVM spent on exits of all VMs, including those that are gone.",
};
const HOST_USER: Family = Family {
    name: "exitmeter_host_user_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that the VMMs spent on exits of all VMs, including those that are gone.",
};
const HOST_PHASE: Family = Family {
    name: "exitmeter_host_phase_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time of all vCPUs by phase, including those that are gone, without the phase that each is in.",
};
const HOST_POLLED: Family = Family {
    name: "exitmeter_host_polled_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Part of the kernel's time in which KVM polled before it let vCPUs sleep, by KVM's own count.",
};
const HOST_DURATION: Family = Family {
    name: "exitmeter_host_exit_duration_seconds",
    kind: Kind::Histogram,
    unit: Some("seconds"),
    help: "Cost of single exits in the kernel, without sleep, preemption and user space.",
};
const VM_INFO: Family = Family {
    name: "exitmeter_vm",
    kind: Kind::Info,
    unit: None,
    help: "Identity of a VM: KVM's name for it, its process, and the names that its VMM was given.",
};
const VM_START: Family = Family {
    name: "exitmeter_vm_start_time_seconds",
    kind: Kind::Gauge,
    unit: Some("seconds"),
    help: "Time since 1970 at which the meter first saw the VM. Its counters begin there.",
};
const VM_VCPUS: Family = Family {
    name: "exitmeter_vm_vcpus",
    kind: Kind::Gauge,
    unit: None,
    help: "Metered vCPUs of a VM.",
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
    help: "Exits of a VM that came from its nested guests.",
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
    help: "Time of a VM's vCPUs by phase, with the phase that each is in. The phases add up to the vCPUs' lives.",
};
const POLLED: Family = Family {
    name: "exitmeter_polled_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Part of the kernel's time in which KVM polled before it let a VM's vCPUs sleep, by KVM's own count.",
};
const DURATION: Family = Family {
    name: "exitmeter_exit_duration_seconds",
    kind: Kind::Histogram,
    unit: Some("seconds"),
    help: "Cost of single exits of a VM in the kernel, without sleep, preemption and user space.",
};
/// Times written by reason: the family of VMs, the family of the host, and the phase.
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
    help: "Metered vCPUs with details now.",
};
const DETAIL_EXITS: Family = Family {
    name: "exitmeter_detail_exits",
    kind: Kind::Counter,
    unit: None,
    help: "VM exits of a VM by detail, since this exporter first saw its details.",
};
const DETAIL_KERNEL: Family = Family {
    name: "exitmeter_detail_kernel_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that KVM spent on a VM's exits by detail.",
};
const DETAIL_USER: Family = Family {
    name: "exitmeter_detail_user_seconds",
    kind: Kind::Counter,
    unit: Some("seconds"),
    help: "Time that the VMM spent on a VM's exits by detail.",
};

/// Data of a scrape.
#[derive(Debug)]
pub struct Scrape<'a> {
    /// Numbers of the snapshot.
    pub sums: &'a Sums,
    /// Label of each VM to be written, by VM number.
    pub labels: &'a BTreeMap<u64, String>,
    /// Names of the VMs.
    pub names: &'a NameBook,
    /// Counters of details by VM, if requested.
    pub details: Option<&'a BTreeMap<u64, Counters>>,
    /// Start time of the meter since 1970.
    pub meter_start: Duration,
    /// Time that it took to read the meter.
    pub read_time: Duration,
    /// Write the start time of each counter, if the format has it.
    pub created: bool,
}

/// Average length of a line, in bytes.
const LINE: usize = 90;

/// A VM to be written.
struct ShownVm<'a> {
    label: &'a str,
    number: u64,
    vm: &'a Vm,
    /// Start of its counters, in seconds since 1970.
    start: f64,
}

/// State of writing a scrape.
struct Writer<'a> {
    to: &'a mut Exposition,
    scrape: &'a Scrape<'a>,
    /// Start of the meter, in seconds since 1970.
    meter_start: f64,
    reasons: &'a BTreeMap<Key, String>,
    vms: &'a [ShownVm<'a>],
}

/// Write whether the meter could be read. If it could not, the scrape has nothing else.
pub fn write_up(to: &mut Exposition, is_up: bool) {
    to.family(&UP);
    to.sample(&UP, &[], u8::from(is_up));
    to.family(&BUILD);
    to.sample(&BUILD, &[("version", env!("CARGO_PKG_VERSION"))], 1);
}

/// Write all metrics of a host.
pub fn write(to: &mut Exposition, scrape: &Scrape<'_>) {
    // Reserve memory: a text that grows is copied, and takes twice its memory meanwhile.
    let vms = scrape.sums.vms.values();
    let lines: usize = vms.map(|vm| 12 + 3 * vm.rows.len()).sum();
    to.reserve(lines * LINE);
    let rows = scrape.sums.all.iter();
    let reasons = rows.map(|(key, row)| (*key, reason(&row.label)));
    let reasons: BTreeMap<_, _> = reasons.collect();
    let vms = scrape.labels.iter().filter_map(|(number, label)| {
        let vm = scrape.sums.vms.get(number)?;
        Some(ShownVm {
            label,
            number: *number,
            vm,
            start: scrape.since_1970(vm.first),
        })
    });
    let vms: Vec<_> = vms.collect();
    write_up(to, true);
    let mut writer = Writer {
        to,
        scrape,
        meter_start: scrape.since_1970(scrape.sums.head.loaded),
        reasons: &reasons,
        vms: &vms,
    };
    writer.meter();
    writer.host();
    writer.vms();
    writer.vcpus();
    writer.details();
}

/// Return the label of a reason: its name, or its number.
fn reason(label: &Label) -> String {
    match (label.name, label.code) {
        (Some(name), _) => name.to_owned(),
        (None, Some(code)) => format!("{code:#x}"),
        (None, None) => label.kind.to_owned(),
    }
}

impl Scrape<'_> {
    /// Convert a TSC to whole seconds since 1970. The two clocks do not agree more closely.
    fn since_1970(&self, tsc: u64) -> f64 {
        let age = tsc.saturating_sub(self.sums.head.loaded);
        let age = self.seconds(age.into()).unwrap_or(0.0);
        (self.meter_start.as_secs_f64() + age).round()
    }

    /// Convert ticks to seconds; `None` if the frequency is unknown.
    fn seconds(&self, ticks: u128) -> Option<f64> {
        let khz = self.sums.head.tsc_khz?;
        Some(ticks as f64 / (f64::from(khz) * 1000.0))
    }

    /// Convert seconds to ticks.
    fn ticks(&self, seconds: f64) -> u64 {
        let khz = self.sums.head.tsc_khz.unwrap_or(0);
        // A bound is some hundredths of a second, so the ticks fit.
        (seconds * f64::from(khz) * 1000.0) as u64
    }
}

impl Writer<'_> {
    /// Write a sample, and for a counter its start time.
    fn sample(&mut self, family: &Family, labels: Labels<'_>, value: impl Display, start: f64) {
        self.to.sample(family, labels, value);
        if self.scrape.created && family.kind == Kind::Counter {
            self.to.created(family, labels, start);
        }
    }

    /// Write a time, if the frequency is known.
    fn time(&mut self, family: &Family, labels: Labels<'_>, ticks: u128, start: f64) {
        if let Some(seconds) = self.scrape.seconds(ticks) {
            self.sample(family, labels, seconds, start);
        }
    }

    /// Write a family of the host that has one sample.
    fn host_sample(&mut self, family: &Family, value: impl Display) {
        self.to.family(family);
        self.sample(family, &[], value, self.meter_start);
    }

    /// Write the histogram of the cost of a reason's exits.
    fn spread(
        &mut self,
        family: &Family,
        labels: Labels<'_>,
        (spread, cycles): (Option<&Spread>, &Cycles),
        start: f64,
    ) {
        let (Some(spread), Some(sum)) = (spread, self.scrape.seconds(cycles.kernel)) else {
            return;
        };
        let counts = spread.up_to(BOUNDS.map(|bound| self.scrape.ticks(bound)));
        let counts: Vec<_> = BOUNDS.into_iter().zip(counts).collect();
        self.to
            .histogram(family, labels, &counts, spread.count(), sum);
        if self.scrape.created {
            self.to.created(family, labels, start);
        }
    }

    fn meter(&mut self) {
        let sums = self.scrape.sums;
        let source = if sums.head.by_bpf { "bpf" } else { "module" };
        let labels = [("source", source), ("isa", sums.head.isa.name())];
        self.to.family(&METER);
        self.to.sample(&METER, &labels, 1);
        self.host_sample(&METER_START, self.meter_start);
        self.host_sample(&READ, self.scrape.read_time.as_secs_f64());
        self.host_sample(&VCPUS, sums.vcpus());
        self.host_sample(&UNMETERED, sums.head.unmetered);
        self.host_sample(&DEPARTED, sums.head.gone);
    }

    fn host(&mut self) {
        let (sums, reasons, start) = (self.scrape.sums, self.reasons, self.meter_start);
        // Rows and reasons have the same keys, in the same order.
        let rows = || sums.all.values().zip(reasons.values());
        self.to.family(&HOST_EXITS);
        for (row, reason) in rows() {
            self.sample(&HOST_EXITS, &[("reason", reason)], row.exits, start);
        }
        for (_, family, phase) in BY_REASON {
            self.to.family(family);
            for (row, reason) in rows() {
                let ticks = row.cycles.of(phase);
                if ticks != 0 {
                    self.time(family, &[("reason", reason)], ticks, start);
                }
            }
        }
        self.to.family(&HOST_PHASE);
        for (phase, ticks) in ticks(&cycles(&sums.all)) {
            self.time(&HOST_PHASE, &[("phase", phase)], ticks, start);
        }
        if let Some(polled) = sums.polled_ns {
            self.host_sample(&HOST_POLLED, polled as f64 / 1e9);
        }
        self.to.family(&HOST_DURATION);
        for (row, reason) in rows() {
            let spread = (row.spread.as_ref(), &row.cycles);
            self.spread(&HOST_DURATION, &[("reason", reason)], spread, start);
        }
    }

    fn vms(&mut self) {
        self.to.family(&VM_INFO);
        for shown in self.vms {
            let given = self.scrape.names.vm(shown.number);
            let pid = shown.vm.pid.to_string();
            let labels = [
                ("vm", shown.label),
                ("kvm", &shown.vm.name),
                ("pid", &pid),
                ("name", given.name.as_deref().unwrap_or_default()),
                ("uuid", given.uuid.as_deref().unwrap_or_default()),
                ("manager", given.manager.as_deref().unwrap_or_default()),
                ("id", given.id.as_deref().unwrap_or_default()),
                ("unit", given.unit.as_deref().unwrap_or_default()),
            ];
            self.to.sample(&VM_INFO, &labels, 1);
        }
        self.each_vm(&VM_START, |shown| Some(shown.start));
        self.each_vm(&VM_VCPUS, |shown| Some(shown.vm.vcpus as f64));
        self.to.family(&EXITS);
        for shown in self.vms {
            for (reason, row) in self.rows(shown.vm) {
                let labels = [("vm", shown.label), ("reason", reason)];
                self.sample(&EXITS, &labels, row.exits, shown.start);
            }
        }
        self.each_vm(&NESTED, |shown| {
            let rows = shown.vm.rows.values();
            let nested = rows.map(|row| row.nested_exits);
            let nested: Option<u64> = nested.sum();
            nested.map(|nested| nested as f64)
        });
        for (family, _, phase) in BY_REASON {
            self.to.family(family);
            for shown in self.vms {
                for (reason, row) in self.rows(shown.vm) {
                    let ticks = row.cycles.of(phase);
                    if ticks != 0 {
                        let labels = [("vm", shown.label), ("reason", reason)];
                        self.time(family, &labels, ticks, shown.start);
                    }
                }
            }
        }
        self.to.family(&PHASE);
        for shown in self.vms {
            for (phase, ticks) in ticks(&shown.vm.cycles()) {
                let labels = [("vm", shown.label), ("phase", phase)];
                self.time(&PHASE, &labels, ticks, shown.start);
            }
        }
        self.each_vm(&POLLED, |shown| Some(shown.vm.polled_ns? as f64 / 1e9));
        let spreads = |shown: &ShownVm<'_>| shown.vm.rows.values().any(|row| row.spread.is_some());
        if self.vms.iter().any(spreads) {
            self.to.family(&DURATION);
        }
        for shown in self.vms.iter().filter(|shown| spreads(shown)) {
            for (reason, row) in self.rows(shown.vm) {
                let labels = [("vm", shown.label), ("reason", reason)];
                let spread = (row.spread.as_deref(), &row.cycles);
                self.spread(&DURATION, &labels, spread, shown.start);
            }
        }
    }

    fn vcpus(&mut self) {
        if self.vms.iter().all(|shown| shown.vm.each.is_empty()) {
            return;
        }
        self.to.family(&VCPU_EXITS);
        for shown in self.vms {
            for (id, (exits, _)) in &shown.vm.each {
                let labels = [("vm", shown.label), ("vcpu", &*id.to_string())];
                self.sample(&VCPU_EXITS, &labels, exits, shown.start);
            }
        }
        self.to.family(&VCPU_PHASE);
        for shown in self.vms {
            for (id, (_, cycles)) in &shown.vm.each {
                let id = id.to_string();
                for (phase, ticks) in ticks(cycles) {
                    let labels = [("vm", shown.label), ("vcpu", &id), ("phase", phase)];
                    self.time(&VCPU_PHASE, &labels, ticks, shown.start);
                }
            }
        }
    }

    fn details(&mut self) {
        let Some(details) = self.scrape.details else {
            return;
        };
        self.host_sample(&DETAILED, self.scrape.sums.detailed);
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
            for shown in self.vms {
                let Some(counters) = details.get(&shown.number) else {
                    continue;
                };
                let start = self.scrape.since_1970(counters.since);
                for ((key, words), numbers) in &counters.rows {
                    // Times of 0 get no series, as in the metrics by reason.
                    let value = value(self, numbers).filter(|value| *value != 0.0);
                    if let (Some(reason), Some(value)) = (self.reasons.get(key), value) {
                        let labels = [("vm", shown.label), ("reason", reason), ("detail", words)];
                        self.sample(family, &labels, value, start);
                    }
                }
            }
        }
    }

    /// Write a family with one sample per VM.
    fn each_vm(&mut self, family: &Family, value: impl Fn(&ShownVm<'_>) -> Option<f64>) {
        self.to.family(family);
        for shown in self.vms {
            if let Some(value) = value(shown) {
                self.sample(family, &[("vm", shown.label)], value, shown.start);
            }
        }
    }
}

impl<'a> Writer<'a> {
    /// Return the rows of a VM, with the names of their reasons.
    fn rows(&self, vm: &'a Vm) -> impl Iterator<Item = (&'a str, &'a CompactRow)> + use<'a> {
        let reasons = self.reasons;
        vm.rows.iter().filter_map(move |(key, row)| {
            let reason = reasons.get(key)?;
            Some((reason.as_str(), row))
        })
    }
}

#[cfg(test)]
mod tests {
    /// docs/fleet.md has each family of this file, also those that only some hosts have.
    #[test]
    fn the_documentation_has_each_family() {
        let page = include_str!("../../../docs/fleet.md");
        let (code, _) = include_str!("metrics.rs")
            .split_once("#[cfg(test)]")
            .expect("this module");
        let families = code.split(": Family = Family {").skip(1);
        let mut count = 0;
        for family in families {
            let between = |start: &str, end: &str| {
                let (_, rest) = family.split_once(start).expect("the field");
                rest.split_once(end).expect("its end").0
            };
            let suffix = match between("kind: Kind::", ",") {
                "Counter" => "_total",
                "Info" => "_info",
                _ => "",
            };
            let name = format!("`{}{suffix}`", between("name: \"", "\""));
            assert!(page.contains(&name), "docs/fleet.md has no {name}");
            count += 1;
        }
        assert!(count >= 30, "{count}");
    }
}
