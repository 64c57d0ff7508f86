// SPDX-License-Identifier: GPL-2.0

//! The tool `exitmeter` shows the numbers of the snapshot.

use std::{fs, time::Duration};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{reader::Snapshot, reasons};
use serde_json::Value;
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::Case;
use crate::host::{
    self, codes,
    held_command::{self, HeldCommand},
    hist::Exits,
    linux::Linux,
    meter::{read_device, MeterSnapshot},
    tool,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "tool: exitmeter report matches the snapshot",
            report_matches,
        ),
        Case::with_module(
            "",
            "tool: exitmeter report --diff counts the exits between two snapshots",
            diff_of_snapshots,
        ),
        Case::with_module(
            "",
            "tool: exitmeter record and plot show the exits that the device counts",
            record_and_plot,
        ),
        Case::with_module(
            "",
            "tool: exitmeter record --why keeps a guest's port and its slow OUT",
            record_why,
        ),
        Case::with_module("", "tool: a VM is found by its name in the VMM", by_name)
            .with_linux()
            .within(240),
        Case::with_module(
            "log_queries=0",
            "tool: a Linux guest reads its exits, and a command's, without those of the tool",
            in_guest,
        )
        .with_linux()
        .within(240),
    ]
}

fn report_matches() -> Result<()> {
    // One departed VM, and one live VM.
    TinyVm::new(Config::new(Program::Invd, Mode::Long, 40))?.run()?;
    let mut machine = TinyVm::new(Config {
        vcpus: 2,
        ..Config::new(Program::Cpuid, Mode::Long, 300)
    })?;
    machine.run()?;
    let meter = MeterSnapshot::read()?;
    let report = tool::json(&tool::run(&["report", "--json"])?)?;
    let text = tool::run(&["report"])?;
    drop(machine);

    let vms = report["vms"].as_array().context("there are VMs")?;
    ensure!(vms.len() == 1, "the tool reports {} VMs", vms.len());
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
        "the tool reports {} vCPUs, and the snapshot has {}",
        vcpus.len(),
        own.len()
    );
    for (shown, held) in vcpus.iter().zip(own) {
        let ticks: u64 = shown["cycles"]
            .as_object()
            .context("there are cycles")?
            .values()
            .filter_map(Value::as_u64)
            .sum();
        ensure!(
            shown["vcpu"] == held.id
                && tool::exits(shown)? == held.numbers.exits
                && ticks == held.life,
            "the tool reports the vCPU {shown}, and the snapshot holds {held:?}"
        );
    }
    let departed = &report["departed"];
    ensure!(
        departed["vcpus_gone"] == meter.departed && tool::exits(departed)? == meter.totals.exits,
        "the tool reports the departed vCPUs {departed}, and the snapshot holds {:?}",
        meter.totals
    );
    let cpuid = codes::cpuid()?;
    ensure!(
        text.lines().any(|line| {
            line.contains("CPUID") && line.contains(&cpuid.to_string()) && line.contains("600")
        }),
        "the report has no line of 600 CPUID exits:\n{text}"
    );
    Ok(())
}

fn diff_of_snapshots() -> Result<()> {
    let cpuid = codes::cpuid()?;
    let [before, after] = ["/tmp/before", "/tmp/after"];
    let mut old = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 300))?;
    old.run()?;
    save(before)?;
    let mut new = TinyVm::new(Config {
        vcpus: 2,
        ..Config::new(Program::Cpuid, Mode::Long, 200)
    })?;
    new.run()?;
    drop(old);
    save(after)?;
    let delta = tool::json(&tool::run(&["report", "--json", "--diff", before, after])?)?;

    let vms = delta["vms"].as_array().context("there are VMs")?;
    ensure!(vms.len() == 1, "the difference has {} VMs", vms.len());
    let shown = tool::exits(&vms[0])?.get(&cpuid).copied();
    ensure!(shown == Some(400), "{shown:?} CPUID exits instead of 400");
    let departed = &delta["departed"];
    ensure!(
        departed["vcpus_gone"] == 1 && tool::exits(departed)?.is_empty(),
        "the VM that ran only before counts as {departed}"
    );
    check_balance(&delta)?;

    // The remaining VM only waits in user space.
    let lines = tool::run(&["report", "--json", "--interval", "0.2", "--count", "2"])?;
    let deltas: Vec<Value> = lines.lines().map(tool::json).collect::<Result<_>>()?;
    ensure!(deltas.len() == 2, "{} intervals instead of 2", deltas.len());
    for delta in &deltas {
        check_balance(delta)?;
        let (vm, ticks) = (&delta["vms"][0], &delta["interval"]["ticks"]);
        let user = vm["vcpus"].as_array().context("there are vCPUs")?.iter();
        ensure!(
            tool::exits(vm)?.is_empty()
                && user.clone().all(|vcpu| vcpu["cycles"]["user"] == *ticks),
            "after {ticks} idle ticks the VM is {vm}"
        );
    }
    let refused = tool::output(&["report", "--diff", after, before])?;
    ensure!(
        refused.status.code() == Some(1),
        "the difference in reverse order ends with {}",
        refused.status
    );
    drop(new);
    Ok(())
}

