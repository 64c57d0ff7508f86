// SPDX-License-Identifier: GPL-2.0

//! The tool `exitmeter` tells what the snapshot holds.

use std::{fs, process::Command, time::Duration};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{reader::Snapshot, reasons};
use serde_json::Value;
use tiny_guests::{Config, Machine, Mode, Program};

use super::Case;
use crate::host::{
    self,
    held_command::{self, HeldCommand},
    hist::Exits,
    linux::Linux,
    meter::Meter,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "tool: exitmeter report tells what the snapshot holds",
            report,
        ),
        Case::with_module(
            "",
            "tool: the difference of two snapshots holds what happened between them",
            difference,
        ),
        Case::with_module(
            "",
            "tool: exitmeter record and plot tell what the device did",
            record,
        ),
        Case::with_module(
            "",
            "tool: exitmeter record --why has the port of a guest, and the OUT that was slow",
            details,
        ),
        Case::with_module(
            "",
            "tool: a VM is found by the name that its VMM was given",
            by_name,
        )
        .with_linux()
        .within(240),
        Case::with_module(
            "log_queries=0",
            "tool: a Linux guest reads its exits, and those of a command, without the tool's own",
            in_guest,
        )
        .with_linux()
        .within(240),
    ]
}

fn report() -> Result<()> {
    // One VM that is gone, one that lives.
    Machine::new(Config::new(Program::Invd, Mode::Long, 40))?.run()?;
    let mut machine = Machine::new(Config {
        vcpus: 2,
        ..Config::new(Program::Cpuid, Mode::Long, 300)
    })?;
    machine.run()?;
    let meter = Meter::read()?;
    let report: Value = serde_json::from_str(&tool(&["report", "--json"])?)
        .context("exitmeter report --json prints no JSON")?;
    let text = tool(&["report"])?;
    drop(machine);

    let vms = report["vms"].as_array().context("there are VMs")?;
    ensure!(vms.len() == 1, "the tool tells of {} VMs", vms.len());
    let name = format!("kvm-{}", std::process::id());
    ensure!(
        vms[0]["name"] == name && text.contains(&name),
        "the tool calls the VM {}",
        vms[0]["name"]
    );
    let vcpus = vms[0]["vcpus"].as_array().context("there are vCPUs")?;
    let own = meter.own();
    ensure!(
        vcpus.len() == 2 && own.len() == 2,
        "the tool tells of {} vCPUs, the snapshot of {}",
        vcpus.len(),
        own.len()
    );
    for (told, held) in vcpus.iter().zip(own) {
        let ticks: u64 = told["cycles"]
            .as_object()
            .context("there are cycles")?
            .values()
            .filter_map(Value::as_u64)
            .sum();
        ensure!(
            told["vcpu"] == held.id && exits(told)? == held.numbers.exits && ticks == held.life,
            "the tool tells {told} of a vCPU, and the snapshot holds {held:?}"
        );
    }
    let gone = &report["departed"];
    ensure!(
        gone["vcpus_gone"] == meter.gone && exits(gone)? == meter.totals.exits,
        "the tool tells {gone} of those that are gone, and the snapshot holds {:?}",
        meter.totals
    );
    let cpuid = host::pick(10, 0x72)?;
    ensure!(
        text.lines().any(|line| {
            line.contains("CPUID") && line.contains(&cpuid.to_string()) && line.contains("600")
        }),
        "the report has no line of 600 CPUID exits:\n{text}"
    );
    Ok(())
}

fn difference() -> Result<()> {
    let cpuid = host::pick(10, 0x72)?;
    let [before, after] = ["/tmp/before", "/tmp/after"];
    let mut old = Machine::new(Config::new(Program::Cpuid, Mode::Long, 300))?;
    old.run()?;
    save(before)?;
    let mut new = Machine::new(Config {
        vcpus: 2,
        ..Config::new(Program::Cpuid, Mode::Long, 200)
    })?;
    new.run()?;
    drop(old);
    save(after)?;
    let delta = json(&tool(&["report", "--json", "--diff", before, after])?)?;

    let vms = delta["vms"].as_array().context("there are VMs")?;
    ensure!(vms.len() == 1, "the difference has {} VMs", vms.len());
    let told = exits(&vms[0])?.get(&cpuid).copied();
    ensure!(told == Some(400), "{told:?} CPUID exits instead of 400");
    let gone = &delta["departed"];
    ensure!(
        gone["vcpus_gone"] == 1 && exits(gone)?.is_empty(),
        "of the VM that only went there is {gone}"
    );
    balance(&delta)?;

    // The one that stays does nothing but to wait in user space.
    let lines = tool(&["report", "--json", "--interval", "0.2", "--count", "2"])?;
    let deltas: Vec<Value> = lines.lines().map(json).collect::<Result<_>>()?;
    ensure!(deltas.len() == 2, "{} intervals instead of 2", deltas.len());
    for delta in &deltas {
        balance(delta)?;
        let (vm, ticks) = (&delta["vms"][0], &delta["interval"]["ticks"]);
        let user = vm["vcpus"].as_array().context("there are vCPUs")?.iter();
        ensure!(
            exits(vm)?.is_empty() && user.clone().all(|vcpu| vcpu["cycles"]["user"] == *ticks),
            "of {ticks} ticks of idleness there is {vm}"
        );
    }
    let refused = Command::new("exitmeter")
        .args(["report", "--diff", after, before])
        .output()?;
    ensure!(
        refused.status.code() == Some(1),
        "the difference the other way round ends with {}",
        refused.status
    );
    drop(new);
    Ok(())
}

