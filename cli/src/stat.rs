// SPDX-License-Identifier: GPL-2.0

//! `exitmeter stat`: which exits a command causes, told inside the guest.

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
    output::{Look, Output},
};

mod moment;
mod run;
mod summary;

pub use moment::{Clock, Moment};
pub use run::{Host, Run};
pub use summary::{Mean, Reason, Summary};

/// In a guest: which exits a command causes, and what they cost.
///
/// The numbers are of the whole VM while CMD runs, from the moment before it is executed until it has
/// ended. What else runs in the VM meanwhile is among them. What reading them costs is not. It
/// needs the privileges of 'exitmeter guest'.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
kernel is what the host's kernel spent on the exits, and mean that of one. 'of time' is its part of
the time that CMD took, 'in VMM' that of the VMM; with several vCPUs either may exceed 100%.
Interrupts that come while the numbers are read, before and after CMD, are CMD's.

--why has each vCPU tell for itself: this command runs on each CPU in turn, before and after CMD,
and says on how many it may not. What a vCPU did after it was asked and before CMD ran is CMD's. Rows
have a bound beside them as those of 'exitmeter why' on the host. The host's own vectors are not told,
and their exits are in no row. With -r the numbers are those of all runs together.

When the meter begins anew while CMD runs, as when the module is loaded again on the host or the VM
is moved to another one, what that run caused is not known. It is left out, and that is told.

Exit status:
  that of CMD, of the last run; 128 + N when signal N ended it; 127 when it was not found and
  126 when it could not be run; 125 when there is no meter, no run could be measured, or the
  tool failed

Examples:
  exitmeter stat -- dd if=/dev/vda of=/dev/null bs=1M count=100
  exitmeter stat -r 5 -- sleep 1
  exitmeter stat --why -- modprobe virtio_net
  exitmeter stat --json -o exits.json -- make")]
pub struct Args {
    /// Runs CMD N times, and tells the mean and the standard deviation.
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeat: u32,
    /// Tells as well what the exits were about: which MSRs, ports, CPUID leaves and so on. It takes a
    /// host whose details are on, as by the module's parameter details=1.
    #[arg(long)]
    why: bool,
    /// Shows up to N rows of each reason.
    #[arg(long, value_name = "N", default_value_t = 10, requires = "why")]
    limit: usize,
    /// Prints JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Writes to FILE, and not to the standard error.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The command, with its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// What is said when there is nothing else to say.
const NOT_MEASURED: &str =
    "the meter began anew while the command ran, as when the module is loaded \
    again on the host or the VM is moved: what it caused is not known; run it again";

impl Args {
    /// Runs the command and prints what it caused; the command's exit status.
    pub fn run(self, out: &Output) -> ExitCode {
        let status = self
            .stat(out.look_of(&io::stderr()))
            .unwrap_or_else(|error| {
                eprintln!("exitmeter: {error:#}");
                error.downcast_ref().map_or(FAILED, Unrunnable::status)
            });
        status.into()
    }

    /// Runs the command and tells of all runs that could be measured; the status to exit with.
    fn stat(&self, look: Look) -> anyhow::Result<u8> {
        let (program, arguments) = self.command.split_first().context("there is no command")?;
        // Before anything is written or run: is there a meter?
        let (way, (isa, version)) = find(likely_isa(), |meter| (meter.isa(), meter.interface()))?;
        let host = Host { isa, way };
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
        run::outlive_signals().context("cannot wait for signals")?;
        let mut runs = Vec::new();
        let mut status = 0;
        let mut failure = None;
        for _ in 0..self.repeat {
            match run::once(program, arguments, host, self.why) {
                Ok(run) => {
                    status = command::status(run.ended);
                    runs.push(run);
                }
                // What came before is told all the same.
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
            if run::is_to_end() {
                break;
            }
        }
        let Some(summary) = Summary::new(&self.command, isa, status, &runs) else {
            return Err(failure.unwrap_or_else(|| anyhow::anyhow!(NOT_MEASURED)));
        };
        if let (Some(words), Some(_)) = (summary.left_out_in_words(), &file) {
            eprintln!("exitmeter: {words}");
        }
        let text = match self.json {
            true => serde_json::to_string_pretty(&summary)? + "\n",
            false if file.is_some() => summary.text(self.limit, Look::default()),
            false => summary.text(self.limit, look),
        };
        match &mut file {
            Some(file) => file
                .write_all(text.as_bytes())
                .context("cannot write the output")?,
            // Whoever closed the standard error wants no word of this.
            None => {
                let _ = io::stderr().write_all(text.as_bytes());
            }
        }
        failure.map_or(Ok(status), Err)
    }
}
