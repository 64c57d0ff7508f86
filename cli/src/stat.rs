// SPDX-License-Identifier: GPL-2.0

//! `exitmeter stat`: the exits that a command causes, measured inside the guest.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;

use crate::{
    command::{self, Unrunnable, FAILED},
    guest::{find, likely_isa},
    output::{Output, TextOptions},
};

mod counters;
mod run;
mod summary;

pub use counters::{Clock, Counters};
pub use run::{FoundMeter, Run};
pub use summary::{Mean, Reason, Summary};

/// In a guest: show which exits a command causes, and what they cost.
///
/// The numbers cover the whole VM while CMD runs, from the moment before it is executed until it
/// has ended. They include everything else that runs in the VM meanwhile. They do not include the
/// cost of reading them. This needs the privileges of 'exitmeter guest'.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
kernel is the time that the host's kernel spent on the exits, and mean that of one exit. 'of time' is
kernel as a part of the time that CMD took, and 'in VMM' the same for the VMM. With several vCPUs
either may exceed 100%. Interrupts that come while the numbers are read, before and after CMD, count
for CMD.

--why reads each vCPU by itself: the tool runs on each CPU in turn, before and after CMD, and says on
how many CPUs it may not run. Exits of a vCPU after it was read and before CMD ran count for CMD. Rows
have a bound beside them, like those of 'exitmeter why' on the host. The host does not reveal its own
vectors, so their exits are in no row. With -r the numbers are the sums of all runs.

When the meter begins anew while CMD runs, because the module is loaded again on the host or the VM
moves to another host, the exits of that run are not known. The run is left out, and the output says
so.

Exit status:
  the status of CMD, of the last run; 128 + N when signal N ended it; 127 when it was not found
  and 126 when it could not be run; 125 when there is no meter, no run could be measured, or the
  tool failed

Examples:
  exitmeter stat -- dd if=/dev/vda of=/dev/null bs=1M count=100
  exitmeter stat -r 5 -- sleep 1
  exitmeter stat --why -- modprobe virtio_net
  exitmeter stat --json -o exits.json -- make")]
pub struct Args {
    /// Run CMD N times, and show the mean and the standard deviation.
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeat: u32,
    /// Also show what the exits were about: MSRs, ports, CPUID leaves and so on. This needs a host
    /// whose details are on, as by the module's parameter details=1.
    #[arg(long)]
    why: bool,
    /// Show up to N rows of each reason.
    #[arg(long, value_name = "N", default_value_t = 10, requires = "why")]
    limit: usize,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Write to FILE instead of the standard error.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Command to run, with its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Error when no run was measured and nothing else failed.
const NOT_MEASURED: &str =
    "the meter began anew while the command ran, because the module was loaded \
    again on the host or the VM was moved: the command's exits are not known; run it again";

impl Args {
    /// Run the command, print what it caused, and return the command's exit status.
    pub fn run(self, out: &Output) -> ExitCode {
        let status = self
            .stat(out.look_of(&io::stderr()))
            .unwrap_or_else(|error| {
                eprintln!("exitmeter: {error:#}");
                error.downcast_ref().map_or(FAILED, Unrunnable::status)
            });
        status.into()
    }

    /// Run the command, show all runs that could be measured, and return the exit status.
    fn stat(&self, options: TextOptions) -> anyhow::Result<u8> {
        let (program, arguments) = self.command.split_first().context("there is no command")?;
        // Fail before anything is written or run if there is no meter.
        let (access, (isa, version)) =
            find(likely_isa(), |meter| (meter.isa(), meter.interface()))?;
        let host = FoundMeter { isa, access };
        if self.why {
            host.check_details(version)?;
        }
        let mut file = match &self.output {
            Some(path) => {
                let file = File::create(path);
                Some(file.with_context(|| format!("cannot write {}", path.display()))?)
            }
            None => None,
        };
        run::forward_signals().context("cannot wait for signals")?;
        let mut runs = Vec::new();
        let mut status = 0;
        let mut failure = None;
        for _ in 0..self.repeat {
            match run::once(program, arguments, host, self.why) {
                Ok(run) => {
                    status = command::status(run.ended);
                    runs.push(run);
                }
                // Still show the runs before.
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
            if run::should_stop() {
                break;
            }
        }
        let Some(summary) = Summary::new(&self.command, isa, status, &runs) else {
            return Err(failure.unwrap_or_else(|| anyhow::anyhow!(NOT_MEASURED)));
        };
        if let (Some(words), Some(_)) = (summary.left_out_text(), &file) {
            eprintln!("exitmeter: {words}");
        }
        let text = match self.json {
            true => serde_json::to_string_pretty(&summary)? + "\n",
            false if file.is_some() => summary.text(self.limit, TextOptions::default()),
            false => summary.text(self.limit, options),
        };
        match &mut file {
            Some(file) => file
                .write_all(text.as_bytes())
                .context("cannot write the output")?,
            // A closed standard error is no failure of the command.
            None => {
                let _ = io::stderr().write_all(text.as_bytes());
            }
        }
        failure.map_or(Ok(status), Err)
    }
}
