// SPDX-License-Identifier: GPL-2.0

//! Writes a recording.

use std::{
    io::{self, ErrorKind, Write},
    time::Duration,
};

use super::{
    difference,
    frame::{Frame, Kind},
    nanoseconds, Header, HEADER_SIZE, MAGIC, MAJOR, MARK, MINOR,
};
use crate::names::Line;

/// A recording that is being written. Each frame is out when its call returns.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    before: Option<Vec<u8>>,
    bytes: u64,
    snapshots: u64,
}

impl<W: Write> Writer<W> {
    /// Begins one.
    ///
    /// # Errors
    ///
    /// When it cannot be written, here and below.
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

    /// Adds what there is to say about the recording: names without a colon, and texts
    /// without a line break.
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

    /// Adds a snapshot that was taken so long after the beginning.
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

    /// Names the moment of the snapshot that comes next, in one line.
    pub fn mark(&mut self, at: Duration, name: &str) -> io::Result<()> {
        let name = name.split('\n').collect::<Vec<_>>().join(" ");
        self.frame(Kind::About, at, format!("{MARK}: {name}\n").into_bytes())
    }

    /// Says what VMs are called that are in the snapshot that comes next.
    pub fn names(&mut self, at: Duration, names: &[Line]) -> io::Result<()> {
        let mut text = Vec::new();
        for line in names {
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
        }
        self.frame(Kind::Names, at, text)
    }

    /// Ends it, and says how.
    pub fn end(&mut self, at: Duration, how: &str) -> io::Result<()> {
        self.frame(Kind::End, at, how.as_bytes().to_vec())
    }

    /// How many snapshots were written.
    pub fn snapshots(&self) -> u64 {
        self.snapshots
    }

    /// How many bytes were written.
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
