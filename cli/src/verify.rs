// SPDX-License-Identifier: GPL-2.0

//! `exitmeter verify`: check the module on this host, and measure what it costs here.
//!
//! `checks` runs guests with known exits (the crate tiny-guests), and compares the meter's numbers
//! (`own`) with the kernel's own histogram (`hist`). `cost` measures exits, and with `reload` also
//! without the module. `host` is the host under test.

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
    host::MeteredHost,
    model::{Check, Results, Verdict},
    reload::Reload,
};
use crate::{
    output::{self, Output},
    source::Choice,
    stop::{Stop, Stopped},
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
mod text;

/// Exit status when a check has failed.
const FAILED: u8 = 1;
/// Exit status when nothing could be verified.
const IMPOSSIBLE: u8 = 2;

/// On the host: check the module's numbers, and measure what exits and metering cost.
///
/// The command runs small VMs of its own, whose exits are known exactly. It compares the module's
/// numbers with the kernel's own histogram of kvm:kvm_exit, and with what the guests did: counts by
/// reason, the answers that guests get by CPUID, the ledger to the tick, and details. Then it
/// measures what exits cost on one CPU. Other VMs keep running, and are not touched.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
It needs /dev/kvm and the module. The kernel's histogram and details need root; without root the
output says so, and the rest is verified. The histogram is in a tracefs instance of its own, and
counts this thread only. While it and details are on, exits of other VMs take a little longer.

cycles are the TSC ticks of one whole exit: the guest's loop, KVM, and the VMM. guest, kernel and
user are the meter's own split of them. --reload also measures what metering adds. It unloads the
module and loads it again in each run, with the same parameters. The module's numbers are lost, as
after each unload. It lists the running VMs and asks first. If it is interrupted or fails, it leaves
the module loaded, or says how to load it.

The report has kernel, CPU, microcode, mitigations and KVM's parameters, and no names of the host
or of VMs. It ends with a line for docs/hardware.md. docs/verify.md lists the JSON's fields.

Exit status:
  0  all checks that could be made passed
  1  a check failed
  2  nothing could be verified: no KVM, no module, no right; one sentence says what to do
  128 + N  signal N ended it

Examples:
  exitmeter verify
  exitmeter verify --report report.txt
  sudo exitmeter verify --reload --runs 15 --cpu 3
  exitmeter verify --json | jq '.checks[] | select(.verdict == \"failed\")'")]
pub struct Args {
    /// Print JSON instead of text.
    #[arg(long)]
    json: bool,
    /// Also write all results, and the environment, to FILE: a text to attach to an issue.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Meter to verify: the module, or BPF where the module is not loaded (auto), or only one of
    /// these.
    #[arg(long, value_enum, value_name = "METER", default_value_t)]
    source: Choice,
    /// Also measure without the module: unload it and load it again in each run.
    #[arg(long, conflicts_with = "source")]
    reload: bool,
    /// Do not ask before the module is unloaded.
    #[arg(long, requires = "reload")]
    yes: bool,
    /// File that the module was loaded from; by default the installed one.
    #[arg(long, value_name = "FILE", requires = "reload")]
    module: Option<PathBuf>,
    /// Run the guests on this CPU; by default on the second of those available.
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Measure each number of the cost N times.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Average each number over N exits.
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=10_000_000))]
    exits: u32,
}

/// The user did not agree to unload the module.
#[derive(Debug, thiserror::Error)]
enum Unwanted {
    #[error("--reload unloads the module, and there is no terminal to ask on: add --yes to agree")]
    Nobody,
    #[error("nothing was done: without --reload the module stays loaded")]
    No,
}

impl Args {
    /// Verify, and return the exit status.
    ///
    /// # Errors
    ///
    /// Returns an error if the output cannot be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<ExitCode> {
        let status = match self.verify(out) {
            Ok(results) if results.passed => 0,
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

    fn verify(&self, out: &mut Output) -> anyhow::Result<Results> {
        let host = MeteredHost::find(self.cpu, self.meter(), Stop::default())?;
        let mut reload = match self.reload {
            true => Some(Reload::prepare(self.module.as_deref())?),
            false => None,
        };
        if let Some(reload) = reload.as_ref().filter(|_| !self.yes) {
            self.ask(reload)?;
        }
        host.stop.begin().context("cannot wait for signals")?;
        // Fail now if the file cannot be written.
        let report = self.report.as_deref().map(Draft::open).transpose()?;
        let environment = Environment::new(&host);
        let options = out.text_options();
        if !self.json {
            out.print(&text::opening(&environment))?;
        }

        let mut checks = Vec::new();
        let mut report_check = |check: Check| -> anyhow::Result<()> {
            if !self.json {
                out.print(&text::check(&check, options))?;
            }
            checks.push(check);
            Ok(())
        };
        checks::make(&host, &mut report_check)?;
        let plan = Plan {
            runs: self.runs,
            exits: self.exits,
        };
        let cost = match cost::measure(&host, plan, reload.as_mut()) {
            Ok(cost) => cost,
            Err(error) if error.is::<Stopped>() => return Err(error),
            Err(error) => {
                report_check(Check::new("cost", Verdict::Failed, format!("{error:#}")))?;
                model::Cost::default()
            }
        };
        if let Some(reload) = reload {
            report_check(check_reload(&reload))?;
        }
        let results = Results {
            format: model::FORMAT,
            passed: checks.iter().all(|check| check.verdict != Verdict::Failed),
            checks,
            cost,
            environment,
        };
        if let Some(report) = report {
            report.finish(&text::report(&results))?;
        }
        if self.json {
            out.json(&results)?;
        } else {
            out.print(&text::cost(&results.cost, options))?;
            out.print(&text::summary(&results, options))?;
        }
        Ok(results)
    }

    /// Return the meter to verify: always the module if it is to be reloaded.
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
            // Ctrl-D leaves the line unfinished.
            writeln!(stderr).context("cannot ask")?;
        }
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Unwanted::No.into()),
        }
    }
}

/// File of a report that is not yet written. Until then an older file stays as it is, and a new one
/// is removed again.
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
        // A pipe, for example, has no length.
        let _ = self.file.set_len(0);
        let written = self.file.write_all(text.as_bytes());
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.is_new {
            // Ignore errors: nobody misses an empty file.
            let _ = fs::remove_file(self.path);
        }
    }
}

/// Check that the module is loaded as before.
fn check_reload(reload: &Reload) -> Check {
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
    fn unwritten_report_leaves_no_file() -> anyhow::Result<()> {
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
