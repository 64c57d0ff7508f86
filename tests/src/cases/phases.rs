// SPDX-License-Identifier: GPL-2.0

//! Ledgers balance to the tick, and book the time on the right phase.
//!
//! Every [`MeterSnapshot::read`] checks that each ledger balances and that each exit has its sample in the
//! histogram. The cases here provide the situations.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::phase::Phase;
use serde_json::Value;
use tiny_guests::{pin, Config, Mode, Program, TinyVm};

use super::{no_cgroups, no_linux, no_userfaultfd, Case};
use crate::host::{
    self,
    cgroup::FrozenProcess,
    codes,
    linux::Linux,
    meter::{MeterSnapshot, MeteredVcpu},
    task::{self, BusyThread, StoppedProcess},
    tool,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module("", "phases: a computing guest is in phase guest", || {
            // Some 400 ms. The rest is the host's clock, 250 times a second, and the creation of
            // the VM: some percent.
            let vcpus = run(Config::new(
                Program::Spin,
                Mode::Long,
                100_000_000 * host::slowdown(),
            ))?;
            at_least(&vcpus[0], Phase::Guest, most_of_life())
        }),
        Case::with_module("", "phases: a guest that sleeps in HLT is halted", || {
            // 100 HLTs of 10 ms each. KVM polls for up to 0.2 ms before it puts the vCPU to
            // sleep, and the rest is the creation of the VM.
            let vcpus = run(Config {
                hlt_time: Duration::from_millis(10),
                ..Config::new(Program::HltKernel, Mode::Long, 100 * host::slowdown())
            })?;
            at_least(&vcpus[0], Phase::Halted, most_of_life())
        }),
        Case::with_module(
            "",
            "phases: a vCPU whose page the host has yet to provide is waiting",
            waits_for_memory,
        )
        .skip_if(no_userfaultfd),
        Case::with_module(
            "",
            "phases: a vCPU with a slow VMM is in user space",
            || {
                // 100 exits. On each, the VMM sleeps 10 ms outside of KVM_RUN.
                let vcpus = run(Config {
                    vmm_pause: Duration::from_millis(10),
                    ..Config::new(Program::OutUser, Mode::Long, 100)
                })?;
                at_least(&vcpus[0], Phase::User, most_of_life())?;
                let numbers = &vcpus[0].numbers;
                let asleep = numbers.share(Phase::Halted) + numbers.share(Phase::Waiting);
                ensure!(
                    asleep < 0.05,
                    "a vCPU whose VMM sleeps counts as halted or waiting: {}",
                    vcpus[0].numbers.shares()
                );
                Ok(())
            },
        ),
        Case::with_module(
            "",
            "phases: a VM that is stopped, frozen or suspended is in user space",
            stopped_frozen_or_suspended,
        )
        .skip_if(|| Ok(no_linux()?.or(no_cgroups()?)))
        .within(240),
        Case::with_module(
            "",
            "phases: a guest beside a busy task is preempted",
            || {
                // The guest computes for some 200 ms and shares its CPU with a task of the same
                // weight, which gets half of the time. Slices of some ms and other work of the host
                // move that share, but not below one quarter or above three.
                let busy = BusyThread::on(0);
                let vcpus = run(Config::new(Program::Spin, Mode::Long, 50_000_000))?;
                busy.end()?;
                at_least(&vcpus[0], Phase::Preempted, 0.25)?;
                at_least(&vcpus[0], Phase::Guest, 0.2)
            },
        ),
        Case::with_module("", "phases: the ledgers of 2 vCPUs balance", || {
            let vcpus = run(Config {
                vcpus: 2,
                ..Config::new(Program::Spin, Mode::Long, 25_000_000 * host::slowdown())
            })?;
            ensure!(vcpus.len() == 2, "{} vCPUs are metered", vcpus.len());
            for vcpu in vcpus {
                let idle = [Phase::User, Phase::Halted, Phase::Waiting]
                    .map(|phase| vcpu.numbers.share(phase))
                    .iter()
                    .sum::<f64>();
                // On one CPU each is preempted for the other; on two CPUs neither is. None sleeps.
                ensure!(idle < 0.2, "vCPU {}: {}", vcpu.id, vcpu.numbers.shares());
            }
            Ok(())
        }),
        Case::with_module(
            "copy_tries=0 log_queries=0",
            "phases: ledgers copied by an interrupt balance, and lose nothing",
            copies_by_interrupt,
        ),
        Case::with_module(
            "",
            "phases: the ledgers of 4 vCPUs that change CPUs balance",
            || {
                // There are more vCPUs than CPUs, and each changes its CPU after each exit.
                let mut machine = TinyVm::new(Config {
                    vcpus: 4,
                    change_cpus: true,
                    ..Config::new(Program::OutUser, Mode::Long, 1000)
                })?;
                machine.run()?;
                let meter = MeterSnapshot::read()?;
                let io = codes::io()?;
                let own = meter.own();
                let exits: Vec<u64> = own.iter().map(|vcpu| vcpu.numbers.exits_of(io)).collect();
                ensure!(exits == [1001; 4], "they count {exits:?} exits of OUT");
                Ok(())
            },
        ),
        Case::with_module(
            "",
            "phases: the totals keep a departed vCPU's numbers",
            || {
                let before = MeterSnapshot::read()?;
                let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 1000))?;
                machine.run()?;
                let alive = MeterSnapshot::read()?;
                drop(machine);
                let after = MeterSnapshot::read()?;
                ensure!(
                    after.own().is_empty() && after.departed == before.departed + 1,
                    "{} vCPUs live and {} are gone after {} were",
                    after.own().len(),
                    after.departed,
                    before.departed
                );
                ensure!(
                    alive.exits() == after.exits(),
                    "its exits were {:?} and are {:?}",
                    alive.exits(),
                    after.exits()
                );
                // KVM loads a vCPU once more to destroy it, so a few ticks may be added.
                for (phase, (before, after)) in (before.totals.phases.iter())
                    .zip(after.totals.phases)
                    .enumerate()
                {
                    let lived = alive.only()?.numbers.phases[phase];
                    ensure!(
                        after - before >= lived,
                        "phase {phase}: it lived {lived} ticks, of which {} went to the totals",
                        after - before
                    );
                }
                Ok(())
            },
        ),
    ]
}

