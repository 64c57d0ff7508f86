// SPDX-License-Identifier: GPL-2.0

//! What a recording tells over time: for each interval, the exits by reason and the ticks by
//! phase.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use exitmeter_meter::{
    reader,
    reader::Snapshot,
    reasons::Isa,
    snapshot::{Reason, TABLE_DETAILS},
};

use crate::{
    model::{
        delta::{self, ANEW},
        Cycles, Label, Ledger, Report, Vm,
    },
    names::{self, words::ascii, Book, NoVm},
    recording::read::{self, Ending, Reader},
    slow::model::{Exit, Seen, Selection, Slow},
    why::{
        select,
        symbols::Symbols,
        tables::{Moment, Of, Rows},
    },
};

/// What tells reasons apart.
pub type Key = (&'static str, Option<u32>);

/// Which part of a recording.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Only the VM that is called so, or of this process.
    pub vm: Option<String>,
    /// Only from so many seconds after its beginning on.
    pub from: Option<f64>,
    /// Only up to so many seconds after its beginning.
    pub to: Option<f64>,
    /// Of details and slow exits, only those of this reason.
    pub reason: Option<String>,
    /// Symbols of the guest, for slow exits.
    pub symbols: Symbols,
}

/// What happened from one snapshot to the next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Its beginning, in seconds since that of the recording.
    pub from: f64,
    /// Its end.
    pub to: f64,
    /// Whether the meter began anew between the step before it and this one: what happened up to
    /// here is not known.
    pub begins_anew: bool,
    /// Exits by reason.
    pub exits: BTreeMap<Key, u64>,
    /// Ticks by phase.
    pub cycles: Cycles,
    /// What the exits were about; `None` while details were off.
    pub details: Option<Rows>,
}

/// An exit that was among the slowest of its vCPU.
#[derive(Clone, Debug)]
pub struct SlowExit {
    /// When it was, in seconds since the recording began.
    pub at: f64,
    /// Its VM's name.
    pub vm: String,
    /// The exit.
    pub exit: Exit,
}

/// A recording, read.
#[derive(Clone, Debug)]
pub struct Series {
    /// One after the other, without gaps but where the meter began anew.
    pub steps: Vec<Step>,
    /// The sums of all.
    pub sum: Ledger,
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// What the exits were about, in all; `None` when details were off all the time.
    pub details: Option<Rows>,
    /// The slowest exits, the longest first.
    pub slow: Vec<SlowExit>,
    /// TSC frequency, when it is known.
    pub tsc_khz: Option<u32>,
    /// What the recording says about itself.
    pub about: BTreeMap<String, String>,
    /// The VMs in it: their names.
    pub vms: BTreeSet<String>,
    /// Moments that have names, in seconds since the recording began, in their order.
    pub marks: Vec<(f64, String)>,
    /// Where the meter began anew, in seconds since the recording began.
    pub breaks: Vec<f64>,
    /// How many snapshots it is of.
    pub snapshots: usize,
    /// How the recording ended.
    pub ending: Ending,
}

/// Why nothing can be drawn.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is no recording.
    #[error("{}: {error}", path.display())]
    NoRecording {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: read::Error,
    },
    /// One of its snapshots cannot be read.
    #[error("{}, snapshot {number}: {error}", path.display())]
    NoSnapshot {
        /// The file.
        path: PathBuf,
        /// Which one, from 1.
        number: usize,
        /// What is wrong with it.
        error: reader::Error,
    },
    /// Two of its snapshots do not follow each other.
    #[error("{}, snapshot {number}: {error}", path.display())]
    NoInterval {
        /// The file.
        path: PathBuf,
        /// The later one, from 1.
        number: usize,
        /// What is wrong.
        error: delta::Error,
    },
    /// There are not two snapshots.
    #[error(
        "{} has {found} of the two snapshots that an interval takes: record longer, or draw more \
         of it (--from, --to)", path.display()
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// How many there are.
        found: usize,
    },
    /// The meter began anew from each snapshot to the next.
    #[error(
        "the meter began anew between all snapshots of {}, so that there is nothing to draw: \
         record longer, or draw more of it (--from, --to)", .0.display()
    )]
    Torn(PathBuf),
    /// There is no such reason.
    #[error(transparent)]
    Selection(#[from] select::Error),
    /// The VM does not occur.
    #[error("{} has no VM that is called '{vm}' or belongs to process '{vm}'; {those}", path.display())]
    NoVm {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        vm: String,
        /// What there is.
        those: String,
    },
    /// Several VMs are called so at once.
    #[error("{}: {error}", path.display())]
    Several {
        /// The file.
        path: PathBuf,
        /// Which they are.
        error: NoVm,
    },
}