/// A Linux guest whose VMM has a name and a UUID for it, beside a VM that has none.
fn by_name() -> Result<()> {
    const UUID: &str = "8d3a9a2c-7b0e-4e62-9c1f-0f9c5a7b1e11";
    const RECORDING: &str = "name.rec";
    let options = [
        "--",
        "-name",
        "guest=web,,1,debug-threads=on",
        "-uuid",
        UUID,
    ];
    let linux = Linux::boot(&options)?;
    let pid = linux.pid()?;
    let mut other = Machine::new(Config::new(Program::Cpuid, Mode::Long, 300))?;
    other.run()?;
    let label = format!("web,1 (kvm-{pid})");

    for called in ["web,1", UUID, &pid.to_string(), &format!("kvm-{pid}")] {
        let report = json(&tool(&["report", "--json", "--vm", called])?)?;
        let vms = report["vms"].as_array().context("there are VMs")?;
        ensure!(
            vms.len() == 1 && vms[0]["pid"] == pid && vms[0]["name"] == format!("kvm-{pid}"),
            "of {called} there is {vms:?}"
        );
        let told = &vms[0]["vmm"];
        ensure!(
            told["name"] == "web,1" && told["uuid"] == UUID && told["manager"] == "qemu",
            "the VMM was told {told}"
        );
    }
    let text = tool(&["report"])?;
    let own = format!("\nkvm-{}, process", std::process::id());
    ensure!(
        text.contains(&format!("\n{label}, process {pid}: ")) && text.contains(&own),
        "the report has no VM {label}, or none without a name:\n{text}"
    );
    for command in ["why", "slow"] {
        let told = tool(&[command, "--vm", "web,1", "--", "sleep", "0.3"])?;
        ensure!(told.contains(&label), "exitmeter {command} says\n{told}");
    }

    // The recording has the name when its process is gone.
    let record = [
        "record",
        "--output",
        RECORDING,
        "--interval",
        "20",
        "--",
        "sleep",
        "0.3",
    ];
    tool(&record)?;
    linux.stop()?;
    drop(other);
    let plot = [
        "plot", RECORDING, "--output", "-", "--format", "html", "--vm", "web,1",
    ];
    let page = tool(&plot)?;
    ensure!(page.contains(&label), "the recording has no VM {label}");
    let refused = Command::new("exitmeter")
        .args(["report", "--vm", "web,1"])
        .output()?;
    ensure!(
        refused.status.code() == Some(1),
        "a VM that is gone is found: {}",
        refused.status
    );
    Ok(())
}

/// Saves a snapshot.
fn save(path: &str) -> Result<()> {
    let bytes = fs::read("/dev/exitmeter").context("there is no snapshot")?;
    fs::write(path, bytes).with_context(|| format!("cannot write {path}"))
}

/// Each vCPU's ticks must sum to the time that the report is of.
fn balance(report: &Value) -> Result<()> {
    let vms = report["vms"].as_array().context("there are VMs")?;
    for vcpu in vms.iter().filter_map(|vm| vm["vcpus"].as_array()).flatten() {
        let cycles = vcpu["cycles"].as_object().context("there are cycles")?;
        let sum: u64 = cycles.values().filter_map(Value::as_u64).sum();
        let [first, last] = ["first_tsc", "last_tsc"].map(|field| vcpu[field].as_u64());
        ensure!(
            first
                .zip(last)
                .is_some_and(|(first, last)| sum == last - first),
            "{sum} ticks do not balance in {vcpu}"
        );
    }
    Ok(())
}

