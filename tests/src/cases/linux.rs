// SPDX-License-Identifier: GPL-2.0

//! A Linux guest reads its own exits with the stock tool `cpuid`.

use std::collections::BTreeMap;

use anyhow::{ensure, Result};
use exitmeter_meter::{
    leaves::Registers,
    reasons::{self, Isa},
};

use super::Case;
use crate::host::{
    self,
    linux::{CpuidLine, Linux},
    log::Log,
    span::Span,
};

/// Number of reasons that the course sweeps, from 0.
const REASONS: u32 = 70;
const EXITS_LEAF: u32 = 0x4fff_fffd;
const CYCLES_LEAF: u32 = 0x4fff_fffc;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::with_module(
        "",
        "linux: a guest boots, sweeps its exits, reboots and sweeps again",
        boot_sweep_reboot_sweep,
    )
    .with_linux()
    .within(900)]
}

fn boot_sweep_reboot_sweep() -> Result<()> {
    let span = Span::begin()?;
    let mut log = Log::from_now()?;
    let linux = Linux::boot(&[])?;
    let name = format!("kvm-{}", linux.pid()?);
    ensure!(
        log.module_lines()?.is_empty(),
        "the boot already queried the meter"
    );
    let first = sweep(&linux, &mut log, &name)?;
    linux.reboot()?;
    log.module_lines()?;
    let second = sweep(&linux, &mut log, &name)?;
    linux.stop()?;
    let exits = span.end()?;

    for (query, before) in &first {
        let after = second[query];
        ensure!(
            after >= *before,
            "leaf {:#x}, reason {}: the guest read {before}, and {after} after its reboot",
            query.0,
            query.1
        );
    }
    // The last numbers read are at most the final ones.
    let vendor = host::vendor()?;
    for reason in 0..REASONS {
        let read = second[&(EXITS_LEAF, reason)];
        let held = exits.get(&reason).copied().unwrap_or(0);
        ensure!(
            read <= held || !reasons::is_defined(vendor, reason),
            "reason {reason}: the guest read {read} exits, and had {held} in all"
        );
    }
    let grown = first
        .iter()
        .filter(|(query, before)| second[query] > **before)
        .count();
    ensure!(
        grown >= host::by_vendor(8, 2)?,
        "a reboot increased only {grown} numbers"
    );
    Ok(())
}

/// Let the guest query exits and cycles of each reason, and return the numbers by leaf and reason.
/// Check that each query has its line in the host's log, with the same number.
fn sweep(linux: &Linux, log: &mut Log, name: &str) -> Result<BTreeMap<(u32, u32), u64>> {
    let printed = linux.run(&format!(
        "for reason in $(seq 0 {}); do for leaf in {EXITS_LEAF:#x} {CYCLES_LEAF:#x}; do \
         cpuid -1 -l $leaf -s $reason || exit; done; done",
        REASONS - 1
    ))?;
    let printed: Vec<CpuidLine> = printed
        .lines()
        .filter(|line| line.trim_start().starts_with("0x4fff"))
        .map(str::parse)
        .collect::<Result<_>>()?;
    let asked: Vec<(u32, u32)> = printed
        .iter()
        .map(|printed| (printed.leaf, printed.subleaf))
        .collect();
    let wanted: Vec<(u32, u32)> = (0..REASONS)
        .flat_map(|reason| [EXITS_LEAF, CYCLES_LEAF].map(|leaf| (leaf, reason)))
        .collect();
    ensure!(
        asked == wanted,
        "the guest printed {} of {} answers: {asked:x?}",
        asked.len(),
        wanted.len()
    );

    let vendor = host::vendor()?;
    let expected: Vec<String> = printed
        .iter()
        .map(|printed| format!("{name}: {}", log_text(vendor, printed)))
        .collect();
    let logged = log.module_lines()?;
    ensure!(
        logged == expected,
        "the guest's answers and the log differ: {}",
        difference(&expected, &logged)
    );

    printed
        .iter()
        .map(|printed| {
            let Registers { eax, ecx, edx, .. } = printed.registers;
            let defined = reasons::is_defined(vendor, printed.subleaf);
            let rest = if printed.leaf == EXITS_LEAF { ecx } else { eax };
            let expected = if defined { (0, 0) } else { (0, u32::MAX) };
            let value = value(printed);
            ensure!(
                (rest, edx) == expected && (defined || value == 0),
                "the guest read {printed:x?}"
            );
            Ok(((printed.leaf, printed.subleaf), value))
        })
        .collect()
}

/// Return the number in an answer.
fn value(printed: &CpuidLine) -> u64 {
    let Registers { eax, ebx, ecx, .. } = printed.registers;
    let low = if printed.leaf == EXITS_LEAF { eax } else { ecx };
    u64::from(ebx) << 32 | u64::from(low)
}

/// Return the log's text for a query, in the course's words.
fn log_text(vendor: Isa, printed: &CpuidLine) -> String {
    let CpuidLine { leaf, subleaf, .. } = printed;
    let value = value(printed);
    match reasons::name(vendor, *subleaf) {
        None => format!("CPUID({leaf:#010X}), exit number {subleaf} is not defined"),
        Some(name) if *leaf == EXITS_LEAF => {
            format!("CPUID({leaf:#010X}), exit number {subleaf} ({name}) exits={value}")
        }
        Some(name) => format!(
            "CPUID({leaf:#010X}), exit number {subleaf} ({name}) time in vmm: {value} cycles"
        ),
    }
}

/// Describe the first difference of two lists.
fn difference(read: &[String], logged: &[String]) -> String {
    let mut pairs = read.iter().zip(logged);
    match pairs.find(|(read, logged)| read != logged) {
        Some((read, logged)) => format!("'{read}' and '{logged}'"),
        None => format!("{} queries and {} lines", read.len(), logged.len()),
    }
}
