// SPDX-License-Identifier: GPL-2.0

//! Tests the rules and metrics with Debian's promtool, and compares them with docs/fleet.md.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    process::{Command, Output},
};

use exitmeter::{export::exposition::Format, stop::Stop};
use fleet::{
    boards::{BOARDS, FOLDER},
    hosts::{recording_paths, Hosts},
    prometheus::{programs, RULES},
    recording::Recording,
    tiers::federation,
};
use promql_parser::{
    parser::Expr,
    util::{walk_expr, ExprVisitor},
};

const DOCS: &str = include_str!("../../../docs/fleet.md");

fn promtool(arguments: &[&str], input: Option<File>) -> Output {
    let programs = programs(&Stop::default()).unwrap();
    let mut command = Command::new(programs.join("promtool"));
    if let Some(input) = input {
        command.stdin(input);
    }
    let folder = Path::new(RULES).parent().unwrap();
    command
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap()
}

fn assert_success(output: &Output) {
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&said)
    );
}

/// Return the metrics of a host with named VMs.
fn metrics(format: Format) -> String {
    use exitmeter::export::server::Site as _;

    let path = recording_paths().next().unwrap();
    let hosts = Hosts::new(vec![Recording::read(&path).unwrap()], 2, 3, 1.0);
    hosts.content("/host/0/metrics", format).unwrap().1
}

#[test]
fn promtool_passes_the_rules_and_their_tests() {
    assert_success(&promtool(&["check", "rules", "exitmeter.rules.yml"], None));
    assert_success(&promtool(
        &["test", "rules", "exitmeter.rules.test.yml"],
        None,
    ));
}

#[test]
fn the_rule_that_reads_an_hour_of_buckets_is_evaluated_each_minute() {
    let rules = fs::read_to_string(RULES).unwrap();
    let groups = rules.split("  - name: ").skip(1);
    let hour: Vec<_> = groups
        .filter(|group| group.contains("_bucket[1h]"))
        .collect();
    let [hour] = hour[..] else {
        panic!("{hour:?}");
    };
    assert!(hour.contains("\n    interval: 1m\n"), "{hour}");
    // No other rule is in its group, so none is delayed.
    let rules = hour.matches("- record: ").count() + hour.matches("- alert: ").count();
    assert_eq!(rules, 1, "{hour}");
}

#[test]
fn docs_have_the_federation_that_is_measured() {
    for line in federation().lines() {
        assert!(DOCS.contains(&format!("\n    {line}\n")), "{line}");
    }
}

#[test]
fn promtool_does_not_complain_about_the_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("metrics");
    fs::write(&file, metrics(Format::Text)).unwrap();
    let said = promtool(&["check", "metrics"], Some(File::open(&file).unwrap()));
    assert_success(&said);
    let said = [said.stdout, said.stderr].concat();
    assert_eq!(String::from_utf8_lossy(&said), "");
}

#[test]
fn docs_have_each_metric_rule_and_alert() {
    let text = metrics(Format::Text);
    let names: BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        assert!(
            DOCS.contains(&format!("`{name}`")),
            "{name} is not in docs/fleet.md"
        );
    }
    let rules = fs::read_to_string(RULES).unwrap();
    let of = |key: &str| {
        let lines = rules.lines().map(str::trim);
        lines
            .filter_map(|line| {
                line.strip_prefix("- ")?
                    .strip_prefix(key)
                    .map(str::to_owned)
            })
            .collect::<Vec<_>>()
    };
    for record in of("record: ") {
        assert!(DOCS.contains(&format!("| `{record}` |")), "{record}");
    }
    let alerts = of("alert: ");
    assert!(alerts.len() > 5);
    for alert in alerts {
        assert!(DOCS.contains(&alert), "{alert}");
    }
    // Each runbook is a section of the page.
    let sections = DOCS.lines().filter_map(|line| line.strip_prefix("### "));
    let sections: Vec<_> = sections.map(str::to_lowercase).collect();
    for line in rules.lines() {
        if let Some(section) = line.trim().strip_prefix("runbook: docs/fleet.md#") {
            assert!(sections.contains(&section.to_owned()), "{section}");
        }
    }
}

/// Collects the names of the metrics in a query.
#[derive(Default)]
struct MetricNames(BTreeSet<String>);

impl ExprVisitor for MetricNames {
    type Error = ();

    fn pre_visit(&mut self, part: &Expr) -> Result<bool, ()> {
        let name = match part {
            Expr::VectorSelector(asked) => &asked.name,
            Expr::MatrixSelector(asked) => &asked.vs.name,
            _ => &None,
        };
        self.0.extend(name.clone());
        Ok(true)
    }
}

/// Parses each panel's query with a parser that is not Prometheus's own. The metrics are looked up in docs/fleet.md, as a
/// recording does not have them all.
#[test]
fn queries_of_panels_are_promql_and_name_known_metrics() {
    let mut queries = 0;
    for board in BOARDS {
        for (title, query) in board.queries("a:1", "b") {
            assert!(!query.contains('$'), "{title}: {query} has a variable left");
            let parsed = promql_parser::parser::parse(&query);
            let parsed = parsed.unwrap_or_else(|error| panic!("{title}: {query}: {error}"));
            let mut asked = MetricNames::default();
            walk_expr(&mut asked, &parsed).unwrap();
            assert!(!asked.0.is_empty(), "{title}: {query} names no metric");
            for name in asked.0 {
                let name = name.trim_end_matches("_bucket");
                let is_told = DOCS.contains(&format!("`{name}`"));
                assert!(is_told, "{title}: docs/fleet.md has no {name}");
            }
            queries += 1;
        }
    }
    assert!(DOCS.contains(&format!("each of their {queries} panels")));
}

#[test]
fn files_of_the_boards_match_their_source() {
    for board in BOARDS {
        let file = Path::new(FOLDER).join(format!("{}.json", board.name));
        let found = fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(
            found,
            board.text(),
            "{} is outdated: run cargo run -p fleet --bin boards",
            file.display()
        );
    }
}
