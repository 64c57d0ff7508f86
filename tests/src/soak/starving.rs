// SPDX-License-Identifier: GPL-2.0

//! No memory: each allocation of the module fails in its turn, and nothing else does.
//!
//! For kernels that can have allocations fail, such as the lab's `debug`; elsewhere the cases are
//! left out.

use std::{fs, io, path::Path};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reader::Snapshot;
use tiny_guests::{Config, Machine, Mode, Program};

use super::{is_metered_whole, part_of, random::Random};
use crate::{
    cases::Case,
    host::{
        self,
        fault_injection::{self, CodeRange, FaultInjection},
        meter::Meter,
        module,
    },
};

pub(super) fn cases() -> Vec<Case> {
    [
        Case::without_module("soak: no memory for any step of loading", load).within(1800),
        Case::without_module("soak: no memory for any step of unloading", unload).within(1800),
        Case::with_module("log_queries=0", "soak: no memory for a snapshot", snapshot).within(600),
        Case::with_module(
            "log_queries=0",
            "soak: no memory for vCPUs, which run on unmetered",
            vcpus,
        )
        .within(1800),
    ]
    .map(|case| case.skip_if(no_faults))
    .into()
}

fn no_faults() -> Result<Option<&'static str>> {
    let impossible = !fault_injection::is_supported();
    Ok(impossible.then_some("allocations do not fail by order on this kernel"))
}

/// The module is loaded, or refused whole.
fn load() -> Result<()> {
    // Whatever is allocated on the module's behalf, ftrace's and the tracepoints' included.
    let faults = FaultInjection::under(CodeRange::of_function("do_init_module")?)?;
    // What was allocated for good at the first load of all, is there.
    module::Loaded::with("")?.unload()?;
    let mut in_spite = 0;
    let (count, last) = faults.fail_each_allocation(
        || module::try_load(""),
        |_, result: io::Result<()>| match result {
            Err(error) => {
                ensure!(
                    error.raw_os_error() == Some(libc::ENOMEM),
                    "loading ends with '{error}' instead of ENOMEM"
                );
                ensure!(
                    !module::is_loaded("exitmeter")? && !Path::new("/dev/exitmeter").exists(),
                    "the refused module left something behind"
                );
                Machine::new(Config::new(Program::Cpuid, Mode::Long, 5))?.run()?;
                Ok(())
            }
            // Something that can do without.
            Ok(()) => {
                in_spite += 1;
                is_metered_whole()?;
                module::unload()
            }
        },
    )?;
    last?;
    drop(faults);
    is_metered_whole()?;
    println!("{count} allocations failed, one after the other; {in_spite} times it was loaded in spite of that");
    module::unload()
}

/// The module goes, whatever it finds no memory for.
fn unload() -> Result<()> {
    module::load("")?;
    // What is allocated on the module's behalf, and not what the kernel does with any module that
    // goes: fprobe's part of that warns when it has no memory, and so would end the run.
    let faults = FaultInjection::under(CodeRange::of_module("exitmeter")?)?;
    let (count, last) = faults.fail_each_allocation(module::unload, |_, result| {
        result?;
        ensure!(
            !module::is_loaded("exitmeter")? && !Path::new("/dev/exitmeter").exists(),
            "the module left something behind"
        );
        Machine::new(Config::new(Program::Cpuid, Mode::Long, 5))?.run()?;
        module::load("")?;
        // It is somewhere else now.
        faults.restrict_to(CodeRange::of_module("exitmeter")?)?;
        is_metered_whole()
    })?;
    ensure!(count > 0, "it goes without an allocation");
    println!("{count} allocations failed, one after the other");
    last
}

fn snapshot() -> Result<()> {
    let mut machine = Machine::new(Config {
        vcpus: 15,
        ..Config::new(Program::Cpuid, Mode::Long, 5)
    })?;
    machine.run()?;
    let faults = FaultInjection::under(CodeRange::of_module("exitmeter")?)?;
    let mut refused = 0;
    let (count, last) = faults.fail_each_allocation(
        || fs::read("/dev/exitmeter"),
        |_, result| match result {
            // A large buffer can come from elsewhere.
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
    ensure!(Meter::read()?.own().len() == 15, "not all are metered");
    println!("{count} allocations failed, one after the other; {refused} reads were refused");
    Ok(())
}

fn vcpus() -> Result<()> {
    const VCPUS: u8 = 3;
    let cpuid = host::pick(10, 0x72)?;
    let config = Config {
        vcpus: VCPUS,
        ..Config::new(Program::Cpuid, Mode::Long, 40)
    };
    let faults = FaultInjection::under(CodeRange::of_module("exitmeter")?)?;
    let mut unmetered = 0;
    let mut metered = 0;
    let mut random = Random::new(11);
    let vms = part_of(200).max(10);
    for vm in 0..vms {
        // All, none, and some.
        faults.set_percent(match vm {
            0 => 100,
            1 => 0,
            _ => 10 + random.below(80) as u32,
        })?;
        let mut machine = Machine::new(config.clone())?;
        machine.run()?;
        faults.set_percent(0)?;
        // Who came without memory stays unmetered for its life, and the rest is exact.
        machine.rewind()?;
        machine.run()?;
        let meter = Meter::read()?;
        let own = meter.own();
        let without = meter.unmetered - unmetered;
        ensure!(
            own.len() as u64 + without == u64::from(VCPUS),
            "of {VCPUS} vCPUs {} are metered, and {without} are said to be unmetered",
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
    is_metered_whole().context("then")?;
    println!("{vms} VMs: {metered} vCPUs metered, every exit, {unmetered} for want of memory not");
    // The count of those unmetered does not fall: the next case is to find a new module.
    module::unload()
}
