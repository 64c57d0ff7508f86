// SPDX-License-Identifier: GPL-2.0

//! Time series of a recording: for each interval, the exits by reason and the ticks by phase.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use exitmeter_meter::{
    reader::{self, Snapshot},
    reasons::Isa,
    snapshot::{Reason, TABLE_DETAILS},
};

use crate::{
    model::{
        delta::{self, NEW_LIFE},
        Cycles, Label, Ledger, Report, Vm,
    },
    names::{self, words::ascii, NameBook, NoVm},
    recording::read::{self, Ending, Reader},
    slow::model::{Exit, Selection, Slow, SlowExits},
    why::{
        select,
        symbols::Symbols,
        tables::{ReasonKey, Rows, TableSet},
    },
};

/// Key of a reason.
pub type Key = (&'static str, Option<u32>);

/// Selection of a part of a recording.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Only the VM with this name or process id.
    pub vm: Option<String>,
    /// Start, in seconds after the beginning of the recording.
    pub from: Option<f64>,
    /// End, in seconds after the beginning of the recording.
    pub to: Option<f64>,
    /// Only details and slow exits of this reason.
    pub reason: Option<String>,
    /// Symbols of the guest, for slow exits.
    pub symbols: Symbols,
}

/// Activity from one snapshot to the next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Beginning, in seconds since the recording began.
    pub from: f64,
    /// End, in seconds since the recording began.
    pub to: f64,
    /// True if the meter began anew between the previous step and this one. The activity in between
    /// is unknown.
    pub begins_anew: bool,
    /// Exits by reason.
    pub exits: BTreeMap<Key, u64>,
    /// Ticks by phase.
    pub cycles: Cycles,
    /// Details of the exits; `None` while details were off.
    pub details: Option<Rows>,
}

/// One of the slowest exits of its vCPU.
#[derive(Clone, Debug)]
pub struct SlowExit {
    /// Time of the exit, in seconds since the recording began.
    pub at: f64,
    /// Name of the VM.
    pub vm: String,
    /// The exit.
    pub exit: Exit,
}

/// Time series of a recording.
#[derive(Clone, Debug)]
pub struct Series {
    /// Steps in order. Gaps are only where the meter began anew.
    pub steps: Vec<Step>,
    /// Sums over all steps.
    pub sum: Ledger,
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// Sums of the details; `None` if details were off all the time.
    pub details: Option<Rows>,
    /// Slowest exits, the longest first.
    pub slow: Vec<SlowExit>,
    /// TSC frequency, in kHz, if known.
    pub tsc_khz: Option<u32>,
    /// Facts that the recording states about itself.
    pub about: BTreeMap<String, String>,
    /// Names of the VMs.
    pub vms: BTreeSet<String>,
    /// Names of moments, in order, with their time in seconds since the recording began.
    pub marks: Vec<(f64, String)>,
    /// Times at which the meter began anew, in seconds since the recording began.
    pub breaks: Vec<f64>,
    /// Number of snapshots.
    pub snapshots: usize,
    /// End of the recording.
    pub ending: Ending,
}

/// A reason why nothing can be drawn.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not a recording.
    #[error("{}: {error}", path.display())]
    NoRecording {
        /// File.
        path: PathBuf,
        /// Cause.
        error: read::Error,
    },
    /// A snapshot cannot be read.
    #[error("{}, snapshot {number}: {error}", path.display())]
    NoSnapshot {
        /// File.
        path: PathBuf,
        /// Number of the snapshot, from 1.
        number: usize,
        /// Cause.
        error: reader::Error,
    },
    /// Two snapshots do not follow each other.
    #[error("{}, snapshot {number}: {error}", path.display())]
    NoInterval {
        /// File.
        path: PathBuf,
        /// Number of the later snapshot, from 1.
        number: usize,
        /// Cause.
        error: delta::Error,
    },
    /// There are fewer than two snapshots.
    #[error(
        "{} has {found} of the two snapshots that an interval takes: record longer, or draw more \
         of it (--from, --to)", path.display()
    )]
    TooShort {
        /// File.
        path: PathBuf,
        /// Number of snapshots.
        found: usize,
    },
    /// The meter began anew between all snapshots.
    #[error(
        "the meter began anew between all snapshots of {}, so that there is nothing to draw: \
         record longer, or draw more of it (--from, --to)", .0.display()
    )]
    Torn(PathBuf),
    /// The reason is unknown.
    #[error(transparent)]
    Selection(#[from] select::Error),
    /// The VM does not occur.
    #[error("{} has no VM that is called '{vm}' or belongs to process '{vm}'; {listed}", path.display())]
    NoVm {
        /// File.
        path: PathBuf,
        /// Name that was searched for.
        vm: String,
        /// VMs of the recording, in words.
        listed: String,
    },
    /// Several VMs have the name at the same time.
    #[error("{}: {error}", path.display())]
    Several {
        /// File.
        path: PathBuf,
        /// Cause.
        error: NoVm,
    },
}