/// Find a Linux guest by the name and the UUID in its VMM, beside a VM without a name.
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
    let mut other = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 300))?;
    other.run()?;
    let label = format!("web,1 (kvm-{pid})");

    for called in ["web,1", UUID, &pid.to_string(), &format!("kvm-{pid}")] {
        let report = tool::json(&tool::run(&["report", "--json", "--vm", called])?)?;
        let vms = report["vms"].as_array().context("there are VMs")?;
        ensure!(
            vms.len() == 1 && vms[0]["pid"] == pid && vms[0]["name"] == format!("kvm-{pid}"),
            "--vm {called} finds {vms:?}"
        );
        let shown = &vms[0]["vmm"];
        ensure!(
            shown["name"] == "web,1" && shown["uuid"] == UUID && shown["manager"] == "qemu",
            "the tool reports the VMM's settings {shown}"
        );
    }
    let text = tool::run(&["report"])?;
    let own = format!("\nkvm-{}, process", std::process::id());
    ensure!(
        text.contains(&format!("\n{label}, process {pid}: ")) && text.contains(&own),
        "the report has no VM {label}, or none without a name:\n{text}"
    );
    for command in ["why", "slow"] {
        let shown = tool::run(&[command, "--vm", "web,1", "--", "sleep", "0.3"])?;
        ensure!(shown.contains(&label), "exitmeter {command} says\n{shown}");
    }

    // The recording keeps the name after the process has ended.
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
    tool::run(&record)?;
    linux.stop()?;
    drop(other);
    let plot = [
        "plot", RECORDING, "--output", "-", "--format", "html", "--vm", "web,1",
    ];
    let page = tool::run(&plot)?;
    ensure!(page.contains(&label), "the recording has no VM {label}");
    let refused = tool::output(&["report", "--vm", "web,1"])?;
    ensure!(
        refused.status.code() == Some(1),
        "a VM that is gone is found: {}",
        refused.status
    );
    Ok(())
}

/// Save a snapshot to a file.
fn save(path: &str) -> Result<()> {
    fs::write(path, read_device()?).with_context(|| format!("cannot write {path}"))
}

