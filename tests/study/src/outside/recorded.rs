// SPDX-License-Identifier: GPL-2.0

//! A recording, read: what happened between its marks.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter::{
    model::{Ledger, Report},
    recording::read::{Ending, Reader},
};
use exitmeter_meter::reader::Snapshot;

use crate::plan::Run;

/// What happened from one mark to the next.
pub struct Stage {
    /// What the mark says.
    pub name: String,
    /// Its beginning and end, in the host's seconds since the recording began.
    pub span: (f64, f64),
    /// Exits and ticks of all VMs in it.
    pub ledger: Ledger,
}

/// A recording.
pub struct Recorded {
    /// Of which run.
    pub run: Run,
    /// From mark to mark.
    pub stages: Vec<Stage>,
    /// When each snapshot was taken, in seconds, and how many exits there had been.
    pub growth: Vec<(f64, u64)>,
    /// What it says about itself.
    pub about: BTreeMap<String, String>,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it has its end.
    pub whole: bool,
}

impl Recorded {
    /// Reads one.
    pub fn read(run: Run, path: &Path) -> Result<Self> {
        let name = || path.display().to_string();
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", name()))?;
        let mut reader = Reader::new(&bytes).with_context(name)?;
        let mut clock: Option<u64> = None;
        let mut before: Option<(String, f64, Report)> = None;
        let (mut stages, mut growth) = (Vec::new(), Vec::new());
        while let Some(taken) = reader.next_snapshot() {
            let snapshot = Snapshot::parse(taken.snapshot).with_context(name)?;
            let first = *clock.get_or_insert(snapshot.now());
            let report = Report::new(&snapshot);
            let khz = report
                .host
                .tsc_khz
                .context("the TSC's frequency is not known")?;
            let time = (snapshot.now() - first) as f64 / (f64::from(khz) * 1000.0);
            let live = report.vms.iter().map(|vm| vm.ledger.exits).sum::<u64>();
            growth.push((time, live + report.departed.ledger.exits));
            let Some(mark) = taken.mark else { continue };
            if let Some((name, from, before)) = &before {
                let delta = report.since(before)?;
                let vms = delta.vms.into_iter().flat_map(|vm| vm.ledger.reasons);
                let rows = vms.chain(delta.departed.ledger.reasons);
                stages.push(Stage {
                    name: name.clone(),
                    span: (*from, time),
                    ledger: Ledger::of(rows),
                });
            }
            before = Some((mark.to_owned(), time, report));
        }
        ensure!(!stages.is_empty(), "{} has no marks", name());
        let about = reader.about();
        Ok(Self {
            run,
            stages,
            growth,
            about: about
                .map(|(name, text)| (name.to_owned(), text.to_owned()))
                .collect(),
            size: bytes.len() as u64,
            whole: matches!(reader.ending(), Some(Ending::Told(_))),
        })
    }

    /// The stage of a name.
    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// How many exits there had been at a moment, between two snapshots in proportion.
    pub fn exits_at(&self, time: f64) -> f64 {
        let after = self.growth.partition_point(|(at, _)| *at <= time);
        let point = |place: usize| {
            self.growth
                .get(place)
                .map(|(at, exits)| (*at, *exits as f64))
        };
        match (after.checked_sub(1).and_then(point), point(after)) {
            (Some((from, low)), Some((to, high))) => {
                low + (high - low) * (time - from) / (to - from)
            }
            (Some((_, exits)), None) => exits,
            (None, _) => 0.0,
        }
    }
}

impl Stage {
    /// How long it took, in the host's seconds.
    pub fn seconds(&self) -> f64 {
        self.span.1 - self.span.0
    }
}

/// The dates of the recordings: emulated hosts have their own calendar.
const DATES: &str = "dates.json";

/// Notes when a run was made.
pub fn note_date(folder: &Path, run: Run, date: SystemTime) -> Result<()> {
    let mut dates = dates(folder);
    let date = date
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    dates.insert(run.to_string(), calendar(date));
    let path = folder.join(DATES);
    fs::write(&path, serde_json::to_string_pretty(&dates)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

/// When runs were made, by their names.
pub fn dates(folder: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(folder.join(DATES)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// A date as 2026-11-24, of a time since 1970 in UTC.
fn calendar(since_1970: Duration) -> String {
    let (year, month, day) = lab::calendar::date(since_1970.as_secs() / 86400);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_dates() {
        for (days, date) in [
            (0, "1970-01-01"),
            (11_016, "2000-02-29"),
            (20_781, "2026-11-24"),
            (20_818, "2026-12-31"),
        ] {
            assert_eq!(calendar(Duration::from_secs(days * 86400 + 86399)), date);
        }
    }
}
