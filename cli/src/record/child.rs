// SPDX-License-Identifier: GPL-2.0

//! Command that runs while the tool measures.

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitStatus},
    sync::mpsc::Sender,
    thread,
};

use rustix::process::{kill_process, Pid, Signal};

use super::events::{Events, RecordEvent};
use crate::command::{Unrunnable, FAILED};

/// A running command.
#[derive(Debug)]
pub struct Child {
    pid: Option<Pid>,
}

impl Child {
    /// Start a command. Its end will be an event.
    pub fn start(
        program: &OsStr,
        arguments: &[OsString],
        events: Sender<RecordEvent>,
    ) -> Result<Self, Unrunnable> {
        let child = Command::new(program).args(arguments).spawn();
        let mut child = child.map_err(|error| Unrunnable::new(program, error))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        thread::spawn(move || {
            // Waiting fails only for a process that is not our child.
            let status = child.wait().unwrap_or_default();
            events.send(RecordEvent::Ended(status))
        });
        Ok(Self { pid })
    }

    /// Pass a signal on to the command, except Ctrl-C: the terminal sends that to both, and a
    /// command may take a second one as the wish to drop everything.
    pub fn pass_on(&self, signal: i32) {
        let signal = Signal::from_named_raw(signal).filter(|signal| *signal != Signal::INT);
        if let (Some(pid), Some(signal)) = (self.pid, signal) {
            // The command may have just ended.
            let _ = kill_process(pid, signal);
        }
    }

    /// Print why the measurement failed, wait until the command has ended, and return the exit
    /// status. The command is worth more than its measurement, so it runs on.
    pub fn report_and_wait(&self, events: &Events, error: &anyhow::Error) -> u8 {
        eprintln!("exitmeter: {error:#}");
        while let Some(RecordEvent::Signal(signal)) = events.wait() {
            self.pass_on(signal);
        }
        FAILED
    }
}

/// Describe how a command ended.
pub fn describe(ended: ExitStatus) -> String {
    match (ended.code(), ended.signal()) {
        (Some(code), _) => format!("the command ended with status {code}"),
        (_, Some(signal)) => format!("the command was ended by signal {signal}"),
        _ => "the command ended".to_owned(),
    }
}
