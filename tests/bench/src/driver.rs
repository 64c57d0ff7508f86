// SPDX-License-Identifier: GPL-2.0

//! Compiles the BPF programs, boots a host with this program in it, and prints the results.

mod bpf;
pub mod reason;

use std::{
    env, fs,
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::ValueEnum as _;
use lab::{
    host::Host,
    image::payload::FileSpec,
    module,
    run::{self, Event, Lines, Options, Outcome},
    setup::{self, SetupOptions},
    verdict::{Limits, RunEnd},
};

use crate::{
    meters::{PARTS_FOLDER, PERF_FOLDER},
    report::Report,
    Arguments, Plan,
};

/// Folder of the BPF programs in the host.
pub const BPF_FOLDER: &str = "/usr/local/lib/bpf";
/// File in the host with the offsets of the exit reason.
pub const REASON_FILE: &str = "/usr/local/lib/bpf/reason.json";
/// This program in the host.
const PROGRAM: &str = "/usr/local/bin/bench";

/// Memory of the host, in MiB. It holds perf's data, 230 bytes for each exit.
const MEMORY: u32 = 1024;

/// Boot one host, measure, print the results and write them as JSON.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut options = Options::new(arguments.host, command(&arguments.plan));
    options.kernel.clone_from(&arguments.kernel);
    options.machine.memory = MEMORY;
    // Without icount the TSC of the AMD host follows the wall clock.
    options.machine.icount = arguments.host == Host::Amd;
    options.limits = Limits {
        time: Duration::from_secs(3600),
        // The host prints nothing while a slow meter is measured.
        silence: Duration::from_secs(900),
    };
    let prepared = setup::prepare(&SetupOptions {
        kernel: arguments.kernel.clone(),
        tree: true,
        bochs: arguments.host == Host::Intel,
        perf: true,
        ..SetupOptions::default()
    })?;
    let files = setup::repository().join(format!("build/bench-{}", arguments.host));
    fs::create_dir_all(&files).with_context(|| format!("cannot make {}", files.display()))?;
    bpf::compile(&prepared, &files)?;
    let offsets = reason::find(&prepared, arguments.host)?;
    fs::write(files.join("reason.json"), serde_json::to_string(&offsets)?)?;
    let this = env::current_exe().context("cannot find the path of this program")?;
    options.files = vec![FileSpec::at(this, PROGRAM), FileSpec::at(files, BPF_FOLDER)];
    for meter in &arguments.plan.meters() {
        let Some(part) = meter.part() else { continue };
        let module = module::build_with(&prepared, &[format!("EXITMETER_ONLY={part}")], false)?;
        let place = format!("{PARTS_FOLDER}/{part}.ko");
        options.files.push(FileSpec::at(module, place));
    }
    options
        .files
        .extend(prepared.perf.map(|perf| FileSpec::at(perf, PERF_FOLDER)));

    let mut report = Report {
        host: arguments.host.to_string(),
        kernel: prepared.release,
        count: arguments.plan.count,
        ..Report::default()
    };
    let outcome = run_host(&options, &mut report)?;
    report.finish();
    print_results(&report, &outcome, arguments.json.as_deref())?;
    Ok(match outcome.end {
        RunEnd::Script(0) if report.failures.is_empty() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Return the command line of this program in the host.
fn command(plan: &Plan) -> Vec<String> {
    let mut words: Vec<String> = vec![PROGRAM.into(), "--in-host".into()];
    let mut option = |name: &str, value: String| words.push(format!("--{name}={value}"));
    option("runs", plan.runs.to_string());
    option("count", plan.count.to_string());
    let names = |values: Vec<Option<clap::builder::PossibleValue>>| {
        let values = values.into_iter().flatten();
        let names: Vec<_> = values.map(|value| value.get_name().to_owned()).collect();
        names.join(",")
    };
    if !plan.meters.is_empty() {
        let values = plan.meters.iter().map(|meter| meter.to_possible_value());
        option("meters", names(values.collect()));
    }
    if !plan.exits.is_empty() {
        let values = plan.exits.iter().map(|exit| exit.to_possible_value());
        option("exits", names(values.collect()));
    }
    words
}

/// Run the host and collect the lines that it prints.
fn run_host(options: &Options, report: &mut Report) -> Result<Outcome> {
    let terminal = io::stderr().is_terminal();
    let mut stdout = Lines::default();
    let outcome = run::run(options, &mut |event| match event {
        Event::Stdout(bytes) => {
            for line in stdout.take(bytes) {
                if report.take(line.trim()) {
                    progress(report, terminal);
                } else {
                    eprintln!("{line}");
                }
            }
        }
        Event::Stderr(bytes) => {
            let _ = io::stderr().write_all(bytes);
        }
        Event::Stage(text) if terminal => eprintln!("bench: {text}"),
        Event::Stage(_) | Event::Kernel(_) => {}
    })?;
    if terminal {
        eprintln!();
    }
    Ok(outcome)
}

fn progress(report: &Report, terminal: bool) {
    let Some(last) = report.costs.last() else {
        return;
    };
    if terminal {
        let (meter, exit) = (last.cost.meter.title(), last.cost.exit.title());
        eprint!("\r\x1b[Kbench: {meter}: {exit}");
    }
}

/// Print the results, remarks and failures, and write the JSON.
fn print_results(report: &Report, outcome: &Outcome, json: Option<&Path>) -> Result<()> {
    print!("{}", report.table());
    println!(
        "Medians. The first line has all ticks of an exit; the others have the ticks that a meter adds, and their ratio to exitmeter's.\n\
         ± is half of the spread of all runs. Host {}, Linux {}, {} exits in each run.",
        report.host, report.kernel, report.count
    );
    for saw in &report.saw {
        let remark = saw.remark.as_deref().unwrap_or_default();
        let comma = if remark.is_empty() { "" } else { ", " };
        let Some(seen) = saw.seen else { continue };
        println!(
            "{} saw {seen} exits; the guests caused at least {}{comma}{remark}",
            saw.meter.title(),
            saw.known
        );
    }
    for failure in &report.failures {
        println!("failed: {failure}");
    }
    let text = serde_json::to_string_pretty(report)?;
    let beside = outcome.folder.join("bench.json");
    for path in [Some(beside.as_path()), json].into_iter().flatten() {
        fs::write(path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    eprint!("{}", outcome.tail);
    eprintln!(
        "bench: {} after {:.1} s; the numbers are in {}",
        outcome.end,
        outcome.time.as_secs_f64(),
        beside.display()
    );
    Ok(())
}
