// SPDX-License-Identifier: GPL-2.0

//! Results as text.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    environment::{Environment, Frequency},
    model::{Check, Cost, Results, Verdict},
    statistics::Summary,
};
use crate::{
    numbers::exact,
    output::TextOptions,
    paint::{paint, Style},
    table::{
        Side::{Left, Right},
        Table,
    },
};

/// Format the line of a check.
pub fn check(check: &Check, options: TextOptions) -> String {
    let (word, style) = match check.verdict {
        Verdict::Passed => ("ok      ", Style::Plain),
        Verdict::Failed => ("FAILED  ", Style::Warning),
        Verdict::NotMade => ("not made", Style::Title),
    };
    format!(
        "{}  {}: {}\n",
        paint(word, style, options.color),
        check.name,
        check.text
    )
}

/// Format the first line, with kernel and CPU.
pub fn opening(environment: &Environment) -> String {
    let Environment { kernel, cpu, .. } = environment;
    let nested = match &cpu.hypervisor {
        Some(hypervisor) => format!(", itself a guest of {hypervisor}"),
        None => String::new(),
    };
    let isa = environment.isa.to_uppercase();
    format!("Linux {kernel} on {}, {isa}{nested}\n\n", cpu.name)
}

/// Format a number of ticks, rounded.
fn round(number: f64) -> String {
    if !number.is_finite() {
        return "-".to_owned();
    }
    let sign = if number.round() < 0.0 { "-" } else { "" };
    // Ticks of one exit fit by far.
    format!("{sign}{}", exact(number.abs().round() as u64))
}

fn optional(number: Option<f64>) -> String {
    number.map_or_else(|| "-".to_owned(), round)
}

/// Format the minimum and the maximum.
fn spread(summary: &Summary) -> String {
    format!("{} to {}", round(summary.min), round(summary.max))
}

/// Format the ticks that are added to an exit, and their spread.
fn added(summary: Option<&Summary>) -> [String; 2] {
    match summary {
        Some(summary) => [
            format!("+{}", round(summary.median)).replace("+-", "-"),
            spread(summary),
        ],
        None => ["-", "-"].map(str::to_owned),
    }
}

/// Format the costs.
pub fn cost(cost: &Cost, options: TextOptions) -> String {
    let mut text = String::new();
    if cost.kinds.is_empty() {
        return text;
    }
    let megahertz = |khz: u64| format!("{} MHz", exact(khz / 1000));
    let clock = match (&cost.governor, cost.cpu_khz) {
        (Some(governor), Some(khz)) => format!("governor {governor}, {}", megahertz(khz)),
        (Some(governor), None) => format!("governor {governor}"),
        (None, Some(khz)) => megahertz(khz),
        (None, None) => "frequency unknown".to_owned(),
    };
    let tsc = match cost.tsc_khz {
        Some(khz) => megahertz(khz.into()),
        None => "unknown".to_owned(),
    };
    let _ = writeln!(
        text,
        "\nOne exit on CPU {} ({clock}; TSC {tsc}): medians of {} runs of {} exits\n",
        cost.cpu,
        cost.runs,
        exact(cost.exits)
    );
    let mut table = Table::new([
        ("exit", Left),
        ("ns", Right),
        ("cycles", Right),
        ("spread", Right),
        ("guest", Right),
        ("kernel", Right),
        ("user", Right),
        ("metering", Right),
        ("its spread", Right),
        ("details", Right),
        ("their spread", Right),
    ]);
    for kind in &cost.kinds {
        let [metering, metering_spread] = added(kind.metering_adds.as_ref());
        let [details, details_spread] = added(kind.details_add.as_ref());
        table.row([
            kind.kind.to_owned(),
            optional(kind.ns),
            round(kind.ticks.median),
            spread(&kind.ticks),
            optional(kind.guest),
            optional(kind.kernel),
            optional(kind.user),
            metering,
            metering_spread,
            details,
            details_spread,
        ]);
    }
    if cost.kinds.iter().all(|kind| kind.metering_adds.is_none()) {
        table.hide(&["metering", "its spread"]);
    }
    if cost.kinds.iter().all(|kind| kind.details_add.is_none()) {
        table.hide(&["details", "their spread"]);
    }
    text += &table.text(options.color);
    if let Some(switch) = cost.world_switch {
        let ns = cost.tsc_khz.map(|khz| switch * 1e6 / f64::from(khz));
        let ns = ns.map_or_else(String::new, |ns| format!(" ({} ns)", round(ns)));
        let _ = writeln!(
            text,
            "\nOne world switch takes {} cycles{ns}, which the guest phase holds: there and back, of INVD.",
            round(switch)
        );
    }
    if let Some(remark) = &cost.remark {
        let _ = writeln!(text, "\nNote: {remark}.");
    }
    text
}