/// Stop, freeze and suspend an idle Linux guest. Its vCPU sleeps in KVM, and each of these makes it
/// return to user space.
fn stopped_frozen_or_suspended() -> Result<()> {
    const QMP: &str = "/tmp/qmp";
    let qmp = format!("unix:{QMP},server=on,wait=off");
    let linux = Linux::boot(&["--", "-qmp", &qmp])?;
    let pid = linux.pid()?;
    let check_in_user = |how: &str| -> Result<()> {
        // Give the vCPU time to leave KVM.
        thread::sleep(Duration::from_millis(200));
        let pid = pid.to_string();
        let words = [
            "report",
            "--json",
            "--vm",
            &pid,
            "--interval",
            "0.5",
            "--count",
            "1",
        ];
        let report = tool::output(&words)?;
        let report: Value = serde_json::from_slice(&report.stdout)
            .with_context(|| format!("no JSON of a VM that is {how}"))?;
        let cycles = &report["vms"][0]["cycles"];
        ensure!(
            cycles["user"].as_u64() > Some(0) && cycles["user"] == report["interval"]["ticks"],
            "a VM that is {how} has {cycles}"
        );
        Ok(())
    };
    let check_running = || -> Result<()> {
        // Check that the guest still runs.
        let text = linux.run("sleep 0.5; echo here")?;
        ensure!(text == "here\n", "the guest says {text:?}");
        Ok(())
    };
    check_running()?;
    let stopped = StoppedProcess::new(pid)?;
    check_in_user("stopped")?;
    stopped.resume()?;
    check_running()?;

    let frozen = FrozenProcess::new(pid)?;
    check_in_user("frozen")?;
    frozen.thaw()?;
    check_running()?;

    let mut line = UnixStream::connect(QMP).context("the VMM has no QMP")?;
    line.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut answers = BufReader::new(line.try_clone()?).lines();
    let mut ask = |command: &str| -> Result<()> {
        writeln!(line, "{{\"execute\": \"{command}\"}}")?;
        for answer in answers.by_ref() {
            let answer: Value = serde_json::from_str(&answer?)?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            ensure!(answer.get("error").is_none(), "{command}: {answer}");
        }
        bail!("QMP has ended")
    };
    ask("qmp_capabilities")?;
    ask("stop")?;
    check_in_user("suspended")?;
    ask("cont")?;
    check_running()?;
    linux.stop()
}

