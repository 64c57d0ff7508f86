// SPDX-License-Identifier: GPL-2.0

//! Details of exits as tables for people.

use std::collections::BTreeSet;

use exitmeter_meter::phase::Phase;

use super::model::{Counts, Group, GroupRow, Vm, Why};
use crate::{
    model::Span,
    numbers::{exact, mean, rough, share, time},
    output::TextOptions,
    paint::{paint, Style},
    report::format_count,
    table::{
        Cell,
        Side::{Left, Right},
        Table,
    },
};

/// Choice of the tables to show.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Show guest code, and not details and exits to user space.
    pub code: bool,
    /// Number of rows of each reason.
    pub limit: usize,
}

/// Titles of the columns.
const EXITS: &str = "exits";
const SHARE: &str = "share";
const KERNEL: &str = "kernel";
const USER: &str = "user";
const MEAN: &str = "mean";
const BOUND: &str = "bound";

/// Format the tables of all VMs.
pub fn text(why: &Why, shown: Shown, options: TextOptions) -> String {
    let host = &why.host;
    let isa = host.isa.name().to_uppercase();
    let mut text = match why.interval {
        Some(interval) => format!("in {} ({isa})\n", time(interval.ticks, host.tsc_khz)),
        None => format!("since details are on ({isa})\n"),
    };
    text += &missing(why.vcpus_without_tables, why.vms.is_empty(), options);
    if shown.code && !why.has_code {
        text += "\nNo code: the snapshot was read without the right to it, or no vCPU ran.\n";
    }
    let mut dropped = BTreeSet::new();
    for vm in &why.vms {
        text += &vm_text(vm, host.tsc_khz, shown, options, &mut dropped);
    }
    text + &no_room(dropped)
}

/// Format the notes on what no table has: vCPUs without tables, or no VM at all.
pub(crate) fn missing(vcpus_without_tables: u32, no_vm_runs: bool, options: TextOptions) -> String {
    let mut text = String::new();
    if vcpus_without_tables != 0 {
        let vcpus = format_count(vcpus_without_tables.into(), "vCPU");
        let line = format!("no memory for the tables of {vcpus}: their exits are not below");
        text += &(paint(&line, Style::Warning, options.color) + "\n");
    }
    if no_vm_runs {
        text += "\nNo VM runs.\n";
    }
    text
}

/// Format the note on the columns that did not fit.
pub(crate) fn no_room(dropped: BTreeSet<String>) -> String {
    if dropped.is_empty() {
        return String::new();
    }
    let columns: Vec<_> = dropped.into_iter().collect();
    format!("\nNo room for: {}.\n--json has all.\n", columns.join(", "))
}

fn vm_text(
    vm: &Vm,
    khz: Option<u32>,
    shown: Shown,
    options: TextOptions,
    dropped: &mut BTreeSet<String>,
) -> String {
    let groups = if shown.code { &vm.code } else { &vm.details };
    let all = groups.iter().fold(Counts::default(), |sum, group| {
        sum.saturating_add(group.total)
    });
    let gone = if vm.gone { ", gone" } else { "" };
    let title = format!(
        "{}, process {}{gone}: {} in {}, {}",
        options.plain(&vm.label()),
        vm.pid,
        format_count(all.exits, "exit"),
        spent(vm.span, khz),
        format_count(vm.vcpus as u64, "vCPU"),
    );
    let mut text = format!("\n{}\n", paint(&title, Style::Strong, options.color));
    if shown.code && vm.vcpus_without_rip != 0 {
        let vcpus = format_count(vm.vcpus_without_rip as u64, "vCPU");
        text += &format!("cannot read the RIP of {vcpus}: encrypted registers\n");
    }
    if vm.vcpus == 0 {
        return text + "No exit since details are on.\n";
    }
    text += &table("about", groups, all, shown.limit, options, dropped);
    if !shown.code && !vm.user_exits.is_empty() {
        let all = vm.user_exits.iter();
        let all = all.fold(Counts::default(), |sum, group| {
            sum.saturating_add(group.total)
        });
        text += &table(
            "to user space",
            &vm.user_exits,
            all,
            shown.limit,
            options,
            dropped,
        );
    }
    text
}

fn spent(span: Span, khz: Option<u32>) -> String {
    time(span.ticks, khz)
}

/// Format the groups of a table: reasons, with their rows below them.
pub(crate) fn table(
    title: &str,
    groups: &[Group],
    all: Counts,
    limit: usize,
    options: TextOptions,
    dropped: &mut BTreeSet<String>,
) -> String {
    if groups.is_empty() {
        return String::new();
    }
    // Collect the columns that the table does not have.
    let mut absent: Vec<&str> = Vec::new();
    if all.kernel.is_none() {
        // The table of exits to user space has a row for each, so it needs no bound.
        absent.extend([KERNEL, BOUND]);
    }
    if all.user.is_none() {
        absent.push(USER);
    }
    let build = |number: fn(u128) -> String| {
        let mut table = Table::new([
            (title, Left),
            (EXITS, Right),
            (SHARE, Right),
            (KERNEL, Right),
            (MEAN, Right),
            (USER, Right),
            (BOUND, Left),
        ]);
        for group in groups {
            let name = Cell::new(group.label.to_string(), Style::Strong);
            table.row(cells(name, group.total, all, "", number));
            for row in group.rows.iter().take(limit) {
                let words = Cell::from(format!("  {}", row.about()));
                table.row(cells(words, row.counts, group.total, &bound(row), number));
            }
            let rest = group.rows.get(limit..).unwrap_or_default();
            if !rest.is_empty() {
                let sum = rest
                    .iter()
                    .fold(Counts::default(), |sum, row| sum.saturating_add(row.counts));
                let words = Cell::from(format!("  {} more", exact(rest.len() as u128)));
                table.row(cells(words, sum, group.total, "", number));
            }
            if !group.others.is_zero() && !group.rows.is_empty() {
                let words = Cell::from("  others".to_owned());
                table.row(cells(words, group.others, group.total, "", number));
            }
        }
        table.hide(&absent);
        table
    };
    let table = Table::fitted(options, &[SHARE, MEAN, USER, BOUND], build);
    dropped.extend(table.dropped().iter().cloned());
    format!("\n{}", table.text(options.color))
}

fn cells(
    name: Cell,
    counts: Counts,
    whole: Counts,
    bound: &str,
    number: fn(u128) -> String,
) -> [Cell; 7] {
    let ticks = counts.kernel.or(counts.user).unwrap_or(0);
    let of = |phase, ticks: Option<u128>| {
        Cell::new(ticks.map_or_else(String::new, number), Style::Phase(phase))
    };
    [
        name,
        number(counts.exits.into()).into(),
        share(counts.exits, whole.exits).into(),
        of(Phase::Kernel, counts.kernel),
        mean(ticks, counts.exits).into(),
        of(Phase::User, counts.user),
        bound.to_owned().into(),
    ]
}

/// Format the bound of a row.
fn bound(row: &GroupRow) -> String {
    if row.exact {
        return "exact".to_owned();
    }
    let ticks = row.missed.kernel.unwrap_or(0);
    format!("+{}, +{} cycles", rough(row.missed.exits), rough(ticks))
}
