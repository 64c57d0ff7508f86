// SPDX-License-Identifier: GPL-2.0

//! The outside: boots a host with this program in it, and judges what comes back.

use std::{
    collections::VecDeque,
    env, fmt,
    io::{BufRead as _, BufReader, Read},
    panic,
    process::{Command, ExitCode, Stdio},
    thread::{self, ScopedJoinHandle},
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::{
    cases,
    report::{Report, Verdict},
};

/// Where this program stands in the host.
const INSIDE: &str = "/usr/local/bin/system-tests";

/// How many lines of what the lab's command said last are told at the end.
const LAST_WORDS: usize = 100;

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

impl Host {
    /// Return how many CPUs it gets. QEMU emulates two by two threads, which does not last; Bochs by
    /// one, which does, and takes twice the time: see docs/testing.md.
    fn cpus(self, soak: bool) -> u32 {
        match (self, soak) {
            (Host::Intel, true) => 2,
            _ => 1,
        }
    }
}

/// What to run.
#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// Only on this host; on both, side by side, when not given.
    #[arg(long, value_enum)]
    pub host: Option<Host>,
    /// How many seconds of the wall clock one host may take.
    #[arg(long, default_value_t = 3600)]
    pub timeout: u64,
    /// How many CPUs the hosts have; when not given 1, and 2 on Intel for the long cases.
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Debian's kernel for the hosts, a version or release; the newest of backports when not
    /// given.
    #[arg(long, value_name = "VERSION")]
    pub kernel: Option<String>,
    /// The model of the hosts' CPU, in the words of their emulator, such as arrow_lake.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// How much memory the hosts have; as much as the lab gives when not given.
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u32>,
    /// More for the command line of the hosts' kernel.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Give each case so many times its time: for a kernel that is slow by what it checks.
    #[arg(long, value_name = "FACTOR", default_value_t = 1)]
    pub slow: u32,
    /// What a line of the host's kernel log must hold: a case of its own demands each.
    #[arg(long, value_name = "WORDS")]
    pub expect: Vec<String>,
    /// Parameters of kvm_intel or kvm_amd, such as "ept=0": the same cases hold.
    #[arg(long, value_name = "TEXT")]
    pub kvm_args: Option<String>,
    /// The long cases in place of the others: load, churn, attacks.
    #[arg(long)]
    pub soak: bool,
    /// How much of the long cases' work to do, in percent.
    #[arg(long, value_name = "N", default_value_t = 100, requires = "soak",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub percent: u32,
    /// Only cases whose names hold one of these words.
    pub words: Vec<String>,
}

/// Runs the cases and tells what they came to; the last line has the numbers.
pub fn run(plan: &Plan) -> Result<ExitCode> {
    let hosts = match &plan.host {
        Some(host) => std::slice::from_ref(host),
        None => Host::value_variants(),
    };
    let verdicts: Vec<Result<Verdict>> = thread::scope(|scope| {
        let threads: Vec<_> = hosts
            .iter()
            .map(|host| scope.spawn(|| run_on(*host, plan)))
            .collect();
        threads.into_iter().map(joined).collect()
    });
    let mut sum = Verdict::default();
    for verdict in verdicts {
        let verdict = verdict?;
        sum.passed += verdict.passed;
        sum.failures.extend(verdict.failures);
        sum.last_words.extend(verdict.last_words);
    }
    for line in &sum.last_words {
        println!("{line}");
    }
    for failure in &sum.failures {
        println!("failed: {failure}");
    }
    println!("{} passed, {} failed", sum.passed, sum.failures.len());
    Ok(ExitCode::from(u8::from(!sum.failures.is_empty())))
}

/// What is expected, as arguments of this program.
pub fn expected(words: &[String]) -> impl Iterator<Item = String> + '_ {
    words.iter().map(|words| format!("--expect={words}"))
}

/// Boot a host for the cases, and end it.
fn run_on(host: Host, plan: &Plan) -> Result<Verdict> {
    let mut lab = command(host, plan)?
        .spawn()
        .context("cargo lab cannot be run; start the tests by cargo run -p system-tests")?;
    let stdout = lab.stdout.take().context("its output was asked for")?;
    let stderr = lab.stderr.take().context("its output was asked for")?;
    let mut report = Report::default();
    let last_words = thread::scope(|scope| {
        let last_words = scope.spawn(|| pass_on(stderr));
        for line in BufReader::new(stdout).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            println!("{host:<5} {line}");
            report.take(&line);
        }
        Ok::<_, anyhow::Error>(joined(last_words))
    })?;
    let status = lab.wait()?.code();
    let mut verdict = report.end(&host.to_string(), status);
    if !matches!(status, Some(0 | 1)) {
        let told = |line| format!("{host:<5} {line}");
        verdict.last_words = last_words.into_iter().map(told).collect();
    }
    Ok(verdict)
}

/// Return what a thread gives, or panic as it did.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Pass on what a command says of itself, and return its last lines.
fn pass_on(stderr: impl Read) -> Vec<String> {
    let mut last = VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        eprintln!("{line}");
        if last.len() == LAST_WORDS {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into()
}

/// Return for how many seconds a host may say nothing. A case says nothing until it ends, and the
/// inside ends one that takes too long; beyond that the host itself stands still. Twice the longest
/// case, as an emulator's clock can be slower than the wall's.
fn silence(plan: &Plan) -> u64 {
    if plan.soak {
        return plan.timeout;
    }
    let longest = cases::all().iter().map(|case| case.limit.as_secs()).max();
    let silence = 2 * longest.unwrap_or_default() * u64::from(plan.slow);
    silence.min(plan.timeout)
}

/// Return the command that boots a host for the cases.
fn command(host: Host, plan: &Plan) -> Result<Command> {
    let this = env::current_exe().context("the path of this program is not known")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let timeout = plan.timeout.to_string();
    let silence = silence(plan).to_string();
    let mut lab = Command::new(cargo);
    lab.args(["lab", "run", "--bpf", "--host", &host.to_string()])
        .args([
            "--cpus",
            &plan.cpus.unwrap_or(host.cpus(plan.soak)).to_string(),
        ])
        .args(["--timeout", &timeout, "--silence", &silence])
        .arg("--file")
        .arg(format!("{}:{INSIDE}", this.display()));
    if let Some(kernel) = &plan.kernel {
        lab.args(["--kernel", kernel]);
    }
    if let Some(model) = &plan.model {
        lab.args(["--model", model]);
    }
    if let Some(memory) = plan.memory {
        lab.args(["--memory", &memory.to_string()]);
    }
    if let Some(text) = &plan.append {
        lab.arg(format!("--append={text}"));
    }
    if let Some(parameters) = &plan.kvm_args {
        lab.args(["--kvm-args", parameters]);
    }
    let mut words = vec![INSIDE.to_owned(), "--inside".to_owned()];
    if plan.soak {
        words.extend(["--soak".to_owned(), format!("--percent={}", plan.percent)]);
    }
    lab.arg("--")
        .args(words)
        .args(["--slow", &plan.slow.to_string()])
        .args(expected(&plan.expect))
        .args(&plan.words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(lab)
}
