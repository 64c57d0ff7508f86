// SPDX-License-Identifier: GPL-2.0

//! The user's request to end, by a signal. The flag is checked between two steps of the work, so
//! that everything is cleaned up by its owner. A running guest returns at a signal.

use std::{
    io,
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc,
    },
    thread,
    time::{Duration, Instant},
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};

use crate::signals;

/// Interval at which a pause checks for a signal.
const TICK: Duration = Duration::from_millis(50);

/// Error when a signal has come.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("stopped by signal {0}")]
pub struct Stopped(pub u8);

impl Stopped {
    /// Return the exit status for the signal.
    pub fn status(self) -> u8 {
        128 | self.0
    }
}

/// Signal that would end the tool, recorded once [`Stop::begin`] has run.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// Start to record signals instead of ending at once. Ignored signals stay ignored.
    ///
    /// # Errors
    ///
    /// Returns an error if the system does not allow it.
    pub fn begin(&self) -> io::Result<()> {
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            if !signals::is_ignored(signal) {
                // Signal numbers are small.
                flag::register_usize(signal, self.0.clone(), signal as usize)?;
            }
        }
        Ok(())
    }

    /// Return true once a signal has come.
    pub fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Return an error if a signal has come.
    ///
    /// # Errors
    ///
    /// Returns [`Stopped`].
    pub fn check(&self) -> Result<(), Stopped> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Stopped(u8::try_from(signal).unwrap_or(u8::MAX))),
        }
    }

    /// Sleep for `time`, or until a signal comes.
    ///
    /// # Errors
    ///
    /// Returns [`Stopped`].
    pub fn pause(&self, time: Duration) -> Result<(), Stopped> {
        let begun = Instant::now();
        loop {
            self.check()?;
            match time.saturating_sub(begun.elapsed()) {
                Duration::ZERO => return Ok(()),
                left => thread::sleep(left.min(TICK)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signal_gives_exit_status() {
        let stop = Stop::default();
        assert_eq!(stop.check(), Ok(()));
        assert_eq!(stop.pause(Duration::ZERO), Ok(()));
        stop.0.store(SIGINT as usize, Ordering::Relaxed);
        assert!(stop.is_wanted());
        assert_eq!(stop.check().map_err(Stopped::status), Err(130));
        assert_eq!(stop.pause(Duration::MAX), Err(Stopped(2)));
    }
}
