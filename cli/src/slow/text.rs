// SPDX-License-Identifier: GPL-2.0

//! Slow exits as tables for people.

use std::collections::BTreeSet;

use exitmeter_meter::phase::Phase;

use super::model::{Exit, Ring, Slow, Vm};
use crate::{
    numbers::exact,
    output::TextOptions,
    paint::{paint, Style},
    report::format_count,
    table::{
        Cell,
        Side::{Left, Right},
        Table,
    },
    why::text::{dropped_note, missing_note, NO_EXIT},
};

/// Choice of the exits to show.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    /// Show the rings, and not the slowest exits.
    pub ring: bool,
    /// Number of exits.
    pub limit: usize,
}

/// Titles of columns that may be left out.
const CODE: &str = "code";
const OUTS: &str = "outs";
const HALTED: &str = "halted";
const WAITING: &str = "waiting";
const PREEMPTED: &str = "preempted";
const TO_USER: &str = "to user space";
const VCPU: &str = "vCPU";
const CPU: &str = "CPU";

/// Text for a ring without exits.
const NO_RING: &str = "No exit. Rings are kept only with the module's parameter slow_us.\n";

/// Format the tables of all VMs.
pub fn text(slow: &Slow, shown: Shown, options: TextOptions) -> String {
    let khz = slow.host.tsc_khz;
    let unit = match khz {
        Some(_) => "microseconds",
        None => "TSC ticks",
    };
    let isa = slow.host.isa.name().to_uppercase();
    let mut text = format!("slow exits ({isa}), in {unit}, at times in UTC\n");
    text += &missing_note(slow.vcpus_without_tables, slow.vms.is_empty(), options);
    let mut dropped = BTreeSet::new();
    for vm in &slow.vms {
        text += &vm_text(vm, khz, shown, options, &mut dropped);
    }
    text + &dropped_note(dropped)
}

fn vm_text(
    vm: &Vm,
    khz: Option<u32>,
    shown: Shown,
    options: TextOptions,
    dropped: &mut BTreeSet<String>,
) -> String {
    let vm_title = format!(
        "{}, process {}",
        options.plain(&vm.vmm.label(&vm.name)),
        vm.pid
    );
    let title = |text: &str| format!("\n{}\n", paint(text, Style::Strong, options.color));
    if shown.ring {
        let mut text = String::new();
        for ring in &vm.rings {
            let state = if ring.frozen { "frozen" } else { "not frozen" };
            text += &title(&format!("{vm_title}, vCPU {}: ring, {state}", ring.vcpu));
            let first = ring.exits.len().saturating_sub(shown.limit);
            let exits: Vec<_> = ring.exits.iter().skip(first).collect();
            text += &match exits.is_empty() {
                true => NO_RING.to_owned(),
                false => table(&exits, true, khz, options, dropped),
            };
        }
        if vm.rings.is_empty() {
            text += &(title(&vm_title) + NO_EXIT);
        }
        return text;
    }
    let exits: Vec<_> = vm.slowest.iter().take(shown.limit).collect();
    let of = match vm.slowest.len() {
        all if all > exits.len() => format!(" of {all} that are kept"),
        _ => String::new(),
    };
    let slowest = format_count(exits.len() as u64, "slowest exit");
    let mut text = title(&format!("{vm_title}: {slowest}{of}"));
    text += &table(&exits, false, khz, options, dropped);
    for Ring { vcpu, exits, .. } in vm.rings.iter().filter(|ring| ring.frozen) {
        let Some(culprit) = exits.last() else {
            continue;
        };
        let when = culprit
            .when
            .map_or_else(String::new, |when| format!(" at {}", when.time_of_day()));
        text += &format!(
            "The ring of vCPU {vcpu} is frozen, for {}{when}: --ring shows what led to it.\n",
            culprit.about()
        );
    }
    text
}

fn table(
    exits: &[&Exit],
    is_ring: bool,
    khz: Option<u32>,
    options: TextOptions,
    dropped: &mut BTreeSet<String>,
) -> String {
    if exits.is_empty() {
        return NO_EXIT.to_owned();
    }
    let mut absent = Vec::new();
    if exits.iter().all(|exit| exit.rip.is_none()) {
        absent.push(CODE);
    }
    if exits.iter().all(|exit| exit.exit_reason.is_none()) {
        absent.push(TO_USER);
    }
    if is_ring {
        absent.push(VCPU);
    }
    let build = |_: fn(u128) -> String| {
        let mut table = Table::new([
            ("when", Left),
            (VCPU, Right),
            ("exit", Left),
            (CODE, Left),
            (CPU, Right),
            ("took", Right),
            ("kernel", Right),
            ("user", Right),
            (WAITING, Right),
            (PREEMPTED, Right),
            (HALTED, Right),
            (OUTS, Right),
            (TO_USER, Left),
        ]);
        for exit in exits {
            let mark = match (is_ring, exit.culprit) {
                (true, true) => "> ",
                (true, false) => "  ",
                _ => "",
            };
            let when = exit
                .when
                .map_or_else(|| "-".to_owned(), |when| when.time_of_day());
            let style = match exit.culprit {
                true => Style::Warning,
                false => Style::Plain,
            };
            let ticks = |phase, ticks| Cell::new(length(ticks, khz), Style::Phase(phase));
            table.row([
                Cell::new(format!("{mark}{when}"), style),
                exit.vcpu.to_string().into(),
                Cell::new(exit.about(), style),
                exit.place().unwrap_or_default().into(),
                cpus(exit).into(),
                Cell::new(length(exit.took, khz), Style::Strong),
                ticks(Phase::Kernel, exit.kernel),
                ticks(Phase::User, exit.user),
                ticks(Phase::Waiting, exit.waiting),
                ticks(Phase::Preempted, exit.preempted),
                ticks(Phase::Halted, exit.halted),
                exit.scheduled_out.to_string().into(),
                exit.to_user().unwrap_or_default().into(),
            ]);
        }
        table.hide(&absent);
        table
    };
    let spare = [OUTS, HALTED, WAITING, PREEMPTED, TO_USER, CODE, CPU];
    let table = Table::fitted(options, &spare, build);
    let left_out = table.dropped().iter();
    dropped.extend(
        left_out
            .filter(|title| !absent.contains(&title.as_str()))
            .cloned(),
    );
    table.text(options.color)
}

/// Format ticks in microseconds with a tenth, or as they are if the rate is unknown.
fn length(ticks: u64, khz: Option<u32>) -> String {
    let Some(khz) = khz.filter(|_| ticks != 0) else {
        return exact(ticks);
    };
    let tenths = (u128::from(ticks) * 10_000 + u128::from(khz) / 2) / u128::from(khz);
    format!("{}.{}", exact(tenths / 10), tenths % 10)
}

/// Format the CPUs at exit and entry.
fn cpus(exit: &Exit) -> String {
    let cpu = |cpu: Option<u64>| cpu.map_or_else(|| "?".to_owned(), |cpu| cpu.to_string());
    match (exit.cpu_exit, exit.cpu_entry) {
        (at_exit, at_entry) if at_exit == at_entry => cpu(at_exit),
        (at_exit, at_entry) => format!("{}->{}", cpu(at_exit), cpu(at_entry)),
    }
}
