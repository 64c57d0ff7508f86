// SPDX-License-Identifier: GPL-2.0

//! `exitmeter verify`: right where all is right, and wrong where something is; what it leaves behind.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::FromRawFd as _,
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::Path,
    process::{Child, Command, Output, Stdio},
    ptr, thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::reasons::Isa;
use serde_json::Value;
use tiny_guests::{Config, Machine, Mode, Program};

use super::Case;
use crate::host::{
    self,
    hist::Hist,
    meter::Meter,
    module,
    span::{compare, exits_since},
};

const INSTANCES: &str = "/sys/kernel/tracing/instances";
const TRIGGER: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/trigger";
const PARAMETERS: &str = "/sys/module/exitmeter/parameters";
const DEVICE: &str = "/dev/exitmeter";
const KVM: &str = "/dev/kvm";
/// As little as shows what is to be shown.
const FEW: [&str; 4] = ["--runs", "2", "--exits", "200"];

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
            "verify: without root the histogram and details are left out, and the rest passes",
            without_root,
        )
        .within(120),
        Case::with_module(
            "max_vcpus=1",
            "verify: it fails where its guests are not metered",
            unmetered,
        )
        .within(120),
        Case::without_module(
            "verify: without KVM, a module or the right to them it says what to do",
            impossible,
        ),
        Case::without_module(
            "verify: --reload tells what metering adds, and leaves the module as it was",
            reload,
        )
        .within(120),
        Case::without_module(
            "verify: on a terminal, --reload asks, names whose VMs run, and takes no answer for a no",
            asks,
        )
        .within(120),
        Case::without_module(
            "verify: a signal ends it, with the module loaded and nothing left behind",
            signal,
        )
        .within(120),
    ]
}

/// Return true on the host whose TSC counts its own work: Bochs's. With two CPUs QEMU's is the clock on
/// the wall, of a machine that does other work as well.
fn counts_its_work() -> bool {
    host::isa().is_ok_and(|isa| isa == Isa::Vmx)
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new("exitmeter");
    command.arg("verify").args(arguments).args(FEW);
    command.stdin(Stdio::null());
    command
}

fn verify(arguments: &[&str]) -> Result<Output> {
    let output = command(arguments).output();
    output.context("the tool exitmeter cannot be run")
}

/// What a run found, which has to end with a status.
fn found(output: &Output, status: i32) -> Result<Value> {
    let told = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(status),
        "it ended with {}: {told}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_str(&told).with_context(|| format!("it prints no JSON: {told}"))
}

/// The names and texts of the checks that ended so.
pub(super) fn ended(found: &Value, verdict: &str) -> Vec<String> {
    let checks = found["checks"].as_array().into_iter().flatten();
    checks
        .filter(|check| check["verdict"] == verdict)
        .map(|check| format!("{}: {}", check["name"], check["text"]))
        .collect()
}

/// Demand that no VM and no instance is left.
fn nothing_is_left() -> Result<()> {
    let vcpus = Meter::read()?.vcpus.len();
    let instances = fs::read_dir(INSTANCES).context("no tracefs")?.count();
    ensure!(
        (vcpus, instances) == (0, 0),
        "{vcpus} vCPUs and {instances} instances are left behind"
    );
    Ok(())
}

