// SPDX-License-Identifier: GPL-2.0

//! The user's wish to end it. Guests return at a signal, and between two guests the flag is looked
//! at, so that all that was made on the way is taken back by whoever made it.

use std::{
    io,
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc,
    },
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};

use crate::signals;

/// A signal has asked for the end.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("stopped by signal {0}")]
pub struct Stopped(pub u8);

impl Stopped {
    /// The exit status that tells it.
    pub fn status(self) -> u8 {
        128 | self.0
    }
}

/// The signals that would end the tool, noted once that has begun.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicUsize>);

impl Stop {
    /// Begin to note signals, but for those that are ignored: they stay so. Until then they end the
    /// tool at once.
    ///
    /// # Errors
    ///
    /// When the system does not allow it.
    pub fn begin(&self) -> io::Result<()> {
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            if !signals::is_ignored(signal) {
                // These have small numbers.
                flag::register_usize(signal, self.0.clone(), signal as usize)?;
            }
        }
        Ok(())
    }

    /// Return true once a signal has come.
    pub fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Go on, unless a signal has come.
    ///
    /// # Errors
    ///
    /// [`Stopped`].
    pub fn check(&self) -> Result<(), Stopped> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Stopped(u8::try_from(signal).unwrap_or(u8::MAX))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_the_status() {
        let stop = Stop::default();
        assert_eq!(stop.check(), Ok(()));
        stop.0.store(SIGINT as usize, Ordering::Relaxed);
        assert!(stop.is_wanted());
        assert_eq!(stop.check().map_err(Stopped::status), Err(130));
    }
}
