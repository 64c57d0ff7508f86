// SPDX-License-Identifier: GPL-2.0

//! Progress of the set-up: for each running step its stage, the size of its result, and the time.
//!
//! On a terminal the lines are redrawn in place. Elsewhere a line is written when a stage begins and every 30 s, so that
//! a log shows that the work continues. The crate indicatif shows nothing in a log, so it would replace only the few lines
//! that redraw.

use std::{
    io::{self, IsTerminal as _, Write},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

const REDRAW: Duration = Duration::from_secs(1);
const REPEAT: Duration = Duration::from_secs(30);

/// Lines of all running steps.
pub struct Progress {
    screen: Mutex<Screen>,
}

struct Screen {
    out: Box<dyn Write + Send>,
    /// Width of the terminal in columns; `None` if the output is not a terminal.
    terminal: Option<usize>,
    lines: Vec<LineState>,
    /// Number of the terminal's lines that show `lines` now.
    drawn: usize,
}

struct LineState {
    name: &'static str,
    stage: String,
    bytes: u64,
    started: Instant,
    shown: Instant,
}

/// Line of one step. Dropping it without [`ProgressLine::finish`] removes the line.
pub struct ProgressLine<'a> {
    progress: &'a Progress,
    name: &'static str,
}

impl Progress {
    /// Create a progress on standard error.
    pub fn stderr() -> Self {
        let stderr = io::stderr();
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let terminal = (stderr.is_terminal() && !dumb).then(|| {
            rustix::termios::tcgetwinsize(&stderr)
                .map_or(80, |size| usize::from(size.ws_col.max(20)))
        });
        Self::new(Box::new(stderr), terminal)
    }

    /// Create a progress on `out`, a terminal with so many columns, or not a terminal.
    pub fn new(out: Box<dyn Write + Send>, terminal: Option<usize>) -> Self {
        Self {
            screen: Mutex::new(Screen {
                out,
                terminal,
                lines: Vec::new(),
                drawn: 0,
            }),
        }
    }

