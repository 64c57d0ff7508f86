// SPDX-License-Identifier: GPL-2.0

//! The protocol between `in_host` and `driver`: lines in the KTAP format, the plan first.
//!
//! ```text
//! KTAP version 1
//! 1..2
//! ok 1 the name of a case
//! # the reason of the failure
//! not ok 2 the name of another
//! ```

use std::{fmt, mem};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The version of the format.
    Version,
    /// Number of cases to come.
    Plan(usize),
    /// A case has ended.
    Case {
        /// Position in the plan, from 1.
        number: usize,
        /// True if the case passed.
        passed: bool,
        /// Name of the case.
        name: String,
    },
    /// A remark for human readers.
    Remark(String),
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Version => write!(f, "KTAP version 1"),
            Line::Plan(count) => write!(f, "1..{count}"),
            Line::Case {
                number,
                passed,
                name,
            } => {
                let verdict = if *passed { "ok" } else { "not ok" };
                write!(f, "{verdict} {number} {name}")
            }
            Line::Remark(text) => write!(f, "# {text}"),
        }
    }
}

impl Line {
    /// Parse a line. Return `None` for one that is not KTAP.
    pub fn parse(line: &str) -> Option<Self> {
        if line == "KTAP version 1" {
            return Some(Line::Version);
        }
        if let Some(count) = line.strip_prefix("1..") {
            return count.parse().ok().map(Line::Plan);
        }
        if let Some(text) = line.strip_prefix('#') {
            return Some(Line::Remark(text.trim_start().to_owned()));
        }
        let (passed, rest) = match line.strip_prefix("not ") {
            Some(rest) => (false, rest),
            None => (true, line),
        };
        let (number, name) = rest.strip_prefix("ok ")?.split_once(' ')?;
        Some(Line::Case {
            number: number.parse().ok()?,
            passed,
            name: name.to_owned(),
        })
    }
}

/// Collector of a run's lines, which turns them into a [`Verdict`].
#[derive(Clone, Debug, Default)]
pub struct Collector {
    planned: Option<usize>,
    passed: usize,
    failed: Vec<String>,
    faults: Vec<String>,
    /// Remarks since the latest case; they belong to the next one.
    remarks: Vec<String>,
}

impl Collector {
    /// Take the next line that the host printed.
    pub fn take(&mut self, line: &str) {
        let ended = self.passed + self.failed.len();
        match Line::parse(line) {
            Some(Line::Version) => {}
            Some(Line::Remark(text)) => self.remarks.push(text),
            Some(Line::Plan(count)) => {
                if self.planned.replace(count).is_some() {
                    self.faults.push("there are two plans".to_owned());
                }
            }
            Some(Line::Case {
                number,
                passed,
                name,
            }) => {
                if number != ended + 1 {
                    self.faults.push(format!(
                        "case {number} ({name}) came instead of case {}",
                        ended + 1
                    ));
                }
                let remarks = mem::take(&mut self.remarks);
                if passed {
                    self.passed += 1;
                } else {
                    self.failed.push(format!("{name}: {}", remarks.join("; ")));
                }
            }
            None => self
                .faults
                .push(format!("the host printed '{line}', which is not KTAP")),
        }
    }

    /// Return the verdict once the host has ended, given the status of its run as of `cargo lab run`.
    pub fn end(mut self, host: &str, status: u8) -> Verdict {
        let ended = self.passed + self.failed.len();
        match self.planned {
            None => self.faults.push("the host never gave a plan".to_owned()),
            Some(0) => self.faults.push("no case was planned".to_owned()),
            Some(planned) if planned != ended => self
                .faults
                .push(format!("{planned} cases were planned, and {ended} ended")),
            Some(_) => {}
        }
        let expected = u8::from(!self.failed.is_empty());
        if status != expected {
            self.faults.push(format!(
                "the run ended with status {status} instead of {expected}"
            ));
        }
        let on = |text: &String| format!("{host}: {text}");
        Verdict {
            passed: self.passed,
            failures: self.failed.iter().chain(&self.faults).map(on).collect(),
            last_lines: Vec::new(),
        }
    }
}

/// Result of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Number of cases that passed.
    pub passed: usize,
    /// Failed cases with their remarks, and faults of the run itself.
    pub failures: Vec<String>,
    /// Last lines of the standard error and of the logs, if the host did not end by itself.
    pub last_lines: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
KTAP version 1
1..3
ok 1 exits: CPUID in real mode
# of 1000 ticks: guest 99.0%
# 1.2 s
not ok 2 phases: a computing guest is in phase guest
ok 3 log: no oops
";

    fn read(text: &str, status: u8) -> Verdict {
        let mut collector = Collector::default();
        text.lines().for_each(|line| collector.take(line));
        collector.end("intel", status)
    }

    #[test]
    fn parse_reverses_display() {
        for line in SAVED.lines() {
            let parsed = Line::parse(line).expect("a line");
            assert_eq!(parsed.to_string(), line);
        }
        for line in [
            "",
            "ok",
            "ok 1",
            "ok x y",
            "not",
            "1..x",
            "exitmeter: loaded",
        ] {
            assert_eq!(Line::parse(line), None, "{line}");
        }
    }

    #[test]
    fn complete_output_gives_its_verdict() {
        let verdict = read(SAVED, 1);
        assert_eq!(verdict.passed, 2);
        assert_eq!(
            verdict.failures,
            ["intel: phases: a computing guest is in phase guest: of 1000 ticks: guest 99.0%; 1.2 s"]
        );
        let verdict = read(&SAVED.replace("not ok", "ok"), 0);
        assert_eq!((verdict.passed, verdict.failures.len()), (3, 0));
    }

    #[test]
    fn incomplete_output_fails() {
        let good = SAVED.replace("not ok", "ok");
        let fails = |text: &str, status| !read(text, status).failures.is_empty();
        assert!(!fails(&good, 0));
        // The run failed although all cases ended.
        for status in [1, 100, 102, 107] {
            assert!(fails(&good, status), "{status}");
        }
        // Any line lost, doubled, or cut short.
        let lines: Vec<&str> = good.lines().collect();
        for place in 0..lines.len() {
            let line = lines[place];
            if line.starts_with(['K', '#']) {
                continue;
            }
            let mut without = lines.clone();
            without.remove(place);
            assert!(fails(&without.join("\n"), 0), "without '{line}'");
            let mut twice = lines.clone();
            twice.insert(place, line);
            assert!(fails(&twice.join("\n"), 0), "twice '{line}'");
        }
        assert!(fails("", 0));
        assert!(fails("1..0", 0));
        assert!(fails("Segmentation fault", 99));
    }
}
