// SPDX-License-Identifier: GPL-2.0

//! The tool's `why` and `slow` beside running guests: their output, and that details are off again
//! once they have ended, in whatever way.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Child, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::Value;
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::{details::details_state, slow, Case};
use crate::host::{
    self, codes,
    held_command::{self, HeldCommand},
    meter::DEVICE,
    module,
    module_code::ModuleCode,
    task,
    tool::{self, json, NOBODY},
    KVM_EXIT_IO, VMM_PORT,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "why: two at once agree on a guest, and the last one turns details off",
            two_at_once,
        ),
        Case::with_module(
            "",
            "why: the intervals up to Ctrl-C sum to the guest's exits",
            interrupted,
        ),
        Case::with_module(
            "",
            "why: without CAP_PERFMON it fails with one sentence",
            without_perfmon,
        ),
        Case::with_module(
            "",
            "slow: run beside a command, it names the OUT on which the VMM sleeps",
            slow_with_command,
        ),
        Case::without_module(
            "why: the module does not unload while it runs, and does once it is killed",
            killed,
        ),
        Case::without_module(
            "why: with details=1 the module unloads under a running guest",
            unloaded_under_a_guest,
        ),
    ]
}

/// A running tool; dropping this kills it.
struct RunningTool(Child);

impl RunningTool {
    /// Start the tool, and wait until details are on.
    fn start(arguments: &[&str]) -> Result<Self> {
        let tool = Self::spawn(arguments)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while !details_state()?.1 {
            ensure!(Instant::now() < deadline, "the tool turns no details on");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(tool)
    }

    /// Start the tool with a command to run, and wait until the command has started.
    fn with_command(arguments: &[&str], command: &HeldCommand) -> Result<Self> {
        let words = command.words();
        let mut all = arguments.to_vec();
        all.push("--");
        all.extend(words.iter().map(String::as_str));
        let tool = Self::spawn(&all)?;
        command.wait()?;
        Ok(tool)
    }

    fn spawn(arguments: &[&str]) -> Result<Self> {
        let child = tool::command(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .context("the tool exitmeter cannot be run")?;
        Ok(Self(child))
    }

    /// Send a signal to the tool.
    fn send(&self, signal: Signal) -> io::Result<()> {
        Ok(kill_process(Pid::from_child(&self.0), signal)?)
    }

    /// Wait until the tool has printed a line, and discard the line.
    fn skip_line(&mut self) -> Result<()> {
        let stdout = self.0.stdout.as_mut().context("its output was asked for")?;
        let mut byte = [0];
        while byte != *b"\n" {
            stdout
                .read_exact(&mut byte)
                .context("the tool prints no line")?;
        }
        Ok(())
    }

    /// Wait for the tool's end, and return its status and its remaining output.
    fn end(mut self) -> Result<(ExitStatus, String)> {
        let mut printed = String::new();
        let mut stdout = self.0.stdout.take().context("its output was asked for")?;
        stdout.read_to_string(&mut printed)?;
        Ok((self.0.wait()?, printed))
    }
}

impl Drop for RunningTool {
    fn drop(&mut self) {
        // The tool may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Check that details are off: no vCPU has tables, and the module's code is the same as `code`.
fn check_details_off(code: &ModuleCode) -> Result<()> {
    ensure!(details_state()? == (0, false), "details are on");
    ensure!(
        code.is_unchanged()?,
        "the module's code differs from that before details were on"
    );
    Ok(())
}

/// Return the rows of a reason from the output of `why --json` about the only VM.
fn rows<'a>(output: &'a Value, table: &str, code: u32) -> Result<&'a Vec<Value>> {
    let vms = output["vms"].as_array().context("VMs")?;
    ensure!(vms.len() == 1, "{} VMs", vms.len());
    let name = format!("kvm-{}", std::process::id());
    ensure!(vms[0]["name"] == *name, "the VM is {}", vms[0]["name"]);
    let mut groups = vms[0][table].as_array().context("groups")?.iter();
    let group = groups.find(|group| group["code"] == code);
    let group = group.with_context(|| format!("nothing of reason {code} in {output}"))?;
    group["rows"].as_array().context("rows")
}

fn two_at_once() -> Result<()> {
    let code = ModuleCode::read()?;
    check_details_off(&code)?;
    let [one, other] = [HeldCommand::new("why.1")?, HeldCommand::new("why.2")?];
    let json_tool = RunningTool::with_command(&["why", "--json"], &one)?;
    let text_tool = RunningTool::with_command(&["why"], &other)?;
    ensure!(
        code.has_changed()?,
        "with details on the module's code is the same: no branch is static"
    );
    let mut machine = TinyVm::new(Config {
        vcpus: 2,
        ..Config::new(Program::OutUser, Mode::Long, 2500)
    })?;
    machine.run()?;
    one.end()?;
    let (status, output) = json_tool.end()?;
    let due = Some(held_command::STATUS);
    ensure!(status.code() == due, "the first ends with {status}");
    ensure!(details_state()?.1, "the first that ends turns details off");
    other.end()?;
    let (status, text) = text_tool.end()?;
    ensure!(status.code() == due, "the second ends with {status}");
    check_details_off(&code)?;
    drop(machine);

    let output = json(&output)?;
    let reason = codes::io()?;
    let outs = rows(&output, "details", reason)?.iter();
    let mut outs = outs.filter(|row| row["detail"]["port"] == VMM_PORT);
    let row = outs.next().context("a row of the port")?;
    ensure!(
        row["exits"] == 5000
            && row["exact"] == true
            && row["nested"] == false
            && row["detail"]["input"] == false
            && row["detail"]["size"] == 1,
        "{row}"
    );
    ensure!(outs.next().is_none(), "two rows of one port");
    let words = row["words"].as_str().context("words")?;
    let user = rows(&output, "user_exits", reason)?;
    // This includes the OUTs that end the guest.
    ensure!(
        user.len() == 1 && user[0]["exit_reason"] == KVM_EXIT_IO && user[0]["exits"] == 5002,
        "{user:?}"
    );
    ensure!(
        words.starts_with("OUT 0x3f0"),
        "the row is called '{words}'"
    );
    let line = text.lines().find(|line| line.contains(words));
    let line = line.with_context(|| format!("no line of '{words}' in {text}"))?;
    ensure!(line.contains("5,000") && line.contains("exact"), "{line}");
    ensure!(text.contains("KVM_EXIT_IO"), "{text}");
    Ok(())
}

fn interrupted() -> Result<()> {
    let code = ModuleCode::read()?;
    let mut tool = RunningTool::start(&["why", "--json", "--interval", "0.5"])?;
    // Details are on before the tool takes its first snapshot. After its first interval it has one.
    tool.skip_line()?;
    let mut machine = TinyVm::new(Config::new(Program::Wrmsr, Mode::Long, 3000))?;
    machine.run()?;
    thread::sleep(Duration::from_secs(1));
    tool.send(Signal::INT)?;
    let (status, text) = tool.end()?;
    drop(machine);
    ensure!(status.success(), "after Ctrl-C it ends with {status}");
    check_details_off(&code)?;
    let reason = codes::wrmsr()?;
    let (mut intervals, mut exits) = (0, 0);
    for line in text.lines() {
        let output = json(line)?;
        intervals += 1;
        let is_empty = output["vms"].as_array().is_none_or(|vms| {
            vms.iter()
                .all(|vm| vm["details"].as_array().is_none_or(Vec::is_empty))
        });
        if is_empty {
            continue;
        }
        for row in rows(&output, "details", reason)? {
            ensure!(
                row["detail"]["msr"] == 0x8b && row["detail"]["write"] == true,
                "{row}"
            );
            ensure!(row["name"] == "IA32_UCODE_REV", "{row}");
            exits += row["exits"].as_u64().context("exits")?;
        }
    }
    ensure!(intervals > 0, "it prints no interval after the first");
    ensure!(exits == 3000, "{exits} of 3000 writes");
    Ok(())
}

fn without_perfmon() -> Result<()> {
    const SENTENCE: &str = "exitmeter: no right to turn details on: run this as root, or with \
                            CAP_PERFMON; with the module's parameter details=1 they are always on\n";
    let code = ModuleCode::read()?;
    // Grant only the right to read the device.
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o444))?;
    let run = |arguments: &[&str]| {
        tool::command(arguments)
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .context("the tool exitmeter cannot be run")
    };
    let ended = [
        (run(&["why", "--interval", "1"]), 1),
        (run(&["why", "--", "touch", "/tmp/ran"]), 125),
        (run(&["slow", "--", "touch", "/tmp/ran"]), 125),
    ];
    let report = run(&["report"]);
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o440))?;
    ensure!(report?.status.success(), "nobody can read the device");
    for (output, status) in ended {
        let output = output?;
        ensure!(
            output.status.code() == Some(status) && output.stdout.is_empty(),
            "it ends with {} and prints {}",
            output.status,
            String::from_utf8_lossy(&output.stdout)
        );
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(stderr == SENTENCE, "it says {stderr}");
    }
    ensure!(fs::metadata("/tmp/ran").is_err(), "the command was run");
    check_details_off(&code)
}

