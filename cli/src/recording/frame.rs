// SPDX-License-Identifier: GPL-2.0

//! A frame of a recording: a head, and a deflated body.

use std::io::{Read as _, Write as _};

use flate2::{read::DeflateDecoder, write::DeflateEncoder, Compression, Crc};

/// Bytes of a head.
pub const HEAD_SIZE: usize = 24;

/// No body is larger: a snapshot of 65536 vCPUs with all rows takes 2 GB.
const LARGEST: u32 = i32::MAX as u32;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A snapshot, whole.
    Whole,
    /// A snapshot, as its difference from the one before.
    Difference,
    /// Lines of text about the recording.
    About,
    /// The last frame: one line of text on how it ended.
    End,
    /// Lines about VMs: their names.
    Names,
    /// One of a later version.
    Unknown(u32),
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Kind::Whole => 1,
            Kind::Difference => 2,
            Kind::About => 3,
            Kind::End => 4,
            Kind::Names => 5,
            Kind::Unknown(number) => number,
        }
    }

    fn from_number(number: u32) -> Self {
        match number {
            1 => Kind::Whole,
            2 => Kind::Difference,
            3 => Kind::About,
            4 => Kind::End,
            5 => Kind::Names,
            other => Kind::Unknown(other),
        }
    }
}

/// A frame, its body inflated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it holds.
    pub kind: Kind,
    /// When it was written, in nanoseconds since the recording was begun.
    pub at: u64,
    /// The body.
    pub body: Vec<u8>,
}

/// Why no frame can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// It ends before it should.
    Cut,
    /// Its checksum is wrong, or what it holds is not what it should be.
    Damaged,
}

impl Frame {
    /// The bytes of a frame; `None` for a body that is too large for one.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let size = u32::try_from(self.body.len()).ok()?;
        let mut deflated = DeflateEncoder::new(Vec::new(), Compression::default());
        let deflated = deflated
            .write_all(&self.body)
            .and_then(|()| deflated.finish())
            .ok()?;
        let length = u32::try_from(deflated.len()).ok()?;
        let mut bytes = Vec::with_capacity(HEAD_SIZE + deflated.len());
        for field in [self.kind.number(), length, size, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&self.at.to_le_bytes());
        bytes.extend_from_slice(&deflated);
        let checksum = checksum(&bytes);
        bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
        (size <= LARGEST).then_some(bytes)
    }

    /// The frame that bytes begin with, and what follows it; `None` at their end.
    pub fn read(bytes: &[u8]) -> Option<Result<(Self, &[u8]), Error>> {
        (!bytes.is_empty()).then(|| Self::split(bytes))
    }

    fn split(bytes: &[u8]) -> Result<(Self, &[u8]), Error> {
        let field = |offset: usize| {
            let field = bytes.get(offset..).and_then(|bytes| bytes.first_chunk());
            field.map(|bytes| u32::from_le_bytes(*bytes))
        };
        let head = || {
            let at = u64::from(field(20)?) << 32 | u64::from(field(16)?);
            Some((field(0)?, field(4)?, field(8)?, field(CHECKSUM)?, at))
        };
        let (kind, length, size, sum, at) = head().ok_or(Error::Cut)?;
        let end = HEAD_SIZE.saturating_add(length as usize);
        let (frame, rest) = bytes.split_at_checked(end).ok_or(Error::Cut)?;
        if checksum(frame) != sum || size > LARGEST {
            return Err(Error::Damaged);
        }
        // One byte more than it should have would be seen.
        let deflated = frame.get(HEAD_SIZE..).unwrap_or_default();
        let mut inflated = DeflateDecoder::new(deflated).take(u64::from(size) + 1);
        let mut body = Vec::new();
        inflated
            .read_to_end(&mut body)
            .ok()
            .filter(|read| *read == size as usize)
            .ok_or(Error::Damaged)?;
        let kind = Kind::from_number(kind);
        Ok((Self { kind, at, body }, rest))
    }
}

/// Where the checksum stands in a head.
const CHECKSUM: usize = 12;

/// CRC-32 of a frame without the checksum itself.
fn checksum(frame: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(frame.get(..CHECKSUM).unwrap_or_default());
    crc.update(frame.get(CHECKSUM + 4..).unwrap_or_default());
    crc.sum()
}
