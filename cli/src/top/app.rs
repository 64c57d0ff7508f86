// SPDX-License-Identifier: GPL-2.0

//! What is shown, and what keys change of it.

use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{
    columns::{self, Id, Sheet},
    data::{Numbers, Scope},
    history::History,
};
use crate::{
    model::{delta::ANEW, Report},
    report::is_called,
};

/// Intervals that + and - go through, in milliseconds.
const INTERVALS: [u64; 10] = [50, 100, 250, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000];

/// Which table is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tab {
    /// The VMs, or the vCPUs of one.
    Parts,
    /// The reasons.
    Reasons,
}

/// What is to be done after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing but to draw anew.
    Stay,
    /// The interval has changed.
    Retime,
    /// To stop, as Ctrl-Z does.
    Suspend,
    /// To leave.
    Quit,
}

/// There is no such VM.
#[derive(Debug, thiserror::Error)]
#[error("no VM runs that is called '{0}' or belongs to process '{0}': see `exitmeter report`")]
pub struct NoVm(String);

/// The state of the screen.
#[derive(Debug)]
pub struct App {
    /// The latest snapshot.
    now: Report,
    /// What happened since the one before it.
    delta: Option<Report>,
    /// The latest rates.
    pub history: History,
    /// From one reading to the next.
    pub interval: Duration,
    /// Whether readings are put off.
    pub paused: bool,
    /// Something that the user should know.
    pub note: String,
    /// Whose numbers.
    pub scope: Scope,
    /// Which table of them.
    pub tab: Tab,
    /// Whether the numbers are since the beginning, and not of the last interval.
    pub totals: bool,
    /// Whether the keys are shown.
    pub help: bool,
    /// Only lines with this in their names are shown.
    pub filter: String,
    /// Whether it is being typed.
    pub typing: bool,
    /// By which column each table is sorted: that of the VMs, of the vCPUs, of the reasons.
    sorts: [usize; 3],
    /// The line that is selected, and where it was.
    selected: (Option<Id>, usize),
    /// How many lines fit on a page.
    pub page: usize,
}

impl App {
    /// With a first snapshot, which has the numbers since the beginning.
    pub fn new(now: Report, interval: Duration) -> Self {
        Self {
            now,
            delta: None,
            history: History::default(),
            interval,
            paused: false,
            note: String::new(),
            scope: Scope::All,
            tab: Tab::Parts,
            totals: false,
            help: false,
            filter: String::new(),
            typing: false,
            sorts: [0; 3],
            selected: (None, 0),
            page: 1,
        }
    }

