// SPDX-License-Identifier: GPL-2.0

//! Tasks of the host: threads of a case, a busy thread, and a stopped process.

use std::{
    fs, io,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    thread::{self, JoinHandle, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure, Context as _, Result};
use rustix::process::{kill_process, Pid, Signal};
use tiny_guests::pin;

/// Wait for a thread of a case, and return its result. A panic is an error.
pub fn join<T, E: Into<anyhow::Error>>(thread: ScopedJoinHandle<'_, Result<T, E>>) -> Result<T> {
    let result = thread.join().map_err(|_| anyhow!("a thread panicked"))?;
    result.map_err(Into::into)
}

/// A thread that spins on one CPU until it is dropped.
#[derive(Debug)]
pub struct BusyThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl BusyThread {
    /// Start a thread on `cpu`.
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

    /// End the thread, and return an error if it could not be pinned.
    pub fn end(mut self) -> io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(io::Error::other("the busy thread panicked")),
        }
    }
}

impl Drop for BusyThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A stopped process; dropping this lets it continue.
#[derive(Debug)]
pub struct StoppedProcess(Pid);

impl StoppedProcess {
    /// Stop a process, and wait until each of its threads has stopped. A vCPU thread has then left KVM.
    pub fn new(pid: u32) -> Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let stopped = Self(number.context("a process's number")?);
        kill_process(stopped.0, Signal::STOP)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !Self::are_all_stopped(pid)? {
            ensure!(Instant::now() < deadline, "process {pid} does not stop");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(stopped)
    }

    /// Return true if all threads of `pid` are stopped.
    fn are_all_stopped(pid: u32) -> Result<bool> {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            // `PID (NAME) STATE ...`.
            let stat = fs::read_to_string(thread?.path().join("stat"))?;
            let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
            if !state.is_some_and(|state| state.starts_with('T')) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Let the process continue.
    pub fn resume(self) -> Result<()> {
        let resumed = kill_process(self.0, Signal::CONT);
        std::mem::forget(self);
        Ok(resumed?)
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        if let Err(error) = kill_process(self.0, Signal::CONT) {
            eprintln!("Process {} stays stopped: {error}", self.0);
        }
    }
}