fn slow_with_command() -> Result<()> {
    let code = ModuleCode::read()?;
    let command = HeldCommand::new("slow")?;
    let tool = RunningTool::with_command(&["slow", "--json"], &command)?;
    let mut machine = TinyVm::new(slow::sleeper_config())?;
    machine.run()?;
    command.end()?;
    let (status, output) = tool.end()?;
    drop(machine);
    ensure!(
        status.code() == Some(held_command::STATUS),
        "it ends with {status}"
    );
    check_details_off(&code)?;
    let output = json(&output)?;
    let khz = output["host"]["tsc_khz"].as_u64().context("a frequency")?;
    let slowest = output["vms"][0]["slowest"].as_array().context("exits")?;
    let pauses = slowest
        .iter()
        .filter(|exit| slow::check_slow_exit(exit, khz).is_ok());
    ensure!(pauses.count() > 0, "the slow OUT is not among {slowest:?}");
    Ok(())
}

fn killed() -> Result<()> {
    let loaded = module::Loaded::with("")?;
    let code = ModuleCode::read()?;
    let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    machine.run()?;
    let tool = RunningTool::start(&["why", "--interval", "1"])?;
    let refused = module::unload()
        .err()
        .context("the module unloads while the tool runs")?;
    let error = refused.downcast_ref::<io::Error>();
    let error = error.and_then(io::Error::raw_os_error);
    ensure!(
        error == Some(libc::EWOULDBLOCK),
        "unloading fails with {error:?}"
    );
    tool.send(Signal::KILL)?;
    let (status, _) = tool.end()?;
    ensure!(!status.success(), "killed, it ends with {status}");
    check_details_off(&code)?;
    loaded.unload()
}

fn unloaded_under_a_guest() -> Result<()> {
    let mut machine = TinyVm::new(Config::new(
        Program::Cpuid,
        Mode::Long,
        200_000 / host::slowdown(),
    ))?;
    thread::scope(|scope| {
        let guest = scope.spawn(|| machine.run().map(drop));
        let mut unloads = 0;
        while !guest.is_finished() && unloads < 3 {
            let loaded = module::Loaded::with("details=1")?;
            let deadline = Instant::now() + Duration::from_secs(20);
            while details_state()? != (1, true) && !guest.is_finished() {
                ensure!(Instant::now() < deadline, "the guest gets no tables");
            }
            let ran = !guest.is_finished();
            loaded.unload()?;
            unloads += u32::from(ran);
        }
        task::join(guest)?;
        ensure!(unloads > 0, "the guest ended before the module unloaded");
        Ok(())
    })
}
