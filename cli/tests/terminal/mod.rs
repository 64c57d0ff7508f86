// SPDX-License-Identifier: GPL-2.0

//! A terminal for a command: a pseudo-terminal, and a terminal emulator that reads what the
//! command writes to it. Crates that drive a terminal (expectrl) match a stream of text and keep no
//! screen.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    process::{ioctl_tiocsctty, kill_process, setsid, Pid, Signal},
    termios::{tcgetattr, tcsetwinsize, Termios, Winsize},
};
use rustix_openpty::openpty;

/// Text on the screen before the command starts.
const BEFORE: &str = "$ exitmeter top";
/// Time limit, longer than anything takes even on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A command on a terminal of its own. It is killed when this is dropped.
pub struct Terminal {
    master: File,
    slave: File,
    child: Child,
    ended: Option<ExitStatus>,
    settings: Termios,
    emulator: Arc<Mutex<Emulator>>,
}

struct Emulator {
    parser: vt100::Parser,
    /// True if the alternate screen was ever used.
    other: bool,
    /// Time of the last output.
    heard: Instant,
}

impl Terminal {
    /// Start a command on a terminal of this size.
    pub fn new(columns: u16, rows: u16, mut command: Command) -> Self {
        let pty = openpty(None, Some(&size(columns, rows))).unwrap();
        let (master, slave) = (File::from(pty.controller), File::from(pty.user));
        let settings = tcgetattr(&slave).unwrap();
        (&slave)
            .write_all(format!("{BEFORE}\n").as_bytes())
            .unwrap();

        let end = || slave.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: Both are system calls, which a child may make between fork and exec.
        unsafe {
            command.pre_exec(|| {
                setsid()?;
                ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let emulator = Arc::new(Mutex::new(Emulator {
            parser: vt100::Parser::new(rows, columns, 0),
            other: false,
            heard: Instant::now(),
        }));
        let (mut from, to) = (master.try_clone().unwrap(), Arc::clone(&emulator));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                let mut to = to.lock().unwrap();
                // Go byte by byte, to miss no state in between.
                for byte in &bytes[..count] {
                    to.parser.process(&[*byte]);
                    to.other |= to.parser.screen().alternate_screen();
                }
                to.heard = Instant::now();
            }
        });
        Self {
            master,
            slave,
            child,
            ended: None,
            settings,
            emulator,
        }
    }

    /// Return the lines of the screen, without the blanks at their ends.
    pub fn text(&self) -> String {
        let emulator = self.emulator.lock().unwrap();
        let screen = emulator.parser.screen();
        let lines = screen.rows(0, screen.size().1);
        lines
            .map(|line| line.trim_end().to_owned() + "\n")
            .collect()
    }

    /// Wait until a condition holds. A failure shows the screen.
    pub fn wait(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !so(self) {
            let text = self.text();
            assert!(begun.elapsed() < TIMEOUT, "{what} does not come:\n{text}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Wait until a text is on the screen.
    pub fn wait_for(&mut self, text: &str) {
        self.wait(text, |terminal| terminal.text().contains(text));
    }

    /// Wait until there is no output for some readings.
    pub fn settle(&mut self) {
        thread::sleep(Duration::from_millis(150));
        self.wait("silence", |terminal| {
            let heard = terminal.emulator.lock().unwrap().heard;
            heard.elapsed() > Duration::from_millis(100)
        });
    }

    /// Return the line that is shown as selected.
    pub fn selected(&self) -> String {
        let emulator = self.emulator.lock().unwrap();
        let screen = emulator.parser.screen();
        let (rows, columns) = screen.size();
        let inverse = |row| screen.cell(row, 0).is_some_and(vt100::Cell::inverse);
        let row = (0..rows).find(|row| inverse(*row));
        let line = row.and_then(|row| screen.rows(0, columns).nth(row.into()));
        line.unwrap_or_default()
    }

    /// Wait until the line with this beginning is selected, and return it.
    pub fn wait_selected(&mut self, text: &str) -> String {
        self.wait(text, |terminal| terminal.selected().starts_with(text));
        self.selected()
    }

    /// Type keys.
    pub fn keys(&mut self, keys: &str) {
        // Pause between keys: Esc and a letter at once would be Alt and the letter.
        for key in keys.chars() {
            self.master.write_all(key.to_string().as_bytes()).unwrap();
            thread::sleep(Duration::from_millis(40));
        }
    }

    /// Change the size.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.emulator.lock().unwrap().parser.set_size(rows, columns);
        tcsetwinsize(&self.slave, size(columns, rows)).unwrap();
    }

    /// Send the command a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Wait until the command has ended, and return its status.
    pub fn end(&mut self) -> ExitStatus {
        self.wait("its end", |terminal| {
            terminal.ended = terminal.child.try_wait().unwrap();
            terminal.ended.is_some()
        });
        self.settle();
        self.ended.unwrap()
    }

    /// Wait until the command is stopped.
    pub fn wait_stopped(&mut self) {
        let file = format!("/proc/{}/stat", self.child.id());
        self.wait("its stop", |_| {
            let stat = std::fs::read_to_string(&file).unwrap();
            stat.contains(") T ")
        });
        self.settle();
    }

    /// Return true if the alternate screen is shown.
    pub fn is_alternate_screen(&self) -> bool {
        self.emulator
            .lock()
            .unwrap()
            .parser
            .screen()
            .alternate_screen()
    }

    /// Return true if the alternate screen was ever shown.
    pub fn was_on_alternate_screen(&self) -> bool {
        self.emulator.lock().unwrap().other
    }

    /// Return true if anything has a colour.
    pub fn has_colors(&self) -> bool {
        let emulator = self.emulator.lock().unwrap();
        let screen = emulator.parser.screen();
        let (rows, columns) = screen.size();
        let is_colored = |cell: &vt100::Cell| {
            let plain = vt100::Color::Default;
            cell.fgcolor() != plain || cell.bgcolor() != plain
        };
        (0..rows)
            .any(|row| (0..columns).any(|column| screen.cell(row, column).is_some_and(is_colored)))
    }

    /// Assert that the terminal is restored, with its old text and nothing new but a word.
    pub fn assert_restored(&self, word: &str) {
        let now = tcgetattr(&self.slave).unwrap();
        let settings = |it: &Termios| {
            (
                it.input_modes,
                it.output_modes,
                it.control_modes,
                it.local_modes,
            )
        };
        assert_eq!(settings(&now), settings(&self.settings));
        let text = self.text();
        let (first, rest) = text.split_once('\n').unwrap();
        assert_eq!(first, BEFORE);
        assert_eq!(word.is_empty(), rest.trim().is_empty(), "{rest}");
        assert!(rest.contains(word), "{rest}");
        let emulator = self.emulator.lock().unwrap();
        let screen = emulator.parser.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor());
        assert!(!screen.application_keypad() && !screen.bracketed_paste());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // The command may have ended by itself.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
