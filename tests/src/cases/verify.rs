// SPDX-License-Identifier: GPL-2.0

//! `exitmeter verify` passes where metering is right, fails where it is not, and leaves nothing behind.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::reasons::Isa;
use rustix::process::{kill_process, Pid, Signal};
use rustix_openpty::openpty;
use serde_json::Value;
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::Case;
use crate::host::{
    self,
    hist::{Hist, TRIGGER},
    meter::{MeterSnapshot, DEVICE},
    module,
    span::{compare, exits_since},
    tool::{self, NOBODY},
};

const INSTANCES: &str = "/sys/kernel/tracing/instances";
const PARAMETERS: &str = "/sys/module/exitmeter/parameters";
const KVM: &str = "/dev/kvm";
/// Options for the least work that still shows the result.
const LEAST_WORK: [&str; 4] = ["--runs", "2", "--exits", "200"];

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "verify: all checks pass on this host, and nothing is left behind",
            passes,
        )
        .within(120),
        Case::with_module(
            "",
            "verify: without root the checks of histogram and details are left out, and the rest pass",
            without_root,
        )
        .within(120),
        Case::with_module(
            "max_vcpus=1",
            "verify: fails where its guests are not metered",
            fails_unmetered,
        )
        .within(120),
        Case::without_module(
            "verify: without KVM, the module or the right to use them it names the remedy",
            names_the_remedy,
        ),
        Case::without_module(
            "verify: --reload shows what metering adds, and leaves the module as it was",
            reload,
        )
        .within(120),
        Case::without_module(
            "verify: on a terminal --reload names the running VMMs and asks, and an empty answer is no",
            asks_before_reload,
        )
        .within(120),
        Case::without_module(
            "verify: a signal ends it, with the module loaded and nothing left behind",
            ended_by_signal,
        )
        .within(120),
    ]
}

/// Return true if the TSC counts the emulated CPU's work, as Bochs's does. QEMU's TSC with two CPUs is
/// the wall clock of a machine that does other work as well.
fn tsc_counts_work() -> bool {
    host::vendor().is_ok_and(|vendor| vendor == Isa::Vmx)
}

fn command(arguments: &[&str]) -> Command {
    let mut command = tool::command(&["verify"]);
    command.args(arguments).args(LEAST_WORK);
    command
}

fn verify(arguments: &[&str]) -> Result<Output> {
    let output = command(arguments).output();
    output.context("the tool exitmeter cannot be run")
}

/// Check the exit status of a run, and return its findings.
fn check_status(output: &Output, status: i32) -> Result<Value> {
    let stdout = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(status),
        "it ended with {}: {stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_str(&stdout).with_context(|| format!("it prints no JSON: {stdout}"))
}

/// Return the names and texts of the checks with `verdict`.
pub(super) fn with_verdict(found: &Value, verdict: &str) -> Vec<String> {
    let checks = found["checks"].as_array().into_iter().flatten();
    checks
        .filter(|check| check["verdict"] == verdict)
        .map(|check| format!("{}: {}", check["name"], check["text"]))
        .collect()
}

/// Check that no VM and no tracing instance is left.
fn check_nothing_left() -> Result<()> {
    let vcpus = MeterSnapshot::read()?.vcpus.len();
    let instances = fs::read_dir(INSTANCES).context("no tracefs")?.count();
    ensure!(
        (vcpus, instances) == (0, 0),
        "{vcpus} vCPUs and {instances} instances are left behind"
    );
    Ok(())
}

