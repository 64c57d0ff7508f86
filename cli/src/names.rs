// SPDX-License-Identifier: GPL-2.0

//! VMs by the names that people gave them.
//!
//! KVM knows a VM by the thread that made it, `kvm-PID`. What its VMM was told about it stands on
//! the VMM's command line, which [`command`] reads, and in its cgroup ([`mod@unit`]); [`process`] gets
//! both from /proc. A [`Book`] keeps what was found, as the process may be gone later, and [`find`]
//! says which VM somebody means.
//!
//! All of this is text that others wrote. It passes [`words::clean`] before anybody sees it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use exitmeter_meter::reader::Snapshot;
use serde::{Deserialize, Serialize};

use self::process::Processes;
use crate::{model::Report, source};

pub mod command;
pub mod process;
pub mod unit;
pub mod words;

/// What a VM's VMM was told about it, as far as that can be seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Given {
    /// Its name.
    pub name: Option<String>,
    /// Its UUID, in small letters.
    pub uuid: Option<String>,
    /// What manages it: `libvirt`, `openstack`, `proxmox`, `kubevirt`, `kata`, `incus`, `lxd`; or
    /// else its VMM: `qemu`, `firecracker`, `cloud-hypervisor`.
    pub manager: Option<String>,
    /// Its id in that, or the path of its API socket.
    pub id: Option<String>,
    /// The systemd unit that it runs in, or the cgroup.
    pub unit: Option<String>,
    /// Its process in the PID namespaces below that of /proc.
    #[serde(skip)]
    pub inner_pids: Vec<u32>,
}

/// Nothing is known.
static UNKNOWN: Given = Given {
    name: None,
    uuid: None,
    manager: None,
    id: None,
    unit: None,
    inner_pids: Vec::new(),
};

impl Given {
    /// Return the VM's name for people, with KVM's behind it: `web (kvm-1234)`.
    pub fn label(&self, kvm: &str) -> String {
        let kvm = words::clean(kvm.as_bytes());
        match self.shown() {
            Some(name) if name != kvm => format!("{name} ({kvm})"),
            _ => kvm,
        }
    }

    /// Return the VM's name for people where there is little room: KVM's if it has no other.
    pub fn short(&self, kvm: &str) -> String {
        match self.shown() {
            Some(name) => name.to_owned(),
            None => words::clean(kvm.as_bytes()),
        }
    }

    /// Return what else is known, in words.
    pub fn others(&self) -> Vec<String> {
        let manager = self.manager.clone();
        // Often the id is what it is called.
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

    /// Return true if a user may call the VM so.
    fn is_called(&self, wanted: &str) -> bool {
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

    /// Make what comes from a file harmless.
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

/// The names of one VM, as a line of a recording has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The meter's life that the VM's number is of. As text, since JSON's readers have 53 bits.
    #[serde(with = "hexadecimal")]
    pub life: u64,
    /// The VM's number.
    pub vm: u64,
    /// Its names.
    #[serde(flatten)]
    pub given: Given,
}

mod hexadecimal {
    use serde::{de::Error as _, Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{number:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        let digits = text.strip_prefix("0x").unwrap_or_default();
        u64::from_str_radix(digits, 16).map_err(D::Error::custom)
    }
}

/// The VMs of a snapshot, as far as it takes to look up their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Running {
    /// The meter's life.
    pub life: u64,
    /// TSC when the snapshot was begun.
    pub now: u64,
    /// TSC frequency, when it is known.
    pub tsc_khz: Option<u32>,
    /// By the VM's number, its process, and TSC at its first event.
    pub vms: BTreeMap<u64, (u32, u64)>,
}

impl Running {
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

    /// Add a vCPU of a VM: the VM's process, and TSC at the vCPU's first event.
    pub fn add(&mut self, vm: u64, pid: u32, first: u64) {
        let (_, earliest) = self.vms.entry(vm).or_insert((pid, first));
        *earliest = first.min(*earliest);
    }
}

/// The names that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Book {
    /// Where processes are looked up; `None` if those of the snapshots are not of this host.
    processes: Option<Processes>,
    /// The meter's life of the latest snapshot.
    life: u64,
    /// By the meter's life and the VM's number.
    given: BTreeMap<(u64, u64), Given>,
}

impl Book {
    /// Make a book for the snapshots of a file. Names are looked up if it is a device. The
    /// processes of a saved snapshot are gone by now, or of another host.
    pub fn of(path: &Path) -> Self {
        match source::is_live(path) {
            true => Self::with(Processes::of_this_host()),
            false => Self::default(),
        }
    }

