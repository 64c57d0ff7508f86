// SPDX-License-Identifier: GPL-2.0

//! `cargo lab prepare` makes the whole set-up.

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
    process::Command,
};

use anyhow::{ensure, Context as _, Result};
use rustix::fs::{flock, FlockOperation};

use super::{
    engine::{size_of, Engine, Step},
    with_engine, Plan, SetupError, SetupOptions,
};

/// Arguments of `cargo lab prepare`.
#[derive(Debug, clap::Args)]
pub struct PrepareArgs {
    /// Debian's kernel: a version (7.2.12), series (6.12) or release (7.2.12+deb13-amd64); by default the newest of backports
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,

    /// Also fetch perf, which the benchmark needs
    #[arg(long)]
    perf: bool,

    /// Also build KVM's selftests
    #[arg(long)]
    selftests: bool,

    /// Print for each step the seconds it took when it was made, its size and its folder
    #[arg(long)]
    timings: bool,

    /// Remove downloads from the cache, and the results of other versions of the scripts and for other kernels
    #[arg(long)]
    prune: bool,
}

/// Run `cargo lab prepare`: make everything that runs need, so that no run has to wait for it.
///
/// # Errors
///
/// An error if the set-up fails, or standard output is closed.
pub fn command(args: PrepareArgs) -> Result<()> {
    let wanted = SetupOptions {
        kernel: args.kernel,
        tree: true,
        bochs: true,
        perf: args.perf,
        selftests: args.selftests,
    };
    with_engine(|engine| {
        let plan = Plan::new(engine, &wanted)?;
        plan.make(engine, || Ok::<_, SetupError>(()), || Ok(()))?;
        let steps = plan.steps();
        if args.prune {
            prune(engine, &steps)?;
        }
        if args.timings {
            print_timings(&steps)?;
        }
        Ok(())
    })
}

fn print_timings(steps: &[&Step]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{:<9}{:>9}{:>7}  folder", "step", "seconds", "MiB")?;
    for step in steps {
        writeln!(
            out,
            "{:<9}{:>9}{:>7}  {}",
            step.name,
            step.seconds().unwrap_or_default(),
            size_of(&step.out) >> 20,
            step.out.display()
        )?;
    }
    Ok(())
}

/// Remove all downloads, and all old results of `steps` that no run is making.
fn prune(engine: &Engine<'_>, steps: &[&Step]) -> Result<()> {
    let mut old = vec![];
    let mut locks = vec![];
    for entry in fs::read_dir(engine.cache).context("cannot read the cache")? {
        let path = entry.context("cannot read the cache")?.path();
        if path.ends_with("downloads") {
            old.push(path);
        } else if is_old(&path, steps) {
            let (_, lock) = engine.lock_file(&path)?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                locks.push(lock);
                old.push(path);
            }
        }
    }
    if old.is_empty() {
        return Ok(());
    }
    // If the user is not root, the files of a root belong to the user's sub-ids.
    let status = Command::new("bash")
        .args(["-c", r#". "$0/common.sh" && as_root rm -rf -- "$@""#])
        .arg(engine.scripts)
        .args(&old)
        .status()
        .context("cannot run bash")?;
    ensure!(status.success(), "cannot remove all old results; see above");
    for path in old {
        engine.progress.note(&format!("removed {}", path.display()));
    }
    Ok(())
}

/// Return true if a path is a result of one of `steps` that other scripts made or that is for another kernel.
fn is_old(path: &Path, steps: &[&Step]) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let made_by = |step: &Step| {
        let key = name
            .strip_prefix(step.name)
            .and_then(|rest| rest.strip_prefix('-'));
        key.is_some_and(|key| key.len() == step.key.len() && key != step.key)
    };
    steps.iter().any(|step| made_by(step))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{engine::Recipe, progress::Progress},
        *,
    };
    use crate::interrupt;

    #[test]
    fn only_other_results_of_the_same_steps_are_old() {
        let scripts = super::super::repository().join("scripts");
        let progress = Progress::new(Box::new(io::sink()), None);
        let interrupts = interrupt::defer();
        let cache = Path::new("/cache");
        let engine = Engine::new(&scripts, cache, &progress, &interrupts);
        let recipe = Recipe {
            name: "root",
            mib: 0,
            settings: &[],
            needs: &[],
        };
        let root = engine.step(&recipe).expect("the script is there");
        let old = |name: &str| is_old(&cache.join(name), &[&root]);
        assert!(old("root-0123456789ab"));
        let own = format!("root-{}", root.key);
        for kept in [
            own.as_str(),
            "root-mine",
            "images",
            "locks",
            "bochs-0123456789ab",
        ] {
            assert!(!old(kept), "{kept}");
        }
    }
}
