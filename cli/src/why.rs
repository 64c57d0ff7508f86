// SPDX-License-Identifier: GPL-2.0

//! `exitmeter why`: what exits were about, and which code of the guest caused them.

use std::{
    ffi::OsString,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use self::{
    device::Device,
    model::{Weight, Why},
    symbols::Symbols,
    tables::TableSet,
    text::Shown,
};
use crate::{
    command,
    model::delta::{self, NEW_LIFE},
    names::NameBook,
    output::{Output, TextOptions},
    record::{
        child::Child,
        events::{Events, RecordEvent},
    },
    report::seconds,
    source,
};

pub(crate) mod csv;
pub(crate) mod detail;
pub(crate) mod device;
pub(crate) mod export;
pub(crate) mod model;
mod names;
pub(crate) mod select;
pub(crate) mod symbols;
pub(crate) mod tables;
pub(crate) mod text;

/// On the host: show what exits were about, and which code of the guest caused them.
///
/// For each reason, it lists the most frequent or most costly ports, MSRs, addresses, vectors,
/// CPUID leaves, hypercalls and registers with their names, and the reasons why exits went to the
/// VMM. The module records these details only on request: this command turns them on until CMD has
/// ended, or until Ctrl-C. That needs CAP_PERFMON, which root has.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A row is exact, or has its bound beside it: '+12' says that up to 12 more of its exits may stand
among the others of its reason. That happens when a vCPU has more different details than its table
has rows, or when a row was replaced and came back. Rows and others always sum to the exits and
cycles of the reason. Reasons without details, such as HLT, have no rows.

share is a row's part of the reason's exits, or a reason's part of all exits. kernel and user are
TSC cycles. mean is the cycles of one exit: kernel cycles, or user cycles of exits to user space.

--code lists guest addresses, or symbols if it has the guest's own list of symbols. Read the guest's
/proc/kallsyms as root, during the same boot, because addresses change with each boot. For a guest
without KASLR, a System.map does as well. Guests with encrypted registers have no addresses.

--collapsed and --speedscope write the guest's code as a profile, with the frames VM, reason and
symbol. For a vCPU that goes while CMD runs, up to the last half second is missing.

The host's own vectors have the names of /proc/interrupts. Those of devices have none, because they
change from CPU to CPU. On AMD, an interrupt has no vector.

Exit status:
  the status of CMD; 128 + N when signal N ended it; 127 when it was not found and 126 when it
  could not be run; 125 when the tool failed. Without CMD: 0, or 1 when it failed

Examples:
  exitmeter why -- sleep 10
  exitmeter why --interval 1 --reason MSR_WRITE
  exitmeter why --vm 1234 --code --symbols guest.kallsyms -- sleep 10
  exitmeter why --vm 1234 --symbols guest.kallsyms --collapsed -- sleep 10 | flamegraph.pl > exits.svg
  exitmeter why --speedscope -o exits.json -- sleep 10
  exitmeter why saved.snapshot")]
pub struct Args {
    /// Show only the VM of this process or kvm-PID, or with this name, UUID, id or systemd unit.
    #[arg(long, value_name = "PID|NAME|UUID|ID")]
    vm: Option<String>,
    /// Show only this exit reason: its name or its number.
    #[arg(long, value_name = "REASON")]
    reason: Option<String>,
    /// Show the guest's code that caused the exits.
    #[arg(long)]
    code: bool,
    /// Name code by the symbols in FILE: the guest's /proc/kallsyms, or its System.map. Implies
    /// --code.
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Sort rows and weigh profiles by exits, or by the ticks that they took.
    #[arg(long, value_enum, default_value_t)]
    weight: Weight,
    /// Show up to N rows of each reason.
    #[arg(long, value_name = "N", default_value_t = 10)]
    limit: usize,
    /// Print JSON instead of tables; with --interval, one line each time.
    #[arg(long, group = "form")]
    json: bool,
    /// Print comma-separated values: one line for each row.
    #[arg(long, group = "form")]
    csv: bool,
    /// Print the guest's code as collapsed stacks, for flamegraph.pl and inferno.
    #[arg(long, group = "form")]
    collapsed: bool,
    /// Print the guest's code as JSON for speedscope.
    #[arg(long, group = "form")]
    speedscope: bool,
    /// Write to FILE instead of the standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Report what happened in each S seconds.
    #[arg(long, value_name = "S", value_parser = seconds, conflicts_with_all = ["collapsed", "speedscope", "input", "diff"])]
    interval: Option<Duration>,
    /// End after N intervals.
    #[arg(long, value_name = "N", requires = "interval", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Report what happened between two saved snapshots.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "input")]
    diff: Option<Vec<PathBuf>>,
    /// Device whose details are turned on.
    #[arg(long, value_name = "DEVICE", default_value = source::DEVICE, hide = true)]
    device: PathBuf,
    /// Saved snapshot to read, taken while details were on.
    #[arg(value_name = "FILE")]
    input: Option<PathBuf>,
    /// Command to run meanwhile, with its arguments.
    #[arg(last = true, value_name = "CMD", conflicts_with_all = ["input", "diff"])]
    command: Vec<OsString>,
}

/// Time from one reading to the next. It is short, so that little is lost of a VM that goes.
const READ_INTERVAL: Duration = Duration::from_millis(500);

impl Args {
    /// Report the details, and return the exit status.
    ///
    /// # Errors
    ///
    /// Returns an error if there is nothing to report, or the output cannot be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<ExitCode> {
        command::exit_code(self.report(out), &self.command)
    }

    fn report(&self, out: &mut Output) -> anyhow::Result<u8> {
        let symbols = Symbols::read_optional(self.symbols.as_deref())?;
        let mut to = Printer {
            args: self,
            symbols,
            file: match &self.output {
                Some(path) => {
                    let file = File::create(path);
                    Some(file.with_context(|| format!("cannot write {}", path.display()))?)
                }
                None => None,
            },
            out,
        };
        match (&self.input, self.diff.as_deref()) {
            (Some(path), _) => {
                to.begin()?;
                to.print(saved(path)?, &NameBook::default())?;
                Ok(0)
            }
            (None, Some([before, after])) => {
                to.begin()?;
                to.print(difference(before, after)?, &NameBook::default())?;
                Ok(0)
            }
            _ => self.watch(&mut to),
        }
    }

    /// Turn details on, and report them until the command ends. Without a command, a signal ends
    /// it.
    fn watch(&self, to: &mut Printer<'_>) -> anyhow::Result<u8> {
        let device = Device::open(&self.device)?;
        let mut names = NameBook::of(device.path());
        let mut watch = Watch {
            before: live(&device, &mut names)?,
            latest: None,
            device,
            names,
        };
        // Fail now if the selected VM or reason does not exist.
        if self.command.is_empty() {
            if let Some(vm) = &self.vm {
                select::vm(&mut watch.before.clone(), vm, &watch.names)?;
            }
        }
        if let Some(reason) = &self.reason {
            select::code(watch.before.host.isa, reason)?;
        }
        to.begin()?;
        // From here on, the signals are events and do not end this process.
        let (events, sender) = Events::new().context("cannot wait for signals")?;
        let child = match self.command.split_first() {
            Some((program, arguments)) => Some(Child::start(program, arguments, sender.clone())?),
            None => None,
        };
        let ended = self.watch_on(&mut watch, to, &events, child.as_ref());
        drop(sender);
        match (ended, &child) {
            (Ok(ended), _) => Ok(ended.map_or(0, command::status)),
            (Err(error), Some(child)) => Ok(child.report_and_wait(&events, &error)),
            (Err(error), None) => Err(error),
        }
    }

    fn watch_on(
        &self,
        watch: &mut Watch,
        to: &mut Printer<'_>,
        events: &Events,
        child: Option<&Child>,
    ) -> anyhow::Result<Option<ExitStatus>> {
        let mut intervals_left = self.count;
        let mut due = self.interval.map(|interval| Instant::now() + interval);
        let mut reading = Instant::now() + READ_INTERVAL;
        loop {
            let next = due.map_or(reading, |due| due.min(reading));
            let ended = match events.until(next) {
                Some(RecordEvent::Signal(signal)) => match child {
                    Some(child) => {
                        child.pass_on(signal);
                        continue;
                    }
                    None => None,
                },
                Some(RecordEvent::Ended(status)) => Some(status),
                None => {
                    let now = Instant::now();
                    if reading <= now {
                        watch.read()?;
                        reading = now + READ_INTERVAL;
                    }
                    if let (Some(end), Some(interval)) = (due, self.interval) {
                        if end <= now {
                            watch.report(to)?;
                            due = Some(end.max(now - interval) + interval);
                            intervals_left = intervals_left.map(|left| left - 1);
                            if intervals_left == Some(0) && child.is_none() {
                                return Ok(None);
                            }
                        }
                    }
                    continue;
                }
            };
            if intervals_left != Some(0) {
                watch.report(to)?;
            }
            return Ok(ended);
        }
    }
}

