// SPDX-License-Identifier: GPL-2.0

//! Details of exits as plain data. The field names are those of `--json`, and stay.

use std::{cmp::Reverse, collections::BTreeMap};

use exitmeter_meter::{
    reasons::Isa,
    snapshot::{TABLE_CODE, TABLE_DETAILS, TABLE_USER},
};
use serde::Serialize;

use super::{
    detail::{nested_mark, user_exit, Detail},
    symbols::{self, half, Symbols},
    tables::{self, Key, Numbers, Rows, TableSet},
};
use crate::{
    model::{hexadecimal, HostReport, Label, Span},
    names::{NameBook, VmNames},
    numbers::rough,
};

/// Version of the data's shape. It grows when a field goes or changes its meaning.
pub const FORMAT: u32 = 1;

/// Order of rows, and weight of a profile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Weight {
    /// Number of exits.
    Exits,
    /// Kernel ticks, or user ticks of exits to user space.
    #[default]
    Ticks,
}

/// Details of the exits of a host.
#[derive(Clone, Debug, Serialize)]
pub struct Why {
    /// Version of the data: [`FORMAT`].
    pub format: u32,
    /// Time between two snapshots, if the numbers are a difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Span>,
    /// The host and its module.
    pub host: HostReport,
    /// vCPUs that have no tables for lack of memory.
    pub vcpus_without_tables: u32,
    /// True if guest code was recorded.
    pub has_code: bool,
    /// VMs, by their numbers.
    pub vms: Vec<Vm>,
}

/// Details of the exits of a VM: the sums of its vCPUs.
#[derive(Clone, Debug, Serialize)]
pub struct Vm {
    /// Number of the VM, unique while the module is loaded.
    pub vm: u64,
    /// KVM's name for the VM.
    pub name: String,
    /// Process that created the VM.
    pub pid: u32,
    /// Names that the VMM was given, if known.
    pub vmm: VmNames,
    /// True if the VM has gone since its numbers were read.
    pub gone: bool,
    /// vCPUs that have tables.
    pub vcpus: usize,
    /// vCPUs of these whose RIP cannot be read.
    pub vcpus_without_rip: usize,
    /// Time that the numbers cover: since the oldest tables began, or since the earlier snapshot.
    pub span: Span,
    /// Details of the exits, by reason.
    pub details: Vec<Group>,
    /// Guest code at the exits, by reason.
    pub code: Vec<Group>,
    /// Reasons to go to user space, by exit reason.
    pub user_exits: Vec<Group>,
}

/// Rows of one reason.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// Exit reason.
    #[serde(flatten)]
    pub label: Label,
    /// Sums of rows and others.
    #[serde(flatten)]
    pub total: Counts,
    /// Rows, the greatest first.
    pub rows: Vec<GroupRow>,
    /// Exits without a row.
    pub others: Counts,
}

/// A row.
#[derive(Clone, Debug, Serialize)]
pub struct GroupRow {
    /// Subject of the row.
    #[serde(flatten)]
    pub subject: Subject,
    /// Subject in words.
    pub words: String,
    /// True if the exits came from an L2 guest.
    pub nested: bool,
    /// Numbers.
    #[serde(flatten)]
    pub counts: Counts,
    /// True if none of its exits is among the others.
    pub exact: bool,
    /// Upper bound of what may be among the others.
    pub missed: Counts,
    /// Key that identifies the row.
    #[serde(skip)]
    pub key: Key,
}

/// Subject of a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Subject {
    /// A detail.
    Detail {
        /// Decoded key.
        detail: Detail,
        /// Name of what was accessed, if it has one.
        name: Option<String>,
    },
    /// A place in the guest's code.
    Code {
        /// Address, as hexadecimal digits.
        #[serde(serialize_with = "hexadecimal")]
        rip: u64,
        /// Half of the address space: `kernel` or `user`.
        half: &'static str,
        /// Symbol that the address belongs to.
        symbol: Option<String>,
        /// Bytes from the start of the symbol.
        offset: Option<u64>,
    },
    /// An exit to user space.
    User {
        /// KVM_EXIT_* of `struct kvm_run`.
        exit_reason: u64,
    },
}

/// Numbers of a table.
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

impl Counts {
    fn new(table: u32, numbers: Numbers) -> Self {
        Self {
            exits: numbers.exits,
            kernel: (table != TABLE_USER).then_some(numbers.kernel),
            user: (table != TABLE_CODE).then_some(numbers.user),
        }
    }

