// SPDX-License-Identifier: GPL-2.0

//! Entering and leaving the terminal's alternate screen.

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

/// The alternate screen, until it is dropped.
#[derive(Debug)]
pub struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    /// Enter the alternate screen. Any orderly end of this process leaves it, a panic included: a
    /// terminal left in this mode would not show what the user types.
    pub fn enter() -> anyhow::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = panic::take_hook();
            // The release build aborts at a panic, so nothing would be dropped.
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
        ENTERED.store(true, Ordering::Relaxed);
        enable_raw_mode()?;
        let mut stdout = io::stdout();
        execute!(stdout, EnterAlternateScreen)?;
        Terminal::new(CrosstermBackend::new(stdout))
    }

    /// Draw the screen. Only changes are sent.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> anyhow::Result<()> {
        let drawn = self.terminal.draw(draw);
        drawn.context("cannot write to the terminal").map(|_| ())
    }

    /// Leave the screen, stop this process as Ctrl-Z does, and enter again when it continues.
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

/// True while the alternate screen is entered.
static ENTERED: AtomicBool = AtomicBool::new(false);

/// Restore the terminal. Ignore errors: they have no remedy, and must not hide why the process
/// ends.
fn leave() {
    // Leave once only: a second time would put the cursor over later output, such as the message of
    // a panic.
    if !ENTERED.swap(false, Ordering::Relaxed) {
        return;
    }
    let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    let _ = disable_raw_mode();
}
