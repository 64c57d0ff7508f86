// SPDX-License-Identifier: GPL-2.0

//! Commands inside the Debian root.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;

use super::repository;

/// A command to be run inside a root; see scripts/in-root.sh for what it sees there.
///
/// To end it, kill its process with SIGKILL: everything inside dies with it.
#[derive(Clone, Debug)]
pub struct InRoot {
    arguments: Vec<OsString>,
}

/// Starts to describe a command inside `root`, which [`super::prepare`] gave.
pub fn in_root(root: &Path) -> InRoot {
    InRoot {
        arguments: vec![root.into()],
    }
}

impl InRoot {
    /// Shows the file or folder `source` inside at `target`, writable. `source` must not hold a colon.
    #[must_use]
    pub fn bind(mut self, source: impl AsRef<Path>, target: impl AsRef<Path>) -> Self {
        let mut bind = source.as_ref().as_os_str().to_owned();
        bind.push(":");
        bind.push(target.as_ref());
        self.arguments.extend(["--bind".into(), bind]);
        self
    }

    /// Starts the command in the folder `directory` of the root, instead of in `/`.
    #[must_use]
    pub fn chdir(mut self, directory: impl AsRef<Path>) -> Self {
        self.arguments
            .extend(["--chdir".into(), directory.as_ref().into()]);
        self
    }

    /// The command, ready for its arguments.
    ///
    /// Of the environment only TERM and the proxies reach it: set what it needs with `env` as the program.
    pub fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(repository().join("scripts/in-root.sh"));
        command.args(self.arguments).arg("--").arg(program);
        command
    }
}
