// SPDX-License-Identifier: GPL-2.0

//! The readers of a ledger, beside its writer: sums for guests, and copies for snapshots.

use super::{
    beside,
    copy::{set, WORDS},
    Histogram, Ledger, LedgerCopy, Place, Row, WithTables, OWN_HISTOGRAMS,
};
use crate::meter::{
    atomic::{
        fence,
        Ordering::{self, Relaxed},
    },
    phase::Phase,
    reasons::Slot,
};

/// Histograms besides those of the ledger itself, for a copy.
#[derive(Clone, Copy, Debug)]
pub struct More<'a>(Kind<'a>);

#[derive(Clone, Copy, Debug)]
enum Kind<'a> {
    Behind(&'a [Histogram]),
    Pointed,
}

impl<'a> More<'a> {
    /// No more histograms.
    pub const NONE: Self = Self::behind(&[]);

    /// Histograms in this memory. Exitmeter's BPF programs keep them behind the ledger.
    pub const fn behind(histograms: &'a [Histogram]) -> Self {
        Self(Kind::Behind(histograms))
    }

    /// Histograms that the ledger points to.
    ///
    /// # Safety
    ///
    /// A [`super::Supply`] must have given them to the ledger that is copied, and they must not be freed
    /// meanwhile.
    pub const unsafe fn pointed() -> Self {
        Self(Kind::Pointed)
    }

    fn of(self, ledger: &'a Ledger) -> &'a [Histogram] {
        match self.0 {
            Kind::Behind(histograms) => histograms,
            // ORDERING: A thread that finds them finds them zeroed.
            // SAFETY: By the invariant of `Ledger`, and the contract of `pointed`.
            Kind::Pointed => match unsafe { ledger.more.load(Ordering::Acquire).as_ref() } {
                Some(more) => &more.0,
                None => &[],
            },
        }
    }
}

/// Parts of a copy of a ledger and, if wanted, of the vCPU's tables.
#[derive(Debug)]
pub struct Copying<'a> {
    /// The ledger that is copied.
    pub ledger: &'a Ledger,
    /// Its histograms outside the ledger.
    pub more: More<'a>,
    /// Buffer for the copy.
    pub out: &'a mut LedgerCopy,
    /// The tables, and the buffer for their copy.
    pub tables: WithTables<'a, 'a>,
}

impl Ledger {
    /// Return the rows in use, with their slots.
    fn rows(&self) -> impl Iterator<Item = (Slot, Place)> + '_ {
        // ORDERING: A thread that sees that a row is in use sees its slot.
        let taken = self.taken.load(Ordering::Acquire) as usize;
        let slots = self.slots.iter().take(taken).enumerate();
        slots.filter_map(|(number, slot)| {
            let slot = Slot::from_index(slot.load(Relaxed).into())?;
            Some((slot, Place::of(number)))
        })
    }

    /// Return the row of a slot, or `None` while it has none of its own.
    fn row_of(&self, slot: Slot) -> Option<(Place, &Row)> {
        let place = self.places.get(slot.index())?.load(Relaxed);
        let place = Place::of(usize::from(place) / size_of::<Row>());
        (self.slot_at(place) == Some(slot)).then(|| (place, self.row_at(place)))
    }

    /// Return the slots in use, in the order of their first exits. For sums over many ledgers.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.rows().map(|(slot, _)| slot)
    }

    /// Return the exits of a slot.
    pub fn exits(&self, slot: Slot) -> u64 {
        self.row_of(slot)
            .map_or(0, |(_, row)| row.exits.load(Relaxed))
    }

    /// Return the exits of a slot that came from a nested guest.
    pub fn nested_exits(&self, slot: Slot) -> u64 {
        self.row_of(slot)
            .map_or(0, |(place, _)| beside(&self.nested, place))
    }

    /// Return the TSC ticks of a slot in a phase.
    pub fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        self.row_of(slot)
            .map_or(0, |(place, _)| self.cycles_at(place, phase))
    }

    /// Return the exits of all slots.
    pub fn total_exits(&self) -> u64 {
        self.rows().fold(0, |sum, (_, place)| {
            sum.wrapping_add(self.row_at(place).exits.load(Relaxed))
        })
    }

    /// Return the TSC ticks of all slots in a phase.
    pub fn total_cycles(&self, phase: Phase) -> u64 {
        self.rows().fold(0, |sum, (_, place)| {
            sum.wrapping_add(self.cycles_at(place, phase))
        })
    }

    /// Copy the ledger, without histograms outside it: see [`Copying::copy`].
    pub fn copy(&self, tries: u32, out: &mut LedgerCopy) -> Option<u32> {
        self.copying(out, &mut None).copy(tries)
    }

    /// Try once to copy the ledger, without histograms outside it. Return false if a transition came
    /// between.
    pub fn try_copy(&self, out: &mut LedgerCopy) -> bool {
        self.try_copy_with(out, &mut None)
    }

    /// Try once to copy the ledger, as [`Self::try_copy`], and the vCPU's tables of the same moment.
    pub fn try_copy_with(&self, out: &mut LedgerCopy, tables: &mut WithTables<'_, '_>) -> bool {
        self.copying(out, tables).try_copy()
    }

    fn copying<'a>(
        &'a self,
        out: &'a mut LedgerCopy,
        tables: &'a mut WithTables<'_, '_>,
    ) -> Copying<'a> {
        Copying {
            ledger: self,
            more: More::NONE,
            out,
            tables: tables.as_mut().map(|(tables, to)| (*tables, &mut **to)),
        }
    }
}

