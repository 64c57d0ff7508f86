// SPDX-License-Identifier: GPL-2.0

//! Runs the command between two moments.
//!
//! The first one is taken in the new process, as the last thing before it becomes the command, and
//! the second one when it has ended. So to make a process is not among what the command caused.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufReader, Seek as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus},
    sync::atomic::{AtomicI32, Ordering::SeqCst},
    time::Duration,
};

use anyhow::Context as _;
use exitmeter_guest::{Isa, Row};
use exitmeter_meter::snapshot::{TABLE_DETAILS, TABLE_USER};
use rustix::{
    fs::{memfd_create, MemfdFlags},
    process::{kill_process, waitid, Pid, Signal, WaitId, WaitIdOptions},
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2},
    low_level,
};

use super::moment::Moment;
use crate::{
    command::Unrunnable,
    guest::{
        tables::{self, Cpus, Left, Reading, Tally},
        Way, TABLES_SINCE,
    },
    signals::is_ignored,
};

/// The tables that tell what exits were about.
const TABLES: [u32; 2] = [TABLE_DETAILS, TABLE_USER];

/// The meter of the host, as it was found.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Whose CPU this is.
    pub isa: Isa,
    /// How the meter is asked.
    pub way: Way,
}

impl Host {
    /// Demand that the host keeps details, by the version of its leaves and by what it tells of them.
    ///
    /// # Errors
    ///
    /// When it does not, or cannot be asked.
    pub fn check_details(self, version: u32) -> anyhow::Result<()> {
        if version < TABLES_SINCE {
            return Err(tables::Error::Version(version).into());
        }
        let mut cpus = Cpus::open(self.way)?;
        Ok(Reading::now(&mut cpus, self.isa, &[])?.check()?)
    }
}

/// What one run of the command caused.
#[derive(Clone, Debug)]
pub struct Run {
    /// Whose reasons.
    pub isa: Isa,
    /// Exits and ticks by reason, with nothing of the tool's own; `None` when the meter began anew
    /// meanwhile, so that nobody knows.
    pub rows: Option<Vec<Row>>,
    /// What the exits were about, where that was asked for and is known.
    pub why: Option<Reading>,
    /// How many CPUID exits of its own were taken out.
    pub queries: u64,
    /// How long it ran, in ticks of this guest's TSC.
    pub ticks: u64,
    /// How long it ran.
    pub time: Duration,
    /// How it ended.
    pub ended: ExitStatus,
}

/// The command that runs: its process, or 0.
static RUNS: AtomicI32 = AtomicI32::new(0);
/// The last signal that came, and the last one that came while no command ran; 0 for none.
static CAME: AtomicI32 = AtomicI32::new(0);
static MISSED: AtomicI32 = AtomicI32::new(0);

/// Passes a signal on to the command. Those of the keyboard go to both by themselves.
fn pass_on(signal: i32) {
    CAME.store(signal, SeqCst);
    let Some(child) = Pid::from_raw(RUNS.load(SeqCst)) else {
        return MISSED.store(signal, SeqCst);
    };
    let signal = Signal::from_named_raw(signal);
    if let Some(signal) = signal.filter(|signal| ![Signal::INT, Signal::QUIT].contains(signal)) {
        // It may have ended this moment.
        let _ = kill_process(child, signal);
    }
}

/// From now on signals do not end the tool, but reach the command. A command finds all of them as
/// they were.
///
/// # Errors
///
/// When the system does not allow it.
pub fn outlive_signals() -> io::Result<()> {
    let signals = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];
    for signal in signals.into_iter().filter(|signal| !is_ignored(*signal)) {
        // SAFETY: `pass_on` does nothing but to use atomics and the system call kill, which a
        // handler may.
        unsafe { low_level::register(signal, move || pass_on(signal)) }?;
    }
    Ok(())
}

/// Whether a signal has come that is to end more than the one run.
pub fn is_to_end() -> bool {
    [SIGHUP, SIGINT, SIGQUIT, SIGTERM].contains(&CAME.load(SeqCst))
}

/// Runs the command once; `why` says whether to read what its exits were about.
///
/// # Errors
///
/// When it cannot be run ([`Unrunnable`]), or what it caused cannot be read.
pub fn once(
    program: &OsString,
    arguments: &[OsString],
    host: Host,
    why: bool,
) -> anyhow::Result<Run> {
    let Host { isa, way } = host;
    // Files take all that is written at once, as a socket does not.
    let mut ours = File::from(memfd_create(c"exitmeter", MemfdFlags::CLOEXEC)?);
    let theirs = ours.try_clone()?;
    let mut before = Moment::new(isa);
    let mut asker = way.open()?;
    let mut details = match why {
        true => Some((Cpus::open(way)?, Left::new()?)),
        false => None,
    };
    let mut reader = match &details {
        Some((_, left)) => Some((Cpus::open(way)?, left.share()?)),
        None => None,
    };
    let mut command = Command::new(program);
    command.args(arguments);
    let begin = move || {
        if let Some((cpus, left)) = &mut reader {
            left.read(cpus, isa, &TABLES)?;
        }
        let mut tally = Tally::new(&mut asker);
        let read = before.read(&mut tally);
        let asked = tally.asked();
        asker.check().map_err(io::Error::other)?;
        read.map_err(io::Error::other)?;
        before.write(&mut &theirs)?;
        match &mut reader {
            Some((_, left)) => left.asked(asked),
            None => Ok(()),
        }
    };
    // SAFETY: After fork it executes CPUID or reads a device, moves from CPU to CPU, writes to files,
    // and takes no memory: `before` has room for all rows. Its one failure that would is no success
    // either.
    unsafe { command.pre_exec(begin) };
    let mut child = command
        .spawn()
        .map_err(|error| Unrunnable::new(program, error))?;
    let ended = wait(&mut child).context("cannot wait for the command")?;
    let mut after = Moment::new(isa);
    let mut asker = way.open()?;
    let mut tally = Tally::new(&mut asker);
    let read = after.read(&mut tally);
    let asked = tally.asked();
    asker.check()?;
    read?;
    let later = match &mut details {
        Some((cpus, _)) => Some(Reading::now(cpus, isa, &TABLES)?),
        None => None,
    };
    ours.rewind()?;
    let before = Moment::receive(&mut BufReader::new(ours))
        .context("the command began without a reading")?;
    let rows = after.since(&before);
    let why = match (details, later) {
        // What the meter forgot nobody knows, here neither.
        (Some((cpus, left)), Some(later)) if rows.is_some() => {
            let mut earlier = left.take(&cpus)?;
            earlier.add_asked(asked);
            Some(later.since(&earlier, isa)?)
        }
        _ => None,
    };
    Ok(Run {
        isa: after.isa,
        rows,
        why,
        queries: before.queries,
        ticks: after.begun.tsc.saturating_sub(before.ended.tsc),
        time: Duration::from_nanos(after.begun.nanos.saturating_sub(before.ended.nanos)),
        ended,
    })
}

/// Waits for the end of a child, which gets all signals until then and none afterwards.
fn wait(child: &mut Child) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).unwrap_or(0);
    RUNS.store(pid, SeqCst);
    match MISSED.swap(0, SeqCst) {
        0 => {}
        signal => pass_on(signal),
    }
    if let Some(id) = Pid::from_raw(pid) {
        // Its number stays its own until it is waited for in earnest.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(id), options) {}
    }
    RUNS.store(0, SeqCst);
    child.wait()
}
