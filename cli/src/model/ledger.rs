// SPDX-License-Identifier: GPL-2.0

//! Exits and ticks by reason.

use std::{cmp::Reverse, collections::BTreeMap, fmt, iter::Sum, ops::AddAssign};

use exitmeter_meter::{
    phase::Phase,
    reader::Row,
    reasons::{self, Isa},
    snapshot::{Reason, BLOCKED},
};
use serde::{ser::SerializeMap as _, Serialize, Serializer};

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
    /// Of the kernel's ticks those for which KVM polled before it let the vCPU sleep, when they
    /// are known (see `take_polling_apart`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled: Option<u128>,
    /// The same by reason, the one with the most kernel cycles first, without polling.
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
    /// Of the kernel's ticks those for which KVM polled before it let the vCPU sleep: those of
    /// HLT, when they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled: Option<u128>,
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

/// TSC ticks by phase. Sums of the ledgers of a large host do not fit into 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cycles {
    /// The guest ran.
    pub guest: u128,
    /// KVM worked for it.
    pub kernel: u128,
    /// The VMM ran in user space.
    pub user: u128,
    /// The vCPU slept by its own wish; for whatever cause while `has_waits` is false.
    pub halted: u128,
    /// KVM slept for the host.
    pub waiting: u128,
    /// The host took the CPU away.
    pub preempted: u128,
    /// Whether the two sleeps are told apart.
    pub has_waits: bool,
    /// By phase, one bit each: the number had no room where it was counted, and is at least what
    /// is told.
    full: u8,
}

impl Default for Cycles {
    /// None. What is added says whether the sleeps are told apart.
    fn default() -> Self {
        Self::by_phase(true, |_| 0)
    }
}

impl Cycles {
    /// The ticks of each phase.
    pub fn by_phase(has_waits: bool, of: impl Fn(Phase) -> u128) -> Self {
        Self {
            guest: of(Phase::Guest),
            kernel: of(Phase::Kernel),
            user: of(Phase::User),
            halted: of(Phase::Halted),
            waiting: of(Phase::Waiting),
            preempted: of(Phase::Preempted),
            has_waits,
            full: 0,
        }
    }

    /// The ticks of each phase as the module counted them.
    pub fn counted(has_waits: bool, of: impl Fn(Phase) -> u64) -> Self {
        let full = |phase: Phase| u8::from(of(phase) == u64::MAX) << phase as u32;
        Self {
            full: Phase::ALL
                .into_iter()
                .map(full)
                .fold(0, |all, bit| all | bit),
            ..Self::by_phase(has_waits, |phase| of(phase).into())
        }
    }

    /// The ticks of a phase.
    pub fn of(&self, phase: Phase) -> u128 {
        match phase {
            Phase::Guest => self.guest,
            Phase::Kernel => self.kernel,
            Phase::User => self.user,
            Phase::Halted => self.halted,
            Phase::Waiting => self.waiting,
            Phase::Preempted => self.preempted,
        }
    }

    /// The ticks of both sleeps.
    pub fn blocked(&self) -> u128 {
        self.halted + self.waiting
    }

    /// The ticks of all phases.
    pub fn sum(&self) -> u128 {
        Phase::ALL.into_iter().map(|phase| self.of(phase)).sum()
    }

    /// Whether the ticks of a phase are more than there was room for.
    pub fn is_full(&self, phase: Phase) -> bool {
        self.full & 1 << phase as u32 != 0
    }

    /// The phases that are told, in the order in which people read them.
    pub fn phases(&self) -> impl Iterator<Item = Phase> + use<> {
        let has_waits = self.has_waits;
        Phase::SHOWN
            .into_iter()
            .filter(move |phase| has_waits || *phase != Phase::Waiting)
    }

    /// What a phase is called.
    pub fn name(&self, phase: Phase) -> &'static str {
        match phase {
            Phase::Halted if !self.has_waits => BLOCKED,
            phase => phase.name(),
        }
    }

    /// The ticks since an earlier moment. Clocks that part may set an end of a phase before its
    /// beginning: then there are none.
    pub fn since(&self, earlier: &Self) -> Self {
        let (new, old) = alike(*self, *earlier);
        let ticks = |phase| new.of(phase).saturating_sub(old.of(phase));
        Self {
            full: new.full,
            ..Self::by_phase(new.has_waits, ticks)
        }
    }

    /// The same with both sleeps as one where others have them so.
    pub fn as_told_by(self, others: &Self) -> Self {
        alike(self, *others).0
    }

    /// The sums of both.
    fn plus(self, other: Self) -> Self {
        let (one, other) = alike(self, other);
        Self {
            full: one.full | other.full,
            ..Self::by_phase(one.has_waits, |phase| one.of(phase) + other.of(phase))
        }
    }

    /// The same with both sleeps as one.
    fn without_waits(self) -> Self {
        let waiting = self.full >> Phase::Waiting as u32 & 1;
        Self {
            halted: self.blocked(),
            waiting: 0,
            has_waits: false,
            full: self.full & !(1 << Phase::Waiting as u32) | waiting << Phase::Halted as u32,
            ..self
        }
    }
}

/// Two that tell the same sleeps apart.
fn alike(one: Cycles, other: Cycles) -> (Cycles, Cycles) {
    match one.has_waits && other.has_waits {
        true => (one, other),
        false => (one.without_waits(), other.without_waits()),
    }
}

