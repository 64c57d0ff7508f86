// SPDX-License-Identifier: GPL-2.0

//! Emulators as processes.

pub mod bochs;
pub mod qemu;

use std::{
    fs::File,
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
};

use crate::{host::Machine, image::Images, setup::Setup};

/// Description of a host for its emulator.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The set-up, with the emulator and its root.
    pub prepared: &'a Setup,
    /// CPU, memory and the like.
    pub machine: &'a Machine,
    /// Kernel and initramfs.
    pub images: &'a Images,
    /// The run's own folder, for the files that the emulator writes.
    pub folder: &'a Path,
    /// Target of the host's console.
    pub console: Console<'a>,
    /// Initial state.
    pub initial_state: InitialState<'a>,
}

/// Initial state of a host.
#[derive(Clone, Copy, Debug)]
pub enum InitialState<'a> {
    /// The host boots.
    Boot,
    /// The host boots, and is saved to this folder when its agent asks for it.
    Save(&'a Path),
    /// The host continues from the machine saved in this folder.
    Saved(&'a Path),
}

/// Target of a host's console.
#[derive(Clone, Copy, Debug)]
pub enum Console<'a> {
    /// A file with this name in the run's folder.
    File(&'a str),
    /// This terminal device.
    Terminal(&'a Path),
}

/// Path under which an emulator sees the run's folder.
const RUN_FOLDER: &str = "/lab/run";

/// A running emulator. Dropping it kills it with all its children.
#[derive(Debug)]
pub struct Emulator {
    process: Child,
}

impl Emulator {
    /// Start an emulator, the command of an [`InRoot`]. Return it with its standard output, which carries the bytes that the
    /// host writes to the port. Its own messages go to `log`. It does not outlive the thread that started it.
    ///
    /// [`InRoot`]: crate::setup::InRoot
    ///
    /// # Errors
    ///
    /// An error of the system if the command cannot be run.
    pub fn start(mut command: Command, log: File) -> io::Result<(Self, ChildStdout)> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            // Keep the terminal's Ctrl-C away: the lab ends the emulator and still has work to do after it.
            .process_group(0);
        let mut process = command.spawn()?;
        let output = process
            .stdout
            .take()
            .ok_or_else(|| io::Error::other("the emulator has no standard output"))?;
        Ok((Self { process }, output))
    }

    /// Wait until the emulator ends by itself.
    ///
    /// # Errors
    ///
    /// Errors of `waitpid`.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.process.wait()
    }

    /// Kill the emulator and wait for its end.
    pub fn kill(&mut self) {
        // This can fail only if it is gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.kill();
    }
}
