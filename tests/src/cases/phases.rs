//! Point 3: the ledger balances to the tick, and shows the phase in which the time went.
//!
//! That it balances, and that each exit has its sample in the histogram, is checked by every
//! reading of the meter; the cases here say for whom.

use std::time::Duration;

use anyhow::{ensure, Result};
use exitmeter_meter::phase::Phase;
use tiny_guests::{pin, Config, Machine, Mode, Program};

use super::Case;
use crate::host::{
    self,
    meter::{Meter, Vcpu},
    task::Busy,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with("", "phases: a guest that computes is in the guest", || {
            // Some 400 ms. All that is not the guest is the host's clock, 250 times a
            // second, and the making of the VM: some percent.
            let vcpus = run(Config::new(
                Program::Spin,
                Mode::Long,
                100_000_000 * host::slow(),
            ))?;
            at_least(&vcpus[0], Phase::Guest, most())
        }),
        Case::with("", "phases: a guest that sleeps in HLT is blocked", || {
            // 100 HLTs of 10 ms each. KVM polls for up to 0.2 ms before it puts the vCPU to
            // sleep, and the rest is the making of the VM.
            let vcpus = run(Config {
                wake: Duration::from_millis(10),
                ..Config::new(Program::HltKernel, Mode::Long, 100 * host::slow())
            })?;
            at_least(&vcpus[0], Phase::Blocked, most())
        }),
        Case::with("", "phases: a slow VMM is in user space", || {
            // 100 exits, on each of which the VMM sleeps 10 ms with the vCPU given back.
            let vcpus = run(Config {
                pause: Duration::from_millis(10),
                ..Config::new(Program::OutUser, Mode::Long, 100)
            })?;
            at_least(&vcpus[0], Phase::User, most())?;
            let blocked = vcpus[0].numbers.share(Phase::Blocked);
            ensure!(
                blocked < 0.05,
                "a VMM that sleeps is no vCPU that is blocked: {}",
                vcpus[0].numbers.shares()
            );
            Ok(())
        }),
        Case::with(
            "",
            "phases: a guest beside a busy task is preempted",
            || {
                // The guest computes some 200 ms and shares its CPU with one more task of the
                // same weight: half of the time is the other's. Slices of some ms and what else
                // the host runs move that, but not below a quarter nor above three.
                let busy = Busy::on(0);
                let vcpus = run(Config::new(Program::Spin, Mode::Long, 50_000_000))?;
                busy.end()?;
                at_least(&vcpus[0], Phase::Preempted, 0.25)?;
                at_least(&vcpus[0], Phase::Guest, 0.2)
            },
        ),
        Case::with("", "phases: each of 2 vCPUs balances", || {
            let vcpus = run(Config {
                vcpus: 2,
                ..Config::new(Program::Spin, Mode::Long, 25_000_000 * host::slow())
            })?;
            ensure!(vcpus.len() == 2, "{} vCPUs are metered", vcpus.len());
            for vcpu in vcpus {
                let idle = vcpu.numbers.share(Phase::User) + vcpu.numbers.share(Phase::Blocked);
                // On one CPU each waits for the other, on two neither does; neither sleeps.
                ensure!(idle < 0.2, "vCPU {}: {}", vcpu.id, vcpu.numbers.shares());
            }
            Ok(())
        }),
        Case::with("", "phases: each of 4 vCPUs that roam balances", || {
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
        Case::with(
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
    match host::slow() {
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
