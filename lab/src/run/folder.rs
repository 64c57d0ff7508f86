// SPDX-License-Identifier: GPL-2.0

//! Folders of runs.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{calendar::date, host::Host, outcome::RunError, paths::repository};

/// Name of the console's file in the run's folder.
pub(crate) const CONSOLE: &str = "console.log";

/// Number of runs that are kept, the latest by name.
const KEPT: usize = 100;

/// Make a new folder, named after the time (UTC) and the host.
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

/// Remove the large files of a run's folder that can be made again.
pub(crate) fn tidy(folder: &Path) {
    for name in ["payload", "initramfs", "input"] {
        let _ = fs::remove_file(folder.join(name));
    }
}

/// Remove the oldest runs. Errors are ignored, since old runs only take space.
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

/// Format seconds since 1970 as YYYYMMDD-HHMMSS.
fn time(seconds: u64) -> String {
    let (day, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(day);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn times_are_formatted_as_dates() {
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
