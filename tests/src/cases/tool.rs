//! The tool `exitmeter` tells what the snapshot holds.

use std::{fs, process::Command};

use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use tiny_guests::{Config, Machine, Mode, Program};

use super::Case;
use crate::host::{self, hist::Exits, meter::Meter};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with(
            "",
            "tool: exitmeter report tells what the snapshot holds",
            report,
        ),
        Case::with(
            "",
            "tool: exitmeter record and plot tell what the device did",
            record,
        ),
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

/// A VM comes, runs and stays while it is recorded; the sums of what the recording says it did
/// are what the device says at the end.
fn record() -> Result<()> {
    const RECORDING: &str = "tool.rec";
    const STOP: &str = "tool.stop";
    let wait = format!("until [ -e {STOP} ]; do sleep 0.02; done; exit 7");
    let mut recorder = Command::new("exitmeter")
        .args(["record", "--output", RECORDING, "--interval", "5"])
        .args(["--", "sh", "-c", &wait])
        .spawn()
        .context("the tool exitmeter cannot be run")?;
    let mut machine = Machine::new(Config {
        vcpus: 2,
        ..Config::new(Program::Cpuid, Mode::Long, 5000)
    })?;
    machine.run()?;
    let meter = Meter::read()?;
    fs::write(STOP, "")?;
    let status = recorder.wait()?;
    drop(machine);
    ensure!(
        status.code() == Some(7),
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

/// Code and exits of a row of the page's table.
fn row(line: &str) -> Option<(u32, u64)> {
    let cells = line.strip_prefix("<tr><td>")?;
    let mut cells = cells.split("</td><td>");
    let code = cells.next()?.parse().ok()?;
    let exits = cells.nth(1)?.replace(',', "").parse().ok()?;
    (exits != 0).then_some((code, exits))
}

/// Exits by reason, of what has them in the tool's JSON.
fn exits(ledger: &Value) -> Result<Exits> {
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
    let output = Command::new("exitmeter")
        .args(arguments)
        .output()
        .context("the tool exitmeter cannot be run")?;
    ensure!(
        output.status.success(),
        "exitmeter {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}
