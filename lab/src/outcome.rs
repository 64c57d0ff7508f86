// SPDX-License-Identifier: GPL-2.0

//! Results of runs: the outcome of a run, the errors that keep it from starting, and its usual limits.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

use crate::{
    file_error::FileError,
    image::ImageError,
    module::ModuleError,
    programs::ProgramsError,
    setup::SetupError,
    verdict::{Limits, RunEnd},
};

/// Limits of a run for which the caller sets no others.
pub const LIMITS: Limits = Limits {
    time: Duration::from_secs(900),
    silence: Duration::from_secs(180),
};

/// Outcome of a run.
#[derive(Debug)]
pub struct Outcome {
    /// End of the run.
    pub end: RunEnd,
    /// The script's standard output.
    pub stdout: Vec<u8>,
    /// The run's folder, with console.log, kernel.log, stdout.log, stderr.log and emulator.log.
    pub folder: PathBuf,
    /// The folder with the files that the script left in $OUT.
    pub out: PathBuf,
    /// The last lines of the console, and of the kernel log if it has the fault; empty after a verdict.
    pub tail: String,
    /// Time from the start of the emulator to the end.
    pub time: Duration,
}

impl Outcome {
    /// Return the last line about a run: its end, its time, and its folder.
    pub fn summary(&self) -> String {
        format!(
            "{} after {:.1} s; the logs are in {}",
            self.end,
            self.time.as_secs_f64(),
            self.folder.display()
        )
    }
}

/// Reason why a run could not start.
#[derive(Debug, Error)]
pub enum RunError {
    /// The set-up is incomplete.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The module could not be built.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The host's programs could not be built.
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    /// The images could not be made.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine cannot be emulated.
    #[error("{0}")]
    Machine(String),
    /// The host ended before it could be saved. [`run`](crate::run::run) returns the outcome instead.
    #[error("{}", .0.end)]
    Boot(Box<Outcome>),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] FileError),
}

impl RunError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::on(action, path)
    }
}
