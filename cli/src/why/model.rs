// SPDX-License-Identifier: GPL-2.0

//! What exits were about, as plain data. Its field names are those of `--json`, and stay.

use std::{cmp::Reverse, collections::BTreeMap};

use exitmeter_meter::{
    reasons::Isa,
    snapshot::{TABLE_CODE, TABLE_DETAILS, TABLE_USER},
};
use serde::{Serialize, Serializer};

use super::{
    detail::{user_exit, Detail},
    symbols::{self, half, Symbols},
    tables::{self, Key, Moment, Numbers, Rows},
};
use crate::{
    model::{Host, Label, Span},
    names::{Book, Given},
};

/// The version of the data's shape: grows when a field goes or changes its meaning.
pub const FORMAT: u32 = 1;

/// By what rows are ordered, and what they weigh in a profile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Weight {
    /// How many exits there were.
    Exits,
    /// Kernel ticks; of exits to user space, user ticks.
    #[default]
    Ticks,
}

/// What the exits of a host were about.
#[derive(Clone, Debug, Serialize)]
pub struct Why {
    /// [`FORMAT`].
    pub format: u32,
    /// The time between two snapshots, when the numbers are of that alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Span>,
    /// The host and its module.
    pub host: Host,
    /// vCPUs that have no tables for want of memory.
    pub vcpus_without_tables: u32,
    /// Code is told.
    pub has_code: bool,
    /// The VMs, by their numbers.
    pub vms: Vec<Vm>,
}

/// What the exits of a VM were about: the sums of its vCPUs.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// Its number: unique while the module is loaded.
    pub vm: u64,
    /// KVM's name for it.
    pub name: String,
    /// The process that made it.
    pub pid: u32,
    /// What its VMM was told about it, when that is known.
    pub vmm: Given,
    /// It has gone since its numbers were read.
    pub gone: bool,
    /// vCPUs that have tables.
    pub vcpus: usize,
    /// Of these, those whose RIP cannot be read.
    pub vcpus_without_rip: usize,
    /// The time that the numbers are of: since the oldest tables began, or since the earlier snapshot.
    pub span: Span,
    /// By reason, what its exits were about.
    pub details: Vec<Group>,
    /// By reason, where in the guest's code its exits were.
    pub code: Vec<Group>,
    /// By reason, why its exits went to user space.
    pub user_exits: Vec<Group>,
}

/// The rows of one reason.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// The reason.
    #[serde(flatten)]
    pub label: Label,
    /// The sums of rows and others.
    #[serde(flatten)]
    pub total: Counts,
    /// The rows, the one that leads first.
    pub rows: Vec<Row>,
    /// What is in no row.
    pub others: Counts,
}

/// A row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What it is about.
    #[serde(flatten)]
    pub what: What,
    /// The same in words.
    pub words: String,
    /// The exits came from a nested guest, an L2.
    pub nested: bool,
    /// Its numbers.
    #[serde(flatten)]
    pub counts: Counts,
    /// Nothing of it is among the others.
    pub exact: bool,
    /// The most of it that may be among the others.
    pub missed: Counts,
    /// What tells it apart from others.
    #[serde(skip)]
    pub key: Key,
}

/// What a row is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum What {
    /// Its detail.
    Detail {
        /// What the key says.
        detail: Detail,
        /// The name of what was accessed, when it has one.
        name: Option<String>,
    },
    /// A place in the guest's code.
    Code {
        /// Its address, as hexadecimal digits.
        #[serde(serialize_with = "hexadecimal")]
        rip: u64,
        /// `kernel` or `user`: the half of the address space.
        half: &'static str,
        /// The symbol that it belongs to.
        symbol: Option<String>,
        /// Bytes from the symbol's beginning.
        offset: Option<u64>,
    },
    /// An exit to user space.
    User {
        /// KVM_EXIT_* of `struct kvm_run`.
        exit_reason: u64,
    },
}

/// Numbers that a table has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Exits.
    pub exits: u64,
    /// Kernel ticks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<u128>,
    /// User ticks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<u128>,
}

/// Addresses do not fit into the numbers that JSON's readers have.
fn hexadecimal<S: Serializer>(number: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{number:#x}"))
}

impl Counts {
    fn new(table: u32, numbers: Numbers) -> Self {
        Self {
            exits: numbers.exits,
            kernel: (table != TABLE_USER).then_some(numbers.kernel),
            user: (table != TABLE_CODE).then_some(numbers.user),
        }
    }

    /// Add others of the same table.
    pub fn plus(self, other: Self) -> Self {
        let add = |one: Option<u128>, other: Option<u128>| match (one, other) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            (one, other) => one.or(other),
        };
        Self {
            exits: self.exits.saturating_add(other.exits),
            kernel: add(self.kernel, other.kernel),
            user: add(self.user, other.user),
        }
    }

    /// Return what they weigh.
    pub fn weigh(&self, weight: Weight) -> u128 {
        match weight {
            Weight::Exits => self.exits.into(),
            Weight::Ticks => self.kernel.or(self.user).unwrap_or(0),
        }
    }

    /// Return true if there are none.
    pub fn is_zero(&self) -> bool {
        self.exits == 0 && self.kernel.unwrap_or(0) == 0 && self.user.unwrap_or(0) == 0
    }
}

