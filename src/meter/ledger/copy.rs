// SPDX-License-Identifier: GPL-2.0

//! Copies of ledgers, which do not change any more: of one vCPU, and sums over many.

use crate::meter::{
    histogram::{Buckets, EMPTY},
    leaves::Numbers,
    phase::Phase,
    reasons::{Slot, SLOTS},
};

use super::{RowCopy, HISTOGRAMS};

/// Words of the bitmap of rows in use.
pub(super) const WORDS: usize = SLOTS.div_ceil(64);

/// Histogram of a row that has none.
static NONE: Buckets = EMPTY;

/// Iterator over the slots whose bits are set.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    rows: [u64; WORDS],
    word: usize,
}

impl Iterator for Slots {
    type Item = Slot;

    #[inline]
    fn next(&mut self) -> Option<Slot> {
        loop {
            let bits = self.rows.get_mut(self.word)?;
            if *bits != 0 {
                let bit = bits.trailing_zeros() as usize;
                *bits &= bits.wrapping_sub(1);
                return Slot::from_index(self.word.wrapping_mul(64).wrapping_add(bit));
            }
            self.word = self.word.wrapping_add(1);
        }
    }
}

/// Return the slots whose bits are set.
#[inline]
fn slots_in(rows: [u64; WORDS]) -> Slots {
    Slots { rows, word: 0 }
}

/// Set the bit of a slot.
#[inline]
pub(super) fn set(rows: &mut [u64; WORDS], slot: Slot) {
    if let Some(word) = rows.get_mut(slot.index() / 64) {
        *word |= 1_u64.wrapping_shl(slot.index() as u32 % 64);
    }
}

/// Copy of a ledger at one moment. All-zero bytes are a valid, empty copy.
#[derive(Clone, Debug)]
pub struct LedgerCopy {
    pub(super) phase: u32,
    pub(super) slot: u32,
    /// TSC at the vCPU's first event.
    pub first: u64,
    /// TSC at its latest transition.
    pub last: u64,
    /// Time that KVM polled before it let the vCPU sleep, in ns by KVM's own count. The ledger does
    /// not have it: the caller who makes the copy adds it.
    pub polled: u64,
    pub(super) used: [u64; WORDS],
    rows: [RowCopy; SLOTS],
    /// By slot: number of its histogram, from 1; 0 for none.
    numbers: [u8; SLOTS],
    /// By slot: kernel ticks at which its histogram was copied, plus 1; 0 while it was not.
    sampled: [u64; SLOTS],
    histograms: [Buckets; HISTOGRAMS],
}

impl LedgerCopy {
    /// Create an empty copy.
    pub const fn new() -> Self {
        Self {
            phase: 0,
            slot: 0,
            first: 0,
            last: 0,
            polled: 0,
            used: [0; WORDS],
            rows: [RowCopy::EMPTY; SLOTS],
            numbers: [0; SLOTS],
            sampled: [0; SLOTS],
            histograms: [EMPTY; HISTOGRAMS],
        }
    }

    /// Set the numbers of a slot.
    #[inline]
    pub(super) fn set_row(&mut self, slot: Slot, row: RowCopy) {
        if let Some(to) = self.rows.get_mut(slot.index()) {
            *to = row;
        }
    }

    /// Set the number of a slot's histogram, 0 for none.
    #[inline]
    pub(super) fn set_number(&mut self, slot: Slot, number: usize) {
        if let Some(to) = self.numbers.get_mut(slot.index()) {
            *to = number as u8;
        }
    }

    #[inline]
    pub(super) fn sampled(&self, slot: Slot) -> u64 {
        self.sampled.get(slot.index()).copied().unwrap_or(0)
    }

    /// Forget all histograms, so that the next copy takes them again.
    pub(super) fn forget_histograms(&mut self) {
        self.sampled = [0; SLOTS];
    }

    /// Forget the histograms of the slots whose bits are set.
    pub(super) fn forget_histograms_of(&mut self, rows: [u64; WORDS]) {
        for slot in slots_in(rows) {
            self.set_sampled(slot, 0);
        }
    }

    #[inline]
    pub(super) fn set_sampled(&mut self, slot: Slot, sampled: u64) {
        if let Some(to) = self.sampled.get_mut(slot.index()) {
            *to = sampled;
        }
    }

    /// Set the samples of the histogram with a number, from 1.
    #[inline]
    pub(super) fn set_histogram(&mut self, number: usize, samples: impl Fn(usize) -> u64) {
        if let Some(to) = self.histograms.get_mut(number.wrapping_sub(1)) {
            for (bucket, to) in to.iter_mut().enumerate() {
                *to = samples(bucket);
            }
        }
    }

    /// Return true if the vCPU has had no event yet.
    pub fn is_empty(&self) -> bool {
        self.used == [0; WORDS]
    }

