// SPDX-License-Identifier: GPL-2.0

//! Names of VMs, as people gave them.
//!
//! KVM names a VM after the thread that created it, `kvm-PID`. Other names are in the VMM's command
//! line, which [`command`] reads, and in its cgroup ([`mod@unit`]); [`process`] gets both from
//! /proc. A [`NameBook`] keeps the names, as the process may be gone later, and [`find`] returns the VM
//! that a user means.
//!
//! All of this is text from outside the tool. It passes [`words::clean`] before it is shown.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use exitmeter_meter::reader::Snapshot;
use serde::{de::Error as _, Deserialize, Deserializer, Serialize};

use self::process::Processes;
use crate::{
    model::{hexadecimal, Report},
    source,
};

pub mod command;
pub mod process;
pub mod unit;
pub mod words;

/// Names of a VM that its VMM was given, as far as they are visible.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmNames {
    /// Name.
    pub name: Option<String>,
    /// UUID, in lower case.
    pub uuid: Option<String>,
    /// Manager of the VM: `libvirt`, `openstack`, `proxmox`, `kubevirt`, `kata`, `incus`, `lxd`;
    /// else its VMM: `qemu`, `firecracker`, `cloud-hypervisor`.
    pub manager: Option<String>,
    /// Id in the manager, or path of the API socket.
    pub id: Option<String>,
    /// Systemd unit that the VMM runs in, or else its cgroup.
    pub unit: Option<String>,
    /// Process ids in the PID namespaces below the one of /proc.
    #[serde(skip)]
    pub inner_pids: Vec<u32>,
}

/// Names of a VM that nothing is known of.
static UNKNOWN: VmNames = VmNames {
    name: None,
    uuid: None,
    manager: None,
    id: None,
    unit: None,
    inner_pids: Vec::new(),
};

impl VmNames {
    /// Return the VM's name for people, with KVM's name behind it: `web (kvm-1234)`.
    pub fn label(&self, kvm: &str) -> String {
        let kvm = words::clean(kvm.as_bytes());
        match self.shown() {
            Some(name) if name != kvm => format!("{name} ({kvm})"),
            _ => kvm,
        }
    }

    /// Return the VM's name for people in a short form: KVM's name only if there is no other.
    pub fn short(&self, kvm: &str) -> String {
        match self.shown() {
            Some(name) => name.to_owned(),
            None => words::clean(kvm.as_bytes()),
        }
    }

    /// Return the other names, in words.
    pub fn others(&self) -> Vec<String> {
        let manager = self.manager.clone();
        // Often the id is also the name.
        let id = self.id.as_ref().filter(|id| self.shown() != Some(*id));
        let words = [
            ("id", id),
            ("uuid", self.uuid.as_ref()),
            ("unit", self.unit.as_ref()),
        ];
        let words = words.into_iter().filter_map(|(what, text)| {
            let text = text?;
            Some(format!("{what} {text}"))
        });
        manager.into_iter().chain(words).collect()
    }

    fn shown(&self) -> Option<&str> {
        self.name.as_deref().or(self.id.as_deref())
    }

    /// Return true if `wanted` is one of the VM's names.
    fn has_name(&self, wanted: &str) -> bool {
        let is = |text: &Option<String>| text.as_deref() == Some(wanted);
        let uuid = self.uuid.as_deref();
        let unit = self.unit.as_deref();
        is(&self.name)
            || is(&self.id)
            || is(&self.unit)
            || uuid.is_some_and(|uuid| uuid.eq_ignore_ascii_case(wanted))
            || unit.is_some_and(|unit| words::clean(&unit::unescape(unit.as_bytes())) == wanted)
            || wanted
                .parse()
                .is_ok_and(|pid| self.inner_pids.contains(&pid))
    }

    /// Clean all names. They may come from a file.
    fn cleaned(mut self) -> Self {
        for text in [
            &mut self.name,
            &mut self.uuid,
            &mut self.manager,
            &mut self.id,
            &mut self.unit,
        ] {
            *text = text.take().map(|text| words::clean(text.as_bytes()));
        }
        self
    }
}

