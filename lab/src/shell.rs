// SPDX-License-Identifier: GPL-2.0

//! `cargo lab shell` shows a host's console on this terminal.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    thread,
};

use lab_agent::{
    channel::{Item, Message, Receiver},
    settings::{Settings, Task},
};
use rustix::{
    event::{poll, PollFd, PollFlags, Timespec},
    pty::ptsname,
    termios::{tcgetattr, tcsetattr, OptionalActions, Termios},
};
use rustix_openpty::openpty;

use crate::{
    emulator::{Boot, Console, Emulator, InitialState},
    image::{payload, Images},
    interrupt,
    outcome::RunError,
    programs::{self, Tool},
    run::{self, folder, Options},
    setup::Setup,
};

/// Key that ends the host: Ctrl-].
const ESCAPE: u8 = 0x1d;

/// Interval at which to check whether a signal came.
const POLL_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// Boot a host and show its console on this terminal, until the shell or the host ends or Ctrl-] is typed.
///
/// # Errors
///
/// [`RunError`] if the host could not boot or could not start its shell.
pub fn shell(options: &Options) -> Result<(), RunError> {
    let start = |_: &Setup, _: &dyn Fn(&str)| Ok(programs::build(Tool::WithTop)?);
    let (prepared, module, programs) = run::prepare(options, start)?;
    let folder = folder::make(options.machine.host)?;
    let payload = folder.join("payload");
    let files = run::files(options, module, &programs);
    let settings = Settings {
        kvm: options.kvm_module(),
        task: Task::Shell,
    };
    payload::write(&payload, Some(&programs.agent), &files, &settings)?;
    let terminal = PathBuf::from("/dev/ptmx");
    let (line, device) = pair().map_err(RunError::io("open", &terminal))?;
    let boot = Boot {
        prepared: &prepared,
        machine: &options.machine,
        images: &Images::new(&prepared, &payload)?,
        folder: &folder,
        console: Console::Terminal(&device.path),
        initial_state: InitialState::Boot,
    };
    let command = run::command(&boot)?;
    let log = folder.join("emulator.log");
    let log = File::create(&log).map_err(RunError::io("write", &log))?;
    let program = PathBuf::from(command.get_program());

    let interrupts = interrupt::defer();
    let (mut emulator, mut output) =
        Emulator::start(command, log).map_err(RunError::io("run", &program))?;
    // The port has to be read, or the host waits. Only a failure is of interest here.
    let port = thread::spawn(move || {
        let (mut receiver, mut bytes) = (Receiver::new(), vec![0; 1 << 16]);
        let mut failure = None;
        while let Ok(length @ 1..) = output.read(&mut bytes) {
            for item in receiver.receive(&bytes[..length]) {
                if let Item::Message(Message::Failure(text)) = item {
                    failure = Some(text);
                }
            }
        }
        failure
    });
    eprintln!("lab: booting; Ctrl-] ends the host");
    let talked = {
        let _raw = Raw::stdin();
        talk(&line, || port.is_finished() || interrupts.seen())
    };
    emulator.kill();
    let failure = port.join().unwrap_or_default();
    eprintln!("\nlab: the host has ended");
    folder::tidy(&folder);
    let _ = fs::remove_dir(folder.join("out"));
    talked.map_err(RunError::io("use", &device.path))?;
    match failure {
        Some(text) => Err(RunError::Machine(format!(
            "the host could not start: {text}"
        ))),
        None => Ok(()),
    }
}

/// Terminal device for the emulator.
struct Device {
    path: PathBuf,
    /// Held so that the lab's end does not read end-of-file before the emulator has opened the device.
    _open: File,
}

/// Open a pseudoterminal. Return the lab's end, and the device.
fn pair() -> io::Result<(File, Device)> {
    let pty = openpty(None, None)?;
    let path = ptsname(&pty.controller, Vec::new())?;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(path.to_bytes()));
    let mut mode = tcgetattr(&pty.user)?;
    mode.make_raw();
    tcsetattr(&pty.user, OptionalActions::Now, &mode)?;
    let open = File::from(pty.user);
    Ok((File::from(pty.controller), Device { path, _open: open }))
}

/// Copy bytes between standard input and output and the line, until `ended` returns true or the escape is typed.
fn talk(mut line: &File, ended: impl Fn() -> bool) -> io::Result<()> {
    let (stdin, mut stdout) = (io::stdin(), io::stdout());
    let mut input_open = true;
    let mut bytes = [0; 4096];
    while !ended() {
        let (from_line, from_input) = {
            let mut sources = vec![PollFd::new(&line, PollFlags::IN)];
            if input_open {
                sources.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut sources, Some(&POLL_INTERVAL)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready = |source: Option<&PollFd<'_>>| {
                source.is_some_and(|source| !source.revents().is_empty())
            };
            (ready(sources.first()), ready(sources.get(1)))
        };
        if from_line {
            let length = line.read(&mut bytes)?;
            stdout.write_all(&bytes[..length])?;
            stdout.flush()?;
        }
        if from_input {
            let length = rustix::io::read(&stdin, &mut bytes)?;
            if bytes[..length].contains(&ESCAPE) {
                return Ok(());
            }
            input_open = length > 0;
            line.write_all(&bytes[..length])?;
        }
    }
    Ok(())
}

/// Guard that keeps the terminal of standard input in raw mode. It does nothing if standard input is not a terminal.
struct Raw(Option<Termios>);

impl Raw {
    fn stdin() -> Self {
        let before = tcgetattr(io::stdin()).ok();
        if let Some(before) = &before {
            let mut mode = before.clone();
            mode.make_raw();
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &mode);
        }
        Self(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
