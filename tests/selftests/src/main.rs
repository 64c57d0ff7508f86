// SPDX-License-Identifier: GPL-2.0

//! `make soak-selftests`: runs KVM's own selftests on emulated hosts, without exitmeter and with it.
//!
//! This program has two sides. `driver` boots hosts with itself and the tests in them, compares the verdict of each test
//! without and with the module, and writes docs/selftests.md. `in_host` runs the tests one by one, and after each compares
//! the meter with the kernel's own histogram.

mod allowance;
mod document;
mod driver;
mod environment;
mod in_host;
mod reaper;
mod verdict;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use lab::host::Host;

/// Run KVM's own selftests on emulated hosts, without exitmeter and with it, and compare the verdicts
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Run on this host only [default: both, side by side]
    #[arg(long, value_enum)]
    host: Option<Host>,
    /// Version or release of Debian's kernel [default: the newest of backports]
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    /// CPUs of the hosts [default: 1 on Intel, 2 on AMD]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Repetitions of a test, with and without the module, while its verdicts differ
    #[arg(long, value_name = "N", default_value_t = 10)]
    repeat: usize,
    /// Write the tables to FILE
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Run only tests whose names contain one of these words
    words: Vec<String>,
    /// Run the named tests in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    in_host: bool,
    /// With --in-host: load the module.
    #[arg(long, hide = true)]
    metered: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.in_host {
        return in_host::run(arguments.metered, &arguments.words);
    }
    driver::run(&arguments)
}