fn passes() -> Result<()> {
    const REPORT: &str = "/tmp/verify.txt";
    // A foreign trigger must stay as it is.
    let hist = Hist::begin()?;
    let armed = fs::read_to_string(TRIGGER)?;
    // The instance of a killed run must be removed.
    fs::create_dir(format!("{INSTANCES}/exitmeter-verify-4194304"))?;
    let before = MeterSnapshot::read()?.exits();
    let output = verify(&["--json", "--report", REPORT])?;
    let found = check_status(&output, 0)?;
    ensure!(output.stderr.is_empty());
    let (failed, not_made) = (
        with_verdict(&found, "failed"),
        with_verdict(&found, "not_made"),
    );
    ensure!(
        failed.is_empty() && not_made.is_empty(),
        "{failed:?} {not_made:?}"
    );
    let passed = with_verdict(&found, "passed");
    let of = |name: &str| passed.iter().filter(|check| check.contains(name)).count();
    let counts = passed
        .iter()
        .filter(|check| check.contains("as the kernel's histogram"));
    ensure!(
        (
            counts.count(),
            of("answers:"),
            of("ledger:"),
            of("details:")
        ) == (21, 2, 1, 5),
        "{passed:#?}"
    );
    check_nothing_left()?;
    ensure!(fs::read_to_string(TRIGGER)?.lines().next() == armed.lines().next());
    // Meter and histogram saw all of its guests.
    compare(
        &exits_since(MeterSnapshot::read()?.exits(), &before)?,
        &hist.read()?,
    )?;

    let kinds = found["cost"]["kinds"]
        .as_array()
        .context("what exits cost")?;
    ensure!(kinds.len() == 6, "{kinds:?}");
    for kind in kinds.iter().filter(|_| tsc_counts_work()) {
        let number = |name: &str| kind[name].as_f64().unwrap_or(0.0);
        let ticks = kind["ticks"]["median"].as_f64().unwrap_or(0.0);
        let parts = number("guest") + number("kernel") + number("user");
        // Only one of the two includes the host's timer and the start of the guests.
        ensure!(
            ticks > 100.0 && (parts - ticks).abs() < 0.2 * ticks,
            "an exit takes {ticks} ticks, and its phases {parts}: {kind}"
        );
        // There are few runs, and the host's own work at an exit to user space or at a page fault varies
        // by more than details add. So that median may be below 0; verify shows its spread beside it.
        let details = &kind["details_add"];
        let at_least = match kind["kind"].as_str() {
            Some("OUT to user space" | "page fault") => details["max"].as_f64(),
            _ => details["median"].as_f64(),
        };
        ensure!(at_least > Some(0.0), "{kind}");
    }
    let switch = found["cost"]["world_switch"]
        .as_f64()
        .context("a world switch")?;
    ensure!(
        switch > 0.0 || !tsc_counts_work(),
        "a world switch of {switch} ticks"
    );
    let report = fs::read_to_string(REPORT)?;
    for words in ["kernel ", "CPU ", "mitigation ", "counts: CPUID", "\n| "] {
        ensure!(
            report.contains(words),
            "the report has no {words}:\n{report}"
        );
    }
    println!("{report}");
    Ok(())
}

fn without_root() -> Result<()> {
    let modes = [(KVM, 0o666), (DEVICE, 0o444)];
    let before = modes.map(|(path, _)| fs::metadata(path).map(|it| it.permissions()));
    for (path, mode) in modes {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let output = command(&["--json"]).uid(NOBODY).gid(NOBODY).output();
    for ((path, _), before) in modes.into_iter().zip(before) {
        fs::set_permissions(path, before?)?;
    }
    let found = check_status(&output?, 0)?;
    let not_made = with_verdict(&found, "not_made");
    ensure!(
        not_made.len() == 2
            && not_made[0].contains("tracefs")
            && not_made[1].contains("CAP_PERFMON"),
        "{not_made:?}"
    );
    let passed = with_verdict(&found, "passed").len();
    ensure!(passed == 24, "{passed} checks passed");
    Ok(())
}

fn fails_unmetered() -> Result<()> {
    let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    machine.run()?;
    let found = check_status(&verify(&["--json"])?, 1)?;
    let failed = with_verdict(&found, "failed");
    ensure!(
        failed.len() >= 21 && failed.iter().any(|check| check.contains("max_vcpus")),
        "{failed:?}"
    );
    ensure!(found["passed"] == false);
    // With room for its guests, verify passes with the same module.
    drop(machine);
    check_status(&verify(&["--json"])?, 0)?;
    Ok(())
}

/// Check that verify ran no checks and printed one sentence that holds `words`.
fn check_refused(output: &Output, words: &str) -> Result<()> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(2) && output.stdout.is_empty(),
        "it ended with {}, and printed {}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    let last = stderr.lines().last().unwrap_or_default();
    ensure!(
        last.starts_with("exitmeter: ") && last.contains(words),
        "it says {stderr}"
    );
    Ok(())
}