impl Series {
    /// Reads a part of a recording.
    ///
    /// # Errors
    ///
    /// When it is no recording, or has no such part.
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
        let mut before: Option<(f64, Report, Option<Moment>)> = None;
        let mut slow = SlowExits::default();
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
            let (time, torn) = clock.advance(&snapshot, taken.at);
            let earlier = before.take_if(|_| torn);
            if part.from.is_some_and(|from| time < from) || part.to.is_some_and(|to| time > to) {
                continue;
            }
            if torn {
                series.end_of_life(&mut slow, part, taken.names)?;
            }
            if earlier.is_some() {
                series.breaks.push(time);
                series.marks.push((time, ANEW.to_owned()));
                anew = true;
            }
            let mark = taken.mark.map(|name| (time, name.to_owned()));
            series.marks.extend(mark);
            let mut report = Report::new(&snapshot);
            taken.names.name(&mut report);
            let meant = part.meant(&report).map_err(|error| Error::Several {
                path: file(),
                error,
            })?;
            series.snapshots += 1;
            let tables = snapshot.has_tables().then(|| Moment::new(&snapshot));
            slow.add(&snapshot, time);
            slow.meant.extend(&meant);
            (series.tsc_khz, series.isa) = (report.host.tsc_khz, report.host.isa);
            for vm in &report.vms {
                let here = meant.contains(&vm.vm);
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
                    Some(between) => Some(part.details(&between, &meant)?),
                    None => None,
                };
                let step = Step {
                    from: *from,
                    to: time,
                    begins_anew: std::mem::take(&mut anew),
                    details,
                    ..Step::default()
                };
                series.add(step, delta, (part, &meant));
            }
            before = Some((time, report, tables));
        }
        series.end_of_life(&mut slow, part, reader.names())?;
        if let (Some(vm), 0) = (&part.vm, found) {
            let those = match others.into_iter().collect::<Vec<_>>() {
                none if none.is_empty() => "there is none in that part of it".to_owned(),
                names => format!("those in it are {}", ascii(&names.join(", "))),
            };
            let (path, vm) = (file(), vm.clone());
            return Err(Error::NoVm { path, vm, those });
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
            .sort_by_key(|one| (std::cmp::Reverse(one.exit.took), one.exit.tsc));
        let about = reader.about();
        series.about = about
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .collect();
        series.ending = reader.ending().cloned().unwrap_or(Ending::Cut);
        Ok(series)
    }

    fn add(&mut self, mut step: Step, delta: Report, (part, meant): Meant<'_>) {
        let vms = delta.vms.into_iter();
        let vms = vms.filter(|vm| meant.contains(&vm.vm)).map(|vm| vm.ledger);
        // What those that are gone still did belongs to no VM any more.
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

    /// Take the slow exits of a life of the meter that ends here.
    fn end_of_life(
        &mut self,
        slow: &mut SlowExits,
        part: &Part,
        names: &Book,
    ) -> Result<(), Error> {
        let SlowExits { seen, times, meant } = std::mem::take(slow);
        let Some(seen) = seen else { return Ok(()) };
        let code = part.code(seen.host.isa)?;
        let selection = Selection {
            vm: None,
            names: Some(names),
            code,
        };
        // There is no VM that could be missing.
        let Ok(slow) = Slow::new(&seen, &part.symbols, selection) else {
            return Ok(());
        };
        let vms = slow.vms.into_iter();
        for vm in vms.filter(|vm| meant.contains(&vm.vm)) {
            let exits = vm.slowest.into_iter().filter_map(|exit| {
                let at = moment(&times, exit.tsc)?;
                let vm = vm.vmm.label(&vm.name);
                Some(SlowExit { at, vm, exit })
            });
            self.slow.extend(exits);
        }
        Ok(())
    }

    /// Its beginning and its end, in seconds since that of the recording.
    pub fn range(&self) -> (f64, f64) {
        let ends = (self.steps.first(), self.steps.last());
        (
            ends.0.map_or(0.0, |step| step.from),
            ends.1.map_or(0.0, |step| step.to),
        )
    }

    /// The steps, taken together so that there are no more than so many.
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

    /// The reasons that occurred, the most frequent first.
    pub fn frequent(&self) -> Vec<(Label, u64)> {
        let rows = self.sum.reasons.iter().filter(|row| row.exits != 0);
        let mut reasons: Vec<_> = rows.map(|row| (row.label, row.exits)).collect();
        reasons.sort_by_key(|(label, exits)| (std::cmp::Reverse(*exits), label.key()));
        reasons
    }
}

