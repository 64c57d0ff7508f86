// SPDX-License-Identifier: GPL-2.0

//! Running hosts.

use std::{
    fs::File,
    io::Read as _,
    path::Path,
    process::{ChildStdout, Command},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use lab_agent::channel::{self, Item, Message};

use super::{
    folder::CONSOLE,
    options::Options,
    record::{Event, Record},
};
use crate::{
    emulator::{bochs, qemu, Boot, Emulator},
    host::Host,
    interrupt,
    outcome::{Outcome, RunError},
    verdict::{RunEnd, Watch},
};

/// Interval at which the console's file is read.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Longest wait for the processes of a killed emulator to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// A host that has been started.
pub(crate) struct Running {
    emulator: Emulator,
    output: ChildStdout,
    started: Instant,
}

impl Running {
    /// Start a host with its console in a file.
    pub(crate) fn start(boot: &Boot<'_>) -> Result<Self, RunError> {
        let console = boot.folder.join(CONSOLE);
        File::create(&console).map_err(RunError::io("write", &console))?;
        let command = command(boot)?;
        let log = boot.folder.join("emulator.log");
        let log = File::create(&log).map_err(RunError::io("write", &log))?;
        let started = Instant::now();
        let program = Path::new(command.get_program()).to_owned();
        let (emulator, output) =
            Emulator::start(command, log).map_err(RunError::io("run", &program))?;
        Ok(Self {
            emulator,
            output,
            started,
        })
    }

    /// Watch the host to its end.
    pub(crate) fn watch(
        mut self,
        options: &Options,
        folder: &Path,
        listener: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, RunError> {
        let interrupts = interrupt::defer();
        let out = options.out.clone().unwrap_or_else(|| folder.join("out"));
        let mut record = Record::new(folder, &out)?;
        let mut watch = Watch::new(options.limits);
        let mut receiver = channel::Receiver::new();
        let port = read(self.output);
        let mut console_read = Instant::now();
        let end = loop {
            let (items, gone) = match port.recv_timeout(POLL_INTERVAL) {
                Ok(bytes) => (receiver.receive(&bytes), false),
                Err(RecvTimeoutError::Timeout) => (Vec::new(), false),
                Err(RecvTimeoutError::Disconnected) => (receiver.finish(), true),
            };
            let now = self.started.elapsed();
            let mut decided = gone;
            for item in items {
                match item {
                    Item::Message(message) => {
                        decided |= matches!(message, Message::Verdict(_) | Message::Failure(_));
                        watch.message(now, &message);
                        record.message(message, listener)?;
                    }
                    Item::Noise(bytes) => record.noise(&bytes)?,
                    Item::Damage(text) => watch.damage(&text),
                }
            }
            if gone {
                let status = self.emulator.wait();
                watch.gone(status.is_ok_and(|status| status.success()));
            }
            if decided || console_read.elapsed() >= POLL_INTERVAL {
                console_read = Instant::now();
                watch.console(now, &record.console()?);
            }
            if interrupts.seen() {
                break RunEnd::Interrupted;
            }
            if let Some(end) = watch.end(now) {
                break end;
            }
        };
        self.emulator.kill();
        // Its output ends with its last process.
        while port.recv_timeout(KILL_TIMEOUT).is_ok() {}
        let tail = record.tail(&end);
        Ok(Outcome {
            end,
            stdout: record.into_stdout(),
            folder: folder.into(),
            out,
            tail,
            time: self.started.elapsed(),
        })
    }
}

/// Return the command that starts the host's emulator.
pub(crate) fn command(boot: &Boot<'_>) -> Result<Command, RunError> {
    match boot.machine.host {
        Host::Intel => bochs::command(boot),
        Host::Amd => qemu::command(boot),
    }
}

/// Read the emulator's output in a thread. The channel closes when the output ends.
fn read(mut output: ChildStdout) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(length @ 1..) = output.read(&mut bytes) {
            if sender.send(bytes[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}
