// SPDX-License-Identifier: GPL-2.0

//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use exitmeter_meter::reasons::Isa;
use serde::Serialize;

use crate::{guest, model::Report, reasons, report, source};

const STATUSES: &str = "\
Exit status:
  0  it printed what was asked for
  1  there was nothing to read: no module, no right to open, no meter in this
     guest, or a damaged snapshot; one sentence on the standard error says which
  2  the command line was wrong";

/// Shows where the time of virtual machines goes: every VM exit by its reason, with what
/// it cost, as the kernel module exitmeter metered it.
#[derive(Debug, Parser)]
#[command(version, after_help = STATUSES)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// On the host: where each VM's time went, and the table of its exits.
    #[command(after_help = "\
p50, p99 and max are the kernel cycles of single exits, from an exit to the next entry
without sleep, preemption and user space. Quantiles are within 20%, max is exact.

Examples:
  exitmeter report
  exitmeter report --json | jq '.vms[] | {name, exits}'
  cat /dev/exitmeter > before; exitmeter report --input before")]
    Report {
        /// Prints JSON instead of tables.
        #[arg(long)]
        json: bool,
        /// Reads a saved snapshot instead of the device.
        #[arg(long, value_name = "FILE", default_value = source::DEVICE)]
        input: PathBuf,
    },
    /// In a guest: the exits that this VM caused, read by CPUID.
    #[command(after_help = "\
Examples:
  exitmeter guest
  exitmeter guest --json | jq '.reasons[] | select(.exits > 1000)'")]
    Guest {
        /// Prints JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// The exit reasons that there are, with numbers and names.
    #[command(after_help = "\
Examples:
  exitmeter reasons --isa vmx")]
    Reasons {
        /// Only those of one vendor.
        #[arg(long, value_enum)]
        isa: Option<Vendor>,
        /// Prints JSON instead of tables.
        #[arg(long)]
        json: bool,
    },
}

/// Whose exit reasons.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Vendor {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

impl Vendor {
    fn isa(self) -> Isa {
        match self {
            Vendor::Vmx => Isa::Vmx,
            Vendor::Svm => Isa::Svm,
        }
    }
}

impl Args {
    /// Does what was asked for; the text to print.
    ///
    /// # Errors
    ///
    /// One sentence that names what is missing and the remedy.
    pub fn run(self) -> anyhow::Result<String> {
        match self.command {
            Command::Report { json, input } => {
                let bytes = source::read(&input)?;
                let report = Report::new(&source::parse(&input, &bytes)?);
                print(json, &report, report::text)
            }
            Command::Guest { json } => {
                let sweep = guest::Sweep::read(&mut guest::Instruction)?;
                print(json, &sweep, guest::Sweep::text)
            }
            Command::Reasons { isa, json } => {
                let isas = isa.map_or(vec![Isa::Vmx, Isa::Svm], |vendor| vec![vendor.isa()]);
                print(json, &reasons::list(&isas), |list| reasons::text(list))
            }
        }
    }
}

fn print<T: Serialize>(json: bool, data: &T, text: fn(&T) -> String) -> anyhow::Result<String> {
    if json {
        Ok(serde_json::to_string_pretty(data)? + "\n")
    } else {
        Ok(text(data))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }
}
