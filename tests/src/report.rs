// SPDX-License-Identifier: GPL-2.0

//! How the inside tells the outside: lines as KTAP has them, the plan first.
//!
//! ```text
//! KTAP version 1
//! 1..2
//! ok 1 the name of a case
//! # it broke, and why
//! not ok 2 the name of another
//! ```

use std::{fmt, mem};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The version of the format.
    Version,
    /// How many cases will be told of.
    Plan(usize),
    /// A case has ended.
    Case {
        /// Its place, from 1.
        number: usize,
        /// Whether it passed.
        passed: bool,
        /// What it shows.
        name: String,
    },
    /// A remark for people.
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
    /// Reads a line; `None` for one that is none of these.
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

/// What is known of a run, line by line.
#[derive(Clone, Debug, Default)]
pub struct Report {
    planned: Option<usize>,
    passed: usize,
    failed: Vec<String>,
    faults: Vec<String>,
    /// The remarks since the latest case: what is said of the one to come.
    remarks: Vec<String>,
}

impl Report {
    /// Takes the next line that the inside printed.
    pub fn take(&mut self, line: &str) {
        let told = self.passed + self.failed.len();
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
                if number != told + 1 {
                    self.faults.push(format!(
                        "case {number} ({name}) is told of where case {} is due",
                        told + 1
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
                .push(format!("the host printed '{line}', which is no report")),
        }
    }

    /// The end of the host, with the status of the lab's command.
    pub fn end(mut self, host: &str, status: Option<i32>) -> Verdict {
        let told = self.passed + self.failed.len();
        match self.planned {
            None => self.faults.push("the host never gave a plan".to_owned()),
            Some(0) => self.faults.push("no case was planned".to_owned()),
            Some(planned) if planned != told => self
                .faults
                .push(format!("{planned} cases were planned, and {told} told of")),
            Some(_) => {}
        }
        let expected = i32::from(!self.failed.is_empty());
        match status {
            Some(status) if status == expected => {}
            Some(status) => self.faults.push(format!(
                "the lab's command ended with status {status} instead of {expected}"
            )),
            None => self
                .faults
                .push("the lab's command was ended by a signal".to_owned()),
        }
        let on = |text: &String| format!("{host}: {text}");
        Verdict {
            passed: self.passed,
            failures: self.failed.iter().chain(&self.faults).map(on).collect(),
            last_words: Vec::new(),
        }
    }
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Cases that passed.
    pub passed: usize,
    /// Cases that failed with what was said of them, and what else is not as it should be.
    pub failures: Vec<String>,
    /// What the lab's command said last, of a host that did not end by itself.
    pub last_words: Vec<String>,
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
not ok 2 phases: a guest that computes is in the guest
ok 3 log: no oops
";

    fn read(text: &str, status: Option<i32>) -> Verdict {
        let mut report = Report::default();
        text.lines().for_each(|line| report.take(line));
        report.end("intel", status)
    }

    #[test]
    fn lines_read_as_they_were_written() {
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
    fn a_whole_report_is_taken_as_it_is() {
        let verdict = read(SAVED, Some(1));
        assert_eq!(verdict.passed, 2);
        assert_eq!(
            verdict.failures,
            ["intel: phases: a guest that computes is in the guest: of 1000 ticks: guest 99.0%; 1.2 s"]
        );
        let verdict = read(&SAVED.replace("not ok", "ok"), Some(0));
        assert_eq!((verdict.passed, verdict.failures.len()), (3, 0));
    }

    #[test]
    fn nothing_less_than_a_whole_report_passes() {
        let good = SAVED.replace("not ok", "ok");
        let fails = |text: &str, status| !read(text, status).failures.is_empty();
        assert!(!fails(&good, Some(0)));
        // A lab that failed, though all was told.
        for status in [None, Some(1), Some(100), Some(102), Some(107)] {
            assert!(fails(&good, status), "{status:?}");
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
            assert!(fails(&without.join("\n"), Some(0)), "without '{line}'");
            let mut twice = lines.clone();
            twice.insert(place, line);
            assert!(fails(&twice.join("\n"), Some(0)), "twice '{line}'");
        }
        assert!(fails("", Some(0)));
        assert!(fails("1..0", Some(0)));
        assert!(fails("Segmentation fault", Some(139)));
    }
}
