// SPDX-License-Identifier: GPL-2.0

//! The folder of a run.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::RunError;
use crate::calendar::date;
use crate::host::Host;
use crate::setup::repository;

/// How many runs are kept: the latest, by name.
const KEPT: usize = 100;

/// Makes a folder that no other run has, named for the time (UTC) and the host.
pub fn make(host: Host) -> Result<PathBuf, RunError> {
    let all = repository().join("target/lab");
    fs::create_dir_all(&all).map_err(RunError::io("make", &all))?;
    prune(&all);
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let time = time(seconds);
    for number in 0.. {
        let name = match number {
            0 => format!("{time}-{host}"),
            number => format!("{time}-{host}-{number}"),
        };
        let folder = all.join(name);
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(RunError::io("make", &folder)(error)),
        }
    }
    unreachable!("there are more numbers than runs in a second")
}

/// Removes the oldest runs. It is no error when that fails: they are only in the way.
fn prune(all: &Path) {
    let mut runs: Vec<PathBuf> = fs::read_dir(all)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    runs.sort();
    for run in &runs[..runs.len().saturating_sub(KEPT)] {
        let _ = fs::remove_dir_all(run);
    }
}

/// Seconds since 1970 as YYYYMMDD-HHMMSS.
fn time(seconds: u64) -> String {
    let (day, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(day);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "19700101-000000"),
            (951_782_399, "20000228-235959"),
            (951_782_400, "20000229-000000"),
            (1_795_521_600, "20261124-120000"),
            (4_107_542_400, "21000301-000000"),
        ] {
            assert_eq!(super::time(seconds), text);
        }
    }
}