/// A part, and its VMs.
type Meant<'a> = (&'a Part, &'a BTreeSet<u64>);

impl Part {
    /// Return the numbers of its VMs in a snapshot.
    fn meant(&self, report: &Report) -> Result<BTreeSet<u64>, NoVm> {
        let known = report.vms.iter().map(Vm::known);
        let Some(vm) = &self.vm else {
            return Ok(known.map(|vm| vm.vm).collect());
        };
        match names::find(vm, known) {
            // It may come later.
            Err(NoVm::None { .. }) => Ok(BTreeSet::new()),
            found => found,
        }
    }

    /// The code of the reason that was asked for.
    pub fn code(&self, isa: Isa) -> Result<Option<u32>, select::Error> {
        let reason = self.reason.as_deref();
        reason.map(|reason| select::code(isa, reason)).transpose()
    }

    /// What the exits were about between two snapshots.
    fn details(&self, between: &Moment, meant: &BTreeSet<u64>) -> Result<Rows, select::Error> {
        let code = self.code(between.host.isa)?;
        let of = code.map(|code| Of::new(Reason::Code(code)));
        let vcpus = between.vcpus.iter();
        let vcpus = vcpus.filter(|((vm, _), _)| meant.contains(vm));
        let parts: Vec<_> = vcpus
            .map(|(_, vcpu)| vcpu.rows.part(TABLE_DETAILS, of))
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

    /// How long it is, in seconds.
    pub fn seconds(&self) -> f64 {
        self.to - self.from
    }
}

/// The parts of steps between which the meter began anew.
pub fn runs(steps: &[Step]) -> impl Iterator<Item = &[Step]> {
    steps.chunk_by(|_, next| !next.begins_anew)
}

/// The slow exits of one life of the meter, each of which several snapshots may tell.
#[derive(Debug, Default)]
struct SlowExits {
    seen: Option<Seen>,
    /// TSC and time of each snapshot.
    times: Vec<(u64, f64)>,
    /// The VMs that are meant.
    meant: BTreeSet<u64>,
}

impl SlowExits {
    /// Take what a snapshot tells.
    fn add(&mut self, snapshot: &Snapshot<'_>, time: f64) {
        self.times.push((snapshot.now(), time));
        if !snapshot.has_tables() {
            return;
        }
        let new = Seen::new(snapshot, None);
        match &mut self.seen {
            Some(seen) => seen.follow(new),
            None => self.seen = Some(new),
        }
    }
}

/// Return the time at a TSC between those of two snapshots; `None` when it is before all of them.
pub fn moment(times: &[(u64, f64)], tsc: u64) -> Option<f64> {
    let behind = times.partition_point(|(at, _)| *at <= tsc);
    let (before, from) = *times.get(behind.checked_sub(1)?)?;
    let Some((after, to)) = times.get(behind) else {
        // While the last one was taken.
        return Some(from);
    };
    let share = (tsc - before) as f64 / (after - before).max(1) as f64;
    Some(from + share * (to - from))
}

/// The time of snapshots, in seconds since that of the first one.
///
/// It is that of their TSC, the moment that the numbers are of. Where the meter began anew it is
/// the recording's, as the TSC may be another one from there on.
#[derive(Clone, Copy, Debug)]
struct Clock {
    /// The first snapshot's time in the recording.
    begun: Duration,
    /// Of the latest snapshot: the meter's life, TSC, time in the recording, and in seconds.
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

    /// Takes the next snapshot; its time, and whether the meter began anew before it.
    fn advance(&mut self, snapshot: &Snapshot<'_>, at: Duration) -> (f64, bool) {
        let torn = snapshot.life() != self.life || snapshot.now() < self.tsc;
        let passed = match snapshot.tsc_khz() {
            Some(khz) if !torn => {
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
        (self.time, torn)
    }
}
