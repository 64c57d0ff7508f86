// SPDX-License-Identifier: GPL-2.0

//! Boots the hosts in which tests run. A test may end its host; then the next host goes on with the next test.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{bail, ensure, Result};
use lab::{
    host::Host,
    image::payload::FileSpec,
    run::{self, Event, Lines, Options, Outcome},
    verdict::{fault_in, Fault, Limits, RunEnd},
};

use super::PROGRAM;
use crate::verdict::{Line, TestRun, Verdict};

/// Memory of the hosts, in MiB. Some tests make guests of 1 GiB, and Bochs cannot have more.
const MEMORY: u32 = 2048;

/// Configuration of a host.
#[derive(Debug)]
pub struct HostConfig {
    /// Host to boot.
    pub host: Host,
    /// Number of CPUs.
    pub cpus: u32,
    /// Version or release of Debian's kernel; `None` is the newest.
    pub kernel: Option<String>,
    /// Files to add: this program, and the tests.
    pub files: Vec<FileSpec>,
}

/// Output of one host so far.
#[derive(Default)]
struct HostOutput {
    ended: Vec<TestRun>,
    running: Option<String>,
    /// First line of the kernel log that reports a fault.
    fault: Option<String>,
    /// Failures at the end, once all tests have ended.
    done: Option<Vec<String>>,
}

impl HostConfig {
    /// Run the named tests in order, in as many hosts as needed. Return the runs, and the failures that belong to no
    /// single test.
    pub fn run(&self, metered: bool, names: &[String]) -> Result<(Vec<TestRun>, Vec<String>)> {
        let (mut ended, mut troubles) = (Vec::new(), Vec::new());
        while ended.len() < names.len() {
            let rest = &names[ended.len()..];
            let mut output = HostOutput::default();
            let outcome = self.boot(metered, rest, &mut output)?;
            ended.append(&mut output.ended);
            if let Some(name) = output.running {
                ended.push(run_that_ended_host(
                    name,
                    &outcome,
                    output.fault.as_deref(),
                )?);
            } else if let Some(at_the_end) = output.done {
                troubles.extend(at_the_end);
                ensure!(
                    outcome.end == RunEnd::Script(0),
                    "{}: {}; see {}",
                    self.host,
                    outcome.end,
                    outcome.folder.display()
                );
            } else {
                bail!(
                    "{}: {}, while no test ran; see {}",
                    self.host,
                    outcome.end,
                    outcome.folder.display()
                );
            }
        }
        Ok((ended, troubles))
    }

    /// Boot one host, and collect its output.
    fn boot(&self, metered: bool, names: &[String], output: &mut HostOutput) -> Result<Outcome> {
        let mut script = vec![PROGRAM.to_owned(), "--in-host".to_owned()];
        script.extend(metered.then(|| "--metered".to_owned()));
        script.push("--".to_owned());
        script.extend_from_slice(names);
        let mut options = Options::new(self.host, script);
        options.machine.memory = MEMORY;
        options.machine.cpus = self.cpus;
        options.kernel.clone_from(&self.kernel);
        options.files.clone_from(&self.files);
        options.limits = Limits {
            time: Duration::from_secs(4 * 3600),
            // The host prints a line every 5 s of its own clock.
            silence: Duration::from_secs(240),
        };
        let way = if metered { "with" } else { "without" };
        let mut stdout = Lines::default();
        Ok(run::run(&options, &mut |event| match event {
            Event::Stdout(bytes) => {
                for line in stdout.take(bytes) {
                    if let Some(ended) = output.take(&line) {
                        progress(self.host, way, ended);
                    }
                }
            }
            Event::Stderr(bytes) => {
                let _ = io::stderr().write_all(bytes);
            }
            Event::Kernel(line) => {
                if output.fault.is_none() && fault_in(line).is_some() {
                    output.fault = Some(line.trim().to_owned());
                }
            }
            Event::Stage(_) => {}
        })?)
    }
}

impl HostOutput {
    /// Parse a line. Return the test that has ended, if the line reports one.
    fn take(&mut self, line: &str) -> Option<&TestRun> {
        match serde_json::from_str(line) {
            Ok(Line::Begin(name)) => self.running = Some(name),
            Ok(Line::End(ended)) => {
                self.running = None;
                self.ended.push(ended);
                return self.ended.last();
            }
            Ok(Line::Done { troubles }) => self.done = Some(troubles),
            Ok(Line::Alive) => {}
            Err(_) => eprintln!("{line}"),
        }
        None
    }
}

fn progress(host: Host, way: &str, ended: &TestRun) {
    println!(
        "{host:<5} {way:<7} {:<9} {:7.1} s {:>9} exits  {} {}",
        ended.verdict, ended.seconds, ended.exits, ended.name, ended.why
    );
    for trouble in &ended.troubles {
        println!("{host:<5} {way:<7} {}: {trouble}", ended.name);
    }
}

/// Return the run of a test that ended its host.
fn run_that_ended_host(name: String, outcome: &Outcome, fault: Option<&str>) -> Result<TestRun> {
    let verdict = match &outcome.end {
        RunEnd::Fault(Fault::Warning) => Verdict::Warn,
        RunEnd::Fault(_) => Verdict::Fault,
        RunEnd::Silence(_) | RunEnd::EmulatorDied | RunEnd::NoVerdict(_) => Verdict::Lost,
        end => bail!("{end}, at {name}; see {}", outcome.folder.display()),
    };
    println!("{name}: {}; see {}", outcome.end, outcome.folder.display());
    Ok(TestRun {
        name,
        verdict,
        why: fault.map_or_else(|| outcome.end.to_string(), str::to_owned),
        seconds: 0.,
        exits: 0,
        reasons: 0,
        troubles: Vec::new(),
    })
}
