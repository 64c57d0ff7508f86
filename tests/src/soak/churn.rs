// SPDX-License-Identifier: GPL-2.0

//! VMs come and go by the thousand, in every way a VM can fail to come or be made to go; nothing
//! is left of them but their numbers in the totals, and these are the kernel's own.

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
use tiny_guests::{Config, Machine, Mode, Program};

use super::{is_metered_whole, may_open_files, part_of, random::Random};
use crate::{
    cases::Case,
    host::{meter::Meter, module, span::Span},
};

/// How many VMs come and go in all.
const VMS: u64 = 10_000;
/// How many processes are killed with their VMs.
const KILLED: u64 = 500;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module("log_queries=0", "soak: VMs come and go", || {
            come_and_go(part_of(VMS))
        })
        .within(7200),
        Case::with_module(
            "log_queries=0",
            "soak: vCPUs made and taken back for want of a file descriptor",
            without_a_file,
        )
        .within(300),
        Case::with_module(
            "log_queries=0",
            "soak: processes are killed at random moments of their VMs",
            || killed(part_of(KILLED)),
        )
        .within(3600),
        Case::with_module(
            "log_queries=0 max_vcpus=8",
            "soak: past max_vcpus and back, again and again",
            past_the_limit,
        )
        .within(600),
        Case::without_module(
            "soak: more unmetered vCPUs than can be noted, each counted once and none metered later",
            past_all_notes,
        )
        .within(600),
        Case::with_module(
            "log_queries=0",
            "soak: a VM whose maker has ended, in its child's hands",
            inherited,
        )
        .within(120),
    ]
}

/// What a process does that is to be killed: one VM after the other.
pub fn worker(seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    loop {
        let config = some_config(&mut random);
        Machine::new(config)?.run()?;
    }
}