impl Series {
    /// Read a part of a recording.
    ///
    /// # Errors
    ///
    /// Returns an error if the file is not a recording, or has no such part.
    pub fn read(path: &Path, bytes: &[u8], part: &Part) -> Result<Self, Error> {
        let file = || path.to_owned();
        let mut reader = Reader::new(bytes).map_err(|error| Error::NoRecording {
            path: file(),
            error,
        })?;
        let mut series = Self {
            steps: Vec::new(),
            sum: Ledger::of([]),
            isa: Isa::Vmx,
            details: None,
            slow: Vec::new(),
            tsc_khz: None,
            about: BTreeMap::new(),
            vms: BTreeSet::new(),
            marks: Vec::new(),
            breaks: Vec::new(),
            snapshots: 0,
            ending: Ending::Cut,
        };
        let mut clock: Option<Clock> = None;
        let mut before: Option<(f64, Report, Option<TableSet>)> = None;
        let mut slow = MergedSlowExits::default();
        let mut anew = false;
        let mut found = 0;
        let mut others = BTreeSet::new();
        let mut number = 0;
        while let Some(taken) = reader.next_snapshot() {
            number += 1;
            let snapshot = Snapshot::parse(taken.snapshot).map_err(|error| Error::NoSnapshot {
                path: file(),
                number,
                error,
            })?;
            let clock = clock.get_or_insert_with(|| Clock::new(&snapshot, taken.at));
            let (time, began_anew) = clock.advance(&snapshot, taken.at);
            let earlier = before.take_if(|_| began_anew);
            if part.from.is_some_and(|from| time < from) || part.to.is_some_and(|to| time > to) {
                continue;
            }
            if began_anew {
                series.end_of_life(&mut slow, part, taken.names)?;
            }
            if earlier.is_some() {
                series.breaks.push(time);
                series.marks.push((time, NEW_LIFE.to_owned()));
                anew = true;
            }
            let mark = taken.mark.map(|name| (time, name.to_owned()));
            series.marks.extend(mark);
            let mut report = Report::new(&snapshot);
            taken.names.name(&mut report);
            let selected = part.selected(&report).map_err(|error| Error::Several {
                path: file(),
                error,
            })?;
            series.snapshots += 1;
            let tables = snapshot.has_tables().then(|| TableSet::new(&snapshot));
            slow.add(&snapshot, time);
            slow.selected.extend(&selected);
            (series.tsc_khz, series.isa) = (report.host.tsc_khz, report.host.isa);
            for vm in &report.vms {
                let here = selected.contains(&vm.vm);
                found += usize::from(here);
                if here { &mut series.vms } else { &mut others }.insert(vm.label());
            }
            if let Some((from, before, tables_before)) = &before {
                let delta = report.since(before).map_err(|error| Error::NoInterval {
                    path: file(),
                    number,
                    error,
                })?;
                let between = match (&tables, tables_before) {
                    (Some(now), Some(before)) => now.since(before).ok(),
                    _ => None,
                };
                let details = match between {
                    Some(between) => Some(part.details(&between, &selected)?),
                    None => None,
                };
                let step = Step {
                    from: *from,
                    to: time,
                    begins_anew: std::mem::take(&mut anew),
                    details,
                    ..Step::default()
                };
                series.add(step, delta, (part, &selected));
            }
            before = Some((time, report, tables));
        }
        series.end_of_life(&mut slow, part, reader.names())?;
        if let (Some(vm), 0) = (&part.vm, found) {
            let listed = match others.into_iter().collect::<Vec<_>>() {
                none if none.is_empty() => "there is none in that part of it".to_owned(),
                names => format!("those in it are {}", ascii(&names.join(", "))),
            };
            let (path, vm) = (file(), vm.clone());
            return Err(Error::NoVm { path, vm, listed });
        }
        if series.steps.is_empty() {
            let found = series.snapshots;
            if found > 1 {
                return Err(Error::Torn(file()));
            }
            return Err(Error::TooShort {
                path: file(),
                found,
            });
        }
        series.details = series
            .steps
            .iter()
            .filter_map(|step| step.details.as_ref())
            .fold(None, |sum: Option<Rows>, rows| {
                Some(Rows::sum(sum.iter().chain([rows])))
            });
        let (from, to) = series.range();
        series.slow.retain(|exit| (from..=to).contains(&exit.at));
        series
            .slow
            .sort_by_key(|one| (Reverse(one.exit.took), one.exit.tsc));
        let about = reader.about();
        series.about = about
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .collect();
        series.ending = reader.ending().cloned().unwrap_or(Ending::Cut);
        Ok(series)
    }

