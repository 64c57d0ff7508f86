// SPDX-License-Identifier: GPL-2.0

//! Exits and ticks by reason.

use std::{cmp::Reverse, collections::BTreeMap, fmt, ops::AddAssign};

use exitmeter_meter::{
    phase::Phase,
    reader::Row,
    reasons::{self, Isa},
    snapshot::Reason,
};
use serde::Serialize;

use crate::spread::Spread;

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

/// What the reasons are ordered by, the most first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// By kernel cycles.
    #[default]
    Cycles,
    /// By how many exits there were.
    Exits,
    /// By the kernel cycles that 99 of 100 exits did not exceed.
    P99,
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
    /// `max` (exactly, if `max_exact`), and `histogram`, a list of the least ticks and the number of exits of a bucket.
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

    /// What tells reasons apart.
    pub fn key(&self) -> (&'static str, Option<u32>) {
        (self.kind, self.code)
    }
}

/// Its name, or what stands for one.
impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match (self.kind, self.name) {
            (_, Some(name)) => name,
            ("start", _) => "(before any exit)",
            ("other", _) => "(other codes)",
            _ => "(not defined)",
        })
    }
}

impl Ledger {
    pub(super) fn new<'a>(isa: Isa, rows: impl Iterator<Item = Row<'a>>) -> Self {
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
                .entry(row.label.key())
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
        ledger.sort(Sort::Cycles);
        ledger
    }

    /// Orders the reasons. What is the same stays in the order it had.
    pub fn sort(&mut self, by: Sort) {
        self.reasons.sort_by_key(|row| {
            let p99 = row.spread.and_then(|spread| spread.quantile(99));
            Reverse(match by {
                Sort::Cycles => (row.cycles.kernel, row.exits),
                Sort::Exits => (row.exits, row.cycles.kernel),
                Sort::P99 => (p99.unwrap_or(0), row.cycles.kernel),
            })
        });
    }

    /// The row of a reason.
    pub fn row(&self, label: &Label) -> Option<&ReasonRow> {
        self.reasons
            .iter()
            .find(|row| row.label.key() == label.key())
    }
}

/// A sum that is known when both its parts are.
fn both(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one?.wrapping_add(other?))
}
