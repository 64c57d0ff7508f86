// SPDX-License-Identifier: GPL-2.0

//! Which value belongs to which key: a table with open addressing, read without a lock.
//!
//! Keys are addresses of vCPUs, values those of their ledgers. A key is looked up only by
//! the thread that owns it, and inserted and removed by that thread too (or when no thread
//! owns it any more): so a look-up never races with a change of its own key, and what
//! changes around it, other keys, must only not hide it. That holds because a place that
//! was taken never becomes empty again while a key stands behind it.

use super::atomic::{AtomicUsize, Ordering};

/// A place of the table. All-zero bytes are an empty one.
#[derive(Debug, Default)]
pub struct Entry {
    key: AtomicUsize,
    value: AtomicUsize,
}

/// A key that no place holds: never taken.
const EMPTY: usize = 0;
/// A place that held a key once, behind which others may stand.
const GONE: usize = 1;

/// The table has no place for one more key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A view of the places.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a>(&'a [Entry]);

impl<'a> Table<'a> {
    /// The table in `entries`, whose count is a power of two; of another count some places
    /// stay unused.
    #[inline(always)]
    pub const fn new(entries: &'a [Entry]) -> Self {
        Self(entries)
    }

    /// Where a key is looked for first; the places after it follow.
    #[inline(always)]
    fn home(&self, key: usize) -> usize {
        // Addresses differ in their middle bits; the product spreads them to the top ones.
        ((key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize
    }

    /// The place at a number, counted around. There is none in an empty table alone.
    #[inline(always)]
    fn place(&self, at: usize) -> Option<&'a Entry> {
        self.0.get(at & self.0.len().wrapping_sub(1))
    }

    /// The places to look at for a key, the likely one first.
    #[inline(always)]
    fn places(&self, key: usize) -> impl Iterator<Item = &'a Entry> {
        let (table, home) = (*self, self.home(key));
        (0..self.0.len()).filter_map(move |step| table.place(home.wrapping_add(step)))
    }

    /// The value of a key, or 0. Without a lock; the caller owns the key.
    #[inline(always)]
    pub fn get(&self, key: usize) -> usize {
        for entry in self.places(key) {
            match entry.key.load(Ordering::Relaxed) {
                found if found == key => return entry.value.load(Ordering::Relaxed),
                EMPTY => return 0,
                _ => {}
            }
        }
        0
    }

    /// Adds a key that is not there, above 1. The caller keeps changes apart.
    ///
    /// # Errors
    ///
    /// [`Full`] when no place is free.
    pub fn insert(&self, key: usize, value: usize) -> Result<(), Full> {
        for entry in self.places(key) {
            if matches!(entry.key.load(Ordering::Relaxed), EMPTY | GONE) {
                entry.value.store(value, Ordering::Relaxed);
                // ORDERING: Who sees the key sees the value.
                entry.key.store(key, Ordering::Release);
                return Ok(());
            }
        }
        Err(Full)
    }

    /// Takes a key away; its value, or 0 when it was not there. The caller keeps changes
    /// apart.
    pub fn remove(&self, key: usize) -> usize {
        let home = self.home(key);
        for step in 0..self.0.len() {
            let at = home.wrapping_add(step);
            let Some(entry) = self.place(at) else {
                return 0;
            };
            match entry.key.load(Ordering::Relaxed) {
                found if found == key => {
                    let value = entry.value.load(Ordering::Relaxed);
                    entry.key.store(GONE, Ordering::Relaxed);
                    self.clear_graves_up_to(at);
                    return value;
                }
                EMPTY => return 0,
                _ => {}
            }
        }
        0
    }

    /// Empties the freed places up to `at` when nothing stands behind them, so that churn
    /// does not fill the table with graves. A reader whose key stands elsewhere either ends
    /// at one of these places, rightly, or goes on.
    fn clear_graves_up_to(&self, at: usize) {
        let is = |at, kind| {
            self.place(at)
                .is_some_and(|entry| entry.key.load(Ordering::Relaxed) == kind)
        };
        if !is(at.wrapping_add(1), EMPTY) {
            return;
        }
        for step in 0..self.0.len() {
            let at = at.wrapping_sub(step);
            match self.place(at) {
                Some(grave) if is(at, GONE) => grave.key.store(EMPTY, Ordering::Relaxed),
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// The most of what is changed of one table. Miri takes a thousand times as long.
    const CHANGES: usize = if cfg!(miri) { 60 } else { 2000 };

    proptest! {
        #[test]
        fn behaves_as_a_map(changes in proptest::collection::vec((any::<bool>(), 1_usize..40), 0..CHANGES)) {
            let entries: Vec<Entry> = (0..32).map(|_| Entry::default()).collect();
            let table = Table::new(&entries);
            let mut model = HashMap::new();
            for (insert, number) in changes {
                let key = number * 0x1_2340;
                if insert && !model.contains_key(&key) {
                    match table.insert(key, number) {
                        Ok(()) => { model.insert(key, number); }
                        Err(Full) => prop_assert_eq!(model.len(), 32),
                    }
                } else {
                    prop_assert_eq!(table.remove(key), model.remove(&key).unwrap_or(0));
                }
                for number in 1..40 {
                    let key = number * 0x1_2340;
                    prop_assert_eq!(table.get(key), model.get(&key).copied().unwrap_or(0));
                }
            }
        }
    }

    #[test]
    fn churn_leaves_an_empty_table_empty() {
        let entries: Vec<Entry> = (0..64).map(|_| Entry::default()).collect();
        let table = Table::new(&entries);
        // Miri takes a thousand times as long.
        let rounds = if cfg!(miri) { 100 } else { 100_000 };
        for round in 1..rounds {
            for number in 0..8 {
                table
                    .insert((round * 8 + number) << 6, round)
                    .expect("room");
            }
            for number in 0..8 {
                assert_eq!(table.remove((round * 8 + number) << 6), round);
            }
        }
        assert!(entries
            .iter()
            .all(|entry| entry.key.load(Ordering::Relaxed) == EMPTY));
    }
}
