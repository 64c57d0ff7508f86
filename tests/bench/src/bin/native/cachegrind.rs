// SPDX-License-Identifier: GPL-2.0

//! Counts the instructions, memory accesses, cache misses and branches of one exit and entry with
//! valgrind's cachegrind, which simulates a cache of its own.

use std::{
    collections::BTreeMap,
    env,
    process::{Command, Stdio},
};

use anyhow::{ensure, Context as _, Result};

/// Exits of the short run and of the long one. Their difference is counted, so start and end cancel out.
const EXITS: [u32; 2] = [10_000, 110_000];

/// Cachegrind's events and their descriptions.
const EVENTS: [(&str, &str); 9] = [
    ("Ir", "instructions"),
    ("Dr", "reads"),
    ("Dw", "writes"),
    ("D1mr", "reads that miss the first cache"),
    ("D1mw", "writes that miss the first cache"),
    ("I1mr", "instructions that miss the first cache"),
    ("Bc", "conditional branches"),
    ("Bcm", "of these, mispredicted"),
    ("Bim", "indirect branches mispredicted"),
];

/// Print the events of one exit and entry.
pub fn count() -> Result<()> {
    let [few, many] = EXITS.map(events);
    let (few, many) = (few?, many?);
    println!("One exit and entry, the ledger alone, by cachegrind:");
    for (name, words) in EVENTS {
        let [few, many] = [&few, &many].map(|events| events.get(name).copied());
        let (few, many) = few.zip(many).with_context(|| format!("no event {name}"))?;
        let one = many.saturating_sub(few) as f64 / f64::from(EXITS[1] - EXITS[0]);
        println!("{words:40} {one:8.3}");
    }
    Ok(())
}

/// Run `exits` exits under cachegrind and return its events.
fn events(exits: u32) -> Result<BTreeMap<String, u64>> {
    let output = Command::new("valgrind")
        .args(["--tool=cachegrind", "--cache-sim=yes", "--branch-sim=yes"])
        // This program prints nothing itself. A file would be left behind if a signal ended the count.
        .arg("--cachegrind-out-file=/dev/stdout")
        .arg(env::current_exe()?)
        .args(["--exits", &exits.to_string()])
        .stderr(Stdio::null())
        .output()
        .context("cannot run valgrind: install Debian's package valgrind")?;
    let status = output.status;
    ensure!(status.success(), "valgrind ended with {status}");
    let text = String::from_utf8(output.stdout)?;
    let line = |key| text.lines().find_map(|line: &str| line.strip_prefix(key));
    let names = line("events: ").context("cachegrind names no events")?;
    let sums = line("summary: ").context("cachegrind gives no sums")?;
    names
        .split_whitespace()
        .zip(sums.split_whitespace())
        .map(|(name, sum)| Ok((name.to_owned(), sum.parse()?)))
        .collect()
}
