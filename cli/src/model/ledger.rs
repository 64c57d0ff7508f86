// SPDX-License-Identifier: GPL-2.0

//! Exits and ticks by reason.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fmt,
    iter::Sum,
    ops::{AddAssign, Deref},
};

use exitmeter_guest::ReasonNumbers;
use exitmeter_meter::{
    phase::Phase,
    reader::Row,
    reasons::{self, Isa},
    snapshot::{Reason, BLOCKED, COUNTERS},
};
use serde::{ser::SerializeMap as _, Serialize, Serializer};

use crate::spread::Spread;

/// Numbers of one reason, or sums over several.
///
/// A ledger and a row dereference to their counts.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Counts {
    /// VM exits.
    pub exits: u64,
    /// Exits from nested guests, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested_exits: Option<u64>,
    /// TSC ticks by phase.
    pub cycles: Cycles,
    /// Kernel ticks of HLT in which KVM polled before it let the vCPU sleep, if known (see
    /// `separate_polling`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polled: Option<u128>,
}

/// Numbers of a vCPU, or sums over several vCPUs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Ledger {
    /// Sums over the reasons.
    #[serde(flatten)]
    pub counts: Counts,
    /// Numbers by reason, sorted by kernel cycles without polling, the most first.
    pub reasons: Vec<ReasonRow>,
}

/// Sort order of the reasons, the most first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// Kernel cycles.
    #[default]
    Cycles,
    /// Number of exits.
    Exits,
    /// Kernel cycles that 99 of 100 exits did not exceed.
    P99,
}

/// Numbers of one reason.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ReasonRow {
    /// Reason that the numbers are booked on.
    #[serde(flatten)]
    pub label: Label,
    /// The numbers.
    #[serde(flatten)]
    pub counts: Counts,
    /// Distribution of the kernel ticks of single exits, if known: `p50`, `p90` and `p99` within
    /// 20%, `max` (exact if `max_exact`), and `histogram`, a list of buckets, each with its lower
    /// bound in ticks and its number of exits.
    #[serde(flatten)]
    pub spread: Option<Spread>,
}

/// An exit reason in displayable form.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Label {
    /// `code`, `start` (before the first exit) or `other` (codes without a row).
    pub kind: &'static str,
    /// VMX basic exit reason or SVM exit code.
    pub code: Option<u32>,
    /// Name of the code, if it is defined.
    pub name: Option<&'static str>,
}

/// TSC ticks by phase. Sums over a large host do not fit into 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cycles {
    /// The guest ran.
    pub guest: u128,
    /// KVM ran.
    pub kernel: u128,
    /// The VMM ran in user space.
    pub user: u128,
    /// The vCPU slept by its own wish, or for any cause if `separates_waits` is false.
    pub halted: u128,
    /// KVM slept for the host.
    pub waiting: u128,
    /// The host took the CPU away.
    pub preempted: u128,
    /// True if the two sleeps are counted separately.
    pub separates_waits: bool,
    /// Phases whose counter saturated, one bit each. Their number is a lower bound.
    full: u8,
}

impl Default for Cycles {
    /// Return zero ticks. The first addition decides if the sleeps are separate.
    fn default() -> Self {
        Self::by_phase(true, |_| 0)
    }
}

impl Cycles {
    /// Create cycles from the ticks of each phase.
    pub fn by_phase(separates_waits: bool, of: impl Fn(Phase) -> u128) -> Self {
        Self {
            guest: of(Phase::Guest),
            kernel: of(Phase::Kernel),
            user: of(Phase::User),
            halted: of(Phase::Halted),
            waiting: of(Phase::Waiting),
            preempted: of(Phase::Preempted),
            separates_waits,
            full: 0,
        }
    }

    /// Create cycles from the module's counters, which saturate.
    pub fn counted(separates_waits: bool, of: impl Fn(Phase) -> u64) -> Self {
        let full = |phase: Phase| u8::from(of(phase) == u64::MAX) << phase as u32;
        Self {
            full: Phase::ALL
                .into_iter()
                .map(full)
                .fold(0, |all, bit| all | bit),
            ..Self::by_phase(separates_waits, |phase| of(phase).into())
        }
    }

    /// Return the ticks of a phase.
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

    /// Return the ticks of both sleeps.
    pub fn blocked(&self) -> u128 {
        self.halted + self.waiting
    }

    /// Return the ticks of all phases.
    pub fn sum(&self) -> u128 {
        Phase::ALL.into_iter().map(|phase| self.of(phase)).sum()
    }

    /// Return true if the counter of a phase saturated.
    pub fn is_full(&self, phase: Phase) -> bool {
        self.full & 1 << phase as u32 != 0
    }

