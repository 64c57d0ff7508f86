// SPDX-License-Identifier: GPL-2.0

//! Histograms of the cost of exits, with `PARTS` buckets for each power of two.
//!
//! With two, a bucket is half a power of two wide, and a quantile read from it errs by at most 20%
//! (see [`middle`]). The first bucket counts all samples below 96 ticks, less than any exit costs,
//! and the last one all from 1.5 × 2^37, more than a minute of work for one exit.
//!
//! Eight would take the same instructions on the exit path and bound the error by 6%. They would
//! also take 2 KiB for each reason: docs/performance.md has the numbers. The mean and the
//! maximum of a reason are exact in any case.

use core::num::NonZero;

/// Power of two of the first bucket, which also counts what lies below.
pub const FIRST_POWER: u32 = 6;

/// Powers of two that have buckets.
const POWERS: u32 = 32;

/// Buckets in each power of two, as a power of two.
pub const PARTS_POWER: u32 = 1;

/// Buckets in each power of two.
const PARTS: u32 = 1 << PARTS_POWER;

/// Number of buckets.
pub const BUCKETS: usize = (POWERS << PARTS_POWER) as usize;

/// Samples by bucket.
pub type Buckets = [u64; BUCKETS];

/// A histogram without samples.
pub const EMPTY: Buckets = [0; BUCKETS];

/// Step of the first bucket: see [`step`].
const FIRST_STEP: usize = ((FIRST_POWER + 1) << PARTS_POWER) as usize;

/// Return the bucket of a value, below [`BUCKETS`].
#[inline]
pub const fn bucket(ticks: u64) -> usize {
    match usual_bucket(ticks) {
        Some(bucket) => bucket,
        None if ticks < 1 << FIRST_POWER => 0,
        None => match step(ticks).wrapping_sub(FIRST_STEP) {
            bucket if bucket < BUCKETS => bucket,
            _ => BUCKETS - 1,
        },
    }
}

/// Return the bucket of a value; `None` if an exit does not cost that: less than 2^6 ticks, or more
/// than 2^37, which is 45 s at 3 GHz.
///
/// The bounds are chosen, and the numbers have the widths, that take the exit path the fewest
/// instructions.
#[inline(always)]
pub(super) const fn usual_bucket(ticks: u64) -> Option<usize> {
    const SPAN: u32 = FIRST_POWER + POWERS - 1;
    if ticks.wrapping_sub(1 << FIRST_POWER) >> SPAN != 0 {
        return None;
    }
    Some(step(ticks).wrapping_sub(FIRST_STEP))
}

/// Return how many steps lie below a value, where each power of two is [`PARTS`] steps.
#[inline(always)]
const fn step(ticks: u64) -> usize {
    let not_0 = match NonZero::new(ticks) {
        Some(ticks) => ticks,
        None => NonZero::<u64>::MIN,
    };
    let power = 63 ^ not_0.leading_zeros();
    // The topmost bits: PARTS to 2 * PARTS - 1.
    let part = ticks.wrapping_shl(PARTS_POWER).wrapping_shr(power) as u32;
    power.wrapping_mul(PARTS).wrapping_add(part) as usize
}

/// Return the part of its power of two that a bucket is, from [`PARTS`] on, and the width of such a
/// part.
const fn part_and_width(bucket: usize) -> (u64, u64) {
    let part = bucket as u32 % PARTS + PARTS;
    let power = (bucket as u32 >> PARTS_POWER).wrapping_add(FIRST_POWER - PARTS_POWER);
    (part as u64, 1_u64.wrapping_shl(power))
}

/// Return the least value of a bucket.
pub const fn low(bucket: usize) -> u64 {
    match bucket {
        0 => 0,
        _ => {
            let (part, width) = part_and_width(bucket);
            part.wrapping_mul(width)
        }
    }
}

/// Return the value that stands for a bucket, with the same relative distance from both of its
/// bounds: at most 20%. The last bucket has no upper bound, and its least value stands for it.
pub fn middle(bucket: usize) -> u64 {
    let (part, width) = part_and_width(bucket);
    if bucket >= BUCKETS.wrapping_sub(1) {
        return part.wrapping_mul(width);
    }
    // 2ab / (a + b), where a is the part and b the next one.
    let next = part.wrapping_add(1);
    let twice = width.wrapping_mul(2).wrapping_mul(part).wrapping_mul(next);
    twice.wrapping_div(part.wrapping_add(next))
}

