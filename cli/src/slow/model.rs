// SPDX-License-Identifier: GPL-2.0

//! Slow exits as plain data: what snapshots told, and what of it is shown.

use std::{collections::BTreeMap, time::SystemTime};

use exitmeter_meter::{
    detail::Kind,
    phase::Phase,
    reader::{SlowExit, Snapshot},
    snapshot::TABLE_RING,
};
use serde::Serialize;

use super::moment::Moment;
use crate::{
    model::{Host, Label, Report},
    names::{self, Book, Given, Known, NoVm},
    why::{
        detail::{user_exit, Detail},
        symbols::{self, Symbols},
    },
};

/// The version of the data. It grows when a field goes or changes its meaning.
const FORMAT: u32 = 1;

/// What was seen of one vCPU.
#[derive(Clone, Debug, Default)]
struct Vcpu {
    /// By the TSC at the exit.
    slowest: BTreeMap<u64, SlowExit>,
    ring: Vec<SlowExit>,
    is_frozen: bool,
    /// TSC when the current window began.
    window: Option<u64>,
}

/// What one snapshot told, or several one after the other.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The host, and the latest moment.
    pub host: Host,
    /// The time at that moment.
    time: Option<Moment>,
    without: u32,
    /// By number: name and process.
    vms: BTreeMap<u64, (String, u32)>,
    /// By VM and id.
    vcpus: BTreeMap<(u64, u32), Vcpu>,
    /// TSC from which on exits are wanted.
    from: Option<u64>,
}

impl Seen {
    /// Take what a snapshot tells that was read at a time.
    pub fn new(snapshot: &Snapshot<'_>, read: Option<SystemTime>) -> Self {
        let records: Vec<_> = snapshot.vcpus().collect();
        let mut vcpus: BTreeMap<_, Vcpu> = BTreeMap::new();
        for tables in snapshot.tables() {
            // The reader has checked that it is there.
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
            time: read.and_then(Moment::new),
            without: snapshot.without_tables(),
            vms: vms
                .map(|record| (record.vm(), (record.name().to_owned(), record.pid())))
                .collect(),
            vcpus,
            from: None,
        }
    }

    /// Want only what comes from now on.
    pub fn begin(&mut self) {
        self.from = Some(self.host.snapshot_tsc);
        self.vms.clear();
        self.vcpus.clear();
    }

    /// Add what a later snapshot tells. What has gone since is kept.
    ///
    /// # Errors
    ///
    /// When the numbers have begun anew.
    pub fn add(&mut self, later: Self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.host.life == later.host.life,
            "{}; the slow exits before are lost",
            crate::model::delta::ANEW
        );
        let from = self.from.unwrap_or(0);
        for (whose, mut vcpu) in later.vcpus {
            vcpu.slowest.retain(|_, exit| exit.time >= from);
            let before = self.vcpus.remove(&whose).unwrap_or_default();
            for (time, exit) in before.slowest {
                vcpu.slowest.entry(time).or_insert(exit);
            }
            self.vcpus.insert(whose, vcpu);
        }
        self.vms.extend(later.vms);
        (self.host, self.time, self.without) = (later.host, later.time, later.without);
        Ok(())
    }
}

impl Seen {
    /// Add what a later snapshot of the same life tells, and keep of each window no more than its slowest
    /// exits: what was among them in an earlier snapshot gives way to what is in a later one.
    pub fn follow(&mut self, later: Self) {
        for (whose, mut vcpu) in later.vcpus {
            let before = self.vcpus.remove(&whose).unwrap_or_default();
            // Of the window that was the current one the later snapshot has what it came to, unless another
            // one has passed since.
            let is_told = vcpu.window == before.window || {
                let mut current = before.slowest.values().filter(|exit| !exit.is_previous);
                current.any(|exit| vcpu.slowest.contains_key(&exit.time))
            };
            for (time, mut exit) in before.slowest {
                if exit.is_previous || !is_told {
                    exit.is_previous = true;
                    vcpu.slowest.entry(time).or_insert(exit);
                }
            }
            self.vcpus.insert(whose, vcpu);
        }
        self.vms.extend(later.vms);
        (self.host, self.time, self.without) = (later.host, later.time, later.without);
    }
}

/// Of which VM and reason exits are shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection<'a> {
    /// What the VM is called, or its process.
    pub vm: Option<&'a str>,
    /// The VMs' names.
    pub names: Option<&'a Book>,
    /// Code of the reason.
    pub code: Option<u32>,
}

/// Slow exits.
#[derive(Clone, Debug, Serialize)]
pub struct Slow {
    /// Version of the data.
    pub format: u32,
    /// The host, and the moment of the latest snapshot.
    pub host: Host,
    /// vCPUs of which nothing is recorded for want of memory.
    pub vcpus_without_tables: u32,
    /// The VMs.
    pub vms: Vec<Vm>,
}

/// A VM.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// Its number.
    pub vm: u64,
    /// KVM's name for it.
    pub name: String,
    /// The process that made it.
    pub pid: u32,
    /// What its VMM was told about it, when that is known.
    pub vmm: Given,
    /// The slowest exits of its vCPUs, the longest first.
    pub slowest: Vec<Exit>,
    /// The last exits of each vCPU.
    pub rings: Vec<Ring>,
}

