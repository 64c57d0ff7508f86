// SPDX-License-Identifier: GPL-2.0

//! `exitmeter top`: a live view on the whole screen.

use std::{
    io::IsTerminal as _,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use self::{
    app::{Action, App},
    events::{Events, TopEvent},
    feed::{Feed, Next},
    screen::Screen,
    theme::Theme,
};
use crate::{
    output::{Output, TextOptions},
    source,
    why::symbols::Symbols,
};

mod app;
mod ascii;
mod columns;
mod data;
mod details;
mod events;
mod feed;
mod history;
pub mod screen;
mod theme;
mod view;

/// On the host: show live which VMs exit, why, and where their time goes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The first table is of the VMs. Enter opens the reasons and vCPUs of one, and Esc goes back.
? shows all keys. Rates and shares are of the last interval, or with t since the VM began.

Enter on a reason opens its details, as `exitmeter why` shows them: MSR, port, address. Enter
there opens the guest's code that caused its exits, and Tab the exits to user space. Details
are turned on when such a table is first opened, and off when top ends. This needs CAP_PERFMON,
which root has. bound is exact, or the number of exits of a row that may stand among the
others.

Exit status:
  0  the user left with q or Ctrl-C; after another signal, it ends by that signal
  1  there is nothing to show: no module, no right to open, no terminal, or
     a dumb one
  2  the command line was wrong

Examples:
  exitmeter top
  exitmeter top --interval 250 --vm 1234
  exitmeter top --vm 1234 --symbols guest.kallsyms
  exitmeter top --input boot.rec --interval 100")]
pub struct Args {
    /// Milliseconds from one reading to the next; of a recording, the time to advance.
    #[arg(short, long, value_name = "MS", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    interval: u64,
    /// Open with the VM of this process or kvm-PID, or with this name, UUID, id or systemd unit.
    #[arg(long, value_name = "PID|NAME|UUID|ID")]
    vm: Option<String>,
    /// Name code of that VM by the symbols in FILE: the guest's /proc/kallsyms, or its System.map.
    #[arg(long, value_name = "FILE", requires = "vm")]
    symbols: Option<PathBuf>,
    #[command(flatten)]
    asked: source::SourceArgs,
    /// Replay a recording, or show a saved snapshot, instead of the device.
    #[arg(long, value_name = "FILE", default_value = source::DEVICE)]
    input: PathBuf,
}

/// Time from turning details on to the first reading of them.
const SOON: Duration = Duration::from_millis(300);

impl Args {
    /// Show the screen until the user quits.
    ///
    /// # Errors
    ///
    /// Returns an error if there is nothing to show, or no terminal to show it on.
    pub fn run(self, out: &Output) -> anyhow::Result<ExitCode> {
        let mut feed = Feed::open(&self.asked.source.open(&self.input)?)?;
        let interval = Duration::from_millis(self.interval);
        let mut app = App::new(feed.first()?, interval);
        if let Some(vm) = &self.vm {
            app.open(vm)?;
        }
        if let Some(symbols) = &self.symbols {
            app.set_symbols(Symbols::read(symbols)?);
        }
        if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
            anyhow::bail!(
                "standard input and output must be a terminal: use `exitmeter report --interval` \
                 for a log, or `exitmeter record` for a file"
            );
        }
        if std::env::var_os("TERM").is_some_and(|term| term == "dumb") {
            anyhow::bail!(
                "a dumb terminal (TERM) cannot show this: use `exitmeter report --interval`"
            );
        }
        let theme = Theme::new(out.text_options().color);
        let mut screen = Screen::enter()?;
        let events = Events::new()?;
        let ended = show(
            &mut app,
            &mut feed,
            &events,
            &mut screen,
            &theme,
            out.text_options(),
        );
        // Leave the screen before anything is printed.
        drop(screen);
        if let Some(signal) = ended? {
            // The parent process sees an end by this signal, as if it had not been handled.
            signal_hook::low_level::emulate_default_handler(signal)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Show the screen until a key or a signal ends it. Return the signal.
fn show(
    app: &mut App,
    feed: &mut Feed,
    events: &Events,
    screen: &mut Screen,
    theme: &Theme,
    options: TextOptions,
) -> anyhow::Result<Option<i32>> {
    let mut next = Instant::now() + app.interval;
    let mut changed = true;
    loop {
        if changed {
            screen.draw(|frame| {
                view::draw(frame, app, theme);
                if options.ascii {
                    ascii::replace(frame.buffer_mut());
                }
            })?;
        }
        changed = true;
        match events.until(next) {
            Some(TopEvent::Key(key)) => match app.key(key) {
                Action::Stay => {}
                Action::Retime => next = Instant::now() + app.interval,
                Action::TurnOn => match feed.turn_on() {
                    // Read soon, so that the details appear soon.
                    Ok(true) => next = next.min(Instant::now() + SOON),
                    Ok(false) => {}
                    Err(words) => app.details_error = Some(words),
                },
                Action::Suspend => screen.suspend()?,
                Action::Quit => return Ok(None),
            },
            Some(TopEvent::Resized) => {}
            Some(TopEvent::Signal(signal)) => return Ok(Some(signal)),
            Some(TopEvent::Gone) => anyhow::bail!("the terminal is gone"),
            None => {
                changed = !app.paused
                    && match feed.next(app.interval) {
                        Ok(Next::Snapshot(reading)) => app.tick(*reading),
                        Ok(Next::Ended) => app.set_note("the recording ends here"),
                        // The source may come back, as a module does that is loaded again.
                        Err(error) => app.set_note(&error.to_string()),
                    };
                // Skip the readings that are overdue.
                let now = Instant::now();
                while next <= now {
                    next += app.interval;
                }
            }
        }
    }
}
