// SPDX-License-Identifier: GPL-2.0

//! Commands that are run, and the exit statuses for how they end: those of env(1), nice(1) and
//! timeout(1).

use std::{
    ffi::{OsStr, OsString},
    io::{self, ErrorKind},
    os::unix::process::ExitStatusExt as _,
    process::{ExitCode, ExitStatus},
};

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

/// Return the status to exit with when a command was to be run, or none (`command` is empty). With
/// one, a failure is told here, and has a status that is not taken for the command's own.
///
/// # Errors
///
/// The failure, without a command.
pub fn exit_code(done: anyhow::Result<u8>, command: &[OsString]) -> anyhow::Result<ExitCode> {
    match done {
        Err(error) if !command.is_empty() => {
            eprintln!("exitmeter: {error:#}");
            let status = error.downcast_ref().map(Unrunnable::status);
            Ok(status.unwrap_or(FAILED).into())
        }
        done => done.map(ExitCode::from),
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
