// SPDX-License-Identifier: GPL-2.0

//! A number that was taken several times.

use serde::Serialize;

/// The median, and what lies around it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// All, in the order in which they were taken.
    pub runs: Vec<f64>,
}

impl Summary {
    /// Sum up numbers; `None` when there is none.
    pub fn of(runs: &[f64]) -> Option<Self> {
        let mut sorted = runs.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            median: median(&sorted)?,
            min: *sorted.first()?,
            max: *sorted.last()?,
            runs: runs.to_vec(),
        })
    }

    /// Sum up the differences of numbers that were taken in pairs, one after the other, so that what
    /// drifts meanwhile falls out.
    pub fn of_differences(with: &[f64], without: &[f64]) -> Option<Self> {
        let differences: Vec<f64> = with.iter().zip(without).map(|(a, b)| a - b).collect();
        Self::of(&differences)
    }
}

/// The middle of sorted numbers, or the mean of the two there.
fn median(sorted: &[f64]) -> Option<f64> {
    let upper = sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(*upper);
    }
    let lower = sorted.get((sorted.len() / 2).checked_sub(1)?)?;
    Some((lower + upper) / 2.0)
}

/// The median of numbers in any order; `None` when there is none.
pub fn median_of(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    median(&numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_does_not_heed_what_is_far_off() {
        let summary = Summary::of(&[1150.0, 1100.0, 90_000.0]).expect("numbers");
        assert_eq!(
            (summary.median, summary.min, summary.max),
            (1150.0, 1100.0, 90_000.0)
        );
        assert_eq!(summary.runs, [1150.0, 1100.0, 90_000.0]);
        assert_eq!(median_of(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(median_of(vec![]), None);
    }

    #[test]
    fn a_drift_falls_out_of_differences() {
        let summary = Summary::of_differences(&[110.0, 210.0, 320.0], &[100.0, 200.0, 300.0]);
        let summary = summary.expect("pairs");
        assert_eq!(
            (summary.median, summary.min, summary.max),
            (10.0, 10.0, 20.0)
        );
    }
}
