// SPDX-License-Identifier: GPL-2.0

//! The command that runs while it is recorded.

use std::{
    ffi::{OsStr, OsString},
    io::{self, ErrorKind},
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitStatus},
    sync::mpsc::Sender,
    thread,
};

use rustix::process::{kill_process, Pid, Signal};

use super::events::Event;

/// Why a command does not run.
#[derive(Debug, thiserror::Error)]
#[error("cannot run {}: {error}", program.to_string_lossy())]
pub struct Error {
    program: OsString,
    error: io::Error,
}

impl Error {
    /// The exit status that shells have for it.
    pub fn status(&self) -> u8 {
        match self.error.kind() {
            ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}

/// A command that runs.
#[derive(Debug)]
pub struct Child {
    pid: Option<Pid>,
}

impl Child {
    /// Starts one; its end will be an event.
    pub fn start(
        program: &OsStr,
        arguments: &[OsString],
        events: Sender<Event>,
    ) -> Result<Self, Error> {
        let child = Command::new(program).args(arguments).spawn();
        let mut child = child.map_err(|error| Error {
            program: program.to_owned(),
            error,
        })?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        thread::spawn(move || {
            // A child of our own can be waited for.
            let status = child.wait().unwrap_or_default();
            events.send(Event::Ended(status))
        });
        Ok(Self { pid })
    }

    /// Passes a signal on. Not Ctrl-C: the terminal sends that to both, and a command may take
    /// a second one as the wish to drop everything.
    pub fn pass_on(&self, signal: i32) {
        let signal = Signal::from_named_raw(signal).filter(|signal| *signal != Signal::INT);
        if let (Some(pid), Some(signal)) = (self.pid, signal) {
            // It may have ended this moment.
            let _ = kill_process(pid, signal);
        }
    }
}

/// The exit status that tells how a command ended.
pub fn status(ended: ExitStatus) -> u8 {
    let signal = || ended.signal().map(|signal| signal | 128);
    let status = ended.code().or_else(signal);
    status
        .and_then(|status| u8::try_from(status).ok())
        .unwrap_or(super::FAILED)
}

/// The same in words.
pub fn words(ended: ExitStatus) -> String {
    match (ended.code(), ended.signal()) {
        (Some(code), _) => format!("the command ended with status {code}"),
        (_, Some(signal)) => format!("the command was ended by signal {signal}"),
        _ => "the command ended".to_owned(),
    }
}
