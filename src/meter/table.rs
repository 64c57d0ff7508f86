// SPDX-License-Identifier: GPL-2.0

//! Which value belongs to which key: a table with open addressing, read without a lock.
//!
//! Keys are addresses of vCPUs, values those of their ledgers. A key is looked up only by
//! the thread that owns it, and inserted and removed by that thread too (or when no thread
//! owns it any more): so a look-up never races with a change of its own key, and what
//! changes around it, other keys, must only not hide it. That holds because a place that
//! was taken never becomes empty again while a key stands behind it.

use core::sync::atomic::{AtomicUsize, Ordering};

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

/// A view of the places, whose count is a power of two.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a>(&'a [Entry]);

impl<'a> Table<'a> {
    /// The table in `entries`; `None` unless their count is a power of two.
    pub fn new(entries: &'a [Entry]) -> Option<Self> {
        entries.len().is_power_of_two().then_some(Self(entries))
    }

    /// The places to look at for a key, the likely one first.
    #[inline(always)]
    fn places(&self, key: usize) -> impl Iterator<Item = &'a Entry> {
        let mask = self.0.len().wrapping_sub(1);
        // Addresses differ in their middle bits; the product spreads them to the top ones.
        let hash = (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let entries = self.0;
        (0..entries.len())
            .filter_map(move |step| entries.get((hash as usize).wrapping_add(step) & mask))
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
        let mut places = self.places(key);
        let Some(entry) =
            places
                .by_ref()
                .find_map(|entry| match entry.key.load(Ordering::Relaxed) {
                    found if found == key => Some(Some(entry)),
                    EMPTY => Some(None),
                    _ => None,
                })
        else {
            return 0;
        };
        let Some(entry) = entry else { return 0 };
        let value = entry.value.load(Ordering::Relaxed);
        // With nothing behind it the place may be empty again, and with it every freed
        // place right before it: so churn does not fill the table with graves. A reader
        // whose key stands elsewhere either ends at this place, rightly, or goes on.
        let behind_is_empty = places
            .next()
            .is_none_or(|next| next.key.load(Ordering::Relaxed) == EMPTY);
        entry.key.store(
            if behind_is_empty { EMPTY } else { GONE },
            Ordering::Relaxed,
        );
        if behind_is_empty {
            self.clear_graves_before(entry);
        }
        value
    }

    /// Empties the freed places right before a place that is empty.
    fn clear_graves_before(&self, entry: &Entry) {
        let mask = self.0.len().wrapping_sub(1);
        let Some(at) = self.0.iter().position(|other| core::ptr::eq(other, entry)) else {
            return;
        };
        for step in 1..self.0.len() {
            match self.0.get(at.wrapping_sub(step) & mask) {
                Some(grave) if grave.key.load(Ordering::Relaxed) == GONE => {
                    grave.key.store(EMPTY, Ordering::Relaxed);
                }
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

    proptest! {
        #[test]
        fn behaves_as_a_map(changes in proptest::collection::vec((any::<bool>(), 1_usize..40), 0..2000)) {
            let entries: Vec<Entry> = (0..32).map(|_| Entry::default()).collect();
            let table = Table::new(&entries).expect("a power of two");
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
        let table = Table::new(&entries).expect("a power of two");
        for round in 1..100_000_usize {
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
        assert!(Table::new(&entries[..3]).is_none());
    }
}
