// SPDX-License-Identifier: GPL-2.0

//! A histogram of waiting times, with mean, quantiles and maximum.

/// Buckets in each power of two.
const PARTS: usize = 32;

/// A histogram of ticks. Its quantiles are too high by at most 1/32.
#[derive(Clone, Debug)]
pub struct Spread {
    buckets: Vec<u64>,
    count: u64,
    sum: u64,
    worst: u64,
}

impl Default for Spread {
    fn default() -> Self {
        Self {
            buckets: vec![0; 64 * PARTS],
            count: 0,
            sum: 0,
            worst: 0,
        }
    }
}

impl Spread {
    /// Add a value.
    pub fn add(&mut self, value: u64) {
        self.buckets[bucket(value)] += 1;
        self.count += 1;
        self.sum += value;
        self.worst = self.worst.max(value);
    }

    /// Add all values of `other`.
    pub fn add_all(&mut self, other: &Spread) {
        for (to, from) in self.buckets.iter_mut().zip(&other.buckets) {
            *to += from;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.worst = self.worst.max(other.worst);
    }

    /// Return the number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Return the mean; 0 without values.
    pub fn mean(&self) -> f64 {
        self.sum as f64 / self.count.max(1) as f64
    }

    /// Return the largest value.
    pub fn worst(&self) -> u64 {
        self.worst
    }

    /// Return the quantile for `share`, from 0 to 1: that share of the values does not exceed it.
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = (self.count as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (place, values) in self.buckets.iter().enumerate() {
            seen += values;
            if seen >= rank {
                return bucket_max(place).min(self.worst);
            }
        }
        self.worst
    }
}

fn bucket(value: u64) -> usize {
    let value = value.max(1);
    let power = value.ilog2() as usize;
    // The five bits below the highest one.
    let part = ((u128::from(value) * PARTS as u128) >> power) as usize - PARTS;
    power * PARTS + part
}

/// Return the largest value of a bucket.
fn bucket_max(place: usize) -> u64 {
    let (power, part) = (place / PARTS, place % PARTS);
    let end = ((PARTS + part + 1) as u128) << power;
    (end.div_ceil(PARTS as u128) - 1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_too_high_by_at_most_a_thirty_second() {
        let mut spread = Spread::default();
        for value in 1..=100_000_u64 {
            spread.add(value);
        }
        for (share, exact) in [
            (0.5, 50_000),
            (0.99, 99_000),
            (0.999, 99_900),
            (1.0, 100_000),
        ] {
            let read = spread.quantile(share);
            assert!(
                read >= exact && read - exact <= exact / 32,
                "{share}: {read}"
            );
        }
        assert_eq!((spread.count(), spread.worst()), (100_000, 100_000));
        assert_eq!(bucket_max(bucket(u64::MAX)), u64::MAX);
    }
}
