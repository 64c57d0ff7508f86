// SPDX-License-Identifier: GPL-2.0

//! `exitmeter record`: keep snapshots over time in a file.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus},
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use exitmeter_meter::reader::Snapshot;

use self::{
    child::Child,
    events::{Events, RecordEvent},
};
use crate::{
    command,
    model::delta::NEW_LIFE,
    names::NameBook,
    numbers,
    recording::{write::Writer, Header},
    source,
    why::device::Device,
};

pub(crate) mod child;
pub(crate) mod events;

/// On the host: record VM exits over time, while a command runs or until Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The recording is readable up to its last snapshot at any time, even after it was cut off.
The tool takes and stores the snapshots in its own process, and does not hold up vCPUs.

--why keeps details on while it records, so that the recording shows what exits were about and
which were slow. It needs CAP_PERFMON, which root has. It costs some 100 instructions for each
exit, and some 4 kB in the file for each snapshot of a vCPU instead of 0.2. The module cannot be
unloaded meanwhile. Without --why, a recording has details only while another process keeps them
on, or always with the module's parameter details=1.

Exit status:
  the status of CMD; 128 + N when signal N ended it; 127 when it was not found and 126 when
  it could not be run; 125 when the recording failed. Without CMD: 0, or 1 when it failed

Examples:
  exitmeter record -o boot.rec -- qemu-system-x86_64 -enable-kvm disk.img
  exitmeter record -o day.rec --interval 1000
  exitmeter record -o why.rec --why -- sleep 20
  exitmeter plot boot.rec -o boot.html")]
pub struct Args {
    /// File to write. Existing contents are lost.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Milliseconds from one snapshot to the next.
    #[arg(short, long, value_name = "MS", default_value_t = 100,
          value_parser = clap::value_parser!(u64).range(1..=86_400_000))]
    interval: u64,
    #[command(flatten)]
    asked: source::SourceArgs,
    /// Device to read, or a file that is rewritten with fresh snapshots.
    #[arg(long, value_name = "DEVICE", default_value = source::DEVICE)]
    input: PathBuf,
    /// Keep details on while recording: what exits were about, and which were slow.
    #[arg(long)]
    why: bool,
    /// Do not print a summary at the end.
    #[arg(short, long)]
    quiet: bool,
    /// Command to run while recording, with its arguments.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl Args {
    /// Record, and return the exit status.
    ///
    /// # Errors
    ///
    /// Returns an error if there is nothing to record or the file cannot be written, and no command
    /// was given.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        command::exit_code(self.record(), &self.command)
    }

    fn record(&self) -> anyhow::Result<u8> {
        let input = match self.why {
            true => self.input.clone(),
            false => self.asked.source.open(&self.input)?,
        };
        let begun = Instant::now();
        // Fail before anything is written or run if there is nothing to record.
        let from = match self.why {
            true => Origin::Device(Device::open_by(self.asked.source, &input)?),
            false => Origin::File(&input),
        };
        let first = from.read()?;
        let snapshot = source::parse(&input, &first)?;

        let mut recorder = Recorder {
            args: self,
            from,
            begun,
            latest: (snapshot.life(), snapshot.now()),
            breaks: 0,
            names: NameBook::of(&input),
            writer: self.begin().with_context(|| self.unwritable())?,
        };
        recorder.write_names(Duration::ZERO, &snapshot)?;
        recorder.write(|writer| writer.snapshot(Duration::ZERO, first.clone()))?;

        // From here on, the signals are events and do not end this process.
        let (events, sender) = Events::new().context("cannot wait for signals")?;
        let child = match self.command.split_first() {
            Some((program, arguments)) => Some(Child::start(program, arguments, sender)?),
            None => None,
        };
        let recorded = recorder.run(&events, child.as_ref());
        let Some(child) = child else {
            return recorded.map(|_| 0);
        };
        match recorded {
            Ok(ended) => Ok(ended.map_or(0, command::status)),
            Err(error) => Ok(child.report_and_wait(&events, &error)),
        }
    }

    /// Create the file, and write its header and its lines about the host and the command.
    fn begin(&self) -> io::Result<Writer<File>> {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let mut writer = Writer::new(
            File::create(&self.output)?,
            &Header {
                begun: since_1970.unwrap_or_default(),
                interval: self.interval(),
            },
        )?;
        let mut about = vec![("tool", env!("CARGO_PKG_VERSION").to_owned())];
        about.extend(about_host());
        if !self.command.is_empty() {
            let words = self.command.iter().map(|word| word.to_string_lossy());
            about.push(("command", words.collect::<Vec<_>>().join(" ")));
        }
        writer.about(about)?;
        Ok(writer)
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(self.interval)
    }

    fn unwritable(&self) -> String {
        format!("cannot write {}", self.output.display())
    }
}

