// SPDX-License-Identifier: GPL-2.0

//! `exitmeter verify`: whether the module is right on this host, and what it costs here.
//!
//! `checks` runs guests of known exits (the crate tiny-guests) and holds what the meter tells of them
//! (`own`) against the kernel's own histogram (`hist`); `cost` measures exits, with `reload`
//! also without the module. `host` is what all of it runs on, `stop` the user's wish to end it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;

use self::{
    cost::Plan,
    environment::Environment,
    host::Host,
    model::{Check, Found, Verdict},
    reload::Reload,
    stop::{Stop, Stopped},
};
use crate::{
    output::{self, Output},
    source::Choice,
};

mod checks;
mod cost;
mod elf;
mod environment;
mod hist;
mod host;
mod model;
mod own;
mod reload;
mod statistics;
mod stop;
mod text;

/// Exit status when a check has failed.
const FAILED: u8 = 1;
/// Exit status when nothing could be verified.
const IMPOSSIBLE: u8 = 2;

/// On the host: shows whether the module is right here, and what exits and metering cost here.
///
/// It runs small VMs of its own, whose exits are known to the instruction, and holds what the module
/// tells of them against the kernel's own histogram of kvm:kvm_exit, and against what they did: counts
/// by reason, the guest's own answers by CPUID, the ledger to the tick, and details. Then it measures
/// what exits cost on one CPU. Other VMs run on; nothing of theirs is touched.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
It needs /dev/kvm and the module. The kernel's histogram and details take root; without, that is
said, and the rest is verified. The histogram is in an instance of tracefs of its own, of this
thread alone; while it and details are on, exits of other VMs take a little longer.

cycles are TSC ticks, all of one exit: the guest's loop, KVM, and the VMM. guest, kernel and user
are the meter's own split of them. What metering adds takes --reload, which unloads the module and
loads it again, as often as there are runs, with its parameters as they are: what it has metered
is gone then, as after each unload. The VMs that run are told, and you are asked first. Interrupted
or failed, it leaves the module loaded, or says how to load it.

The report has kernel, CPU, microcode, mitigations and KVM's parameters, and no names of the host
or of VMs. It ends with a line for docs/hardware.md. docs/verify.md has the JSON's fields.

Exit status:
  0  all checks that could be made have passed
  1  a check has failed
  2  nothing could be verified: no KVM, no module, no right; one sentence says what to do
  128 + N  signal N has ended it

Examples:
  exitmeter verify
  exitmeter verify --report report.txt
  sudo exitmeter verify --reload --runs 15 --cpu 3
  exitmeter verify --json | jq '.checks[] | select(.verdict == \"failed\")'")]
pub struct Args {
    /// Prints JSON instead of text.
    #[arg(long)]
    json: bool,
    /// Also writes all that was found, and where, to FILE: a text to attach to an issue.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The meter to verify: the module, or where it is not loaded BPF (auto), or one of these alone.
    #[arg(long, value_enum, value_name = "METER", default_value_t)]
    source: Choice,
    /// Also measures without the module: unloads it and loads it again in each run.
    #[arg(long, conflicts_with = "source")]
    reload: bool,
    /// Does not ask before the module is unloaded.
    #[arg(long, requires = "reload")]
    yes: bool,
    /// The file that the module was loaded from; unless given, the installed one.
    #[arg(long, value_name = "FILE", requires = "reload")]
    module: Option<PathBuf>,
    /// Runs the guests on this CPU; unless given, on the second that there is.
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Takes each number of the cost N times.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Each is the mean of N exits.
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=10_000_000))]
    exits: u32,
}

/// The user does not want it.
#[derive(Debug, thiserror::Error)]
enum Unwanted {
    #[error("--reload unloads the module, and nobody is there to be asked: give --yes as well")]
    Nobody,
    #[error("nothing was done: without --reload the module stays loaded")]
    No,
}

impl Args {
    /// Verifies; the status to exit with.
    ///
    /// # Errors
    ///
    /// When there is nowhere to print.
    pub fn run(self, out: &mut Output) -> anyhow::Result<ExitCode> {
        let status = match self.verify(out) {
            Ok(found) if found.passed => 0,
            Ok(_) => FAILED,
            Err(error) => match error.downcast_ref::<Stopped>() {
                Some(stopped) => stopped.status(),
                None if error.is::<output::Error>() => return Err(error),
                None => {
                    eprintln!("exitmeter: {error:#}");
                    IMPOSSIBLE
                }
            },
        };
        Ok(status.into())
    }

