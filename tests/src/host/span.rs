// SPDX-License-Identifier: GPL-2.0

//! A span of time in which the kernel's histogram and the meter must count the same exits.

use anyhow::{ensure, Result};
use exitmeter_meter::reasons;

use super::{
    hist::{Exits, Hist},
    meter::MeterSnapshot,
    vendor,
};

/// A span that begins and ends while no guest runs.
#[derive(Debug)]
pub struct Span {
    hist: Hist,
    before: Exits,
}

impl Span {
    /// Begin to count.
    pub fn begin() -> Result<Self> {
        let hist = Hist::begin()?;
        let before = MeterSnapshot::read()?.exits();
        Ok(Self { hist, before })
    }

    /// Check that both counted the same, for each reason and in total, and return the exits.
    ///
    /// VMs of this process may still exist, as long as none of their vCPUs runs.
    pub fn end(self) -> Result<Exits> {
        let meter = MeterSnapshot::read()?;
        let hist = self.hist.read()?;
        ensure!(
            meter.unmetered == 0,
            "{} vCPUs ran unmetered",
            meter.unmetered
        );
        let metered = exits_since(meter.exits(), &self.before)?;
        compare(&metered, &hist)?;
        Ok(metered)
    }
}

/// Return the exits that `now` has more than `before`; reasons without new exits are absent.
pub fn exits_since(mut now: Exits, before: &Exits) -> Result<Exits> {
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

/// Check that the meter and the kernel's histogram counted the same.
pub fn compare(metered: &Exits, hist: &Exits) -> Result<()> {
    let vendor = vendor()?;
    let count = |exits: &Exits, reason| exits.get(&reason).copied().unwrap_or(0);
    let mut reasons: Vec<u32> = metered.keys().chain(hist.keys()).copied().collect();
    reasons.sort_unstable();
    reasons.dedup();
    let differences: Vec<String> = reasons
        .into_iter()
        .filter(|reason| count(metered, *reason) != count(hist, *reason))
        .map(|reason| {
            format!(
                "{reason} ({}): the meter counted {}, the kernel's histogram {}",
                reasons::name(vendor, reason).unwrap_or("?"),
                count(metered, reason),
                count(hist, reason)
            )
        })
        .collect();
    ensure!(differences.is_empty(), "{}", differences.join("; "));
    let total = |exits: &Exits| exits.values().sum::<u64>();
    ensure!(
        total(metered) == total(hist),
        "in total the meter counted {} exits, the kernel's histogram {}",
        total(metered),
        total(hist)
    );
    Ok(())
}
