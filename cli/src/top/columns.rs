// SPDX-License-Identifier: GPL-2.0

//! The tables of VMs, of a VM's vCPUs, and of reasons. Those of one reason are in [`details`].

use std::cmp::Reverse;

use exitmeter_meter::phase::Phase;

use super::{
    app::{App, Tab},
    data::{Numbers, Scope},
    details,
};
use crate::{
    model::{Cycles, Label, Ledger, ReasonRow, Span, Vcpu, Vm},
    numbers::{rough, rounded, share},
    spread::Spread,
    why::tables::Key,
};

/// What tells lines apart, whatever their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Id {
    /// A VM, or a vCPU.
    Scope(Scope),
    /// A reason.
    Reason((&'static str, Option<u32>)),
    /// A row of a reason's table.
    Row(Key),
    /// What is in none of its rows.
    Others,
}

/// What stands in a line and a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// A text.
    Text(String),
    /// The latest rates, as bars.
    Rates(Scope),
    /// A part of a whole, as a bar.
    Part(u128, u128),
}

/// A column.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// Its title.
    pub title: &'static str,
    /// Characters.
    pub width: u16,
    /// Whether its texts begin at the left, as words do.
    pub left: bool,
    /// The lower, the more it is worth its place; 0 for those that are always there.
    pub rank: u8,
    /// Whether it takes what place is left.
    pub grows: bool,
}

