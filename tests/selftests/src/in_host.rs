// SPDX-License-Identifier: GPL-2.0

//! Runs the tests in the emulated host, and reports each as a line of JSON.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, Context as _, Result};
use system_tests::host::{
    hist::{Exits, Hist},
    meter::MeterSnapshot,
    module,
    span::Span,
};

use crate::{
    allowance::allowance_of,
    environment, reaper,
    verdict::{explanation, Line, TestRun, Verdict},
};

/// Folder of the tests in the host.
pub const FOLDER: &str = "/root/kvm";

/// File for the output of a test.
const OUTPUT: &str = "/tmp/output";

/// Interval of the lines that say that the host is alive.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Time limit for KVM to destroy the VMs of processes that have ended.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(20);

/// Exit status of a skipped test: KSFT_SKIP of the kernel's selftests.
const SKIPPED: i32 = 4;

/// Run the named tests, with or without the module.
pub fn run(metered: bool, names: &[String]) -> Result<ExitCode> {
    reaper::adopt_orphans()?;
    environment::set_up()?;
    if metered {
        module::load("")?;
    }
    thread::spawn(|| loop {
        thread::sleep(HEARTBEAT);
        let _ = print(&Line::Alive);
    });
    for name in names {
        print(&Line::Begin(name.clone()))?;
        print(&Line::End(run_one(name, metered)))?;
    }
    let mut troubles = Vec::new();
    if metered {
        troubles.extend(wait_for_no_vcpu().err().map(|error| format!("{error:#}")));
        troubles.extend(module::unload().err().map(|error| format!("{error:#}")));
    }
    print(&Line::Done { troubles })?;
    Ok(ExitCode::SUCCESS)
}

fn print(line: &Line) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}

/// Run one test, and check what it leaves behind. Errors go into the result.
fn run_one(name: &str, metered: bool) -> TestRun {
    let mut troubles = Vec::new();
    let mut note = |error: anyhow::Error| troubles.push(format!("{error:#}"));
    let count = Count::begin(metered).map_err(&mut note).ok();
    let started = Instant::now();
    let (verdict, why) = run_test(name).unwrap_or_else(|error| {
        note(error);
        (Verdict::Fail, String::new())
    });
    let seconds = started.elapsed().as_secs_f64();
    if let Err(error) = wait_for_no_vm() {
        note(error);
    }
    if metered {
        if let Err(error) = wait_for_no_vcpu() {
            note(error);
        }
    }
    let exits = count.and_then(|count| count.end().map_err(&mut note).ok());
    let exits = exits.unwrap_or_default();
    TestRun {
        name: name.to_owned(),
        verdict,
        why,
        seconds,
        exits: exits.values().sum(),
        reasons: exits.len(),
        troubles,
    }
}

/// Run a test as the kernel's own runner does.
fn run_test(name: &str) -> Result<(Verdict, String)> {
    let allowance = allowance_of(name)?;
    let path = Path::new(FOLDER).join(name);
    let mut command = match path.extension() {
        Some(extension) if extension == "sh" => {
            let mut shell = Command::new("sh");
            shell.arg(path);
            shell
        }
        _ => Command::new(path),
    };
    command.args(allowance.arguments).current_dir(FOLDER);
    let child = reaper::start(&mut command, Path::new(OUTPUT))?;
    let status = reaper::wait(child, allowance.limit)?;
    let output = fs::read(OUTPUT).context("cannot read the output of a test")?;
    let output = String::from_utf8_lossy(&output);
    Ok(match status {
        None => (
            Verdict::TimedOut,
            format!("no end after {} s", allowance.limit.as_secs()),
        ),
        Some(status) if status.success() => (Verdict::Pass, String::new()),
        Some(status) if status.code() == Some(SKIPPED) => (Verdict::Skip, explanation(&output)),
        Some(status) if status.code().is_some() => (Verdict::Fail, explanation(&output)),
        Some(status) => (Verdict::Fail, format!("{status}: {}", explanation(&output))),
    })
}

/// Counts the exits of one test: by the kernel's histogram, and with the module also by the meter.
enum Count {
    Kernel(Hist),
    Both(Span),
}

impl Count {
    fn begin(metered: bool) -> Result<Self> {
        Ok(match metered {
            false => Self::Kernel(Hist::begin()?),
            true => Self::Both(Span::begin()?),
        })
    }

    /// Return the exits. With the module, fail if the counts differ.
    fn end(self) -> Result<Exits> {
        match self {
            Self::Kernel(hist) => hist.read(),
            Self::Both(span) => span.end(),
        }
    }
}

/// Wait until KVM has no VM.
fn wait_for_no_vm() -> Result<()> {
    let folder = Path::new("/sys/kernel/debug/kvm");
    wait_until_none(|| {
        let entries =
            fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let vms = entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().is_dir()));
        Ok(match vms.count() {
            0 => None,
            count => Some(format!("{count} VMs are left")),
        })
    })
}

/// Wait until the meter has no vCPU.
fn wait_for_no_vcpu() -> Result<()> {
    wait_until_none(|| {
        let vcpus = MeterSnapshot::read()?.vcpus;
        Ok(vcpus.first().map(|vcpu| {
            let (count, id, name) = (vcpus.len(), vcpu.id, &vcpu.name);
            format!("{count} ledgers are left, vCPU {id} of {name} the first")
        }))
    })
}

/// Wait until `left` returns `None`. On a timeout, fail with what is left.
fn wait_until_none(left: impl Fn() -> Result<Option<String>>) -> Result<()> {
    let deadline = Instant::now() + CLEANUP_TIMEOUT;
    while let Some(left) = left()? {
        if Instant::now() >= deadline {
            bail!("{left}, {} s after the end", CLEANUP_TIMEOUT.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
