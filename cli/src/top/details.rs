// SPDX-License-Identifier: GPL-2.0

//! What the exits of one reason were about, which code of the guest's caused them, and why they went
//! to user space: the tables of `exitmeter why`, of what is shown.

use std::cmp::Reverse;

use exitmeter_meter::snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_USER};

use super::{
    columns::{self, Cell, Column, Id, Line, Sheet},
    data::Scope,
};
use crate::{
    model::{Label, Span},
    numbers::{rough, rounded, share},
    why::{
        model::{groups, Counts, Group, Row, Weight},
        symbols::Symbols,
        tables::{self, Moment, Of, Rows},
    },
};

/// Which table of a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// What the exits were about.
    Details,
    /// Where in the guest's code they were.
    Code,
    /// Why they went to user space.
    User,
}

impl View {
    /// The table's kind in a snapshot.
    fn table(self) -> u32 {
        match self {
            View::Details => TABLE_DETAILS,
            View::Code => TABLE_CODE,
            View::User => TABLE_USER,
        }
    }

    /// Return the one that Tab turns to.
    pub fn next(self) -> Self {
        match self {
            View::Details => View::Code,
            View::Code => View::User,
            View::User => View::Details,
        }
    }

    /// Return what it is called where it can be turned to.
    pub fn name(self) -> &'static str {
        match self {
            View::Details => "details",
            View::Code => "code",
            View::User => "user space",
        }
    }

    /// Return what one of its lines is, and several.
    fn counted(self) -> [&'static str; 2] {
        match self {
            View::Details => ["detail", "details"],
            View::Code => ["place in the code", "places in the code"],
            View::User => ["way to user space", "ways to user space"],
        }
    }
}

/// What is told of a reason.
#[derive(Clone, Debug)]
pub struct Story {
    /// Rows and others; `None` when the reason had no exit.
    group: Option<Group>,
    /// The time that the numbers are of.
    span: Span,
    /// They are since details were turned on, not of an interval.
    pub is_total: bool,
    /// vCPUs that have no tables for want of memory.
    pub without: u32,
    /// What keeps code from being told.
    no_code: Option<&'static str>,
}

impl Story {
    /// Sum up what tables hold of a reason in a scope.
    pub fn new(
        moment: &Moment,
        scope: Scope,
        reason: Reason,
        view: View,
        symbols: &Symbols,
        weight: Weight,
    ) -> Self {
        let host = &moment.host;
        let vcpus = moment.vcpus.iter().filter(|((vm, vcpu), _)| match scope {
            Scope::All => true,
            Scope::Vm(number) => number == *vm,
            Scope::Vcpu(number, id) => (number, id) == (*vm, *vcpu),
        });
        let of = Some(Of::new(reason));
        let parts = vcpus
            .clone()
            .map(|(_, vcpu)| vcpu.rows.part(view.table(), of));
        let parts: Vec<_> = parts.collect();
        let rows = Rows::sum(parts.iter());
        let mut groups = groups(&rows, view.table(), host.isa, symbols, weight);
        let no_code = if !moment.has_code {
            Some("no code is told: that takes CAP_PERFMON, so run this as root")
        } else {
            // No address is told of any of them.
            let mut all = vcpus.clone().peekable();
            let has_some = all.peek().is_some();
            let is_so = has_some && all.all(|(_, vcpu)| vcpu.no_rip);
            is_so.then_some("no code is told of guests whose registers are encrypted")
        };
        Self {
            group: groups.pop(),
            span: Span::of(tables::ticks(vcpus.map(|(_, vcpu)| vcpu)), host.tsc_khz),
            is_total: moment.earlier.is_none(),
            without: moment.without,
            no_code: no_code.filter(|_| view == View::Code),
        }
    }

    /// Return why there is no line.
    pub fn nothing(&self, view: View) -> &'static str {
        match (self.no_code, view) {
            (Some(why), _) => why,
            (None, View::User) => "of the vCPUs that live none had such an exit to user space",
            _ => "of the vCPUs that live none had such an exit",
        }
    }
}

/// The columns of a view.
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
        // Of exits to user space nothing is missed.
        View::User => columns.push(columns::right("user/exit", 9, 1)),
    }
    columns
}

/// By what lines are ordered.
pub fn weight(order: usize) -> Weight {
    match order {
        1 => Weight::Exits,
        _ => Weight::Ticks,
    }
}

/// The table of a view; without a story it is empty.
pub fn sheet(story: Option<&Story>, label: Label, view: View, order: usize) -> Sheet {
    let mut lines = Vec::new();
    if let Some((group, span)) = story.and_then(|story| Some((story.group.as_ref()?, story.span))) {
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
        lines.extend(group.rows.iter().map(|row| Line {
            id: Id::Row(row.key),
            name: row.about(),
            cells: cells(row.about(), row.counts, bound(row)),
        }));
        if !group.others.is_zero() {
            let words = match (view, group.rows.is_empty()) {
                (View::Details, true) => "(no details)",
                _ => "others",
            };
            lines.push(Line {
                id: Id::Others,
                name: words.to_owned(),
                cells: cells(words.to_owned(), group.others, String::new()),
            });
        }
        // The others stand among the rest: what leads is what one looks for.
        let weigh = |line: &Line| match line.id {
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
        counted: view.counted(),
        of: format!(" of {label}"),
        order,
        orders: ORDERS.len(),
        columns: columns(view),
        lines,
    }
}

/// Write how many exits a row may lack.
fn bound(row: &Row) -> String {
    match row.exact {
        true => "exact".to_owned(),
        false => format!("+{}", rough(row.missed.exits)),
    }
}
