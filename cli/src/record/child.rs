// SPDX-License-Identifier: GPL-2.0

//! The command that runs while it is recorded.

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitStatus},
    sync::mpsc::Sender,
    thread,
};

use rustix::process::{kill_process, Pid, Signal};

use super::events::Event;
use crate::command::Unrunnable;

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
    ) -> Result<Self, Unrunnable> {
        let child = Command::new(program).args(arguments).spawn();
        let mut child = child.map_err(|error| Unrunnable::new(program, error))?;
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

/// How a command ended, in words.
pub fn words(ended: ExitStatus) -> String {
    match (ended.code(), ended.signal()) {
        (Some(code), _) => format!("the command ended with status {code}"),
        (_, Some(signal)) => format!("the command was ended by signal {signal}"),
        _ => "the command ended".to_owned(),
    }
}
