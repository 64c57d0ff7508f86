// SPDX-License-Identifier: GPL-2.0

//! Writes docs/selftests.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::{
    allowance::{LIMITS, SPECIAL},
    driver::{AllResults, Compared, Results},
    verdict::{TestRun, Verdict},
};

/// Format the verdicts of several runs: "pass", or "8 pass, 3 fail".
pub fn tally(runs: &[TestRun]) -> String {
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

/// Format the summary of a host, on one line.
pub fn summary(results: &Results) -> String {
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
         {exits} exits in {runs} runs metered, {reasons} counts by test and reason compared with the kernel's \
         histogram; {:.0} min",
        results.host,
        results.cpus,
        if results.cpus == 1 { "" } else { "s" },
        results.tests.len(),
        counts.join(", "),
        results.minutes
    )
}

/// Return the whole document.
pub fn write(all: &AllResults) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = fill(&mut text, all);
    text
}

fn fill(text: &mut String, all: &AllResults) -> std::fmt::Result {
    writeln!(
        text,
        "# KVM's selftests\n\n\
         `make soak-selftests` writes this page; docs/testing.md says what it shows. Linux {}.\n",
        all.release
    )?;
    for results in &all.results {
        writeln!(text, "- {}", summary(results))?;
    }
    if !all.unbuilt.is_empty() {
        writeln!(text, "- Not built: {}", all.unbuilt.join(", "))?;
    }
    writeln!(
        text,
        "\nSeconds are those of the host's clock, with the module. Exits are the metered ones; they equal those of \
         the kernel's histogram, reason by reason. Where a test was repeated because its verdicts differed, the numbers \
         are sums of all its runs.\n"
    )?;
    table(text, all)?;
    for results in &all.results {
        not_passed(text, results)?;
    }
    writeln!(
        text,
        "\n## Arguments and limits\n\n\
         A test gets {} s on Intel and {} s on AMD, and no arguments, unless the table says otherwise. scripts/selftests.sh \
         names the tests whose rounds are cut.\n\n\
         | test | arguments | s on Intel | s on AMD |\n| --- | --- | ---: | ---: |",
        LIMITS[0], LIMITS[1]
    )?;
    for (name, arguments, [intel, amd]) in SPECIAL {
        let arguments = arguments.join(" ");
        writeln!(text, "| {name} | {arguments} | {intel} | {amd} |")?;
    }
    Ok(())
}

fn table(text: &mut String, all: &AllResults) -> std::fmt::Result {
    write!(text, "| test |")?;
    for results in &all.results {
        let host = results.host;
        write!(text, " {host} without | {host} with | exits | s |")?;
    }
    write!(text, "\n| --- |")?;
    for _ in &all.results {
        write!(text, " --- | --- | ---: | ---: |")?;
    }
    writeln!(text)?;
    let names: BTreeSet<&String> = all
        .results
        .iter()
        .flat_map(|results| results.tests.keys())
        .collect();
    for name in names {
        write!(text, "| {name} |")?;
        for results in &all.results {
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

/// Write the tables of the tests that did not pass, with the reasons that the tests themselves give.
fn not_passed(text: &mut String, results: &Results) -> std::fmt::Result {
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
