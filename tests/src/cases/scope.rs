// SPDX-License-Identifier: GPL-2.0

//! The parameter `host_scope`: each of two VMs reads its own numbers, or the sum of both.

use std::thread;

use anyhow::{ensure, Result};
use tiny_guests::{Config, Mode, Program, Registers64, TinyVm};

use super::{answers::ask, Case};
use crate::host::{codes, leaves::MAP_2021, meter::MeterSnapshot, task};

/// Queries of each VM for its number of CPUID exits.
const EACH: u64 = 400;
/// MSR reads of a VM beside them.
const MSR_READS: u32 = 777;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "log_queries=0",
            "scope: two VMs at once do not read each other's numbers",
            || {
                let both = ask_in_parallel()?;
                for counts in &both {
                    let wrong = (1..).zip(counts).find(|(query, count)| query != *count);
                    ensure!(
                        wrong.is_none(),
                        "a VM reads wrong CPUID exits, first (query, count) {wrong:?}"
                    );
                }
                check_msr_reads(0)
            },
        ),
        Case::with_module(
            "log_queries=0 host_scope=1",
            "scope: with host_scope=1 two VMs at once read the sum of both",
            || {
                let before = MeterSnapshot::read()?
                    .exits()
                    .get(&codes::cpuid()?)
                    .copied()
                    .unwrap_or(0);
                let both = ask_in_parallel()?;
                for counts in &both {
                    ensure!(
                        counts.windows(2).all(|pair| pair[0] < pair[1]),
                        "the counts that a VM reads do not grow"
                    );
                }
                // The query that was counted last was answered after all others were counted.
                let highest = both.iter().flatten().max().copied();
                ensure!(
                    highest == Some(before + 2 * EACH),
                    "the highest count read is {highest:?} instead of {}",
                    before + 2 * EACH
                );
                check_msr_reads(MSR_READS.into())
            },
        ),
    ]
}

/// Run two VMs in parallel that ask for the number of CPUID exits, and return their answers.
fn ask_in_parallel() -> Result<Vec<Vec<u64>>> {
    let cpuid = codes::cpuid()?;
    let queries = vec![Registers64::cpuid(MAP_2021.reason_exits, cpuid); EACH as usize];
    let mut machines = [Mode::Long, Mode::Real]
        .map(|mode| TinyVm::new(Config::query(mode, queries.clone())))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    thread::scope(|scope| {
        let threads: Vec<_> = machines
            .iter_mut()
            .map(|machine| scope.spawn(|| machine.run()))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| task::join(thread).map(drop))
    })?;
    let meter = MeterSnapshot::read()?;
    let vms: Vec<u64> = meter.own().iter().map(|vcpu| vcpu.vm).collect();
    ensure!(
        vms.len() == 2 && vms[0] != vms[1],
        "two VMs of one process have the numbers {vms:?}"
    );
    Ok(machines
        .iter()
        .map(|machine| machine.answers(0).iter().map(|answer| answer.rax).collect())
        .collect())
}

/// Check that a VM reads `expected` MSR reads beside another VM that has read an MSR.
fn check_msr_reads(expected: u64) -> Result<()> {
    let msr_read = codes::rdmsr()?;
    let mut other = TinyVm::new(Config::new(Program::Rdmsr, Mode::Long, MSR_READS))?;
    other.run()?;
    let (_machine, answers) = ask(
        Mode::Long,
        &[Registers64::cpuid(MAP_2021.reason_exits, msr_read)],
    )?;
    ensure!(
        answers[0].rax == expected,
        "a VM beside one with {MSR_READS} MSR reads reads {} of them",
        answers[0].rax
    );
    Ok(())
}
