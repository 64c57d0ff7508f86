// SPDX-License-Identifier: GPL-2.0

//! How the kernel ticks of single exits are spread.

use std::ops::AddAssign;

use exitmeter_meter::{
    histogram::{self, Buckets},
    reader::Row,
};
use serde::ser::{Serialize, SerializeStruct, Serializer};

/// The kernel ticks of each exit that was followed by an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// The most, exactly; 0 without samples.
    pub max: u64,
    buckets: Buckets,
}

impl Spread {
    /// What a row says; `None` when its snapshot has no histograms that can be read.
    pub fn read(row: &Row<'_>) -> Option<Self> {
        Some(Self {
            max: row.max()?,
            buckets: row.histogram()?,
        })
    }

    /// The ticks that `percent` of the samples do not exceed, within 20%; `None` without
    /// samples.
    pub fn quantile(&self, percent: u64) -> Option<u64> {
        histogram::quantile(&self.buckets, self.max, percent)
    }

    /// The least value and the number of samples of each bucket that has some.
    fn samples(&self) -> Vec<(u64, u64)> {
        let buckets = self.buckets.iter().enumerate();
        buckets
            .filter(|(_, samples)| **samples != 0)
            .map(|(bucket, samples)| (histogram::low(bucket), *samples))
            .collect()
    }
}

impl AddAssign for Spread {
    fn add_assign(&mut self, other: Self) {
        self.max = self.max.max(other.max);
        for (to, from) in self.buckets.iter_mut().zip(other.buckets) {
            *to = to.wrapping_add(from);
        }
    }
}

impl Serialize for Spread {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut to = to.serialize_struct("Spread", 5)?;
        to.serialize_field("p50", &self.quantile(50))?;
        to.serialize_field("p90", &self.quantile(90))?;
        to.serialize_field("p99", &self.quantile(99))?;
        to.serialize_field("max", &self.max)?;
        to.serialize_field("histogram", &self.samples())?;
        to.end()
    }
}
