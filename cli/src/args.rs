// SPDX-License-Identifier: GPL-2.0

//! The command line. Each command has its own module, with its options and what it does.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

#[cfg(feature = "bpf")]
use crate::bpf;
#[cfg(feature = "export")]
use crate::export;
#[cfg(feature = "top")]
use crate::top;
use crate::{
    completions, guest, man,
    output::{ColorChoice, Output},
    plot, reasons, record, report, slow, stat, verify, why,
};

const STATUSES: &str = "\
Exit status:
  0  the output was printed, or its reader closed the pipe
  1  there was nothing to read: no module, no right to open, no meter in this
     guest, or a damaged snapshot; one sentence on the standard error says which
  2  the command line was wrong";

/// Show where the time of virtual machines goes: every VM exit by reason, with its cost, as metered
/// by the kernel module exitmeter.
#[derive(Debug, Parser)]
#[command(version, after_help = STATUSES)]
pub struct Args {
    /// When to use colours: auto (on a terminal, unless NO_COLOR is set), always or never.
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        value_enum,
        default_value_t,
        hide_possible_values = true
    )]
    color: ColorChoice,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Report(report::Args),
    Guest(guest::Args),
    Stat(stat::Args),
    Record(record::Args),
    Plot(plot::Args),
    #[cfg(feature = "top")]
    Top(top::Args),
    Why(why::Args),
    Slow(slow::Args),
    Verify(verify::Args),
    #[cfg(feature = "export")]
    Export(export::Args),
    #[cfg(feature = "bpf")]
    Bpf(bpf::Args),
    Reasons(reasons::Args),
    Completions(completions::Args),
    Man(man::Args),
}

impl Args {
    /// Run the command and return the exit status.
    ///
    /// # Errors
    ///
    /// Returns one sentence that names what is missing and the remedy.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let out = &mut Output::stdout(self.color);
        match self.command {
            Command::Report(args) => args.run(out)?,
            Command::Guest(args) => args.run(out)?,
            Command::Stat(args) => return Ok(args.run(out)),
            Command::Record(args) => return args.run(),
            Command::Plot(args) => args.run(out)?,
            #[cfg(feature = "top")]
            Command::Top(args) => return args.run(out),
            Command::Why(args) => return args.run(out),
            Command::Slow(args) => return args.run(out),
            Command::Verify(args) => return args.run(out),
            #[cfg(feature = "export")]
            Command::Export(args) => return args.run(),
            #[cfg(feature = "bpf")]
            Command::Bpf(args) => return args.run(out),
            Command::Reasons(args) => args.run(out)?,
            Command::Completions(args) => args.run(Args::command(), out)?,
            Command::Man(args) => args.run(Args::command())?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_accepts_the_definitions() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_readme_lists_the_commands() {
        let readme = include_str!("../../README.md");
        let (_, section) = readme.split_once("\n## The tool\n").expect("it");
        let (section, _) = section.split_once("\n## ").expect("its end");
        for command in Args::command().get_subcommands() {
            let name = command.get_name();
            let is_listed = section.contains(&format!("exitmeter {name} "));
            // `make install` calls these two.
            assert!(is_listed || matches!(name, "completions" | "man"), "{name}");
        }
    }
}
