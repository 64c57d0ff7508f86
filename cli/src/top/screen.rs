// SPDX-License-Identifier: GPL-2.0

//! The terminal's other screen, and the way back from it.

use std::{
    io::{self, Stdout},
    panic,
    sync::{
        atomic::{AtomicBool, Ordering},
        Once,
    },
};

use anyhow::Context as _;
use ratatui::{
    backend::CrosstermBackend,
    crossterm::{
        cursor::Show,
        execute,
        terminal::{disable_raw_mode, enable_raw_mode, EnterAlternateScreen, LeaveAlternateScreen},
    },
    Frame, Terminal,
};
use signal_hook::consts::SIGTSTP;

/// The other screen, until it is dropped.
#[derive(Debug)]
pub struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    /// Goes there. Whatever ends this process in an orderly way, a panic included, leads back:
    /// without it, what was typed later would not be seen.
    pub fn enter() -> anyhow::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = panic::take_hook();
            // As the release build ends at a panic, nothing would be dropped.
            panic::set_hook(Box::new(move |info| {
                leave();
                before(info);
            }));
        });
        let terminal = Self::open().inspect_err(|_| leave());
        Ok(Self {
            terminal: terminal.context("cannot use the terminal")?,
        })
    }

    fn open() -> io::Result<Terminal<CrosstermBackend<Stdout>>> {
        AWAY.store(true, Ordering::Relaxed);
        enable_raw_mode()?;
        let mut stdout = io::stdout();
        execute!(stdout, EnterAlternateScreen)?;
        Terminal::new(CrosstermBackend::new(stdout))
    }

    /// Draws all anew; what has not changed is not sent.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> anyhow::Result<()> {
        let drawn = self.terminal.draw(draw);
        drawn.context("cannot write to the terminal").map(|_| ())
    }

    /// Goes back, stops this process as Ctrl-Z does, and comes here again when it goes on.
    pub fn suspend(&mut self) -> anyhow::Result<()> {
        leave();
        signal_hook::low_level::emulate_default_handler(SIGTSTP)?;
        self.terminal = Self::open().context("cannot use the terminal")?;
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

/// Whether there is a way back to go.
static AWAY: AtomicBool = AtomicBool::new(false);

/// Leaves the terminal as it was. What fails here has no remedy, and must not hide why it ends.
fn leave() {
    // Once: a second time would put the cursor over what was printed since, such as the words
    // of a panic.
    if !AWAY.swap(false, Ordering::Relaxed) {
        return;
    }
    let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    let _ = disable_raw_mode();
}
