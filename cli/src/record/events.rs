// SPDX-License-Identifier: GPL-2.0

//! Events that a measuring command waits for.

use std::{
    io,
    process::ExitStatus,
    sync::mpsc::{channel, Receiver, Sender},
    time::Instant,
};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::signals;

/// Event that ends a wait.
#[derive(Clone, Copy, Debug)]
pub enum RecordEvent {
    /// A signal has come.
    Signal(i32),
    /// The command has ended.
    Ended(ExitStatus),
}

/// Receiver of events.
#[derive(Debug)]
pub struct Events {
    events: Receiver<RecordEvent>,
}

impl Events {
    /// Turn the signals that would end this process into events (but not a SIGHUP that nohup(1) has
    /// set to ignored). The sender adds further events.
    pub fn new() -> io::Result<(Self, Sender<RecordEvent>)> {
        let (sender, events) = channel();
        signals::send(
            &[SIGHUP, SIGINT, SIGTERM],
            sender.clone(),
            RecordEvent::Signal,
        )?;
        Ok((Self { events }, sender))
    }

    /// Return the next event, or `None` if none comes before `moment`.
    pub fn until(&self, moment: Instant) -> Option<RecordEvent> {
        let left = moment.saturating_duration_since(Instant::now());
        self.events.recv_timeout(left).ok()
    }

    /// Wait for the next event.
    pub fn wait(&self) -> Option<RecordEvent> {
        self.events.recv().ok()
    }
}
