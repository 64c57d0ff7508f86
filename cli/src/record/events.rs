// SPDX-License-Identifier: GPL-2.0

//! What a recording waits for.

use std::{
    io,
    process::ExitStatus,
    sync::mpsc::{channel, Receiver, Sender},
    time::Instant,
};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::child::Child;
use crate::{command::FAILED, signals};

/// Something has happened.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A signal has come.
    Signal(i32),
    /// The command has ended.
    Ended(ExitStatus),
}

/// Gives events as they come.
#[derive(Debug)]
pub struct Events {
    events: Receiver<Event>,
}

impl Events {
    /// Takes the signals that would end this process (after nohup(1), SIGHUP would not), and
    /// whatever else is sent.
    pub fn new() -> io::Result<(Self, Sender<Event>)> {
        let (sender, events) = channel();
        signals::send(&[SIGHUP, SIGINT, SIGTERM], sender.clone(), Event::Signal)?;
        Ok((Self { events }, sender))
    }

    /// The next event; `None` when there is none up to a moment.
    pub fn until(&self, moment: Instant) -> Option<Event> {
        let left = moment.saturating_duration_since(Instant::now());
        self.events.recv_timeout(left).ok()
    }

    /// Tells of a failure of what runs beside a command, waits until the command has ended, and
    /// returns the status to exit with. What a command does is more than its watching: it runs on.
    pub fn outlast(&self, child: &Child, error: &anyhow::Error) -> u8 {
        eprintln!("exitmeter: {error:#}");
        while let Ok(Event::Signal(signal)) = self.events.recv() {
            child.pass_on(signal);
        }
        FAILED
    }
}
