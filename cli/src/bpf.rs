// SPDX-License-Identifier: GPL-2.0

//! Metering on hosts that cannot load the module. BPF programs keep the same ledgers.
//!
//! [`layout`] looks up the offsets of this kernel's KVM, and [`object`] patches them into the
//! programs. [`mod@attach`] loads and attaches the programs through [`sys`], [`pins`] keeps them after
//! this process ends, and [`maps`] makes a snapshot of their maps. The programs are in cli/bpf.
//! [`socket`] gets a snapshot from systemd if this process may not read the pins.

use std::{
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;

use self::{attach::Attached, maps::Maps};
use crate::output::Output;

pub mod attach;
pub mod layout;
pub mod maps;
pub mod object;
pub mod pins;
pub mod socket;
pub mod sys;

/// Folder of the pins. It also names this source in messages.
pub const PINS: &str = "/sys/fs/bpf/exitmeter";

/// Socket of exitmeter-bpf.socket, which gives snapshots to the group kvm.
pub const SOCKET: &str = "/run/exitmeter.sock";

/// Counting time before the first snapshot of programs that a command attached for itself.
const FIRST: Duration = Duration::from_secs(1);

/// A reason why BPF cannot meter here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM is not loaded, so there is nothing to meter.
    #[error("KVM is not loaded: load kvm_intel or kvm_amd first")]
    NoKvm,
    /// The kernel does not provide its types.
    #[error("this kernel does not tell its types ({0}): BPF needs one with CONFIG_DEBUG_INFO_BTF and its modules' types")]
    NoTypes(String),
    /// KVM lacks a field or tracepoint that the programs need.
    #[error("this kernel's KVM has no {0}: the BPF meter does not know this version")]
    Unknown(String),
    /// This process may not load BPF programs.
    #[error("no right to load BPF programs: run this as root, or with CAP_BPF and CAP_PERFMON")]
    NoRight,
    /// This process may not read the pins.
    #[error(
        "no right to read {PINS}: run this as root; the group kvm reads it through {SOCKET} (systemctl enable --now exitmeter-bpf)"
    )]
    PinsUnreadable,
    /// The socket gives no snapshot.
    #[error("{SOCKET} gives no snapshot: {0}; journalctl -u 'exitmeter-bpf@*' tells more")]
    NotGiven(String),
    /// kernel.perf_event_paranoid forbids kprobes, as set on Debian's kernels.
    #[error(
        "no right to hook KVM's functions: with kernel.perf_event_paranoid={0} that takes root or CAP_SYS_ADMIN; \
         CAP_BPF and CAP_PERFMON are enough with less (sysctl kernel.perf_event_paranoid=2)"
    )]
    Paranoid(u32),
    /// The kernel is locked down.
    #[error("this kernel is locked down to confidentiality, where no BPF program may read it: lockdown=integrity is enough")]
    LockedDown,
    /// The kernel refuses a program.
    #[error("the kernel refuses the BPF program {program}: {error}")]
    Refused {
        /// Name of the program or map.
        program: String,
        /// Message of the kernel.
        error: String,
    },
    /// The kernel refuses an array of this size.
    #[error("this kernel gives BPF no array of that size: Linux 6.0 or later does; before that --max-vcpus 65 is the most")]
    TooLarge,
    /// The programs are attached already.
    #[error("BPF meters already: exitmeter bpf status, or exitmeter bpf stop")]
    Started,
    /// The programs are not attached.
    #[error("no BPF meter is attached: exitmeter bpf start")]
    NotStarted,
    /// The BPF file system cannot be used.
    #[error("{path}: {error}; the BPF file system has to be at /sys/fs/bpf (mount -t bpf bpf /sys/fs/bpf)")]
    Pins {
        /// File or folder.
        path: String,
        /// Error of the system.
        error: io::Error,
    },
    /// The programs are attached without details, which the command needs.
    #[error("BPF meters without details: exitmeter bpf stop, and exitmeter bpf start --details")]
    WithoutDetails,
    /// The pins belong to another version.
    #[error("{PINS} is of another version of exitmeter: exitmeter bpf stop, and start it again")]
    OtherVersion,
    /// A vCPU's numbers changed during each attempt to copy them.
    #[error("the numbers of a vCPU could not be copied, as it exits too fast: try again")]
    NeverStable,
}

/// Programs that this process attached for itself.
static OWN: Mutex<Option<Attached>> = Mutex::new(None);

/// Start metering by BPF. If no programs are pinned, attach some for the life of this process and
/// let them count for a second.
///
/// # Errors
///
/// See [`Error`].
pub fn open() -> Result<(), Error> {
    attach(false)
}