    /// Make a book with what there is in a folder such as /proc.
    pub fn with(processes: Option<Processes>) -> Self {
        Self {
            processes,
            ..Self::default()
        }
    }

    /// Look up the VMs of a snapshot that are new; return these.
    pub fn read(&mut self, snapshot: &Snapshot<'_>) -> Vec<Line> {
        self.look_up(&Running::new(snapshot))
    }

    /// Look up the VMs that are new; return these.
    pub fn look_up(&mut self, running: &Running) -> Vec<Line> {
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
            // A process that is not there now may be a thread that has ended: it is asked for again.
            if let Some(given) = processes.given(pid, age) {
                self.given.insert((life, vm), given.clone());
                lines.push(Line { life, vm, given });
            }
        }
        lines
    }

    /// Forget the VMs that are not in a snapshot any more.
    pub fn forget(&mut self, snapshot: &Snapshot<'_>) {
        self.forget_others(&Running::new(snapshot));
    }

    /// Forget the VMs that do not run any more.
    pub fn forget_others(&mut self, running: &Running) {
        self.given
            .retain(|(life, vm), _| *life == running.life && running.vms.contains_key(vm));
    }

    /// Take in what a recording says.
    pub fn note(&mut self, line: Line) {
        self.given
            .insert((line.life, line.vm), line.given.cleaned());
    }

    /// Return what is known of a VM of the latest snapshot.
    pub fn vm(&self, vm: u64) -> &Given {
        self.vm_of(self.life, vm)
    }

    /// Return what is known of a VM of a life of the meter.
    pub fn vm_of(&self, life: u64, vm: u64) -> &Given {
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

/// A VM that may be meant.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Its number.
    pub vm: u64,
    /// KVM's name for it.
    pub kvm: &'a str,
    /// Its process.
    pub pid: u32,
    /// Its names.
    pub given: &'a Given,
}

/// There is not the one VM that was meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoVm {
    /// There is none.
    #[error("no VM runs that is called '{vm}' or belongs to process '{vm}'; {those}")]
    None {
        /// What was asked for.
        vm: String,
        /// What there is, in words.
        those: String,
    },
    /// There are several.
    #[error("several VMs are called '{vm}': {those}; say which by its kvm-PID")]
    Several {
        /// What was asked for.
        vm: String,
        /// Which.
        those: String,
    },
}

/// Find the VMs that a user means: by KVM's name, process, name, UUID, id or unit. All VMs of one
/// process are one.
///
/// KVM's name goes before all others: nobody can give it to his own VM.
///
/// # Errors
///
/// When there is none, or those of several processes are called so.
pub fn find<'a>(
    wanted: &str,
    vms: impl IntoIterator<Item = Known<'a>>,
) -> Result<BTreeSet<u64>, NoVm> {
    let vms: Vec<_> = vms.into_iter().collect();
    let mut found: Vec<_> = vms.iter().filter(|vm| vm.kvm == wanted).collect();
    if found.is_empty() {
        let called = |vm: &&Known<'_>| vm.pid.to_string() == wanted || vm.given.is_called(wanted);
        found = vms.iter().filter(called).collect();
    }
    let pids: BTreeSet<_> = found.iter().map(|vm| vm.pid).collect();
    let vm = wanted.to_owned();
    match pids.len() {
        0 => {
            let those = match some(vms.iter()) {
                none if none.is_empty() => "none runs at all".to_owned(),
                some => format!("those that run are {some}"),
            };
            Err(NoVm::None { vm, those })
        }
        1 => Ok(found.into_iter().map(|vm| vm.vm).collect()),
        _ => {
            let those = some(found.into_iter());
            Err(NoVm::Several { vm, those })
        }
    }
}

/// Name some VMs, and say whether there are more.
fn some<'a>(vms: impl Iterator<Item = &'a Known<'a>>) -> String {
    const SOME: usize = 5;
    let mut names: Vec<String> = Vec::new();
    for vm in vms {
        // VMs of one process are called the same.
        let label = words::ascii(&vm.given.label(vm.kvm));
        if !names.contains(&label) {
            names.push(label);
        }
    }
    let more = if names.len() > SOME { ", ..." } else { "" };
    names.truncate(SOME);
    names.join(", ") + more
}
