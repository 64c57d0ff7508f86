// SPDX-License-Identifier: GPL-2.0

//! The outside: boot a host with this program in it, and judge its output.

use std::{
    collections::VecDeque,
    env,
    io::{BufRead as _, BufReader, Read},
    panic,
    process::{Command, ExitCode, Stdio},
    thread::{self, ScopedJoinHandle},
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum as _};
use lab::host::Host;

use crate::{
    cases,
    ktap::{Collector, Verdict},
};

/// Path of this program in the host.
const INSIDE: &str = "/usr/local/bin/system-tests";

/// Last lines of the lab command's standard error that are repeated at the end.
const LAST_LINES: usize = 100;

/// Return the number of CPUs that `host` gets by default. QEMU emulates two CPUs by two threads, which
/// is not stable for hours; Bochs uses one thread, which is, and takes twice the time: see
/// docs/testing.md.
fn default_cpus(host: Host, soak: bool) -> u32 {
    match (host, soak) {
        (Host::Intel, true) => 2,
        _ => 1,
    }
}

/// Options of a run.
#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// Host to run on; both at the same time when not given.
    #[arg(long, value_enum)]
    pub host: Option<Host>,
    /// Time limit of one host, in seconds of wall-clock time.
    #[arg(long, default_value_t = 3600)]
    pub timeout: u64,
    /// CPUs of each host; when not given 1, and 2 on Intel for the long cases.
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Debian kernel of the hosts, as a version or release; the newest in backports when not given.
    #[arg(long, value_name = "VERSION")]
    pub kernel: Option<String>,
    /// CPU model of the hosts, by its emulator's name, such as arrow_lake.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Memory of each host; the lab's default when not given.
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u32>,
    /// Text to append to the command line of the hosts' kernel.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Factor for the time limit of each case, for debug kernels.
    #[arg(long, value_name = "FACTOR", default_value_t = 1)]
    pub slow: u32,
    /// Words that a line of the host's kernel log must hold; each adds a case.
    #[arg(long, value_name = "WORDS")]
    pub expect: Vec<String>,
    /// Parameters of kvm_intel or kvm_amd, such as "ept=0"; the cases hold with any.
    #[arg(long, value_name = "TEXT")]
    pub kvm_args: Option<String>,
    /// Run the long cases instead: load, churn, attacks.
    #[arg(long)]
    pub soak: bool,
    /// Share of the long cases' work to do, in percent.
    #[arg(long, value_name = "N", default_value_t = 100, requires = "soak",
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub percent: u32,
    /// Run only the cases whose names hold one of these words.
    pub words: Vec<String>,
}

/// Run the cases and print the result; the last line has the numbers.
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
        threads.into_iter().map(join).collect()
    });
    let mut sum = Verdict::default();
    for verdict in verdicts {
        let verdict = verdict?;
        sum.passed += verdict.passed;
        sum.failures.extend(verdict.failures);
        sum.last_lines.extend(verdict.last_lines);
    }
    for line in &sum.last_lines {
        println!("{line}");
    }
    for failure in &sum.failures {
        println!("failed: {failure}");
    }
    println!("{} passed, {} failed", sum.passed, sum.failures.len());
    Ok(ExitCode::from(u8::from(!sum.failures.is_empty())))
}

/// Return `words` as the `--expect` arguments of this program.
pub fn expect_arguments(words: &[String]) -> impl Iterator<Item = String> + '_ {
    words.iter().map(|words| format!("--expect={words}"))
}

/// Boot a host, run the cases in it, and return their verdict.
fn run_on(host: Host, plan: &Plan) -> Result<Verdict> {
    let mut lab = command(host, plan)?
        .spawn()
        .context("cargo lab cannot be run; start the tests by cargo run -p system-tests")?;
    let stdout = lab.stdout.take().context("stdout is piped")?;
    let stderr = lab.stderr.take().context("stderr is piped")?;
    let mut collector = Collector::default();
    let last_lines = thread::scope(|scope| {
        let last_lines = scope.spawn(|| copy_stderr(stderr));
        for line in BufReader::new(stdout).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            println!("{host:<5} {line}");
            collector.take(&line);
        }
        Ok::<_, anyhow::Error>(join(last_lines))
    })?;
    let status = lab.wait()?.code();
    let mut verdict = collector.end(&host.to_string(), status);
    if !matches!(status, Some(0 | 1)) {
        let prefixed = |line| format!("{host:<5} {line}");
        verdict.last_lines = last_lines.into_iter().map(prefixed).collect();
    }
    Ok(verdict)
}

/// Return a thread's result, or resume its panic.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Copy a command's standard error to our own, and return its last lines.
fn copy_stderr(stderr: impl Read) -> Vec<String> {
    let mut last = VecDeque::new();
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        eprintln!("{line}");
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into()
}

/// Return the longest time without output, in seconds, after which a host counts as hung. A case
/// prints nothing until it ends, and the inside kills a case that takes too long. The limit is twice
/// the longest case because an emulator's clock can be slower than the wall's.
fn silence_limit(plan: &Plan) -> u64 {
    if plan.soak {
        return plan.timeout;
    }
    let longest = cases::all().iter().map(|case| case.limit.as_secs()).max();
    let silence = 2 * longest.unwrap_or_default() * u64::from(plan.slow);
    silence.min(plan.timeout)
}

/// Return the command that boots a host and runs the cases in it.
fn command(host: Host, plan: &Plan) -> Result<Command> {
    let this = env::current_exe().context("the path of this program is not known")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let timeout = plan.timeout.to_string();
    let silence = silence_limit(plan).to_string();
    let mut lab = Command::new(cargo);
    lab.args(["lab", "run", "--bpf", "--host", &host.to_string()])
        .args([
            "--cpus",
            &plan
                .cpus
                .unwrap_or(default_cpus(host, plan.soak))
                .to_string(),
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
        .args(expect_arguments(&plan.expect))
        .args(&plan.words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(lab)
}
