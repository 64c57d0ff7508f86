// SPDX-License-Identifier: GPL-2.0

//! The tables of `exitmeter why` for one reason: details of its exits, the guest's code that caused
//! them, and their reasons to go to user space.

use std::cmp::Reverse;

use exitmeter_meter::snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_USER};

use super::{
    columns::{self, Cell, Column, Id, Sheet, TableLine},
    data::Scope,
};
use crate::{
    model::{Label, Span},
    numbers::{rough, rounded, share},
    why::{
        model::{groups, Counts, Group, GroupRow, Weight},
        symbols::Symbols,
        tables::{self, ReasonKey, Rows, TableSet},
    },
};

/// Table of a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Details of the exits.
    Details,
    /// Guest code at the exits.
    Code,
    /// Reasons to go to user space.
    User,
}

impl View {
    /// Return the table's kind in a snapshot.
    fn table(self) -> u32 {
        match self {
            View::Details => TABLE_DETAILS,
            View::Code => TABLE_CODE,
            View::User => TABLE_USER,
        }
    }

    /// Return the view that Tab switches to.
    pub fn next(self) -> Self {
        match self {
            View::Details => View::Code,
            View::Code => View::User,
            View::User => View::Details,
        }
    }

    /// Return the name of the view in the footer.
    pub fn name(self) -> &'static str {
        match self {
            View::Details => "details",
            View::Code => "code",
            View::User => "user space",
        }
    }

    /// Return the singular and plural of what a line shows.
    fn nouns(self) -> [&'static str; 2] {
        match self {
            View::Details => ["detail", "details"],
            View::Code => ["place in the code", "places in the code"],
            View::User => ["way to user space", "ways to user space"],
        }
    }
}

/// Numbers of one reason.
#[derive(Clone, Debug)]
pub struct Breakdown {
    /// Rows and others; `None` when the reason had no exit.
    group: Option<Group>,
    /// Time that the numbers cover.
    span: Span,
    /// True if the numbers are since details were turned on, and not of an interval.
    pub is_total: bool,
    /// vCPUs that have no tables for lack of memory.
    pub without_tables: u32,
    /// Reason why there is no code.
    no_code: Option<&'static str>,
}

impl Breakdown {
    /// Sum up the tables for a reason in a scope.
    pub fn new(
        table_set: &TableSet,
        scope: Scope,
        reason: Reason,
        view: View,
        symbols: &Symbols,
        weight: Weight,
    ) -> Self {
        let host = &table_set.host;
        let vcpus = table_set
            .vcpus
            .iter()
            .filter(|((vm, vcpu), _)| match scope {
                Scope::All => true,
                Scope::Vm(number) => number == *vm,
                Scope::Vcpu(number, id) => (number, id) == (*vm, *vcpu),
            });
        let reason = Some(ReasonKey::new(reason));
        let parts = vcpus
            .clone()
            .map(|(_, vcpu)| vcpu.rows.part(view.table(), reason));
        let parts: Vec<_> = parts.collect();
        let rows = Rows::sum(parts.iter());
        let mut groups = groups(&rows, view.table(), host.isa, symbols, weight);
        let no_code = if !table_set.has_code {
            Some("no code: reading it needs CAP_PERFMON, so run this as root")
        } else {
            // None of the vCPUs has a code address.
            let mut all = vcpus.clone().peekable();
            let has_some = all.peek().is_some();
            let none_known = has_some && all.all(|(_, vcpu)| vcpu.no_rip);
            none_known.then_some("no code: the registers of these guests are encrypted")
        };
        Self {
            group: groups.pop(),
            span: Span::of(tables::ticks(vcpus.map(|(_, vcpu)| vcpu)), host.tsc_khz),
            is_total: table_set.earlier.is_none(),
            without_tables: table_set.without_tables,
            no_code: no_code.filter(|_| view == View::Code),
        }
    }

