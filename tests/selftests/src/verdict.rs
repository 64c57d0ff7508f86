// SPDX-License-Identifier: GPL-2.0

//! What came of a test, and the lines in which the inside tells of it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Verdict {
    /// Status 0.
    Pass,
    /// Status 4: something that it needs is not there.
    Skip,
    /// Any other status, or a signal.
    Fail,
    /// It had to be killed.
    TimedOut,
    /// The host's kernel warned of a fault.
    Warn,
    /// The host's kernel said more than that: an oops, a lockup, a panic.
    Fault,
    /// The host went silent, or its emulator died.
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
pub struct Ended {
    /// The test.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// Why, in its own words, when it did not pass.
    pub why: String,
    /// How long it took by the host's clock.
    pub seconds: f64,
    /// VM exits meanwhile; with the module those that it metered, which are those of the kernel's histogram.
    pub exits: u64,
    /// How many reasons they had.
    pub reasons: usize,
    /// What must not be: counts that differ, ledgers that are left, processes that do not end.
    pub troubles: Vec<String>,
}

/// A line of the inside.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Line {
    /// A test begins.
    Begin(String),
    /// It ended.
    End(Ended),
    /// The host lives.
    Alive,
    /// All tests ended, and the module is unloaded.
    Done {
        /// What must not be, at the end.
        troubles: Vec<String>,
    },
}

/// Why a test did not pass, from what it printed: the assertion that failed, or what it misses, or its last line.
pub fn why(output: &str) -> String {
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
    use super::why;

    #[test]
    fn a_test_says_why_it_did_not_pass() {
        let failed = "Random seed: 0x6b8b4567\n==== Test Assertion Failure ====\n  x86/a_test.c:93: r == 0\n  \
                      pid=1 tid=1 errno=22 - Invalid argument\n  (stack trace empty)\n  KVM_SET_X failed\n";
        assert_eq!(why(failed), "x86/a_test.c:93: r == 0");
        for skipped in [
            "1..0 # SKIP - Requirement not met: kvm_is_tdp_enabled()\n",
            "ok 2 # SKIP Requirement not met: kvm_is_tdp_enabled()\n",
        ] {
            assert_eq!(why(skipped), "Requirement not met: kvm_is_tdp_enabled()");
        }
        let harness = "TAP version 13\n1..1\n# a.c:7:b:Expected 1 (1) == 2 (2)\nnot ok 1 b\n# Totals: pass:0\n";
        assert_eq!(why(harness), "not ok 1 b");
        assert_eq!(why("one\ntwo\n\n"), "two");
        assert_eq!(why(""), "");
    }
}