    /// Return the phases to show, in display order.
    pub fn phases(&self) -> impl Iterator<Item = Phase> + use<> {
        let separates_waits = self.separates_waits;
        Phase::SHOWN
            .into_iter()
            .filter(move |phase| separates_waits || *phase != Phase::Waiting)
    }

    /// Return the name of a phase.
    pub fn name(&self, phase: Phase) -> &'static str {
        match phase {
            Phase::Halted if !self.separates_waits => BLOCKED,
            phase => phase.name(),
        }
    }

    /// Return the difference from an earlier moment. With clocks that disagree, a phase can end
    /// before it begins; it then counts 0.
    pub fn since(&self, earlier: &Self) -> Self {
        let (new, old) = merge_waits_alike(*self, *earlier);
        let ticks = |phase| new.of(phase).saturating_sub(old.of(phase));
        Self {
            full: new.full,
            ..Self::by_phase(new.separates_waits, ticks)
        }
    }

    /// Return these cycles with the two sleeps merged if `others` has them merged.
    pub fn merged_like(self, others: &Self) -> Self {
        merge_waits_alike(self, *others).0
    }

    /// Return the sum of both.
    fn plus(self, other: Self) -> Self {
        let (one, other) = merge_waits_alike(self, other);
        Self {
            full: one.full | other.full,
            ..Self::by_phase(one.separates_waits, |phase| one.of(phase) + other.of(phase))
        }
    }

    /// Return these cycles with the two sleeps merged.
    fn without_waits(self) -> Self {
        let waiting = self.full >> Phase::Waiting as u32 & 1;
        Self {
            halted: self.blocked(),
            waiting: 0,
            separates_waits: false,
            full: self.full & !(1 << Phase::Waiting as u32) | waiting << Phase::Halted as u32,
            ..self
        }
    }
}

