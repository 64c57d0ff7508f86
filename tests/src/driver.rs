// SPDX-License-Identifier: GPL-2.0

//! The driver: boot a host with this program in it, and judge its output.

use std::{
    collections::VecDeque,
    env,
    io::{self, Write as _},
    panic,
    process::ExitCode,
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum as _};
use lab::{
    host::Host,
    image::payload::FileSpec,
    programs::{self, Tool},
    run::{self, Event, Lines, Options},
    setup::{self, SetupOptions},
    verdict::Limits,
};

use crate::{
    cases,
    ktap::{Collector, Verdict},
};

/// Path of this program in the host.
const PROGRAM: &str = "/usr/local/bin/system-tests";

/// Variant of the tool in the hosts.
const TOOL: Tool = Tool::WithBpf;

/// Number of the last lines of the standard error and of the logs that are repeated at the end.
const LAST_LINES: usize = 100;

/// Status of a run that could not start, as of `cargo lab run`.
const NOT_STARTED: u8 = 100;

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
pub struct RunArgs {
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
pub fn run(args: &RunArgs) -> Result<ExitCode> {
    let hosts = match &args.host {
        Some(host) => std::slice::from_ref(host),
        None => Host::value_variants(),
    };
    // One set-up for all hosts, so that its progress has the terminal to itself. Much of it waits for the
    // network; meanwhile the programs are built.
    thread::scope(|scope| {
        let programs = scope.spawn(|| programs::build(TOOL));
        setup::prepare(&SetupOptions {
            kernel: args.kernel.clone(),
            tree: true,
            bochs: hosts.contains(&Host::Intel),
            ..SetupOptions::default()
        })?;
        join(programs)?;
        anyhow::Ok(())
    })?;
    let verdicts: Vec<Result<Verdict>> = thread::scope(|scope| {
        let threads: Vec<_> = hosts
            .iter()
            .map(|host| scope.spawn(|| run_on(*host, args)))
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
fn run_on(host: Host, args: &RunArgs) -> Result<Verdict> {
    let mut collector = Collector::default();
    let mut take = |line: String| {
        println!("{host:<5} {line}");
        collector.take(&line);
    };
    let (mut stdout, mut stderr) = (Lines::default(), Lines::default());
    let mut last_lines = LastLines::default();
    let outcome = run::run(&options(host, args)?, &mut |event| match event {
        Event::Stdout(bytes) => stdout.take(bytes).into_iter().for_each(&mut take),
        Event::Stderr(bytes) => {
            let _ = io::stderr().write_all(bytes);
            last_lines.extend(stderr.take(bytes));
        }
        Event::Stage(_) | Event::Kernel(_) => {}
    });
    stdout.finish().into_iter().for_each(take);
    last_lines.extend(stderr.finish());
    let (tail, summary, status) = match outcome {
        Ok(outcome) => {
            let (summary, status) = (outcome.summary(), outcome.end.status());
            (outcome.tail, summary, status)
        }
        Err(error) => (
            String::new(),
            format!("{:#}", anyhow::Error::from(error)),
            NOT_STARTED,
        ),
    };
    let end = tail.lines().map(str::to_owned);
    for line in end.chain([format!("lab: {summary}")]) {
        eprintln!("{line}");
        last_lines.extend([line]);
    }
    let mut verdict = collector.end(&host.to_string(), status);
    if !matches!(status, 0 | 1) {
        let prefixed = |line| format!("{host:<5} {line}");
        verdict.last_lines = last_lines.0.into_iter().map(prefixed).collect();
    }
    Ok(verdict)
}

/// The last [`LAST_LINES`] lines.
#[derive(Default)]
struct LastLines(VecDeque<String>);

impl LastLines {
    fn extend(&mut self, lines: impl IntoIterator<Item = String>) {
        for line in lines {
            if self.0.len() == LAST_LINES {
                self.0.pop_front();
            }
            self.0.push_back(line);
        }
    }
}

/// Return a thread's result, or resume its panic.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Return the longest time without output, in seconds, after which a host counts as hung. A case
/// prints nothing until it ends, and `in_host` kills a case that takes too long. The limit is twice
/// the longest case because an emulator's clock can be slower than the wall's.
fn silence_limit(args: &RunArgs) -> u64 {
    if args.soak {
        return args.timeout;
    }
    let longest = cases::all().iter().map(|case| case.limit.as_secs()).max();
    let silence = 2 * longest.unwrap_or_default() * u64::from(args.slow);
    silence.min(args.timeout)
}

/// Return the options of the run that boots a host and runs the cases in it.
fn options(host: Host, args: &RunArgs) -> Result<Options> {
    let this = env::current_exe().context("the path of this program is not known")?;
    let mut words = vec![PROGRAM.to_owned(), "--in-host".to_owned()];
    if args.soak {
        words.extend(["--soak".to_owned(), format!("--percent={}", args.percent)]);
    }
    words.extend(["--slow".to_owned(), args.slow.to_string()]);
    words.extend(expect_arguments(&args.expect));
    words.extend_from_slice(&args.words);
    let mut options = Options::new(host, words);
    let machine = &mut options.machine;
    machine.model.clone_from(&args.model);
    machine.cpus = args.cpus.unwrap_or(default_cpus(host, args.soak));
    machine.memory = args.memory.unwrap_or(machine.memory);
    machine.append = args.append.clone().unwrap_or_default();
    options.kernel.clone_from(&args.kernel);
    options.kvm_parameters = Some(args.kvm_args.clone().unwrap_or_default());
    options.tool = TOOL;
    options.files = vec![FileSpec::at(this, PROGRAM)];
    options.limits = Limits {
        time: Duration::from_secs(args.timeout),
        silence: Duration::from_secs(silence_limit(args)),
    };
    Ok(options)
}
