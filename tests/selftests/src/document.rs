// SPDX-License-Identifier: GPL-2.0

//! The table of docs/selftests.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::{
    allowance::{LIMITS, SPECIAL},
    outside::{Compared, Results, Soak},
    verdict::{Ended, Verdict},
};

/// The verdicts of several runs: "pass", or "8 pass, 3 fail".
pub fn tally(runs: &[Ended]) -> String {
    let mut counts: BTreeMap<Verdict, usize> = BTreeMap::new();
    for run in runs {
        *counts.entry(run.verdict).or_default() += 1;
    }
    match counts.len() {
        0 => "not run".to_owned(),
        1 if runs.len() == 1 => runs[0].verdict.to_string(),
        _ => counts
            .iter()
            .map(|(verdict, count)| format!("{count} {verdict}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// One line that sums up a host.
pub fn sum(results: &Results) -> String {
    let mut counts: BTreeMap<Verdict, usize> = BTreeMap::new();
    let (mut exits, mut reasons, mut runs, mut random) = (0, 0, 0, 0);
    for compared in results.tests.values() {
        if let Some(first) = compared.with.first() {
            *counts.entry(first.verdict).or_default() += 1;
        }
        random += usize::from(compared.is_random());
        runs += compared.with.len();
        exits += compared.with.iter().map(|run| run.exits).sum::<u64>();
        reasons += compared.with.iter().map(|run| run.reasons).sum::<usize>();
    }
    let counts: Vec<String> = counts
        .iter()
        .map(|(verdict, count)| format!("{count} {verdict}"))
        .collect();
    format!(
        "{}, {} CPU{}: {} tests, with the module {}; {random} of them random without it; \
         {exits} exits in {runs} runs metered, {reasons} counts by test and reason held against the kernel's \
         histogram; {:.0} min",
        results.host,
        results.cpus,
        if results.cpus == 1 { "" } else { "s" },
        results.tests.len(),
        counts.join(", "),
        results.minutes
    )
}

/// The whole document.
pub fn write(soak: &Soak) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = fill(&mut text, soak);
    text
}

fn fill(text: &mut String, soak: &Soak) -> std::fmt::Result {
    writeln!(
        text,
        "# KVM's selftests\n\n\
         Written by `make soak-selftests`; docs/testing.md says what it shows. Linux {}.\n",
        soak.release
    )?;
    for results in &soak.results {
        writeln!(text, "- {}", sum(results))?;
    }
    if !soak.unbuilt.is_empty() {
        writeln!(text, "- Not built: {}", soak.unbuilt.join(", "))?;
    }
    writeln!(
        text,
        "\nSeconds are those of the host's clock, with the module. Exits are those that were metered, which are those of \
         the kernel's histogram, reason by reason. Where a test was repeated because its verdicts differed, all its runs \
         are counted.\n"
    )?;
    table(text, soak)?;
    for results in &soak.results {
        reasons(text, results)?;
    }
    writeln!(
        text,
        "\n## Arguments and limits\n\n\
         A test gets {} s on Intel and {} s on AMD, and no arguments; these get something of their own. scripts/selftests.sh \
         names those that have their rounds cut.\n\n\
         | test | arguments | s on Intel | s on AMD |\n| --- | --- | ---: | ---: |",
        LIMITS[0], LIMITS[1]
    )?;
    for (name, arguments, [intel, amd]) in SPECIAL {
        let arguments = arguments.join(" ");
        writeln!(text, "| {name} | {arguments} | {intel} | {amd} |")?;
    }
    Ok(())
}

fn table(text: &mut String, soak: &Soak) -> std::fmt::Result {
    write!(text, "| test |")?;
    for results in &soak.results {
        let host = results.host;
        write!(text, " {host} without | {host} with | exits | s |")?;
    }
    write!(text, "\n| --- |")?;
    for _ in &soak.results {
        write!(text, " --- | --- | ---: | ---: |")?;
    }
    writeln!(text)?;
    let names: BTreeSet<&String> = soak
        .results
        .iter()
        .flat_map(|results| results.tests.keys())
        .collect();
    for name in names {
        write!(text, "| {name} |")?;
        for results in &soak.results {
            match results.tests.get(name) {
                Some(compared) => cells(text, compared)?,
                None => write!(text, " | | | |")?,
            }
        }
        writeln!(text)?;
    }
    Ok(())
}

fn cells(text: &mut String, compared: &Compared) -> std::fmt::Result {
    let exits: u64 = compared.with.iter().map(|run| run.exits).sum();
    let seconds: f64 = compared.with.iter().map(|run| run.seconds).sum();
    write!(
        text,
        " {} | {} | {exits} | {seconds:.1} |",
        tally(&compared.without),
        tally(&compared.with)
    )
}

/// Why tests did not pass, in their own words.
fn reasons(text: &mut String, results: &Results) -> std::fmt::Result {
    for (verdicts, title) in [
        (
            &[
                Verdict::Fail,
                Verdict::TimedOut,
                Verdict::Warn,
                Verdict::Fault,
                Verdict::Lost,
            ][..],
            "fail both ways, or end their host",
        ),
        (&[Verdict::Skip], "skip themselves"),
    ] {
        let chosen: Vec<_> = results
            .tests
            .iter()
            .filter_map(|(name, compared)| {
                let runs = compared.without.iter().chain(&compared.with);
                let run = runs.clone().find(|run| verdicts.contains(&run.verdict))?;
                Some((name, run))
            })
            .collect();
        if chosen.is_empty() {
            continue;
        }
        writeln!(text, "\n## {}: those that {title}\n", results.host)?;
        writeln!(
            text,
            "| test | verdict | in its own words |\n| --- | --- | --- |"
        )?;
        for (name, run) in chosen {
            let why = run.why.replace('|', "\\|");
            writeln!(text, "| {name} | {} | {why} |", run.verdict)?;
        }
    }
    Ok(())
}
