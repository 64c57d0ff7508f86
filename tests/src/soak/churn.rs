// SPDX-License-Identifier: GPL-2.0

//! Thousands of VMs come and go, in every way that a VM can fail to be created or be ended. Only their
//! numbers in the totals remain, and match the kernel's own counts.

use std::{
    env,
    io::Read as _,
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use kvm_ioctls::Kvm;
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::{check_fully_metered, raise_file_limit, random::Random, scaled};
use crate::{
    cases::Case,
    host::{meter::MeterSnapshot, module, span::Span, task},
};

/// Total number of VMs.
const VMS: u64 = 10_000;
/// Number of VMM processes that are killed.
const KILLED: u64 = 500;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module("log_queries=0", "soak: VMs come and go", || {
            come_and_go(scaled(VMS))
        })
        .within(7200),
        Case::with_module(
            "log_queries=0",
            "soak: KVM destroys vCPUs for want of a file descriptor",
            no_file_descriptor,
        )
        .within(300),
        Case::with_module(
            "log_queries=0",
            "soak: VMM processes are killed at random moments",
            || kill_vmms(scaled(KILLED)),
        )
        .within(3600),
        Case::with_module(
            "log_queries=0 max_vcpus=8",
            "soak: past max_vcpus and back, repeatedly",
            past_the_limit,
        )
        .within(600),
        Case::without_module(
            "soak: more unmetered vCPUs than can be noted are counted once and never metered",
            more_than_can_be_noted,
        )
        .within(600),
        Case::with_module(
            "log_queries=0",
            "soak: a VM outlives its creator in a child process",
            outlives_creator,
        )
        .within(120),
    ]
}

/// Run one random VM after the other, until killed.
pub fn worker(seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    loop {
        let config = random_config(&mut random);
        TinyVm::new(config)?.run()?;
    }
}

fn random_config(random: &mut Random) -> Config {
    let programs = [
        Program::Cpuid,
        Program::OutUser,
        Program::OutEventfd,
        Program::HltUser,
        Program::Touch,
        Program::Invd,
        Program::Rdmsr,
    ];
    let modes = [Mode::Real, Mode::Long];
    Config {
        vcpus: 1 + random.below(3) as u8,
        ..Config::new(
            programs[random.below(programs.len() as u64) as usize],
            modes[random.below(2) as usize],
            1 + random.below(60) as u32,
        )
    }
}

/// Check that no vCPU is metered and none ran unmetered. Return the number of departed vCPUs.
fn check_nothing_left() -> Result<u64> {
    let meter = MeterSnapshot::read()?;
    ensure!(
        meter.vcpus.is_empty(),
        "{} ledgers of departed vCPUs are left",
        meter.vcpus.len()
    );
    ensure!(meter.unmetered == 0, "{} ran unmetered", meter.unmetered);
    Ok(meter.departed)
}

