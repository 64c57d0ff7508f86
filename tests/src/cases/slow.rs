// SPDX-License-Identifier: GPL-2.0

//! The slowest exits, and the ring that freezes when one takes too long.

use std::{process::Command, time::Duration};

use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use tiny_guests::{pin, Config, Machine, Mode, Program};

use super::Case;

/// How long the VMM sleeps on one OUT: longer than any other exit on a host that is emulated, and
/// checks itself, beside other work.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the guest's HLTs last: longer than any exit on a host that is emulated.
const SLEEP: Duration = Duration::from_millis(300);
/// The OUT on which the VMM sleeps.
const SLOW: u64 = 150;
/// OUTs in all.
const OUTS: u32 = 200;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "details=1 slow_us=400000",
            "slow: an OUT on which the VMM sleeps is named, and what came before it",
            the_vmm_sleeps,
        ),
        Case::with_module(
            "details=1 slow_us=200000",
            "slow: the guest's own sleep makes no exit slow",
            the_guest_sleeps,
        ),
    ]
}

/// What `exitmeter slow --json` tells of the one VM.
fn slow() -> Result<(Value, u64)> {
    let output = Command::new("exitmeter")
        .args(["slow", "--json"])
        .output()
        .context("exitmeter cannot be run")?;
    ensure!(
        output.status.success(),
        "exitmeter slow failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let told: Value = serde_json::from_slice(&output.stdout)?;
    let khz = told["host"]["tsc_khz"]
        .as_u64()
        .context("the TSC's frequency")?;
    let vms = told["vms"].as_array().context("VMs")?;
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

/// Demand that an exit is the OUT of all OUTs, on which the VMM slept.
pub(super) fn check_slow_exit(exit: &Value, khz: u64) -> Result<()> {
    ensure!(
        exit["detail"]["kind"] == "port" && exit["detail"]["port"] == 0x3f0,
        "{exit}"
    );
    ensure!(exit["detail"]["input"] == false, "{exit}");
    // KVM_EXIT_IO, by which it came to the VMM.
    ensure!(exit["exit_reason"] == 2, "{exit}");
    let (user, took) = (number(exit, "user")?, number(exit, "took")?);
    let least = PAUSE.as_millis() as u64 * khz;
    ensure!(user >= least, "user: {user} ticks of at least {least}");
    let others = number(exit, "kernel")? + number(exit, "preempted")? + number(exit, "waiting")?;
    ensure!(took == user + others, "{exit}");
    ensure!(number(exit, "halted")? == 0, "{exit}");
    Ok(())
}

/// Return the guest on one of whose OUTs its VMM sleeps.
pub(super) fn sleeper_config() -> Config {
    Config {
        pause: PAUSE,
        pause_on: Some(SLOW),
        ..Config::new(Program::OutUser, Mode::Long, OUTS)
    }
}

fn the_vmm_sleeps() -> Result<()> {
    let mut machine = Machine::new(sleeper_config())?;
    machine.run_with(|_| pin(0))?;
    let (vm, khz) = slow()?;
    drop(machine);

    let slowest = array(&vm, "slowest")?;
    ensure!(slowest.len() == 16, "{} of the slowest", slowest.len());
    let took: Vec<_> = slowest
        .iter()
        .map(|exit| number(exit, "took"))
        .collect::<Result<_>>()?;
    ensure!(took.is_sorted_by(|one, next| one >= next), "{took:?}");
    // On a host that is emulated others may be as long.
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
    // What came before it is the same loop: each exit a number on, at a later time.
    ensure!(before.iter().all(|exit| exit["culprit"] == false));
    for (one, next) in exits.iter().zip(&exits[1..]) {
        ensure!(number(one, "sequence")? + 1 == number(next, "sequence")?);
        ensure!(number(one, "tsc")? + number(one, "took")? < number(next, "tsc")?);
    }
    let outs = before
        .iter()
        .filter(|exit| exit["detail"]["port"] == 0x3f0)
        .count();
    ensure!(outs > 32, "{outs} OUTs before it");
    Ok(())
}

fn the_guest_sleeps() -> Result<()> {
    let mut machine = Machine::new(Config {
        wake: SLEEP,
        ..Config::new(Program::HltKernel, Mode::Long, 4)
    })?;
    machine.run()?;
    let (vm, khz) = slow()?;
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