    fn add(&mut self, mut step: Step, delta: Report, (part, selected): PartAndVms<'_>) {
        let vms = delta.vms.into_iter();
        let vms = vms
            .filter(|vm| selected.contains(&vm.vm))
            .map(|vm| vm.ledger);
        // Activity of vCPUs that are gone belongs to no VM any more.
        let gone = part.vm.is_none().then_some(delta.departed.ledger);
        for ledger in vms.chain(gone) {
            step.cycles += ledger.cycles;
            for row in ledger.reasons {
                let exits = step.exits.entry(row.label.key()).or_default();
                *exits = exits.saturating_add(row.exits);
                self.sum.reasons.push(row);
            }
        }
        self.sum = Ledger::of(std::mem::take(&mut self.sum.reasons));
        self.steps.push(step);
    }

    /// Add the slow exits of a life of the meter that ends here.
    fn end_of_life(
        &mut self,
        slow: &mut MergedSlowExits,
        part: &Part,
        names: &NameBook,
    ) -> Result<(), Error> {
        let MergedSlowExits {
            seen,
            times,
            selected,
        } = std::mem::take(slow);
        let Some(seen) = seen else { return Ok(()) };
        let code = part.code(seen.host.isa)?;
        let selection = Selection {
            vm: None,
            names: Some(names),
            code,
        };
        // The selection names no VM, so none can be missing.
        let Ok(slow) = Slow::new(&seen, &part.symbols, selection) else {
            return Ok(());
        };
        let vms = slow.vms.into_iter();
        for vm in vms.filter(|vm| selected.contains(&vm.vm)) {
            let exits = vm.slowest.into_iter().filter_map(|exit| {
                let at = moment(&times, exit.tsc)?;
                let vm = vm.vmm.label(&vm.name);
                Some(SlowExit { at, vm, exit })
            });
            self.slow.extend(exits);
        }
        Ok(())
    }

    /// Return the beginning and the end, in seconds since the recording began.
    pub fn range(&self) -> (f64, f64) {
        let ends = (self.steps.first(), self.steps.last());
        (
            ends.0.map_or(0.0, |step| step.from),
            ends.1.map_or(0.0, |step| step.to),
        )
    }

    /// Merge the steps into at most `most` bins, plus one for each place where the meter began anew
    /// or details were turned on or off.
    pub fn bins(&self, most: u32) -> Vec<Step> {
        let (from, to) = self.range();
        let width = (to - from) / f64::from(most.max(1));
        let mut bins: Vec<Step> = Vec::new();
        let mut place = None;
        for step in &self.steps {
            let middle = (step.from + step.to) / 2.0;
            let here = Some(((middle - from) / width).floor() as u64);
            match bins.last_mut() {
                Some(bin)
                    if place == here
                        && !step.begins_anew
                        && bin.details.is_some() == step.details.is_some() =>
                {
                    bin.add(step);
                }
                _ => bins.push(step.clone()),
            }
            place = here;
        }
        bins
    }

    /// Return the reasons that occurred, the most frequent first.
    pub fn frequent(&self) -> Vec<(Label, u64)> {
        let rows = self.sum.reasons.iter().filter(|row| row.exits != 0);
        let mut reasons: Vec<_> = rows.map(|row| (row.label, row.exits)).collect();
        reasons.sort_by_key(|(label, exits)| (Reverse(*exits), label.key()));
        reasons
    }
}

/// A part, and the numbers of its VMs.
type PartAndVms<'a> = (&'a Part, &'a BTreeSet<u64>);

impl Part {
    /// Return the numbers of the part's VMs in a snapshot.
    fn selected(&self, report: &Report) -> Result<BTreeSet<u64>, NoVm> {
        let known = report.vms.iter().map(Vm::candidate);
        let Some(vm) = &self.vm else {
            return Ok(known.map(|vm| vm.vm).collect());
        };
        match names::find(vm, known) {
            // The VM may appear later.
            Err(NoVm::None { .. }) => Ok(BTreeSet::new()),
            found => found,
        }
    }

