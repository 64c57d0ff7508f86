//! The outside: boots a host with this program in it, and judges what comes back.

use std::{
    env, fmt,
    io::{BufRead as _, BufReader},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::report::{Report, Verdict};

/// Where this program stands in the host.
const INSIDE: &str = "/usr/local/bin/system-tests";

/// An emulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Host {
    /// VT-x, by Bochs.
    Intel,
    /// SVM, by QEMU's TCG.
    Amd,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Host::Intel => "intel",
            Host::Amd => "amd",
        })
    }
}

/// Runs the cases on one host or on both, one after the other, and tells what they came to;
/// the last line has the numbers.
pub fn run(host: Option<Host>, timeout: u64, words: &[String]) -> Result<ExitCode> {
    let hosts = host
        .as_ref()
        .map_or(Host::value_variants(), std::slice::from_ref);
    let mut sum = Verdict::default();
    for host in hosts {
        eprintln!("The cases on the emulated host {host}:");
        let verdict = run_on(*host, timeout, words)?;
        sum.passed += verdict.passed;
        sum.failures.extend(verdict.failures);
    }
    for failure in &sum.failures {
        println!("failed: {failure}");
    }
    println!("{} passed, {} failed", sum.passed, sum.failures.len());
    Ok(ExitCode::from(u8::from(!sum.failures.is_empty())))
}

/// Boots a host for the cases and ends it.
fn run_on(host: Host, timeout: u64, words: &[String]) -> Result<Verdict> {
    let this = env::current_exe().context("the path of this program is not known")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut lab = Command::new(cargo)
        .args(["lab", "run", "--host", &host.to_string()])
        .args(["--timeout", &timeout.to_string()])
        // A case says nothing until it ends.
        .args(["--silence", &timeout.to_string()])
        .arg("--file")
        .arg(format!("{}:{INSIDE}", this.display()))
        .args(["--", INSIDE, "--inside"])
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo lab cannot be run; start the tests by cargo run -p system-tests")?;
    let mut report = Report::default();
    let stdout = lab.stdout.take().context("its output was asked for")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        report.take(&line);
    }
    let status = lab.wait()?;
    Ok(report.end(&host.to_string(), status.code()))
}
