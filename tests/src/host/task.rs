//! A busy task of the host.

use std::{
    io,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    thread::{self, JoinHandle},
};

use tiny_guests::pin;

/// A thread that does nothing but compute, on one CPU, until it is dropped.
#[derive(Debug)]
pub struct Busy {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Busy {
    /// Starts it.
    pub fn on(cpu: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            pin(cpu)?;
            while !seen.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            Ok(())
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it; says whether it could begin at all.
    pub fn end(mut self) -> io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(io::Error::other("the busy thread panicked")),
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
