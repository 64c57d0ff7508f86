// SPDX-License-Identifier: GPL-2.0

//! `exitmeter completions`: completion scripts for shells.

use clap_complete::Shell;

use crate::output::Output;

/// Print a script that completes commands and options in a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
make install installs the scripts of bash, zsh and fish.

Examples:
  source <(exitmeter completions bash)
  exitmeter completions fish > ~/.config/fish/completions/exitmeter.fish")]
pub struct Args {
    /// Shell to print the script for.
    #[arg(value_enum)]
    shell: Shell,
}

impl Args {
    /// Print the completion script of `command`.
    ///
    /// # Errors
    ///
    /// Returns an error if the output cannot be written.
    pub fn run(self, mut command: clap::Command, out: &mut Output) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "exitmeter", &mut script);
        out.print(&String::from_utf8(script)?)?;
        Ok(())
    }
}
