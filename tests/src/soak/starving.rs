// SPDX-License-Identifier: GPL-2.0

//! Each allocation of the module fails in turn, and no other allocation does.
//!
//! The cases need a kernel with fault injection, such as the lab's `debug`; elsewhere they are skipped.

use std::{fs, io, path::Path};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reader::Snapshot;
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::{check_fully_metered, random::Random, scaled};
use crate::{
    cases::Case,
    host::{
        codes,
        fault_injection::{self, CodeRange, FaultInjection},
        meter::{MeterSnapshot, DEVICE},
        module,
    },
};

pub(super) fn cases() -> Vec<Case> {
    [
        Case::without_module("soak: no memory for any step of loading", no_memory_to_load)
            .within(1800),
        Case::without_module(
            "soak: no memory for any step of unloading",
            no_memory_to_unload,
        )
        .within(1800),
        Case::with_module(
            "log_queries=0",
            "soak: no memory for a snapshot",
            no_memory_for_a_snapshot,
        )
        .within(600),
        Case::with_module(
            "log_queries=0",
            "soak: no memory for a ledger, so the vCPU runs unmetered",
            no_memory_for_ledgers,
        )
        .within(1800),
    ]
    .map(|case| case.skip_if(no_faults))
    .into()
}

fn no_faults() -> Result<Option<&'static str>> {
    let impossible = !fault_injection::is_supported();
    Ok(impossible.then_some("this kernel has no fault injection"))
}

/// Check that loading either succeeds or fails without a trace, whichever allocation fails.
fn no_memory_to_load() -> Result<()> {
    // All allocations on the module's behalf fail, including those of ftrace and tracepoints.
    let faults = FaultInjection::under(CodeRange::of_function("do_init_module")?)?;
    // Make the allocations that the first load makes for good.
    module::Loaded::with("")?.unload()?;
    let mut loaded = 0;
    let (count, last) = faults.fail_each_allocation(
        || module::try_load(""),
        |_, result: io::Result<()>| match result {
            Err(error) => {
                ensure!(
                    error.raw_os_error() == Some(libc::ENOMEM),
                    "loading ends with '{error}' instead of ENOMEM"
                );
                ensure!(
                    !module::is_loaded("exitmeter")? && !Path::new(DEVICE).exists(),
                    "the refused module left something behind"
                );
                TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 5))?.run()?;
                Ok(())
            }
            // The kernel or module can do without this allocation.
            Ok(()) => {
                loaded += 1;
                check_fully_metered()?;
                module::unload()
            }
        },
    )?;
    last?;
    drop(faults);
    check_fully_metered()?;
    println!("{count} allocations failed, one after the other; the module loaded nevertheless {loaded} times");
    module::unload()
}

/// Check that unloading succeeds, whichever allocation fails.
fn no_memory_to_unload() -> Result<()> {
    module::load("")?;
    // Only the module's own allocations fail, not those of the kernel when it unloads any module.
    // fprobe warns without memory there, which would end the run.
    let faults = FaultInjection::under(CodeRange::of_module("exitmeter")?)?;
    let (count, last) = faults.fail_each_allocation(module::unload, |_, result| {
        result?;
        ensure!(
            !module::is_loaded("exitmeter")? && !Path::new(DEVICE).exists(),
            "the module left something behind"
        );
        TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 5))?.run()?;
        module::load("")?;
        // The module is at another address now.
        faults.restrict_to(CodeRange::of_module("exitmeter")?)?;
        check_fully_metered()
    })?;
    ensure!(count > 0, "unloading makes no allocation");
    println!("{count} allocations failed, one after the other");
    last
}

fn no_memory_for_a_snapshot() -> Result<()> {
    let mut machine = TinyVm::new(Config {
        vcpus: 15,
        ..Config::new(Program::Cpuid, Mode::Long, 5)
    })?;
    machine.run()?;
    let faults = FaultInjection::under(CodeRange::of_module("exitmeter")?)?;
    let mut refused = 0;
    let (count, last) = faults.fail_each_allocation(
        || fs::read(DEVICE),
        |_, result| match result {
            // A large buffer can come from another allocator.
            Ok(bytes) => {
                Snapshot::parse(&bytes)?;
                Ok(())
            }
            Err(error) => {
                refused += 1;
                ensure!(
                    error.raw_os_error() == Some(libc::ENOMEM),
                    "the read ends with '{error}' instead of ENOMEM"
                );
                Ok(())
            }
        },
    )?;
    Snapshot::parse(&last?)?;
    ensure!(refused > 0, "none of {count} reads was refused");
    drop(faults);
    ensure!(
        MeterSnapshot::read()?.own().len() == 15,
        "not all are metered"
    );
    println!("{count} allocations failed, one after the other; {refused} reads were refused");
    Ok(())
}

fn no_memory_for_ledgers() -> Result<()> {
    const VCPUS: u8 = 3;
    let cpuid = codes::cpuid()?;
    let config = Config {
        vcpus: VCPUS,
        ..Config::new(Program::Cpuid, Mode::Long, 40)
    };
    let faults = FaultInjection::under(CodeRange::of_module("exitmeter")?)?;
    let mut unmetered = 0;
    let mut metered = 0;
    let mut random = Random::new(11);
    let vms = scaled(200).max(10);
    for vm in 0..vms {
        // The first VM gets no memory, the second all, and the others some.
        faults.set_percent(match vm {
            0 => 100,
            1 => 0,
            _ => 10 + random.below(80) as u32,
        })?;
        let mut machine = TinyVm::new(config.clone())?;
        machine.run()?;
        faults.set_percent(0)?;
        // A vCPU without a ledger stays unmetered for its life; the others' numbers are exact.
        machine.rewind()?;
        machine.run()?;
        let meter = MeterSnapshot::read()?;
        let own = meter.own();
        let without = meter.unmetered - unmetered;
        ensure!(
            own.len() as u64 + without == u64::from(VCPUS),
            "of {VCPUS} vCPUs {} are metered, and {without} count as unmetered",
            own.len()
        );
        ensure!(
            (vm != 0 || own.is_empty()) && (vm != 1 || without == 0),
            "VM {vm} has {without} vCPUs without memory"
        );
        for vcpu in &own {
            let exits = vcpu.numbers.exits_of(cpuid);
            ensure!(exits == 80, "{exits} CPUID exits of 80 are metered");
        }
        metered += own.len() as u64;
        unmetered = meter.unmetered;
    }
    drop(faults);
    ensure!(
        metered > 0 && unmetered > u64::from(VCPUS),
        "{metered} vCPUs were metered, {unmetered} were not"
    );
    check_fully_metered().context("then")?;
    println!("{vms} VMs: {metered} vCPUs metered, with every exit, and {unmetered} unmetered for want of memory");
    // The count of unmetered vCPUs does not fall, so the next case needs a new load.
    module::unload()
}
