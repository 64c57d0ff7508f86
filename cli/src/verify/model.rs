// SPDX-License-Identifier: GPL-2.0

//! What was found, as plain data. Its field names are those of `--json`, and stay: docs/verify.md.

use serde::Serialize;

use super::{environment::Environment, statistics::Summary};

/// The version of the data's shape: grows when a field goes or changes its meaning.
pub const FORMAT: u32 = 1;

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// [`FORMAT`].
    pub format: u32,
    /// The module was found right: no check failed.
    pub passed: bool,
    /// The checks, in the order in which they were made.
    pub checks: Vec<Check>,
    /// What exits cost.
    pub cost: Cost,
    /// Where.
    pub environment: Environment,
}

impl Found {
    /// Return how many checks ended so.
    pub fn count(&self, verdict: Verdict) -> usize {
        let checks = self.checks.iter();
        checks.filter(|check| check.verdict == verdict).count()
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All was as it had to be.
    Passed,
    /// Something was not.
    Failed,
    /// It could not be made here.
    NotMade,
}

/// A check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found, in words.
    pub text: String,
}

impl Check {
    /// A check that ended so.
    pub fn new(name: impl Into<String>, verdict: Verdict, text: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            verdict,
            text: text.into(),
        }
    }
}

/// What exits cost on this CPU.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cost {
    /// The host's CPU on which it was measured.
    pub cpu: usize,
    /// How often each number was taken.
    pub runs: u32,
    /// Exits of which a number is the mean.
    pub exits: u32,
    /// TSC frequency in kHz, when it is known: how many ticks a millisecond has.
    pub tsc_khz: Option<u32>,
    /// The CPU's frequency in kHz at the end, as cpufreq tells it.
    pub cpu_khz: Option<u64>,
    /// The governor of the CPU's frequency.
    pub governor: Option<String>,
    /// By kind of exit.
    pub kinds: Vec<KindCost>,
    /// TSC ticks of one way into the guest and out of it, which the guest phase holds: guest ticks of
    /// one INVD less those of the loop around it.
    pub world_switch: Option<f64>,
    /// Why nothing was measured, or not all of it.
    pub remark: Option<String>,
}

/// What one kind of exit costs.
#[derive(Clone, Debug, Serialize)]
pub struct KindCost {
    /// Its name.
    pub kind: &'static str,
    /// TSC ticks of one exit, all of it: the guest's loop, KVM and the VMM.
    pub ticks: Summary,
    /// Nanoseconds of the median.
    pub ns: Option<f64>,
    /// TSC ticks by phase, as the meter tells them; the medians over the runs.
    pub guest: Option<f64>,
    /// As above.
    pub kernel: Option<f64>,
    /// As above.
    pub user: Option<f64>,
    /// TSC ticks that metering adds: each run with the module, less the one without it.
    pub metering_adds: Option<Summary>,
    /// TSC ticks that details add to metering without them.
    pub details_add: Option<Summary>,
}