/// A line.
#[derive(Clone, Debug)]
pub struct Line {
    /// Which one.
    pub id: Id,
    /// What a filter looks at.
    pub name: String,
    /// As many as there are columns.
    pub cells: Vec<Cell>,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Sheet {
    /// What one of its lines is, and several.
    pub counted: [&'static str; 2],
    /// What they belong to.
    pub of: String,
    /// How it is sorted, in words.
    pub order: &'static str,
    /// In how many ways it can be sorted.
    pub orders: usize,
    /// Its columns.
    pub columns: Vec<Column>,
    /// Its lines, in their order.
    pub lines: Vec<Line>,
}

pub const fn right(title: &'static str, width: u16, rank: u8) -> Column {
    Column {
        title,
        width,
        left: false,
        rank,
        grows: false,
    }
}

pub const fn left(title: &'static str, width: u16) -> Column {
    Column {
        left: true,
        ..right(title, width, 0)
    }
}

const fn bars(title: &'static str) -> Column {
    Column {
        grows: true,
        ..Column {
            rank: 9,
            ..left(title, 12)
        }
    }
}

/// The columns of the phases, in the order of [`Cycles::phases`].
fn phase_columns(cycles: Cycles) -> impl Iterator<Item = Column> {
    cycles.phases().map(move |phase| {
        let name = cycles.name(phase);
        let rank = u8::from(phase != Phase::Kernel);
        // As wide as its name, or a share.
        right(name, (name.len() as u16).max(6), rank)
    })
}

/// The table that is to be shown, in one of its orders.
pub fn sheet(app: &App, order: usize) -> Sheet {
    match (app.tab, app.scope) {
        (Tab::Parts, Scope::All) => {
            let report = app.report();
            vms(&report.vms, report.departed.ledger.cycles, order)
        }
        (Tab::Parts, Scope::Vm(_)) => {
            let vm = app.scope.vm(app.report());
            vcpus(vm, order)
        }
        (Tab::Why(reason, view), _) => {
            let label = Label::new(app.report().host.isa, reason);
            details::sheet(app.story.as_ref(), label, view, order)
        }
        _ => reasons(app.numbers().as_ref(), order),
    }
}

/// `told` says which phases there are.
fn vms(vms: &[Vm], told: Cycles, order: usize) -> Sheet {
    const ORDERS: [&str; 3] = ["exits", "kernel cycles", "name"];
    let mut vms: Vec<_> = vms.iter().collect();
    match order {
        0 => vms.sort_by_key(|vm| Reverse(vm.ledger.exits)),
        1 => vms.sort_by_key(|vm| Reverse(vm.ledger.cost())),
        _ => vms.sort_by_cached_key(|vm| (vm.short(), vm.pid)),
    }
    let mut columns = vec![
        left("VM", 16),
        right("process", 7, 3),
        right("vCPUs", 5, 2),
        right("exits/s", 9, 0),
    ];
    columns.extend(phase_columns(told));
    columns.push(bars("trend"));
    let lines = vms.into_iter().map(|vm| {
        let mut cells = vec![
            vm.short(),
            vm.pid.to_string(),
            vm.vcpus.len().to_string(),
            rate(vm.span, vm.ledger.exits),
        ];
        cells.extend(phases(&vm.ledger));
        line(Scope::Vm(vm.vm), vm.label(), cells)
    });
    Sheet {
        counted: ["VM", "VMs"],
        of: String::new(),
        order: ORDERS.get(order).unwrap_or(&ORDERS[0]),
        orders: ORDERS.len(),
        columns,
        lines: lines.collect(),
    }
}

fn vcpus(vm: Option<&Vm>, order: usize) -> Sheet {
    const ORDERS: [&str; 3] = ["number", "exits", "kernel cycles"];
    let mut vcpus: Vec<&Vcpu> = vm.iter().flat_map(|vm| &vm.vcpus).collect();
    match order {
        1 => vcpus.sort_by_key(|vcpu| Reverse(vcpu.ledger.exits)),
        2 => vcpus.sort_by_key(|vcpu| Reverse(vcpu.ledger.cost())),
        _ => {}
    }
    let mut columns = vec![
        left("vCPU", 8),
        Column {
            rank: 2,
            ..left("now", 9)
        },
        right("exits/s", 9, 0),
    ];
    let told = vm.map_or_else(Cycles::default, |vm| vm.ledger.cycles);
    columns.extend(phase_columns(told));
    columns.push(bars("trend"));
    let lines = vcpus.into_iter().zip(vm.iter().cycle()).map(|(vcpu, vm)| {
        let name = format!("vCPU {}", vcpu.vcpu);
        let mut cells = vec![
            name.clone(),
            vcpu.phase_name.unwrap_or("?").to_owned(),
            rate(vm.span, vcpu.ledger.exits),
        ];
        cells.extend(phases(&vcpu.ledger));
        line(Scope::Vcpu(vm.vm, vcpu.vcpu), name, cells)
    });
    Sheet {
        counted: ["vCPU", "vCPUs"],
        of: String::new(),
        order: ORDERS.get(order).unwrap_or(&ORDERS[0]),
        orders: ORDERS.len(),
        columns,
        lines: lines.collect(),
    }
}

fn reasons(numbers: Option<&Numbers>, order: usize) -> Sheet {
    const ORDERS: [&str; 3] = ["kernel cycles", "exits", "p99"];
    let mut rows: Vec<&ReasonRow> = numbers
        .iter()
        .flat_map(|numbers| &numbers.ledger.reasons)
        .filter(|row| row.exits != 0)
        .collect();
    let p99 = |row: &ReasonRow| row.spread.as_ref().and_then(|spread| spread.quantile(99));
    match order {
        1 => rows.sort_by_key(|row| Reverse(row.exits)),
        2 => rows.sort_by_key(|row| Reverse(p99(row))),
        // So they are already.
        _ => {}
    }
    let columns = vec![
        left("reason", 22),
        right("code", 5, 4),
        right("exits/s", 8, 0),
        right("of all", 6, 2),
        right("kernel", 6, 0),
        right("per exit", 8, 1),
        right("p50", 5, 2),
        right("p99", 5, 1),
        right("max", 5, 2),
        Column {
            width: 14,
            ..bars("kernel cycles")
        },
    ];
    let lines = rows.into_iter().zip(numbers.iter().cycle());
    let lines = lines.map(|(row, Numbers { ledger, span })| {
        let single = |ticks: fn(&Spread) -> Option<u64>| {
            let ticks = row.spread.as_ref().and_then(ticks);
            ticks.map_or_else(|| "-".to_owned(), rough)
        };
        let name = row.label.to_string();
        let cells = [
            name.clone(),
            row.label
                .code
                .map_or_else(String::new, |code| code.to_string()),
            rate(*span, row.exits),
            share(row.exits, ledger.exits),
            share(row.cost(), ledger.cost()),
            rounded(row.cost(), row.exits).map_or_else(|| "-".to_owned(), rough),
            single(|spread| spread.quantile(50)),
            single(|spread| spread.quantile(99)),
            single(|spread| Some(spread.max).filter(|max| *max != 0)),
        ];
        let mut cells: Vec<_> = cells.into_iter().map(Cell::Text).collect();
        cells.push(Cell::Part(row.cost(), ledger.cost()));
        Line {
            id: Id::Reason(row.label.key()),
            name,
            cells,
        }
    });
    Sheet {
        counted: ["reason", "reasons"],
        of: String::new(),
        order: ORDERS.get(order).unwrap_or(&ORDERS[0]),
        orders: ORDERS.len(),
        columns,
        lines: lines.collect(),
    }
}

/// A line of a VM or a vCPU, with its rates at the end.
fn line(scope: Scope, name: String, cells: Vec<String>) -> Line {
    let texts = cells.into_iter().map(Cell::Text);
    Line {
        id: Id::Scope(scope),
        name,
        cells: texts.chain([Cell::Rates(scope)]).collect(),
    }
}

/// So many each second.
pub fn rate(span: Span, count: u64) -> String {
    match span.per_second(count) {
        // Below ten a rate without decimals would not tell much.
        Some(rate) if rate > 0.0 && rate < 9.95 => format!("{rate:.1}"),
        Some(rate) => rough(rate.round() as u128),
        None => "-".to_owned(),
    }
}

/// The share of each phase.
fn phases(ledger: &Ledger) -> impl Iterator<Item = String> + '_ {
    let whole = ledger.cycles.sum();
    let phases = ledger.cycles.phases();
    phases.map(move |phase| share(ledger.cycles.of(phase), whole))
}

/// Which columns there is room for, two blanks apart.
pub fn fitting(columns: &[Column], width: u16) -> Vec<usize> {
    let mut order: Vec<usize> = (0..columns.len()).collect();
    let rank = |place: &usize| columns.get(*place).map_or(0, |column| column.rank);
    order.sort_by_key(rank);
    let mut left = usize::from(width);
    let mut shown = Vec::new();
    for place in order {
        let Some(column) = columns.get(place) else {
            continue;
        };
        let needed = usize::from(column.width) + usize::from(!shown.is_empty()) * GAP;
        if needed > left && column.rank > 0 {
            // A column of less worth is not shown in its stead.
            break;
        }
        left = left.saturating_sub(needed);
        shown.push(place);
    }
    shown.sort_unstable();
    shown
}

/// Blanks between columns.
pub const GAP: usize = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_less_worth_make_room() {
        let titles = |width| {
            let sheet = vms(&[], Cycles::default(), 0);
            let shown = fitting(&sheet.columns, width).into_iter();
            let titles: Vec<_> = shown.map(|place| sheet.columns[place].title).collect();
            titles.join(" ")
        };
        assert_eq!(titles(10), "VM exits/s kernel");
        assert_eq!(titles(33), "VM exits/s kernel");
        assert_eq!(
            titles(80),
            "VM vCPUs exits/s guest kernel user halted waiting preempted"
        );
        let old = Cycles::by_phase(false, |_| 0);
        let titles_of_old: Vec<_> = phase_columns(old).map(|column| column.title).collect();
        assert_eq!(
            titles_of_old,
            ["guest", "kernel", "user", "blocked", "preempted"]
        );
        assert!(titles(160).ends_with(" trend"));
    }

    #[test]
    fn rates_are_short() {
        let second = Span::of(1000, Some(1));
        assert_eq!(rate(second, 0), "0");
        assert_eq!(rate(Span::of(4000, Some(1)), 1), "0.2");
        assert_eq!(rate(second, 1234), "1.23k");
        assert_eq!(rate(Span::of(1000, None), 5), "-");
    }
}
