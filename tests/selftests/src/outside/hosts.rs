// SPDX-License-Identifier: GPL-2.0

//! Hosts in which tests run: one after the other, as a test may take its host along.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{bail, ensure, Result};
use lab::{
    host::Host,
    image::payload::FileSpec,
    run::{self, Event, Options, Outcome},
    verdict::{fault_in, End, Fault, Limits},
};

use super::INSIDE;
use crate::verdict::{Ended, Line, Verdict};

/// The hosts' memory in MiB, as some tests make guests of 1 GiB; as much as Bochs can have.
const MEMORY: u32 = 2048;

/// How a host is started.
#[derive(Debug)]
pub struct Lane {
    /// Which host.
    pub host: Host,
    /// How many CPUs.
    pub cpus: u32,
    /// Debian's kernel; the newest when not given.
    pub kernel: Option<String>,
    /// This program, and the tests.
    pub files: Vec<FileSpec>,
}

/// What one host has said so far.
#[derive(Default)]
struct Heard {
    ended: Vec<Ended>,
    running: Option<String>,
    /// The first line of its kernel's that told of a fault.
    fault: Option<String>,
    /// All tests ended, with these troubles at the end.
    done: Option<Vec<String>>,
}

impl Lane {
    /// Runs the tests of these names, in that order, in as many hosts as it takes: where a test ends its host,
    /// that is its verdict, and the next host goes on with the next test. Gives what must not be besides.
    pub fn run(&self, metered: bool, names: &[String]) -> Result<(Vec<Ended>, Vec<String>)> {
        let (mut ended, mut troubles) = (Vec::new(), Vec::new());
        while ended.len() < names.len() {
            let rest = &names[ended.len()..];
            let mut heard = Heard::default();
            let outcome = self.boot(metered, rest, &mut heard)?;
            ended.append(&mut heard.ended);
            if let Some(name) = heard.running {
                ended.push(taken_along(name, &outcome, heard.fault.as_deref())?);
            } else if let Some(at_the_end) = heard.done {
                troubles.extend(at_the_end);
                ensure!(
                    outcome.end == End::Script(0),
                    "{}: {}; see {}",
                    self.host,
                    outcome.end,
                    outcome.folder.display()
                );
            } else {
                bail!(
                    "{}: {}, when no test ran; see {}",
                    self.host,
                    outcome.end,
                    outcome.folder.display()
                );
            }
        }
        Ok((ended, troubles))
    }

    /// Boots one host.
    fn boot(&self, metered: bool, names: &[String], heard: &mut Heard) -> Result<Outcome> {
        let mut script = vec![INSIDE.to_owned(), "--inside".to_owned()];
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
            // It says that it lives every 5 s of its own clock.
            silence: Duration::from_secs(240),
        };
        let way = if metered { "with" } else { "without" };
        let mut stdout = Vec::new();
        Ok(run::run(&options, &mut |event| match event {
            Event::Stdout(bytes) => {
                stdout.extend_from_slice(bytes);
                while let Some(end) = stdout.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = stdout.drain(..=end).collect();
                    let line = String::from_utf8_lossy(&line);
                    if let Some(ended) = heard.take(&line) {
                        progress(self.host, way, ended);
                    }
                }
            }
            Event::Stderr(bytes) => {
                let _ = io::stderr().write_all(bytes);
            }
            Event::Kernel(line) => {
                if heard.fault.is_none() && fault_in(line).is_some() {
                    heard.fault = Some(line.trim().to_owned());
                }
            }
            Event::Stage(_) => {}
        })?)
    }
}

impl Heard {
    /// Takes a line; gives the test that ended by it.
    fn take(&mut self, line: &str) -> Option<&Ended> {
        match serde_json::from_str(line) {
            Ok(Line::Begin(name)) => self.running = Some(name),
            Ok(Line::End(ended)) => {
                self.running = None;
                self.ended.push(ended);
                return self.ended.last();
            }
            Ok(Line::Done { troubles }) => self.done = Some(troubles),
            Ok(Line::Alive) => {}
            Err(_) => eprint!("{line}"),
        }
        None
    }
}

fn progress(host: Host, way: &str, ended: &Ended) {
    println!(
        "{host:<5} {way:<7} {:<9} {:7.1} s {:>9} exits  {} {}",
        ended.verdict, ended.seconds, ended.exits, ended.name, ended.why
    );
    for trouble in &ended.troubles {
        println!("{host:<5} {way:<7} {}: {trouble}", ended.name);
    }
}

/// The verdict of a test that ended its host.
fn taken_along(name: String, outcome: &Outcome, fault: Option<&str>) -> Result<Ended> {
    let verdict = match &outcome.end {
        End::Fault(Fault::Warning) => Verdict::Warn,
        End::Fault(_) => Verdict::Fault,
        End::Silence(_) | End::EmulatorDied | End::NoVerdict(_) => Verdict::Lost,
        end => bail!("{end}, at {name}; see {}", outcome.folder.display()),
    };
    println!("{name}: {}; see {}", outcome.end, outcome.folder.display());
    Ok(Ended {
        name,
        verdict,
        why: fault.map_or_else(|| outcome.end.to_string(), str::to_owned),
        seconds: 0.,
        exits: 0,
        reasons: 0,
        troubles: Vec::new(),
    })
}
