// SPDX-License-Identifier: GPL-2.0

//! Reads a recording.

use std::time::Duration;

use super::{
    difference,
    frame::{self, Frame, Kind},
    Header, HEADER_SIZE, MAGIC, MAJOR, MARK,
};
use crate::names::Book;

/// Why bytes are not a recording that this reader understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It does not begin as a recording does.
    #[error("this is not a recording of exitmeter: make one with `exitmeter record`")]
    Magic,
    /// Its layout is another one.
    #[error(
        "the recording has version {major}.{minor}, this tool reads version {MAJOR}: \
         use the tool that recorded it"
    )]
    Version {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// Its header is not whole.
    #[error("the recording is cut off in its header: record again")]
    Header,
}

/// How a recording ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As it should, with a word on why.
    Told(String),
    /// It was cut off.
    Cut,
    /// What follows cannot be read.
    Damaged,
}

/// A snapshot of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken<'a> {
    /// How long after the beginning.
    pub at: Duration,
    /// What this moment is called, if it has a name.
    pub mark: Option<&'a str>,
    /// What the VMs are called that were in the snapshots up to it.
    pub names: &'a Book,
    /// Its bytes.
    pub snapshot: &'a [u8],
}

/// A recording, read from its beginning to its end.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    /// What its header says.
    pub header: Header,
    rest: &'a [u8],
    about: Vec<(String, String)>,
    snapshot: Option<Vec<u8>>,
    mark: Option<String>,
    names: Book,
    ending: Option<Ending>,
}

/// Whether a file is a recording, from what it begins with.
pub fn is_recording(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

impl<'a> Reader<'a> {
    /// Begins to read one.
    ///
    /// # Errors
    ///
    /// Says what is wrong with bytes that are no recording of this major version.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Error> {
        if !is_recording(bytes) {
            return Err(Error::Magic);
        }
        let u16_at = |at| {
            bytes
                .get(at..)?
                .first_chunk()
                .copied()
                .map(u16::from_le_bytes)
        };
        let u32_at = |at| {
            bytes
                .get(at..)?
                .first_chunk()
                .copied()
                .map(u32::from_le_bytes)
        };
        let u64_at = |at| {
            bytes
                .get(at..)?
                .first_chunk()
                .copied()
                .map(u64::from_le_bytes)
        };
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
            names: Book::default(),
            ending: None,
        };
        // What is said about it stands before the first snapshot.
        while let Some(Ok((frame, rest))) = Frame::read(reader.rest) {
            if frame.kind != Kind::About {
                break;
            }
            reader.rest = rest;
            reader.note(&frame.body);
        }
        Ok(reader)
    }

    /// What the recording says about itself: names and texts.
    pub fn about(&self) -> impl Iterator<Item = (&str, &str)> {
        self.about
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The next snapshot; `None` behind the last that can be read.
    pub fn next_snapshot(&mut self) -> Option<Taken<'_>> {
        // The one of the last snapshot has been told; those that stand before the first are known.
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
                    self.other(&frame);
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
        Some(Taken {
            at,
            mark,
            names,
            snapshot,
        })
    }

    /// What the VMs are called that were in the snapshots up to here.
    pub fn names(&self) -> &Book {
        &self.names
    }

    /// How it ended, once [`Self::next_snapshot`] has given the last.
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
            // It lacks the frame that tells its end.
            None | Some(Err(frame::Error::Cut)) => Ending::Cut,
            Some(Err(frame::Error::Damaged)) => Ending::Damaged,
        };
        self.stop(ending);
        None
    }

    fn other(&mut self, frame: &Frame) {
        match frame.kind {
            Kind::About => self.note(&frame.body),
            Kind::Names => self.called(&frame.body),
            Kind::End => {
                let how = String::from_utf8_lossy(&frame.body).into_owned();
                self.stop(Ending::Told(how));
            }
            _ => {}
        }
    }

    /// Takes in what VMs are called. A line of a later version that cannot be read is none.
    fn called(&mut self, text: &[u8]) {
        let lines = text.split(|byte| *byte == b'\n');
        for line in lines.filter_map(|line| serde_json::from_slice(line).ok()) {
            self.names.note(line);
        }
    }

    fn stop(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
    }

    fn note(&mut self, text: &[u8]) {
        let text = String::from_utf8_lossy(text);
        for (name, value) in text.lines().filter_map(|line| line.split_once(": ")) {
            match name {
                MARK => self.mark = Some(value.to_owned()),
                name => self.about.push((name.to_owned(), value.to_owned())),
            }
        }
    }
}