/// Read a saved snapshot.
fn saved(path: &Path) -> anyhow::Result<TableSet> {
    let bytes = source::read(path)?;
    let table_set = TableSet::new(&source::parse(path, &bytes)?);
    anyhow::ensure!(
        table_set.has_tables,
        "{} has no details: they were off when it was taken, or its module is too old for them; \
         'exitmeter why -- CMD' turns them on",
        path.display()
    );
    Ok(table_set)
}

/// Return what happened between two saved snapshots.
fn difference(before: &Path, after: &Path) -> anyhow::Result<TableSet> {
    let (older, newer) = (saved(before)?, saved(after)?);
    let (before, after) = (before.display(), after.display());
    newer.since(&older).map_err(|error| match error {
        delta::Error::Order => {
            anyhow::anyhow!("{after} is older than {before}: name the older one first")
        }
        error => anyhow::anyhow!("{error} between {before} and {after}, or they are of two hosts"),
    })
}

fn live(device: &Device, names: &mut NameBook) -> anyhow::Result<TableSet> {
    let bytes = device.read()?;
    let snapshot = source::parse(device.path(), &bytes)?;
    names.read(&snapshot);
    Ok(TableSet::new(&snapshot))
}

/// Device that is read again and again.
struct Watch {
    device: Device,
    /// Names of the VMs, including those that have gone.
    names: NameBook,
    /// Start of the next report.
    before: TableSet,
    /// Latest reading since then.
    latest: Option<TableSet>,
}

