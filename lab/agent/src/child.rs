// SPDX-License-Identifier: GPL-2.0

//! Running a command and forwarding its output as it comes.

use std::{
    fs::File,
    io::{self, Read},
    os::{fd::AsFd, unix::process::ExitStatusExt as _},
    process::{Child, Command, ExitStatus, Stdio},
};

use lab_agent::channel::Message;
use rustix::{
    event::{poll, PollFd, PollFlags, Timespec},
    fs::{fcntl_getfl, fcntl_setfl, OFlags},
    process::{waitpid, Pid, PidfdFlags, WaitOptions},
};

/// Longest time until an orphan that was inherited is reaped after its end.
const REAP_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};

/// Reader of the kernel log as it grows.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// Open the log at its first record.
    pub fn open() -> io::Result<Self> {
        let file = File::open("/dev/kmsg")?;
        set_nonblocking(&file)?;
        Ok(Self(file))
    }

    /// Emit all records written so far.
    pub fn drain(&mut self, emit: &mut impl FnMut(Message) -> io::Result<()>) -> io::Result<()> {
        // A record is at most 8 KiB, and each read returns one.
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(()),
                Ok(length) => emit(Message::Kernel(record[..length].to_vec()))?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel has overwritten unread records. The next read continues after them.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {
                    emit(Message::Kernel(
                        b"12,0,0,-;lab: some of the kernel log is lost here\n".to_vec(),
                    ))?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Run `command` without input. Emit its output, and the kernel log if there is one, until the command itself ends.
/// Return its status, or 128 + N for signal N.
///
/// Its background processes keep running, but their output is dropped. Only the first process may call this, since it
/// reaps every orphan.
pub fn run(
    mut command: Command,
    mut log: Option<&mut KernelLog>,
    emit: &mut impl FnMut(Message) -> io::Result<()>,
) -> io::Result<u32> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(io::Error::other("the command has no output"));
    };
    set_nonblocking(&stdout)?;
    set_nonblocking(&stderr)?;
    let pid = pid_of(&child)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let (mut stdout_open, mut stderr_open) = (true, true);
    loop {
        let ended = {
            let mut sources = vec![PollFd::new(&pidfd, PollFlags::IN)];
            if stdout_open {
                sources.push(PollFd::new(&stdout, PollFlags::IN));
            }
            if stderr_open {
                sources.push(PollFd::new(&stderr, PollFlags::IN));
            }
            if let Some(log) = &log {
                sources.push(PollFd::new(&log.0, PollFlags::IN));
            }
            match poll(&mut sources, Some(&REAP_INTERVAL)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            !sources[0].revents().is_empty()
        };
        // The kernel log goes first: its records precede what the command says about them.
        if let Some(log) = &mut log {
            log.drain(emit)?;
        }
        stdout_open = stdout_open && drain(&mut stdout, Message::Stdout, emit)?;
        stderr_open = stderr_open && drain(&mut stderr, Message::Stderr, emit)?;
        if let Some(status) = reap(pid)? {
            if ended {
                return Ok(status);
            }
            // It ended after the pipes were read: read them once more for its last output.
            if stdout_open {
                drain(&mut stdout, Message::Stdout, emit)?;
            }
            if stderr_open {
                drain(&mut stderr, Message::Stderr, emit)?;
            }
            if let Some(log) = &mut log {
                log.drain(emit)?;
            }
            return Ok(status);
        }
    }
}

/// Reap all children that have ended. Return the status of `pid` if it is among them.
fn reap(pid: Pid) -> io::Result<Option<u32>> {
    let mut found = None;
    loop {
        match waitpid(None, WaitOptions::NOHANG) {
            Ok(Some((ended, status))) => {
                if ended == pid {
                    found = Some(shell_status(ExitStatus::from_raw(status.as_raw())));
                }
            }
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(found),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Convert a status to the number that a shell reports.
fn shell_status(status: ExitStatus) -> u32 {
    // CAST: neither is negative.
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u32,
        (None, Some(signal)) => 128 + signal as u32,
        (None, None) => 255,
    }
}

/// Emit the contents of a pipe. Return true if more can come.
fn drain(
    pipe: &mut impl Read,
    kind: fn(Vec<u8>) -> Message,
    emit: &mut impl FnMut(Message) -> io::Result<()>,
) -> io::Result<bool> {
    let mut bytes = [0; 1 << 15];
    loop {
        match pipe.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(length) => emit(kind(bytes[..length].to_vec()))?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn pid_of(child: &Child) -> io::Result<Pid> {
    i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("the command has no process"))
}

fn set_nonblocking(file: &impl AsFd) -> io::Result<()> {
    fcntl_setfl(file, fcntl_getfl(file)? | OFlags::NONBLOCK)?;
    Ok(())
}
