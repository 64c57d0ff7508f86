// SPDX-License-Identifier: GPL-2.0

//! The tables of VMs, of a VM's vCPUs, and of reasons.

use std::cmp::Reverse;

use exitmeter_meter::phase::Phase;

use super::data::{Scope, ScopeNumbers};
use crate::{
    model::{Cycles, Ledger, ReasonRow, Span, VcpuReport, Vm},
    numbers::{rough, rounded, share},
    spread::Spread,
    why::tables::Key,
};

/// Blanks between columns.
pub const GAP: usize = 1;

/// Identity of a line, independent of its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Id {
    /// A VM or a vCPU.
    Scope(Scope),
    /// An exit reason.
    Reason((&'static str, Option<u32>)),
    /// A row of a reason's table.
    Row(Key),
    /// The exits in none of its rows.
    Others,
}

/// Cell of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Text.
    Text(String),
    /// Latest rates, as bars.
    Rates(Scope),
    /// Part of a whole, as a bar.
    Part(u128, u128),
}

/// Column of a table.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// Title.
    pub title: &'static str,
    /// Width, in characters.
    pub width: u16,
    /// True if the texts are left-aligned, as words are.
    pub left: bool,
    /// Rank when columns compete for space: the lowest stay. Columns of rank 0 are always shown.
    pub rank: u8,
    /// True if the column takes the space that is left.
    pub grows: bool,
}

/// Line of a table.
#[derive(Clone, Debug)]
pub struct TableLine {
    /// Identity.
    pub id: Id,
    /// Text that the filter searches.
    pub name: String,
    /// Cells, one for each column.
    pub cells: Vec<Cell>,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Sheet {
    /// Singular and plural of what a line shows.
    pub nouns: [&'static str; 2],
    /// Text behind the noun that names what the lines belong to.
    pub suffix: String,
    /// Sort order, as shown in the title bar.
    pub order: &'static str,
    /// Number of sort orders.
    pub orders: usize,
    /// Columns.
    pub columns: Vec<Column>,
    /// Lines, sorted.
    pub lines: Vec<TableLine>,
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

/// Return the columns of the phases, in the order of [`Cycles::phases`].
fn phase_columns(cycles: Cycles) -> impl Iterator<Item = Column> {
    cycles.phases().map(move |phase| {
        let name = cycles.name(phase);
        let rank = u8::from(phase != Phase::Kernel);
        // A column has room for its name and for a share.
        right(name, (name.len() as u16).max(6), rank)
    })
}

/// Build the table of VMs. `cycles` tells which phases there are.
pub fn vms(vms: &[Vm], cycles: Cycles, order: usize) -> Sheet {
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
    columns.extend(phase_columns(cycles));
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
        nouns: ["VM", "VMs"],
        suffix: String::new(),
        order: ORDERS.get(order).unwrap_or(&ORDERS[0]),
        orders: ORDERS.len(),
        columns,
        lines: lines.collect(),
    }
}

/// Build the table of a VM's vCPUs.
pub fn vcpus(vm: Option<&Vm>, order: usize) -> Sheet {
    const ORDERS: [&str; 3] = ["number", "exits", "kernel cycles"];
    let mut vcpus: Vec<&VcpuReport> = vm.iter().flat_map(|vm| &vm.vcpus).collect();
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
    let cycles = vm.map_or_else(Cycles::default, |vm| vm.ledger.cycles);
    columns.extend(phase_columns(cycles));
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
        nouns: ["vCPU", "vCPUs"],
        suffix: String::new(),
        order: ORDERS.get(order).unwrap_or(&ORDERS[0]),
        orders: ORDERS.len(),
        columns,
        lines: lines.collect(),
    }
}

/// Build the table of reasons.
pub fn reasons(numbers: Option<&ScopeNumbers>, order: usize) -> Sheet {
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
        // The report has them in this order.
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
    let lines = lines.map(|(row, ScopeNumbers { ledger, span })| {
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
        TableLine {
            id: Id::Reason(row.label.key()),
            name,
            cells,
        }
    });
    Sheet {
        nouns: ["reason", "reasons"],
        suffix: String::new(),
        order: ORDERS.get(order).unwrap_or(&ORDERS[0]),
        orders: ORDERS.len(),
        columns,
        lines: lines.collect(),
    }
}

/// Build the line of a VM or a vCPU, with its rates at the end.
fn line(scope: Scope, name: String, cells: Vec<String>) -> TableLine {
    let texts = cells.into_iter().map(Cell::Text);
    TableLine {
        id: Id::Scope(scope),
        name,
        cells: texts.chain([Cell::Rates(scope)]).collect(),
    }
}

/// Format a number per second.
pub fn rate(span: Span, count: u64) -> String {
    match span.per_second(count) {
        // Below ten, a rate without decimals would be too coarse.
        Some(rate) if rate > 0.0 && rate < 9.95 => format!("{rate:.1}"),
        Some(rate) => rough(rate.round() as u128),
        None => "-".to_owned(),
    }
}

/// Format the share of each phase.
fn phases(ledger: &Ledger) -> impl Iterator<Item = String> + '_ {
    let whole = ledger.cycles.sum();
    let phases = ledger.cycles.phases();
    phases.map(move |phase| share(ledger.cycles.of(phase), whole))
}

/// Return the columns that fit, [`GAP`] blanks apart.
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
            // No column of a higher rank is shown instead.
            break;
        }
        left = left.saturating_sub(needed);
        shown.push(place);
    }
    shown.sort_unstable();
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_higher_rank_are_dropped_first() {
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
