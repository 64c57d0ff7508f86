// SPDX-License-Identifier: GPL-2.0

//! The command line: which commands there are. What each takes, and what it does, is in its
//! own room.

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
    output::{Output, When},
    plot, reasons, record, report, slow, stat, verify, why,
};

const STATUSES: &str = "\
Exit status:
  0  it printed what was asked for, or as much of it as was read
  1  there was nothing to read: no module, no right to open, no meter in this
     guest, or a damaged snapshot; one sentence on the standard error says which
  2  the command line was wrong";

/// Shows where the time of virtual machines goes: every VM exit by its reason, with what
/// it cost, as the kernel module exitmeter metered it.
#[derive(Debug, Parser)]
#[command(version, after_help = STATUSES)]
pub struct Args {
    /// When to print in colours: auto is on a terminal, unless NO_COLOR is set.
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        value_enum,
        default_value_t,
        hide_possible_values = true
    )]
    color: When,
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

/// All of the command line, for those who describe it.
pub fn command() -> clap::Command {
    <Args as CommandFactory>::command()
}

impl Args {
    /// Does what was asked for; the status to exit with.
    ///
    /// # Errors
    ///
    /// One sentence that names what is missing and the remedy.
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
            Command::Completions(args) => args.run(out)?,
            Command::Man(args) => args.run()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }
}