/// Names of one VM, as a line of a recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameLine {
    /// Life number of the meter that the VM number belongs to. Written as text, because JSON
    /// readers keep only 53 bits.
    #[serde(serialize_with = "hexadecimal", deserialize_with = "parse_hexadecimal")]
    pub life: u64,
    /// VM number.
    pub vm: u64,
    /// Names of the VM.
    #[serde(flatten)]
    pub given: VmNames,
}

/// Deserialize what [`hexadecimal`] wrote.
fn parse_hexadecimal<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    let digits = text.strip_prefix("0x").unwrap_or_default();
    u64::from_str_radix(digits, 16).map_err(D::Error::custom)
}

/// VMs of a snapshot, with what the search for their names needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunningVms {
    /// The meter's life number.
    pub life: u64,
    /// TSC at which the snapshot began.
    pub now: u64,
    /// TSC frequency, in kHz, if known.
    pub tsc_khz: Option<u32>,
    /// Process id and TSC of the first event, by VM number.
    pub vms: BTreeMap<u64, (u32, u64)>,
}

impl RunningVms {
    /// Return the VMs of a snapshot.
    pub fn new(snapshot: &Snapshot<'_>) -> Self {
        let mut running = Self {
            life: snapshot.life(),
            now: snapshot.now(),
            tsc_khz: snapshot.tsc_khz(),
            vms: BTreeMap::new(),
        };
        for record in snapshot.vcpus() {
            running.add(record.vm(), record.pid(), record.first());
        }
        running
    }

    /// Add a vCPU: its VM, the VM's process, and the TSC of the vCPU's first event.
    pub fn add(&mut self, vm: u64, pid: u32, first: u64) {
        let (_, earliest) = self.vms.entry(vm).or_insert((pid, first));
        *earliest = first.min(*earliest);
    }
}

/// Names found so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameBook {
    /// Processes to look up; `None` if the snapshots are not of this host.
    processes: Option<Processes>,
    /// Life number of the latest snapshot.
    life: u64,
    /// Names by life number and VM number.
    given: BTreeMap<(u64, u64), VmNames>,
}

impl NameBook {
    /// Create a book for the snapshots of `path`. It looks up names only if `path` is a device: the
    /// processes of a saved snapshot are gone by now, or belong to another host.
    pub fn of(path: &Path) -> Self {
        match source::is_live(path) {
            true => Self::with(Processes::of_this_host()),
            false => Self::default(),
        }
    }

    /// Create a book that looks up names in `processes`.
    pub fn with(processes: Option<Processes>) -> Self {
        Self {
            processes,
            ..Self::default()
        }
    }

    /// Look up the new VMs of a snapshot, and return their names.
    pub fn read(&mut self, snapshot: &Snapshot<'_>) -> Vec<NameLine> {
        self.look_up(&RunningVms::new(snapshot))
    }

    /// Look up the new VMs, and return their names.
    pub fn look_up(&mut self, running: &RunningVms) -> Vec<NameLine> {
        let life = running.life;
        self.life = life;
        let Some(processes) = &self.processes else {
            return Vec::new();
        };
        let mut lines = Vec::new();
        for (&vm, &(pid, first)) in &running.vms {
            if self.given.contains_key(&(life, vm)) {
                continue;
            }
            let ticks = running.now.saturating_sub(first);
            let age = running.tsc_khz.filter(|khz| *khz != 0).map(|khz| {
                let micros = u128::from(ticks) * 1000 / u128::from(khz);
                Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
            });
            // A missing process may be a thread that has ended, so look it up again next time.
            if let Some(given) = processes.given(pid, age) {
                self.given.insert((life, vm), given.clone());
                lines.push(NameLine { life, vm, given });
            }
        }
        lines
    }