fn some_config(random: &mut Random) -> Config {
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

/// Demands that no vCPU is metered and none ran unmetered; how many are gone.
fn nothing_is_left() -> Result<u64> {
    let meter = Meter::read()?;
    ensure!(
        meter.vcpus.is_empty(),
        "{} ledgers are left of vCPUs that are gone",
        meter.vcpus.len()
    );
    ensure!(meter.unmetered == 0, "{} ran unmetered", meter.unmetered);
    Ok(meter.gone)
}

/// Two threads make VMs and run them; every tenth VM is asked for vCPUs that it cannot have, and
/// every seventh is never run.
fn come_and_go(count: u64) -> Result<()> {
    let span = Span::begin()?;
    let before = nothing_is_left()?;
    let started = Instant::now();
    let (mut refused, mut vcpus) = (0, 0);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..2_u64)
            .map(|seed| {
                scope.spawn(move || -> Result<(u64, u64)> {
                    let mut random = Random::new(seed + 1);
                    let (mut refused, mut vcpus) = (0, 0);
                    for number in 0..count / 2 {
                        let config = some_config(&mut random);
                        vcpus += u64::from(config.vcpus);
                        let mut machine = Machine::new(config)?;
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
            let ended = thread.join().ok().context("a thread panicked")??;
            refused += ended.0;
            vcpus += ended.1;
        }
        anyhow::Ok(())
    })?;
    let after = nothing_is_left()?;
    let exits: u64 = span.end()?.values().sum();
    // A vCPU that came to nothing is destroyed before its first event, or is seen to go as well.
    ensure!(
        (vcpus..=vcpus + refused).contains(&(after - before)),
        "{vcpus} vCPUs came and {refused} came to nothing, and {} went",
        after - before
    );
    println!(
        "{count} VMs with {vcpus} vCPUs in {:.0} s, {refused} vCPUs refused half-way; {exits} exits, all in the totals",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// A vCPU that KVM has made already, and takes back.
fn without_a_file() -> Result<()> {
    const TIMES: u32 = 1000;
    let span = Span::begin()?;
    let before = nothing_is_left()?;
    let mut machine = Machine::new(Config::new(Program::OutUser, Mode::Long, 50))?;
    for _ in 0..TIMES {
        machine.ask_for_vcpu_without_a_file()?;
    }
    machine.run()?;
    let meter = Meter::read()?;
    ensure!(
        meter.vcpus.len() == 1,
        "{} vCPUs are metered instead of 1",
        meter.vcpus.len()
    );
    drop(machine);
    let gone = nothing_is_left()? - before;
    span.end()?;
    println!("{TIMES} vCPUs taken back at once, {gone} vCPUs gone");
    Ok(())
}

/// Processes with VMs, each of which is killed when it has run for up to 120 ms.
fn killed(count: u64) -> Result<()> {
    let span = Span::begin()?;
    nothing_is_left()?;
    let mut random = Random::new(7);
    for seed in 0..count {
        let mut child = child(&["--worker", &seed.to_string()])?;
        thread::sleep(Duration::from_micros(random.below(120_000)));
        ensure!(
            child.try_wait()?.is_none(),
            "the process ended before it was killed"
        );
        child.kill()?;
        child.wait()?;
    }
    // The last of a VM may be put off to a worker of the kernel.
    thread::sleep(Duration::from_secs(1));
    let gone = nothing_is_left()?;
    let exits: u64 = span.end()?.values().sum();
    ensure!(exits > count, "{exits} exits are too few");
    println!("{count} processes killed, {gone} vCPUs gone; {exits} exits, all in the totals");
    Ok(())
}

/// This program as a process of its own.
fn child(arguments: &[&str]) -> Result<Child> {
    Command::new(env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("a process cannot be started")
}

/// VMs of 15 vCPUs where 8 may be metered.
fn past_the_limit() -> Result<()> {
    let rounds = part_of(200);
    for round in 1..=rounds {
        let many = Config {
            vcpus: 15,
            ..Config::new(Program::OutUser, Mode::Long, 20)
        };
        let mut machine = Machine::new(many)?;
        machine.run()?;
        let meter = Meter::read()?;
        ensure!(
            meter.own().len() == 8 && meter.unmetered == 7 * round,
            "round {round}: of 15 vCPUs {} are metered, and {} ran unmetered so far",
            meter.own().len(),
            meter.unmetered
        );
        drop(machine);
        // There is room again, and who finds it is metered whole.
        is_metered_whole()?;
    }
    println!("{rounds} times 15 vCPUs where 8 may be metered");
    // The count of those unmetered does not fall: the next case is to find a new module.
    module::unload()
}

/// Where one may be metered, more others than the meter keeps a note of.
///
/// They never enter a guest, which would take more memory than a host has: reading the registers
/// of a vCPU loads it as well.
fn past_all_notes() -> Result<()> {
    const NOTES: u64 = 4096;
    const VMS: u64 = 9;
    const EACH: u64 = 500;
    const VCPUS: u64 = VMS * EACH;
    const { assert!(VCPUS > NOTES + 100) };
    may_open_files(VCPUS + 100)?;
    let loaded = module::Loaded::with("log_queries=0 max_vcpus=1")?;
    let kvm = Kvm::new()?;
    let vm_of = |count| {
        let vm = kvm.create_vm()?;
        let vcpus: Result<Vec<_>, _> = (0..count).map(|id| vm.create_vcpu(id)).collect();
        anyhow::Ok((vm, vcpus?))
    };
    let first = vm_of(1)?;
    let others = (0..VMS).map(|_| vm_of(EACH)).collect::<Result<Vec<_>>>()?;
    Meter::check_counts(1, VCPUS, 0)?;

    // There is room again, for none of these.
    drop(first);
    for vcpu in others.iter().flat_map(|(_, vcpus)| vcpus) {
        vcpu.get_regs()?;
    }
    Meter::check_counts(0, VCPUS, 1)?;
    is_metered_whole()?;
    Meter::check_counts(0, VCPUS, 2)?;

    // They go, and are loaded once more as they do; then all is as it was at first.
    drop(others);
    Meter::check_counts(0, VCPUS, 2)?;
    is_metered_whole()?;
    let again = vm_of(4)?;
    Meter::check_counts(1, VCPUS + 3, 3)?;
    drop(again);
    Meter::check_counts(0, VCPUS + 3, 4)?;
    println!(
        "{VCPUS} vCPUs unmetered at a time, each counted once; none of them was metered later"
    );
    loaded.unload()
}

/// A VM is the file's, not the process's that made it: it goes when the last one who holds it does.
fn inherited() -> Result<()> {
    let span = Span::begin()?;
    nothing_is_left()?;
    let mut maker = child(&["--bequeath"])?;
    let mut said = String::new();
    let mut output = maker.stdout.take().context("its output was asked for")?;
    // The heir holds the pipe until it ends, so this waits for both.
    output.read_to_string(&mut said)?;
    ensure!(maker.wait()?.success(), "the maker of the VM failed");
    ensure!(
        said.trim() == "the heir holds 1 vCPU",
        "the heir of a VM said '{said}'"
    );
    thread::sleep(Duration::from_millis(500));
    nothing_is_left()?;
    let exits: u64 = span.end()?.values().sum();
    println!("{exits} exits of a VM whose maker ended before it, all in the totals");
    Ok(())
}

/// Makes a VM, runs it, and ends, leaving it to a child that looks whether it is still metered.
pub fn bequeath() -> Result<()> {
    let mut machine = Machine::new(Config::new(Program::OutUser, Mode::Long, 50))?;
    machine.run()?;
    let maker = std::process::id();
    // SAFETY: The threads of `run` have ended, so this process has one thread alone.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => {
            while std::os::unix::process::parent_id() == maker {
                thread::sleep(Duration::from_millis(10));
            }
            let meter = Meter::read()?;
            let held = meter.vcpus.iter().filter(|vcpu| vcpu.pid == maker).count();
            println!("the heir holds {held} vCPU");
            Ok(())
        }
        _ => {
            // Gone without giving the VM up: that is the heir's now.
            std::mem::forget(machine);
            Ok(())
        }
    }
}