/// Merge the two sleeps in both, unless both count them separately.
fn merge_waits_alike(one: Cycles, other: Cycles) -> (Cycles, Cycles) {
    match one.separates_waits && other.separates_waits {
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
    /// Serialize each phase by its name, with `blocked` for both sleeps. Adds `halted` and
    /// `waiting` if they are counted separately, and `at_least` with the names of the phases whose
    /// counter saturated.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_map(None)?;
        for phase in [Phase::Guest, Phase::Kernel, Phase::User] {
            to.serialize_entry(phase.name(), &self.of(phase))?;
        }
        to.serialize_entry(BLOCKED, &self.blocked())?;
        to.serialize_entry(Phase::Preempted.name(), &self.preempted)?;
        if self.separates_waits {
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
    /// Create the label of a reason.
    pub fn new(isa: Isa, reason: Reason) -> Self {
        let (kind, code) = match reason {
            Reason::Code(code) => ("code", Some(code)),
            Reason::Start => ("start", None),
            Reason::Other => ("other", None),
        };
        let name = code.and_then(|code| reasons::name(isa, code));
        Self { kind, code, name }
    }

    /// Return the key that identifies the reason.
    pub fn key(&self) -> (&'static str, Option<u32>) {
        (self.kind, self.code)
    }
}

/// Formats the name, or a text in its place.
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

// `Counts` and `Spread` have all counters of this version.
const _: () = assert!(COUNTERS.len() == 11);

impl Default for Counts {
    /// Return counts of nothing. Adding them changes nothing.
    fn default() -> Self {
        Self {
            exits: 0,
            nested_exits: Some(0),
            cycles: Cycles::default(),
            polled: None,
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        let Self {
            exits,
            nested_exits,
            cycles,
            polled,
        } = self;
        *exits = exits.saturating_add(other.exits);
        *nested_exits = sum_if_known(*nested_exits, other.nested_exits);
        *cycles += other.cycles;
        *polled = sum_of_known(*polled, other.polled);
    }
}

impl Counts {
    /// Convert a row of a snapshot. `separates_waits` is true if the snapshot counts the two sleeps
    /// separately.
    fn new(separates_waits: bool, row: &Row<'_>) -> Self {
        Self {
            exits: row.exits(),
            nested_exits: row.nested_exits(),
            cycles: Cycles::counted(separates_waits, |phase| row.cycles(phase)),
            polled: None,
        }
    }

    /// Convert the numbers that a guest reads.
    pub(crate) fn of_guest(row: &ReasonNumbers) -> Self {
        Self {
            exits: row.exits,
            nested_exits: row.nested_exits,
            cycles: Cycles::counted(row.separates_waits, |phase| row.cycles(phase)),
            polled: None,
        }
    }

    /// Return counts of nothing but ticks of a phase. A number is known if it is known here.
    pub(crate) fn of_phase(&self, phase: Phase, ticks: u128) -> Self {
        let cycles = |other| if other == phase { ticks } else { 0 };
        Self {
            exits: 0,
            nested_exits: self.nested_exits.map(|_| 0),
            cycles: Cycles::by_phase(self.cycles.separates_waits, cycles),
            polled: None,
        }
    }

    /// Return the difference from an earlier moment, or `None` if a number that can only grow has
    /// fallen.
    pub(super) fn since(&self, earlier: &Self) -> Option<Self> {
        Some(Self {
            exits: self.exits.checked_sub(earlier.exits)?,
            nested_exits: grown_if_known(self.nested_exits, earlier.nested_exits)?,
            cycles: self.cycles.since(&earlier.cycles),
            // The caller separates polling again for the whole ledger.
            polled: None,
        })
    }

    /// Return the kernel ticks without polling: the cost of the exits.
    pub fn cost(&self) -> u128 {
        self.cycles.kernel.saturating_sub(self.polled.unwrap_or(0))
    }
}

impl Deref for ReasonRow {
    type Target = Counts;

    fn deref(&self) -> &Counts {
        &self.counts
    }
}

impl Deref for Ledger {
    type Target = Counts;

    fn deref(&self) -> &Counts {
        &self.counts
    }
}

impl AddAssign for ReasonRow {
    /// Add a row of the same reason.
    fn add_assign(&mut self, row: Self) {
        self.counts += row.counts;
        if let (Some(sum), Some(spread)) = (&mut self.spread, row.spread) {
            *sum += spread;
        }
    }
}

impl ReasonRow {
    /// Convert a row of a snapshot. `separates_waits` is true if the snapshot counts the two sleeps
    /// separately.
    pub fn new(isa: Isa, separates_waits: bool, row: &Row<'_>) -> Self {
        Self {
            label: Label::new(isa, row.reason()),
            counts: Counts::new(separates_waits, row),
            spread: Spread::read(row),
        }
    }
}

impl Ledger {
    /// Convert the rows of a record. `separates_waits` is true if the snapshot counts the two sleeps
    /// separately.
    pub(super) fn new<'a>(
        isa: Isa,
        separates_waits: bool,
        rows: impl Iterator<Item = Row<'a>>,
    ) -> Self {
        let mut ledger = Self::of(rows.map(|row| ReasonRow::new(isa, separates_waits, &row)));
        ledger.counts.cycles.separates_waits = separates_waits;
        ledger
    }

    /// Separate the polling from HLT's kernel ticks: the time that KVM polled before it let the
    /// vCPU sleep.
    ///
    /// KVM counts this time itself, by another clock than the TSC, and includes time for which the
    /// host took the CPU away. So it can exceed the kernel ticks of HLT. The excess is dropped.
    pub(super) fn separate_polling(
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
        self.counts.polled = ticks.map(|_| 0);
        if let Some(row) = row {
            row.counts.polled = ticks.map(|ticks| ticks.min(row.cycles.kernel));
            self.counts.polled = row.polled;
        }
        self.sort(Sort::Cycles);
    }

    /// Sum up rows, several of which may have the same reason.
    pub fn of(rows: impl IntoIterator<Item = ReasonRow>) -> Self {
        let mut ledger = Self::default();
        let mut reasons = BTreeMap::new();
        for row in rows {
            ledger.counts += row.counts;
            reasons
                .entry(row.label.key())
                .and_modify(|sum: &mut ReasonRow| *sum += row)
                .or_insert(row);
        }
        ledger.reasons = reasons.into_values().collect();
        ledger.sort(Sort::Cycles);
        ledger
    }

    /// Sort the reasons. Equal reasons keep their order.
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

    /// Return the row of a reason.
    pub fn row(&self, label: &Label) -> Option<&ReasonRow> {
        self.reasons
            .iter()
            .find(|row| row.label.key() == label.key())
    }
}

/// Return the sum if both parts are known.
pub(crate) fn sum_if_known(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    Some(one?.saturating_add(other?))
}

/// Return the growth of a number, where both are known; or `None` if it has fallen.
fn grown_if_known(new: Option<u64>, old: Option<u64>) -> Option<Option<u64>> {
    match new.zip(old) {
        Some((new, old)) => Some(Some(new.checked_sub(old)?)),
        None => Some(None),
    }
}

/// Return the sum of the known parts.
fn sum_of_known(one: Option<u128>, other: Option<u128>) -> Option<u128> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one + other),
        (one, other) => one.or(other),
    }
}

/// Return the exit reason of a HLT instruction.
const fn hlt_reason(isa: Isa) -> u32 {
    match isa {
        Isa::Vmx => 12,
        Isa::Svm => 0x78,
    }
}
