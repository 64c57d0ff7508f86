// SPDX-License-Identifier: GPL-2.0

//! `exitmeter completions`: what a shell needs to complete commands and options.

use clap_complete::Shell;

use crate::{args, output::Output};

/// Prints a script by which a shell completes commands and options.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
make install puts those of bash, zsh and fish where they are looked for.

Examples:
  source <(exitmeter completions bash)
  exitmeter completions fish > ~/.config/fish/completions/exitmeter.fish")]
pub struct Args {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

impl Args {
    /// Prints the script.
    ///
    /// # Errors
    ///
    /// When there is nowhere to print.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut args::command(), "exitmeter", &mut script);
        out.print(&String::from_utf8(script)?)?;
        Ok(())
    }
}