fn passes() -> Result<()> {
    const REPORT: &str = "/tmp/verify.txt";
    // A trigger of somebody else's stays as it is.
    let hist = Hist::begin()?;
    let armed = fs::read_to_string(TRIGGER)?;
    // The instance of one that was killed goes.
    fs::create_dir(format!("{INSTANCES}/exitmeter-verify-4194304"))?;
    let before = Meter::read()?.exits();
    let output = verify(&["--json", "--report", REPORT])?;
    let found = found(&output, 0)?;
    ensure!(output.stderr.is_empty());
    let (failed, not_made) = (ended(&found, "failed"), ended(&found, "not_made"));
    ensure!(
        failed.is_empty() && not_made.is_empty(),
        "{failed:?} {not_made:?}"
    );
    let passed = ended(&found, "passed");
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
    nothing_is_left()?;
    ensure!(fs::read_to_string(TRIGGER)?.lines().next() == armed.lines().next());
    // All of its guests were seen by both.
    compare(
        &exits_since(Meter::read()?.exits(), &before)?,
        &hist.read()?,
    )?;

    let kinds = found["cost"]["kinds"]
        .as_array()
        .context("what exits cost")?;
    ensure!(kinds.len() == 6, "{kinds:?}");
    for kind in kinds.iter().filter(|_| counts_its_work()) {
        let number = |name: &str| kind[name].as_f64().unwrap_or(0.0);
        let ticks = kind["ticks"]["median"].as_f64().unwrap_or(0.0);
        let parts = number("guest") + number("kernel") + number("user");
        // The host's timer, and the start of the guests, are in one and not in the other.
        ensure!(
            ticks > 100.0 && (parts - ticks).abs() < 0.2 * ticks,
            "an exit takes {ticks} ticks, and its phases {parts}: {kind}"
        );
        // Of few runs: the host's own work at an exit to user space differs by more than details add, so the median of
        // that one may be below 0 (verify tells its spread beside it).
        let details = &kind["details_add"];
        let at_least = match kind["kind"].as_str() {
            Some("OUT to user space") => details["max"].as_f64(),
            _ => details["median"].as_f64(),
        };
        ensure!(at_least > Some(0.0), "{kind}");
    }
    let switch = found["cost"]["world_switch"]
        .as_f64()
        .context("a world switch")?;
    ensure!(
        switch > 0.0 || !counts_its_work(),
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
    let output = command(&["--json"]).uid(65534).gid(65534).output();
    for ((path, _), before) in modes.into_iter().zip(before) {
        fs::set_permissions(path, before?)?;
    }
    let found = found(&output?, 0)?;
    let not_made = ended(&found, "not_made");
    ensure!(
        not_made.len() == 2
            && not_made[0].contains("tracefs")
            && not_made[1].contains("CAP_PERFMON"),
        "{not_made:?}"
    );
    let passed = ended(&found, "passed").len();
    ensure!(passed == 24, "{passed} checks passed");
    Ok(())
}

fn unmetered() -> Result<()> {
    let mut machine = Machine::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    machine.run()?;
    let found = found(&verify(&["--json"])?, 1)?;
    let failed = ended(&found, "failed");
    ensure!(
        failed.len() >= 21 && failed.iter().any(|check| check.contains("max_vcpus")),
        "{failed:?}"
    );
    ensure!(found["passed"] == false);
    // With room for a guest the same module is right.
    drop(machine);
    self::found(&verify(&["--json"])?, 0)?;
    Ok(())
}

/// Demand that nothing is verified, with one sentence that has these words.
fn refused(output: &Output, words: &str) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(2) && output.stdout.is_empty(),
        "it ended with {}, and printed {}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
    let last = said.lines().last().unwrap_or_default();
    ensure!(
        last.starts_with("exitmeter: ") && last.contains(words),
        "it says {said}"
    );
    Ok(())
}

fn impossible() -> Result<()> {
    // Unless it is to be the module, BPF stands in: see the cases of `bpf`.
    refused(&verify(&["--source", "module"])?, "load the module")?;
    let _loaded = module::Loaded::with("")?;
    let away = "/dev/kvm.away";
    fs::rename(KVM, away)?;
    let output = verify(&[]);
    fs::rename(away, KVM)?;
    refused(&output?, "load KVM first")?;
    let before = fs::metadata(KVM)?.permissions();
    fs::set_permissions(KVM, fs::Permissions::from_mode(0o600))?;
    let output = command(&[]).uid(65534).gid(65534).output();
    fs::set_permissions(KVM, before)?;
    refused(&output?, "no right to open /dev/kvm")?;
    refused(&verify(&["--cpu", "4000"])?, "--cpu")?;
    // Nobody is there to be asked.
    let output = verify(&["--reload", "--module", module::FILE])?;
    refused(&output, "--yes")?;
    // Another file than the one that is loaded.
    let output = verify(&["--reload", "--yes", "--module", "/proc/self/exe"])?;
    refused(&output, "build ids differ")?;
    ensure!(module::is_loaded("exitmeter")?);
    Ok(())
}

/// What the loaded module was given.
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

const GIVEN: &str = "leaf_map=2022 max_vcpus=77 log_queries=0 copy_tries=3";

fn reload() -> Result<()> {
    let loaded = module::Loaded::with(GIVEN)?;
    let before = parameters()?;
    for word in GIVEN.split(' ') {
        let (name, value) = word.split_once('=').context("a parameter")?;
        ensure!(
            before.contains(&(name.to_owned(), value.to_owned())),
            "{word} is told as {before:?}"
        );
    }
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o444))?;
    let life = Meter::read()?.life;
    let arguments = ["--json", "--reload", "--yes", "--module", module::FILE];

    // Who has the device open keeps the module, and a check fails by it.
    let file = File::open(DEVICE)?;
    let kept = found(&verify(&arguments)?, 1)?;
    drop(file);
    let failed = ended(&kept, "failed");
    ensure!(
        failed.len() == 1 && failed[0].contains("open"),
        "{failed:?}"
    );
    ensure!(
        Meter::read()?.life == life,
        "the module has gone though it was in use"
    );

    let found = found(&verify(&arguments)?, 0)?;
    ensure!(Meter::read()?.life != life, "the module has not gone");
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
            !counts_its_work() || adds > 10.0 && adds < ticks / 2.0,
            "metering adds {adds} ticks to {ticks}: {kind}"
        );
        println!("metering adds {adds:.0} ticks to {}", kind["kind"]);
    }
    nothing_is_left()?;
    loaded.unload()
}

