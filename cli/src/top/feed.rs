// SPDX-License-Identifier: GPL-2.0

//! Where the screen's numbers come from: the device, a snapshot in a file, or a recording.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    model::Report,
    recording::read::{self, Reader},
    source,
};

/// Gives a report each time.
#[derive(Debug)]
pub struct Feed {
    path: PathBuf,
    recording: Option<Recording>,
}

/// The next report.
#[derive(Debug)]
pub enum Next {
    /// Here it is.
    Snapshot(Box<Report>),
    /// There is none any more.
    Ended,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No snapshot.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The recording cannot be read.
    #[error("{}: {error}", path.display())]
    Recording {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: read::Error,
    },
    /// The recording has no snapshot.
    #[error("{} has no snapshot that could be shown: record again", .0.display())]
    Empty(PathBuf),
}

/// A recording that is being shown.
#[derive(Debug)]
struct Recording {
    snapshots: Vec<(Duration, Vec<u8>)>,
    /// The one that is shown.
    place: usize,
    /// How much of it has been.
    clock: Duration,
}

impl Feed {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// When there is nothing to read.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // Of the device this is a snapshot that nobody needs, once.
        let bytes = source::read(path)?;
        let recording = if read::is_recording(&bytes) {
            let file = || path.to_owned();
            let reader = Reader::new(&bytes).map_err(|error| Error::Recording {
                path: file(),
                error,
            })?;
            Some(Recording::new(reader).ok_or_else(|| Error::Empty(file()))?)
        } else {
            None
        };
        Ok(Self {
            path: path.to_owned(),
            recording,
        })
    }

    /// The report to begin with.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn first(&self) -> Result<Report, Error> {
        Ok(match &self.recording {
            None => source::report(&self.path)?,
            Some(recording) => recording.report(&self.path)?,
        })
    }

    /// The report after so much time.
    ///
    /// # Errors
    ///
    /// When there is none now; there may be one later.
    pub fn next(&mut self, interval: Duration) -> Result<Next, Error> {
        let report = match &mut self.recording {
            None => source::report(&self.path)?,
            Some(recording) => {
                if !recording.advance(interval) {
                    return Ok(Next::Ended);
                }
                recording.report(&self.path)?
            }
        };
        Ok(Next::Snapshot(Box::new(report)))
    }
}

impl Recording {
    fn new(mut reader: Reader<'_>) -> Option<Self> {
        let mut snapshots = Vec::new();
        while let Some(taken) = reader.next_snapshot() {
            snapshots.push((taken.at, taken.snapshot.to_vec()));
        }
        let clock = snapshots.first()?.0;
        Some(Self {
            snapshots,
            place: 0,
            clock,
        })
    }

    /// Goes on; `false` at the end.
    fn advance(&mut self, time: Duration) -> bool {
        if self.place + 1 >= self.snapshots.len() {
            return false;
        }
        self.clock += time;
        let later = self
            .snapshots
            .iter()
            .take_while(|(at, _)| *at <= self.clock);
        self.place = later.count().saturating_sub(1);
        true
    }

    fn report(&self, path: &Path) -> Result<Report, source::Error> {
        let bytes = self.snapshots.get(self.place);
        let bytes = bytes.map_or(&[][..], |(_, bytes)| bytes);
        Ok(Report::new(&source::parse(path, bytes)?))
    }
}
