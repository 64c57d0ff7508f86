// SPDX-License-Identifier: GPL-2.0

//! Commands in the Debian root.

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::CommandExt as _,
    path::Path,
    process::Command,
};

use rustix::process::{set_parent_process_death_signal, Signal};

use crate::paths::repository;

/// Description of a command that runs in a root. scripts/in-root.sh lists the files that it sees there.
///
/// To end the command, kill its process with SIGKILL: all of its children die with it. They also die with the thread that
/// started the command, and so with a lab that a signal ends.
#[derive(Clone, Debug)]
pub struct InRoot {
    arguments: Vec<OsString>,
}

/// Start the description of a command in `root`, a path from [`super::prepare`].
pub fn in_root(root: &Path) -> InRoot {
    InRoot {
        arguments: vec![root.into()],
    }
}

impl InRoot {
    /// Show the file or folder `source` in the root at `target`, writable. `source` must not contain a colon.
    #[must_use]
    pub fn bind(mut self, source: impl AsRef<Path>, target: impl AsRef<Path>) -> Self {
        let mut bind = source.as_ref().as_os_str().to_owned();
        bind.push(":");
        bind.push(target.as_ref());
        self.arguments.extend(["--bind".into(), bind]);
        self
    }

    /// Start the command in the folder `directory` of the root, instead of in `/`.
    #[must_use]
    pub fn chdir(mut self, directory: impl AsRef<Path>) -> Self {
        self.arguments
            .extend(["--chdir".into(), directory.as_ref().into()]);
        self
    }

    /// Return the command, to which the caller adds its arguments.
    ///
    /// Only TERM and the proxies of the environment reach the command. Set other variables with `env` as the program.
    pub fn command(self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(repository().join("scripts/in-root.sh"));
        command.args(self.arguments).arg("--").arg(program);
        // SAFETY: Makes one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        command
    }
}
