// SPDX-License-Identifier: GPL-2.0

//! A token bucket: allows a burst of events, and in the long run one per interval.

use core::sync::atomic::{
    AtomicU64,
    Ordering, //
};

/// Attempts to take a token while other threads take one too. A thread that loses each time is
/// refused, so that no thread spins.
const TRIES: usize = 8;

/// A bucket that any thread may take from, without a lock.
#[derive(Debug)]
pub struct Bucket {
    /// Time at which the bucket is full again, in nanoseconds.
    full_at: AtomicU64,
    /// Time until one token comes back, in nanoseconds.
    interval: u64,
    /// Time until all tokens come back, in nanoseconds.
    span: u64,
}

impl Bucket {
    /// Create a full bucket of `size` tokens. One token comes back each `interval` nanoseconds.
    pub const fn new(size: u32, interval: u64) -> Self {
        Self {
            full_at: AtomicU64::new(0),
            interval,
            span: interval.saturating_mul(size as u64),
        }
    }

    /// Take a token at the time `now`, in nanoseconds of a monotonic clock. Return false if there
    /// is none.
    pub fn take(&self, now: u64) -> bool {
        let mut full_at = self.full_at.load(Ordering::Relaxed);
        for _ in 0..TRIES {
            let then = full_at.max(now).saturating_add(self.interval);
            if then.saturating_sub(now) > self.span {
                return false;
            }
            let taken = self.full_at.compare_exchange_weak(
                full_at,
                then,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match taken {
                Ok(_) => return true,
                Err(seen) => full_at = seen,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const SECOND: u64 = 1_000_000_000;

    fn taken(bucket: &Bucket, now: u64, tries: u32) -> u32 {
        (0..tries).map(|_| u32::from(bucket.take(now))).sum()
    }

    #[test]
    fn allows_a_burst_and_then_one_per_interval() {
        let bucket = Bucket::new(200, SECOND / 8);
        for start in [0, 3600 * SECOND] {
            assert_eq!(taken(&bucket, start, 10_000), 200);
            assert_eq!(taken(&bucket, start + SECOND / 8 - 1, 10_000), 0);
            assert_eq!(taken(&bucket, start + SECOND / 8, 10_000), 1);
            // A refused take costs no token: 79 more have come back.
            assert_eq!(taken(&bucket, start + 10 * SECOND, 10_000), 79);
            assert_eq!(taken(&bucket, start + 10 * SECOND, 10_000), 0);
        }
    }

    /// The kernel's own rate limit works by windows, and allows twice its size around a window's
    /// border.
    #[test]
    fn no_interval_allows_more_than_the_size_and_the_refill() {
        let bucket = Bucket::new(20, SECOND);
        let events: Vec<u64> = (0..100 * 7)
            .map(|step| step * SECOND / 7)
            .filter(|now| bucket.take(*now))
            .collect();
        for (place, from) in events.iter().enumerate() {
            for (count, to) in (1..).zip(events.iter().skip(place)) {
                let back = (to - from) / SECOND;
                assert!(count <= 20 + back + 1, "{count} from {from} to {to}");
            }
        }
    }

    #[test]
    fn threads_share_the_tokens() {
        let bucket = Bucket::new(1000, SECOND);
        let count = thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| taken(&bucket, 5, 10_000)))
                .collect();
            threads
                .into_iter()
                .map(|it| it.join().unwrap_or(0))
                .sum::<u32>()
        });
        assert_eq!(count, 1000);
    }
}