/// Start metering by BPF as [`open`] does, with details.
///
/// # Errors
///
/// See [`Error`].
pub fn open_with_details() -> Result<(), Error> {
    attach(true)
}

fn attach(details: bool) -> Result<(), Error> {
    let mut own = own();
    let has_details = match &*own {
        Some(own) => Some(own.maps().has_details()),
        None => match pins::open(Path::new(PINS)) {
            Err(Error::PinsUnreadable) => Some(socket::has_details(details)?),
            maps => maps?.map(|maps| maps.has_details()),
        },
    };
    match has_details {
        Some(false) if details => return Err(Error::WithoutDetails),
        Some(_) => return Ok(()),
        None => {}
    }
    *own = Some(Attached::new(attach::VCPUS, details)?);
    eprintln!(
        "exitmeter: counting begins now, by BPF, and ends with this command; exitmeter bpf start keeps on counting"
    );
    thread::sleep(FIRST);
    Ok(())
}

/// Return a snapshot of this process's programs, or else of the pinned ones. If this process may
/// not read the pins, the snapshot comes from the socket.
///
/// # Errors
///
/// See [`Error`].
pub fn read() -> Result<Vec<u8>, Error> {
    if let Some(own) = &*own() {
        return own.maps().snapshot(true);
    }
    match pins::open(Path::new(PINS)) {
        Err(Error::PinsUnreadable) => socket::read(),
        maps => maps?.ok_or(Error::NotStarted)?.snapshot(true),
    }
}

fn own() -> MutexGuard<'static, Option<Attached>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// On the host: meter without the module, by BPF programs.
///
/// They keep the same counts, phases and histograms, in nanoseconds, on kernels that cannot load
/// the module. They cost about three times as much, and guests cannot query them. If neither the
/// module nor these programs are loaded, report, top and record attach the programs for as long as
/// they run.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  exitmeter bpf start
  exitmeter report
  exitmeter bpf snapshot > before; sleep 10; exitmeter bpf snapshot > after
  exitmeter report --diff before after
  exitmeter bpf stop")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Attach the programs and pin them in /sys/fs/bpf/exitmeter.
    Start {
        /// Minimum number of vCPUs that can be metered at a time. Each takes 24 KiB; the sum is
        /// rounded up to a power of two of bytes and allocated at once.
        #[arg(long, value_name = "N", default_value_t = attach::VCPUS, value_parser = clap::value_parser!(u32).range(1..=8192))]
        max_vcpus: u32,
        /// Keep tables of what exits were about and of the slowest exits. Takes 46 KiB more for
        /// each vCPU.
        #[arg(long)]
        details: bool,
    },
    /// Detach the programs and discard all that they counted.
    Stop,
    /// Print a snapshot in the format of /dev/exitmeter, to be saved.
    Snapshot {
        /// Leave out the addresses of guest code, as /dev/exitmeter does for a reader without
        /// CAP_PERFMON.
        #[arg(long)]
        without_code: bool,
    },
    /// Show whether the programs are attached, since when, and how much room is left.
    Status,
}

impl Args {
    /// Run the command and return the exit status.
    ///
    /// # Errors
    ///
    /// Returns an [`Error`], or an error if the output cannot be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<ExitCode> {
        let pins = Path::new(PINS);
        match self.verb {
            Verb::Start { max_vcpus, details } => {
                let _lock = pins::lock(pins)?;
                if pins::open(pins)?.is_some() {
                    return Err(Error::Started.into());
                }
                pins::keep(pins, Attached::new(max_vcpus, details)?)?;
            }
            Verb::Stop => {
                let _lock = pins::lock(pins)?;
                pins::remove(pins)?;
            }
            Verb::Snapshot { without_code } => {
                // Do not use the socket: its server runs this command.
                let maps = pins::open(pins)?.ok_or(Error::NotStarted)?;
                io::stdout()
                    .write_all(&maps.snapshot(!without_code)?)
                    .context("cannot write the snapshot")?;
            }
            Verb::Status => {
                let maps = pins::open(pins)?.ok_or(Error::NotStarted)?;
                out.print(&status(&maps))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Format the state of attached programs.
fn status(maps: &Maps) -> String {
    let since = maps.age();
    let (used, room) = (maps.vcpus(), maps.room());
    let (unmetered, lost) = maps.lost();
    let mut text = format!(
        "attached {} s ago; {used} vCPUs are metered, of {room} at most\n",
        since.as_secs()
    );
    if unmetered != 0 {
        text += &format!(
            "{unmetered} vCPUs run or ran unmetered, with {lost} exits: for lack of room (--max-vcpus), or because they \
             belong to a trust domain\n"
        );
    }
    text
}
