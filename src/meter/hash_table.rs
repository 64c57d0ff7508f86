// SPDX-License-Identifier: GPL-2.0

//! Map from keys to values: a hash table with open addressing that is read without a lock.
//!
//! Keys are addresses of vCPUs, values are addresses of their ledgers. Only the thread that owns a
//! key looks it up, inserts it and removes it (another thread may remove it once no thread owns
//! it). So a look-up never races with a change of its own key. Changes of other keys must only not
//! hide it. They do not, because a place that was once taken never becomes empty again while a key
//! stands behind it.

use super::atomic::{AtomicUsize, Ordering};

/// Place of the table. All-zero bytes are an empty place.
#[derive(Debug, Default)]
pub struct HashEntry {
    key: AtomicUsize,
    value: AtomicUsize,
}

/// Key of a place that was never taken.
const EMPTY: usize = 0;
/// Key of a place that was freed. Other keys may stand behind it.
const GONE: usize = 1;

/// Error: the table has no place for one more key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// View of the places.
#[derive(Clone, Copy, Debug)]
pub struct HashTable<'a>(&'a [HashEntry]);

impl<'a> HashTable<'a> {
    /// Create a table in `entries`. Their count should be a power of two; otherwise some places
    /// stay unused.
    #[inline(always)]
    pub const fn new(entries: &'a [HashEntry]) -> Self {
        Self(entries)
    }

    /// Return the place number where the search for a key starts. The search goes on at the places
    /// after it.
    #[inline(always)]
    fn home(&self, key: usize) -> usize {
        // Addresses differ in their middle bits; the product spreads these to the top bits.
        ((key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize
    }

    /// Return a place by its number, modulo the size. Only an empty table has none.
    #[inline(always)]
    fn place(&self, at: usize) -> Option<&'a HashEntry> {
        self.0.get(at & self.0.len().wrapping_sub(1))
    }

    /// Return the places to search for a key, the likely one first.
    #[inline(always)]
    fn places(&self, key: usize) -> impl Iterator<Item = &'a HashEntry> {
        let (table, home) = (*self, self.home(key));
        (0..self.0.len()).filter_map(move |step| table.place(home.wrapping_add(step)))
    }

    /// Return the value of a key, or 0. Takes no lock; the caller owns the key.
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

    /// Add a key above 1 that is not in the table. The caller serializes changes.
    ///
    /// # Errors
    ///
    /// [`Full`] when no place is free.
    pub fn insert(&self, key: usize, value: usize) -> Result<(), Full> {
        for entry in self.places(key) {
            if matches!(entry.key.load(Ordering::Relaxed), EMPTY | GONE) {
                entry.value.store(value, Ordering::Relaxed);
                // ORDERING: A reader that sees the key sees the value.
                entry.key.store(key, Ordering::Release);
                return Ok(());
            }
        }
        Err(Full)
    }

    /// Remove a key. Return its value, or 0 if it was not in the table. The caller serializes
    /// changes.
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
                    self.clear_freed_up_to(at);
                    return value;
                }
                EMPTY => return 0,
                _ => {}
            }
        }
        0
    }

    /// Empty the freed places up to `at` if nothing stands behind them, so that churn does not fill
    /// the table with freed places. A reader whose key stands elsewhere either stops at one of
    /// these places, which is right, or goes on.
    fn clear_freed_up_to(&self, at: usize) {
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
                Some(freed) if is(at, GONE) => freed.key.store(EMPTY, Ordering::Relaxed),
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

    /// Maximum number of changes of one table. Miri takes a thousand times as long.
    const CHANGES: usize = if cfg!(miri) { 60 } else { 2000 };

    proptest! {
        #[test]
        fn behaves_like_a_hash_map(changes in proptest::collection::vec((any::<bool>(), 1_usize..40), 0..CHANGES)) {
            let entries: Vec<HashEntry> = (0..32).map(|_| HashEntry::default()).collect();
            let table = HashTable::new(&entries);
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
        let entries: Vec<HashEntry> = (0..64).map(|_| HashEntry::default()).collect();
        let table = HashTable::new(&entries);
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
