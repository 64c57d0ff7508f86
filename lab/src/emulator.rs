// SPDX-License-Identifier: GPL-2.0

//! The emulators, as processes.

pub mod bochs;
pub mod qemu;

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use rustix::process::{set_parent_process_death_signal, setpgid, Signal};

use crate::host::Machine;
use crate::image::Images;
use crate::setup::Prepared;

/// What an emulator boots.
#[derive(Debug)]
pub struct Boot<'a> {
    /// Where the emulator and its root are.
    pub prepared: &'a Prepared,
    /// What the host looks like.
    pub machine: &'a Machine,
    /// Kernel and initramfs.
    pub images: &'a Images,
    /// The run's own folder: what the emulator writes goes there.
    pub folder: &'a Path,
    /// Where the host's console goes.
    pub console: Console<'a>,
    /// How it begins.
    pub begin: Begin<'a>,
}

/// How a host begins, and ends.
#[derive(Clone, Copy, Debug)]
pub enum Begin<'a> {
    /// It boots.
    Boot,
    /// It boots, and is saved to this folder when its agent asks for it.
    Save(&'a Path),
    /// It goes on from what was saved in this folder.
    Saved(&'a Path),
}

/// Where a host's console goes.
#[derive(Clone, Copy, Debug)]
pub enum Console<'a> {
    /// To a file of this name in the run's folder.
    File(&'a str),
    /// To this terminal device.
    Terminal(&'a Path),
}

/// Where an emulator sees the run's folder.
const FOLDER: &str = "/lab/run";

/// A running emulator. Dropped, it is killed with all it started.
#[derive(Debug)]
pub struct Emulator {
    process: Child,
}

impl Emulator {
    /// Starts an emulator; its standard output, which is what the host writes to the port, is given back.
    /// What it says for itself goes to `log`. It does not outlive the thread that started it.
    ///
    /// # Errors
    ///
    /// When the command cannot be run.
    pub fn start(mut command: Command, log: File) -> io::Result<(Self, ChildStdout)> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        // SAFETY: only calls that are allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // Not to get the terminal's Ctrl-C: the lab ends it, and after it the lab still has things to do.
                setpgid(None, None)?;
                // Should the lab be killed, the emulator goes too.
                set_parent_process_death_signal(Some(Signal::KILL))?;
                Ok(())
            });
        }
        let mut process = command.spawn()?;
        let output = process
            .stdout
            .take()
            .ok_or_else(|| io::Error::other("the emulator has no standard output"))?;
        Ok((Self { process }, output))
    }

    /// Waits until the emulator ends by itself.
    ///
    /// # Errors
    ///
    /// Those of `waitpid`.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.process.wait()
    }

    /// Ends the emulator, however it is.
    pub fn kill(&mut self) {
        // It can fail only when it is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.kill();
    }
}
