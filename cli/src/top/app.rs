// SPDX-License-Identifier: GPL-2.0

//! What is shown, and what keys change of it.

use std::time::Duration;

use exitmeter_meter::snapshot::Reason;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{
    columns::{self, Id, Sheet},
    data::{Numbers, Scope},
    details::{self, Story, View},
    feed::Reading,
    history::History,
};
use crate::{
    model::{delta::ANEW, Label, Report, Vm},
    names::{self, NoVm},
    why::{symbols::Symbols, tables::Moment},
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
    /// What there is to tell of one reason.
    Why(Reason, View),
}

/// What is to be done after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing but to draw anew.
    Stay,
    /// The interval has changed.
    Retime,
    /// To have details.
    TurnOn,
    /// To stop, as Ctrl-Z does.
    Suspend,
    /// To leave.
    Quit,
}

/// The state of the screen.
#[derive(Debug)]
pub struct App {
    /// The latest snapshot.
    now: Report,
    /// What happened since the one before it.
    delta: Option<Report>,
    /// What the exits were about, since details are on.
    tables: Option<Moment>,
    /// The same since the snapshot before.
    between: Option<Moment>,
    /// Of the reason that is shown.
    pub story: Option<Story>,
    /// Why details cannot be turned on.
    pub refusal: Option<String>,
    /// Symbols of one guest, and the VM that it is.
    symbols: (Symbols, Option<u64>),
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
    /// By which column each table is sorted: that of the VMs, of the vCPUs, of the reasons, and each
    /// view of one reason.
    sorts: [usize; 6],
    /// The line that is selected, and where it was.
    selected: (Option<Id>, usize),
    /// How many lines fit on a page.
    pub page: usize,
}

impl App {
    /// With a first snapshot, which has the numbers since the beginning.
    pub fn new(first: Reading, interval: Duration) -> Self {
        Self {
            now: first.report,
            delta: None,
            tables: first.tables,
            between: None,
            story: None,
            refusal: None,
            symbols: (Symbols::default(), None),
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
            sorts: [0; 6],
            selected: (None, 0),
            page: 1,
        }
    }

    /// Goes to a VM by what it is called, or its process.
    ///
    /// # Errors
    ///
    /// When there is none, or several are called so.
    pub fn open(&mut self, vm: &str) -> Result<(), NoVm> {
        let meant = names::find(vm, self.now.vms.iter().map(Vm::known))?;
        // Of several VMs of one process, the first.
        if let Some(number) = meant.first() {
            self.go(Scope::Vm(*number));
        }
        Ok(())
    }

    /// Name code of the VM that is shown by these symbols.
    pub fn name_code(&mut self, symbols: Symbols) {
        let Scope::Vm(number) = self.scope else {
            return;
        };
        self.symbols = (symbols, Some(number));
    }

    /// Takes the next snapshot; whether it changes anything.
    pub fn tick(&mut self, reading: Reading) -> bool {
        let Reading {
            report: now,
            tables,
        } = reading;
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
        self.between = match (&tables, &self.tables) {
            (Some(now), Some(before)) if self.delta.is_some() => now.since(before).ok(),
            _ => None,
        };
        self.tables = tables;
        self.look();
        true
    }

    /// Sum up what is told of the reason that is shown.
    pub fn look(&mut self) {
        let Tab::Why(reason, view) = self.tab else {
            self.story = None;
            return;
        };
        let between = self.between.as_ref().filter(|_| !self.totals);
        let none = Symbols::default();
        let symbols = match (self.scope, &self.symbols) {
            (Scope::Vm(vm) | Scope::Vcpu(vm, _), (symbols, Some(of))) if vm == *of => symbols,
            _ => &none,
        };
        let weight = details::weight(self.sorts[self.table()]);
        let story = |moment| Story::new(moment, self.scope, reason, view, symbols, weight);
        self.story = between.or(self.tables.as_ref()).map(story);
    }

    /// Tells the user something; whether it is news.
    pub fn tell(&mut self, note: &str) -> bool {
        let news = self.note != note;
        self.note = note.to_owned();
        news
    }

    /// Whether the numbers are since the beginning: by wish, or as there was no interval yet.
    pub fn is_total(&self) -> bool {
        let story = self.story.as_ref();
        self.totals || self.delta.is_none() || story.is_some_and(|story| story.is_total)
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

    /// Which of the tables is shown.
    fn table(&self) -> usize {
        match (self.tab, self.scope) {
            (Tab::Why(_, View::Details), _) => 3,
            (Tab::Why(_, View::Code), _) => 4,
            (Tab::Why(_, View::User), _) => 5,
            (Tab::Reasons, _) | (_, Scope::Vcpu(..)) => 2,
            (_, Scope::All) => 0,
            (_, Scope::Vm(_)) => 1,
        }
    }

    /// Obeys a key.
    pub fn key(&mut self, key: KeyEvent) -> Action {
        let action = self.act(key);
        self.look();
        action
    }

    fn act(&mut self, key: KeyEvent) -> Action {
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
            KeyCode::Enter | KeyCode::Right => return self.enter(),
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
            Tab::Why(reason, view) => Tab::Why(reason, view.next()),
        };
        self.leave_line();
    }

    fn enter(&mut self) -> Action {
        if let Tab::Why(reason, View::Details) = self.tab {
            self.turn_to(Tab::Why(reason, View::Code));
            return Action::Stay;
        }
        let sheet = self.sheet();
        let line = self
            .selected(&sheet)
            .and_then(|place| sheet.lines.get(place));
        match line.map(|line| line.id) {
            Some(Id::Scope(scope)) => self.go(scope),
            Some(Id::Reason(key)) => {
                let reason = match key {
                    (_, Some(code)) => Reason::Code(code),
                    _ => Reason::Other,
                };
                self.turn_to(Tab::Why(reason, View::Details));
                return Action::TurnOn;
            }
            _ => {}
        }
        Action::Stay
    }

    fn turn_to(&mut self, tab: Tab) {
        self.tab = tab;
        self.filter.clear();
        self.leave_line();
    }

    fn back(&mut self) {
        if !self.filter.is_empty() {
            self.filter.clear();
            return;
        }
        match self.tab {
            Tab::Why(reason, View::Code | View::User) => {
                return self.turn_to(Tab::Why(reason, View::Details));
            }
            Tab::Why(reason, View::Details) => {
                self.tab = Tab::Reasons;
                let label = Label::new(self.now.host.isa, reason);
                self.selected = (Some(Id::Reason(label.key())), 0);
                return;
            }
            Tab::Parts | Tab::Reasons => {}
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
        self.turn_to(Tab::Reasons);
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