fn names_the_remedy() -> Result<()> {
    // Without `--source module`, verify would use BPF: see the cases `bpf:`.
    check_refused(&verify(&["--source", "module"])?, "load the module")?;
    let _loaded = module::Loaded::with("")?;
    let away = "/dev/kvm.away";
    fs::rename(KVM, away)?;
    let output = verify(&[]);
    fs::rename(away, KVM)?;
    check_refused(&output?, "load KVM first")?;
    let before = fs::metadata(KVM)?.permissions();
    fs::set_permissions(KVM, fs::Permissions::from_mode(0o600))?;
    let output = command(&[]).uid(NOBODY).gid(NOBODY).output();
    fs::set_permissions(KVM, before)?;
    check_refused(&output?, "no right to open /dev/kvm")?;
    check_refused(&verify(&["--cpu", "4000"])?, "--cpu")?;
    // There is no terminal to ask on.
    let output = verify(&["--reload", "--module", module::FILE])?;
    check_refused(&output, "--yes")?;
    // The file differs from the loaded module.
    let output = verify(&["--reload", "--yes", "--module", "/proc/self/exe"])?;
    check_refused(&output, "build ids differ")?;
    ensure!(module::is_loaded("exitmeter")?);
    Ok(())
}

/// Read the parameters of the loaded module.
fn parameters() -> Result<Vec<(String, String)>> {
    let mut parameters = Vec::new();
    for entry in fs::read_dir(PARAMETERS).context("the module does not tell its parameters")? {
        let entry = entry?;
        let value = fs::read_to_string(entry.path())?.trim().to_owned();
        parameters.push((entry.file_name().to_string_lossy().into_owned(), value));
    }
    parameters.sort();
    Ok(parameters)
}

const GIVEN_PARAMETERS: &str = "leaf_map=2022 max_vcpus=77 log_queries=0 copy_tries=3";

fn reload() -> Result<()> {
    let loaded = module::Loaded::with(GIVEN_PARAMETERS)?;
    let before = parameters()?;
    for word in GIVEN_PARAMETERS.split(' ') {
        let (name, value) = word.split_once('=').context("a parameter")?;
        ensure!(
            before.contains(&(name.to_owned(), value.to_owned())),
            "the module given {word} has the parameters {before:?}"
        );
    }
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o444))?;
    let life = MeterSnapshot::read()?.life;
    let arguments = ["--json", "--reload", "--yes", "--module", module::FILE];

    // While the device is open the module cannot be unloaded, so a check fails.
    let file = File::open(DEVICE)?;
    let kept = check_status(&verify(&arguments)?, 1)?;
    drop(file);
    let failed = with_verdict(&kept, "failed");
    ensure!(
        failed.len() == 1 && failed[0].contains("open"),
        "{failed:?}"
    );
    ensure!(
        MeterSnapshot::read()?.life == life,
        "the module has gone though it was in use"
    );

    let found = check_status(&verify(&arguments)?, 0)?;
    ensure!(
        MeterSnapshot::read()?.life != life,
        "the module has not gone"
    );
    ensure!(
        parameters()? == before,
        "{:?} in place of {before:?}",
        parameters()?
    );
    let mode = fs::metadata(DEVICE)?.permissions().mode() & 0o777;
    ensure!(mode == 0o444, "the device has the mode {mode:o}");
    let kinds = found["cost"]["kinds"]
        .as_array()
        .context("what exits cost")?;
    for kind in kinds {
        let adds = kind["metering_adds"]["median"].as_f64();
        let adds = adds.context("what metering adds")?;
        let ticks = kind["ticks"]["median"].as_f64().unwrap_or(0.0);
        ensure!(
            !tsc_counts_work() || adds > 10.0 && adds < ticks / 2.0,
            "metering adds {adds} ticks to {ticks}: {kind}"
        );
        println!("metering adds {adds:.0} ticks to {}", kind["kind"]);
    }
    check_nothing_left()?;
    loaded.unload()
}

