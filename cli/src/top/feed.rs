// SPDX-License-Identifier: GPL-2.0

//! Source of the screen's numbers: the device, a snapshot in a file, or a recording.
//!
//! Details of the device are turned on when the user first opens a view of them, and stay on as
//! long as the screen is shown. So they cost nothing until then.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use exitmeter_meter::reader::Snapshot;

use crate::{
    model::Report,
    names::NameBook,
    recording::read::{self, Reader},
    source,
    why::{
        device::{self, Device},
        tables::TableSet,
    },
};

/// Source of successive readings.
#[derive(Debug)]
pub struct Feed {
    path: PathBuf,
    /// Names of the VMs that run.
    names: NameBook,
    recording: Option<Recording>,
    /// Device with its details on.
    device: Option<Device>,
}

/// Contents of a snapshot.
#[derive(Clone, Debug)]
pub struct Reading {
    /// Exits and cycles.
    pub report: Report,
    /// Details of the exits, while details are on.
    pub tables: Option<TableSet>,
}

impl Reading {
    fn new(snapshot: &Snapshot<'_>) -> Self {
        Self {
            report: Report::new(snapshot),
            tables: snapshot.has_tables().then(|| TableSet::new(snapshot)),
        }
    }
}

/// The next reading.
#[derive(Debug)]
pub enum Next {
    /// A snapshot.
    Snapshot(Box<Reading>),
    /// End of the recording.
    Ended,
}

/// Reason why there is no reading.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no snapshot.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The recording cannot be read.
    #[error("{}: {error}", path.display())]
    Recording {
        /// Path of the file.
        path: PathBuf,
        /// Error of the reader.
        error: read::Error,
    },
    /// The recording has no snapshot.
    #[error("{} has no snapshot that could be shown: record again", .0.display())]
    Empty(PathBuf),
}

/// Recording that is being shown.
#[derive(Debug)]
struct Recording {
    snapshots: Vec<(Duration, Vec<u8>)>,
    /// Index of the snapshot that is shown.
    place: usize,
    /// Time that has been shown.
    clock: Duration,
    names: NameBook,
}

impl Feed {
    /// Open the device or a file.
    ///
    /// # Errors
    ///
    /// Returns an error if there is nothing to read.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // For the device, this takes one snapshot that is not used.
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
            names: NameBook::of(path),
            recording,
            device: None,
        })
    }

    /// Turn details on. Return true if they were off.
    ///
    /// # Errors
    ///
    /// Returns a sentence that says why they cannot be turned on, and what to do about it.
    pub fn turn_on(&mut self) -> Result<bool, String> {
        if self.recording.is_some() {
            let words = "the recording has none here: 'exitmeter record --why' records them";
            return Err(words.to_owned());
        }
        if self.device.is_some() {
            return Ok(false);
        }
        let device = Device::open(&self.path).map_err(|error| match error {
            device::Error::NoRight => {
                "this needs CAP_PERFMON: run this as root, or load the module with details=1"
                    .to_owned()
            }
            device::Error::Older(path) if path == Path::new(source::DEVICE) => {
                "the loaded module is too old to have them: load a newer one".to_owned()
            }
            device::Error::Older(_) => {
                "the snapshot has none: 'exitmeter why -- CMD' turns them on".to_owned()
            }
            error => error.to_string(),
        })?;
        self.device = Some(device);
        Ok(true)
    }

    /// Return the first reading.
    ///
    /// # Errors
    ///
    /// Returns an error if there is none.
    pub fn first(&mut self) -> Result<Reading, Error> {
        Ok(match &self.recording {
            None => self.read()?,
            Some(recording) => recording.reading(&self.path)?,
        })
    }

    /// Take a snapshot of the device or the file.
    fn read(&mut self) -> Result<Reading, source::Error> {
        let bytes = match &self.device {
            Some(device) => device.read()?,
            None => source::read(&self.path)?,
        };
        let snapshot = source::parse(&self.path, &bytes)?;
        self.names.read(&snapshot);
        self.names.forget(&snapshot);
        let mut reading = Reading::new(&snapshot);
        self.names.name(&mut reading.report);
        Ok(reading)
    }

    /// Return the reading after this much time.
    ///
    /// # Errors
    ///
    /// Returns an error if there is none now. There may be one later.
    pub fn next(&mut self, interval: Duration) -> Result<Next, Error> {
        let reading = match &mut self.recording {
            None => self.read()?,
            Some(recording) => {
                if !recording.advance(interval) {
                    return Ok(Next::Ended);
                }
                recording.reading(&self.path)?
            }
        };
        Ok(Next::Snapshot(Box::new(reading)))
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
            names: reader.names().clone(),
        })
    }

    /// Advance by this much time. Return false at the end.
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

    fn reading(&self, path: &Path) -> Result<Reading, source::Error> {
        let bytes = self.snapshots.get(self.place);
        let bytes = bytes.map_or(&[][..], |(_, bytes)| bytes);
        let mut reading = Reading::new(&source::parse(path, bytes)?);
        self.names.name(&mut reading.report);
        Ok(reading)
    }
}
