// SPDX-License-Identifier: GPL-2.0

//! `exitmeter slow`: the slowest exits, and the exits that led to one that was too slow.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;

use self::{
    model::{Selection, Slow, SlowExits},
    text::Shown,
};
use crate::{
    command,
    names::NameBook,
    output::Output,
    record::{
        child::Child,
        events::{Events, RecordEvent},
    },
    source,
    why::{device::Device, select, symbols::Symbols},
};

mod csv;
pub(crate) mod model;
mod text;
mod utc;

/// On the host: show the slowest exits, and the exits that led to one that was too slow.
///
/// While details are on, the module keeps the 16 slowest exits of each vCPU in a window of about 10
/// seconds, and those of the window before. With its parameter slow_us it also keeps a ring of each
/// vCPU's last 64 exits. The ring freezes at an exit that takes longer than slow_us. The length of
/// an exit is its time in the kernel, in user space, waiting and preempted. Sleep in HLT (halted)
/// does not count.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Details are on while CMD runs, or always with the module's parameter details=1. Without CMD the
device is read once, and has exits only if details were on before. Reading it needs CAP_PERFMON,
which root has. With CMD the slowest exits are those while it ran.

when is the time of the exit, in UTC. It is computed from the TSC and the time at which the
snapshot was read, or at which the file of a saved one was written. It is as exact as that time.
CPU is the host's CPU at the exit, and at the entry after it if that is another one. took is the
sum of kernel, user, waiting and preempted. All are in microseconds, or in TSC ticks where the
TSC's frequency is not known. outs counts how often the scheduler took the vCPU off its CPU.

--ring shows each vCPU's ring, the oldest exit first. In a frozen ring, '>' marks the exit that
froze it. A frozen ring stays until details are turned off or --thaw unfreezes it; a later exit
that is too slow does not replace it.

Exit status:
  the status of CMD; 128 + N when signal N ended it; 127 when it was not found and 126 when it
  could not be run; 125 when the tool failed. Without CMD: 0, or 1 when it failed

Examples:
  exitmeter slow -- sleep 20
  exitmeter slow --vm 1234 --symbols guest.kallsyms
  exitmeter slow --ring --vm 1234
  exitmeter slow --reason EXTERNAL_INTERRUPT --limit 5 saved.snapshot")]
pub struct Args {
    /// Show only the VM of this process or kvm-PID, or with this name, UUID, id or systemd unit.
    #[arg(long, value_name = "PID|NAME|UUID|ID")]
    vm: Option<String>,
    /// Show only this exit reason: its name or its number. Not with --ring, which shows successive
    /// exits.
    #[arg(long, value_name = "REASON", conflicts_with = "ring")]
    reason: Option<String>,
    /// Show the rings of the last exits.
    #[arg(long)]
    ring: bool,
    /// Name code by the symbols in FILE: the guest's /proc/kallsyms, or its System.map.
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Show up to N exits: the slowest, or with --ring the last of each ring.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Print JSON instead of tables: both the slowest exits and the rings.
    #[arg(long, group = "form")]
    json: bool,
    /// Print comma-separated values: one line for each exit.
    #[arg(long, group = "form")]
    csv: bool,
    /// Unfreeze the rings after they are shown.
    #[arg(long, conflicts_with_all = ["input", "command"])]
    thaw: bool,
    /// Device whose details are turned on.
    #[arg(long, value_name = "DEVICE", default_value = source::DEVICE, hide = true)]
    device: PathBuf,
    /// Saved snapshot to read, taken while details were on.
    #[arg(value_name = "FILE")]
    input: Option<PathBuf>,
    /// Command to run meanwhile, with its arguments.
    #[arg(last = true, value_name = "CMD", conflicts_with = "input")]
    command: Vec<OsString>,
}

/// Number of slowest exits that are shown by default.
const DEFAULT_LIMIT: usize = 20;
/// Time from one reading to the next. It is less than a window, so that no slow exit is missed,
/// and so short that little is lost of a VM that goes.
const READ_INTERVAL: Duration = Duration::from_millis(500);

