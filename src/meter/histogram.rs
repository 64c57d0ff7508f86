// SPDX-License-Identifier: GPL-2.0

//! Histograms of what exits cost: two buckets for each power of two.
//!
//! A bucket is half a power of two wide, so a quantile read from it errs by at most 20% (see
//! [`middle`]). The first bucket takes all below 96 ticks, less than any exit costs, and the
//! last all from 1.5 × 2^37, more than a minute of work for one exit.

use core::num::NonZero;

/// How many buckets a histogram has.
pub const BUCKETS: usize = 64;

/// The power of two that the first bucket is of; it takes what lies below as well.
pub const FIRST_POWER: u32 = 6;

/// Into how many parts each power of two is divided, as a power of two.
pub const PARTS_POWER: u32 = 1;

/// Samples by bucket.
pub type Buckets = [u64; BUCKETS];

/// A histogram without samples.
pub const EMPTY: Buckets = [0; BUCKETS];

/// The half power of two with which the first bucket begins.
const FIRST_STEP: usize = (FIRST_POWER as usize + 1) << PARTS_POWER;

/// Return the bucket of a value, below [`BUCKETS`].
#[inline]
pub const fn bucket(ticks: u64) -> usize {
    match usual_bucket(ticks) {
        Some(bucket) => bucket,
        None if ticks < 1 << FIRST_POWER => 0,
        // The last power of two is all of the last two buckets.
        None => match step(ticks).wrapping_sub(FIRST_STEP) {
            bucket if bucket < BUCKETS => bucket,
            _ => BUCKETS - 1,
        },
    }
}

/// Return the bucket of a value; `None` for what an exit does not cost: less than 64 ticks, or more
/// than 2^37, which is 45 s at 3 GHz.
///
/// The bounds are chosen, and the numbers have the widths, that take the hot path the fewest
/// instructions.
#[inline(always)]
pub(super) const fn usual_bucket(ticks: u64) -> Option<usize> {
    const SPAN: u32 = FIRST_POWER + (BUCKETS as u32 >> PARTS_POWER) - 1;
    if ticks.wrapping_sub(1 << FIRST_POWER) >> SPAN != 0 {
        return None;
    }
    Some(step(ticks).wrapping_sub(FIRST_STEP))
}

/// Return how many half powers of two a value takes.
#[inline(always)]
const fn step(ticks: u64) -> usize {
    let not_0 = match NonZero::new(ticks) {
        Some(ticks) => ticks,
        None => NonZero::<u64>::MIN,
    };
    // Where the topmost bit stands; that bit and the one below it are 2 or 3.
    let power = 63 ^ not_0.leading_zeros();
    let two_bits = ticks.wrapping_shl(1).wrapping_shr(power) as u32;
    power.wrapping_mul(2).wrapping_add(two_bits) as usize
}

/// The least value of a bucket.
pub const fn low(bucket: usize) -> u64 {
    if bucket == 0 {
        return 0;
    }
    let half = 2_u64.wrapping_add(bucket as u64 & 1);
    let power = (bucket as u32 / 2).wrapping_add(FIRST_POWER.wrapping_sub(1));
    half.wrapping_shl(power)
}

/// The value that a bucket is read as: the one that is off by the same share of its least and
/// of its greatest value, by 20% at most. Of the last bucket, its least value.
pub fn middle(bucket: usize) -> u64 {
    let low = match bucket {
        0 => 1 << FIRST_POWER,
        _ => low(bucket),
    };
    if bucket >= BUCKETS.wrapping_sub(1) {
        return low;
    }
    // 2ab / (a + b) of [2x, 3x) and of [3x, 4x).
    let x = low.wrapping_div(2_u64.wrapping_add(bucket as u64 & 1));
    match bucket & 1 {
        0 => x.wrapping_mul(12).wrapping_div(5),
        _ => x.wrapping_mul(24).wrapping_div(7),
    }
}

/// The value that a share of the samples does not exceed, `percent` from 0 to 100; `None`
/// without samples. `max` is the greatest sample, which is known exactly.
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

    /// The value of a rank among samples, as [`quantile`] takes it.
    fn exact(samples: &[u64], percent: u64) -> u64 {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let rank = (samples.len() as u64 * percent).div_ceil(100).max(1);
        sorted[rank as usize - 1]
    }

    proptest! {
        /// vCPUs whose exits differ much: their histograms are summed, and a quantile of the
        /// sum is still one of all their samples.
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