impl AddAssign for Cycles {
    fn add_assign(&mut self, other: Self) {
        *self = self.plus(other);
    }
}

impl Sum for Cycles {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Self::plus)
    }
}

impl Serialize for Cycles {
    /// Each phase by its name, with `blocked` for both sleeps; `halted` and `waiting` when they are
    /// told apart; and in `at_least` the names of those that are more than there was room for.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_map(None)?;
        for phase in [Phase::Guest, Phase::Kernel, Phase::User] {
            to.serialize_entry(phase.name(), &self.of(phase))?;
        }
        to.serialize_entry(BLOCKED, &self.blocked())?;
        to.serialize_entry(Phase::Preempted.name(), &self.preempted)?;
        if self.has_waits {
            to.serialize_entry(Phase::Halted.name(), &self.halted)?;
            to.serialize_entry(Phase::Waiting.name(), &self.waiting)?;
        }
        let full = self.phases().filter(|phase| self.is_full(*phase));
        let full: Vec<_> = full.map(|phase| self.name(phase)).collect();
        if !full.is_empty() {
            to.serialize_entry("at_least", &full)?;
        }
        to.end()
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

impl AddAssign for ReasonRow {
    /// Add a row of the same reason.
    fn add_assign(&mut self, row: Self) {
        self.exits = self.exits.saturating_add(row.exits);
        self.nested_exits = both(self.nested_exits, row.nested_exits);
        self.cycles += row.cycles;
        self.polled = either(self.polled, row.polled);
        if let (Some(sum), Some(spread)) = (&mut self.spread, row.spread) {
            *sum += spread;
        }
    }
}

impl ReasonRow {
    /// Return a row of a snapshot that tells the two sleeps apart or does not.
    pub fn new(isa: Isa, has_waits: bool, row: &Row<'_>) -> Self {
        Self {
            label: Label::new(isa, row.reason()),
            exits: row.exits(),
            nested_exits: row.nested_exits(),
            cycles: Cycles::counted(has_waits, |phase| row.cycles(phase)),
            polled: None,
            spread: Spread::read(row),
        }
    }

    /// The kernel's ticks without polling: what the exits cost.
    pub fn cost(&self) -> u128 {
        self.cycles.kernel.saturating_sub(self.polled.unwrap_or(0))
    }
}

impl Ledger {
    /// The numbers of a record of a snapshot that tells the two sleeps apart or does not.
    pub(super) fn new<'a>(isa: Isa, has_waits: bool, rows: impl Iterator<Item = Row<'a>>) -> Self {
        let mut ledger = Self::of(rows.map(|row| ReasonRow::new(isa, has_waits, &row)));
        ledger.cycles.has_waits = has_waits;
        ledger
    }

    /// The kernel's ticks without polling: what the exits cost.
    pub fn cost(&self) -> u128 {
        self.cycles.kernel.saturating_sub(self.polled.unwrap_or(0))
    }

    /// Tells of HLT's kernel ticks those for which KVM polled before it let the vCPU sleep.
    ///
    /// How long that was is KVM's own count, by another clock than the TSC, and with the time for
    /// which the host took the CPU away meanwhile. So it may be more than the kernel's ticks of
    /// HLT. What is more than these is told of no reason.
    pub(super) fn take_polling_apart(
        &mut self,
        isa: Isa,
        nanoseconds: Option<u64>,
        khz: Option<u32>,
    ) {
        let ticks = nanoseconds
            .zip(khz)
            .map(|(ns, khz)| u128::from(ns) * u128::from(khz) / 1_000_000);
        let hlt = Label::new(isa, Reason::Code(hlt_reason(isa)));
        let row = self
            .reasons
            .iter_mut()
            .find(|row| row.label.key() == hlt.key());
        self.polled = ticks.map(|_| 0);
        if let Some(row) = row {
            row.polled = ticks.map(|ticks| ticks.min(row.cycles.kernel));
            self.polled = row.polled;
        }
        self.sort(Sort::Cycles);
    }

    /// The sums of rows, of which several may have the same reason.
    pub fn of(rows: impl IntoIterator<Item = ReasonRow>) -> Self {
        let mut ledger = Self {
            nested_exits: Some(0),
            ..Self::default()
        };
        let mut reasons = BTreeMap::new();
        for row in rows {
            ledger.exits = ledger.exits.saturating_add(row.exits);
            ledger.nested_exits = both(ledger.nested_exits, row.nested_exits);
            ledger.cycles += row.cycles;
            ledger.polled = either(ledger.polled, row.polled);
            reasons
                .entry(row.label.key())
                .and_modify(|sum: &mut ReasonRow| *sum += row)
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
                Sort::Cycles => (row.cost(), row.exits.into()),
                Sort::Exits => (row.exits.into(), row.cost()),
                Sort::P99 => (p99.unwrap_or(0).into(), row.cost()),
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
pub(crate) fn both(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one?.saturating_add(other?))
}

/// A sum of those parts that are known.
fn either(one: Option<u128>, other: Option<u128>) -> Option<u128> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one + other),
        (one, other) => one.or(other),
    }
}

/// The exit reason of a HLT instruction.
const fn hlt_reason(isa: Isa) -> u32 {
    match isa {
        Isa::Vmx => 12,
        Isa::Svm => 0x78,
    }
}
