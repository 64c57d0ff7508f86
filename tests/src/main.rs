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
    /// Only on this host; on both, side by side, when not given.
    #[arg(long, value_enum)]
    host: Option<outside::Host>,
    /// How many seconds of the wall clock one host may take.
    #[arg(long, default_value_t = 1200)]
    timeout: u64,
    /// How many CPUs the hosts have; when not given 1 on Intel, 2 on AMD.
    #[arg(long)]
    cpus: Option<u32>,
    /// Debian's kernel for the hosts, a version or release; the newest of backports when not
    /// given.
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    /// The model of the hosts' CPU, in the words of their emulator, such as tigerlake.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// How much memory the hosts have; as much as the lab gives when not given.
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// More for the command line of the hosts' kernel.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Option<String>,
    /// Give each case so many times its time: for a kernel that is slow by what it checks.
    #[arg(long, value_name = "FACTOR", default_value_t = 1)]
    slow: u32,
    /// What a line of the host's kernel log must hold: a case of its own demands each.
    #[arg(long, value_name = "WORDS")]
    expect: Vec<String>,
    /// Parameters of kvm_intel or kvm_amd, such as "ept=0": the same cases hold.
    #[arg(long, value_name = "TEXT")]
    kvm_args: Option<String>,
    /// The long cases in place of the others: load, churn, attacks.
    #[arg(long)]
    soak: bool,
    /// How much of the long cases' work to do, in percent.
    #[arg(long, value_name = "N", default_value_t = 100, requires = "soak",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    percent: u32,
    /// The side inside: run the cases in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    inside: bool,
    /// The side inside: run this one case in this process.
    #[arg(long, hide = true, value_name = "NAME")]
    case: Option<String>,
    /// In a guest of an emulated host: run a guest in it that loops so often.
    #[arg(long, hide = true, value_name = "COUNT")]
    nested: Option<u32>,
    /// For a case: make VMs and run them, until killed.
    #[arg(long, hide = true, value_name = "SEED")]
    worker: Option<u64>,
    /// For a case: make a VM and leave it to a child.
    #[arg(long, hide = true)]
    bequeath: bool,
    /// Only cases whose names hold one of these words.
    words: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(case) = arguments.case {
        inside::run_case(&case, &arguments.expect)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(count) = arguments.nested {
        cases::run_nested(count)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(seed) = arguments.worker {
        soak::worker(seed)?;
    }
    if arguments.bequeath {
        soak::bequeath()?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.inside {
        let cases = match arguments.soak {
            true => {
                // For the cases, each of which is a process of its own.
                env::set_var(soak::PERCENT, arguments.percent.to_string());
                soak::all()
            }
            false => cases::all(),
        };
        return inside::run(cases, &arguments.words, &arguments.expect, arguments.slow);
    }
    outside::run(&outside::Plan {
        host: arguments.host,
        timeout: arguments.timeout,
        cpus: arguments.cpus,
        kernel: arguments.kernel,
        model: arguments.model,
        memory: arguments.memory,
        slow: arguments.slow,
        expect: arguments.expect,
        kvm_args: arguments.kvm_args,
        append: arguments.append,
        soak: arguments.soak.then_some(arguments.percent),
        words: arguments.words,
    })
}
