// SPDX-License-Identifier: GPL-2.0

//! State of the screen, and its changes by keys.

use std::time::Duration;

use exitmeter_meter::snapshot::Reason;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{
    columns::{self, Id, Sheet},
    data::{Scope, ScopeNumbers},
    details::{self, Breakdown, View},
    feed::Reading,
    history::History,
};
use crate::{
    model::{delta::NEW_LIFE, Label, Report, Vm},
    names::{self, NoVm},
    why::{symbols::Symbols, tables::TableSet},
};

/// Intervals that + and - select, in milliseconds.
const INTERVALS: [u64; 10] = [50, 100, 250, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000];

/// Table that is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tab {
    /// The VMs, or the vCPUs of one.
    Parts,
    /// The exit reasons.
    Reasons,
    /// One view of one reason.
    Why(Reason, View),
}

/// Action to take after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Only draw again.
    Stay,
    /// Wait anew, because the interval has changed.
    Retime,
    /// Turn details on.
    TurnOn,
    /// Stop the process, as Ctrl-Z does.
    Suspend,
    /// Leave.
    Quit,
}

/// State of the screen.
#[derive(Debug)]
pub struct App {
    /// Latest snapshot.
    now: Report,
    /// Difference from the snapshot before.
    delta: Option<Report>,
    /// Details of the exits since details were turned on.
    tables: Option<TableSet>,
    /// Details of the exits since the snapshot before.
    between: Option<TableSet>,
    /// Numbers of the reason that is shown.
    pub breakdown: Option<Breakdown>,
    /// Reason why details cannot be turned on.
    pub details_error: Option<String>,
    /// Symbols of one guest, and the number of its VM.
    symbols: (Symbols, Option<u64>),
    /// Latest rates.
    pub history: History,
    /// Time from one reading to the next.
    pub interval: Duration,
    /// True if readings are put off.
    pub paused: bool,
    /// Note for the user.
    pub note: String,
    /// Scope of the numbers that are shown.
    pub scope: Scope,
    /// Table that is shown.
    pub tab: Tab,
    /// True if the numbers are since the beginning, and not of the last interval.
    pub totals: bool,
    /// True if the list of keys is shown.
    pub help: bool,
    /// Text that a line's name must contain to be shown.
    pub filter: String,
    /// True if the filter is being typed.
    pub typing: bool,
    /// Sort order of each table: the VMs, the vCPUs, the reasons, and each view of one reason.
    sorts: [usize; 6],
    /// Selected line, and its position.
    selected: (Option<Id>, usize),
    /// Number of lines that fit on a page.
    pub page: usize,
}

