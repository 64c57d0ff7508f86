// SPDX-License-Identifier: GPL-2.0

//! Commands that are run, and the exit statuses for how they end: those of env(1), nice(1) and
//! timeout(1).

use std::{
    ffi::{OsStr, OsString},
    io::{self, ErrorKind},
    os::unix::process::ExitStatusExt as _,
    process::ExitStatus,
};

/// Whether a signal is ignored, as after nohup(1), or of a shell's background job. Who handles it all
/// the same hands it to commands as one that ends them.
pub fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let bit = u32::try_from(signal - 1)
        .ok()
        .and_then(|bit| 1_u64.checked_shl(bit));
    mask.zip(bit).is_some_and(|(mask, bit)| mask & bit != 0)
}

/// Exit status when the tool itself failed, though a command was to be run.
pub const FAILED: u8 = 125;

/// Why a command does not run.
#[derive(Debug, thiserror::Error)]
#[error("cannot run {}: {error}", program.to_string_lossy())]
pub struct Unrunnable {
    program: OsString,
    error: io::Error,
}

impl Unrunnable {
    /// Why this program does not.
    pub fn new(program: &OsStr, error: io::Error) -> Self {
        let program = program.to_owned();
        Self { program, error }
    }

    /// The exit status for it: 127 when there is no such program, else 126.
    pub fn status(&self) -> u8 {
        match self.error.kind() {
            ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}

/// The exit status that tells how a command ended: its own, or 128 + N after signal N.
pub fn status(ended: ExitStatus) -> u8 {
    let signal = || ended.signal().map(|signal| signal | 128);
    let status = ended.code().or_else(signal);
    status
        .and_then(|status| u8::try_from(status).ok())
        .unwrap_or(FAILED)
}
