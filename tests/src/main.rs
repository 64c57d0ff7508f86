// SPDX-License-Identifier: GPL-2.0

//! System tests of exitmeter: the cases that need KVM, on emulated hosts.
//!
//! The program has two sides: `driver` boots a host with a copy of itself, and collects what the copy reports; `in_host`
//! is the copy, which runs the cases.

mod cases;
mod driver;
mod in_host;
mod ktap;
mod soak;

use std::{env, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use system_tests::host;

/// Run the system tests of exitmeter on emulated hosts.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    run: driver::RunArgs,
    /// In the host, which must be an emulated one: run the cases.
    #[arg(long, hide = true)]
    in_host: bool,
    /// In the host: run this one case in this process.
    #[arg(long, hide = true, value_name = "NAME")]
    case: Option<String>,
    /// In a guest of an emulated host: run an L2 guest with this many loops.
    #[arg(long, hide = true, value_name = "COUNT")]
    nested: Option<u32>,
    /// In a guest of an emulated host: run an L2 guest whose CPUID faults.
    #[arg(long, hide = true)]
    faulting: bool,
    /// For a case: create and run VMs until killed.
    #[arg(long, hide = true, value_name = "SEED")]
    worker: Option<u64>,
    /// For a case: create a VM and leave it to a child process.
    #[arg(long, hide = true)]
    bequeath: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(case) = arguments.case {
        in_host::run_case(&case, &arguments.run.expect)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(count) = arguments.nested {
        cases::run_l2_guest(count)?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.faulting {
        cases::run_faulting_l2_guest()?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(seed) = arguments.worker {
        soak::worker(seed)?;
    }
    if arguments.bequeath {
        soak::bequeath()?;
        return Ok(ExitCode::SUCCESS);
    }
    let args = arguments.run;
    if arguments.in_host {
        let cases = match args.soak {
            true => {
                // Each case is a process of its own and inherits this.
                env::set_var(soak::PERCENT, args.percent.to_string());
                soak::all()
            }
            false => cases::all(),
        };
        return in_host::run(cases, &args.words, &args.expect, args.slow);
    }
    driver::run(&args)
}
