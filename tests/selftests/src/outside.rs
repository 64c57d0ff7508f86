// SPDX-License-Identifier: GPL-2.0

//! The outside: boots hosts with this program and the tests in them, and compares what came of each test.

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
    setup::{self, Prepared, Wanted},
};

use crate::{document, inside, verdict::Ended, Arguments};
use hosts::Lane;

/// Where the host has this program.
const INSIDE: &str = "/usr/local/bin/selftests";

/// One that is no test by itself: a script of the same name runs it.
const PART: &str = "x86/nx_huge_pages_test";

/// What came of one test on one host: its first run, and those that followed because its verdicts differed.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    /// Without the module.
    pub without: Vec<Ended>,
    /// With it.
    pub with: Vec<Ended>,
}

impl Compared {
    /// Whether the module may have made a difference: the verdicts are not all the same, and only with the module
    /// they vary.
    fn is_open(&self) -> bool {
        let verdicts = |runs: &[Ended]| runs.iter().map(|run| run.verdict).collect::<BTreeSet<_>>();
        verdicts(&self.without) != verdicts(&self.with) && !self.is_random()
    }

    /// Whether the test has more than one verdict without the module.
    pub fn is_random(&self) -> bool {
        let first = self.without.first().map(|run| run.verdict);
        self.without.iter().any(|run| Some(run.verdict) != first)
    }

    /// What must not be.
    fn troubles(&self) -> Vec<String> {
        let mut troubles = Vec::new();
        if self.with.is_empty() || self.without.is_empty() {
            troubles.push("it did not run both ways".to_owned());
        } else if self.is_open() {
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

/// What came of all tests on one host.
#[derive(Debug)]
pub struct Results {
    /// Which host.
    pub host: Host,
    /// How many CPUs it had.
    pub cpus: u32,
    /// By the name of the test.
    pub tests: BTreeMap<String, Compared>,
    /// What must not be, with all tests of a host together.
    pub troubles: Vec<String>,
    /// By the wall clock.
    pub minutes: f64,
}

/// What was run.
#[derive(Debug)]
pub struct Soak {
    /// The hosts' kernel.
    pub release: String,
    /// By host.
    pub results: Vec<Results>,
    /// Tests that do not build.
    pub unbuilt: Vec<String>,
}

/// Runs the tests both ways on the hosts, prints the verdicts, and writes the table.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let hosts = match &arguments.host {
        Some(host) => std::slice::from_ref(host),
        None => &[Host::Amd, Host::Intel],
    };
    let prepared = setup::prepare(&Wanted {
        kernel: arguments.kernel.clone(),
        tree: true,
        bochs: hosts.contains(&Host::Intel),
        selftests: true,
        ..Wanted::default()
    })?;
    let folder = prepared
        .selftests
        .as_deref()
        .context("they were asked for")?;
    let names = names(&folder.join("bin"), &arguments.words)?;
    let lanes = hosts.iter().map(|host| lane(*host, arguments, &prepared));
    let lanes: Vec<Lane> = lanes.collect::<Result<_>>()?;
    let results = together(&lanes, |lane| both_ways(lane, &names, arguments.repeat));
    let soak = Soak {
        release: prepared.release.clone(),
        results: results.into_iter().collect::<Result<_>>()?,
        unbuilt: fs::read_to_string(folder.join("unbuilt"))?
            .lines()
            .map(str::to_owned)
            .collect(),
    };
    tell(&soak, arguments.table.as_deref())
}

/// The names of the tests that hold one of the words, or of all.
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
        name != PART && (words.is_empty() || words.iter().any(|word| name.contains(word)))
    });
    names.sort();
    ensure!(!names.is_empty(), "no test has such a name");
    Ok(names)
}

/// How this host is started.
fn lane(host: Host, arguments: &Arguments, prepared: &Prepared) -> Result<Lane> {
    let this = env::current_exe().context("the path of this program is not known")?;
    let tests = prepared
        .selftests
        .as_deref()
        .context("they were asked for")?;
    Ok(Lane {
        host,
        // Bochs emulates more than one only at the cost of all.
        cpus: arguments.cpus.unwrap_or(match host {
            Host::Intel => 1,
            Host::Amd => 2,
        }),
        kernel: arguments.kernel.clone(),
        files: vec![
            FileSpec::at(this, INSIDE),
            FileSpec::at(tests.join("bin"), inside::FOLDER),
        ],
    })
}

/// Calls `work` for each at once.
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

/// Runs the tests without the module and with it, and those again whose verdicts differ.
fn both_ways(lane: &Lane, names: &[String], repeat: usize) -> Result<Results> {
    let started = Instant::now();
    let mut troubles = Vec::new();
    let mut tests: BTreeMap<String, Compared> = BTreeMap::new();
    let mut again = names.to_vec();
    for _ in 0..=repeat {
        // Side by side, so that the machine is as busy for the one as for the other.
        let ways = [false, true];
        let ran = together(&ways, |metered| lane.run(*metered, &again));
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
        let open = tests.iter().filter(|(_, compared)| compared.is_open());
        again = open.map(|(name, _)| name.clone()).collect();
        if again.is_empty() {
            break;
        }
    }
    Ok(Results {
        host: lane.host,
        cpus: lane.cpus,
        tests,
        troubles,
        minutes: started.elapsed().as_secs_f64() / 60.,
    })
}

/// Prints what must not be and the sums, and writes the table.
fn tell(soak: &Soak, table: Option<&Path>) -> Result<ExitCode> {
    let mut failed = 0;
    for results in &soak.results {
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
        println!("{}", document::sum(results));
    }
    if let Some(path) = table {
        fs::write(path, document::write(soak))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("The table is in {}", path.display());
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
            let run = |verdict: &Verdict| Ended {
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
    fn a_verdict_that_differs_is_trouble_unless_it_varies_without_the_module() {
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
    fn what_goes_wrong_around_a_test_is_trouble() {
        let mut compared = compared(&[Pass], &[Pass]);
        compared.with[0].troubles = vec!["2 ledgers are left".to_owned()];
        assert_eq!(compared.troubles(), ["with the module: 2 ledgers are left"]);
    }
}