/// Return the value that `percent` of the samples do not exceed, 0 to 100; `None` without samples.
/// `max` is the greatest sample, which is known exactly.
pub fn quantile(buckets: &Buckets, max: u64, percent: u64) -> Option<u64> {
    let count = buckets.iter().fold(0, |sum: u64, n| sum.wrapping_add(*n));
    if count == 0 {
        return None;
    }
    let rank = u128::from(count)
        .wrapping_mul(u128::from(percent))
        .div_ceil(100)
        .max(1);
    let mut seen = 0_u128;
    for (bucket, samples) in buckets.iter().enumerate() {
        seen = seen.wrapping_add(u128::from(*samples));
        if seen >= rank {
            return Some(middle(bucket).min(max));
        }
    }
    Some(max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for place in 1..BUCKETS {
            assert_eq!(bucket(low(place)), place);
            assert_eq!(bucket(low(place) - 1), place - 1);
        }
        assert_eq!(
            (bucket(0), bucket(1), bucket(95), bucket(96), bucket(128)),
            (0, 0, 0, 1, 2)
        );
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(low(BUCKETS - 1), 3 << 36);
    }

    #[test]
    fn quantiles_of_known_samples() {
        assert_eq!(quantile(&EMPTY, 0, 50), None);
        let mut buckets = EMPTY;
        for ticks in 1..=1000_u64 {
            buckets[bucket(1000 * ticks)] += 1;
        }
        for (percent, exact) in [(50, 500_000), (90, 900_000), (99, 990_000)] {
            let read = quantile(&buckets, 1_000_000, percent).expect("samples");
            assert!(
                read.abs_diff(exact) * 5 <= exact,
                "{percent}: {read}, {exact}"
            );
        }
        assert_eq!(quantile(&buckets, 1_000_000, 0), Some(middle(bucket(1000))));
        let mut one = EMPTY;
        one[bucket(1234)] = 1;
        assert_eq!(
            quantile(&one, 1234, 100),
            Some(1234.min(middle(bucket(1234))))
        );
    }

    /// Return the value with the rank that [`quantile`] takes.
    fn exact(samples: &[u64], percent: u64) -> u64 {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let rank = (samples.len() as u64 * percent).div_ceil(100).max(1);
        sorted[rank as usize - 1]
    }

    proptest! {
        /// The histograms of vCPUs with very different exits are summed. A quantile of the sum is
        /// one of all their samples.
        #[test]
        fn a_quantile_of_a_sum_errs_by_a_fifth_at_most(
            vcpus in proptest::collection::vec(
                (6_u32..36, proptest::collection::vec(any::<u64>(), 0..60)),
                1..5,
            ),
            percent in 0_u64..=100,
        ) {
            let (mut sum, mut all) = (EMPTY, Vec::new());
            for (power, samples) in vcpus {
                let mut buckets = EMPTY;
                for sample in samples {
                    // From 2^power to below 2^(power + 2).
                    let ticks = (1 << power) + sample % (3 << power);
                    buckets[bucket(ticks)] += 1;
                    all.push(ticks);
                }
                for (to, from) in sum.iter_mut().zip(buckets) {
                    *to += from;
                }
            }
            let max = all.iter().copied().max().unwrap_or(0);
            let read = quantile(&sum, max, percent);
            prop_assert_eq!(read.is_none(), all.is_empty());
            if let Some(read) = read {
                let exact = exact(&all, percent);
                prop_assert!(read <= max);
                prop_assert!(read.abs_diff(exact) <= exact / 5 + 1, "{read}, exactly {exact}");
            }
        }

        #[test]
        fn a_value_errs_by_a_fifth_at_most(ticks in 64_u64..3 << 36) {
            let read = middle(bucket(ticks));
            prop_assert!(read.abs_diff(ticks) <= ticks / 5 + 1, "{ticks} read as {read}");
        }

        #[test]
        fn any_value_has_a_bucket(ticks in any::<u64>()) {
            prop_assert!(bucket(ticks) < BUCKETS);
            prop_assert!(low(bucket(ticks)) <= ticks);
        }
    }
}
