// SPDX-License-Identifier: GPL-2.0

//! Slow exits as plain data: collected from snapshots, and selected for output.

use std::{cmp::Reverse, collections::BTreeMap, time::SystemTime};

use exitmeter_meter::{
    detail::Kind,
    phase::Phase,
    reader::{SlowExit, Snapshot},
    snapshot::TABLE_RING,
};
use serde::Serialize;

use super::utc::Utc;
use crate::{
    model::{delta::NEW_LIFE, optional_hexadecimal, HostReport, Label, Report},
    names::{self, Candidate, NameBook, NoVm, VmNames},
    why::{
        detail::{nested_in_brackets, user_exit, Detail},
        symbols::{self, Symbols},
    },
};

/// Version of the data. It grows when a field goes or changes its meaning.
const FORMAT: u32 = 1;

/// Slow exits collected from one vCPU.
#[derive(Clone, Debug, Default)]
struct VcpuSlowExits {
    /// Slowest exits, by the TSC at the exit.
    slowest: BTreeMap<u64, SlowExit>,
    ring: Vec<SlowExit>,
    is_frozen: bool,
    /// TSC at the start of the current window.
    window: Option<u64>,
}

/// Slow exits collected from one snapshot, or from several successive ones.
#[derive(Clone, Debug)]
pub struct SlowExits {
    /// The host, and the moment of the latest snapshot.
    pub host: HostReport,
    /// UTC at that moment.
    time: Option<Utc>,
    without_tables: u32,
    /// Name and process of each VM, by its number.
    vms: BTreeMap<u64, (String, u32)>,
    /// Slow exits, by VM and vCPU id.
    vcpus: BTreeMap<(u64, u32), VcpuSlowExits>,
    /// TSC from which on exits are wanted.
    from: Option<u64>,
}

impl SlowExits {
    /// Collect the slow exits of a snapshot that was read at the time `read`.
    pub fn new(snapshot: &Snapshot<'_>, read: Option<SystemTime>) -> Self {
        let records: Vec<_> = snapshot.vcpus().collect();
        let mut vcpus: BTreeMap<_, VcpuSlowExits> = BTreeMap::new();
        for tables in snapshot.tables() {
            // The reader has checked that the record exists.
            let Some(record) = records.get(tables.vcpu) else {
                continue;
            };
            let vcpu = vcpus.entry((record.vm(), record.id())).or_default();
            vcpu.is_frozen = tables.is_frozen;
            vcpu.window = tables.window_begun;
            for exit in tables.slow() {
                match exit.table {
                    TABLE_RING => vcpu.ring.push(exit),
                    _ => {
                        vcpu.slowest.insert(exit.time, exit);
                    }
                }
            }
        }
        let vms = records.iter();
        Self {
            host: Report::new(snapshot).host,
            time: read.and_then(Utc::new),
            without_tables: snapshot.without_tables(),
            vms: vms
                .map(|record| (record.vm(), (record.name().to_owned(), record.pid())))
                .collect(),
            vcpus,
            from: None,
        }
    }

    /// Discard what there is, and collect only later exits.
    pub fn discard_earlier(&mut self) {
        self.from = Some(self.host.snapshot_tsc);
        self.vms.clear();
        self.vcpus.clear();
    }

    /// Add a later snapshot. VMs that have gone since are kept.
    ///
    /// # Errors
    ///
    /// Returns an error if the numbers have begun anew.
    pub fn add(&mut self, later: Self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.host.life == later.host.life,
            "{}; the slow exits before are lost",
            NEW_LIFE
        );
        let from = self.from.unwrap_or(0);
        for (key, mut vcpu) in later.vcpus {
            vcpu.slowest.retain(|_, exit| exit.time >= from);
            let before = self.vcpus.remove(&key).unwrap_or_default();
            for (time, exit) in before.slowest {
                vcpu.slowest.entry(time).or_insert(exit);
            }
            self.vcpus.insert(key, vcpu);
        }
        self.vms.extend(later.vms);
        (self.host, self.time, self.without_tables) =
            (later.host, later.time, later.without_tables);
        Ok(())
    }

    /// Add a later snapshot of the same life, and keep for each window only its slowest exits:
    /// those of an earlier snapshot give way to those of a later one.
    pub fn merge_by_window(&mut self, later: Self) {
        for (key, mut vcpu) in later.vcpus {
            let before = self.vcpus.remove(&key).unwrap_or_default();
            // The later snapshot has the final exits of the window that was current, unless yet
            // another window has passed since.
            let is_complete = vcpu.window == before.window || {
                let mut current = before.slowest.values().filter(|exit| !exit.is_previous);
                current.any(|exit| vcpu.slowest.contains_key(&exit.time))
            };
            for (time, mut exit) in before.slowest {
                if exit.is_previous || !is_complete {
                    exit.is_previous = true;
                    vcpu.slowest.entry(time).or_insert(exit);
                }
            }
            self.vcpus.insert(key, vcpu);
        }
        self.vms.extend(later.vms);
        (self.host, self.time, self.without_tables) =
            (later.host, later.time, later.without_tables);
    }
}

