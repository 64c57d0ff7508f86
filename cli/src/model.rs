// SPDX-License-Identifier: GPL-2.0

//! A snapshot as plain data. Its field names are those of `--json`, and stay.

use std::{cmp::Reverse, collections::BTreeMap, ops::AddAssign};

use exitmeter_meter::{
    phase::Phase,
    reader::{Row, Snapshot, Vcpu as VcpuRecord},
    reasons::{self, Isa},
    snapshot::Reason,
};
use serde::Serialize;

use crate::spread::Spread;

/// The version of the data's shape: grows when a field goes or changes its meaning.
pub const FORMAT: u32 = 1;

/// All that a snapshot says.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// The host and its module.
    pub host: Host,
    /// vCPUs that run, or ran, without being metered.
    pub unmetered_vcpus: u64,
    /// The VMs that run, by their numbers.
    pub vms: Vec<Vm>,
    /// The sums of the vCPUs that are gone.
    pub departed: Departed,
}

/// The host and its module.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// TSC frequency, when it is known.
    pub tsc_khz: Option<u32>,
    /// Whether the TSC runs at one rate, alike on all CPUs.
    pub tsc_stable: bool,
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
    /// The process that made it.
    pub pid: u32,
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
    /// TSC at its first event.
    pub first_tsc: u64,
    /// TSC at its latest transition.
    pub last_tsc: u64,
    /// The phase it has been in since then.
    pub phase: Option<&'static str>,
    /// Ticks from then to the snapshot: not yet booked on any row.
    pub phase_ticks: u64,
    /// What that phase will be booked on.
    pub latest: Option<Label>,
    /// Its numbers.
    #[serde(flatten)]
    pub ledger: Ledger,
}

/// The vCPUs that are gone.
#[derive(Clone, Debug, Serialize)]
pub struct Departed {
    /// How many there were.
    pub vcpus_gone: u64,
    /// Their sums.
    #[serde(flatten)]
    pub ledger: Ledger,
}

/// The numbers of a vCPU, or sums of several.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Ledger {
    /// VM exits.
    pub exits: u64,
    /// Of these, those from nested guests, when they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested_exits: Option<u64>,
    /// TSC ticks by phase.
    pub cycles: Cycles,
    /// The same by reason, the one with the most kernel cycles first.
    pub reasons: Vec<ReasonRow>,
}

/// The numbers of a reason.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ReasonRow {
    /// What they are booked on.
    #[serde(flatten)]
    pub label: Label,
    /// VM exits.
    pub exits: u64,
    /// Of these, those from nested guests, when they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested_exits: Option<u64>,
    /// TSC ticks by phase.
    pub cycles: Cycles,
    /// Kernel ticks of single exits, when they are known: `p50`, `p90` and `p99` within 20%,
    /// `max`, and `histogram`, a list of the least ticks and the number of exits of a bucket.
    #[serde(flatten)]
    pub spread: Option<Spread>,
}

/// A reason, as it is shown.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Label {
    /// `code`, `start` (before the first exit) or `other` (codes without a row).
    pub kind: &'static str,
    /// VMX's basic exit reason or SVM's exit code.
    pub code: Option<u32>,
    /// The code's name, when it is defined.
    pub name: Option<&'static str>,
}

/// TSC ticks by phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cycles {
    /// The guest ran.
    pub guest: u64,
    /// KVM worked for it.
    pub kernel: u64,
    /// The VMM ran in user space.
    pub user: u64,
    /// The vCPU slept.
    pub blocked: u64,
    /// The host took the CPU away.
    pub preempted: u64,
}

impl Cycles {
    /// The ticks of each phase.
    pub fn by_phase(of: impl Fn(Phase) -> u64) -> Self {
        Self {
            guest: of(Phase::Guest),
            kernel: of(Phase::Kernel),
            user: of(Phase::User),
            blocked: of(Phase::Blocked),
            preempted: of(Phase::Preempted),
        }
    }

    /// The ticks of a phase.
    pub fn of(&self, phase: Phase) -> u64 {
        match phase {
            Phase::Guest => self.guest,
            Phase::Kernel => self.kernel,
            Phase::User => self.user,
            Phase::Blocked => self.blocked,
            Phase::Preempted => self.preempted,
        }
    }