/// Create and run VMs in two threads. Ask every tenth VM for vCPUs that it cannot have, and never run
/// every seventh.
fn come_and_go(count: u64) -> Result<()> {
    let span = Span::begin()?;
    let before = check_nothing_left()?;
    let started = Instant::now();
    let (mut refused, mut vcpus) = (0, 0);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..2_u64)
            .map(|seed| {
                scope.spawn(move || -> Result<(u64, u64)> {
                    let mut random = Random::new(seed + 1);
                    let (mut refused, mut vcpus) = (0, 0);
                    for number in 0..count / 2 {
                        let config = random_config(&mut random);
                        vcpus += u64::from(config.vcpus);
                        let mut machine = TinyVm::new(config)?;
                        if number % 10 == 0 {
                            refused += machine.ask_for_impossible_vcpus()?;
                        }
                        if number % 7 != 0 {
                            machine.run()?;
                        }
                    }
                    Ok((refused, vcpus))
                })
            })
            .collect();
        for thread in threads {
            let ended = task::join(thread)?;
            refused += ended.0;
            vcpus += ended.1;
        }
        anyhow::Ok(())
    })?;
    let after = check_nothing_left()?;
    let exits: u64 = span.end()?.values().sum();
    // A refused vCPU is destroyed before its first event, or departs like any other.
    ensure!(
        (vcpus..=vcpus + refused).contains(&(after - before)),
        "{vcpus} vCPUs were created and {refused} refused, and {} departed",
        after - before
    );
    println!(
        "{count} VMs with {vcpus} vCPUs in {:.0} s, {refused} vCPUs refused half-way; {exits} exits, all in the totals",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Let KVM create vCPUs and destroy them at once because there is no file descriptor.
fn no_file_descriptor() -> Result<()> {
    const TIMES: u32 = 1000;
    let span = Span::begin()?;
    let before = check_nothing_left()?;
    let mut machine = TinyVm::new(Config::new(Program::OutUser, Mode::Long, 50))?;
    for _ in 0..TIMES {
        machine.ask_for_vcpu_without_a_file()?;
    }
    machine.run()?;
    let meter = MeterSnapshot::read()?;
    ensure!(
        meter.vcpus.len() == 1,
        "{} vCPUs are metered instead of 1",
        meter.vcpus.len()
    );
    drop(machine);
    let departed = check_nothing_left()? - before;
    span.end()?;
    println!("{TIMES} vCPUs destroyed at once, {departed} vCPUs departed");
    Ok(())
}

/// Start processes with VMs, and kill each after up to 120 ms.
fn kill_vmms(count: u64) -> Result<()> {
    let span = Span::begin()?;
    check_nothing_left()?;
    let mut random = Random::new(7);
    for seed in 0..count {
        let mut child = start_self(&["--worker", &seed.to_string()])?;
        thread::sleep(Duration::from_micros(random.below(120_000)));
        ensure!(
            child.try_wait()?.is_none(),
            "the process ended before it was killed"
        );
        child.kill()?;
        child.wait()?;
    }
    // The kernel may defer the end of a VM to a worker thread.
    thread::sleep(Duration::from_secs(1));
    let departed = check_nothing_left()?;
    let exits: u64 = span.end()?.values().sum();
    ensure!(exits > count, "{exits} exits are too few");
    println!(
        "{count} processes killed, {departed} vCPUs departed; {exits} exits, all in the totals"
    );
    Ok(())
}

/// Start this program as a new process.
fn start_self(arguments: &[&str]) -> Result<Child> {
    Command::new(env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("a process cannot be started")
}

/// Run VMs of 15 vCPUs where 8 may be metered.
fn past_the_limit() -> Result<()> {
    let rounds = scaled(200);
    for round in 1..=rounds {
        let many = Config {
            vcpus: 15,
            ..Config::new(Program::OutUser, Mode::Long, 20)
        };
        let mut machine = TinyVm::new(many)?;
        machine.run()?;
        let meter = MeterSnapshot::read()?;
        ensure!(
            meter.own().len() == 8 && meter.unmetered == 7 * round,
            "round {round}: of 15 vCPUs {} are metered, and {} ran unmetered so far",
            meter.own().len(),
            meter.unmetered
        );
        drop(machine);
        // There is room again, and the next vCPU is metered from its first exit.
        check_fully_metered()?;
    }
    println!("{rounds} rounds of 15 vCPUs where 8 may be metered");
    // The count of unmetered vCPUs does not fall, so the next case needs a new load.
    module::unload()
}

/// Create more unmetered vCPUs than the meter can note, where one may be metered.
///
/// The vCPUs never enter a guest because that would take more memory than the host has. Reading a
/// vCPU's registers loads it as well.
fn more_than_can_be_noted() -> Result<()> {
    const NOTES: u64 = 4096;
    const VMS: u64 = 9;
    const EACH: u64 = 500;
    const VCPUS: u64 = VMS * EACH;
    const { assert!(VCPUS > NOTES + 100) };
    raise_file_limit(VCPUS + 100)?;
    let loaded = module::Loaded::with("log_queries=0 max_vcpus=1")?;
    let kvm = Kvm::new()?;
    let vm_with_vcpus = |count| {
        let vm = kvm.create_vm()?;
        let vcpus: Result<Vec<_>, _> = (0..count).map(|id| vm.create_vcpu(id)).collect();
        anyhow::Ok((vm, vcpus?))
    };
    let first = vm_with_vcpus(1)?;
    let others = (0..VMS)
        .map(|_| vm_with_vcpus(EACH))
        .collect::<Result<Vec<_>>>()?;
    MeterSnapshot::check_counts(1, VCPUS, 0)?;

    // There is room again, but not for these vCPUs.
    drop(first);
    for vcpu in others.iter().flat_map(|(_, vcpus)| vcpus) {
        vcpu.get_regs()?;
    }
    MeterSnapshot::check_counts(0, VCPUS, 1)?;
    check_fully_metered()?;
    MeterSnapshot::check_counts(0, VCPUS, 2)?;

    // KVM loads each vCPU once more to destroy it. After that, new vCPUs are metered again.
    drop(others);
    MeterSnapshot::check_counts(0, VCPUS, 2)?;
    check_fully_metered()?;
    let again = vm_with_vcpus(4)?;
    MeterSnapshot::check_counts(1, VCPUS + 3, 3)?;
    drop(again);
    MeterSnapshot::check_counts(0, VCPUS + 3, 4)?;
    println!(
        "{VCPUS} vCPUs unmetered at a time, each counted once; none of them was metered later"
    );
    loaded.unload()
}

/// Check that a VM lives as long as a process holds its file, not as long as its creator.
fn outlives_creator() -> Result<()> {
    let span = Span::begin()?;
    check_nothing_left()?;
    let mut creator = start_self(&["--bequeath"])?;
    let mut printed = String::new();
    let mut output = creator.stdout.take().context("its output was asked for")?;
    // The heir also holds the pipe, so this waits until both have ended.
    output.read_to_string(&mut printed)?;
    ensure!(creator.wait()?.success(), "the creator of the VM failed");
    ensure!(
        printed.trim() == "the heir holds 1 vCPU",
        "the heir of a VM printed '{printed}'"
    );
    thread::sleep(Duration::from_millis(500));
    check_nothing_left()?;
    let exits: u64 = span.end()?.values().sum();
    println!("{exits} exits of a VM whose creator ended before it, all in the totals");
    Ok(())
}

/// Create and run a VM, then end and leave the VM to a child. The child prints how many of its vCPUs are
/// still metered.
pub fn bequeath() -> Result<()> {
    let mut machine = TinyVm::new(Config::new(Program::OutUser, Mode::Long, 50))?;
    machine.run()?;
    let creator = std::process::id();
    // SAFETY: The threads of `run` have ended, so this process has only one thread.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => {
            while std::os::unix::process::parent_id() == creator {
                thread::sleep(Duration::from_millis(10));
            }
            let meter = MeterSnapshot::read()?;
            let held = meter
                .vcpus
                .iter()
                .filter(|vcpu| vcpu.pid == creator)
                .count();
            println!("the heir holds {held} vCPU");
            Ok(())
        }
        _ => {
            // End without closing the VM, which now belongs to the heir.
            std::mem::forget(machine);
            Ok(())
        }
    }
}