/// Source of the snapshots.
enum Origin<'a> {
    /// File, opened for each snapshot.
    File(&'a Path),
    /// Device, with details on.
    Device(Device),
}

impl Origin<'_> {
    /// Take a snapshot.
    fn read(&self) -> Result<Vec<u8>, source::Error> {
        match self {
            Origin::File(path) => source::read(path),
            Origin::Device(device) => device.read(),
        }
    }
}

/// A recording in progress.
struct Recorder<'a> {
    args: &'a Args,
    from: Origin<'a>,
    begun: Instant,
    /// Life of the meter and TSC of the latest snapshot.
    latest: (u64, u64),
    /// Number of times that the meter began anew.
    breaks: u64,
    /// Names of the VMs that run.
    names: NameBook,
    writer: Writer<File>,
}

impl Recorder<'_> {
    /// Take a snapshot at each interval until the command ends. Without a command, a signal ends
    /// the recording. Return the exit status of the command.
    fn run(
        &mut self,
        events: &Events,
        child: Option<&Child>,
    ) -> anyhow::Result<Option<ExitStatus>> {
        let interval = self.args.interval();
        let mut next = self.begun + interval;
        loop {
            let (ended, how) = match events.until(next) {
                None => {
                    self.take()?;
                    // Skip the snapshots that are overdue because one took long.
                    let now = Instant::now();
                    while next <= now {
                        next += interval;
                    }
                    continue;
                }
                Some(RecordEvent::Signal(signal)) => {
                    if let Some(child) = child {
                        child.pass_on(signal);
                        continue;
                    }
                    (None, format!("stopped by signal {signal}"))
                }
                Some(RecordEvent::Ended(status)) => (Some(status), child::describe(status)),
            };
            self.take()?;
            let at = self.begun.elapsed();
            self.write(|writer| writer.end(at, &how))?;
            self.print_summary(at);
            return Ok(ended);
        }
    }

    fn take(&mut self) -> anyhow::Result<()> {
        let at = self.begun.elapsed();
        let snapshot = self.from.read()?;
        // A later tool may be able to read a snapshot that this one cannot, so keep it.
        if let Ok(snapshot) = Snapshot::parse(&snapshot) {
            self.write_names(at, &snapshot)?;
            let now = (snapshot.life(), snapshot.now());
            if now.0 != self.latest.0 || now.1 < self.latest.1 {
                self.breaks += 1;
            }
            self.latest = now;
        }
        self.write(|writer| writer.snapshot(at, snapshot))
    }

    /// Write the names of new VMs. The name of a VM cannot be found out any more once it is gone.
    fn write_names(&mut self, at: Duration, snapshot: &Snapshot<'_>) -> anyhow::Result<()> {
        let new = self.names.read(snapshot);
        self.names.forget(snapshot);
        match new.is_empty() {
            true => Ok(()),
            false => self.write(|writer| writer.names(at, &new)),
        }
    }

    fn write(
        &mut self,
        write: impl FnOnce(&mut Writer<File>) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        write(&mut self.writer).with_context(|| self.args.unwritable())
    }

    fn print_summary(&self, time: Duration) {
        if !self.args.quiet {
            let breaks = match self.breaks {
                0 => String::new(),
                1 => format!("; {NEW_LIFE} once meanwhile"),
                times => format!("; {NEW_LIFE} {times} times meanwhile"),
            };
            eprintln!(
                "exitmeter: {} snapshots in {:.1} s, {} in {}{breaks}",
                numbers::exact(self.writer.snapshots()),
                time.as_secs_f64(),
                format_size(self.writer.bytes()),
                self.args.output.display()
            );
        }
    }
}

/// Return the lines about this host for the head of a recording.
pub fn about_host() -> Vec<(&'static str, String)> {
    let system = rustix::system::uname();
    let mut about = vec![("kernel", system.release().to_string_lossy().into_owned())];
    about.extend(cpu_model().map(|name| ("cpu", name)));
    about
}

/// Return the model name of the host's CPU.
fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(": ")?.1.trim().to_owned())
}

/// Format a number of bytes for people.
fn format_size(bytes: u64) -> String {
    let text = numbers::rough(bytes);
    let number = text.trim_end_matches(char::is_alphabetic);
    let unit = text.trim_start_matches(number);
    format!("{number} {unit}B")
}
