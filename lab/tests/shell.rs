// SPDX-License-Identifier: GPL-2.0

//! Tests of `cargo lab shell` on a terminal, with a real emulated host: `cargo test -p lab --test shell -- --ignored`.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    process::{Child, Command, ExitStatus},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use lab::{
    programs::{self, Tool},
    setup::{self, SetupOptions},
};
use rustix::termios::{tcgetattr, LocalModes};
use rustix_openpty::openpty;

/// Longest wait for words on the screen, enough for a boot on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A shell on the AMD host, which boots fastest, seen from its terminal.
struct Session {
    lab: Child,
    /// Keyboard of the terminal.
    keys: File,
    /// The programs' end of the terminal.
    terminal: File,
    screen: Receiver<Vec<u8>>,
    /// Text of the screen after the last words that were waited for.
    seen: String,
}

impl Session {
    fn start() -> Self {
        // Make the set-up and the programs first, so that the timeout only covers the boot.
        setup::prepare(&SetupOptions::default()).unwrap();
        programs::build(Tool::WithTop).unwrap();
        let pty = openpty(None, None).unwrap();
        let (keys, terminal) = (File::from(pty.controller), File::from(pty.user));
        let end = || terminal.try_clone().unwrap();
        let lab = Command::new(env!("CARGO_BIN_EXE_lab"))
            .args(["shell", "--host", "amd", "--no-module", "--no-kvm"])
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
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

    /// Wait until these words are on the screen.
    #[track_caller]
    fn wait_for(&mut self, words: &str) {
        let since = Instant::now();
        loop {
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return;
            }
            let left = TIMEOUT.saturating_sub(since.elapsed());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("no {words:?} in {:?}", self.seen),
            }
        }
    }

    fn type_keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Return true if the terminal itself edits and echoes lines, as it does for shells.
    fn edits_lines(&self) -> bool {
        let mode = tcgetattr(&self.terminal).unwrap().local_modes;
        mode.contains(LocalModes::ICANON | LocalModes::ECHO)
    }

    /// Wait until the lab ends, and return its status.
    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        self.wait_for("lab: the host has ended");
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
        // A failed test leaves no host behind, since the host dies with its lab.
        let _ = self.lab.kill();
        let _ = self.lab.wait();
    }
}

/// Boot a host, let its shell compute something, and end the host with these keys.
#[track_caller]
fn session_ended_by(keys: &str) {
    let mut session = Session::start();
    assert!(session.edits_lines());
    session.wait_for("Ctrl-] ends the host");
    session.wait_for("lab:~# ");
    assert!(
        !session.edits_lines(),
        "the host's own terminal does that now"
    );
    session.type_keys("echo $((6 * 7)) is the answer\r");
    session.wait_for("42 is the answer\r\n");
    session.type_keys(keys);
    let status = session.wait();
    assert!(status.success(), "{status}");
    assert!(session.edits_lines(), "the terminal is as it was");
}

#[test]
#[ignore = "boots a host"]
fn a_key_ends_the_host() {
    session_ended_by("\u{1d}");
}

#[test]
#[ignore = "boots a host"]
fn a_shell_that_ends_ends_the_host() {
    session_ended_by("exit\r");
}