    /// Return the reason why there is no line.
    pub fn empty_text(&self, view: View) -> &'static str {
        match (self.no_code, view) {
            (Some(why), _) => why,
            (None, View::User) => "none of the running vCPUs had such an exit to user space",
            _ => "none of the running vCPUs had such an exit",
        }
    }
}

/// Return the columns of a view.
fn columns(view: View) -> Vec<Column> {
    let about = Column {
        grows: true,
        ..columns::left("about", 18)
    };
    let kernel = columns::right("kernel/exit", 11, 1);
    let bound = Column {
        rank: 2,
        ..columns::left("bound", 6)
    };
    let mut columns = vec![
        about,
        columns::right("exits/s", 8, 0),
        columns::right("share", 6, 1),
    ];
    match view {
        View::Details => columns.extend([kernel, columns::right("user/exit", 9, 3), bound]),
        View::Code => columns.extend([kernel, bound]),
        // The table of exits to user space has a row for each, so it needs no bound.
        View::User => columns.push(columns::right("user/exit", 9, 1)),
    }
    columns
}

/// Return the weight that orders the lines.
pub fn weight(order: usize) -> Weight {
    match order {
        1 => Weight::Exits,
        _ => Weight::Ticks,
    }
}

/// Build the table of a view. It is empty without a breakdown.
pub fn sheet(breakdown: Option<&Breakdown>, label: Label, view: View, order: usize) -> Sheet {
    let mut lines = Vec::new();
    if let Some((group, span)) =
        breakdown.and_then(|breakdown| Some((breakdown.group.as_ref()?, breakdown.span)))
    {
        let cells = |words: String, counts: Counts, bound: String| {
            let mean = |ticks: Option<u128>| {
                let mean = rounded(ticks.unwrap_or(0), counts.exits);
                mean.map_or_else(|| "-".to_owned(), rough)
            };
            let mut cells = vec![
                words,
                columns::rate(span, counts.exits),
                share(counts.exits, group.total.exits),
            ];
            if view != View::User {
                cells.push(mean(counts.kernel));
            }
            if view != View::Code {
                cells.push(mean(counts.user));
            }
            if view != View::User {
                cells.push(bound);
            }
            cells.into_iter().map(Cell::Text).collect()
        };
        lines.extend(group.rows.iter().map(|row| TableLine {
            id: Id::Row(row.key),
            name: row.about(),
            cells: cells(row.about(), row.counts, bound(row)),
        }));
        if !group.others.is_zero() {
            let words = match (view, group.rows.is_empty()) {
                (View::Details, true) => "(no details)",
                _ => "others",
            };
            lines.push(TableLine {
                id: Id::Others,
                name: words.to_owned(),
                cells: cells(words.to_owned(), group.others, String::new()),
            });
        }
        // Sort the others among the rest, because the reader looks for what costs most.
        let weigh = |line: &TableLine| match line.id {
            Id::Row(key) => {
                let row = group.rows.iter().find(|row| row.key == key);
                row.map_or(Counts::default(), |row| row.counts)
            }
            _ => group.others,
        };
        lines.sort_by_cached_key(|line| {
            let counts = weigh(line);
            Reverse((counts.weigh(weight(order)), counts.exits))
        });
    }
    const ORDERS: [&str; 2] = ["kernel cycles", "exits"];
    let order = match (view, order) {
        (View::User, 0) => "user cycles",
        (_, order) => ORDERS.get(order).copied().unwrap_or(ORDERS[0]),
    };
    Sheet {
        nouns: view.nouns(),
        suffix: format!(" of {label}"),
        order,
        orders: ORDERS.len(),
        columns: columns(view),
        lines,
    }
}

/// Format the number of exits that a row may lack.
fn bound(row: &GroupRow) -> String {
    match row.exact {
        true => "exact".to_owned(),
        false => format!("+{}", rough(row.missed.exits)),
    }
}
