// SPDX-License-Identifier: GPL-2.0

//! Results as plain data. The field names are those of `--json`, and stay: docs/verify.md.

use serde::Serialize;

use super::{environment::Environment, statistics::Summary};

/// Version of the data's shape. It grows when a field goes or changes its meaning.
pub const FORMAT: u32 = 1;

/// All results.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// Version of the data: [`FORMAT`].
    pub format: u32,
    /// True if no check failed.
    pub passed: bool,
    /// Checks, in the order in which they were made.
    pub checks: Vec<Check>,
    /// Cost of exits.
    pub cost: Cost,
    /// Environment of the measurement.
    pub environment: Environment,
}

impl Results {
    /// Return the number of checks with this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        let checks = self.checks.iter();
        checks.filter(|check| check.verdict == verdict).count()
    }
}

/// Verdict of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything was as expected.
    Passed,
    /// Something was not as expected.
    Failed,
    /// The check could not be made here.
    NotMade,
}

/// A check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Subject of the check.
    pub name: String,
    /// Verdict.
    pub verdict: Verdict,
    /// Finding, in words.
    pub text: String,
}

impl Check {
    /// Create a check.
    pub fn new(name: impl Into<String>, verdict: Verdict, text: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            verdict,
            text: text.into(),
        }
    }
}

/// Cost of exits on this CPU.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cost {
    /// Host's CPU that was measured.
    pub cpu: usize,
    /// Number of times that each number was taken.
    pub runs: u32,
    /// Number of exits that a number is the mean of.
    pub exits: u32,
    /// TSC frequency in kHz, if known: ticks in a millisecond.
    pub tsc_khz: Option<u32>,
    /// Frequency of the CPU at the end, in kHz, from cpufreq.
    pub cpu_khz: Option<u64>,
    /// Governor of the CPU's frequency.
    pub governor: Option<String>,
    /// Costs by kind of exit.
    pub kinds: Vec<KindCost>,
    /// TSC ticks of one world switch into the guest and out of it, which the guest phase holds:
    /// guest ticks of one INVD without those of the loop around it.
    pub world_switch: Option<f64>,
    /// Reason why not everything was measured.
    pub remark: Option<String>,
}

/// Cost of one kind of exit.
#[derive(Clone, Debug, Serialize)]
pub struct KindCost {
    /// Name.
    pub kind: &'static str,
    /// TSC ticks of one whole exit: the guest's loop, KVM and the VMM.
    pub ticks: Summary,
    /// Median, in nanoseconds.
    pub ns: Option<f64>,
    /// Metered TSC ticks in the guest phase, as the median over the runs.
    pub guest: Option<f64>,
    /// The same for the kernel phase.
    pub kernel: Option<f64>,
    /// The same for the user phase.
    pub user: Option<f64>,
    /// TSC ticks that metering adds: each run with the module, minus the one without it.
    pub metering_adds: Option<Summary>,
    /// TSC ticks that details add to metering without them.
    pub details_add: Option<Summary>,
}
