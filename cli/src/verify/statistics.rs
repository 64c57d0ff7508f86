// SPDX-License-Identifier: GPL-2.0

//! Statistics of a number that was measured several times.

use serde::Serialize;

/// Median, minimum and maximum.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Median.
    pub median: f64,
    /// Minimum.
    pub min: f64,
    /// Maximum.
    pub max: f64,
    /// All numbers, in the order in which they were measured.
    pub runs: Vec<f64>,
}

impl Summary {
    /// Summarize numbers. Return `None` if there are none.
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

    /// Summarize the differences of numbers that were measured in pairs, one after the other, so
    /// that a drift cancels.
    pub fn of_differences(with: &[f64], without: &[f64]) -> Option<Self> {
        let differences: Vec<f64> = with.iter().zip(without).map(|(a, b)| a - b).collect();
        Self::of(&differences)
    }
}

/// Return the middle of sorted numbers, or the mean of the middle two.
fn median(sorted: &[f64]) -> Option<f64> {
    let upper = sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(*upper);
    }
    let lower = sorted.get((sorted.len() / 2).checked_sub(1)?)?;
    Some((lower + upper) / 2.0)
}

/// Return the median of numbers in any order, or `None` if there are none.
pub fn median_of(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    median(&numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_ignores_outliers() {
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
    fn drift_cancels_in_differences() {
        let summary = Summary::of_differences(&[110.0, 210.0, 320.0], &[100.0, 200.0, 300.0]);
        let summary = summary.expect("pairs");
        assert_eq!(
            (summary.median, summary.min, summary.max),
            (10.0, 10.0, 20.0)
        );
    }
}
