// SPDX-License-Identifier: GPL-2.0

//! `make bench`: measures what metering costs per VM exit, for exitmeter and for other meters.
//!
//! This program has two sides. `driver` boots one emulated host with itself in it and prints the
//! results. `in_host` runs tiny guests with known numbers of exits, first without a meter and then
//! with each meter, and reads the TSC.
//!
//! There is no pass or fail. docs/performance.md says what a tick of an emulated host means.

mod driver;
mod exits;
mod in_host;
mod meters;
mod report;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, ValueEnum as _};
use lab::host::Host;

use crate::{exits::Exit, meters::Meter};

/// Measure what metering costs per VM exit on an emulated host
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Emulated host. On amd a tick is an instruction of the emulator
    #[arg(long, value_enum, default_value_t = Host::Intel)]
    host: Host,
    /// Write the numbers as JSON to FILE as well as to the run's folder
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Version or release of Debian's kernel [default: the newest of backports]
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    #[command(flatten)]
    plan: Plan,
    /// Measure in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    in_host: bool,
}

/// Meters and exits to measure, and the number of runs.
#[derive(Args, Clone, Debug)]
struct Plan {
    /// Runs of each measurement
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Exits of one run; its result is their mean
    #[arg(long, value_name = "N", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(100..=30_000))]
    count: u32,
    /// Measure only these meters
    #[arg(long, value_enum, value_delimiter = ',', value_name = "METER,...")]
    meters: Vec<Meter>,
    /// Measure only these exits
    #[arg(long, value_enum, value_delimiter = ',', value_name = "EXIT,...")]
    exits: Vec<Exit>,
}

impl Plan {
    /// Return the meters to measure.
    fn meters(&self) -> Vec<Meter> {
        match &self.meters[..] {
            [] => Meter::value_variants().to_vec(),
            some => some.to_vec(),
        }
    }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.in_host {
        return in_host::run(&arguments.plan);
    }
    driver::run(&arguments)
}