/// The last exits of a vCPU.
#[derive(Clone, Debug, Serialize)]
pub struct Ring {
    /// Id of the vCPU.
    pub vcpu: u32,
    /// The last of them was too slow.
    pub frozen: bool,
    /// The exits, the oldest first.
    pub exits: Vec<Exit>,
}

/// One exit.
#[derive(Clone, Debug, Serialize)]
pub struct Exit {
    /// When it was, in UTC, if that can be told.
    #[serde(serialize_with = "text")]
    pub when: Option<Moment>,
    /// TSC at the exit.
    pub tsc: u64,
    /// Id of the vCPU.
    pub vcpu: u32,
    /// Which exit of the vCPU's it was since details were turned on.
    pub sequence: u64,
    /// The reason.
    #[serde(flatten)]
    pub label: Label,
    /// What it was about.
    pub detail: Option<Detail>,
    /// The same in words.
    pub words: Option<String>,
    /// It came from a nested guest, an L2.
    pub nested: bool,
    /// Where the guest was.
    #[serde(serialize_with = "hexadecimal")]
    pub rip: Option<u64>,
    /// The symbol that it belongs to.
    pub symbol: Option<String>,
    /// Bytes from the symbol's beginning.
    pub offset: Option<u64>,
    /// The host's CPU at the exit.
    pub cpu_exit: Option<u64>,
    /// The host's CPU at the entry after it.
    pub cpu_entry: Option<u64>,
    /// TSC ticks that make it slow: all below but `halted`.
    pub took: u64,
    /// TSC ticks in the kernel.
    pub kernel: u64,
    /// TSC ticks in user space.
    pub user: u64,
    /// TSC ticks asleep for the host.
    pub waiting: u64,
    /// TSC ticks preempted.
    pub preempted: u64,
    /// TSC ticks asleep by the guest's own wish.
    pub halted: u64,
    /// How often the scheduler took the vCPU off its CPU.
    pub scheduled_out: u64,
    /// KVM_EXIT_* of `struct kvm_run`, when it went to user space.
    pub exit_reason: Option<u64>,
    /// The ring froze for it.
    pub culprit: bool,
}

fn text<S: serde::Serializer>(moment: &Option<Moment>, to: S) -> Result<S::Ok, S::Error> {
    moment.map(|moment| moment.to_string()).serialize(to)
}

/// Write a number as text, since JSON's readers have 53 bits.
pub fn hexadecimal<S: serde::Serializer>(number: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
    number.map(|number| format!("{number:#x}")).serialize(to)
}

impl Exit {
    fn new(seen: &Seen, vcpu: u32, exit: &SlowExit, symbols: &Symbols) -> Self {
        let host = &seen.host;
        let place = exit.rip.and_then(|rip| symbols.find(rip));
        let detail = (exit.detail_kind != Kind::None as u8)
            .then(|| Detail::new(exit.detail_kind, exit.detail));
        let age = i128::from(host.snapshot_tsc) - i128::from(exit.time);
        let when = |time: Moment| time.before(age, host.tsc_khz?);
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

    /// Return what it was, in words: reason and detail.
    pub fn about(&self) -> String {
        let mut about = self.label.to_string();
        if let (None, Some(code)) = (self.label.name, self.label.code) {
            about += &format!(" {code:#x}");
        }
        if let Some(words) = &self.words {
            about += &format!(" {words}");
        }
        if self.nested {
            about += " (nested)";
        }
        about
    }

    /// Return where the guest was, in words.
    pub fn place(&self) -> Option<String> {
        let symbol = self.symbol.as_deref().zip(self.offset);
        Some(symbols::words(self.rip?, symbol))
    }

    /// Return why it went to user space, in words.
    pub fn to_user(&self) -> Option<String> {
        self.exit_reason.map(user_exit)
    }
}

impl Slow {
    /// Make the data of what was seen, with the symbols of the guest.
    ///
    /// # Errors
    ///
    /// When there is no such VM, or several are called so.
    pub fn new(seen: &Seen, symbols: &Symbols, selection: Selection<'_>) -> Result<Self, NoVm> {
        let none = Book::default();
        let names = selection.names.unwrap_or(&none);
        let known = seen.vms.iter().map(|(&vm, (name, pid))| Known {
            vm,
            kvm: name,
            pid: *pid,
            given: names.vm_of(seen.host.life, vm),
        });
        let meant = match selection.vm {
            Some(vm) => Some(names::find(vm, known)?),
            None => None,
        };
        let mut vms = Vec::new();
        for (number, (name, pid)) in &seen.vms {
            if meant.as_ref().is_some_and(|meant| !meant.contains(number)) {
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
                .sort_by_key(|exit| (std::cmp::Reverse(exit.took), exit.tsc));
            vms.push(vm);
        }
        Ok(Self {
            format: FORMAT,
            host: seen.host.clone(),
            vcpus_without_tables: seen.without,
            vms,
        })
    }
}
