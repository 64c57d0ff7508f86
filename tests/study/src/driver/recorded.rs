// SPDX-License-Identifier: GPL-2.0

//! Reads a recording, and splits it into stages at its marks.

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

/// Part of a recording from one mark to the next.
pub struct Stage {
    /// Name of the mark at its beginning.
    pub name: String,
    /// Beginning and end, in the host's seconds since the recording began.
    pub span: (f64, f64),
    /// Exits and ticks of all VMs in this stage.
    pub ledger: Ledger,
}

/// The recording of a run.
pub struct Recorded {
    /// Run that was recorded.
    pub run: Run,
    /// Stages, in order.
    pub stages: Vec<Stage>,
    /// Time of each snapshot, in seconds of the host, and the sum of exits up to then.
    pub growth: Vec<(f64, u64)>,
    /// Properties of the host, by name.
    pub about: BTreeMap<String, String>,
    /// Size of the file, in bytes.
    pub size: u64,
    /// True if the recording has its end record.
    pub is_complete: bool,
}

impl Recorded {
    /// Read a recording.
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
                .context("the TSC's frequency is unknown")?;
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
            is_complete: matches!(reader.ending(), Some(Ending::Complete(_))),
        })
    }

    /// Return the stage with a name.
    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// Return the sum of exits up to a moment, interpolated between two snapshots.
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
    /// Return the duration, in the host's seconds.
    pub fn seconds(&self) -> f64 {
        self.span.1 - self.span.0
    }
}

/// File with the dates of the recordings. Emulated hosts have a calendar of their own.
const DATES: &str = "dates.json";

/// Store the date of a run.
pub fn write_date(folder: &Path, run: Run, date: SystemTime) -> Result<()> {
    let mut dates = dates(folder);
    let date = date
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    dates.insert(run.to_string(), calendar(date));
    let path = folder.join(DATES);
    fs::write(&path, serde_json::to_string_pretty(&dates)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Return the dates of the runs, by their names.
pub fn dates(folder: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(folder.join(DATES)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Format the date of a time since 1970 in UTC, as 2026-11-24.
fn calendar(since_1970: Duration) -> String {
    let (year, month, day) = lab::calendar::date(since_1970.as_secs() / 86400);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_dates() {
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
