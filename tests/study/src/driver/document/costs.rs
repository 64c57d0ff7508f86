// SPDX-License-Identifier: GPL-2.0

//! Tables of the cost of exits, and of the effect of shadow paging.

use std::{cmp::Reverse, collections::BTreeMap};

use exitmeter::{
    model::{Label, Ledger, ReasonRow},
    numbers::{exact, rough},
};
use lab::host::Host;

use super::{
    table::{by_frequency, mean_kernel_cycles, percent, MarkdownTable},
    Study,
};
use crate::plan::{GuestKind, Paging};

/// Exits below which a mean is left to chance.
const ENOUGH: u64 = 5;

/// Format the table of the most and least frequent and costly reasons in the boots.
pub fn extremes(all: &Study<'_>) -> String {
    let mut table = MarkdownTable::new([
        "run",
        "<most frequent",
        "<least frequent",
        "<most costly in all",
        "<most costly each",
        "<least costly each",
    ]);
    for (recorded, boot) in all.linux(None) {
        let ledger = &boot.ledger;
        let rows = by_frequency(ledger);
        let rarest = rows.last().map_or(0, |row| row.exits);
        let rare: Vec<_> = rows
            .iter()
            .filter(|row| row.exits == rarest)
            .map(|row| row.label.to_string())
            .collect();
        let costly = rows.iter().max_by_key(|row| row.cycles.kernel);
        let enough = || rows.iter().filter(|row| row.exits >= ENOUGH);
        let by_mean = |one: &&ReasonRow, other: &&ReasonRow| {
            mean_kernel_cycles(one).total_cmp(&mean_kernel_cycles(other))
        };
        let each = |row: Option<&ReasonRow>| {
            row.filter(|_| recorded.run.counts_instructions())
                .map(|row| {
                    format!(
                        "{} {}",
                        row.label,
                        exact(mean_kernel_cycles(row).round() as u64)
                    )
                })
                .unwrap_or_default()
        };
        table.row([
            recorded.run.title(),
            rows.first()
                .map(|row| format!("{} {}", row.label, percent(row.exits, ledger.exits)))
                .unwrap_or_default(),
            format!("{} ({rarest})", rare.join(", ")),
            costly
                .filter(|_| recorded.run.counts_instructions())
                .map(|row| {
                    format!(
                        "{} {}",
                        row.label,
                        percent(row.cycles.kernel, ledger.cycles.kernel)
                    )
                })
                .unwrap_or_default(),
            each(enough().max_by(by_mean)),
            each(enough().min_by(by_mean)),
        ]);
    }
    table.text()
}

/// Format the tables of kernel and VMM cycles of single exits by reason. They show the boots of one-vCPU guests with nested
/// paging on hosts whose TSC counts instructions.
pub fn costs(all: &Study<'_>) -> String {
    let mut text = String::new();
    for (host, name) in [(Host::Intel, "Intel"), (Host::Amd, "AMD")] {
        let boots: Vec<_> = all
            .linux(Some(host))
            .into_iter()
            .filter(|(recorded, _)| {
                let run = recorded.run;
                run.paging == Paging::Nested
                    && !matches!(run.guest, GuestKind::Smp | GuestKind::Cloud)
                    && run.counts_instructions()
            })
            .collect();
        if boots.is_empty() {
            continue;
        }
        let titles = boots.iter().flat_map(|(recorded, _)| {
            let guest = recorded.run.guest.title();
            [
                format!("{guest}: kernel, mean"),
                "share".to_owned(),
                "p99".to_owned(),
                "VMM, mean".to_owned(),
            ]
        });
        let mut table = MarkdownTable::new([format!("{name}, reason")].into_iter().chain(titles));
        for label in labels(boots.iter().map(|(_, boot)| &boot.ledger)) {
            let cells = boots.iter().flat_map(|(_, boot)| {
                let Some(row) = boot.ledger.row(&label).filter(|row| row.exits > 0) else {
                    return [const { String::new() }; 4];
                };
                let p99 = row.spread.and_then(|spread| spread.quantile(99));
                let user = row.cycles.user / u128::from(row.exits);
                [
                    exact(mean_kernel_cycles(row).round() as u64),
                    percent(row.cycles.kernel, boot.ledger.cycles.kernel),
                    p99.map(rough).unwrap_or_default(),
                    if user == 0 {
                        String::new()
                    } else {
                        exact(user)
                    },
                ]
            });
            table.row([label.to_string()].into_iter().chain(cells));
        }
        text = text + &table.text() + "\n";
    }
    text
}

/// Return the reasons in ledgers, ordered by the sum of their kernel cycles, largest first.
fn labels<'a>(ledgers: impl Iterator<Item = &'a Ledger>) -> Vec<Label> {
    let mut labels = BTreeMap::new();
    for row in ledgers
        .flat_map(|ledger| &ledger.reasons)
        .filter(|row| row.exits > 0)
    {
        labels.entry(row.label.key()).or_insert((row.label, 0)).1 += row.cycles.kernel;
    }
    let mut labels: Vec<_> = labels.into_values().collect();
    labels.sort_by_key(|(label, cycles)| (Reverse(*cycles), label.key()));
    labels.into_iter().map(|(label, _)| label).collect()
}

/// Format the tables that compare nested with shadow paging: boots, and the work that creates and fills page tables.
pub fn paging(all: &Study<'_>) -> String {
    let mut text = String::new();
    for guest in [GuestKind::Microvm, GuestKind::Tiny] {
        let get = |paging| all.get(Host::Intel, guest, paging);
        let (Some(nested), Some(shadow)) = (get(Paging::Nested), get(Paging::Shadow)) else {
            continue;
        };
        let mut titles = vec![format!("Intel, {}", guest.title())];
        let stages = ["boot", "processes", "memory", "reboot"];
        for stage in stages {
            titles.extend([format!("{stage}: EPT"), "shadow".to_owned()]);
        }
        let mut table = MarkdownTable::new(titles);
        let ledgers: Vec<&Ledger> = stages
            .into_iter()
            .flat_map(|stage| [nested.stage(stage), shadow.stage(stage)])
            .flatten()
            .map(|stage| &stage.ledger)
            .collect();
        for label in labels(ledgers.iter().copied()) {
            let exits = |ledger: &&Ledger| ledger.row(&label).map_or(0, |row| row.exits);
            if ledgers.iter().all(|ledger| exits(ledger) < 20) {
                continue;
            }
            let cells = ledgers.iter().map(|ledger| exact(exits(ledger)));
            table.row([label.to_string()].into_iter().chain(cells));
        }
        let all = ledgers
            .iter()
            .map(|ledger| format!("**{}**", exact(ledger.exits)));
        table.row(["**all exits**".to_owned()].into_iter().chain(all));
        let kernel = ledgers.iter().map(|ledger| rough(ledger.cycles.kernel));
        table.row(["kernel cycles".to_owned()].into_iter().chain(kernel));
        let cycles = ledgers.iter().map(|ledger| rough(ledger.cycles.sum()));
        table.row(["all cycles".to_owned()].into_iter().chain(cycles));
        text = text + &table.text() + "\n";
    }
    text
}