/// Let KVM sleep in a page fault, as for memory that is swapped out or still on another host.
fn waits_for_memory() -> Result<()> {
    let (mut machine, absent) = TinyVm::with_absent_page()?;
    let phase = thread::scope(|scope| {
        let guest = scope.spawn(|| machine.run());
        let phase = (|| {
            absent.wait_until_wanted(Duration::from_secs(10))?;
            thread::sleep(Duration::from_secs(1));
            anyhow::Ok(MeterSnapshot::read()?.only()?.phase)
        })();
        // On failure, too, wake the vCPU.
        absent.provide()?;
        task::join(guest)?;
        phase
    })?;
    ensure!(
        phase == Some(Phase::Waiting),
        "a vCPU that waits for its memory is in phase {phase:?}"
    );
    let meter = MeterSnapshot::read()?;
    let vcpu = meter.only()?;
    println!("of {} ticks: {}", vcpu.life, vcpu.numbers.shares());
    at_least(vcpu, Phase::Waiting, 0.5)?;
    let halted = vcpu.numbers.phases[Phase::Halted as usize];
    ensure!(halted == 0, "it was halted for {halted} ticks");
    Ok(())
}

/// Take snapshots beside a vCPU that exits in a tight loop, each copy by an interrupt. A real CPU may
/// exit too fast for any other copy.
fn copies_by_interrupt() -> Result<()> {
    const SNAPSHOTS: u64 = 100;
    let [flooding, other] = match host::cpus()? {
        1 => [0, 0],
        _ => [1, 0],
    };
    let cpuid = codes::cpuid()?;
    let done = AtomicBool::new(false);
    let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::User, 20_000))?;
    let (ran, calls) = thread::scope(|scope| {
        let guest = scope.spawn(|| -> Result<u64> {
            pin(flooding)?;
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                machine.run_one(0)?;
                machine.rewind()?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let result = (|| {
            pin(other)?;
            // The vCPU was created on another CPU, which gets the interrupts until the vCPU runs.
            let started = Instant::now();
            while MeterSnapshot::read()?.only()?.numbers.exits_of(cpuid) == 0 {
                ensure!(
                    started.elapsed() < Duration::from_secs(20),
                    "the guest does not run"
                );
            }
            let before = host::function_calls(flooding)?;
            let mut exits = 0;
            for _ in 0..SNAPSHOTS {
                // `MeterSnapshot::read` checks each ledger.
                let now = MeterSnapshot::read()?.only()?.numbers.exits_of(cpuid);
                ensure!(now >= exits, "the exits fell from {exits} to {now}");
                exits = now;
            }
            Ok(host::function_calls(flooding)? - before)
        })();
        done.store(true, Ordering::Relaxed);
        let rounds = task::join(guest);
        anyhow::Ok((rounds?, result?))
    })?;
    let exits = MeterSnapshot::read()?.only()?.numbers.exits_of(cpuid);
    ensure!(
        exits == ran * 20_000,
        "{exits} CPUID exits are metered of {ran} times 20000"
    );
    println!("{calls} interrupts for {SNAPSHOTS} snapshots on CPU {flooding}, {ran} rounds");
    ensure!(
        flooding == other || calls >= SNAPSHOTS,
        "only {calls} interrupts came to CPU {flooding} for {SNAPSHOTS} copies"
    );
    Ok(())
}

/// Run a guest on the host's first CPU to its end, and return its vCPUs.
fn run(config: Config) -> Result<Vec<MeteredVcpu>> {
    let mut machine = TinyVm::new(config)?;
    machine.run_with(|_| pin(0))?;
    let vcpus: Vec<MeteredVcpu> = MeterSnapshot::read()?.own().into_iter().cloned().collect();
    for vcpu in &vcpus {
        ensure!(
            vcpu.phase == Some(Phase::User) && vcpu.name == format!("kvm-{}", vcpu.pid),
            "a vCPU that does not run any more is {} in phase {:?}",
            vcpu.name,
            vcpu.phase
        );
        println!("of {} ticks: {}", vcpu.life, vcpu.numbers.shares());
    }
    Ok(vcpus)
}

/// Return the least share that counts as most of a vCPU's life. It is lower on a debug kernel, where
/// each tick of the host's clock takes many times longer.
fn most_of_life() -> f64 {
    match host::slowdown() {
        1 => 0.8,
        _ => 0.5,
    }
}

fn at_least(vcpu: &MeteredVcpu, phase: Phase, share: f64) -> Result<()> {
    ensure!(
        vcpu.numbers.share(phase) >= share,
        "less than {:.0}% of the time is {}: {}",
        100. * share,
        phase.name(),
        vcpu.numbers.shares()
    );
    Ok(())
}
