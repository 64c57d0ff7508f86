// SPDX-License-Identifier: GPL-2.0

//! System tests of exitmeter: what must be shown on real input, on emulated hosts.
//!
//! One program with two sides. Outside, it boots a host by `cargo lab run`, with itself in
//! it, and collects what the other side says. Inside, it runs the cases.

mod cases;
mod inside;
mod outside;
mod report;
mod soak;

use std::{env, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use system_tests::host;

/// Runs the system tests of exitmeter on emulated hosts.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    plan: outside::Plan,
    /// The side inside: run the cases in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    inside: bool,
    /// The side inside: run this one case in this process.
    #[arg(long, hide = true, value_name = "NAME")]
    case: Option<String>,
    /// In a guest of an emulated host: run a guest in it that loops so often.
    #[arg(long, hide = true, value_name = "COUNT")]
    nested: Option<u32>,
    /// In a guest of an emulated host: run a guest in it whose CPUID faults.
    #[arg(long, hide = true)]
    faulting: bool,
    /// For a case: make VMs and run them, until killed.
    #[arg(long, hide = true, value_name = "SEED")]
    worker: Option<u64>,
    /// For a case: make a VM and leave it to a child.
    #[arg(long, hide = true)]
    bequeath: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(case) = arguments.case {
        inside::run_case(&case, &arguments.plan.expect)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(count) = arguments.nested {
        cases::run_nested(count)?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.faulting {
        cases::run_faulting()?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(seed) = arguments.worker {
        soak::worker(seed)?;
    }
    if arguments.bequeath {
        soak::bequeath()?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = arguments.plan;
    if arguments.inside {
        let cases = match plan.soak {
            true => {
                // For the cases, each of which is a process of its own.
                env::set_var(soak::PERCENT, plan.percent.to_string());
                soak::all()
            }
            false => cases::all(),
        };
        return inside::run(cases, &plan.words, &plan.expect, plan.slow);
    }
    outside::run(&plan)
}