/// Check that each vCPU's ticks sum to the time that the report covers.
fn check_balance(report: &Value) -> Result<()> {
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

/// Check that the tool in a Linux guest leaves out its own queries. Its other exits, such as those of
/// its start, are the same each time, so only the queries can make a difference.
fn in_guest() -> Result<()> {
    let file = tool::guest_file_option()?;
    let linux = Linux::boot(&["--file", &file])?;
    let cpuid = codes::cpuid()?;
    let count = |shown: &Value| -> Result<u64> {
        let count = tool::exits(shown)?.get(&cpuid).copied();
        count.context("there is no CPUID exit")
    };

    let mut sweeps = Vec::new();
    for _ in 0..4 {
        let sweep = tool::json(&linux.run("exitmeter guest --json")?)?;
        let queries = sweep["queries"].as_u64().context("there are queries")?;
        sweeps.push((count(&sweep)?, queries));
    }
    check_equal_between(&sweeps)?;

    // A command with a sweep has as many more exits as the sweep has queries.
    let stat = |command: &str| -> Result<Value> {
        let line = format!("exitmeter stat --json -o /tmp/stat -- {command}; cat /tmp/stat");
        tool::json(&linux.run(&line)?)
    };
    let none = stat("exitmeter reasons >/tmp/out")?;
    let sweep = stat("exitmeter guest --json >/tmp/out")?;
    let own = tool::json(&linux.run("cat /tmp/out")?)?["queries"].as_u64();
    let [none, sweep] = [&none, &sweep].map(|shown| tool::mean_exits(shown, cpuid));
    ensure!(
        own.is_some() && sweep.zip(none).map(|(sweep, none)| sweep - none) == own,
        "a sweep of {own:?} queries counts as {sweep:?} CPUID exits, no sweep as {none:?}"
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

/// Record a VM from before its creation, and check that the plotted exits sum to the device's numbers
/// at the end.
fn record_and_plot() -> Result<()> {
    const RECORDING: &str = "tool.rec";
    let command = HeldCommand::new("record")?;
    let mut recorder = tool::command(&["record", "--output", RECORDING, "--interval", "5", "--"])
        .args(command.words())
        .spawn()
        .context("the tool exitmeter cannot be run")?;
    command.wait()?;
    let mut machine = TinyVm::new(Config {
        vcpus: 2,
        ..Config::new(Program::Cpuid, Mode::Long, 5000)
    })?;
    machine.run()?;
    let meter = MeterSnapshot::read()?;
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
    let page = tool::run(&page)?;
    let mut held = Exits::new();
    for vcpu in meter.own() {
        for (code, exits) in &vcpu.numbers.exits {
            *held.entry(*code).or_default() += exits;
        }
    }
    ensure!(
        held.get(&codes::cpuid()?) >= Some(&10_000),
        "the VM has not exited as it should: {held:?}"
    );
    let shown: Exits = page.lines().filter_map(parse_row).collect();
    ensure!(
        shown == held,
        "the recording has {shown:?} for the VM, and the device {held:?}"
    );
    Ok(())
}

/// Record a guest that writes to one port, where its VMM pauses once. Check that the plot of details
/// names the port with its count first, and that the slow exits include the paused one.
fn record_why() -> Result<()> {
    const RECORDING: &str = "why.rec";
    const OUTS: u32 = 2000;
    const PAUSE: Duration = Duration::from_millis(400);
    let command = HeldCommand::new("details")?;
    let mut recorder = tool::command(&["record", "--why", "--output", RECORDING])
        .args(["--interval", "20", "--"])
        .args(command.words())
        .spawn()
        .context("the tool exitmeter cannot be run")?;
    command.wait()?;
    ensure!(has_tables()?, "exitmeter record --why turns no details on");
    let mut machine = TinyVm::new(Config {
        vmm_pause: PAUSE,
        vmm_pause_on: Some(1000),
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

    let page = tool::run(&["plot", RECORDING, "--output", "-", "--format", "html"])?;
    let name = reasons::name(host::vendor()?, codes::io()?).context("the reason's name")?;
    let row = format!("<tr><td>{name}</td><td>OUT 0x3f0 ");
    let row = page.lines().find(|line| line.starts_with(&row));
    let row = row.with_context(|| format!("no row of port 0x3f0:\n{page}"))?;
    ensure!(
        row.contains("<td>2,000</td>") && row.ends_with("<td>exact</td></tr>"),
        "the page has {row} for 2000 OUTs"
    );
    let led = page.find("<h2>What exits were about").context("details")?;
    let first = page[led..]
        .lines()
        .find(|line| line.starts_with("<tr><td>"));
    ensure!(
        first == Some(row),
        "the first row is {first:?} instead of {row}"
    );
    let slow = page.find("<h2>The slowest exits").context("slow exits")?;
    // On an emulated host other exits may be as long.
    let mut exits = page[slow..].lines();
    ensure!(
        exits.any(|line| {
            let mut cells = line.split("</td><td>");
            let [exit, took] = [1, 2].map(|skipped| cells.nth(skipped).unwrap_or_default());
            exit.starts_with(&format!("{name} OUT 0x3f0 "))
                && line.ends_with("<td>KVM_EXIT_IO</td></tr>")
                && parse_seconds(took).is_some_and(|took| took >= PAUSE.as_secs_f64() * 0.99)
        }),
        "no slow exit is the OUT on which the VMM slept:\n{}",
        &page[slow..]
    );
    let svg = tool::run(&[
        "plot", RECORDING, "--output", "-", "--format", "svg", "--kind", "details",
    ])?;
    ensure!(
        svg.contains(&format!("<title>{name}: OUT 0x3f0 ")),
        "the picture does not name the port:\n{svg}"
    );
    Ok(())
}

/// Parse a time on the page, in seconds.
fn parse_seconds(text: &str) -> Option<f64> {
    let (number, unit) = text.split_once(' ')?;
    let unit = match unit {
        "s" => 1.0,
        "ms" => 1e-3,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * unit)
}

/// Return true if a snapshot of the device has tables.
fn has_tables() -> Result<bool> {
    Ok(Snapshot::parse(&read_device()?)?.has_tables())
}

/// Parse code and exits of a row of the page's table.
fn parse_row(line: &str) -> Option<(u32, u64)> {
    let cells = line.strip_prefix("<tr><td>")?;
    let mut cells = cells.split("</td><td>");
    let code = cells.next()?.parse().ok()?;
    let exits = cells.nth(1)?.replace(',', "").parse().ok()?;
    (exits != 0).then_some((code, exits))
}

/// Check that the same number of CPUID exits came between each two sweeps. A sweep is given as the CPUID
/// exits that it reports, and its own queries.
pub(super) fn check_equal_between(sweeps: &[(u64, u64)]) -> Result<()> {
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