/// What the tool causes besides, its start for one, is the same each time; so only its own
/// questions can make a difference.
fn in_guest() -> Result<()> {
    let file = file()?;
    let linux = Linux::boot(&["--file", &file])?;
    let cpuid = host::pick(10, 0x72)?;
    let count = |told: &Value| -> Result<u64> {
        let count = exits(told)?.get(&cpuid).copied();
        count.context("there is no CPUID exit")
    };

    let mut sweeps = Vec::new();
    for _ in 0..4 {
        let sweep = json(&linux.run("exitmeter guest --json")?)?;
        let queries = sweep["queries"].as_u64().context("there are queries")?;
        sweeps.push((count(&sweep)?, queries));
    }
    alike_between(&sweeps)?;

    // What a command causes: a sweep differs from no sweep by its questions.
    let stat = |command: &str| -> Result<Value> {
        let line = format!("exitmeter stat --json -o /tmp/stat -- {command}; cat /tmp/stat");
        json(&linux.run(&line)?)
    };
    let none = stat("exitmeter reasons >/tmp/out")?;
    let sweep = stat("exitmeter guest --json >/tmp/out")?;
    let own = json(&linux.run("cat /tmp/out")?)?["queries"].as_u64();
    let [none, sweep] = [&none, &sweep].map(|told| mean(told, cpuid));
    ensure!(
        own.is_some() && sweep.zip(none).map(|(sweep, none)| sweep - none) == own,
        "a sweep of {own:?} questions is told as {sweep:?} CPUID exits, none as {none:?}"
    );

    let status = linux.run(
        "exitmeter stat -r 2 -o /tmp/stat -- sh -c 'exit 7'; echo $?; \
         exitmeter stat -o /tmp/stat -- sh -c 'kill -TERM $$'; echo $?; \
         exitmeter stat -- /nowhere 2>/dev/null; echo $?; \
         (sleep 1; killall -TERM exitmeter) & exitmeter stat -o /tmp/stat -- sleep 60; echo $?",
    )?;
    let status: Vec<&str> = status.lines().collect();
    ensure!(
        status == ["7", "143", "127", "143"],
        "the tool ends with {status:?}"
    );
    linux.stop()
}

/// The tool as a file for a guest.
pub(super) fn file() -> Result<String> {
    let path = output(Command::new("sh").args(["-c", "command -v exitmeter"]))?;
    Ok(format!("{}:/usr/bin/exitmeter", path.trim()))
}

/// How many exits of a reason a command caused.
pub(super) fn mean(told: &Value, code: u32) -> Option<u64> {
    let reasons = told["reasons"].as_array()?;
    let reason = reasons.iter().find(|reason| reason["code"] == code)?;
    // Of one run, so it is a whole number.
    Some(reason["exits"]["mean"].as_f64()? as u64)
}

pub(super) fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("the tool prints no JSON: {text}"))
}

/// A VM comes, runs and stays while it is recorded; the sums of what the recording says it did
/// are what the device says at the end.
fn record() -> Result<()> {
    const RECORDING: &str = "tool.rec";
    let command = HeldCommand::new("record")?;
    let mut recorder = Command::new("exitmeter")
        .args(["record", "--output", RECORDING, "--interval", "5", "--"])
        .args(command.words())
        .spawn()
        .context("the tool exitmeter cannot be run")?;
    command.wait()?;
    let mut machine = Machine::new(Config {
        vcpus: 2,
        ..Config::new(Program::Cpuid, Mode::Long, 5000)
    })?;
    machine.run()?;
    let meter = Meter::read()?;
    command.end()?;
    let status = recorder.wait()?;
    drop(machine);
    ensure!(
        status.code() == Some(held_command::STATUS),
        "exitmeter record does not end as its command did: {status}"
    );

    let name = format!("kvm-{}", std::process::id());
    let page = [
        "plot", RECORDING, "--output", "-", "--format", "html", "--vm", &name,
    ];
    let page = tool(&page)?;
    let mut held = Exits::new();
    for vcpu in meter.own() {
        for (code, exits) in &vcpu.numbers.exits {
            *held.entry(*code).or_default() += exits;
        }
    }
    ensure!(
        held.get(&host::pick(10, 0x72)?) >= Some(&10_000),
        "the VM has not exited as it should: {held:?}"
    );
    let told: Exits = page.lines().filter_map(row).collect();
    ensure!(
        told == held,
        "the recording tells {told:?} of the VM, and the device {held:?}"
    );
    Ok(())
}