    /// Return the code of the part's reason.
    pub fn code(&self, isa: Isa) -> Result<Option<u32>, select::Error> {
        let reason = self.reason.as_deref();
        reason.map(|reason| select::code(isa, reason)).transpose()
    }

    /// Return the details between two snapshots.
    fn details(&self, between: &TableSet, selected: &BTreeSet<u64>) -> Result<Rows, select::Error> {
        let code = self.code(between.host.isa)?;
        let reason = code.map(|code| ReasonKey::new(Reason::Code(code)));
        let vcpus = between.vcpus.iter();
        let vcpus = vcpus.filter(|((vm, _), _)| selected.contains(vm));
        let parts: Vec<_> = vcpus
            .map(|(_, vcpu)| vcpu.rows.part(TABLE_DETAILS, reason))
            .collect();
        Ok(Rows::sum(parts.iter()))
    }
}

impl Step {
    fn add(&mut self, next: &Self) {
        self.to = next.to;
        self.cycles += next.cycles;
        if let (Some(sum), Some(next)) = (&mut self.details, &next.details) {
            *sum = Rows::sum([&*sum, next].into_iter());
        }
        for (key, exits) in &next.exits {
            let sum = self.exits.entry(*key).or_default();
            *sum = sum.saturating_add(*exits);
        }
    }

    /// Return the length, in seconds.
    pub fn seconds(&self) -> f64 {
        self.to - self.from
    }
}

/// Split steps where the meter began anew.
pub fn runs(steps: &[Step]) -> impl Iterator<Item = &[Step]> {
    steps.chunk_by(|_, next| !next.begins_anew)
}

/// Slow exits of one life of the meter. Several snapshots may contain the same exit.
#[derive(Debug, Default)]
struct MergedSlowExits {
    seen: Option<SlowExits>,
    /// TSC and time of each snapshot.
    times: Vec<(u64, f64)>,
    /// Numbers of the selected VMs.
    selected: BTreeSet<u64>,
}

impl MergedSlowExits {
    /// Add the slow exits of a snapshot.
    fn add(&mut self, snapshot: &Snapshot<'_>, time: f64) {
        self.times.push((snapshot.now(), time));
        if !snapshot.has_tables() {
            return;
        }
        let new = SlowExits::new(snapshot, None);
        match &mut self.seen {
            Some(seen) => seen.merge_by_window(new),
            None => self.seen = Some(new),
        }
    }
}

/// Return the time of a TSC value, by interpolation between two snapshots. Returns `None` if it is
/// before all of them.
pub fn moment(times: &[(u64, f64)], tsc: u64) -> Option<f64> {
    let behind = times.partition_point(|(at, _)| *at <= tsc);
    let (before, from) = *times.get(behind.checked_sub(1)?)?;
    let Some((after, to)) = times.get(behind) else {
        // The exit happened while the last snapshot was taken.
        return Some(from);
    };
    let share = (tsc - before) as f64 / (after - before).max(1) as f64;
    Some(from + share * (to - from))
}

/// Clock that gives snapshots their time, in seconds since the first one.
///
/// The time follows the TSC, as the numbers are read at a moment of it. Where the meter began anew,
/// it follows the recording's own clock, as the TSC may have begun anew as well.
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// Time of the first snapshot in the recording.
    begun: Duration,
    /// Properties of the latest snapshot: the meter's life number, the TSC, the time in the
    /// recording, and the time in seconds.
    life: u64,
    tsc: u64,
    at: Duration,
    time: f64,
}

impl Clock {
    fn new(first: &Snapshot<'_>, at: Duration) -> Self {
        Self {
            begun: at,
            life: first.life(),
            tsc: first.now(),
            at,
            time: 0.0,
        }
    }

    /// Take the next snapshot. Returns its time, and true if the meter began anew before it.
    fn advance(&mut self, snapshot: &Snapshot<'_>, at: Duration) -> (f64, bool) {
        let began_anew = snapshot.life() != self.life || snapshot.now() < self.tsc;
        let passed = match snapshot.tsc_khz() {
            Some(khz) if !began_anew => {
                snapshot.now().saturating_sub(self.tsc) as f64 / (f64::from(khz) * 1000.0)
            }
            Some(_) => at.saturating_sub(self.begun).as_secs_f64() - self.time,
            None => at.saturating_sub(self.at).as_secs_f64(),
        };
        *self = Self {
            begun: self.begun,
            life: snapshot.life(),
            tsc: snapshot.now(),
            at,
            time: self.time + passed.max(0.0),
        };
        (self.time, began_anew)
    }
}