impl Copying<'_> {
    /// Copy the ledger as of one moment between two transitions. Return the number of failed attempts, or
    /// `None` if none of `tries` succeeds. A writer is never held up.
    ///
    /// An attempt fails if a transition begins meanwhile. Histograms are most of a ledger, so each is
    /// copied by itself, and again only if its reason had more exits: only the rows must be copied without
    /// a transition between. A vCPU that exits for many reasons in quick succession may have a transition
    /// at each attempt. Then the copy must be made where none can come between: on the vCPU's own CPU, by
    /// [`Self::try_copy`].
    pub fn copy(&mut self, tries: u32) -> Option<u32> {
        if tries == 0 {
            return None;
        }
        if self.try_copy() {
            return Some(0);
        }
        for failed in 1..tries {
            self.copy_histograms();
            if self.copy_rest() {
                return Some(failed);
            }
        }
        None
    }

    /// Try once to copy the ledger. Return false if a transition came between.
    pub fn try_copy(&mut self) -> bool {
        self.out.forget_histograms();
        self.copy_rest()
    }

    /// Try once to copy everything except the histograms of which `out` has the current state.
    fn copy_rest(&mut self) -> bool {
        let ledger = self.ledger;
        // ORDERING: What follows is read after this, and so is at least as new.
        let last = ledger.last.load(Ordering::Acquire);
        self.out.phase = ledger.phase.load(Relaxed);
        self.out.slot = ledger.slot().unwrap_or(Slot::OTHER).index() as u32;
        self.out.first = ledger.first.load(Relaxed);
        self.out.last = last;
        self.out.used = [0; WORDS];
        let mut copied = [0_u64; WORDS];
        for (slot, place) in ledger.rows() {
            let numbers = ledger.copy_row(place);
            let kernel = numbers.cycles(Phase::Kernel);
            if self.copy_histogram(slot, place, kernel) {
                set(&mut copied, slot);
            }
            set(&mut self.out.used, slot);
            self.out.set_row(slot, numbers);
            // The attempt has failed already. The next one begins right after a transition.
            if ledger.begun.load(Relaxed) != last {
                break;
            }
        }
        if let Some((tables, to)) = &mut self.tables {
            tables.copy(to, || ledger.begun.load(Relaxed) == last);
        }
        // ORDERING: What precedes is read before this, and so is not newer.
        fence(Ordering::Acquire);
        let undisturbed = ledger.begun.load(Relaxed) == last;
        if !undisturbed {
            self.out.forget_histograms_of(copied);
        }
        undisturbed
    }

    /// Try once for each histogram to copy it by itself.
    fn copy_histograms(&mut self) {
        let ledger = self.ledger;
        for (slot, place) in ledger.rows() {
            // ORDERING: As in `copy_rest`, for the window of one row.
            let last = ledger.last.load(Ordering::Acquire);
            let kernel = ledger.cycles_at(place, Phase::Kernel);
            let copied = self.copy_histogram(slot, place, kernel);
            // ORDERING: As in `copy_rest`.
            fence(Ordering::Acquire);
            if copied && ledger.begun.load(Relaxed) != last {
                self.out.set_sampled(slot, 0);
            }
        }
    }

    /// Copy the histogram of a row that has booked `kernel` ticks in the kernel phase, unless
    /// `out` has it; return true if it was copied.
    ///
    /// Each sample comes with at least one tick of the kernel phase. So two undisturbed windows
    /// that find the same ticks find the same samples.
    #[inline]
    fn copy_histogram(&mut self, slot: Slot, place: Place, kernel: u64) -> bool {
        let number = place.number();
        let own = number <= OWN_HISTOGRAMS;
        let found = match own {
            true => self.ledger.histograms.get(number),
            false => {
                let number = number.wrapping_sub(OWN_HISTOGRAMS + 1);
                self.more.of(self.ledger).get(number)
            }
        };
        // Number 0 is the histogram that nobody reads.
        let found = found.filter(|_| number != 0);
        self.out.set_number(slot, found.map_or(0, |_| number));
        // 0 means that the copy has no histogram, hence plus 1.
        let sampled = kernel.wrapping_add(1);
        let Some(histogram) = found.filter(|_| self.out.sampled(slot) != sampled) else {
            return false;
        };
        self.out.set_sampled(slot, sampled);
        self.out.set_histogram(number, |bucket| {
            let cell = histogram.0.get(bucket);
            cell.map_or(0, |cell| cell.load(Relaxed))
        });
        true
    }
}
