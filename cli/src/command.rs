// SPDX-License-Identifier: GPL-2.0

//! Child commands, and exit statuses for how they end: those of env(1), nice(1) and timeout(1).

use std::{
    ffi::{OsStr, OsString},
    io::{self, ErrorKind},
    os::unix::process::ExitStatusExt as _,
    process::{ExitCode, ExitStatus},
};

/// Exit status if the tool itself fails, though it was told to run a command.
pub const FAILED: u8 = 125;

/// A program that cannot be run.
#[derive(Debug, thiserror::Error)]
#[error("cannot run {}: {error}", program.to_string_lossy())]
pub struct Unrunnable {
    program: OsString,
    error: io::Error,
}

impl Unrunnable {
    /// Create the error for `program`.
    pub fn new(program: &OsStr, error: io::Error) -> Self {
        let program = program.to_owned();
        Self { program, error }
    }

    /// Return the exit status: 127 if there is no such program, else 126.
    pub fn status(&self) -> u8 {
        match self.error.kind() {
            ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}

/// Return the tool's exit status. `command` is the child command that the tool was told to run, or
/// empty. With a command, a failure is printed here and gets a status that is not taken for the
/// command's own.
///
/// # Errors
///
/// Returns the failure if `command` is empty.
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

/// Return the exit status for a command that ended: its own, or 128 + N after signal N.
pub fn status(ended: ExitStatus) -> u8 {
    let signal = || ended.signal().map(|signal| signal | 128);
    let status = ended.code().or_else(signal);
    status
        .and_then(|status| u8::try_from(status).ok())
        .unwrap_or(FAILED)
}
