// SPDX-License-Identifier: GPL-2.0

//! Writer of recordings.

use std::{
    io::{self, ErrorKind, Write},
    time::Duration,
};

use super::{
    difference,
    frame::{Frame, Kind},
    nanoseconds, Header, HEADER_SIZE, MAGIC, MAJOR, MARK, MINOR,
};
use crate::names::NameLine;

/// Writer of a recording. Each call returns once its frame is written.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    before: Option<Vec<u8>>,
    bytes: u64,
    snapshots: u64,
}

impl<W: Write> Writer<W> {
    /// Write the header of a recording.
    ///
    /// # Errors
    ///
    /// This and all methods below return an error if the file cannot be written.
    pub fn new(mut to: W, header: &Header) -> io::Result<Self> {
        let mut bytes = Vec::with_capacity(HEADER_SIZE);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&MAJOR.to_le_bytes());
        bytes.extend_from_slice(&MINOR.to_le_bytes());
        bytes.extend_from_slice(&(HEADER_SIZE as u32).to_le_bytes());
        bytes.extend_from_slice(&nanoseconds(header.begun).to_le_bytes());
        bytes.extend_from_slice(&nanoseconds(header.interval).to_le_bytes());
        bytes.resize(HEADER_SIZE, 0);
        to.write_all(&bytes)?;
        Ok(Self {
            to,
            before: None,
            bytes: HEADER_SIZE as u64,
            snapshots: 0,
        })
    }

    /// Add lines about the recording: names without a colon, and values. Line breaks in a value
    /// become spaces.
    pub fn about<'a>(
        &mut self,
        lines: impl IntoIterator<Item = (&'a str, String)>,
    ) -> io::Result<()> {
        let text = lines
            .into_iter()
            .fold(String::new(), |text, (name, value)| {
                let value = value.split('\n').collect::<Vec<_>>().join(" ");
                text + name + ": " + &value + "\n"
            });
        self.frame(Kind::About, Duration::ZERO, text.into_bytes())
    }

    /// Add a snapshot that was taken at `at`, counted from the beginning.
    pub fn snapshot(&mut self, at: Duration, snapshot: Vec<u8>) -> io::Result<()> {
        let difference = self.before.as_deref();
        match difference.and_then(|before| difference::encode(before, &snapshot)) {
            Some(difference) => self.frame(Kind::Difference, at, difference)?,
            None => self.frame(Kind::Whole, at, snapshot.clone())?,
        }
        self.before = Some(snapshot);
        self.snapshots += 1;
        Ok(())
    }

    /// Name the moment of the next snapshot, in one line.
    pub fn mark(&mut self, at: Duration, name: &str) -> io::Result<()> {
        let name = name.split('\n').collect::<Vec<_>>().join(" ");
        self.frame(Kind::About, at, format!("{MARK}: {name}\n").into_bytes())
    }

    /// Add the names of VMs that are in the next snapshot.
    pub fn names(&mut self, at: Duration, names: &[NameLine]) -> io::Result<()> {
        let mut text = Vec::new();
        for line in names {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
        }
        self.frame(Kind::Names, at, text)
    }

    /// Write the last frame, with the reason for the end.
    pub fn end(&mut self, at: Duration, how: &str) -> io::Result<()> {
        self.frame(Kind::End, at, how.as_bytes().to_vec())
    }

    /// Return the number of snapshots written.
    pub fn snapshots(&self) -> u64 {
        self.snapshots
    }

    /// Return the number of bytes written.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn frame(&mut self, kind: Kind, at: Duration, body: Vec<u8>) -> io::Result<()> {
        let at = nanoseconds(at);
        let bytes = Frame { kind, at, body }.bytes().ok_or_else(|| {
            io::Error::new(ErrorKind::FileTooLarge, "the snapshot is larger than 2 GiB")
        })?;
        self.to.write_all(&bytes)?;
        self.to.flush()?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}