impl Watch {
    /// Read once more, and keep the tables of vCPUs that have gone since.
    fn read(&mut self) -> anyhow::Result<()> {
        let mut now = live(&self.device, &mut self.names)?;
        let before = self.latest.take();
        if let Some(before) = before.filter(|before| before.host.life == now.host.life) {
            now.keep(before);
        }
        self.latest = Some(now);
        Ok(())
    }

    /// Print what happened since the last report.
    fn report(&mut self, to: &mut Printer<'_>) -> anyhow::Result<()> {
        self.read()?;
        let Some(now) = self.latest.take() else {
            return Ok(());
        };
        match now.since(&self.before) {
            Ok(delta) => to.print(delta, &self.names)?,
            Err(error) if error.is_break() => {
                eprintln!("exitmeter: {NEW_LIFE}; what it recorded before is lost");
            }
            Err(error) => return Err(error.into()),
        }
        self.before = now;
        Ok(())
    }
}

/// Printer for the chosen form of output.
struct Printer<'a> {
    args: &'a Args,
    symbols: Symbols,
    file: Option<File>,
    out: &'a mut Output,
}

impl Printer<'_> {
    /// Print the line of titles, if the form has one.
    fn begin(&mut self) -> anyhow::Result<()> {
        match self.args.csv {
            true => self.write(csv::HEADER),
            false => Ok(()),
        }
    }

    /// Print what happened.
    fn print(&mut self, mut table_set: TableSet, names: &NameBook) -> anyhow::Result<()> {
        let args = self.args;
        if let Some(vm) = &args.vm {
            select::vm(&mut table_set, vm, names)?;
        }
        if args.symbols.is_some() && table_set.vms.len() > 1 {
            return Err(select::Error::Symbols(table_set.vms.len()).into());
        }
        let mut why = Why::new(&table_set, &self.symbols, args.weight);
        why.name(names);
        if let Some(reason) = &args.reason {
            select::reason(&mut why, reason)?;
        }
        let code = args.code || args.symbols.is_some();
        let text = if args.json && args.interval.is_some() {
            serde_json::to_string(&why)? + "\n"
        } else if args.json {
            serde_json::to_string_pretty(&why)? + "\n"
        } else if args.csv {
            csv::csv(&why, code)
        } else if args.collapsed || args.speedscope {
            anyhow::ensure!(
                why.has_code || why.vms.is_empty(),
                "no code: no vCPU ran, or the snapshot was read without CAP_PERFMON; read it as root"
            );
            match args.collapsed {
                true => export::collapsed(&why, args.weight),
                false => serde_json::to_string(&export::speedscope(&why, args.weight))? + "\n",
            }
        } else {
            let shown = Shown {
                code,
                limit: args.limit,
            };
            let options = match self.file {
                Some(_) => TextOptions {
                    ascii: self.out.text_options().ascii,
                    ..TextOptions::default()
                },
                None => self.out.text_options(),
            };
            let end = if args.interval.is_some() { "\n" } else { "" };
            text::text(&why, shown, options) + end
        };
        self.write(&text)
    }

    fn write(&mut self, text: &str) -> anyhow::Result<()> {
        match &mut self.file {
            Some(file) => file
                .write_all(text.as_bytes())
                .context("cannot write the output"),
            None => Ok(self.out.print(text)?),
        }
    }
}
