// SPDX-License-Identifier: GPL-2.0

//! Distribution of the kernel ticks of single exits.

use std::ops::AddAssign;

use exitmeter_meter::{
    histogram::{self, Buckets},
    reader::Row,
};
use serde::ser::{Serialize, SerializeStruct, Serializer};

/// Distribution of the kernel ticks of exits that were followed by an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// Maximum, in ticks; 0 without samples.
    pub max: u64,
    /// True if `max` is exact. Between two snapshots it is exact if the maximum grew. Otherwise it
    /// is taken from a bucket, and within 20%.
    pub max_exact: bool,
    buckets: Buckets,
}

impl Spread {
    /// Read the distribution of a row. Return `None` if its snapshot has no histograms that can be
    /// read.
    pub fn read(row: &Row<'_>) -> Option<Self> {
        Some(Self {
            max: row.max()?,
            max_exact: true,
            buckets: row.histogram()?,
        })
    }

    /// Return the samples added since `earlier`, or `None` if `earlier` is not an older state of
    /// the same row.
    pub fn since(&self, earlier: &Self) -> Option<Self> {
        let mut buckets = self.buckets;
        for (to, before) in buckets.iter_mut().zip(earlier.buckets) {
            *to = to.checked_sub(before)?;
        }
        let greatest = buckets.iter().rposition(|samples| *samples != 0);
        let (max, max_exact) = match greatest {
            None => (0, true),
            Some(_) if self.max > earlier.max => (self.max, true),
            Some(bucket) => (histogram::middle(bucket).min(self.max), false),
        };
        Some(Self {
            max,
            max_exact,
            buckets,
        })
    }

    /// Return the number of samples.
    pub fn count(&self) -> u64 {
        self.buckets
            .iter()
            .fold(0, |sum: u64, samples| sum.saturating_add(*samples))
    }

    /// Return for each bound the number of samples that surely do not exceed it. A bucket that a
    /// bound lies in counts for the next bound only, so each number is exact for some bound between
    /// two thirds of the given one and the given one.
    pub fn up_to<const N: usize>(&self, bounds: [u64; N]) -> [u64; N] {
        bounds.map(|bound| {
            let buckets = self.buckets.iter().enumerate();
            let within = buckets.take_while(|(bucket, _)| {
                *bucket + 1 < histogram::BUCKETS && histogram::low(bucket + 1) <= bound + 1
            });
            within.fold(0_u64, |sum, (_, samples)| sum.saturating_add(*samples))
        })
    }

    /// Return the ticks that `percent` of the samples do not exceed, within 20%. Return `None`
    /// without samples.
    pub fn quantile(&self, percent: u64) -> Option<u64> {
        histogram::quantile(&self.buckets, self.max, percent)
    }

    /// Return the least value and the number of samples of each bucket that is not empty.
    pub fn samples(&self) -> Vec<(u64, u64)> {
        let buckets = self.buckets.iter().enumerate();
        buckets
            .filter(|(_, samples)| **samples != 0)
            .map(|(bucket, samples)| (histogram::low(bucket), *samples))
            .collect()
    }
}

impl Default for Spread {
    /// Return a distribution without samples.
    fn default() -> Self {
        Self {
            max: 0,
            max_exact: true,
            buckets: histogram::EMPTY,
        }
    }
}

impl AddAssign for Spread {
    fn add_assign(&mut self, other: Self) {
        self.max = self.max.max(other.max);
        self.max_exact = self.max_exact && other.max_exact;
        for (to, from) in self.buckets.iter_mut().zip(other.buckets) {
            *to = to.saturating_add(from);
        }
    }
}

impl Serialize for Spread {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_struct("Spread", 6)?;
        to.serialize_field("p50", &self.quantile(50))?;
        to.serialize_field("p90", &self.quantile(90))?;
        to.serialize_field("p99", &self.quantile(99))?;
        to.serialize_field("max", &self.max)?;
        to.serialize_field("max_exact", &self.max_exact)?;
        to.serialize_field("histogram", &self.samples())?;
        to.end()
    }
}
