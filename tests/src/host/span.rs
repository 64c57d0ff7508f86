// SPDX-License-Identifier: GPL-2.0

//! A span of time over which the kernel's histogram and the meter count the same exits.

use anyhow::{ensure, Result};
use exitmeter_meter::reasons;

use super::{
    hist::{Exits, Hist},
    isa,
    meter::Meter,
};

/// Begun while no guest runs, ended when none runs any more.
#[derive(Debug)]
pub struct Span {
    hist: Hist,
    before: Exits,
}

impl Span {
    /// Begins to count.
    pub fn begin() -> Result<Self> {
        let hist = Hist::begin()?;
        let before = Meter::read()?.exits();
        Ok(Self { hist, before })
    }

    /// Demands that both counted the same, reason by reason and in all, and gives it.
    ///
    /// VMs of this process may still be there, as long as none of their vCPUs runs.
    pub fn end(self) -> Result<Exits> {
        let meter = Meter::read()?;
        let hist = self.hist.read()?;
        ensure!(
            meter.unmetered == 0,
            "{} vCPUs ran unmetered",
            meter.unmetered
        );
        let metered = since(meter.exits(), &self.before)?;
        compare(&metered, &hist)?;
        Ok(metered)
    }
}

/// The exits of which there are more than before; those that are as many are left out.
pub fn since(mut now: Exits, before: &Exits) -> Result<Exits> {
    for (reason, count) in before {
        let now = now.entry(*reason).or_insert(0);
        ensure!(
            *now >= *count,
            "exits of reason {reason} fell from {count} to {now}"
        );
        *now -= count;
    }
    now.retain(|_, count| *count != 0);
    Ok(now)
}

/// Demands that the meter counted what the kernel's histogram did.
pub fn compare(metered: &Exits, hist: &Exits) -> Result<()> {
    let isa = isa()?;
    let count = |exits: &Exits, reason| exits.get(&reason).copied().unwrap_or(0);
    let mut reasons: Vec<u32> = metered.keys().chain(hist.keys()).copied().collect();
    reasons.sort_unstable();
    reasons.dedup();
    let differences: Vec<String> = reasons
        .into_iter()
        .filter(|reason| count(metered, *reason) != count(hist, *reason))
        .map(|reason| {
            format!(
                "{reason} ({}) metered {} times, by the kernel's histogram {}",
                reasons::name(isa, reason).unwrap_or("?"),
                count(metered, reason),
                count(hist, reason)
            )
        })
        .collect();
    ensure!(differences.is_empty(), "{}", differences.join("; "));
    let total = |exits: &Exits| exits.values().sum::<u64>();
    ensure!(
        total(metered) == total(hist),
        "{} exits metered in all, by the kernel's histogram {}",
        total(metered),
        total(hist)
    );
    Ok(())
}
