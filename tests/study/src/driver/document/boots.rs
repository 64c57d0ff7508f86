// SPDX-License-Identifier: GPL-2.0

//! Tables of boots and reboots: their exits, how the number grows, and the reasons.

use std::{cmp::Reverse, collections::BTreeMap};

use exitmeter::{model::Ledger, numbers::exact};
use lab::host::Host;

use super::{
    super::recorded::{self, Recorded, Stage},
    table::{count, percent, MarkdownTable},
    Study,
};

/// Format the table of all runs.
pub fn runs(all: &Study<'_>) -> String {
    let dates = recorded::dates(all.folder);
    let mut table = MarkdownTable::new([
        "run",
        "<recorded",
        "<host",
        "<KVM",
        "exits",
        "s of the host",
        "file, kB",
    ]);
    for recorded in all.recorded {
        let run = recorded.run;
        let about = |name: &str| recorded.about.get(name).cloned().unwrap_or_default();
        let date = dates.get(&run.to_string()).cloned().unwrap_or_default();
        let (end, exits) = recorded.growth.last().copied().unwrap_or_default();
        table.row([
            format!("[{run}](study/{run}-rate.svg)"),
            date,
            format!("{}, Linux {}", about("cpu"), about("kernel")),
            run.kvm_parameters().to_owned(),
            exact(exits),
            format!("{end:.1}"),
            (recorded.size / 1000).to_string(),
        ]);
    }
    table.text()
}

/// Format the table of boots and reboots.
pub fn boots(all: &Study<'_>) -> String {
    let mut table = MarkdownTable::new([
        "run",
        "boot, exits",
        "s",
        "exits/s",
        "of it in KVM",
        "reboot, exits",
        "s",
        "idle, exits/s",
    ]);
    for (recorded, boot) in all.linux(None) {
        let stage = |name: &str| recorded.stage(name);
        let exits = |stage: &Stage| exact(stage.ledger.exits);
        let rate = |stage: &Stage| format!("{:.0}", stage.ledger.exits as f64 / stage.seconds());
        let seconds = |stage: &Stage| format!("{:.2}", stage.seconds());
        table.row([
            recorded.run.title(),
            exits(boot),
            seconds(boot),
            rate(boot),
            match recorded.run.counts_instructions() {
                true => percent(boot.ledger.cycles.kernel, boot.ledger.cycles.sum()),
                false => String::new(),
            },
            stage("reboot").map(exits).unwrap_or_default(),
            stage("reboot").map(seconds).unwrap_or_default(),
            stage("idle").map(rate).unwrap_or_default(),
        ]);
    }
    table.text()
}

/// Format the table that shows if exits come at a steady rate: their share up to each fifth of the boot's time, and the
/// busiest tenth of a second.
pub fn growth(all: &Study<'_>) -> String {
    let mut table = MarkdownTable::new([
        "run",
        "1/5",
        "2/5",
        "3/5",
        "4/5",
        "busiest 0.1 s, exits",
        "at, s",
        "times the mean",
        "quietest 0.1 s, exits",
    ]);
    for (recorded, boot) in all.linux(None) {
        let (from, to) = boot.span;
        let at = |time: f64| recorded.exits_at(time) - recorded.exits_at(from);
        let fifth = |part: f64| {
            let share = at(from + (to - from) * part / 5.0) / at(to).max(1.0);
            format!("{:.0}%", share * 100.0)
        };
        let tenths = tenths(recorded, boot);
        let busiest = tenths
            .iter()
            .max_by_key(|(_, exits)| *exits)
            .copied()
            .unwrap_or_default();
        let quietest = tenths
            .iter()
            .map(|(_, exits)| *exits)
            .min()
            .unwrap_or_default();
        let mean = at(to) / (to - from) / 10.0;
        table.row([
            recorded.run.title(),
            fifth(1.0),
            fifth(2.0),
            fifth(3.0),
            fifth(4.0),
            exact(busiest.1),
            format!("{:.1}", busiest.0),
            format!("{:.1}", busiest.1 as f64 / mean),
            exact(quietest),
        ]);
    }
    table.text()
}

/// Return the exits in each whole tenth of a second of a stage, with its start since the stage began.
fn tenths(recorded: &Recorded, stage: &Stage) -> Vec<(f64, u64)> {
    let (from, to) = stage.span;
    let whole = ((to - from) * 10.0) as u32;
    (0..whole)
        .map(|place| {
            let at = f64::from(place) / 10.0;
            let exits = recorded.exits_at(from + at + 0.1) - recorded.exits_at(from + at);
            (at, exits.round() as u64)
        })
        .collect()
}

/// Format the table of exits by reason in the boots of a host.
pub fn reasons(all: &Study<'_>, host: Host) -> String {
    let boots = all.linux(Some(host));
    let ledgers: Vec<&Ledger> = boots.iter().map(|(_, boot)| &boot.ledger).collect();
    let titles = boots.iter().map(|(recorded, _)| {
        let title = recorded.run.title();
        title
            .split_once(", ")
            .map_or(title.clone(), |(_, guest)| guest.to_owned())
    });
    let mut table = MarkdownTable::new(
        ["code".to_owned(), "<reason".to_owned()]
            .into_iter()
            .chain(titles),
    );
    let mut labels = BTreeMap::new();
    for row in ledgers
        .iter()
        .flat_map(|ledger| &ledger.reasons)
        .filter(|row| row.exits > 0)
    {
        labels.entry(row.label.key()).or_insert((row.label, 0)).1 += row.exits;
    }
    let mut labels: Vec<_> = labels.into_values().collect();
    labels.sort_by_key(|(label, exits)| (Reverse(*exits), label.key()));
    for (label, _) in labels {
        let code = label.code.map(|code| code.to_string()).unwrap_or_default();
        let cells = ledgers.iter().map(|ledger| {
            let exits = ledger.row(&label).map_or(0, |row| row.exits);
            match exits * 100 >= ledger.exits {
                true => format!("{} ({})", exact(exits), percent(exits, ledger.exits)),
                false => count(exits),
            }
        });
        table.row([code, label.to_string()].into_iter().chain(cells));
    }
    let sums = ledgers.iter().map(|ledger| exact(ledger.exits));
    table.row([String::new(), "all".to_owned()].into_iter().chain(sums));
    table.text()
}