    /// Forget the VMs that are not in a snapshot.
    pub fn forget(&mut self, snapshot: &Snapshot<'_>) {
        self.forget_others(&RunningVms::new(snapshot));
    }

    /// Forget the VMs that no longer run.
    pub fn forget_others(&mut self, running: &RunningVms) {
        self.given
            .retain(|(life, vm), _| *life == running.life && running.vms.contains_key(vm));
    }

    /// Add the names from a line of a recording.
    pub fn add(&mut self, line: NameLine) {
        self.given
            .insert((line.life, line.vm), line.given.cleaned());
    }

    /// Return the names of a VM of the latest snapshot.
    pub fn vm(&self, vm: u64) -> &VmNames {
        self.vm_of(self.life, vm)
    }

    /// Return the names of a VM of life `life`.
    pub fn vm_of(&self, life: u64, vm: u64) -> &VmNames {
        self.given.get(&(life, vm)).unwrap_or(&UNKNOWN)
    }

    /// Write the names into a report.
    pub fn name(&self, report: &mut Report) {
        let life = report.host.life;
        for vm in &mut report.vms {
            vm.vmm = self.vm_of(life, vm.vm).clone();
        }
    }
}

/// A VM that a user may mean.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// VM number.
    pub vm: u64,
    /// KVM's name for the VM.
    pub kvm: &'a str,
    /// Process id of the VMM.
    pub pid: u32,
    /// Names of the VM.
    pub given: &'a VmNames,
}

/// A search that did not find exactly one VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoVm {
    /// No VM has the name.
    #[error("no VM runs that is called '{vm}' or belongs to process '{vm}'; {listed}")]
    None {
        /// Name that was searched for.
        vm: String,
        /// Running VMs, in words.
        listed: String,
    },
    /// Several VMs have the name.
    #[error("several VMs are called '{vm}': {listed}; say which by its kvm-PID")]
    Several {
        /// Name that was searched for.
        vm: String,
        /// The VMs, in words.
        listed: String,
    },
}

/// Find the VM that a user means by KVM's name, process id, name, UUID, id or unit. All VMs of one
/// process count as one.
///
/// KVM's name takes precedence: no user can give it to another VM.
///
/// # Errors
///
/// Returns an error if no VM has the name, or VMs of several processes have it.
pub fn find<'a>(
    wanted: &str,
    vms: impl IntoIterator<Item = Candidate<'a>>,
) -> Result<BTreeSet<u64>, NoVm> {
    let vms: Vec<_> = vms.into_iter().collect();
    let mut found: Vec<_> = vms.iter().filter(|vm| vm.kvm == wanted).collect();
    if found.is_empty() {
        let called =
            |vm: &&Candidate<'_>| vm.pid.to_string() == wanted || vm.given.has_name(wanted);
        found = vms.iter().filter(called).collect();
    }
    let pids: BTreeSet<_> = found.iter().map(|vm| vm.pid).collect();
    let vm = wanted.to_owned();
    match pids.len() {
        0 => {
            let listed = match list(vms.iter()) {
                none if none.is_empty() => "none runs at all".to_owned(),
                running => format!("those that run are {running}"),
            };
            Err(NoVm::None { vm, listed })
        }
        1 => Ok(found.into_iter().map(|vm| vm.vm).collect()),
        _ => {
            let listed = list(found.into_iter());
            Err(NoVm::Several { vm, listed })
        }
    }
}

/// List some VMs, with dots if there are more.
fn list<'a>(vms: impl Iterator<Item = &'a Candidate<'a>>) -> String {
    const MAX: usize = 5;
    let mut names: Vec<String> = Vec::new();
    for vm in vms {
        // VMs of one process have the same name.
        let label = words::ascii(&vm.given.label(vm.kvm));
        if !names.contains(&label) {
            names.push(label);
        }
    }
    let more = if names.len() > MAX { ", ..." } else { "" };
    names.truncate(MAX);
    names.join(", ") + more
}