/// Selection of a VM and a reason.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection<'a> {
    /// Name or process of the VM.
    pub vm: Option<&'a str>,
    /// Names of the VMs.
    pub names: Option<&'a NameBook>,
    /// Code of the reason.
    pub code: Option<u32>,
}

/// Slow exits, as shown.
#[derive(Clone, Debug, Serialize)]
pub struct Slow {
    /// Version of the data.
    pub format: u32,
    /// The host, and the moment of the latest snapshot.
    pub host: HostReport,
    /// vCPUs without a record, for lack of memory.
    pub vcpus_without_tables: u32,
    /// VMs.
    pub vms: Vec<Vm>,
}

/// Slow exits of a VM.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// Number of the VM.
    pub vm: u64,
    /// KVM's name for the VM.
    pub name: String,
    /// Process that created the VM.
    pub pid: u32,
    /// Names that the VMM was given, if known.
    pub vmm: VmNames,
    /// Slowest exits of its vCPUs, the longest first.
    pub slowest: Vec<Exit>,
    /// Last exits of each vCPU.
    pub rings: Vec<Ring>,
}

/// Last exits of a vCPU.
#[derive(Clone, Debug, Serialize)]
pub struct Ring {
    /// Id of the vCPU.
    pub vcpu: u32,
    /// True if the ring froze, because its last exit was too slow.
    pub frozen: bool,
    /// Exits, the oldest first.
    pub exits: Vec<Exit>,
}

/// One exit.
#[derive(Clone, Debug, Serialize)]
pub struct Exit {
    /// UTC of the exit, if known.
    #[serde(serialize_with = "optional_utc")]
    pub when: Option<Utc>,
    /// TSC at the exit.
    pub tsc: u64,
    /// Id of the vCPU.
    pub vcpu: u32,
    /// Number of the exit among the vCPU's, since details were turned on.
    pub sequence: u64,
    /// Exit reason.
    #[serde(flatten)]
    pub label: Label,
    /// Detail of the exit: port, MSR, address and so on.
    pub detail: Option<Detail>,
    /// Detail in words.
    pub words: Option<String>,
    /// True if the exit came from an L2 guest.
    pub nested: bool,
    /// RIP of the guest.
    #[serde(serialize_with = "optional_hexadecimal")]
    pub rip: Option<u64>,
    /// Symbol that the RIP belongs to.
    pub symbol: Option<String>,
    /// Bytes from the start of the symbol.
    pub offset: Option<u64>,
    /// Host's CPU at the exit.
    pub cpu_exit: Option<u64>,
    /// Host's CPU at the entry after it.
    pub cpu_entry: Option<u64>,
    /// Length of the exit in TSC ticks: the sum of the phases below without `halted`.
    pub took: u64,
    /// TSC ticks in the kernel.
    pub kernel: u64,
    /// TSC ticks in user space.
    pub user: u64,
    /// TSC ticks asleep for the host.
    pub waiting: u64,
    /// TSC ticks preempted.
    pub preempted: u64,
    /// TSC ticks asleep in HLT.
    pub halted: u64,
    /// Number of times that the scheduler took the vCPU off its CPU.
    pub scheduled_out: u64,
    /// KVM_EXIT_* of `struct kvm_run`, if the exit went to user space.
    pub exit_reason: Option<u64>,
    /// True if the ring froze for this exit.
    pub culprit: bool,
}

/// Serialize a time in the form of RFC 3339, if it is known.
fn optional_utc<S: serde::Serializer>(moment: &Option<Utc>, to: S) -> Result<S::Ok, S::Error> {
    moment.map(|moment| moment.to_string()).serialize(to)
}