    /// Return the phase that the vCPU was in.
    pub fn phase(&self) -> Phase {
        Phase::from_number(self.phase).unwrap_or(Phase::Kernel)
    }

    /// Return the slot of its latest exit.
    pub fn slot(&self) -> Slot {
        Slot::from_index(self.slot as usize).unwrap_or(Slot::OTHER)
    }

    /// Return the numbers of a slot; zeroes for one that has no row.
    pub fn row(&self, slot: Slot) -> RowCopy {
        let used = self.used.get(slot.index() / 64).copied().unwrap_or(0);
        // A copy that is made again still holds rows of the one before.
        match used >> (slot.index() % 64) & 1 {
            0 => RowCopy::EMPTY,
            _ => self.rows.get(slot.index()).copied().unwrap_or_default(),
        }
    }

    /// Return the rows in use.
    pub fn rows(&self) -> impl Iterator<Item = (Slot, &RowCopy, &Buckets)> {
        slots_in(self.used).filter_map(|slot| {
            let row = self.rows.get(slot.index())?;
            Some((slot, row, self.histogram(slot)))
        })
    }

    /// Return the histogram of a slot. It has one sample for each exit that an entry followed.
    pub fn histogram(&self, slot: Slot) -> &Buckets {
        let number = self.numbers.get(slot.index()).copied().unwrap_or(0);
        let place = usize::from(number).wrapping_sub(1);
        self.histograms.get(place).unwrap_or(&NONE)
    }

    /// Return true if the cells sum to the time from the first to the last event, to the tick.
    pub fn balances(&self) -> bool {
        let mut sum = 0_u64;
        for (_, row, _) in self.rows() {
            for cycles in row.cycles {
                sum = sum.wrapping_add(cycles);
            }
        }
        sum == self.last.wrapping_sub(self.first)
    }
}

impl Default for LedgerCopy {
    fn default() -> Self {
        Self::new()
    }
}

/// Sums over many vCPUs, mostly over those that are gone. All-zero bytes are valid totals of
/// no vCPU.
#[derive(Clone, Debug)]
pub struct Totals {
    /// Number of vCPUs in the sums.
    pub vcpus: u64,
    /// Time that KVM polled before it let these vCPUs sleep, in ns.
    pub polled: u64,
    rows: [RowCopy; SLOTS],
    histograms: [Buckets; SLOTS],
}

impl Totals {
    /// Create totals of no vCPU.
    pub const fn new() -> Self {
        Self {
            vcpus: 0,
            polled: 0,
            rows: [RowCopy::EMPTY; SLOTS],
            histograms: [EMPTY; SLOTS],
        }
    }

    /// Add a vCPU's numbers.
    pub fn fold(&mut self, ledger: &LedgerCopy) {
        self.vcpus = self.vcpus.wrapping_add(1);
        self.polled = self.polled.wrapping_add(ledger.polled);
        for (slot, row, histogram) in ledger.rows() {
            self.add_row(slot, row, histogram);
        }
    }

    /// Add other totals.
    pub fn add(&mut self, other: &Totals) {
        self.vcpus = self.vcpus.wrapping_add(other.vcpus);
        self.polled = self.polled.wrapping_add(other.polled);
        for (slot, row, histogram) in other.rows() {
            self.add_row(slot, row, histogram);
        }
    }

    /// Add the numbers of a slot.
    pub fn add_row(&mut self, slot: Slot, row: &RowCopy, histogram: &Buckets) {
        if let Some(to) = self.rows.get_mut(slot.index()) {
            to.add(row);
        }
        if let Some(to) = self.histograms.get_mut(slot.index()) {
            for (to, from) in to.iter_mut().zip(histogram) {
                *to = to.wrapping_add(*from);
            }
        }
    }

    /// Return the numbers of a slot.
    pub fn row(&self, slot: Slot) -> RowCopy {
        self.rows.get(slot.index()).copied().unwrap_or_default()
    }

    /// Return the rows that are not all zero.
    pub fn rows(&self) -> impl Iterator<Item = (Slot, &RowCopy, &Buckets)> {
        Slot::all().filter_map(|slot| {
            let row = self.rows.get(slot.index())?;
            let histogram = self.histograms.get(slot.index())?;
            (*row != RowCopy::EMPTY).then_some((slot, row, histogram))
        })
    }
}

impl Numbers for Totals {
    fn exits(&self, slot: Slot) -> u64 {
        self.row(slot).exits
    }

    fn nested_exits(&self, slot: Slot) -> u64 {
        self.row(slot).nested_exits
    }

    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        let row = self.row(slot);
        row.cycles.get(phase as usize).copied().unwrap_or(0)
    }
}

impl Default for Totals {
    fn default() -> Self {
        Self::new()
    }
}
