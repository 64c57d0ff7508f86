// SPDX-License-Identifier: GPL-2.0

//! `make soak-selftests`: KVM's own selftests on emulated hosts, without exitmeter and with it.
//!
//! One program with two sides. Outside, it boots hosts with itself and the tests in them, compares what came of each
//! test without and with the module, and writes docs/selftests.md. Inside, it runs the tests one by one, and holds
//! the meter against the kernel's own histogram after each.

mod allowance;
mod document;
mod inside;
mod outside;
mod reaper;
mod surroundings;
mod verdict;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use lab::host::Host;

/// Runs KVM's own selftests on emulated hosts, without exitmeter and with it; the verdicts must be the same.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Only on this host; on both, side by side, when not given
    #[arg(long, value_enum)]
    host: Option<Host>,
    /// Debian's kernel, a version or release; the newest of backports if not given
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    /// How many CPUs the hosts have; when not given 1 on Intel, 2 on AMD
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// How often a test is repeated, each way, when its verdicts differ
    #[arg(long, value_name = "N", default_value_t = 10)]
    repeat: usize,
    /// Where the table goes
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Only tests whose names hold one of these words
    words: Vec<String>,
    /// The side inside: run the tests of these names in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    inside: bool,
    /// The side inside: with the module.
    #[arg(long, hide = true)]
    metered: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.inside {
        return inside::run(arguments.metered, &arguments.words);
    }
    outside::run(&arguments)
}
