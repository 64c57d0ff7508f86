// SPDX-License-Identifier: GPL-2.0

//! The result of a test, and the lines in which the host reports it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Verdict of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Verdict {
    /// The exit status is 0.
    Pass,
    /// The exit status is 4: the host lacks something that the test needs.
    Skip,
    /// The test ended with any other status, or by a signal.
    Fail,
    /// The test exceeded its time limit and was killed.
    TimedOut,
    /// The host's kernel printed a WARN.
    Warn,
    /// The host's kernel reported more than that: an oops, a lockup, a panic.
    Fault,
    /// The host fell silent, or its emulator died.
    Lost,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Pass => "pass",
            Verdict::Skip => "skip",
            Verdict::Fail => "fail",
            Verdict::TimedOut => "timed out",
            Verdict::Warn => "WARN",
            Verdict::Fault => "host fault",
            Verdict::Lost => "host lost",
        })
    }
}

/// One run of one test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestRun {
    /// Name of the test.
    pub name: String,
    /// Verdict of the test.
    pub verdict: Verdict,
    /// Reason that the test itself gives for not passing.
    pub why: String,
    /// Duration in seconds of the host's clock.
    pub seconds: f64,
    /// VM exits during the run; with the module the metered ones, which equal those of the kernel's histogram.
    pub exits: u64,
    /// Number of distinct exit reasons.
    pub reasons: usize,
    /// Failures around the test: counts that differ, ledgers that are left, processes that do not end.
    pub troubles: Vec<String>,
}

/// A line that the host prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Line {
    /// A test begins.
    Begin(String),
    /// A test has ended.
    End(TestRun),
    /// The host is alive.
    Alive,
    /// All tests have ended, and the module is unloaded.
    Done {
        /// Failures at the end.
        troubles: Vec<String>,
    },
}

/// Extract from a test's output why it did not pass: the failed assertion, the missing feature, or the last line.
pub fn explanation(output: &str) -> String {
    let lines: Vec<&str> = output
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if let Some(at) = lines
        .iter()
        .position(|line| line.starts_with("==== Test Assertion Failure"))
    {
        return lines.get(at + 1).copied().unwrap_or_default().to_owned();
    }
    let skip = lines.iter().rev().find_map(|line| {
        line.split_once("# SKIP")
            .map(|(_, what)| what.trim_start_matches([' ', '-']))
    });
    if let Some(what) = skip {
        return what.to_owned();
    }
    let wrong = lines
        .iter()
        .find(|line| line.contains(": Expected ") || line.starts_with("not ok"));
    wrong
        .or(lines.last())
        .map(|line| (*line).to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::explanation;

    #[test]
    fn finds_why_a_test_did_not_pass() {
        let failed = "Random seed: 0x6b8b4567\n==== Test Assertion Failure ====\n  x86/a_test.c:93: r == 0\n  \
                      pid=1 tid=1 errno=22 - Invalid argument\n  (stack trace empty)\n  KVM_SET_X failed\n";
        assert_eq!(explanation(failed), "x86/a_test.c:93: r == 0");
        for skipped in [
            "1..0 # SKIP - Requirement not met: kvm_is_tdp_enabled()\n",
            "ok 2 # SKIP Requirement not met: kvm_is_tdp_enabled()\n",
        ] {
            assert_eq!(
                explanation(skipped),
                "Requirement not met: kvm_is_tdp_enabled()"
            );
        }
        let harness = "TAP version 13\n1..1\n# a.c:7:b:Expected 1 (1) == 2 (2)\nnot ok 1 b\n# Totals: pass:0\n";
        assert_eq!(explanation(harness), "not ok 1 b");
        assert_eq!(explanation("one\ntwo\n\n"), "two");
        assert_eq!(explanation(""), "");
    }
}
