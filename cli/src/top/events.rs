// SPDX-License-Identifier: GPL-2.0

//! Events that the screen waits for: keys, signals, time.

use std::{
    io,
    sync::mpsc::{channel, Receiver},
    thread,
    time::Instant,
};

use ratatui::crossterm::event::{self, KeyEvent, KeyEventKind};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::signals;

/// Event that ends a wait.
#[derive(Clone, Copy, Debug)]
pub enum TopEvent {
    /// A key was pressed.
    Key(KeyEvent),
    /// The terminal has another size.
    Resized,
    /// A signal has come.
    Signal(i32),
    /// No more keys can come.
    Gone,
}

/// Receiver of events.
#[derive(Debug)]
pub struct Events {
    events: Receiver<TopEvent>,
}

impl Events {
    /// Turn the keys, and the signals that would end this process, into events.
    pub fn new() -> io::Result<Self> {
        let (to, events) = channel();
        let ending = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];
        signals::send(&ending, to.clone(), TopEvent::Signal)?;
        thread::spawn(move || loop {
            let event = match event::read() {
                Ok(event::Event::Key(key)) if key.kind != KeyEventKind::Release => {
                    TopEvent::Key(key)
                }
                Ok(event::Event::Resize(..)) => TopEvent::Resized,
                Ok(_) => continue,
                Err(_) => TopEvent::Gone,
            };
            if to.send(event).is_err() || matches!(event, TopEvent::Gone) {
                break;
            }
        });
        Ok(Self { events })
    }

    /// Return the next event, or `None` if none comes before `moment`.
    pub fn until(&self, moment: Instant) -> Option<TopEvent> {
        let left = moment.saturating_duration_since(Instant::now());
        self.events.recv_timeout(left).ok()
    }
}
