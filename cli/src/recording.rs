// SPDX-License-Identifier: GPL-2.0

//! A recording: the snapshots of `/dev/exitmeter` over some time, in one file.
//!
//! `docs/interface.md` fixes the file byte by byte. It is a header and then frames, each with
//! its length and a checksum, written as they come. So a file that was cut off, since the disk
//! or the machine went, reads up to the last frame that is whole. [`write`](mod@write) writes
//! it, [`read`] reads it; neither looks into the snapshots, so a recording keeps what a later
//! version of them holds.
//!
//! A snapshot is mostly what the one before was. It is stored as what its numbers have grown
//! by (`difference`), deflated: a Linux guest that boots takes some 400 bytes a snapshot
//! instead of 15 000.

use std::time::Duration;

mod difference;
mod frame;
pub mod read;
pub mod write;

/// What each recording begins with.
pub const MAGIC: [u8; 8] = *b"ExitMRec";
/// Another one is another layout.
pub const MAJOR: u16 = 1;
/// Grows as kinds of frames and fields of the header are added.
pub const MINOR: u16 = 1;
/// What a recording says about its next snapshot: that it is of a moment with a name.
pub const MARK: &str = "mark";
/// Bytes of the header.
pub const HEADER_SIZE: usize = 40;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// When it was begun, since 1970, to the nanosecond.
    pub begun: Duration,
    /// The time that was asked for from one snapshot to the next.
    pub interval: Duration,
}

/// Nanoseconds, or as many as there is room for.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