impl App {
    /// Create the state from a first snapshot, which has the numbers since the beginning.
    pub fn new(first: Reading, interval: Duration) -> Self {
        Self {
            now: first.report,
            delta: None,
            tables: first.tables,
            between: None,
            breakdown: None,
            details_error: None,
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

    /// Show a VM, by its name or process.
    ///
    /// # Errors
    ///
    /// Returns an error if no VM matches, or several do.
    pub fn open(&mut self, vm: &str) -> Result<(), NoVm> {
        let found = names::find(vm, self.now.vms.iter().map(Vm::candidate))?;
        // If one process has several VMs, show the first.
        if let Some(number) = found.first() {
            self.go(Scope::Vm(*number));
        }
        Ok(())
    }

    /// Set the symbols for the code of the VM that is shown.
    pub fn set_symbols(&mut self, symbols: Symbols) {
        let Scope::Vm(number) = self.scope else {
            return;
        };
        self.symbols = (symbols, Some(number));
    }

    /// Take in the next snapshot. Return true if the screen changes.
    pub fn tick(&mut self, reading: Reading) -> bool {
        let Reading {
            report: now,
            tables,
        } = reading;
        let old = &self.now.host;
        if (now.host.snapshot_tsc, now.host.life) == (old.snapshot_tsc, old.life) {
            // The file has not been written anew.
            return self.set_note("");
        }
        self.note.clear();
        self.delta = match now.since(&self.now) {
            Ok(delta) => {
                self.history.add(&delta);
                Some(delta)
            }
            Err(error) => {
                self.note = match error.is_break() {
                    true => NEW_LIFE.to_owned(),
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
        self.update_breakdown();
        true
    }

    /// Sum up the numbers of the reason that is shown.
    pub fn update_breakdown(&mut self) {
        let Tab::Why(reason, view) = self.tab else {
            self.breakdown = None;
            return;
        };
        let between = self.between.as_ref().filter(|_| !self.totals);
        let none = Symbols::default();
        let symbols = match (self.scope, &self.symbols) {
            (Scope::Vm(vm) | Scope::Vcpu(vm, _), (symbols, Some(owner))) if vm == *owner => symbols,
            _ => &none,
        };
        let weight = details::weight(self.sorts[self.table_index()]);
        let breakdown =
            |table_set| Breakdown::new(table_set, self.scope, reason, view, symbols, weight);
        self.breakdown = between.or(self.tables.as_ref()).map(breakdown);
    }

    /// Set the note for the user. Return true if it is a new one.
    pub fn set_note(&mut self, note: &str) -> bool {
        let news = self.note != note;
        self.note = note.to_owned();
        news
    }

    /// Return true if the numbers are since the beginning: by choice, or because there was no
    /// interval yet.
    pub fn is_total(&self) -> bool {
        let breakdown = self.breakdown.as_ref();
        self.totals || self.delta.is_none() || breakdown.is_some_and(|breakdown| breakdown.is_total)
    }

    /// Return the report whose numbers are shown.
    pub fn report(&self) -> &Report {
        match &self.delta {
            Some(delta) if !self.totals => delta,
            _ => &self.now,
        }
    }

    /// Return the numbers that are shown, or `None` if the VM or vCPU is gone.
    pub fn numbers(&self) -> Option<ScopeNumbers> {
        self.scope.numbers(self.report())
    }

    /// Build the table that is shown, with its filter applied.
    pub fn sheet(&self) -> Sheet {
        let order = self.sorts[self.table_index()];
        let report = self.report();
        let mut sheet = match (self.tab, self.scope) {
            (Tab::Parts, Scope::All) => {
                columns::vms(&report.vms, report.departed.ledger.cycles, order)
            }
            (Tab::Parts, Scope::Vm(_)) => columns::vcpus(self.scope.vm(report), order),
            (Tab::Why(reason, view), _) => {
                let label = Label::new(report.host.isa, reason);
                details::sheet(self.breakdown.as_ref(), label, view, order)
            }
            _ => columns::reasons(self.numbers().as_ref(), order),
        };
        if !self.filter.is_empty() {
            let wanted = self.filter.to_lowercase();
            let lines = &mut sheet.lines;
            lines.retain(|line| line.name.to_lowercase().contains(&wanted));
        }
        sheet
    }

    /// Return the position of the selected line.
    pub fn selected(&self, sheet: &Sheet) -> Option<usize> {
        let (id, place) = self.selected;
        let here = |id| sheet.lines.iter().position(|line| line.id == id);
        let last = sheet.lines.len().checked_sub(1)?;
        Some(id.and_then(here).unwrap_or(place.min(last)))
    }

    /// Return the index of the table that is shown in `sorts`.
    fn table_index(&self) -> usize {
        match (self.tab, self.scope) {
            (Tab::Why(_, View::Details), _) => 3,
            (Tab::Why(_, View::Code), _) => 4,
            (Tab::Why(_, View::User), _) => 5,
            (Tab::Reasons, _) | (_, Scope::Vcpu(..)) => 2,
            (_, Scope::All) => 0,
            (_, Scope::Vm(_)) => 1,
        }
    }

    /// Handle a key.
    pub fn key(&mut self, key: KeyEvent) -> Action {
        let action = self.handle_key(key);
        self.update_breakdown();
        action
    }

    fn handle_key(&mut self, key: KeyEvent) -> Action {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Action::Quit,
            KeyCode::Char('z') if control => return Action::Suspend,
            _ if self.typing => self.type_filter(key.code),
            // A key that ends the help does nothing else.
            _ if self.help => self.help = false,
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.help = true,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('t') => self.totals = !self.totals,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('s') => self.sort(),
            KeyCode::Char('+') => return self.change_interval(true),
            KeyCode::Char('-') => return self.change_interval(false),
            KeyCode::Tab => self.switch_tab(),
            KeyCode::Enter | KeyCode::Right => return self.enter(),
            KeyCode::Esc | KeyCode::Backspace | KeyCode::Left => self.back(),
            KeyCode::Down | KeyCode::Char('j') => self.move_selection(1),
            KeyCode::Up | KeyCode::Char('k') => self.move_selection(-1),
            KeyCode::PageDown => self.move_selection(self.page as isize),
            KeyCode::PageUp => self.move_selection(-(self.page as isize)),
            KeyCode::Home | KeyCode::Char('g') => self.move_selection(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.move_selection(isize::MAX),
            _ => {}
        }
        Action::Stay
    }

    fn type_filter(&mut self, key: KeyCode) {
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
        let sort = &mut self.sorts[self.table_index()];
        *sort = (*sort + 1) % orders.max(1);
    }

    fn change_interval(&mut self, longer: bool) -> Action {
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

    fn switch_tab(&mut self) {
        self.tab = match self.tab {
            Tab::Parts => Tab::Reasons,
            Tab::Reasons => Tab::Parts,
            Tab::Why(reason, view) => Tab::Why(reason, view.next()),
        };
        self.deselect();
    }

    fn enter(&mut self) -> Action {
        if let Tab::Why(reason, View::Details) = self.tab {
            self.switch_to(Tab::Why(reason, View::Code));
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
                self.switch_to(Tab::Why(reason, View::Details));
                return Action::TurnOn;
            }
            _ => {}
        }
        Action::Stay
    }

    fn switch_to(&mut self, tab: Tab) {
        self.tab = tab;
        self.filter.clear();
        self.deselect();
    }

    fn back(&mut self) {
        if !self.filter.is_empty() {
            self.filter.clear();
            return;
        }
        match self.tab {
            Tab::Why(reason, View::Code | View::User) => {
                return self.switch_to(Tab::Why(reason, View::Details));
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
        // Select the line that was entered.
        self.selected = (Some(Id::Scope(from)), 0);
    }

    fn go(&mut self, scope: Scope) {
        self.scope = scope;
        self.switch_to(Tab::Reasons);
    }

    fn deselect(&mut self) {
        self.selected = (None, 0);
    }

    fn move_selection(&mut self, by: isize) {
        let sheet = self.sheet();
        let Some(place) = self.selected(&sheet) else {
            return;
        };
        let last = sheet.lines.len().saturating_sub(1);
        let place = place.saturating_add_signed(by).min(last);
        self.selected = (sheet.lines.get(place).map(|line| line.id), place);
    }
}
