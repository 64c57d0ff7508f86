// SPDX-License-Identifier: GPL-2.0

//! The outside: a host for each run, what it recorded, and what is made of that.

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
    verdict::{End, Limits},
};

use self::{files::Files, recorded::Recorded};
use crate::{
    plan::{Guest, Run, RUNS},
    Arguments,
};

/// Somebody wants this to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; the runs before this one are kept")]
struct Interrupted;

/// The host's memory in MiB: for the guest's, its disk, and what runs it; the largest of these is QEMU with all it has.
const MEMORY: u32 = 1024;
const PC_MEMORY: u32 = 2048;

/// A recording that is larger would weigh on the repository.
const LARGEST: u64 = 250_000;

/// Where the study is, in the repository.
fn folder() -> PathBuf {
    setup::repository().join("docs/study")
}

fn recording(run: Run) -> PathBuf {
    folder().join(format!("{run}.rec"))
}

/// Makes the runs, and writes tables and pictures.
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
            // By its whole name also a run that is not in the plan.
            Ok(named) if !named.is_empty() => named,
            _ => RUNS.into_iter().filter(chosen).collect(),
        };
        ensure!(!runs.is_empty(), "no run has a name like that");
        for run in runs {
            // One that fails is not to take the others with it.
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
        "study: failed, and as they were before: {}",
        failed.join(", ")
    );
    Ok(ExitCode::FAILURE)
}

/// Makes one run, and keeps what it recorded.
fn record(run: Run) -> Result<()> {
    let files = Files::get(run)?;
    let mut options = Options::new(
        run.host,
        ["/usr/local/bin/study", "--inside", &run.to_string()],
    );
    options.machine.memory = if run.guest == Guest::Pc {
        PC_MEMORY
    } else {
        MEMORY
    };
    // Two vCPUs are to run at the same time, where the emulator can do so without paying for it with all its speed.
    options.machine.cpus = if (run.host, run.guest) == (Host::Amd, Guest::Smp) {
        2
    } else {
        1
    };
    options.machine.icount = run.host == Host::Amd && run.counts_instructions();
    options.kernel = files.kernel;
    options.kvm = Some(run.kvm().to_owned());
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
            // How long each takes here, where the emulator runs.
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
    if matches!(outcome.end, End::Interrupted) {
        return Err(Interrupted.into());
    }
    if !matches!(outcome.end, End::Script(0)) {
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

/// Keeps a recording, if it is whole and small.
fn keep(run: Run, made: &Path, date: SystemTime) -> Result<()> {
    let read = Recorded::read(run, made)?;
    ensure!(
        read.whole,
        "{run}: its recording is cut off: {}",
        made.display()
    );
    let size = fs::metadata(made)?.len();
    ensure!(
        size <= LARGEST,
        "{run}: its recording has {size} bytes, which are too many to keep; record with a larger interval"
    );
    fs::copy(made, recording(run))
        .with_context(|| format!("cannot write {}", recording(run).display()))?;
    recorded::note_date(&folder(), run, date)
}