    fn verify(&self, out: &mut Output) -> anyhow::Result<Found> {
        let host = Host::find(self.cpu, self.meter(), Stop::default())?;
        let mut reload = match self.reload {
            true => Some(Reload::prepare(self.module.as_deref())?),
            false => None,
        };
        if let Some(reload) = reload.as_ref().filter(|_| !self.yes) {
            self.ask(reload)?;
        }
        host.stop.begin().context("cannot wait for signals")?;
        // So that a file that cannot be written is known now.
        let report = self.report.as_deref().map(Draft::open).transpose()?;
        let environment = Environment::new(&host);
        let look = out.look();
        if !self.json {
            out.print(&text::opening(&environment))?;
        }

        let mut checks = Vec::new();
        let mut tell = |check: Check| -> anyhow::Result<()> {
            if !self.json {
                out.print(&text::check(&check, look))?;
            }
            checks.push(check);
            Ok(())
        };
        checks::make(&host, &mut tell)?;
        let plan = Plan {
            runs: self.runs,
            exits: self.exits,
        };
        let cost = match cost::measure(&host, plan, reload.as_mut()) {
            Ok(cost) => cost,
            Err(error) if error.is::<Stopped>() => return Err(error),
            Err(error) => {
                tell(Check::new("cost", Verdict::Failed, format!("{error:#}")))?;
                model::Cost::default()
            }
        };
        if let Some(reload) = reload {
            tell(as_it_was(&reload))?;
        }
        let found = Found {
            format: model::FORMAT,
            passed: checks.iter().all(|check| check.verdict != Verdict::Failed),
            checks,
            cost,
            environment,
        };
        if let Some(report) = report {
            report.finish(&text::report(&found))?;
        }
        if self.json {
            out.json(&found)?;
        } else {
            out.print(&text::cost(&found.cost, look))?;
            out.print(&text::summary(&found, look))?;
        }
        Ok(found)
    }

    /// The meter to verify; the module where it is to be loaded again.
    fn meter(&self) -> Choice {
        match self.reload {
            true => Choice::Module,
            false => self.source,
        }
    }

    /// Ask before the module is unloaded.
    fn ask(&self, reload: &Reload) -> anyhow::Result<()> {
        let holders = reload::holders();
        let names: Vec<String> = holders
            .iter()
            .map(|holder| format!("{} ({})", holder.name, holder.pid))
            .collect();
        let vms = match &names[..] {
            [] => "No other VM runs.".to_owned(),
            names => format!(
                "VMs of these processes run on, unmetered for moments: {}.",
                names.join(", ")
            ),
        };
        let mut stderr = io::stderr().lock();
        write!(
            stderr,
            "The module is unloaded and loaded again {} times, with {}.\n\
             What it has metered so far is gone then; the kernel log gets a table of it.\n\
             {vms}\nGo on? [y/N] ",
            self.runs,
            reload.parameters(),
        )
        .and_then(|()| stderr.flush())
        .context("cannot ask")?;
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            writeln!(stderr).context("cannot ask")?;
            return Err(Unwanted::Nobody.into());
        }
        let mut answer = String::new();
        let read = stdin.lock().read_line(&mut answer);
        if read.context("cannot read the answer")? == 0 {
            // Ctrl-D ends no line.
            writeln!(stderr).context("cannot ask")?;
        }
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Unwanted::No.into()),
        }
    }
}

/// The file of a report that is yet to be written. Until then an older one stays as it is, and where
/// there was none, none is left.
struct Draft<'a> {
    path: &'a Path,
    file: File,
    is_new: bool,
}

impl<'a> Draft<'a> {
    fn open(path: &'a Path) -> anyhow::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true);
        let created = options.clone().create_new(true).open(path);
        let is_new = created.is_ok();
        let file = created.or_else(|_| options.open(path));
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, file, is_new })
    }

    fn finish(mut self, text: &str) -> anyhow::Result<()> {
        self.is_new = false;
        // What is no plain file, as a pipe, has no length.
        let _ = self.file.set_len(0);
        let written = self.file.write_all(text.as_bytes());
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.is_new {
            // Nobody misses an empty file.
            let _ = fs::remove_file(self.path);
        }
    }
}

/// The check that the module is loaded as it was.
fn as_it_was(reload: &Reload) -> Check {
    let name = "reload: the module as it was";
    match reload::parameters() {
        Ok(parameters) if parameters == reload.parameters() => {
            let text = format!(
                "{} times unloaded and loaded, with {parameters}",
                reload.times
            );
            Check::new(name, Verdict::Passed, text)
        }
        Ok(parameters) => {
            let text = format!("it has {parameters} in place of {}", reload.parameters());
            Check::new(name, Verdict::Failed, text)
        }
        Err(error) => Check::new(name, Verdict::Failed, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_that_is_not_written_leaves_nothing() -> anyhow::Result<()> {
        let folder = tempfile::TempDir::new()?;
        let path = folder.path().join("report");
        drop(Draft::open(&path)?);
        assert!(!path.exists());
        Draft::open(&path)?.finish("a longer report")?;
        drop(Draft::open(&path)?);
        assert_eq!(fs::read_to_string(&path)?, "a longer report");
        Draft::open(&path)?.finish("a report")?;
        assert_eq!(fs::read_to_string(&path)?, "a report");
        assert!(Draft::open(&folder.path().join("none/report")).is_err());
        Ok(())
    }
}