    /// Goes to a VM by its name or process.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn open(&mut self, vm: &str) -> Result<(), NoVm> {
        let mut vms = self.now.vms.iter();
        let found = vms.find(|one| is_called(&one.name, one.pid, vm));
        let number = found.ok_or_else(|| NoVm(vm.to_owned()))?.vm;
        self.go(Scope::Vm(number));
        Ok(())
    }

    /// Takes the next snapshot; whether it changes anything.
    pub fn tick(&mut self, now: Report) -> bool {
        let old = &self.now.host;
        if (now.host.snapshot_tsc, now.host.life) == (old.snapshot_tsc, old.life) {
            // A file that nobody has written anew.
            return self.tell("");
        }
        self.note.clear();
        self.delta = match now.since(&self.now) {
            Ok(delta) => {
                self.history.add(&delta);
                Some(delta)
            }
            Err(error) => {
                self.note = match error.is_break() {
                    true => ANEW.to_owned(),
                    false => error.to_string(),
                };
                self.history = History::default();
                None
            }
        };
        self.now = now;
        true
    }

    /// Tells the user something; whether it is news.
    pub fn tell(&mut self, note: &str) -> bool {
        let news = self.note != note;
        self.note = note.to_owned();
        news
    }

    /// Whether the numbers are since the beginning: by wish, or as there was no interval yet.
    pub fn is_total(&self) -> bool {
        self.totals || self.delta.is_none()
    }

    /// The report whose numbers are shown.
    pub fn report(&self) -> &Report {
        match &self.delta {
            Some(delta) if !self.totals => delta,
            _ => &self.now,
        }
    }

    /// The numbers that are shown; `None` when whose they are is gone.
    pub fn numbers(&self) -> Option<Numbers> {
        self.scope.numbers(self.report())
    }

    /// The table that is shown.
    pub fn sheet(&self) -> Sheet {
        let mut sheet = columns::sheet(self, self.sorts[self.table()]);
        if !self.filter.is_empty() {
            let wanted = self.filter.to_lowercase();
            let lines = &mut sheet.lines;
            lines.retain(|line| line.name.to_lowercase().contains(&wanted));
        }
        sheet
    }

    /// Which line of a table is selected.
    pub fn selected(&self, sheet: &Sheet) -> Option<usize> {
        let (id, place) = self.selected;
        let here = |id| sheet.lines.iter().position(|line| line.id == id);
        let last = sheet.lines.len().checked_sub(1)?;
        Some(id.and_then(here).unwrap_or(place.min(last)))
    }

    /// Which of the three tables is shown.
    fn table(&self) -> usize {
        match (self.tab, self.scope) {
            (Tab::Reasons, _) | (_, Scope::Vcpu(..)) => 2,
            (_, Scope::All) => 0,
            (_, Scope::Vm(_)) => 1,
        }
    }

    /// Obeys a key.
    pub fn key(&mut self, key: KeyEvent) -> Action {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Action::Quit,
            KeyCode::Char('z') if control => return Action::Suspend,
            _ if self.typing => self.typed(key.code),
            // Whatever key ends the help, it does nothing else.
            _ if self.help => self.help = false,
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.help = true,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('t') => self.totals = !self.totals,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('s') => self.sort(),
            KeyCode::Char('+') => return self.retime(true),
            KeyCode::Char('-') => return self.retime(false),
            KeyCode::Tab => self.turn(),
            KeyCode::Enter | KeyCode::Right => self.enter(),
            KeyCode::Esc | KeyCode::Backspace | KeyCode::Left => self.back(),
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::PageDown => self.step(self.page as isize),
            KeyCode::PageUp => self.step(-(self.page as isize)),
            KeyCode::Home | KeyCode::Char('g') => self.step(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.step(isize::MAX),
            _ => {}
        }
        Action::Stay
    }

    fn typed(&mut self, key: KeyCode) {
        match key {
            KeyCode::Char(letter) => self.filter.push(letter),
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => {
                self.typing = false;
                self.filter.clear();
            }
            _ => {}
        }
    }

    fn sort(&mut self) {
        let orders = self.sheet().orders;
        let sort = &mut self.sorts[self.table()];
        *sort = (*sort + 1) % orders.max(1);
    }

    fn retime(&mut self, longer: bool) -> Action {
        let now = self.interval.as_millis() as u64;
        let mut all = INTERVALS.into_iter();
        let next = if longer {
            all.find(|interval| *interval > now)
        } else {
            all.rfind(|interval| *interval < now)
        };
        self.interval = next.map_or(self.interval, Duration::from_millis);
        Action::Retime
    }

    fn turn(&mut self) {
        self.tab = match self.tab {
            Tab::Parts => Tab::Reasons,
            Tab::Reasons => Tab::Parts,
        };
        self.leave_line();
    }

    fn enter(&mut self) {
        let sheet = self.sheet();
        let line = self
            .selected(&sheet)
            .and_then(|place| sheet.lines.get(place));
        if let Some(Id::Scope(scope)) = line.map(|line| line.id) {
            self.go(scope);
        }
    }

    fn back(&mut self) {
        if !self.filter.is_empty() {
            self.filter.clear();
            return;
        }
        let from = self.scope;
        self.scope = match from {
            Scope::All => Scope::All,
            Scope::Vm(_) => Scope::All,
            Scope::Vcpu(vm, _) => Scope::Vm(vm),
        };
        self.tab = Tab::Parts;
        // The line where it was entered.
        self.selected = (Some(Id::Scope(from)), 0);
    }

    fn go(&mut self, scope: Scope) {
        self.scope = scope;
        self.tab = Tab::Reasons;
        self.filter.clear();
        self.leave_line();
    }

    fn leave_line(&mut self) {
        self.selected = (None, 0);
    }

    fn step(&mut self, by: isize) {
        let sheet = self.sheet();
        let Some(place) = self.selected(&sheet) else {
            return;
        };
        let last = sheet.lines.len().saturating_sub(1);
        let place = place.saturating_add_signed(by).min(last);
        self.selected = (sheet.lines.get(place).map(|line| line.id), place);
    }
}
