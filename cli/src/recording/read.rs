// SPDX-License-Identifier: GPL-2.0

//! Reader of recordings.

use std::time::Duration;

use super::{
    difference,
    frame::{self, Frame, Kind},
    Header, HEADER_SIZE, MAGIC, MAJOR, MARK,
};
use crate::names::NameBook;

/// Reason why this reader does not understand a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file does not begin as a recording does.
    #[error("this is not a recording of exitmeter: make one with `exitmeter record`")]
    Magic,
    /// The file has another layout.
    #[error(
        "the recording has version {major}.{minor}, this tool reads version {MAJOR}: \
         use the tool that recorded it"
    )]
    Version {
        /// Major version of the file.
        major: u16,
        /// Minor version of the file.
        minor: u16,
    },
    /// The header is cut off.
    #[error("the recording is cut off in its header: record again")]
    Header,
}

/// End of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The recording ended properly. The text says why.
    Complete(String),
    /// The recording was cut off.
    Cut,
    /// The rest of the file is damaged.
    Damaged,
}

/// A snapshot of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedSnapshot<'a> {
    /// Time since the recording began.
    pub at: Duration,
    /// Name of this moment, if it has one.
    pub mark: Option<&'a str>,
    /// Names of the VMs in this snapshot and those before.
    pub names: &'a NameBook,
    /// Bytes of the snapshot.
    pub snapshot: &'a [u8],
}

/// Reader of a recording, from beginning to end.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    /// Header of the recording.
    pub header: Header,
    rest: &'a [u8],
    about: Vec<(String, String)>,
    snapshot: Option<Vec<u8>>,
    mark: Option<String>,
    names: NameBook,
    ending: Option<Ending>,
}

/// Return true if a file begins like a recording.
pub fn is_recording(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// Return the bytes of a field at offset `at`, or `None` past the end.
fn field<const SIZE: usize>(bytes: &[u8], at: usize) -> Option<[u8; SIZE]> {
    bytes.get(at..)?.first_chunk().copied()
}

impl<'a> Reader<'a> {
    /// Begin to read a recording.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not a recording of this major version. It says what is
    /// wrong.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Error> {
        if !is_recording(bytes) {
            return Err(Error::Magic);
        }
        let u16_at = |at| field(bytes, at).map(u16::from_le_bytes);
        let u32_at = |at| field(bytes, at).map(u32::from_le_bytes);
        let u64_at = |at| field(bytes, at).map(u64::from_le_bytes);
        let (Some(major), Some(minor)) = (u16_at(8), u16_at(10)) else {
            return Err(Error::Header);
        };
        if major != MAJOR {
            return Err(Error::Version { major, minor });
        }
        let header = || {
            let size = usize::try_from(u32_at(12)?).ok()?;
            let rest = bytes.get(size..).filter(|_| size >= HEADER_SIZE)?;
            let begun = Duration::from_nanos(u64_at(16)?);
            let interval = Duration::from_nanos(u64_at(24)?);
            Some((Header { begun, interval }, rest))
        };
        let (header, rest) = header().ok_or(Error::Header)?;
        let mut reader = Self {
            header,
            rest,
            about: Vec::new(),
            snapshot: None,
            mark: None,
            names: NameBook::default(),
            ending: None,
        };
        // The lines about the recording stand before the first snapshot.
        while let Some(Ok((frame, rest))) = Frame::read(reader.rest) {
            if frame.kind != Kind::About {
                break;
            }
            reader.rest = rest;
            reader.read_about(&frame.body);
        }
        Ok(reader)
    }

    /// Return the lines about the recording, as names and values.
    pub fn about(&self) -> impl Iterator<Item = (&str, &str)> {
        self.about
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Return the next snapshot, or `None` behind the last one that can be read.
    pub fn next_snapshot(&mut self) -> Option<RecordedSnapshot<'_>> {
        // Drop the mark of the snapshot that was returned last. A mark before the first snapshot
        // stays.
        if self.snapshot.is_some() {
            self.mark = None;
        }
        let at = loop {
            let frame = self.next_frame()?;
            let before = self.snapshot.take();
            self.snapshot = match frame.kind {
                Kind::Whole => Some(frame.body),
                Kind::Difference => {
                    before.and_then(|before| difference::apply(&before, &frame.body))
                }
                Kind::About | Kind::End | Kind::Names | Kind::Unknown(_) => {
                    self.snapshot = before;
                    self.read_metadata(&frame);
                    continue;
                }
            };
            if self.snapshot.is_none() {
                self.stop(Ending::Damaged);
            }
            break Duration::from_nanos(frame.at);
        };
        let snapshot = self.snapshot.as_deref()?;
        let mark = self.mark.as_deref();
        let names = &self.names;
        Some(RecordedSnapshot {
            at,
            mark,
            names,
            snapshot,
        })
    }

    /// Return the names of the VMs in the snapshots so far.
    pub fn names(&self) -> &NameBook {
        &self.names
    }

    /// Return how the recording ended, once [`Self::next_snapshot`] has returned the last snapshot.
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    fn next_frame(&mut self) -> Option<Frame> {
        if self.ending.is_some() {
            return None;
        }
        let ending = match Frame::read(self.rest) {
            Some(Ok((frame, rest))) => {
                self.rest = rest;
                return Some(frame);
            }
            // The frame that marks the end is missing.
            None | Some(Err(frame::Error::Cut)) => Ending::Cut,
            Some(Err(frame::Error::Damaged)) => Ending::Damaged,
        };
        self.stop(ending);
        None
    }

    fn read_metadata(&mut self, frame: &Frame) {
        match frame.kind {
            Kind::About => self.read_about(&frame.body),
            Kind::Names => self.read_names(&frame.body),
            Kind::End => {
                let how = String::from_utf8_lossy(&frame.body).into_owned();
                self.stop(Ending::Complete(how));
            }
            _ => {}
        }
    }

    /// Read the names of VMs. Skip lines of a later version that cannot be read.
    fn read_names(&mut self, text: &[u8]) {
        let lines = text.split(|byte| *byte == b'\n');
        for line in lines.filter_map(|line| serde_json::from_slice(line).ok()) {
            self.names.add(line);
        }
    }

    fn stop(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
    }

    fn read_about(&mut self, text: &[u8]) {
        let text = String::from_utf8_lossy(text);
        for (name, value) in text.lines().filter_map(|line| line.split_once(": ")) {
            match name {
                MARK => self.mark = Some(value.to_owned()),
                name => self.about.push((name.to_owned(), value.to_owned())),
            }
        }
    }
}
