// SPDX-License-Identifier: GPL-2.0

//! A command for `exitmeter record`, `why` and `slow` to run while a case does its work.
//!
//! The tool takes its first snapshot before it runs the command. Work that a case does earlier may be
//! missing from the tool's numbers, so the case first waits for the command to start.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};

/// Exit status of the command.
pub const STATUS: i32 = 7;

/// A command that runs until [`HeldCommand::end`].
pub struct HeldCommand {
    begun: PathBuf,
    ended: PathBuf,
}

impl HeldCommand {
    /// Prepare a command; `name` distinguishes commands that run at the same time.
    pub fn new(name: &str) -> Result<Self> {
        let file = |suffix| PathBuf::from(format!("/tmp/held-command.{name}.{suffix}"));
        let command = Self {
            begun: file("begun"),
            ended: file("ended"),
        };
        for path in [&command.begun, &command.ended] {
            remove(path)?;
        }
        Ok(command)
    }

    /// Return the program and arguments of the command.
    pub fn words(&self) -> [String; 3] {
        let Self { begun, ended } = self;
        let script = format!(
            ": >{}; until [ -e {} ]; do sleep 0.02; done; exit {STATUS}",
            begun.display(),
            ended.display()
        );
        ["sh".to_owned(), "-c".to_owned(), script]
    }

    /// Wait until the tool has started the command.
    pub fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.begun.exists() {
            ensure!(Instant::now() < deadline, "the tool runs no command");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Let the command end.
    pub fn end(&self) -> Result<()> {
        fs::write(&self.ended, "").with_context(|| self.ended.display().to_string())
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}