    /// Open the line of a step. No two open lines may have the same name.
    pub fn open_line(&self, name: &'static str) -> ProgressLine<'_> {
        let now = Instant::now();
        self.with(|screen| {
            screen.lines.push(LineState {
                name,
                stage: String::from("starting"),
                bytes: 0,
                started: now,
                shown: now,
            });
        });
        ProgressLine {
            progress: self,
            name,
        }
    }

    /// Write lines that stay.
    pub fn note(&self, text: &str) {
        self.with(|screen| screen.write(text));
    }

    fn with(&self, change: impl FnOnce(&mut Screen)) {
        change(&mut self.screen.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl ProgressLine<'_> {
    /// Show that the step entered another stage. Its result has so many bytes now.
    pub fn stage(&self, stage: &str, bytes: u64) {
        self.change(|screen, index| {
            let line = &mut screen.lines[index];
            if line.stage != stage {
                stage.clone_into(&mut line.stage);
                line.bytes = bytes;
                screen.show(index);
            }
        });
    }

    /// Show the line again if it is due. The step's result has so many bytes now.
    pub fn tick(&self, bytes: u64) {
        self.change(|screen, index| {
            let due = if screen.terminal.is_some() {
                REDRAW
            } else {
                REPEAT
            };
            let line = &mut screen.lines[index];
            line.bytes = bytes;
            if line.shown.elapsed() >= due {
                screen.show(index);
            }
        });
    }

    /// Mark the step as done. Its line stays.
    pub fn finish(self, bytes: u64) {
        self.change(|screen, index| {
            let mut line = screen.lines.remove(index);
            line.stage = String::from("ready");
            line.bytes = bytes;
            screen.write(&line.text());
        });
    }

    fn change(&self, change: impl FnOnce(&mut Screen, usize)) {
        self.progress.with(|screen| {
            if let Some(index) = screen.lines.iter().position(|line| line.name == self.name) {
                change(screen, index);
            }
        });
    }
}

impl Drop for ProgressLine<'_> {
    fn drop(&mut self) {
        self.change(|screen, index| {
            screen.lines.remove(index);
            screen.draw("");
        });
    }
}

impl Screen {
    /// Show a step's line again.
    fn show(&mut self, index: usize) {
        self.lines[index].shown = Instant::now();
        if self.terminal.is_some() {
            self.draw("");
        } else {
            let line = self.lines[index].text();
            self.write(&line);
        }
    }

    /// Write lines that stay, above those that are redrawn.
    fn write(&mut self, text: &str) {
        self.draw(&format!("{}\n", text.trim_end()));
    }

    /// Redraw the lines of a terminal, with `above` before them. Errors are ignored, as they must not stop the work.
    fn draw(&mut self, above: &str) {
        let mut text = String::new();
        if self.drawn > 0 {
            text.push_str(&format!("\x1b[{}A\x1b[J", self.drawn));
        }
        text.push_str(above);
        if let Some(columns) = self.terminal {
            for line in &self.lines {
                // A line that wraps could not be removed again.
                text.extend(line.text().chars().take(columns - 1));
                text.push('\n');
            }
            self.drawn = self.lines.len();
        }
        let _ = self
            .out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush());
    }
}

impl LineState {
    fn text(&self) -> String {
        format!(
            "{:<6} {:<50}{:>6} MiB {:>5} s",
            self.name,
            self.stage,
            self.bytes >> 20,
            self.started.elapsed().as_secs()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{mpsc, Arc};

    use super::*;

    struct Pipe(mpsc::Sender<u8>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            for &byte in bytes {
                self.0.send(byte).map_err(io::Error::other)?;
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Return the output of `work` on a terminal with so many columns, or on a file.
    fn written(terminal: Option<usize>, work: impl FnOnce(&Progress)) -> String {
        let (sender, bytes) = mpsc::channel();
        let progress = Progress::new(Box::new(Pipe(sender)), terminal);
        work(&progress);
        drop(progress);
        String::from_utf8(bytes.iter().collect()).unwrap()
    }

    #[test]
    fn a_log_gets_one_line_for_each_stage() {
        let text = written(None, |progress| {
            let line = progress.open_line("root");
            line.stage("fetching", 5 << 20);
            line.tick(6 << 20);
            line.stage("fetching", 6 << 20);
            line.stage("unpacking", 7 << 20);
            line.finish(8 << 20);
        });
        let words: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            words,
            [
                ["root", "fetching", "5", "MiB", "0", "s"],
                ["root", "unpacking", "7", "MiB", "0", "s"],
                ["root", "ready", "8", "MiB", "0", "s"],
            ]
        );
    }

    #[test]
    fn a_terminal_is_redrawn_in_place_and_no_line_wraps() {
        let text = written(Some(40), |progress| {
            let tree = progress.open_line("tree");
            tree.stage(&"long ".repeat(20), 0);
            let bochs = progress.open_line("bochs");
            bochs.stage("compiling", 0);
            tree.finish(0);
            drop(bochs);
        });
        assert!(
            text.contains("\x1b[2A\x1b[Jtree   ready"),
            "the line that stays replaces the two lines: {text:?}"
        );
        assert!(
            text.ends_with("\x1b[1A\x1b[J"),
            "a step that was given up leaves no line: {text:?}"
        );
        let longest = text
            .lines()
            .filter(|line| line.contains("long"))
            .map(|line| line.trim_start_matches("\x1b[1A\x1b[J").len());
        assert_eq!(longest.max(), Some(39));
    }

    #[test]
    fn notes_are_written_above_the_lines() {
        let text = written(Some(80), |progress| {
            let line = progress.open_line("root");
            line.stage("fetching", 0);
            progress.note("a word");
            drop(line);
        });
        assert!(text.contains("\x1b[1A\x1b[Ja word\nroot   fetching"));
    }

    #[test]
    fn a_closed_output_does_not_stop_the_work() {
        let (sender, bytes) = mpsc::channel();
        drop(bytes);
        let progress = Arc::new(Progress::new(Box::new(Pipe(sender)), None));
        let line = progress.open_line("root");
        line.stage("fetching", 0);
        line.finish(0);
    }
}
