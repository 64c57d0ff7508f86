// SPDX-License-Identifier: GPL-2.0

//! A recording: snapshots of `/dev/exitmeter` over time, in one file.
//!
//! `docs/interface.md` defines the file byte by byte. It is a header and then frames, each with
//! its length and a checksum, written as they come. So a file that was cut off, because the disk
//! or the machine failed, is readable up to its last whole frame. [`write`](mod@write) writes a
//! recording and [`read`] reads it. Neither looks into the snapshots, so a recording keeps what a
//! later version of them holds.
//!
//! A snapshot is mostly equal to the one before. It is stored as the growth of its numbers
//! (`difference`), deflated: a Linux guest that boots takes some 400 bytes per snapshot instead
//! of 15 000.

use std::time::Duration;

mod difference;
mod frame;
pub mod read;
pub mod write;

/// First bytes of each recording.
pub const MAGIC: [u8; 8] = *b"ExitMRec";
/// Major version: another number is another layout.
pub const MAJOR: u16 = 1;
/// Minor version: grows as kinds of frames and fields of the header are added.
pub const MINOR: u16 = 1;
/// Key of the line that names the moment of the next snapshot.
pub const MARK: &str = "mark";
/// Size of the header, in bytes.
pub const HEADER_SIZE: usize = 40;

/// Header of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Start of the recording, in nanoseconds since 1970.
    pub begun: Duration,
    /// Interval that was asked for, from one snapshot to the next.
    pub interval: Duration,
}

/// Return the time in nanoseconds, limited to [`u64::MAX`].
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
