// SPDX-License-Identifier: GPL-2.0

//! For every reason, and in total, the meter counts what the kernel's own histogram counts and what
//! the guest's program causes.

use anyhow::{ensure, Result};
use clap::ValueEnum as _;
use exitmeter_meter::{
    ledger::{HISTOGRAMS, OWN_HISTOGRAMS},
    reasons::Isa,
};
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::Case;
use crate::host::{self, hist::Exits, linux::Linux, meter::MeterSnapshot, span::Span};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in [Mode::Real, Mode::Long, Mode::User] {
        for program in Program::value_variants() {
            // These have cases of their own.
            let apart = matches!(*program, Program::Query | Program::Varied);
            if apart || !program.runs_in(mode) {
                continue;
            }
            let mut config = Config::new(*program, mode, 200);
            if *program == Program::Spin {
                config.count = 5_000_000;
            }
            cases.push(case(
                format!(
                    "exits: {} in {}",
                    describe(*program),
                    match mode {
                        Mode::Real => "real mode",
                        Mode::Long => "64-bit mode",
                        Mode::User => "64-bit mode at CPL 3",
                    }
                ),
                config,
            ));
        }
    }
    cases.push(case(
        "exits: 100,000 of CPUID",
        Config::new(Program::Cpuid, Mode::Long, 100_000),
    ));
    cases.push(case(
        "exits: 20,000 of OUT to the VMM",
        Config::new(Program::OutUser, Mode::Long, 20_000),
    ));
    for (program, mode) in [
        (Program::Cpuid, Mode::Real),
        (Program::OutUser, Mode::Long),
        (Program::HltUser, Mode::Long),
    ] {
        let config = Config {
            vcpus: 2,
            ..Config::new(program, mode, 5000)
        };
        cases.push(case(
            format!("exits: {} on 2 vCPUs", describe(program)),
            config,
        ));
    }
    cases.push(case(
        "exits: OUT to the VMM on 6 vCPUs that move between the host's CPUs",
        Config {
            vcpus: 6,
            change_cpus: true,
            ..Config::new(Program::OutUser, Mode::Long, 1000)
        },
    ));
    cases.push(Case::with_module(
        "",
        "exits: more reasons than a ledger holds histograms for",
        check_many_reasons,
    ));
    cases.push(
        Case::with_module("", "exits: the boot of a Linux guest with 2 vCPUs", || {
            let span = Span::begin()?;
            let linux = Linux::boot(&["--vcpus", "2"])?;
            ensure!(
                linux.run("nproc")?.trim() == "2",
                "the guest does not have 2 CPUs"
            );
            linux.stop()?;
            let total: u64 = span.end()?.values().sum();
            ensure!(total > 1000, "{total} exits are too few for a boot");
            Ok(())
        })
        .with_linux()
        .within(300),
    );
    cases
}

fn describe(program: Program) -> &'static str {
    match program {
        Program::Cpuid | Program::Query => "CPUID",
        Program::OutUser => "OUT to the VMM",
        Program::InUser => "IN from the VMM",
        Program::InKernel => "IN from KVM's speaker",
        Program::OutEventfd => "OUT to an ioeventfd",
        Program::HltKernel => "HLT that sleeps in KVM",
        Program::HltUser => "HLT that exits to the VMM",
        Program::Rdmsr => "RDMSR",
        Program::Wrmsr => "WRMSR",
        Program::WrmsrFast => "WRMSR in KVM's fastpath",
        Program::CrWrite => "MOV to CR0",
        Program::Hypercall => "VMCALL or VMMCALL",
        Program::Invd => "INVD",
        Program::Wbinvd => "WBINVD",
        Program::Spin => "a loop without exits of its own",
        Program::Touch => "writes to fresh pages",
        Program::Look => "reads of fresh pages",
        Program::Call => "calls into fresh pages",
        Program::Device => "registers of a memory-mapped device",
        Program::Undefined => "UD2",
        Program::Varied => "instructions of many reasons",
        Program::Debug => "debug registers and CPUID",
    }
}

fn case(name: impl Into<String>, config: Config) -> Case {
    Case::with_module("", name, move || {
        run_and_check(config.clone())?;
        Ok(())
    })
}

/// Run a guest to its end, and return its exits. Check that the meter, the kernel's histogram and the
/// guest's program agree on them.
fn run_and_check(config: Config) -> Result<Exits> {
    let Config {
        program,
        count,
        vcpus,
        ..
    } = config;
    let expected = host::expected(&config)?;
    let span = Span::begin()?;
    let mut machine = TinyVm::new(config)?;
    let seen = machine.run()?;
    let writes = machine.eventfd_writes()?;
    drop(machine);
    let exits = span.end()?;
    expected.check(&exits)?;

    // Check which exits went to the VMM and which KVM handled.
    let (loops, vcpus) = (u64::from(count), u64::from(vcpus));
    let ports: u64 = seen.iter().map(|seen| seen.ports).sum();
    let hlts: u64 = seen.iter().map(|seen| seen.hlts).sum();
    let registers: u64 = seen.iter().map(|seen| seen.registers).sum();
    let due = |these: &[Program]| match these.contains(&program) {
        true => loops * vcpus,
        false => 0,
    };
    ensure!(
        ports == due(&[Program::OutUser, Program::InUser])
            && hlts == due(&[Program::HltUser])
            && writes == due(&[Program::OutEventfd])
            && registers == 3 * due(&[Program::Device]),
        "the VMM saw {ports} port accesses, {hlts} HLTs, {registers} register accesses and \
         {writes} writes to the eventfd"
    );
    Ok(exits)
}

/// Run a guest that exits for more reasons than a ledger has histograms for. Check its exits, that
/// each reason with a histogram has one sample for each exit, and that no sample is lost when the
/// vCPU goes.
fn check_many_reasons() -> Result<()> {
    let config = Config::new(Program::Varied, Mode::Long, 200);
    let expected = host::expected(&config)?;
    let span = Span::begin()?;
    let mut machine = TinyVm::new(config)?;
    machine.run()?;

    // This read compares the samples of each reason with its exits.
    let before = MeterSnapshot::read()?;
    let vcpu = &before.only()?.numbers;
    let reasons = vcpu.exits.len();
    let filled = match host::vendor()? {
        // VMX has one reason for all registers.
        Isa::Vmx => OWN_HISTOGRAMS,
        Isa::Svm => HISTOGRAMS,
    };
    ensure!(
        reasons > filled,
        "{reasons} reasons do not take more than {filled} histograms"
    );
    drop(machine);
    let after = MeterSnapshot::read()?.totals;
    for code in vcpu.exits.keys() {
        let (samples, added) = (
            vcpu.samples_of(*code),
            after.samples_of(*code) - before.totals.samples_of(*code),
        );
        ensure!(
            samples == added,
            "reason {code} had {samples} samples, and {added} were added to the totals"
        );
    }
    expected.check(&span.end()?)?;
    Ok(())
}
