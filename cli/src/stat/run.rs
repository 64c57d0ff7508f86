// SPDX-License-Identifier: GPL-2.0

//! Runs the command between two readings of the counters.
//!
//! The first reading takes place in the new process, as the last thing before it becomes the
//! command, and the second when it has ended. So creating the process does not count for the
//! command.

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
use exitmeter_guest::{Isa, ReasonNumbers};
use exitmeter_meter::snapshot::{TABLE_DETAILS, TABLE_USER};
use rustix::{
    fs::{memfd_create, MemfdFlags},
    process::{kill_process, waitid, Pid, Signal, WaitId, WaitIdOptions},
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2},
    low_level,
};

use super::counters::Counters;
use crate::{
    command::Unrunnable,
    guest::{
        tables::{self, Cpus, QueryCounter, Reading, ReadingFile},
        Access, TABLES_SINCE,
    },
    signals::is_ignored,
};

/// Tables of what exits were about.
const TABLES: [u32; 2] = [TABLE_DETAILS, TABLE_USER];

/// Meter of the host, as found.
#[derive(Clone, Copy, Debug)]
pub struct FoundMeter {
    /// Vendor of the CPU.
    pub isa: Isa,
    /// Way to query the meter.
    pub access: Access,
}

impl FoundMeter {
    /// Check that the host keeps details, by the version of its leaves and by what it reports.
    ///
    /// # Errors
    ///
    /// Returns an error if the host does not keep details, or cannot be queried.
    pub fn check_details(self, version: u32) -> anyhow::Result<()> {
        if version < TABLES_SINCE {
            return Err(tables::Error::Version(version).into());
        }
        let mut cpus = Cpus::open(self.access)?;
        Ok(Reading::now(&mut cpus, self.isa, &[])?.check()?)
    }
}

/// Result of one run of the command.
#[derive(Clone, Debug)]
pub struct Run {
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// Exits and ticks by reason, without the tool's own. `None` if the meter began anew meanwhile.
    pub rows: Option<Vec<ReasonNumbers>>,
    /// Details of the exits, where they were asked for and are known.
    pub why: Option<Reading>,
    /// Number of the tool's own CPUID exits that were subtracted.
    pub queries: u64,
    /// Duration, in ticks of this guest's TSC.
    pub ticks: u64,
    /// Duration.
    pub time: Duration,
    /// Exit status of the command.
    pub ended: ExitStatus,
}

/// Process of the running command, or 0.
static COMMAND: AtomicI32 = AtomicI32::new(0);
/// Latest signal, and latest signal while no command ran; 0 for none.
static LAST_SIGNAL: AtomicI32 = AtomicI32::new(0);
static MISSED_SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Pass a signal on to the command. The terminal sends those of the keyboard to both.
fn forward_signal(signal: i32) {
    LAST_SIGNAL.store(signal, SeqCst);
    let Some(child) = Pid::from_raw(COMMAND.load(SeqCst)) else {
        return MISSED_SIGNAL.store(signal, SeqCst);
    };
    let signal = Signal::from_named_raw(signal);
    if let Some(signal) = signal.filter(|signal| ![Signal::INT, Signal::QUIT].contains(signal)) {
        // The command may have just ended.
        let _ = kill_process(child, signal);
    }
}

/// From now on, pass signals on to the command instead of ending the tool. The command starts with
/// the signals' original settings.
///
/// # Errors
///
/// Returns an error if the system does not allow it.
pub fn forward_signals() -> io::Result<()> {
    let signals = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2];
    for signal in signals.into_iter().filter(|signal| !is_ignored(*signal)) {
        // SAFETY: `forward_signal` uses only atomics and the system call kill, which a handler may.
        unsafe { low_level::register(signal, move || forward_signal(signal)) }?;
    }
    Ok(())
}

/// Return true if a signal has come that ends the tool, and not just this run.
pub fn should_stop() -> bool {
    [SIGHUP, SIGINT, SIGQUIT, SIGTERM].contains(&LAST_SIGNAL.load(SeqCst))
}

/// Run the command once. Read the details of its exits if `why` is true.
///
/// # Errors
///
/// Returns an error if the command cannot be run ([`Unrunnable`]), or the counters cannot be read.
pub fn once(
    program: &OsString,
    arguments: &[OsString],
    host: FoundMeter,
    why: bool,
) -> anyhow::Result<Run> {
    let FoundMeter { isa, access } = host;
    // A file takes all that is written at once; a socket does not.
    let mut ours = File::from(memfd_create(c"exitmeter", MemfdFlags::CLOEXEC)?);
    let theirs = ours.try_clone()?;
    let mut before = Counters::new(isa);
    let mut querier = access.open()?;
    let mut details = match why {
        true => Some((Cpus::open(access)?, ReadingFile::new()?)),
        false => None,
    };
    let mut reader = match &details {
        Some((_, file)) => Some((Cpus::open(access)?, file.share()?)),
        None => None,
    };
    let mut command = Command::new(program);
    command.args(arguments);
    let begin = move || {
        if let Some((cpus, file)) = &mut reader {
            file.read(cpus, isa, &TABLES)?;
        }
        let mut counter = QueryCounter::new(&mut querier);
        let read = before.read(&mut counter);
        let asked = counter.asked();
        querier.check().map_err(io::Error::other)?;
        read.map_err(io::Error::other)?;
        before.write(&mut &theirs)?;
        match &mut reader {
            Some((_, file)) => file.asked(asked),
            None => Ok(()),
        }
    };
    // SAFETY: After fork, the closure executes CPUID or reads a device, moves from CPU to CPU and
    // writes to files. It allocates no memory: `before` has room for all rows. Its one failure that
    // does allocate prevents the command from starting anyway.
    unsafe { command.pre_exec(begin) };
    let mut child = command
        .spawn()
        .map_err(|error| Unrunnable::new(program, error))?;
    let ended = wait(&mut child).context("cannot wait for the command")?;
    let mut after = Counters::new(isa);
    let mut querier = access.open()?;
    let mut counter = QueryCounter::new(&mut querier);
    let read = after.read(&mut counter);
    let asked = counter.asked();
    querier.check()?;
    read?;
    let later = match &mut details {
        Some((cpus, _)) => Some(Reading::now(cpus, isa, &TABLES)?),
        None => None,
    };
    ours.rewind()?;
    let before = Counters::receive(&mut BufReader::new(ours))
        .context("the command began without a reading")?;
    let rows = after.since(&before);
    let why = match (details, later) {
        // If the meter began anew, the details are unknown as well.
        (Some((cpus, file)), Some(later)) if rows.is_some() => {
            let mut earlier = file.take(&cpus)?;
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

/// Wait for the end of a child. It gets all signals until then, and none afterwards.
fn wait(child: &mut Child) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).unwrap_or(0);
    COMMAND.store(pid, SeqCst);
    match MISSED_SIGNAL.swap(0, SeqCst) {
        0 => {}
        signal => forward_signal(signal),
    }
    if let Some(id) = Pid::from_raw(pid) {
        // The process id stays reserved until the child is reaped.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(id), options) {}
    }
    COMMAND.store(0, SeqCst);
    child.wait()
}
