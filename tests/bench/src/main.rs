// SPDX-License-Identifier: GPL-2.0

//! `make bench`: what metering costs per VM exit, exitmeter beside its peers.
//!
//! One program with two sides. Outside, it boots one emulated host with itself in it and
//! prints what the other side measured. Inside, it runs tiny guests of known exits, with
//! no meter and then with each meter, and reads the TSC.
//!
//! It judges nothing: what a tick of an emulated host means is in docs/performance.md.

mod exits;
mod inside;
mod meters;
mod outside;
mod report;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, ValueEnum as _};
use lab::host::Host;

use crate::{exits::Exit, meters::Meter};

/// Measures what metering costs per VM exit on an emulated host.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The host. On amd the emulator counts instructions as ticks
    #[arg(long, value_enum, default_value_t = Host::Intel)]
    host: Host,
    /// Where the numbers go as JSON, besides the run's folder
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Debian's kernel, a version or release; the newest of backports if not given
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    #[command(flatten)]
    plan: Plan,
    /// The side inside: measure in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    inside: bool,
}

/// What is measured, and how often.
#[derive(Args, Clone, Debug)]
struct Plan {
    /// How often each number is taken
    #[arg(long, value_name = "N", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How many exits a number is the mean of
    #[arg(long, value_name = "N", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(100..=30_000))]
    count: u32,
    /// Only these meters
    #[arg(long, value_enum, value_delimiter = ',', value_name = "METER,...")]
    meters: Vec<Meter>,
    /// Only these exits
    #[arg(long, value_enum, value_delimiter = ',', value_name = "EXIT,...")]
    exits: Vec<Exit>,
}

impl Plan {
    /// The meters to measure.
    fn meters(&self) -> Vec<Meter> {
        match &self.meters[..] {
            [] => Meter::value_variants().to_vec(),
            some => some.to_vec(),
        }
    }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.inside {
        return inside::run(&arguments.plan);
    }
    outside::run(&arguments)
}