impl What {
    fn new(key: &Key, symbols: &Symbols) -> Self {
        match key.table {
            TABLE_CODE => {
                let place = symbols.find(key.key);
                What::Code {
                    rip: key.key,
                    half: half(key.key),
                    symbol: place.map(|place| place.symbol.to_owned()),
                    offset: place.map(|place| place.offset),
                }
            }
            TABLE_USER => What::User {
                exit_reason: key.key,
            },
            _ => {
                let detail = Detail::new(key.detail_kind, key.key);
                let name = detail.name();
                What::Detail { detail, name }
            }
        }
    }

    /// Put it into words.
    pub fn words(&self) -> String {
        match self {
            What::Detail { detail, .. } => detail.words(),
            What::Code {
                rip,
                symbol,
                offset,
                ..
            } => symbols::words(*rip, symbol.as_deref().zip(*offset)),
            What::User { exit_reason } => user_exit(*exit_reason),
        }
    }

    /// Name it as a frame of a profile: by its symbol, when it has one.
    pub fn frame(&self) -> String {
        match self {
            What::Code {
                symbol: Some(symbol),
                ..
            } => symbol.clone(),
            what => what.words(),
        }
    }
}

impl Row {
    /// Put what it is about into words, with what it came from.
    pub fn about(&self) -> String {
        match self.nested {
            true => format!("{}, nested", self.words),
            false => self.words.clone(),
        }
    }
}

impl Why {
    /// Make the data of what tables hold, with the symbols of the guest.
    pub fn new(moment: &Moment, symbols: &Symbols, weight: Weight) -> Self {
        let host = &moment.host;
        let now = host.snapshot_tsc;
        let interval = moment
            .earlier
            .map(|before| Span::of(now.saturating_sub(before), host.tsc_khz));
        let vms = moment.vms.iter().map(|(&number, (name, pid))| {
            let vcpus: Vec<_> = moment
                .vcpus
                .range((number, 0)..=(number, u32::MAX))
                .collect();
            let ticks = tables::ticks(vcpus.iter().map(|(_, vcpu)| *vcpu));
            let rows = Rows::sum(vcpus.iter().map(|(_, vcpu)| &vcpu.rows));
            let groups = |table| groups(&rows, table, host.isa, symbols, weight);
            Vm {
                vm: number,
                name: name.clone(),
                pid: *pid,
                vmm: Given::default(),
                gone: !moment.runs(number),
                vcpus: vcpus.len(),
                vcpus_without_rip: vcpus.iter().filter(|(_, vcpu)| vcpu.no_rip).count(),
                span: Span::of(ticks, host.tsc_khz),
                details: groups(TABLE_DETAILS),
                code: groups(TABLE_CODE),
                user_exits: groups(TABLE_USER),
            }
        });
        Self {
            format: FORMAT,
            interval,
            host: host.clone(),
            vcpus_without_tables: moment.without,
            has_code: moment.has_code,
            vms: vms.collect(),
        }
    }

    /// Write the names of the VMs into it.
    pub fn name(&mut self, names: &Book) {
        for vm in &mut self.vms {
            vm.vmm = names.vm_of(self.host.life, vm.vm).clone();
        }
    }
}

impl Vm {
    /// Return its name for people, with KVM's.
    pub fn label(&self) -> String {
        self.vmm.label(&self.name)
    }
}

/// Make the groups of a table, the one that leads first.
pub fn groups(rows: &Rows, table: u32, isa: Isa, symbols: &Symbols, weight: Weight) -> Vec<Group> {
    let mut by_reason: BTreeMap<_, Vec<Row>> = BTreeMap::new();
    for (key, row) in rows.rows.iter().filter(|(key, _)| key.table == table) {
        let what = What::new(key, symbols);
        by_reason.entry(key.of).or_default().push(Row {
            words: what.words(),
            what,
            nested: key.nested,
            counts: Counts::new(table, row.numbers),
            exact: row.missed.is_zero(),
            missed: Counts::new(table, row.missed),
            key: *key,
        });
    }
    let others = rows.others.iter().filter(|((other, _), _)| *other == table);
    for ((_, of), _) in others.clone() {
        by_reason.entry(*of).or_default();
    }
    let groups = by_reason.into_iter().map(|(of, mut rows_of)| {
        let others = rows.others.get(&(table, of)).copied().unwrap_or_default();
        let others = Counts::new(table, others);
        rows_of.sort_by_key(|row| Reverse((row.counts.weigh(weight), row.counts.exits)));
        let total = rows_of.iter().fold(others, |sum, row| sum.plus(row.counts));
        Group {
            label: Label::new(isa, of.reason()),
            total,
            rows: rows_of,
            others,
        }
    });
    let mut groups: Vec<_> = groups.filter(|group| !group.total.is_zero()).collect();
    groups.sort_by_key(|group| Reverse((group.total.weigh(weight), group.total.exits)));
    groups
}