    /// The ticks of all phases.
    pub fn sum(&self) -> u64 {
        Phase::ALL
            .into_iter()
            .fold(0, |sum: u64, phase| sum.wrapping_add(self.of(phase)))
    }
}

impl AddAssign for Cycles {
    fn add_assign(&mut self, other: Self) {
        *self = Self::by_phase(|phase| self.of(phase).wrapping_add(other.of(phase)));
    }
}

impl Label {
    /// What an ISA calls a reason.
    pub fn new(isa: Isa, reason: Reason) -> Self {
        let (kind, code) = match reason {
            Reason::Code(code) => ("code", Some(code)),
            Reason::Start => ("start", None),
            Reason::Other => ("other", None),
        };
        let name = code.and_then(|code| reasons::name(isa, code));
        Self { kind, code, name }
    }
}

impl Ledger {
    fn new<'a>(isa: Isa, rows: impl Iterator<Item = Row<'a>>) -> Self {
        Self::of(rows.map(|row| ReasonRow {
            label: Label::new(isa, row.reason()),
            exits: row.exits(),
            nested_exits: row.nested_exits(),
            cycles: Cycles::by_phase(|phase| row.cycles(phase)),
            spread: Spread::read(&row),
        }))
    }

    /// The sums of rows, of which several may have the same reason.
    pub fn of(rows: impl IntoIterator<Item = ReasonRow>) -> Self {
        let mut ledger = Self {
            nested_exits: Some(0),
            ..Self::default()
        };
        let mut reasons = BTreeMap::new();
        for row in rows {
            ledger.exits = ledger.exits.wrapping_add(row.exits);
            ledger.nested_exits = both(ledger.nested_exits, row.nested_exits);
            ledger.cycles += row.cycles;
            reasons
                .entry((row.label.kind, row.label.code))
                .and_modify(|sum: &mut ReasonRow| {
                    sum.exits = sum.exits.wrapping_add(row.exits);
                    sum.nested_exits = both(sum.nested_exits, row.nested_exits);
                    sum.cycles += row.cycles;
                    if let (Some(sum), Some(spread)) = (&mut sum.spread, row.spread) {
                        *sum += spread;
                    }
                })
                .or_insert(row);
        }
        ledger.reasons = reasons.into_values().collect();
        // A stable sort: what costs the same stays in the order of the codes.
        ledger
            .reasons
            .sort_by_key(|row| Reverse((row.cycles.kernel, row.exits)));
        ledger
    }
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
                    ledger: Ledger::default(),
                    vcpus: Vec::new(),
                })
                .vcpus
                .push(Vcpu::new(snapshot, &record));
        }
        for vm in vms.values_mut() {
            vm.vcpus.sort_by_key(|vcpu| vcpu.vcpu);
            let rows = vm.vcpus.iter().flat_map(|vcpu| &vcpu.ledger.reasons);
            vm.ledger = Ledger::of(rows.copied());
        }
        Self {
            format: FORMAT,
            host: Host {
                isa,
                tsc_khz: snapshot.tsc_khz(),
                tsc_stable: snapshot.tsc_is_stable(),
                loaded_tsc: snapshot.loaded(),
                snapshot_tsc: snapshot.now(),
                leaf_map: snapshot.leaf_map().map(|map| map as u32),
                host_scope: snapshot.host_scope(),
            },
            unmetered_vcpus: snapshot.unmetered(),
            vms: vms.into_values().collect(),
            departed: Departed {
                vcpus_gone: snapshot.gone(),
                ledger: Ledger::new(isa, snapshot.totals()),
            },
        }
    }
}

impl Vcpu {
    fn new(snapshot: &Snapshot<'_>, record: &VcpuRecord<'_>) -> Self {
        let isa = snapshot.isa();
        Self {
            vcpu: record.id(),
            first_tsc: record.first(),
            last_tsc: record.last(),
            phase: record.phase().map(Phase::name),
            // The snapshot's time is that of its beginning: this vCPU may be a bit later.
            phase_ticks: snapshot.now().saturating_sub(record.last()),
            latest: record.latest().map(|reason| Label::new(isa, reason)),
            ledger: Ledger::new(isa, record.rows()),
        }
    }
}

/// A sum that is known when both its parts are.
fn both(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one?.wrapping_add(other?))
}

/// Writes an ISA by its name.
pub(crate) fn isa_name<S: serde::Serializer>(isa: &Isa, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(isa.name())
}