    /// Add the numbers of another row of the same table.
    pub fn saturating_add(self, other: Self) -> Self {
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

    /// Return the weight.
    pub fn weigh(&self, weight: Weight) -> u128 {
        match weight {
            Weight::Exits => self.exits.into(),
            Weight::Ticks => self.kernel.or(self.user).unwrap_or(0),
        }
    }

    /// Return true if all numbers are 0.
    pub fn is_zero(&self) -> bool {
        self.exits == 0 && self.kernel.unwrap_or(0) == 0 && self.user.unwrap_or(0) == 0
    }
}

impl Subject {
    fn new(key: &Key, symbols: &Symbols) -> Self {
        match key.table {
            TABLE_CODE => {
                let place = symbols.find(key.key);
                Subject::Code {
                    rip: key.key,
                    half: half(key.key),
                    symbol: place.map(|place| place.symbol.to_owned()),
                    offset: place.map(|place| place.offset),
                }
            }
            TABLE_USER => Subject::User {
                exit_reason: key.key,
            },
            _ => {
                let detail = Detail::new(key.detail_kind, key.key);
                let name = detail.name();
                Subject::Detail { detail, name }
            }
        }
    }

    /// Describe the subject.
    pub fn words(&self) -> String {
        match self {
            Subject::Detail { detail, .. } => detail.words(),
            Subject::Code {
                rip,
                symbol,
                offset,
                ..
            } => symbols::words(*rip, symbol.as_deref().zip(*offset)),
            Subject::User { exit_reason } => user_exit(*exit_reason),
        }
    }

    /// Return the name of a frame in a profile: the symbol, if there is one.
    pub fn frame(&self) -> String {
        match self {
            Subject::Code {
                symbol: Some(symbol),
                ..
            } => symbol.clone(),
            subject => subject.words(),
        }
    }
}

impl GroupRow {
    /// Describe the row, and say if its exits came from an L2 guest.
    pub fn about(&self) -> String {
        self.words.clone() + nested_mark(self.nested)
    }

    /// Format the upper bound of what the row lacks.
    pub fn bound(&self) -> String {
        if self.exact {
            return "exact".to_owned();
        }
        let ticks = self.missed.kernel.unwrap_or(0);
        format!("+{}, +{} cycles", rough(self.missed.exits), rough(ticks))
    }
}

/// Return the sum of all groups.
pub fn total(groups: &[Group]) -> Counts {
    groups.iter().fold(Counts::default(), |sum, group| {
        sum.saturating_add(group.total)
    })
}

impl Why {
    /// Build the data from tables, with the symbols of the guest.
    pub fn new(table_set: &TableSet, symbols: &Symbols, weight: Weight) -> Self {
        let host = &table_set.host;
        let now = host.snapshot_tsc;
        let interval = table_set
            .earlier
            .map(|before| Span::of(now.saturating_sub(before), host.tsc_khz));
        let vms = table_set.vms.iter().map(|(&number, (name, pid))| {
            let vcpus: Vec<_> = table_set
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
                vmm: VmNames::default(),
                gone: !table_set.runs(number),
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
            vcpus_without_tables: table_set.without_tables,
            has_code: table_set.has_code,
            vms: vms.collect(),
        }
    }

    /// Add the names of the VMs.
    pub fn name(&mut self, names: &NameBook) {
        for vm in &mut self.vms {
            vm.vmm = names.vm_of(self.host.life, vm.vm).clone();
        }
    }
}

impl Vm {
    /// Return the name for people, with KVM's name.
    pub fn label(&self) -> String {
        self.vmm.label(&self.name)
    }
}

/// Build the groups of a table, the greatest first.
pub fn groups(rows: &Rows, table: u32, isa: Isa, symbols: &Symbols, weight: Weight) -> Vec<Group> {
    let mut by_reason: BTreeMap<_, Vec<GroupRow>> = BTreeMap::new();
    for (key, row) in rows.by_key.iter().filter(|(key, _)| key.table == table) {
        let subject = Subject::new(key, symbols);
        by_reason.entry(key.reason).or_default().push(GroupRow {
            words: subject.words(),
            subject,
            nested: key.nested,
            counts: Counts::new(table, row.numbers),
            exact: row.missed.is_zero(),
            missed: Counts::new(table, row.missed),
            key: *key,
        });
    }
    let others = rows.others.iter().filter(|((other, _), _)| *other == table);
    for ((_, reason), _) in others.clone() {
        by_reason.entry(*reason).or_default();
    }
    let groups = by_reason.into_iter().map(|(reason, mut group_rows)| {
        let others = Counts::new(table, rows.others(table, reason));
        group_rows.sort_by_key(|row| Reverse((row.counts.weigh(weight), row.counts.exits)));
        let total = group_rows
            .iter()
            .fold(others, |sum, row| sum.saturating_add(row.counts));
        Group {
            label: Label::new(isa, reason.to_reason()),
            total,
            rows: group_rows,
            others,
        }
    });
    let mut groups: Vec<_> = groups.filter(|group| !group.total.is_zero()).collect();
    groups.sort_by_key(|group| Reverse((group.total.weigh(weight), group.total.exits)));
    groups
}
