// SPDX-License-Identifier: GPL-2.0

//! `cargo lab shell` on a terminal, with a real emulated host: `cargo test -p lab --test shell -- --ignored`.

#![expect(clippy::unwrap_used, reason = "this is how a test fails")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use lab::programs::{self, Tool};
use lab::setup::{self, Wanted};
use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
use rustix::termios::{tcgetattr, LocalModes};

/// What a host may take to boot on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A shell on the AMD host, which boots fastest, as somebody has it who sits at a terminal.
struct Session {
    lab: Child,
    /// Where the keyboard is.
    keys: File,
    /// The side of the programs.
    terminal: File,
    screen: Receiver<Vec<u8>>,
    /// What was on the screen so far, and nobody waited for yet.
    seen: String,
}

impl Session {
    fn start() -> Self {
        // What has to be made first takes its own time.
        setup::prepare(&Wanted::default()).unwrap();
        programs::build(Tool::ForPeople).unwrap();
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        let path = ptsname(&keys, Vec::new()).unwrap();
        let path = OsStr::from_bytes(path.to_bytes());
        let terminal = File::options().read(true).write(true).open(path).unwrap();
        let end = || terminal.try_clone().unwrap();
        let lab = Command::new(env!("CARGO_BIN_EXE_lab"))
            .args(["shell", "--host", "amd", "--no-module", "--no-kvm"])
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let keys = File::from(keys);
        let mut screen_side = keys.try_clone().unwrap();
        let (sender, screen) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = screen_side.read(&mut bytes) {
                if sender.send(bytes[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            lab,
            keys,
            terminal,
            screen,
            seen: String::new(),
        }
    }

    /// Waits until these words are on the screen.
    #[track_caller]
    fn shows(&mut self, words: &str) {
        let since = Instant::now();
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return;
            }
            let left = PATIENCE.saturating_sub(since.elapsed());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("no {words:?} in {:?}", self.seen),
            }
        }
    }

    fn types(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Whether the terminal itself edits lines and echoes them, as shells want it.
    fn edits(&self) -> bool {
        let mode = tcgetattr(&self.terminal).unwrap().local_modes;
        mode.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    #[track_caller]
    fn ends(&mut self) -> ExitStatus {
        self.shows("lab: the host has ended");
        let since = Instant::now();
        loop {
            if let Some(status) = self.lab.try_wait().unwrap() {
                return status;
            }
            assert!(since.elapsed() < Duration::from_secs(5), "the lab lives on");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A test that failed leaves no host behind; it goes with its lab.
        let _ = self.lab.kill();
        let _ = self.lab.wait();
    }
}

/// Boots a host, has its shell work something out, and ends it by these keys.
#[track_caller]
fn session(last: &str) {
    let mut session = Session::start();
    assert!(session.edits());
    session.shows("Ctrl-] ends the host");
    session.shows("lab:~# ");
    assert!(!session.edits(), "the host's own terminal does that now");
    session.types("echo $((6 * 7)) is the answer\r");
    session.shows("42 is the answer\r\n");
    session.types(last);
    let status = session.ends();
    assert!(status.success(), "{status}");
    assert!(session.edits(), "the terminal is as it was");
}

#[test]
#[ignore = "boots a host"]
fn a_key_ends_the_host() {
    session("\u{1d}");
}

#[test]
#[ignore = "boots a host"]
fn a_shell_that_ends_ends_the_host() {
    session("exit\r");
}
