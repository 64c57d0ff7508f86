// SPDX-License-Identifier: GPL-2.0

//! Details of exits as tables for people.

use std::collections::BTreeSet;

use exitmeter_meter::phase::Phase;

use super::model::{total, Counts, Group, Vm, Why};
use crate::{
    numbers::{exact, mean, share, time},
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

/// Text for a VM without exits.
pub(crate) const NO_EXIT: &str = "No exit since details are on.\n";

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
    text += &missing_note(why.vcpus_without_tables, why.vms.is_empty(), options);
    if shown.code && !why.has_code {
        text += "\nNo code: no vCPU ran, or the snapshot was read without CAP_PERFMON; read it as root.\n";
    }
    let mut dropped = BTreeSet::new();
    for vm in &why.vms {
        text += &vm_text(vm, host.tsc_khz, shown, options, &mut dropped);
    }
    text + &dropped_note(dropped)
}

/// Format the notes on what is in no table: vCPUs without tables, or that no VM runs.
pub(crate) fn missing_note(
    vcpus_without_tables: u32,
    no_vm_runs: bool,
    options: TextOptions,
) -> String {
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
pub(crate) fn dropped_note(dropped: BTreeSet<String>) -> String {
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
    let all = total(groups);
    let gone = if vm.gone { ", gone" } else { "" };
    let title = format!(
        "{}, process {}{gone}: {} in {}, {}",
        options.plain(&vm.label()),
        vm.pid,
        format_count(all.exits, "exit"),
        time(vm.span.ticks, khz),
        format_count(vm.vcpus as u64, "vCPU"),
    );
    let mut text = format!("\n{}\n", paint(&title, Style::Strong, options.color));
    if shown.code && vm.vcpus_without_rip != 0 {
        let vcpus = format_count(vm.vcpus_without_rip as u64, "vCPU");
        text += &format!("cannot read the RIP of {vcpus}: encrypted registers\n");
    }
    if vm.vcpus == 0 {
        return text + NO_EXIT;
    }
    text += &table("about", groups, all, shown.limit, options, dropped);
    if !shown.code && !vm.user_exits.is_empty() {
        let all = total(&vm.user_exits);
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
                table.row(cells(words, row.counts, group.total, &row.bound(), number));
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
