// SPDX-License-Identifier: GPL-2.0

//! The ledger balances to the tick, and shows the phase in which the time went.
//!
//! That it balances, and that each exit has its sample in the histogram, is checked by every
//! reading of the meter; the cases here say for whom.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::phase::Phase;
use serde_json::Value;
use tiny_guests::{pin, Config, Machine, Mode, Program};

use super::{no_userfaultfd, Case};
use crate::host::{
    self,
    cgroup::FrozenProcess,
    linux::Linux,
    meter::{Meter, Vcpu},
    task::BusyThread,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module("", "phases: a guest that computes is in the guest", || {
            // Some 400 ms. All that is not the guest is the host's clock, 250 times a
            // second, and the making of the VM: some percent.
            let vcpus = run(Config::new(
                Program::Spin,
                Mode::Long,
                100_000_000 * host::slowdown(),
            ))?;
            at_least(&vcpus[0], Phase::Guest, most())
        }),
        Case::with_module("", "phases: a guest that sleeps in HLT is halted", || {
            // 100 HLTs of 10 ms each. KVM polls for up to 0.2 ms before it puts the vCPU to
            // sleep, and the rest is the making of the VM.
            let vcpus = run(Config {
                wake: Duration::from_millis(10),
                ..Config::new(Program::HltKernel, Mode::Long, 100 * host::slowdown())
            })?;
            at_least(&vcpus[0], Phase::Halted, most())
        }),
        Case::with_module(
            "",
            "phases: a vCPU whose memory the host has yet to bring is waiting",
            waits_for_memory,
        )
        .skip_if(no_userfaultfd),
        Case::with_module("", "phases: a slow VMM is in user space", || {
            // 100 exits, on each of which the VMM sleeps 10 ms with the vCPU given back.
            let vcpus = run(Config {
                pause: Duration::from_millis(10),
                ..Config::new(Program::OutUser, Mode::Long, 100)
            })?;
            at_least(&vcpus[0], Phase::User, most())?;
            let numbers = &vcpus[0].numbers;
            let asleep = numbers.share(Phase::Halted) + numbers.share(Phase::Waiting);
            ensure!(
                asleep < 0.05,
                "a VMM that sleeps is no vCPU that is halted: {}",
                vcpus[0].numbers.shares()
            );
            Ok(())
        }),
        Case::with_module(
            "",
            "phases: a VM that is stopped, frozen or suspended is in user space",
            held,
        )
        .with_linux()
        .within(240),
        Case::with_module(
            "",
            "phases: a guest beside a busy task is preempted",
            || {
                // The guest computes some 200 ms and shares its CPU with one more task of the
                // same weight: half of the time is the other's. Slices of some ms and what else
                // the host runs move that, but not below a quarter nor above three.
                let busy = BusyThread::on(0);
                let vcpus = run(Config::new(Program::Spin, Mode::Long, 50_000_000))?;
                busy.end()?;
                at_least(&vcpus[0], Phase::Preempted, 0.25)?;
                at_least(&vcpus[0], Phase::Guest, 0.2)
            },
        ),
        Case::with_module("", "phases: each of 2 vCPUs balances", || {
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
                // On one CPU each waits for the other, on two neither does; neither sleeps.
                ensure!(idle < 0.2, "vCPU {}: {}", vcpu.id, vcpu.numbers.shares());
            }
            Ok(())
        }),
        Case::with_module(
            "copy_tries=0 log_queries=0",
            "phases: copies that interrupt the vCPU's CPU balance, and lose nothing",
            copies_by_interrupt,
        ),
        Case::with_module("", "phases: each of 4 vCPUs that roam balances", || {
            // More vCPUs than CPUs, each on another CPU after each exit.
            let mut machine = Machine::new(Config {
                vcpus: 4,
                roam: true,
                ..Config::new(Program::OutUser, Mode::Long, 1000)
            })?;
            machine.run()?;
            let meter = Meter::read()?;
            let io = host::pick(30, 0x7b)?;
            let own = meter.own();
            let exits: Vec<u64> = own.iter().map(|vcpu| vcpu.numbers.exits_of(io)).collect();
            ensure!(exits == [1001; 4], "they count {exits:?} exits of OUT");
            Ok(())
        }),
        Case::with_module(
            "",
            "phases: a vCPU's numbers outlive it in the totals",
            || {
                let before = Meter::read()?;
                let mut machine = Machine::new(Config::new(Program::Cpuid, Mode::Long, 1000))?;
                machine.run()?;
                let alive = Meter::read()?;
                drop(machine);
                let after = Meter::read()?;
                ensure!(
                    after.own().is_empty() && after.gone == before.gone + 1,
                    "{} vCPUs live and {} are gone after {} were",
                    after.own().len(),
                    after.gone,
                    before.gone
                );
                ensure!(
                    alive.exits() == after.exits(),
                    "its exits were {:?} and are {:?}",
                    alive.exits(),
                    after.exits()
                );
                // KVM loads a vCPU once more to destroy it, so a few ticks may come.
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

/// An idle Linux guest is held in each way. Its vCPU sleeps in KVM then, and has to leave it.
fn held() -> Result<()> {
    const QMP: &str = "/tmp/qmp";
    let qmp = format!("unix:{QMP},server=on,wait=off");
    let linux = Linux::boot(&["--", "-qmp", &qmp])?;
    let pid = linux.pid()?;
    let user = |how: &str| -> Result<()> {
        // The way out of KVM is over.
        thread::sleep(Duration::from_millis(200));
        let pid = pid.to_string();
        let report = Command::new("exitmeter")
            .args([
                "report",
                "--json",
                "--vm",
                &pid,
                "--interval",
                "0.5",
                "--count",
                "1",
            ])
            .output()?;
        let report: Value = serde_json::from_slice(&report.stdout)
            .with_context(|| format!("no JSON of a VM that is {how}"))?;
        let cycles = &report["vms"][0]["cycles"];
        ensure!(
            cycles["user"].as_u64() > Some(0) && cycles["user"] == report["interval"]["ticks"],
            "a VM that is {how} has {cycles}"
        );
        Ok(())
    };
    let idle = || -> Result<()> {
        // It runs on.
        let text = linux.run("sleep 0.5; echo here")?;
        ensure!(text == "here\n", "the guest says {text:?}");
        Ok(())
    };
    idle()?;
    let signal = |signal| {
        // SAFETY: A system call without memory.
        let ret = unsafe { libc::kill(pid as i32, signal) };
        ensure!(ret == 0, "the VMM takes no signal");
        Ok(())
    };
    signal(libc::SIGSTOP)?;
    user("stopped")?;
    signal(libc::SIGCONT)?;
    idle()?;

    let cgroup = FrozenProcess::new(pid)?;
    user("frozen")?;
    drop(cgroup);
    idle()?;

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
    user("suspended")?;
    ask("cont")?;
    idle()?;
    linux.stop()
}

/// KVM sleeps in a page fault, as for memory that is swapped out or still on another host.
fn waits_for_memory() -> Result<()> {
    let (mut machine, absent) = Machine::with_absent_page()?;
    let meanwhile = thread::scope(|scope| {
        let guest = scope.spawn(|| machine.run());
        let meanwhile = (|| {
            absent.wait_until_wanted(Duration::from_secs(10))?;
            thread::sleep(Duration::from_secs(1));
            anyhow::Ok(Meter::read()?.only()?.phase)
        })();
        // Whatever came, nobody is left asleep.
        absent.provide()?;
        guest.join().ok().context("the guest's thread panicked")??;
        meanwhile
    })?;
    ensure!(
        meanwhile == Some(Phase::Waiting),
        "a vCPU that waits for its memory is in phase {meanwhile:?}"
    );
    let meter = Meter::read()?;
    let vcpu = meter.only()?;
    println!("of {} ticks: {}", vcpu.life, vcpu.numbers.shares());
    at_least(vcpu, Phase::Waiting, 0.5)?;
    let halted = vcpu.numbers.phases[Phase::Halted as usize];
    ensure!(halted == 0, "it was halted for {halted} ticks");
    Ok(())
}

/// Snapshots beside a vCPU that floods, each copy by an interrupt: as on a real CPU that exits too
/// fast to be copied otherwise.
fn copies_by_interrupt() -> Result<()> {
    const SNAPSHOTS: u64 = 100;
    let [flooding, other] = match host::cpus()? {
        1 => [0, 0],
        _ => [1, 0],
    };
    let cpuid = host::pick(10, 0x72)?;
    let done = AtomicBool::new(false);
    let mut machine = Machine::new(Config::new(Program::Cpuid, Mode::User, 20_000))?;
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
            // The vCPU was made on another CPU, which is the one to interrupt until it runs.
            let started = Instant::now();
            while Meter::read()?.only()?.numbers.exits_of(cpuid) == 0 {
                ensure!(
                    started.elapsed() < Duration::from_secs(20),
                    "the guest does not run"
                );
            }
            let before = host::function_calls(flooding)?;
            let mut exits = 0;
            for _ in 0..SNAPSHOTS {
                // Each ledger is checked as it is read.
                let now = Meter::read()?.only()?.numbers.exits_of(cpuid);
                ensure!(now >= exits, "the exits fell from {exits} to {now}");
                exits = now;
            }
            Ok(host::function_calls(flooding)? - before)
        })();
        done.store(true, Ordering::Relaxed);
        let rounds = guest.join().ok().context("a guest's thread panicked")?;
        anyhow::Ok((rounds?, result?))
    })?;
    let exits = Meter::read()?.only()?.numbers.exits_of(cpuid);
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

/// Runs a guest on the host's first CPU; its vCPUs after that, which have balanced.
fn run(config: Config) -> Result<Vec<Vcpu>> {
    let mut machine = Machine::new(config)?;
    machine.run_with(|_| pin(0))?;
    let vcpus: Vec<Vcpu> = Meter::read()?.own().into_iter().cloned().collect();
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

/// Most of a life. The host's clock ticks as often on a kernel that checks itself, which takes many
/// times longer for each tick.
fn most() -> f64 {
    match host::slowdown() {
        1 => 0.8,
        _ => 0.5,
    }
}

fn at_least(vcpu: &Vcpu, phase: Phase, share: f64) -> Result<()> {
    ensure!(
        vcpu.numbers.share(phase) >= share,
        "less than {:.0}% of the time is {}: {}",
        100. * share,
        phase.name(),
        vcpu.numbers.shares()
    );
    Ok(())
}