impl Args {
    /// Show the slow exits, and return the exit status.
    ///
    /// # Errors
    ///
    /// Returns an error if there is nothing to show, or the output cannot be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<ExitCode> {
        command::exit_code(self.show(out), &self.command)
    }

    fn show(&self, out: &mut Output) -> anyhow::Result<u8> {
        let symbols = Symbols::read_optional(self.symbols.as_deref())?;
        if let Some(path) = &self.input {
            let seen = saved(path)?;
            self.print(&seen, &NameBook::default(), &symbols, out)?;
            return Ok(0);
        }
        if let Some((program, arguments)) = self.command.split_first() {
            let device = Device::open(&self.device)?;
            let mut names = NameBook::of(device.path());
            let mut seen = read(&device, &mut names)?;
            seen.discard_earlier();
            // From here on, the signals are events and do not end this process.
            let (events, sender) = Events::new().context("cannot wait for signals")?;
            let child = Child::start(program, arguments, sender)?;
            return match self.watch(&device, &mut seen, &mut names, &events, &child) {
                Ok(status) => {
                    self.print(&seen, &names, &symbols, out)?;
                    Ok(status)
                }
                Err(error) => Ok(child.report_and_wait(&events, &error)),
            };
        }
        // Look before the device is opened: that would turn details on, with nothing recorded yet.
        let meter = source::meter(&self.device);
        let bytes = source::read(&meter)?;
        anyhow::ensure!(
            source::parse(&meter, &bytes)?.has_tables(),
            "details are off, so no exit has been recorded: 'exitmeter slow -- CMD' turns them on \
             while CMD runs; with the module's parameter details=1 they are always on"
        );
        let device = Device::open(&self.device)?;
        let mut names = NameBook::of(device.path());
        let seen = read(&device, &mut names)?;
        self.print(&seen, &names, &symbols, out)?;
        if self.thaw {
            device.thaw()?;
        }
        Ok(0)
    }

    /// Read until the command ends, and return its status.
    fn watch(
        &self,
        device: &Device,
        seen: &mut SlowExits,
        names: &mut NameBook,
        events: &Events,
        child: &Child,
    ) -> anyhow::Result<u8> {
        loop {
            match events.until(Instant::now() + READ_INTERVAL) {
                Some(RecordEvent::Signal(signal)) => child.pass_on(signal),
                Some(RecordEvent::Ended(status)) => {
                    seen.add(read(device, names)?)?;
                    return Ok(command::status(status));
                }
                None => seen.add(read(device, names)?)?,
            }
        }
    }

    fn print(
        &self,
        seen: &SlowExits,
        names: &NameBook,
        symbols: &Symbols,
        out: &mut Output,
    ) -> anyhow::Result<()> {
        let selection = Selection {
            vm: self.vm.as_deref(),
            names: Some(names),
            code: match &self.reason {
                Some(reason) => Some(select::code(seen.host.isa, reason)?),
                None => None,
            },
        };
        let slow = Slow::new(seen, symbols, selection)?;
        if self.symbols.is_some() && slow.vms.len() > 1 {
            return Err(select::Error::Symbols(slow.vms.len()).into());
        }
        if self.json {
            return Ok(out.json(&slow)?);
        }
        if self.csv {
            return Ok(out.print(&csv::csv(&slow, self.ring))?);
        }
        let shown = Shown {
            ring: self.ring,
            limit: self
                .limit
                .unwrap_or(if self.ring { usize::MAX } else { DEFAULT_LIMIT }),
        };
        Ok(out.print(&text::text(&slow, shown, out.text_options()))?)
    }
}

/// Read a saved snapshot.
fn saved(path: &Path) -> anyhow::Result<SlowExits> {
    let bytes = source::read(path)?;
    let snapshot = source::parse(path, &bytes)?;
    anyhow::ensure!(
        snapshot.tables().any(|tables| tables.has_slow()) || snapshot.tables().next().is_none(),
        "{} has no slow exits: its module is too old to record them",
        path.display()
    );
    anyhow::ensure!(
        snapshot.has_tables(),
        "{} has no slow exits: details were off when it was taken, or its module is too \
         old to record them; 'exitmeter slow -- CMD' turns them on",
        path.display()
    );
    let written = fs::metadata(path).and_then(|metadata| metadata.modified());
    Ok(SlowExits::new(&snapshot, written.ok()))
}

fn read(device: &Device, names: &mut NameBook) -> anyhow::Result<SlowExits> {
    let bytes = device.read()?;
    let snapshot = source::parse(device.path(), &bytes)?;
    names.read(&snapshot);
    Ok(SlowExits::new(&snapshot, Some(SystemTime::now())))
}