/// A guest writes to one port that its VMM answers, once after a pause; the picture of what its exits
/// were about names the port with its count, and the slow exits have that one first.
fn details() -> Result<()> {
    const RECORDING: &str = "why.rec";
    const OUTS: u32 = 2000;
    const PAUSE: Duration = Duration::from_millis(400);
    let command = HeldCommand::new("details")?;
    let mut recorder = Command::new("exitmeter")
        .args(["record", "--why", "--output", RECORDING])
        .args(["--interval", "20", "--"])
        .args(command.words())
        .spawn()
        .context("the tool exitmeter cannot be run")?;
    command.wait()?;
    ensure!(has_tables()?, "exitmeter record --why turns no details on");
    let mut machine = Machine::new(Config {
        pause: PAUSE,
        pause_on: Some(1000),
        ..Config::new(Program::OutUser, Mode::Long, OUTS)
    })?;
    machine.run()?;
    command.end()?;
    let status = recorder.wait()?;
    drop(machine);
    ensure!(
        status.code() == Some(held_command::STATUS),
        "exitmeter record --why ends with {status}"
    );
    ensure!(!has_tables()?, "details are on after it has recorded");

    let page = tool(&["plot", RECORDING, "--output", "-", "--format", "html"])?;
    let name = reasons::name(host::isa()?, host::pick(30, 0x7b)?).context("the reason's name")?;
    let row = format!("<tr><td>{name}</td><td>OUT 0x3f0 ");
    let row = page.lines().find(|line| line.starts_with(&row));
    let row = row.with_context(|| format!("no row of port 0x3f0:\n{page}"))?;
    ensure!(
        row.contains("<td>2,000</td>") && row.ends_with("<td>exact</td></tr>"),
        "of 2000 OUTs the page has {row}"
    );
    let led = page.find("<h2>What exits were about").context("details")?;
    let first = page[led..]
        .lines()
        .find(|line| line.starts_with("<tr><td>"));
    ensure!(first == Some(row), "what leads is {first:?}, not {row}");
    let slow = page.find("<h2>The slowest exits").context("slow exits")?;
    // On a host that is emulated others may be as long.
    let mut exits = page[slow..].lines();
    ensure!(
        exits.any(|line| {
            let mut cells = line.split("</td><td>");
            let [exit, took] = [1, 2].map(|skipped| cells.nth(skipped).unwrap_or_default());
            exit.starts_with(&format!("{name} OUT 0x3f0 "))
                && line.ends_with("<td>KVM_EXIT_IO</td></tr>")
                && seconds(took).is_some_and(|took| took >= PAUSE.as_secs_f64() * 0.99)
        }),
        "no slow exit is the OUT on which the VMM slept:\n{}",
        &page[slow..]
    );
    let svg = tool(&[
        "plot", RECORDING, "--output", "-", "--format", "svg", "--kind", "details",
    ])?;
    ensure!(
        svg.contains(&format!("<title>{name}: OUT 0x3f0 ")),
        "the picture does not name the port:\n{svg}"
    );
    Ok(())
}

/// Seconds of a time as the page tells it.
fn seconds(text: &str) -> Option<f64> {
    let (number, unit) = text.split_once(' ')?;
    let unit = match unit {
        "s" => 1.0,
        "ms" => 1e-3,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * unit)
}

/// Return true if the device's snapshots have tables now.
fn has_tables() -> Result<bool> {
    let bytes = fs::read("/dev/exitmeter").context("there is no snapshot")?;
    Ok(Snapshot::parse(&bytes)?.has_tables())
}

/// Code and exits of a row of the page's table.
fn row(line: &str) -> Option<(u32, u64)> {
    let cells = line.strip_prefix("<tr><td>")?;
    let mut cells = cells.split("</td><td>");
    let code = cells.next()?.parse().ok()?;
    let exits = cells.nth(1)?.replace(',', "").parse().ok()?;
    (exits != 0).then_some((code, exits))
}

/// Exits by reason, of what has them in the tool's JSON.
pub(super) fn exits(ledger: &Value) -> Result<Exits> {
    let rows = ledger["reasons"].as_array().context("there are reasons")?;
    let mut exits = Exits::new();
    for row in rows {
        let count = row["exits"].as_u64().context("a number of exits")?;
        if row["kind"] == "code" && count != 0 {
            let code = row["code"].as_u64().context("a code")?;
            exits.insert(u32::try_from(code)?, count);
        }
    }
    Ok(exits)
}

fn tool(arguments: &[&str]) -> Result<String> {
    output(Command::new("exitmeter").args(arguments))
}

/// What a command prints that must succeed.
fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("{command:?} cannot be run"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Demand that as many CPUID exits came between each two sweeps, given as CPUID exits that a sweep
/// tells, and its own.
pub(super) fn alike_between(sweeps: &[(u64, u64)]) -> Result<()> {
    let between: Vec<u64> = sweeps
        .windows(2)
        .map(|pair| pair[1].0 - pair[0].0 - pair[0].1)
        .collect();
    ensure!(
        between.iter().all(|exits| *exits == between[0]),
        "between sweeps (exits, own exits) {sweeps:?} there were {between:?} CPUID exits"
    );
    Ok(())
}
