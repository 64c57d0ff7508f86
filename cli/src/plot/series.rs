// SPDX-License-Identifier: GPL-2.0

//! What a recording tells over time: for each interval, the exits by reason and the ticks by
//! phase.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use exitmeter_meter::{reader, reader::Snapshot};

use crate::{
    model::{delta, Cycles, Label, Ledger, Report},
    recording::read::{self, Ending, Reader},
};

/// What tells reasons apart.
pub type Key = (&'static str, Option<u32>);

/// Which part of a recording.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Only the VM of this name, or of this process.
    pub vm: Option<String>,
    /// Only from so many seconds after its beginning on.
    pub from: Option<f64>,
    /// Only up to so many seconds after its beginning.
    pub to: Option<f64>,
}

/// What happened from one snapshot to the next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// Its beginning, in seconds since that of the recording.
    pub from: f64,
    /// Its end.
    pub to: f64,
    /// Exits by reason.
    pub exits: BTreeMap<Key, u64>,
    /// Ticks by phase.
    pub cycles: Cycles,
}

/// A recording, read.
#[derive(Clone, Debug)]
pub struct Series {
    /// One after the other, without gaps.
    pub steps: Vec<Step>,
    /// The sums of all.
    pub sum: Ledger,
    /// TSC frequency, when it is known.
    pub tsc_khz: Option<u32>,
    /// What the recording says about itself.
    pub about: BTreeMap<String, String>,
    /// The VMs in it: their names.
    pub vms: BTreeSet<String>,
    /// Moments that have names, in seconds since the recording began, in their order.
    pub marks: Vec<(f64, String)>,
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
            tsc_khz: None,
            about: BTreeMap::new(),
            vms: BTreeSet::new(),
            marks: Vec::new(),
            snapshots: 0,
            ending: Ending::Cut,
        };
        let mut clock = None;
        let mut before: Option<(f64, Report)> = None;
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
            let clock = clock.get_or_insert((snapshot.now(), taken.at));
            let time = seconds_since(*clock, &snapshot, taken.at);
            if part.from.is_some_and(|from| time < from) || part.to.is_some_and(|to| time > to) {
                continue;
            }
            let mark = taken.mark.map(|name| (time, name.to_owned()));
            series.marks.extend(mark);
            let report = Report::new(&snapshot);
            series.snapshots += 1;
            series.tsc_khz = report.host.tsc_khz;
            for vm in &report.vms {
                let here = part.has(&vm.name, vm.pid);
                found += usize::from(here);
                if here { &mut series.vms } else { &mut others }.insert(vm.name.clone());
            }
            if let Some((from, before)) = &before {
                let delta = report.since(before).map_err(|error| Error::NoInterval {
                    path: file(),
                    number,
                    error,
                })?;
                series.add(*from, time, delta, part);
            }
            before = Some((time, report));
        }
        if let (Some(vm), 0) = (&part.vm, found) {
            let those = match others.into_iter().collect::<Vec<_>>() {
                none if none.is_empty() => "there is none in that part of it".to_owned(),
                names => format!("those in it are {}", names.join(", ")),
            };
            let (path, vm) = (file(), vm.clone());
            return Err(Error::NoVm { path, vm, those });
        }
        if series.steps.is_empty() {
            let found = series.snapshots;
            return Err(Error::TooShort {
                path: file(),
                found,
            });
        }
        let about = reader.about();
        series.about = about
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .collect();
        series.ending = reader.ending().cloned().unwrap_or(Ending::Cut);
        Ok(series)
    }

    fn add(&mut self, from: f64, to: f64, delta: Report, part: &Part) {
        let vms = delta.vms.into_iter();
        let vms = vms
            .filter(|vm| part.has(&vm.name, vm.pid))
            .map(|vm| vm.ledger);
        // What those that are gone still did belongs to no VM any more.
        let gone = part.vm.is_none().then_some(delta.departed.ledger);
        let mut step = Step {
            from,
            to,
            ..Step::default()
        };
        for ledger in vms.chain(gone) {
            step.cycles += ledger.cycles;
            for row in ledger.reasons {
                *step.exits.entry(row.label.key()).or_default() += row.exits;
                self.sum.reasons.push(row);
            }
        }
        self.sum = Ledger::of(std::mem::take(&mut self.sum.reasons));
        self.steps.push(step);
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
                Some(bin) if place == here => bin.add(step),
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

impl Part {
    fn has(&self, name: &str, pid: u32) -> bool {
        let vm = self.vm.as_deref();
        vm.is_none_or(|vm| vm == name || vm == pid.to_string())
    }
}

impl Step {
    fn add(&mut self, next: &Self) {
        self.to = next.to;
        self.cycles += next.cycles;
        for (key, exits) in &next.exits {
            *self.exits.entry(*key).or_default() += exits;
        }
    }

    /// How long it is, in seconds.
    pub fn seconds(&self) -> f64 {
        self.to - self.from
    }
}

/// The time from a first snapshot, of which TSC and time in the recording are known, to
/// another one.
fn seconds_since((tsc, at): (u64, Duration), snapshot: &Snapshot<'_>, now: Duration) -> f64 {
    match snapshot.tsc_khz() {
        // The moment that the numbers are of, to the tick.
        Some(khz) => snapshot.now().saturating_sub(tsc) as f64 / (f64::from(khz) * 1000.0),
        None => now.saturating_sub(at).as_secs_f64(),
    }
}