/// Run `verify --reload` on a terminal where somebody types `answer`.
fn answered(answer: &str) -> Result<Output> {
    let (mut terminal, mut end) = (0, 0);
    // SAFETY: Both are places for a number; the name, modes and size may be left out.
    let opened = unsafe {
        libc::openpty(
            &mut terminal,
            &mut end,
            ptr::null_mut(),
            ptr::null(),
            ptr::null(),
        )
    };
    ensure!(opened == 0, "no terminal: {}", io::Error::last_os_error());
    // SAFETY: openpty() has opened both, and nobody else has them.
    let (mut terminal, end) = unsafe { (File::from_raw_fd(terminal), File::from_raw_fd(end)) };
    terminal.write_all(answer.as_bytes())?;
    let mut command = command(&["--json", "--reload", "--module", module::FILE]);
    let output = command.stdin(end).output();
    output.context("the tool exitmeter cannot be run")
}

fn asks() -> Result<()> {
    let loaded = module::Loaded::with(GIVEN)?;
    let life = Meter::read()?.life;
    let machine = Machine::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    for answer in ["\n", "n\n", "yesterday\n", "\x04"] {
        let mut output = answered(answer)?;
        // The line feed that somebody types is on the terminal alone.
        let question = output.stderr.windows(6).position(|it| it == b"[y/N] ");
        output
            .stderr
            .drain(..question.context("there is no question")? + 6);
        refused(&output, "nothing was done")?;
        ensure!(
            Meter::read()?.life == life,
            "the module has gone after {answer:?}"
        );
    }
    let output = answered("y\n")?;
    let asked = String::from_utf8_lossy(&output.stderr).into_owned();
    let (me, name) = (
        std::process::id(),
        fs::read_to_string("/proc/self/comm")?.trim().to_owned(),
    );
    ensure!(
        asked.contains("Go on? [y/N]") && asked.contains(&format!("{name} ({me})")),
        "it asks: {asked}"
    );
    found(&output, 0)?;
    ensure!(Meter::read()?.life != life, "the module has not gone");
    drop(machine);
    nothing_is_left()?;
    loaded.unload()
}

/// Wait until something is so.
fn until(what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what} does not come");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Send a signal, and demand that the tool ends by it.
fn end(mut child: Child, signal: i32) -> Result<()> {
    let pid = i32::try_from(child.id())?;
    // SAFETY: A signal to a child that has not been waited for.
    ensure!(unsafe { libc::kill(pid, signal) } == 0);
    let status = child.wait()?;
    ensure!(
        status.code() == Some(128 + signal),
        "after signal {signal} it ended with {status}"
    );
    Ok(())
}

fn signal() -> Result<()> {
    let loaded = module::Loaded::with(GIVEN)?;
    let before = parameters()?;
    drop(Hist::begin()?);
    let start = |arguments: &[&str]| -> Result<Child> {
        let mut command = Command::new("exitmeter");
        command.arg("verify").args(arguments).stdout(Stdio::null());
        command.spawn().context("the tool exitmeter cannot be run")
    };
    // While it counts.
    let child = start(&[])?;
    until("an instance", || {
        Ok(fs::read_dir(INSTANCES)?.next().is_some())
    })?;
    end(child, libc::SIGINT)?;
    nothing_is_left()?;
    // While the module is away, and while a guest runs.
    let arguments = ["--reload", "--yes", "--module", module::FILE];
    let child = start(&arguments)?;
    until("the module's end", || Ok(!Path::new(DEVICE).exists()))?;
    end(child, libc::SIGTERM)?;
    ensure!(module::is_loaded("exitmeter")?, "the module is gone");
    ensure!(
        parameters()? == before,
        "{:?} in place of {before:?}",
        parameters()?
    );
    nothing_is_left()?;
    // One that is ignored, as after nohup(1), does not end it.
    let mut child = Command::new("sh")
        .args([
            "-c",
            "trap '' HUP; exec exitmeter verify --runs 1 --exits 100 >/dev/null",
        ])
        .spawn()?;
    until("an instance", || {
        Ok(fs::read_dir(INSTANCES)?.next().is_some())
    })?;
    // SAFETY: As above.
    ensure!(unsafe { libc::kill(i32::try_from(child.id())?, libc::SIGHUP) } == 0);
    let status = child.wait()?;
    if !status.success() {
        bail!("a signal that is ignored ended it: {status}");
    }
    loaded.unload()
}
