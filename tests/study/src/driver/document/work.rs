// SPDX-License-Identifier: GPL-2.0

//! Tables of the exits that work causes.

use exitmeter::numbers::exact;
use lab::host::Host;

use super::{
    table::{most_frequent, MarkdownTable},
    Study,
};
use crate::plan::{GuestKind, Paging};

/// Pieces of work: name of the mark, and amount.
const WORK: [(&str, &str); 13] = [
    ("idle", "left alone for 1 s"),
    ("compute", "20 million steps of arithmetic"),
    ("timers", "200 sleeps of 1 ms"),
    ("processes", "20 processes made, run and ended"),
    ("memory", "2048 pages of 4 KiB touched first"),
    ("console", "1000 letters to the serial console"),
    (
        "ipi",
        "100 interrupts from one vCPU to the other, which computes",
    ),
    (
        "wake",
        "200 times one thread wakes the other on the other vCPU, and back",
    ),
    (
        "drivers",
        "drivers of disk and network loaded, the network brought up",
    ),
    (
        "write",
        "4 MiB to the disk, in blocks of 64 KiB, past the cache",
    ),
    ("read", "the same read"),
    ("ping", "100 datagrams to the host and back"),
    ("stream", "1 MiB to the host by TCP"),
];

/// Format the table of the exits of each piece of work on a host.
pub fn work(all: &Study<'_>, host: Host) -> String {
    let guests = [
        GuestKind::Microvm,
        GuestKind::Smp,
        GuestKind::Pc,
        GuestKind::Tiny,
    ];
    let runs: Vec<_> = guests
        .into_iter()
        .filter_map(|guest| all.get(host, guest, Paging::Nested))
        .collect();
    let mut titles = vec!["work".to_owned(), "<how much".to_owned()];
    for recorded in &runs {
        titles.extend([recorded.run.guest.title().to_owned(), "<leading".to_owned()]);
    }
    let mut table = MarkdownTable::new(titles);
    for (name, amount) in WORK {
        let cells = runs.iter().flat_map(|recorded| match recorded.stage(name) {
            Some(stage) => [exact(stage.ledger.exits), most_frequent(&stage.ledger, 2)],
            None => [String::new(), String::new()],
        });
        table.row(
            [name.to_owned(), amount.to_owned()]
                .into_iter()
                .chain(cells),
        );
    }
    table.text()
}

/// Format the table of the loops around one instruction: all exits, and kernel and VMM cycles of one iteration.
pub fn loops(all: &Study<'_>) -> String {
    let ways = [
        (Host::Intel, Paging::Nested, "Intel"),
        (Host::Intel, Paging::Shadow, "Intel, shadow"),
        (Host::Amd, Paging::Nested, "AMD"),
        (Host::Amd, Paging::Shadow, "AMD, shadow"),
    ];
    let runs: Vec<_> = ways
        .into_iter()
        .filter_map(|(host, paging, name)| Some((all.get(host, GuestKind::Loops, paging)?, name)))
        .collect();
    let titles = runs
        .iter()
        .flat_map(|(_, name)| [format!("{name}: exits"), "cycles each".to_owned()]);
    let mut table = MarkdownTable::new(["2000 times".to_owned()].into_iter().chain(titles));
    let Some((first, _)) = runs.first() else {
        return table.text();
    };
    for stage in &first.stages {
        let cells = runs
            .iter()
            .flat_map(|(recorded, _)| match recorded.stage(&stage.name) {
                Some(stage) => {
                    let cycles = stage.ledger.cycles;
                    let each = (cycles.kernel + cycles.user) / crate::in_host::LOOPS as u128;
                    [exact(stage.ledger.exits), exact(each)]
                }
                None => [String::new(), String::new()],
            });
        table.row([stage.name.clone()].into_iter().chain(cells));
    }
    table.text()
}
