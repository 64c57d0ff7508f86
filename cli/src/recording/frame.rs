// SPDX-License-Identifier: GPL-2.0

//! A frame of a recording: a head and a deflated body.

use std::io::{Read as _, Write as _};

use flate2::{read::DeflateDecoder, write::DeflateEncoder, Compression, Crc};

/// Size of a head, in bytes.
pub const HEAD_SIZE: usize = 24;

/// Offset of the checksum in a head.
const CHECKSUM: usize = 12;

/// Largest body, in bytes. A snapshot of 65536 vCPUs with all rows takes 2 GB.
const MAX_BODY_SIZE: u32 = i32::MAX as u32;

/// Contents of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whole snapshot.
    Whole,
    /// Snapshot, as its difference from the one before.
    Difference,
    /// Lines of text about the recording.
    About,
    /// Last frame: one line of text on how the recording ended.
    End,
    /// Lines with the names of VMs.
    Names,
    /// Kind of a later version.
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

/// A frame with its body inflated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Contents of the body.
    pub kind: Kind,
    /// Time of writing, in nanoseconds since the recording began.
    pub at: u64,
    /// Body, inflated.
    pub body: Vec<u8>,
}

/// Reason why a frame cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The file ends within the frame.
    Cut,
    /// The checksum is wrong, or the body does not inflate to the size in the head.
    Damaged,
}

impl Frame {
    /// Encode the frame. Return `None` if its body is too large.
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
        (size <= MAX_BODY_SIZE).then_some(bytes)
    }

    /// Split the first frame off, and return it with the bytes behind it. Return `None` if there
    /// are no bytes.
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
        if checksum(frame) != sum || size > MAX_BODY_SIZE {
            return Err(Error::Damaged);
        }
        // Inflate up to one byte more than announced, so that a longer body is noticed.
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

/// Return the CRC-32 of a frame without the checksum itself.
fn checksum(frame: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(frame.get(..CHECKSUM).unwrap_or_default());
    crc.update(frame.get(CHECKSUM + 4..).unwrap_or_default());
    crc.sum()
}
