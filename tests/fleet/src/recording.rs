// SPDX-License-Identifier: GPL-2.0

//! Reads a recording into the sums of its snapshots.

use std::{fs, path::Path, time::Duration};

use anyhow::{ensure, Context as _, Result};
use exitmeter::{
    export::sums::{self, Detail, Rows, Sums},
    model::ReasonRow,
    recording::read::Reader,
};

/// Minimum distance of snapshots. Those in between are left out, as no scrape is that frequent.
const STEP: Duration = Duration::from_millis(100);

/// A recording of a host.
#[derive(Debug)]
pub struct Recording {
    /// Name of the file, without its extension.
    pub name: String,
    /// Times of the snapshots, and the sums of the host.
    moments: Vec<(Duration, Sums)>,
}

impl Recording {
    /// Read a recording.
    ///
    /// # Errors
    ///
    /// The file is not a recording, or has fewer than two snapshots.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut reader = Reader::new(&bytes)?;
        let mut moments: Vec<(Duration, Sums)> = Vec::new();
        let mut last = None;
        while let Some(taken) = reader.next_snapshot() {
            let sums = Sums::of(path, taken.snapshot, Detail::default())?;
            let is_near = moments.last().is_some_and(|(at, _)| taken.at < *at + STEP);
            last = Some((taken.at, sums));
            if !is_near {
                moments.extend(last.take());
            }
        }
        moments.extend(last);
        ensure!(
            moments.len() > 1,
            "{} has fewer than two snapshots",
            path.display()
        );
        let name = path.file_stem().unwrap_or_default();
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            moments,
        })
    }

    /// Return the duration of the recording.
    pub fn length(&self) -> Duration {
        self.moments.last().map_or(Duration::ZERO, |(at, _)| *at)
    }

    /// Return the sums of the host at a moment.
    pub fn at(&self, moment: Duration) -> &Sums {
        let after = self.moments.partition_point(|(at, _)| *at <= moment);
        // There are at least two moments.
        &self.moments[after.saturating_sub(1).min(self.moments.len() - 1)].1
    }

    /// Return the sums of the host at the end.
    pub fn end(&self) -> &Sums {
        self.at(self.length())
    }

    /// Return the exits at the end.
    pub fn exits(&self) -> u64 {
        self.end().all.values().map(|row| row.exits).sum()
    }
}

impl Recording {
    /// Return the steal: of the time in which the vCPUs wanted a CPU, the share in which they had none.
    pub fn steal(&self) -> f64 {
        let all = sums::cycles(&self.end().all);
        let wanted = all.guest + all.kernel + all.preempted;
        all.preempted as f64 / wanted.max(1) as f64
    }
}

/// Multiply rows by `count`, by repeated addition. Return no rows for 0.
pub fn times(rows: &Rows, count: u64) -> Rows {
    let of = |row: &ReasonRow| {
        let mut sum: Option<ReasonRow> = None;
        let mut power = *row;
        let mut left = count;
        while left != 0 {
            if left & 1 != 0 {
                match &mut sum {
                    Some(sum) => *sum += power,
                    None => sum = Some(power),
                }
            }
            power += power;
            left >>= 1;
        }
        sum
    };
    rows.iter()
        .filter_map(|(key, row)| Some((*key, of(row)?)))
        .collect()
}

/// Add `other` to `one`, row by row.
pub fn plus(mut one: Rows, other: &Rows) -> Rows {
    for (key, row) in other {
        one.entry(*key)
            .and_modify(|sum| *sum += *row)
            .or_insert(*row);
    }
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_equals_repeated_addition() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/study/amd-smp-nested.rec"
        );
        let recording = Recording::read(Path::new(path)).expect("a recording");
        let rows = &recording.end().all;
        let seven = (0..7).fold(Rows::new(), |sum, _| plus(sum, rows));
        for (key, row) in times(rows, 7) {
            assert_eq!(row.exits, seven[&key].exits);
            assert_eq!(row.cycles, seven[&key].cycles);
            assert_eq!(row.spread, seven[&key].spread);
        }
        assert!(times(rows, 0).is_empty());
        assert!(recording.exits() > 10_000);
    }
}
