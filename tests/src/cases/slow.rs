// SPDX-License-Identifier: GPL-2.0

//! The list of slowest exits, and the ring that freezes when an exit takes too long.

use std::time::Duration;

use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use tiny_guests::{pin, Config, Mode, Program, TinyVm};

use super::Case;
use crate::host::{tool, KVM_EXIT_IO, VMM_PORT};

/// Sleep of the VMM on one OUT. It is longer than any other exit on an emulated host with a debug
/// kernel and other work.
const PAUSE: Duration = Duration::from_millis(500);
/// Length of the guest's HLTs. It is longer than any exit on an emulated host.
const SLEEP: Duration = Duration::from_millis(300);
/// Number of the OUT on which the VMM sleeps.
const SLOW_OUT: u64 = 150;
/// Total number of OUTs.
const OUTS: u32 = 200;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "details=1 slow_us=400000",
            "slow: the OUT on which the VMM sleeps is named, with the exits before it",
            vmm_sleeps,
        ),
        Case::with_module(
            "details=1 slow_us=200000",
            "slow: a guest's sleep in HLT does not make an exit slow",
            guest_sleeps,
        ),
    ]
}

/// Run `exitmeter slow --json`, and return its output about the only VM, and the TSC's frequency in
/// kHz.
fn run_slow() -> Result<(Value, u64)> {
    let output = tool::json(&tool::run(&["slow", "--json"])?)?;
    let khz = output["host"]["tsc_khz"]
        .as_u64()
        .context("the TSC's frequency")?;
    let vms = output["vms"].as_array().context("VMs")?;
    ensure!(vms.len() == 1, "{} VMs", vms.len());
    Ok((vms[0].clone(), khz))
}

fn array<'a>(value: &'a Value, name: &str) -> Result<&'a Vec<Value>> {
    value[name].as_array().with_context(|| format!("no {name}"))
}

fn number(value: &Value, name: &str) -> Result<u64> {
    value[name]
        .as_u64()
        .with_context(|| format!("no {name} in {value}"))
}

/// Check that an exit is the OUT on which the VMM slept.
pub(super) fn check_slow_exit(exit: &Value, khz: u64) -> Result<()> {
    ensure!(
        exit["detail"]["kind"] == "port" && exit["detail"]["port"] == VMM_PORT,
        "{exit}"
    );
    ensure!(exit["detail"]["input"] == false, "{exit}");
    ensure!(exit["exit_reason"] == KVM_EXIT_IO, "{exit}");
    let (user, took) = (number(exit, "user")?, number(exit, "took")?);
    let least = PAUSE.as_millis() as u64 * khz;
    ensure!(user >= least, "user: {user} ticks of at least {least}");
    let others = number(exit, "kernel")? + number(exit, "preempted")? + number(exit, "waiting")?;
    ensure!(took == user + others, "{exit}");
    ensure!(number(exit, "halted")? == 0, "{exit}");
    Ok(())
}

/// Return a guest whose VMM sleeps on one of its OUTs.
pub(super) fn sleeper_config() -> Config {
    Config {
        vmm_pause: PAUSE,
        vmm_pause_on: Some(SLOW_OUT),
        ..Config::new(Program::OutUser, Mode::Long, OUTS)
    }
}

fn vmm_sleeps() -> Result<()> {
    let mut machine = TinyVm::new(sleeper_config())?;
    machine.run_with(|_| pin(0))?;
    let (vm, khz) = run_slow()?;
    drop(machine);

    let slowest = array(&vm, "slowest")?;
    ensure!(slowest.len() == 16, "{} of the slowest", slowest.len());
    let took: Vec<_> = slowest
        .iter()
        .map(|exit| number(exit, "took"))
        .collect::<Result<_>>()?;
    ensure!(took.is_sorted_by(|one, next| one >= next), "{took:?}");
    // On an emulated host other exits may be as long.
    let pauses = slowest
        .iter()
        .filter(|exit| check_slow_exit(exit, khz).is_ok());
    let pauses: Vec<_> = pauses.collect();
    ensure!(!pauses.is_empty(), "the slow OUT is not among {slowest:?}");
    ensure!(pauses
        .iter()
        .all(|exit| exit["cpu_exit"] == 0 && exit["cpu_entry"] == 0));
    ensure!(pauses
        .iter()
        .all(|exit| exit["rip"].is_string() && exit["when"].is_string()));

    let rings = array(&vm, "rings")?;
    ensure!(
        rings.len() == 1 && rings[0]["frozen"] == true,
        "no ring is frozen"
    );
    let exits = array(&rings[0], "exits")?;
    ensure!(exits.len() == 64, "{} exits in the ring", exits.len());
    let (culprit, before) = exits.split_last().context("exits")?;
    ensure!(culprit["culprit"] == true);
    check_slow_exit(culprit, khz)?;
    // The exits before it are of the same loop, with consecutive numbers and increasing times.
    ensure!(before.iter().all(|exit| exit["culprit"] == false));
    for (one, next) in exits.iter().zip(&exits[1..]) {
        ensure!(number(one, "sequence")? + 1 == number(next, "sequence")?);
        ensure!(number(one, "tsc")? + number(one, "took")? < number(next, "tsc")?);
    }
    let outs = before
        .iter()
        .filter(|exit| exit["detail"]["port"] == VMM_PORT)
        .count();
    ensure!(outs > 32, "{outs} OUTs before it");
    Ok(())
}

fn guest_sleeps() -> Result<()> {
    let mut machine = TinyVm::new(Config {
        hlt_time: SLEEP,
        ..Config::new(Program::HltKernel, Mode::Long, 4)
    })?;
    machine.run()?;
    let (vm, khz) = run_slow()?;
    drop(machine);
    let slowest = array(&vm, "slowest")?;
    let halts: Vec<_> = slowest
        .iter()
        .filter(|exit| exit["name"] == "HLT")
        .collect();
    let asleep = SLEEP.as_millis() as u64 * khz;
    let slept = halts.iter().map(|exit| number(exit, "halted"));
    let slept: u64 = slept.sum::<Result<_>>()?;
    ensure!(
        slept >= 3 * asleep - asleep / 2,
        "{slept} ticks asleep of 4 times {asleep}"
    );
    for exit in slowest {
        let took = number(exit, "took")?;
        ensure!(took < asleep / 2, "{took} ticks: {exit}");
    }
    ensure!(
        vm["rings"][0]["frozen"] == false,
        "the ring froze for {}",
        vm["rings"][0]
    );
    Ok(())
}