/// Run `verify --reload` on a terminal, and type `answer`.
fn answer_reload(answer: &str) -> Result<Output> {
    let terminal = openpty(None, None).context("no terminal")?;
    let mut typed = File::from(terminal.controller);
    typed.write_all(answer.as_bytes())?;
    let mut command = command(&["--json", "--reload", "--module", module::FILE]);
    let output = command.stdin(terminal.user).output();
    // Until here: a terminal that is gone gives no answer.
    drop(typed);
    output.context("the tool exitmeter cannot be run")
}

fn asks_before_reload() -> Result<()> {
    let loaded = module::Loaded::with(GIVEN_PARAMETERS)?;
    let life = MeterSnapshot::read()?.life;
    let machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    for answer in ["\n", "n\n", "yesterday\n", "\x04"] {
        let mut output = answer_reload(answer)?;
        // The typed line feed ends the question's line only on the terminal.
        let question = output.stderr.windows(6).position(|it| it == b"[y/N] ");
        output
            .stderr
            .drain(..question.context("there is no question")? + 6);
        check_refused(&output, "nothing was done")?;
        ensure!(
            MeterSnapshot::read()?.life == life,
            "the module has gone after {answer:?}"
        );
    }
    let output = answer_reload("y\n")?;
    let asked = String::from_utf8_lossy(&output.stderr).into_owned();
    let (me, name) = (
        std::process::id(),
        fs::read_to_string("/proc/self/comm")?.trim().to_owned(),
    );
    ensure!(
        asked.contains("Go on? [y/N]") && asked.contains(&format!("{name} ({me})")),
        "it asks: {asked}"
    );
    check_status(&output, 0)?;
    ensure!(
        MeterSnapshot::read()?.life != life,
        "the module has not gone"
    );
    drop(machine);
    check_nothing_left()?;
    loaded.unload()
}

/// Wait until `is_so` returns true; `what` names the event in the error.
fn wait_until(what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what} does not come");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Send a signal to the tool, and check that it ends with the signal's status.
fn end_by_signal(mut child: Child, signal: Signal) -> Result<()> {
    kill_process(Pid::from_child(&child), signal)?;
    let status = child.wait()?;
    ensure!(
        status.code() == Some(128 + signal.as_raw()),
        "after signal {} it ended with {status}",
        signal.as_raw()
    );
    Ok(())
}

fn ended_by_signal() -> Result<()> {
    let loaded = module::Loaded::with(GIVEN_PARAMETERS)?;
    let before = parameters()?;
    drop(Hist::begin()?);
    let start = |arguments: &[&str]| -> Result<Child> {
        let mut command = tool::command(&["verify"]);
        command.args(arguments).stdout(Stdio::null());
        command.spawn().context("the tool exitmeter cannot be run")
    };
    // A signal while it counts.
    let child = start(&[])?;
    wait_until("an instance", || {
        Ok(fs::read_dir(INSTANCES)?.next().is_some())
    })?;
    end_by_signal(child, Signal::INT)?;
    check_nothing_left()?;
    // A signal while the module is unloaded and a guest runs.
    let arguments = ["--reload", "--yes", "--module", module::FILE];
    let child = start(&arguments)?;
    wait_until("the module's end", || Ok(!Path::new(DEVICE).exists()))?;
    end_by_signal(child, Signal::TERM)?;
    ensure!(module::is_loaded("exitmeter")?, "the module is gone");
    ensure!(
        parameters()? == before,
        "{:?} in place of {before:?}",
        parameters()?
    );
    check_nothing_left()?;
    // An ignored signal, as under nohup(1), does not end it.
    let mut child = Command::new("sh")
        .args([
            "-c",
            "trap '' HUP; exec exitmeter verify --runs 1 --exits 100 >/dev/null",
        ])
        .spawn()?;
    wait_until("an instance", || {
        Ok(fs::read_dir(INSTANCES)?.next().is_some())
    })?;
    kill_process(Pid::from_child(&child), Signal::HUP)?;
    let status = child.wait()?;
    if !status.success() {
        bail!("a signal that is ignored ended it: {status}");
    }
    loaded.unload()
}
