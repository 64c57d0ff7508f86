// SPDX-License-Identifier: GPL-2.0

//! The meter for hosts that cannot load the module: BPF programs that keep the same ledgers.
//!
//! [`layout`] looks up where this kernel's KVM keeps what the programs read, [`object`] tells the programs, [`attach`] loads and
//! attaches them by [`sys`], [`pins`] keeps them beyond this process, and [`maps`] makes a snapshot of what they keep. The
//! programs are in cli/bpf. [`socket`] asks systemd for a snapshot, where this process may not read the pins.

use std::{
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::Context as _;

use crate::output::Output;

pub mod attach;
pub mod layout;
pub mod maps;
pub mod object;
pub mod pins;
pub mod socket;
pub mod sys;

use self::{attach::Attached, maps::Maps};

/// The folder of the pins, and the name of this source where a file is named.
pub const PINS: &str = "/sys/fs/bpf/exitmeter";

/// Where exitmeter-bpf.socket gives snapshots to the group kvm.
pub const SOCKET: &str = "/run/exitmeter.sock";

/// How long to count before the first snapshot of programs that were attached for it.
const FIRST: Duration = Duration::from_secs(1);

/// Why BPF does not meter here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing to meter.
    #[error("KVM is not loaded: load kvm_intel or kvm_amd first")]
    NoKvm,
    /// The kernel does not tell its types.
    #[error("this kernel does not tell its types ({0}): BPF needs one with CONFIG_DEBUG_INFO_BTF and its modules' types")]
    NoTypes(String),
    /// KVM is not as the programs know it.
    #[error("this kernel's KVM has no {0}: the BPF meter does not know this version")]
    Unknown(String),
    /// No right.
    #[error("no right to load BPF programs: run this as root, or with CAP_BPF and CAP_PERFMON")]
    NoRight,
    /// No right to read.
    #[error(
        "no right to read {PINS}: run this as root; the group kvm reads it through {SOCKET} (systemctl enable --now exitmeter-bpf)"
    )]
    Closed,
    /// Who gives the numbers in place of the pins does not.
    #[error("{SOCKET} gives no snapshot: {0}; journalctl -u 'exitmeter-bpf@*' tells more")]
    NotGiven(String),
    /// No right, by a setting that Debian's kernels have.
    #[error(
        "no right to hook KVM's functions: with kernel.perf_event_paranoid={0} that takes root or CAP_SYS_ADMIN; \
         CAP_BPF and CAP_PERFMON are enough with less (sysctl kernel.perf_event_paranoid=2)"
    )]
    Paranoid(u32),
    /// The kernel is locked down.
    #[error("this kernel is locked down to confidentiality, where no BPF program may read it: lockdown=integrity is enough")]
    LockedDown,
    /// The kernel does not take a program.
    #[error("the kernel refuses the BPF program {program}: {error}")]
    Refused {
        /// The program, or map.
        program: String,
        /// What the kernel says.
        error: String,
    },
    /// The kernel does not give a map its size.
    #[error("this kernel gives BPF no array of that size: Linux 6.0 or later does; before that --max-vcpus 65 is the most")]
    TooLarge,
    /// It is attached already.
    #[error("BPF meters already: exitmeter bpf status, or exitmeter bpf stop")]
    Started,
    /// It is not attached.
    #[error("no BPF meter is attached: exitmeter bpf start")]
    NotStarted,
    /// The file system of pins does not do.
    #[error("{path}: {error}; the BPF file system has to be at /sys/fs/bpf (mount -t bpf bpf /sys/fs/bpf)")]
    Pins {
        /// The file or folder.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// It is attached without what is asked for.
    #[error("BPF meters without details: exitmeter bpf stop, and exitmeter bpf start --details")]
    WithoutDetails,
    /// The pins are of another version.
    #[error("{PINS} is of another version of exitmeter: exitmeter bpf stop, and start it again")]
    OtherVersion,
    /// A vCPU's numbers never hold still.
    #[error("the numbers of a vCPU could not be copied, as it exits too fast: try again")]
    Restless,
}

/// The programs that this process has attached for itself.
static OWN: Mutex<Option<Attached>> = Mutex::new(None);

/// Have BPF meter from now on: unless programs are pinned, attach some for as long as this process runs, and let them count
/// for a second.
///
/// # Errors
///
/// [`Error`].
pub fn open() -> Result<(), Error> {
    attach(false)
}

/// As [`open`], with what exits were about.
///
/// # Errors
///
/// [`Error`].
pub fn open_with_details() -> Result<(), Error> {
    attach(true)
}

fn attach(details: bool) -> Result<(), Error> {
    let mut own = own();
    let has_details = match &*own {
        Some(own) => Some(own.maps().has_details()),
        None => match pins::open(Path::new(PINS)) {
            Err(Error::Closed) => Some(socket::has_details(details)?),
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

/// Return a snapshot: of the programs of this process, or of the pinned ones, which who may not read them gets by the socket.
///
/// # Errors
///
/// [`Error`].
pub fn read() -> Result<Vec<u8>, Error> {
    if let Some(own) = &*own() {
        return own.maps().snapshot(true);
    }
    match pins::open(Path::new(PINS)) {
        Err(Error::Closed) => socket::read(),
        maps => maps?.ok_or(Error::NotStarted)?.snapshot(true),
    }
}

fn own() -> MutexGuard<'static, Option<Attached>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// On the host: meters without the module, by BPF programs.
///
/// They keep the same numbers, phases and histograms, in nanoseconds, on kernels that cannot load the module. They cost
/// some three times as much, and guests cannot ask them. Without this command report, top and record attach them for as
/// long as they run, where the module is not loaded.
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
    /// Attaches the programs, and keeps them by pins in /sys/fs/bpf/exitmeter.
    Start {
        /// How many vCPUs are metered at a time, at least: 32 KiB each, rounded up to a power of two of bytes, taken at once.
        #[arg(long, value_name = "N", default_value_t = attach::VCPUS, value_parser = clap::value_parser!(u32).range(1..=8192))]
        max_vcpus: u32,
        /// Keeps tables of what exits were about and of the slowest ones; 46 KiB more for each vCPU.
        #[arg(long)]
        details: bool,
    },
    /// Takes the programs away with all that they counted.
    Stop,
    /// Prints a snapshot to be saved, as /dev/exitmeter gives one.
    Snapshot {
        /// Leaves out where guests' code was, as /dev/exitmeter does for who has no CAP_PERFMON.
        #[arg(long)]
        without_code: bool,
    },
    /// Tells whether the programs are attached, since when, and how much room is left.
    Status,
}

impl Args {
    /// Does it; the status to exit with.
    ///
    /// # Errors
    ///
    /// [`Error`], and where there is nowhere to print.
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
                // Not by the socket, which asks this command.
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

/// Return what is told of programs that are attached.
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
            "{unmetered} vCPUs run or ran unmetered, with {lost} exits: for want of room (--max-vcpus), or as those of \
             a trust domain\n"
        );
    }
    text
}
