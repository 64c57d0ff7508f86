// SPDX-License-Identifier: GPL-2.0

//! The inside: runs the tests in the emulated host, and tells of each in a line of JSON.

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
    meter::Meter,
    module,
    span::Span,
};

use crate::{
    allowance, reaper, surroundings,
    verdict::{why, Ended, Line, Verdict},
};

/// Where the host has the tests.
pub const FOLDER: &str = "/root/kvm";

/// What a test prints goes there.
const OUTPUT: &str = "/tmp/output";

/// How often the host tells that it lives.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What KVM gets to take away the VMs of processes that have ended.
const GRACE: Duration = Duration::from_secs(20);

/// The status of a test that misses something, as all selftests of the kernel have it.
const SKIPPED: i32 = 4;

/// Runs the tests of these names, with the module or without.
pub fn run(metered: bool, names: &[String]) -> Result<ExitCode> {
    reaper::adopt_orphans()?;
    surroundings::complete()?;
    if metered {
        module::load("")?;
    }
    thread::spawn(|| loop {
        thread::sleep(HEARTBEAT);
        let _ = tell(&Line::Alive);
    });
    for name in names {
        tell(&Line::Begin(name.clone()))?;
        tell(&Line::End(run_one(name, metered)))?;
    }
    let mut troubles = Vec::new();
    if metered {
        troubles.extend(no_vcpu().err().map(|error| format!("{error:#}")));
        troubles.extend(module::unload().err().map(|error| format!("{error:#}")));
    }
    tell(&Line::Done { troubles })?;
    Ok(ExitCode::SUCCESS)
}

fn tell(line: &Line) -> Result<()> {
    println!("{}", serde_json::to_string(line)?);
    Ok(())
}

/// Runs one test. Whatever goes wrong around it is told with it.
fn run_one(name: &str, metered: bool) -> Ended {
    let mut troubles = Vec::new();
    let mut note = |error: anyhow::Error| troubles.push(format!("{error:#}"));
    let count = Count::begin(metered).map_err(&mut note).ok();
    let started = Instant::now();
    let (verdict, why) = run_test(name).unwrap_or_else(|error| {
        note(error);
        (Verdict::Fail, String::new())
    });
    let seconds = started.elapsed().as_secs_f64();
    if let Err(error) = no_vm() {
        note(error);
    }
    if metered {
        if let Err(error) = no_vcpu() {
            note(error);
        }
    }
    let exits = count.and_then(|count| count.end().map_err(&mut note).ok());
    let exits = exits.unwrap_or_default();
    Ended {
        name: name.to_owned(),
        verdict,
        why,
        seconds,
        exits: exits.values().sum(),
        reasons: exits.len(),
        troubles,
    }
}

/// Runs a test as the kernel's own runner does.
fn run_test(name: &str) -> Result<(Verdict, String)> {
    let allowance = allowance::of(name)?;
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
    let output = fs::read(OUTPUT).context("the output of a test is gone")?;
    let output = String::from_utf8_lossy(&output);
    Ok(match status {
        None => (
            Verdict::TimedOut,
            format!("no end after {} s", allowance.limit.as_secs()),
        ),
        Some(status) if status.success() => (Verdict::Pass, String::new()),
        Some(status) if status.code() == Some(SKIPPED) => (Verdict::Skip, why(&output)),
        Some(status) if status.code().is_some() => (Verdict::Fail, why(&output)),
        Some(status) => (Verdict::Fail, format!("{status}: {}", why(&output))),
    })
}

/// Counts the exits of one test: by the kernel's histogram, and with the module by both.
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

    /// With the module, demands that both are the same.
    fn end(self) -> Result<Exits> {
        match self {
            Self::Kernel(hist) => hist.read(),
            Self::Both(span) => span.end(),
        }
    }
}

/// Waits until KVM itself has no VM any more.
fn no_vm() -> Result<()> {
    let folder = Path::new("/sys/kernel/debug/kvm");
    until(|| {
        let entries = fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))?;
        let vms = entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().is_dir()));
        Ok(match vms.count() {
            0 => None,
            count => Some(format!("{count} VMs are left")),
        })
    })
}

/// Waits until the meter has no vCPU any more.
fn no_vcpu() -> Result<()> {
    until(|| {
        let vcpus = Meter::read()?.vcpus;
        Ok(vcpus.first().map(|vcpu| {
            let (count, id, name) = (vcpus.len(), vcpu.id, &vcpu.name);
            format!("{count} ledgers are left, vCPU {id} of {name} the first")
        }))
    })
}

/// Waits until there is nothing left.
fn until(left: impl Fn() -> Result<Option<String>>) -> Result<()> {
    let deadline = Instant::now() + GRACE;
    while let Some(left) = left()? {
        if Instant::now() >= deadline {
            bail!("{left}, {} s after the end", GRACE.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