impl Exit {
    fn new(seen: &SlowExits, vcpu: u32, exit: &SlowExit, symbols: &Symbols) -> Self {
        let host = &seen.host;
        let place = exit.rip.and_then(|rip| symbols.find(rip));
        let detail = (exit.detail_kind != Kind::None as u8)
            .then(|| Detail::new(exit.detail_kind, exit.detail));
        let age = i128::from(host.snapshot_tsc) - i128::from(exit.time);
        let when = |time: Utc| time.before(age, host.tsc_khz?);
        let [cpu_exit, cpu_entry] = exit.cpus;
        Self {
            when: seen.time.and_then(when),
            tsc: exit.time,
            vcpu,
            sequence: exit.sequence,
            label: Label::new(host.isa, exit.reason),
            words: detail.map(|detail| detail.words()),
            detail,
            nested: exit.nested,
            rip: exit.rip,
            symbol: place.map(|place| place.symbol.to_owned()),
            offset: place.map(|place| place.offset),
            cpu_exit,
            cpu_entry,
            took: exit.length(),
            kernel: exit.ticks(Phase::Kernel),
            user: exit.ticks(Phase::User),
            waiting: exit.ticks(Phase::Waiting),
            preempted: exit.ticks(Phase::Preempted),
            halted: exit.ticks(Phase::Halted),
            scheduled_out: exit.scheduled_out,
            exit_reason: exit.user_exit,
            culprit: exit.is_culprit,
        }
    }

    /// Return the reason and the detail, in words.
    pub fn about(&self) -> String {
        let mut about = self.label.to_string();
        if let (None, Some(code)) = (self.label.name, self.label.code) {
            about += &format!(" {code:#x}");
        }
        if let Some(words) = &self.words {
            about += &format!(" {words}");
        }
        about + nested_in_brackets(self.nested)
    }

    /// Return the guest's code address, in words.
    pub fn place(&self) -> Option<String> {
        let symbol = self.symbol.as_deref().zip(self.offset);
        Some(symbols::words(self.rip?, symbol))
    }

    /// Return the reason for going to user space, in words.
    pub fn to_user(&self) -> Option<String> {
        self.exit_reason.map(user_exit)
    }
}

impl Slow {
    /// Build the data from the collected exits, with the symbols of the guest.
    ///
    /// # Errors
    ///
    /// Returns an error if no VM matches, or several do.
    pub fn new(
        seen: &SlowExits,
        symbols: &Symbols,
        selection: Selection<'_>,
    ) -> Result<Self, NoVm> {
        let none = NameBook::default();
        let names = selection.names.unwrap_or(&none);
        let known = seen.vms.iter().map(|(&vm, (name, pid))| Candidate {
            vm,
            kvm: name,
            pid: *pid,
            given: names.vm_of(seen.host.life, vm),
        });
        let selected = match selection.vm {
            Some(vm) => Some(names::find(vm, known)?),
            None => None,
        };
        let mut vms = Vec::new();
        for (number, (name, pid)) in &seen.vms {
            if selected.as_ref().is_some_and(|vms| !vms.contains(number)) {
                continue;
            }
            let mut vm = Vm {
                vm: *number,
                name: name.clone(),
                pid: *pid,
                vmm: names.vm_of(seen.host.life, *number).clone(),
                slowest: Vec::new(),
                rings: Vec::new(),
            };
            for ((_, id), vcpu) in seen.vcpus.range((*number, 0)..=(*number, u32::MAX)) {
                let exit = |exit: &SlowExit| Exit::new(seen, *id, exit, symbols);
                vm.slowest.extend(vcpu.slowest.values().map(exit));
                vm.rings.push(Ring {
                    vcpu: *id,
                    frozen: vcpu.is_frozen,
                    exits: vcpu.ring.iter().map(exit).collect(),
                });
            }
            if let Some(code) = selection.code {
                vm.slowest.retain(|exit| exit.label.code == Some(code));
            }
            vm.slowest
                .sort_by_key(|exit| (Reverse(exit.took), exit.tsc));
            vms.push(vm);
        }
        Ok(Self {
            format: FORMAT,
            host: seen.host.clone(),
            vcpus_without_tables: seen.without_tables,
            vms,
        })
    }
}
