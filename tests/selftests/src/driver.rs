// SPDX-License-Identifier: GPL-2.0

//! Boots hosts with this program and the tests in them, and compares the verdicts of each test.

mod hosts;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs, panic,
    path::Path,
    process::ExitCode,
    thread::{self, ScopedJoinHandle},
    time::Instant,
};

use anyhow::{ensure, Context as _, Result};
use lab::{
    host::Host,
    image::payload::FileSpec,
    setup::{self, Setup, SetupOptions},
};

use self::hosts::HostConfig;
use crate::{document, in_host, verdict::TestRun, Arguments};

/// This program in the host.
const PROGRAM: &str = "/usr/local/bin/selftests";

/// A program that is not a test by itself: a script of the same name runs it.
const HELPER: &str = "x86/nx_huge_pages_test";

/// Runs of one test on one host: the first one, and the repetitions while its verdicts differ.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    /// Runs without the module.
    pub without: Vec<TestRun>,
    /// Runs with the module.
    pub with: Vec<TestRun>,
}

impl Compared {
    /// Return true if the module may make a difference: the verdicts differ, and do not vary without the module.
    fn is_undecided(&self) -> bool {
        let verdicts =
            |runs: &[TestRun]| runs.iter().map(|run| run.verdict).collect::<BTreeSet<_>>();
        verdicts(&self.without) != verdicts(&self.with) && !self.is_random()
    }

    /// Return true if the test has more than one verdict without the module.
    pub fn is_random(&self) -> bool {
        let first = self.without.first().map(|run| run.verdict);
        self.without.iter().any(|run| Some(run.verdict) != first)
    }

    /// Return the failures.
    fn troubles(&self) -> Vec<String> {
        let mut troubles = Vec::new();
        if self.with.is_empty() || self.without.is_empty() {
            troubles.push("it did not run both ways".to_owned());
        } else if self.is_undecided() {
            troubles.push(format!(
                "without the module {}, with it {}",
                document::tally(&self.without),
                document::tally(&self.with)
            ));
        }
        for (runs, way) in [(&self.without, "without"), (&self.with, "with")] {
            for trouble in runs.iter().flat_map(|run| &run.troubles) {
                troubles.push(format!("{way} the module: {trouble}"));
            }
        }
        troubles
    }
}

/// Results of all tests on one host.
#[derive(Debug)]
pub struct Results {
    /// Host that ran the tests.
    pub host: Host,
    /// CPUs of the host.
    pub cpus: u32,
    /// Runs by the name of the test.
    pub tests: BTreeMap<String, Compared>,
    /// Failures that belong to no single test.
    pub troubles: Vec<String>,
    /// Duration by the wall clock, in minutes.
    pub minutes: f64,
}

/// Results of all hosts.
#[derive(Debug)]
pub struct AllResults {
    /// Release of the hosts' kernel.
    pub release: String,
    /// Results of each host.
    pub results: Vec<Results>,
    /// Names of the tests that do not build.
    pub unbuilt: Vec<String>,
}

/// Run the tests without and with the module on the hosts, print the verdicts, and write the tables.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let hosts = match &arguments.host {
        Some(host) => std::slice::from_ref(host),
        None => &[Host::Amd, Host::Intel],
    };
    let prepared = setup::prepare(&SetupOptions {
        kernel: arguments.kernel.clone(),
        tree: true,
        bochs: hosts.contains(&Host::Intel),
        selftests: true,
        ..SetupOptions::default()
    })?;
    let folder = prepared
        .selftests
        .as_deref()
        .context("they were asked for")?;
    let names = names(&folder.join("bin"), &arguments.words)?;
    let configs = hosts.iter().map(|host| config(*host, arguments, &prepared));
    let configs: Vec<HostConfig> = configs.collect::<Result<_>>()?;
    let results = together(&configs, |config| {
        both_ways(config, &names, arguments.repeat)
    });
    let all = AllResults {
        release: prepared.release.clone(),
        results: results.into_iter().collect::<Result<_>>()?,
        unbuilt: fs::read_to_string(folder.join("unbuilt"))?
            .lines()
            .map(str::to_owned)
            .collect(),
    };
    report(&all, arguments.table.as_deref())
}

/// Return the names of the tests that contain one of the words, or all names without words.
fn names(folder: &Path, words: &[String]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (folder, prefix) in [(folder.to_owned(), ""), (folder.join("x86"), "x86/")] {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.push(format!("{prefix}{}", entry.file_name().to_string_lossy()));
            }
        }
    }
    names.retain(|name| {
        name != HELPER && (words.is_empty() || words.iter().any(|word| name.contains(word)))
    });
    names.sort();
    ensure!(!names.is_empty(), "no test's name contains such a word");
    Ok(names)
}