/// Format the last line.
pub fn summary(results: &Results, options: TextOptions) -> String {
    let [passed, failed, not_made] =
        [Verdict::Passed, Verdict::Failed, Verdict::NotMade].map(|verdict| results.count(verdict));
    let text = format!("{passed} passed, {failed} failed, {not_made} not made");
    let style = match failed {
        0 => Style::Strong,
        _ => Style::Warning,
    };
    format!("\n{}\n", paint(&text, style, options.color))
}

/// Format the report to attach to an issue, with all results.
pub fn report(results: &Results) -> String {
    let options = TextOptions::default();
    let mut text = format!("exitmeter verify {}\n\n", results.environment.tool);
    text += &environment(&results.environment);
    text.push('\n');
    for one in &results.checks {
        text += &check(one, options);
    }
    text += &cost(&results.cost, options);
    text += &summary(results, options);
    let _ = write!(
        text,
        "\nThe line for docs/hardware.md:\n{}\n",
        hardware_line(results)
    );
    text
}

/// Format the environment, one line for each item.
fn environment(environment: &Environment) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12}  {value}");
    };
    let Environment { cpu, tsc, .. } = environment;
    line(
        "kernel",
        format!("{} {}", environment.kernel, environment.kernel_version),
    );
    line("command line", or_dash(environment.command_line.join(" ")));
    let [family, model, stepping] = &cpu.model;
    line("CPU", format!("{}, {}", cpu.name, cpu.vendor));
    line(
        "",
        format!(
            "family {family}, model {model}, stepping {stepping}, microcode {}; {} online, SMT {}",
            cpu.microcode,
            cpu.online,
            cpu.smt.as_deref().unwrap_or("unknown")
        ),
    );
    let hypervisor = match &cpu.hypervisor {
        Some(name) => format!("{name}: this host is a guest, and its VMs are nested"),
        None => "none".to_owned(),
    };
    line("hypervisor", hypervisor);
    let khz = tsc.khz.map_or_else(
        || "frequency unknown".to_owned(),
        |khz| format!("{} kHz", exact(khz)),
    );
    let stable = if tsc.stable {
        "stable"
    } else {
        "marked unstable"
    };
    line(
        "TSC",
        format!(
            "{khz}, {stable}, {}; clock source {}",
            tsc.flags.join(" "),
            tsc.clocksource.as_deref().unwrap_or("unknown")
        ),
    );
    let Frequency {
        khz,
        range,
        governor,
        driver,
    } = &environment.frequency;
    let mut words = Vec::new();
    words.extend(khz.map(|khz| format!("{} kHz", exact(khz))));
    words.extend(range.map(|[least, most]| format!("{} to {}", exact(least), exact(most))));
    words.extend(governor.as_ref().map(|name| format!("governor {name}")));
    words.extend(driver.as_ref().map(|name| format!("driver {name}")));
    line("frequency", or_dash(words.join(", ")));
    line(
        "extension",
        format!(
            "{}, {} nested paging",
            environment.isa,
            if environment.nested_paging {
                "with"
            } else {
                "without"
            }
        ),
    );
    for (module, parameters) in &environment.kvm {
        line(module, pairs(parameters));
    }
    line("exitmeter", pairs(&environment.module));
    for (fault, state) in &environment.mitigations {
        line("mitigation", format!("{fault}: {state}"));
    }
    text
}

fn or_dash(text: String) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

fn pairs(values: &BTreeMap<String, String>) -> String {
    let pairs = values.iter().map(|(name, value)| format!("{name}={value}"));
    or_dash(pairs.collect::<Vec<_>>().join(" "))
}

