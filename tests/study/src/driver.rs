// SPDX-License-Identifier: GPL-2.0

//! Boots a host for each run, keeps its recording, and writes tables and pictures.

mod document;
mod files;
mod pictures;
mod recorded;

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{bail, ensure, Context as _, Result};
use lab::{
    host::Host,
    run::{self, Event, Options},
    setup,
    verdict::{Limits, RunEnd},
};

use self::{files::Files, recorded::Recorded};
use crate::{
    plan::{GuestKind, Run, RUNS},
    Arguments,
};

/// Error of a study that was interrupted.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; the runs before this one are kept")]
struct Interrupted;

/// Memory of the host, in MiB. It holds the guest's memory, the guest's disk, and the VMM with its files. Those of QEMU with
/// PCI need the most.
const MEMORY: u32 = 1024;
const PC_MEMORY: u32 = 2048;

/// Largest recording to keep in the repository, in bytes.
const MAX_RECORDING: u64 = 250_000;

/// Return the study's folder in the repository.
fn folder() -> PathBuf {
    setup::repository().join("docs/study")
}

fn recording(run: Run) -> PathBuf {
    folder().join(format!("{run}.rec"))
}

/// Make the runs, and write tables and pictures.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let words = &arguments.words;
    let chosen = |run: &Run| {
        let name = run.to_string();
        words.is_empty() || words.iter().any(|word| name.contains(word))
    };
    fs::create_dir_all(folder())?;
    let mut failed = Vec::new();
    if !arguments.only_write {
        let started = Instant::now();
        let runs: Vec<Run> = match words
            .iter()
            .map(|word| word.parse())
            .collect::<Result<Vec<_>, _>>()
        {
            // A full name also selects a run that is not in the plan.
            Ok(named) if !named.is_empty() => named,
            _ => RUNS.into_iter().filter(chosen).collect(),
        };
        ensure!(!runs.is_empty(), "no run's name contains such a word");
        for run in runs {
            // After a failure the other runs still go on.
            if let Err(error) = record(run) {
                if error.is::<Interrupted>() {
                    return Err(error);
                }
                println!("\nfailed: {run}: {error:#}");
                failed.push(run.to_string());
            }
        }
        println!(
            "study: recorded in {:.0} s",
            started.elapsed().as_secs_f64()
        );
    }
    let mut all = Vec::new();
    for run in RUNS.into_iter().filter(|run| recording(*run).is_file()) {
        all.push(Recorded::read(run, &recording(run))?);
    }
    pictures::draw(&all, &folder())?;
    document::write(&all, &setup::repository().join("docs/study.md"))?;
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "study: these runs failed and keep their earlier recordings: {}",
        failed.join(", ")
    );
    Ok(ExitCode::FAILURE)
}

/// Make one run, and keep its recording.
fn record(run: Run) -> Result<()> {
    let files = Files::get(run)?;
    let mut options = Options::new(
        run.host,
        ["/usr/local/bin/study", "--in-host", &run.to_string()],
    );
    options.machine.memory = if run.guest == GuestKind::Pc {
        PC_MEMORY
    } else {
        MEMORY
    };
    // Two vCPUs run in parallel where that does not slow down the emulator as a whole.
    options.machine.cpus = if (run.host, run.guest) == (Host::Amd, GuestKind::Smp) {
        2
    } else {
        1
    };
    options.machine.icount = run.host == Host::Amd && run.counts_instructions();
    options.kernel = files.kernel;
    options.kvm_parameters = Some(run.kvm_parameters().to_owned());
    options.files = files.specs;
    options.limits = Limits {
        time: Duration::from_secs(1800),
        silence: Duration::from_secs(900),
    };
    print!("{run}:");
    io::stdout().flush()?;
    let (date, started) = (SystemTime::now(), Instant::now());
    let outcome = run::run(&options, &mut |event| match event {
        Event::Stdout(bytes) => {
            // Print the time of each stage by the clock of this machine.
            let stages = String::from_utf8_lossy(bytes);
            for name in stages.lines() {
                print!(" [{:.0} s] {name}", started.elapsed().as_secs_f64());
            }
            let _ = io::stdout().flush();
        }
        Event::Stderr(bytes) => {
            let _ = io::stderr().write_all(bytes);
        }
        Event::Stage(_) | Event::Kernel(_) => {}
    })?;
    println!(", {:.0} s", outcome.time.as_secs_f64());
    if matches!(outcome.end, RunEnd::Interrupted) {
        return Err(Interrupted.into());
    }
    if !matches!(outcome.end, RunEnd::Script(0)) {
        bail!(
            "{run}: {}; see {}\n{}",
            outcome.end,
            outcome.folder.display(),
            outcome.tail
        );
    }
    let made = outcome.out.join(format!("{run}.rec"));
    keep(run, &made, date)
}

/// Keep a recording, if it is complete and small.
fn keep(run: Run, made: &Path, date: SystemTime) -> Result<()> {
    let read = Recorded::read(run, made)?;
    ensure!(
        read.is_complete,
        "{run}: its recording is cut off: {}",
        made.display()
    );
    let size = fs::metadata(made)?.len();
    ensure!(
        size <= MAX_RECORDING,
        "{run}: its recording of {size} bytes is too large to keep; record with a larger interval"
    );
    fs::copy(made, recording(run))
        .with_context(|| format!("cannot write {}", recording(run).display()))?;
    recorded::write_date(&folder(), run, date)
}
