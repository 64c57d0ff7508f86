// SPDX-License-Identifier: GPL-2.0

//! Exits per second in past intervals, for each VM and vCPU.

use std::collections::{BTreeMap, VecDeque};

use super::data::Scope;
use crate::model::{Report, Span};

/// Rates kept for each scope: as many as the widest terminal has columns.
const LENGTH: usize = 512;

/// Latest rates of exits per second.
#[derive(Clone, Debug, Default)]
pub struct History {
    rates: BTreeMap<Scope, VecDeque<u64>>,
}

impl History {
    /// Add the rates of an interval. Forget VMs and vCPUs that are gone.
    pub fn add(&mut self, delta: &Report) {
        let mut all = delta.departed.ledger.exits;
        let mut rates = Vec::new();
        // A VM that came in this interval lived for a part of it only.
        let interval = delta.interval.unwrap_or(Span::of(0, None));
        for vm in &delta.vms {
            all = all.saturating_add(vm.ledger.exits);
            rates.push((Scope::Vm(vm.vm), vm.ledger.exits));
            let vcpus = vm.vcpus.iter();
            rates.extend(vcpus.map(|vcpu| (Scope::Vcpu(vm.vm, vcpu.vcpu), vcpu.ledger.exits)));
        }
        rates.push((Scope::All, all));
        let mut old = std::mem::take(&mut self.rates);
        for (scope, exits) in rates {
            let mut rates = old.remove(&scope).unwrap_or_default();
            if rates.len() == LENGTH {
                rates.pop_front();
            }
            // Without a known frequency, show the exits of each interval.
            let rate = interval.per_second(exits).unwrap_or(exits as f64);
            rates.push_back(rate.round() as u64);
            self.rates.insert(scope, rates);
        }
    }

    /// Return up to `count` of the latest rates, the oldest first.
    pub fn latest(&self, scope: Scope, count: usize) -> Vec<u64> {
        let Some(rates) = self.rates.get(&scope) else {
            return Vec::new();
        };
        let skipped = rates.len().saturating_sub(count);
        rates.iter().skip(skipped).copied().collect()
    }
}

/// Draw rates as a line of bars, the latest at the right.
pub fn sparkline(rates: &[u64], width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = rates.iter().copied().max().unwrap_or(0).max(1);
    let bars = rates.iter().map(|rate| {
        let height = (*rate as u128 * 8).div_ceil(u128::from(most)) as usize;
        match height {
            0 => ' ',
            height => BARS[height.min(8) - 1],
        }
    });
    let bars: String = bars.collect();
    format!("{bars:>width$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_high_as_their_rates() {
        assert_eq!(sparkline(&[0, 1, 50, 100], 6), "   ▁▄█");
        assert_eq!(sparkline(&[], 3), "   ");
        assert_eq!(sparkline(&[0, 0], 2), "  ");
        assert_eq!(sparkline(&[u64::MAX], 1), "█");
    }
}
