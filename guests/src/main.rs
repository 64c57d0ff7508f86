// SPDX-License-Identifier: GPL-2.0

//! Runs one tiny guest, and prints the exits to its VMM.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use tiny_guests::{host_isa, Config, Expected, Mode, Program, Registers64, TinyVm};

/// Run a tiny KVM guest that exits a known number of times.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Action of the guest.
    #[arg(value_enum)]
    program: Program,
    /// Mode of the CPU.
    #[arg(long, value_enum, default_value_t = Mode::Long)]
    mode: Mode,
    /// Number of times that the guest does it.
    #[arg(long, default_value_t = 1000)]
    count: u32,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u8,
    /// Time that the VMM sleeps at each OUT that reaches it, in microseconds.
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// Move each vCPU's thread to the host's next CPU at each OUT that reaches the VMM.
    #[arg(long)]
    roam: bool,
    /// Interval at which the VMM sends the interrupt that ends a HLT, in microseconds.
    #[arg(long, default_value_t = 5000)]
    wake: u64,
    /// Leaf to query, with its subleaf, as 0x4ffffffd:10. Only for the guest `query`.
    #[arg(long, value_name = "LEAF[:SUBLEAF]", value_parser = parse_query)]
    ask: Vec<Registers64>,
}

fn parse_number(text: &str) -> Result<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .with_context(|| format!("{text} is no number of 32 bits"))
}

fn parse_query(text: &str) -> Result<Registers64> {
    let (leaf, subleaf) = text.split_once(':').unwrap_or((text, "0"));
    Ok(Registers64::cpuid(
        parse_number(leaf)?,
        parse_number(subleaf)?,
    ))
}

fn main() -> Result<()> {
    let Arguments {
        program,
        mode,
        mut count,
        vcpus,
        pause,
        roam,
        wake,
        ask,
    } = Arguments::parse();
    if program == Program::Query {
        count = ask.len() as u32;
    }
    let mut machine = TinyVm::new(Config {
        program,
        mode,
        count,
        vcpus,
        vmm_pause: Duration::from_micros(pause),
        vmm_pause_on: None,
        change_cpus: roam,
        hlt_time: Duration::from_micros(wake),
        queries: ask.clone(),
        rewrite_registers: false,
    })?;
    for (number, seen) in machine.run()?.into_iter().enumerate() {
        println!(
            "vCPU {number}: {} port accesses and {} HLTs came to the VMM.",
            seen.ports, seen.hlts
        );
    }
    for (query, answer) in ask.iter().zip(machine.answers(0)) {
        println!(
            "CPUID({:#010x}, {}): {:#x} {:#x} {:#x} {:#x}",
            query.rax as u32, query.rcx as u32, answer.rax, answer.rbx, answer.rcx, answer.rdx
        );
    }
    if let Some(isa) = host_isa() {
        let expected = Expected::of(isa, program, mode, count, vcpus);
        for (reason, exits) in expected.exact() {
            println!("exit {reason}: {exits} known");
        }
    }
    Ok(())
}