/// Format the line for the table in docs/hardware.md.
pub fn hardware_line(results: &Results) -> String {
    let Results {
        environment, cost, ..
    } = results;
    let kind = |name: &str| cost.kinds.iter().find(|kind| kind.kind == name);
    let cell = |name: &str| {
        let Some(kind) = kind(name) else {
            return "-".to_owned();
        };
        let adds = kind.metering_adds.as_ref();
        let adds = adds.map_or_else(String::new, |adds| {
            format!(" +{}", round(adds.median)).replace("+-", "-")
        });
        format!("{}{adds}", round(kind.ticks.median))
    };
    let tsc = cost.tsc_khz.map_or_else(
        || "?".to_owned(),
        |khz| format!("{:.2}", f64::from(khz) / 1e6),
    );
    let checks = match results.count(Verdict::Failed) {
        0 => format!("{} passed", results.count(Verdict::Passed)),
        failed => format!("{failed} FAILED"),
    };
    let vulnerable = environment.vulnerable().len();
    let cells = [
        environment.cpu.name.replace('|', "/"),
        environment
            .cpu
            .hypervisor
            .clone()
            .unwrap_or_else(|| "-".to_owned()),
        environment.kernel.clone(),
        format!("{vulnerable} open"),
        tsc,
        checks,
        cell("CPUID"),
        cell("WRMSR, fastpath"),
        cell("OUT to user space"),
        cell("page fault"),
        optional(cost.world_switch),
    ];
    format!("| {} | |", cells.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::model::{KindCost, FORMAT};

    fn results() -> Results {
        let summary = |numbers: &[f64]| Summary::of(numbers);
        Results {
            format: FORMAT,
            passed: false,
            checks: vec![
                Check::new("counts: CPUID", Verdict::Passed, "505 exits"),
                Check::new("ledger", Verdict::Failed, "99 ticks of 100"),
                Check::new("details", Verdict::NotMade, "no right"),
            ],
            cost: Cost {
                cpu: 1,
                runs: 3,
                exits: 20_000,
                tsc_khz: Some(2_000_000),
                kinds: vec![KindCost {
                    kind: "CPUID",
                    ticks: summary(&[1200.0, 1250.4, 1300.0]).expect("numbers"),
                    ns: Some(625.2),
                    guest: Some(700.0),
                    kernel: Some(550.0),
                    user: Some(f64::NAN),
                    metering_adds: summary(&[60.0, 70.0, -2.0]),
                    details_add: None,
                }],
                world_switch: Some(690.0),
                ..Cost::default()
            },
            environment: Environment {
                kernel: "7.3.4".to_owned(),
                ..Environment::default()
            },
        }
    }

    #[test]
    fn checks_are_listed_and_counted() {
        let (results, options) = (results(), TextOptions::default());
        let lines: String = results
            .checks
            .iter()
            .map(|one| check(one, options))
            .collect();
        assert_eq!(
            lines,
            "ok        counts: CPUID: 505 exits\nFAILED    ledger: 99 ticks of 100\n\
             not made  details: no right\n"
        );
        assert_eq!(
            summary(&results, options),
            "\n1 passed, 1 failed, 1 not made\n"
        );
    }

    #[test]
    fn table_omits_unmeasured_columns() {
        let text = cost(&results().cost, TextOptions::default());
        assert_eq!(
            text,
            "\n\
One exit on CPU 1 (frequency unknown; TSC 2,000 MHz): medians of 3 runs of 20,000 exits

exit    ns  cycles          spread  guest  kernel  user  metering  its spread
CPUID  625   1,250  1,200 to 1,300    700     550     -       +60    -2 to 70

One world switch takes 690 cycles (345 ns), which the guest phase holds: there and back, of INVD.
"
        );
        assert_eq!(cost(&Cost::default(), TextOptions::default()), "");
    }

    #[test]
    fn hardware_line_has_the_measured_numbers() {
        assert_eq!(
            hardware_line(&results()),
            "|  | - | 7.3.4 | 0 open | 2.00 | 1 FAILED | 1,250 +60 | - | - | - | 690 | |"
        );
    }
}