/// Return the configuration of a host.
fn config(host: Host, arguments: &Arguments, prepared: &Setup) -> Result<HostConfig> {
    let this = env::current_exe().context("cannot find the path of this program")?;
    let tests = prepared
        .selftests
        .as_deref()
        .context("they were asked for")?;
    Ok(HostConfig {
        host,
        // Several CPUs slow down Bochs as a whole.
        cpus: arguments.cpus.unwrap_or(match host {
            Host::Intel => 1,
            Host::Amd => 2,
        }),
        kernel: arguments.kernel.clone(),
        files: vec![
            FileSpec::at(this, PROGRAM),
            FileSpec::at(tests.join("bin"), in_host::FOLDER),
        ],
    })
}

/// Call `work` for each element, all at the same time, and return the results.
fn together<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let spawn = |one| scope.spawn(move || work(one));
        let threads: Vec<_> = all.iter().map(spawn).collect();
        let join = |thread: ScopedJoinHandle<'_, _>| match thread.join() {
            Ok(result) => result,
            Err(panic) => panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}

/// Run the tests without the module and with it, and repeat those whose verdicts differ.
fn both_ways(config: &HostConfig, names: &[String], repeat: usize) -> Result<Results> {
    let started = Instant::now();
    let mut troubles = Vec::new();
    let mut tests: BTreeMap<String, Compared> = BTreeMap::new();
    let mut again = names.to_vec();
    for _ in 0..=repeat {
        // They run side by side, so that the machine is equally busy for both.
        let ways = [false, true];
        let ran = together(&ways, |metered| config.run(*metered, &again));
        for (metered, ran) in ways.into_iter().zip(ran) {
            let (runs, at_the_end) = ran?;
            troubles.extend(at_the_end);
            for run in runs {
                let compared = tests.entry(run.name.clone()).or_default();
                match metered {
                    false => compared.without.push(run),
                    true => compared.with.push(run),
                }
            }
        }
        let undecided = tests.iter().filter(|(_, compared)| compared.is_undecided());
        again = undecided.map(|(name, _)| name.clone()).collect();
        if again.is_empty() {
            break;
        }
    }
    Ok(Results {
        host: config.host,
        cpus: config.cpus,
        tests,
        troubles,
        minutes: started.elapsed().as_secs_f64() / 60.,
    })
}

/// Print failures and summaries, and write the tables.
fn report(all: &AllResults, table: Option<&Path>) -> Result<ExitCode> {
    let mut failed = 0;
    for results in &all.results {
        let host = results.host;
        for (name, compared) in &results.tests {
            for trouble in compared.troubles() {
                println!("failed: {host} {name}: {trouble}");
                failed += 1;
            }
        }
        for trouble in &results.troubles {
            println!("failed: {host}: {trouble}");
            failed += 1;
        }
        println!("{}", document::summary(results));
    }
    if let Some(path) = table {
        fs::write(path, document::write(all))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("The tables are in {}", path.display());
    }
    println!("{failed} failed");
    Ok(ExitCode::from(u8::from(failed != 0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::Verdict::{self, Fail, Pass};

    fn compared(without: &[Verdict], with: &[Verdict]) -> Compared {
        let runs = |verdicts: &[Verdict]| {
            let run = |verdict: &Verdict| TestRun {
                name: "a_test".to_owned(),
                verdict: *verdict,
                why: String::new(),
                seconds: 1.,
                exits: 2,
                reasons: 1,
                troubles: Vec::new(),
            };
            verdicts.iter().map(run).collect()
        };
        Compared {
            without: runs(without),
            with: runs(with),
        }
    }

    #[test]
    fn a_verdict_that_differs_is_a_failure_unless_it_varies_without_the_module() {
        for (without, with) in [
            (&[Pass][..], &[Pass][..]),
            (&[Fail], &[Fail]),
            (&[Fail, Pass], &[Pass, Pass]),
            (&[Pass, Fail], &[Fail, Pass]),
        ] {
            let compared = compared(without, with);
            assert!(compared.troubles().is_empty(), "{without:?} {with:?}");
        }
        for (without, with) in [
            (&[Pass][..], &[Fail][..]),
            (&[Pass, Pass], &[Fail, Pass]),
            (&[Pass], &[]),
            (&[], &[]),
        ] {
            let compared = compared(without, with);
            assert_eq!(compared.troubles().len(), 1, "{without:?} {with:?}");
        }
    }

    #[test]
    fn an_error_around_a_test_is_a_failure() {
        let mut compared = compared(&[Pass], &[Pass]);
        compared.with[0].troubles = vec!["2 ledgers are left".to_owned()];
        assert_eq!(compared.troubles(), ["with the module: 2 ledgers are left"]);
    }
}
