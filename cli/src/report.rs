// SPDX-License-Identifier: GPL-2.0

//! `exitmeter report`: where each VM's time went.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::{
    model::{
        delta::{self, NEW_LIFE},
        Report, Sort,
    },
    output::Output,
    source,
};

mod csv;
mod select;
mod text;

pub use self::{
    csv::{csv, HEADER as CSV_HEADER},
    select::{Error as SelectError, Selection},
    text::text,
};
pub(crate) use csv::{quoted, vmm_columns};
pub(crate) use text::{format_code, format_count, Writer};

/// On the host: show where each VM's time went, with a table of its exits.
///
/// First come the six phases of its vCPUs: the guest ran, KVM worked in the kernel, the VMM worked
/// in user space, the vCPU slept in HLT (halted), KVM slept for the host (waiting), or the host
/// took the CPU away (preempted). Then comes the cost of each exit reason. The time of a phase
/// counts for the reason of the latest exit before it. The sums of vCPUs that are gone stand at the
/// end.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
share is the part of all kernel cycles. mean, p50, p99 and max are the kernel cycles of single
exits, from an exit to the next entry, without sleep, preemption and user space. Quantiles are
within 20%. max is exact, except with a '~' before it: no new maximum was reached in the interval,
and the number is within 20% like a quantile. A '+' after a number means that its counter was
full: the true number is at least that.

polled is how long KVM polled before it let vCPUs sleep. It is part of the kernel's share of the
phases, and of p50, p99 and max of HLT; kernel, share and mean of HLT are without it. KVM counts
it by another clock, and includes the time for which the host took the CPU away meanwhile. So it
can exceed the kernel cycles of HLT; the excess is not shown. --json has all of it, in nanoseconds.
A module with snapshots older than version 1.2 does not report it, and shows both sleeps as blocked.

A VM is shown by the name that its VMM was given, with KVM's name behind it: web (kvm-1234). The
name is read from the command line of the VMM, so the VMM's owner chose it. Saved snapshots do not
have it. In JSON it is vmm.name, and name is KVM's.

Where lines are too long for the terminal, numbers are rounded and columns left out. COLUMNS sets
the width.

Examples:
  exitmeter report
  exitmeter report --vm web --vcpu 0 --sort p99
  exitmeter report --interval 1 --count 10
  exitmeter report --json | jq '.vms[] | {name: .vmm.name, kvm: .name, exits}'
  cat /dev/exitmeter > before; sleep 10; cat /dev/exitmeter > after
  exitmeter report --diff before after")]
pub struct Args {
    /// Show only the VM of this process or kvm-PID, or with this name, UUID, id or systemd unit.
    #[arg(long, value_name = "PID|NAME|UUID|ID")]
    vm: Option<String>,
    /// Show only the vCPU with this id, of each VM.
    #[arg(long, value_name = "N")]
    vcpu: Option<u32>,
    /// Order of the table of reasons.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Print JSON instead of tables; with --interval, one line each time.
    #[arg(long)]
    json: bool,
    /// Print comma-separated values: one line for each reason of each VM.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Report what happened in each S seconds, until interrupted. When the meter begins anew,
    /// a line on the standard error says so, and the next interval counts from there.
    #[arg(long, value_name = "S", value_parser = seconds)]
    interval: Option<Duration>,
    /// End after N intervals.
    #[arg(long, value_name = "N", requires = "interval", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Report what happened between two saved snapshots.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["input", "interval"])]
    diff: Option<Vec<PathBuf>>,
    #[command(flatten)]
    asked: source::SourceArgs,
    /// Read a saved snapshot instead of the device.
    #[arg(long, value_name = "FILE", default_value = source::DEVICE)]
    input: PathBuf,
}

/// Parse a time in seconds from the command line.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| *time >= Duration::from_millis(10))
        .ok_or_else(|| "it must be a number of seconds, 0.01 or more".to_owned())
}

/// Return what happened between two saved snapshots.
fn difference(before: &Path, after: &Path) -> anyhow::Result<Report> {
    let (older, newer) = (source::report(before)?, source::report(after)?);
    let (before, after) = (before.display(), after.display());
    newer.since(&older).map_err(|error| match error {
        delta::Error::NewLife => anyhow::anyhow!(
            "{NEW_LIFE} between {before} and {after}, or they are of two hosts: compare two \
             snapshots of one life of the meter, or report each alone with --input"
        ),
        delta::Error::Order => {
            anyhow::anyhow!("{after} is older than {before}: name the older one first")
        }
        error => anyhow::anyhow!("{before}, {after}: {error}"),
    })
}

impl Args {
    /// Print the report, or one report for each interval.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no snapshot to read, if it does not have the selected VM or
    /// vCPU, or if the output cannot be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        if self.csv {
            out.print(CSV_HEADER)?;
        }
        if let Some([before, after]) = self.diff.as_deref() {
            return self.print(out, difference(before, after)?);
        }
        let input = self.asked.source.open(&self.input)?;
        match self.interval {
            None => self.print(out, source::report(&input)?),
            Some(interval) => self.repeat(out, &input, interval),
        }
    }

    /// Print a report for each interval.
    fn repeat(&self, out: &mut Output, input: &Path, interval: Duration) -> anyhow::Result<()> {
        let mut due = Instant::now();
        let mut source = source::Source::new(input);
        let mut before = source.report()?;
        // Fail now if the selected VM is not there.
        self.selection().apply(before.clone())?;
        let mut left = self.count;
        while left != Some(0) {
            due += interval;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let now = source.report()?;
            match now.since(&before) {
                Ok(delta) => self.print(out, delta)?,
                Err(error) if error.is_break() => {
                    eprintln!("exitmeter: {NEW_LIFE}; the next interval counts from here");
                }
                Err(error) => return Err(error.into()),
            }
            before = now;
            left = left.map(|left| left - 1);
        }
        Ok(())
    }

    fn selection(&self) -> Selection<'_> {
        Selection {
            vm: self.vm.as_deref(),
            vcpu: self.vcpu,
            sort: self.sort,
        }
    }

    /// Print one report in the chosen form.
    fn print(&self, out: &mut Output, report: Report) -> anyhow::Result<()> {
        let selection = self.selection();
        let report = selection.apply(report)?;
        if self.csv {
            out.print(&csv(&report, &selection))?;
        } else if !self.json {
            let end = if self.interval.is_some() { "\n" } else { "" };
            out.print(&(text(&report, &selection, out.text_options()) + end))?;
        } else if self.interval.is_some() {
            out.json_line(&report)?;
        } else {
            out.json(&report)?;
        }
        Ok(())
    }
}
