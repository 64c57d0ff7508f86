// SPDX-License-Identifier: GPL-2.0

//! The writer of a ledger: the transitions of a vCPU, in the thread that holds it.

use core::ptr::NonNull;

use super::{Histogram, Ledger, MoreHistograms, Place, Row, CLOSED, OWN_HISTOGRAMS, ROWS};
use crate::meter::{
    ablation,
    atomic::{
        add, fence, read_owned, AtomicU64,
        Ordering::{self, Relaxed},
    },
    histogram::{bucket, usual_bucket},
    phase::Phase,
    reasons::Slot,
    slow::{Leaving, RingExit},
    tables::{self, About, Keys, ReasonBits, Tables},
};

/// Step back of the clock, in TSC ticks, that no skew between CPUs explains: some 20 s. The clock has
/// restarted.
pub(super) const RESTARTED: u64 = 1 << 36;

/// Source of memory for more histograms, for a vCPU that exits for more reasons than its ledger has
/// histograms.
///
/// # Safety
///
/// The memory must be zeroed, and live until [`Ledger::take_more`] has returned it.
pub unsafe trait Supply {
    /// Return memory that nobody else uses, or `None` if there is none. Called at the first exit for a
    /// reason, in a transition, so it must not sleep.
    fn more(&self) -> Option<NonNull<MoreHistograms>>;
}

/// Source without memory: a reason that comes after the ledger's own histograms are taken has none.
#[derive(Clone, Copy, Debug)]
pub struct NoSupply;

// SAFETY: There is no memory.
unsafe impl Supply for NoSupply {
    fn more(&self) -> Option<NonNull<MoreHistograms>> {
        None
    }
}

impl Ledger {
    /// Begin a transition at TSC `now`. Return the ticks since the last one.
    ///
    /// Return `None`, and begin nothing, if no time has passed or the clock has stepped back, as between
    /// CPUs whose clocks differ. The caller then repeats the transition at [`Self::one_tick_on`].
    #[inline(always)]
    fn begin_transition(&self, now: u64) -> Option<u64> {
        // SAFETY: This thread holds the vCPU, so nobody else writes its ledger.
        let last = unsafe { read_owned(&self.last) };
        if now <= last {
            return None;
        }
        self.begun.store(now, Relaxed);
        // ORDERING: A reader that sees anything of the transition sees that it has begun.
        fence(Ordering::Release);
        Some(now.wrapping_sub(last))
    }

    /// Return the TSC for a transition at which the clock, at `now`, stands still or has stepped back: one
    /// tick after the latest transition. If the clock has restarted, move the ledger to it.
    #[cold]
    fn one_tick_on(&self, now: u64) -> u64 {
        let next = self.last.load(Relaxed).wrapping_add(1);
        if next.wrapping_sub(now) < RESTARTED {
            return next;
        }
        self.rebase(next, now);
        now.wrapping_add(1)
    }

    #[inline(always)]
    fn end_transition(&self, now: u64) {
        // ORDERING: A reader that sees that the transition has ended sees all of it.
        self.last.store(now, Ordering::Release);
    }

    /// Move to a restarted clock, which reads `now`; the old clock read `then` at the same moment. The time
    /// up to `then` is booked on the current phase.
    ///
    /// `first` moves with the clock, and may lie before its zero: differences are modulo 2^64.
    pub fn rebase(&self, then: u64, now: u64) {
        // `then` may come from another CPU, whose clock was behind.
        let then = then.max(self.last.load(Relaxed));
        let ticks = then.wrapping_sub(self.last.load(Relaxed));
        self.begun.store(now, Relaxed);
        // ORDERING: As in `begin_transition`.
        fence(Ordering::Release);
        let phase = self.phase.load(Relaxed);
        self.book(phase, ticks);
        let life = then.wrapping_sub(self.first.load(Relaxed));
        self.first.store(now.wrapping_sub(life), Relaxed);
        let carried = self.carried.load(Relaxed);
        if phase == Phase::Kernel as u32 && carried != CLOSED {
            self.carried.store(carried.wrapping_add(ticks), Relaxed);
        }
        // SAFETY: This is a transition, or no other CPU runs.
        if let Some(tables) = unsafe { self.tables() } {
            tables.book(phase, ticks);
            tables.rebase(then, now);
            let last = self.last.load(Relaxed);
            tables.slow().rebase(last, then, now, phase);
        }
        self.end_transition(now);
    }

    /// Record the vCPU's first event, at TSC `now`, after which it is in `phase`.
    pub fn begin(&self, now: u64, phase: Phase) {
        self.begun.store(now, Relaxed);
        // ORDERING: As in `begin_transition`.
        fence(Ordering::Release);
        self.first.store(now, Relaxed);
        // The only row that gets cycles without an exit.
        let start = self.add_row(0, Slot::START, &NoSupply);
        self.row.store(start.0 as u32, Relaxed);
        self.phase.store(phase as u32, Relaxed);
        if phase != Phase::Guest {
            self.carried.store(CLOSED, Relaxed);
        }
        self.end_transition(now);
    }

    /// Give a slot the next free row, which has this number.
    fn add_row(&self, number: usize, slot: Slot, supply: &impl Supply) -> Place {
        let place = Place::of(number);
        let histogram = self.histogram_for(number, supply);
        self.row_at(place).histogram.store(histogram, Relaxed);
        if let Some(its) = self.slots.get(number) {
            its.store(slot.index() as u8, Relaxed);
        }
        if let Some(its) = self.places.get(slot.index()) {
            its.store(place.0 as u16, Relaxed);
        }
        // ORDERING: A reader that sees that the row is in use sees its slot.
        let taken = number.wrapping_add(1) as u32;
        self.taken.store(taken, Ordering::Release);
        place
    }

    /// Return the histogram of the row with a number.
    fn histogram_for(&self, number: usize, supply: &impl Supply) -> *mut Histogram {
        let [unread, own @ ..] = &self.histograms;
        let found = match number.checked_sub(1) {
            // Nothing exits for `Slot::START`.
            None => None,
            Some(place) if place < OWN_HISTOGRAMS => own.get(place),
            Some(place) => self
                .supplied(supply)
                .and_then(|more| more.0.get(place.wrapping_sub(OWN_HISTOGRAMS))),
        };
        found.unwrap_or(unread).address()
    }

    /// Return the vCPU's histograms outside its ledger, and get them from `supply` if it has none.
    fn supplied(&self, supply: &impl Supply) -> Option<&MoreHistograms> {
        let mut more = self.more.load(Relaxed);
        if more.is_null() {
            more = supply.more()?.as_ptr();
            // ORDERING: A reader that finds them finds them zeroed.
            self.more.store(more, Ordering::Release);
        }
        // SAFETY: By the invariant of `Ledger`, and the contract of `Supply`.
        unsafe { more.as_ref() }
    }

    /// Take a row for the first exit of a slot. Return its place: a new row, or that of [`Slot::OTHER`] if
    /// none is left.
    fn take_row(&self, slot: Slot, supply: &impl Supply) -> Place {
        let taken = self.taken.load(Relaxed) as usize;
        let other = self.place_of(Slot::OTHER);
        // The last row is reserved for `Slot::OTHER`.
        let kept = usize::from(other.0 == 0 && slot != Slot::OTHER);
        if taken.wrapping_add(kept) < ROWS {
            return self.add_row(taken, slot, supply);
        }
        let other = match other.0 {
            0 => self.add_row(taken, Slot::OTHER, supply),
            _ => other,
        };
        if let Some(its) = self.places.get(slot.index()) {
            its.store(other.0 as u16, Relaxed);
        }
        other
    }

    /// Return the place of the row that counts the exits of a slot, or 0 while it has none.
    #[inline(always)]
    fn place_of(&self, slot: Slot) -> Place {
        // SAFETY: By the invariant of `Slot` its index is below SLOTS.
        let place = unsafe { self.places.get_unchecked(slot.index()) };
        // INVARIANT: By that of `Ledger`.
        // SAFETY: As in `begin_transition`.
        Place(usize::from(unsafe { read_owned(place) }))
    }

    /// Record a VM exit: the guest phase ends.
    #[inline(always)]
    pub fn exit(&self, now: u64, slot: Slot) {
        self.exit_of::<false>(now, slot, NoSupply);
    }

    /// Record a VM exit from a nested guest, an L2.
    pub fn exit_from_nested(&self, now: u64, slot: Slot) {
        self.exit_of::<true>(now, slot, NoSupply);
    }

    /// Record a VM exit, from a nested guest or not. `supply` may give more histograms. The slot is never
    /// [`Slot::START`].
    #[inline(always)]
    pub fn exit_of<const NESTED: bool>(&self, now: u64, slot: Slot, supply: impl Supply) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_exit::<NESTED>(now, slot, supply);
        };
        let place = self.place_of(slot);
        if place.0 == 0 {
            return self.count_first_exit::<NESTED>(now, slot, ticks, supply);
        }
        self.count_exit(now, place, ticks, NESTED);
    }

    /// Count the first exit of a slot, and end the transition.
    #[cold]
    #[inline(never)]
    fn count_first_exit<const NESTED: bool>(
        &self,
        now: u64,
        slot: Slot,
        ticks: u64,
        supply: impl Supply,
    ) {
        let place = self.take_row(slot, &supply);
        self.count_exit(now, place, ticks, NESTED);
    }

    /// Count an exit in the row at a place, after `ticks` in the guest, and end the transition.
    #[inline(always)]
    fn count_exit(&self, now: u64, place: Place, ticks: u64, nested: bool) {
        if ablation::PHASES {
            add(self.row_at(self.place()).cycles(Phase::Guest), ticks);
        }
        self.row.store(place.0 as u32, Relaxed);
        self.phase.store(Phase::Kernel as u32, Relaxed);
        if nested {
            if let Some(exits) = self.nested.get(place.number()) {
                add(exits, 1);
            }
        }
        if ablation::COUNTS {
            add(&self.row_at(place).exits, 1);
        }
        self.end_transition(now);
    }

    #[cold]
    #[inline(never)]
    fn late_exit<const NESTED: bool>(&self, now: u64, slot: Slot, supply: impl Supply) {
        self.exit_of::<NESTED>(self.one_tick_on(now), slot, supply);
    }

    /// Record a VM exit of a vCPU that has tables. `RING` is true if it has a ring of its latest exits.
    #[inline(always)]
    pub fn exit_with<const RING: bool>(
        &self,
        tables: &Tables,
        now: u64,
        about: &About,
        supply: impl Supply,
    ) {
        if let Err(key) = self.exit_like_before::<RING>(tables, now, about) {
            self.exit_otherwise(tables, now, about, key, supply);
        }
    }

    /// Record a VM exit of a vCPU that has tables, if its rows are cached and the clock has gone on.
    ///
    /// # Errors
    ///
    /// The exit's key. Nothing was recorded: the exit is one for [`Self::exit_otherwise`].
    #[inline(always)]
    pub fn exit_like_before<const RING: bool>(
        &self,
        tables: &Tables,
        now: u64,
        about: &About,
    ) -> Result<(), u64> {
        let (key, rows) = match (about.nested, about.rip) {
            (false, Some(rip)) => tables.latest_rows(about.slot, about.key, rip),
            _ => (about.whole_key(), None),
        };
        if let Some(rows) = rows.filter(|_| !RING || tables.slow().has_room()) {
            if let Some(ticks) = self.begin_transition(now) {
                tables.take_exit(rows);
                if RING {
                    tables.slow().take_exit(&RingExit {
                        now,
                        guest: ticks,
                        key,
                        rip: about.rip.unwrap_or(0),
                    });
                }
                // The exit that gave the tables these rows has given the ledger one.
                self.count_exit(now, self.place_of(about.slot), ticks, false);
                return Ok(());
            }
        }
        Err(key)
    }

    /// Record any other VM exit of a vCPU that has tables.
    #[inline(always)]
    pub fn exit_otherwise(
        &self,
        tables: &Tables,
        now: u64,
        about: &About,
        key: u64,
        supply: impl Supply,
    ) {
        let Keys { which, rip, .. } = about.keys();
        self.exit_anew(rip, now, which, key, tables, supply);
    }

    /// Record a VM exit of a vCPU that has tables, when these may have no row for it, or the clock stands
    /// still. The arguments are in the order in which the caller has them in registers.
    #[inline(never)]
    fn exit_anew(
        &self,
        rip: u64,
        now: u64,
        which: ReasonBits,
        key: u64,
        tables: &Tables,
        supply: impl Supply,
    ) {
        let mut now = now;
        let ticks = match self.begin_transition(now) {
            Some(ticks) => ticks,
            None => {
                now = self.one_tick_on(now);
                self.begin_transition(now).unwrap_or(0)
            }
        };
        let place = match self.place_of(which.slot()) {
            Place(0) => self.take_row(which.slot(), &supply),
            place => place,
        };
        // An exit that the ledger counts as `Slot::OTHER` is one in the tables too.
        let (which, key) = match self.slot_at(place) {
            Some(Slot::OTHER) => which.as_other(key),
            _ => (which, key),
        };
        let rows = tables.rows_for(self, now, &Keys { which, key, rip });
        tables.take_exit(rows);
        let slow = tables.slow();
        slow.turn_window_if_over(now);
        if slow.has_ring() {
            slow.make_room();
            slow.take_exit(&RingExit {
                now,
                guest: ticks,
                key,
                rip,
            });
        }
        self.count_exit(now, place, ticks, which.is_nested());
    }

    /// Record a VM entry: the kernel phase ends, and its ticks since the latest exit become one sample.
    #[inline(always)]
    pub fn entry(&self, now: u64) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_entry(now);
        };
        let place = self.enter_after(ticks);
        // SAFETY: As in `begin_transition`.
        if ablation::HISTOGRAMS && unsafe { read_owned(&self.carried) } != 0 {
            return self.end_unusual_exit(ticks, now);
        }
        self.end_exit(ticks, now, place);
    }

    /// Record a VM entry of a vCPU that has tables. `cpu` returns the current CPU.
    #[inline(always)]
    pub fn entry_with(&self, tables: &Tables, now: u64, cpu: impl FnOnce() -> u32) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_entry_with(tables, now, cpu());
        };
        tables.book_kernel(ticks);
        let place = self.enter_after(ticks);
        // The floor is 0 while kernel ticks are carried over.
        if ticks > tables.slow().floor() {
            return self.end_exit_with(tables, now, cpu(), ticks);
        }
        self.end_exit(ticks, now, place);
    }

    /// Book `ticks` in the kernel, and begin the guest phase. Return the place of the latest exit's row.
    #[inline(always)]
    fn enter_after(&self, ticks: u64) -> Place {
        let place = self.place();
        if ablation::PHASES {
            add(self.row_at(place).cycles(Phase::Kernel), ticks);
        }
        self.phase.store(Phase::Guest as u32, Relaxed);
        place
    }

    /// End the transition of an entry after an exit of `ticks`, during which the vCPU did not leave its
    /// CPU. The exit's row is at `place`.
    #[inline(always)]
    fn end_exit(&self, ticks: u64, now: u64, place: Place) {
        if ablation::HISTOGRAMS {
            let row = self.row_at(place);
            // SAFETY: As in `begin_transition`.
            if ticks > unsafe { read_owned(&row.max) } {
                return self.end_unusual_exit(ticks, now);
            }
            let Some(bucket) = usual_bucket(ticks) else {
                return self.end_unusual_exit(ticks, now);
            };
            // SAFETY: The row has a maximum other than 0, as `ticks` is not 0, and so a histogram; the
            // bucket comes from `usual_bucket`.
            unsafe { add_sample(row, bucket) };
        }
        self.end_transition(now);
    }

    #[cold]
    #[inline(never)]
    fn late_entry(&self, now: u64) {
        self.entry(self.one_tick_on(now));
    }

    #[cold]
    #[inline(never)]
    fn late_entry_with(&self, tables: &Tables, now: u64, cpu: u32) {
        self.entry_with(tables, self.one_tick_on(now), || cpu);
    }

    /// End the transition of an entry on a CPU, after an exit that may be one of the slowest, or during
    /// which the vCPU left its CPU.
    #[inline(never)]
    fn end_exit_with(&self, tables: &Tables, now: u64, cpu: u32, ticks: u64) {
        let carried = self.carried.load(Relaxed);
        self.carried.store(0, Relaxed);
        let slow = tables.slow();
        if carried == CLOSED {
            slow.enter_without_exit(now, cpu);
            return self.end_transition(now);
        }
        let kernel = ticks.wrapping_add(carried);
        if ablation::HISTOGRAMS {
            self.sample(kernel);
        }
        if slow.must_record(now, kernel) {
            return self.end_slow_exit(tables, now, kernel, carried != 0, cpu);
        }
        slow.end(cpu);
        self.end_transition(now);
    }

    /// End the transition of an entry on a CPU, after an exit of `kernel` kernel ticks that may be one of
    /// the slowest. `left` is true if the vCPU left its CPU meanwhile.
    #[inline(never)]
    fn end_slow_exit(&self, tables: &Tables, now: u64, kernel: u64, left: bool, cpu: u32) {
        let slow = tables.slow();
        if let Some(exited) = tables.latest_exit(self) {
            slow.record(&exited, now, kernel, left, cpu);
        }
        slow.end(cpu);
        self.end_transition(now);
    }

    /// End the transition of an entry after an unusual exit: one during which the vCPU left its CPU, one
    /// longer than all before or shorter than exits are, or none at all.
    ///
    /// The arguments are in the order in which the callers have them in registers.
    #[inline(never)]
    fn end_unusual_exit(&self, ticks: u64, now: u64) {
        let carried = self.carried.load(Relaxed);
        self.carried.store(0, Relaxed);
        if carried != CLOSED {
            let ticks = ticks.wrapping_add(carried);
            self.sample(ticks);
        }
        self.end_transition(now);
    }

    /// Record that the vCPU leaves its CPU, for `phase`.
    #[inline(always)]
    pub fn leave(&self, now: u64, phase: Phase) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_leave(now, phase);
        };
        self.leave_after(now, phase, ticks);
    }

    /// Record that a vCPU with tables leaves its CPU. `cpu` returns that CPU.
    #[inline(always)]
    pub fn leave_with(
        &self,
        tables: &Tables,
        now: u64,
        leaving: Leaving,
        cpu: impl FnOnce() -> u32,
    ) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_leave_with(tables, now, leaving, cpu());
        };
        self.leave_otherwise_with(tables, now, ticks, leaving, cpu());
    }

    /// Record that a vCPU with tables leaves its CPU for user space. `cpu` returns that CPU, and `why` the
    /// KVM_EXIT_*, as [`Leaving::to_user`].
    #[inline(always)]
    pub fn leave_to_user_with(
        &self,
        tables: &Tables,
        now: u64,
        why: impl FnOnce() -> Option<u16>,
        cpu: impl FnOnce() -> u32,
    ) {
        let leaving = |to_user| Leaving {
            phase: Phase::User,
            to_user,
        };
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_leave_with(tables, now, leaving(why()), cpu());
        };
        // Rare cases leave here, so that the usual one does not pay for them.
        if self.phase.load(Relaxed) != Phase::Kernel as u32 {
            return self.leave_otherwise_with(tables, now, ticks, leaving(why()), cpu());
        }
        let Some(why) = why() else {
            return self.leave_otherwise_with(tables, now, ticks, leaving(None), cpu());
        };
        // SAFETY: By the invariant of `Place` the row is there.
        let slot = unsafe { self.slots.get_unchecked(self.place().number()) };
        let tag = tables::user_tag(slot.load(Relaxed), why);
        let Some(row) = tables.latest_user(tag) else {
            return self.leave_otherwise_with(tables, now, ticks, leaving(Some(why)), cpu());
        };
        tables.book_kernel(ticks);
        tables.count_user(row);
        tables.slow().leave_to_user(why);
        self.leave_kernel(now, Phase::User, ticks);
    }

    /// Slow path of [`Self::leave_with`] and [`Self::leave_to_user_with`]: the vCPU does not go to user
    /// space, or with another KVM_EXIT_* than the last time, or it was not in KVM.
    #[inline(never)]
    fn leave_otherwise_with(
        &self,
        tables: &Tables,
        now: u64,
        ticks: u64,
        leaving: Leaving,
        cpu: u32,
    ) {
        let left = self.phase.load(Relaxed);
        let slow = tables.slow();
        tables.book(left, ticks);
        if left == Phase::Kernel as u32 {
            slow.leave(leaving, cpu);
        } else if left == Phase::Guest as u32 {
            slow.leave_guest(self.last.load(Relaxed));
        } else {
            slow.note_ticks(left, ticks);
        }
        if leaving.phase == Phase::User {
            tables.leave_to_user(self.slot(), leaving.to_user);
        }
        self.leave_after(now, leaving.phase, ticks);
    }

    /// Book `ticks` on the current phase, begin `phase`, and end the transition.
    #[inline(always)]
    fn leave_after(&self, now: u64, phase: Phase, ticks: u64) {
        if self.phase.load(Relaxed) != Phase::Kernel as u32 {
            return self.leave_outside(now, phase, ticks);
        }
        self.leave_kernel(now, phase, ticks);
    }

    /// Book `ticks` in KVM, begin `phase`, and end the transition.
    #[inline(always)]
    fn leave_kernel(&self, now: u64, phase: Phase, ticks: u64) {
        if ablation::PHASES {
            add(self.row_at(self.place()).cycles(Phase::Kernel), ticks);
        }
        self.phase.store(phase as u32, Relaxed);
        let carried = self.carried.load(Relaxed);
        if carried != CLOSED {
            self.carried.store(carried.wrapping_add(ticks), Relaxed);
        }
        self.end_transition(now);
    }

    /// Slow path of [`Self::leave`]: the vCPU was not in KVM, after `ticks` of another phase.
    #[cold]
    #[inline(never)]
    fn leave_outside(&self, now: u64, phase: Phase, ticks: u64) {
        let left = self.phase.load(Relaxed);
        self.book(left, ticks);
        self.phase.store(phase as u32, Relaxed);
        if left == Phase::Guest as u32 {
            // The entry was not followed by an exit, for example because it failed.
            self.carried.store(CLOSED, Relaxed);
        }
        self.end_transition(now);
    }

    #[cold]
    #[inline(never)]
    fn late_leave(&self, now: u64, phase: Phase) {
        self.leave(self.one_tick_on(now), phase);
    }

    #[cold]
    #[inline(never)]
    fn late_leave_with(&self, tables: &Tables, now: u64, leaving: Leaving, cpu: u32) {
        self.leave_with(tables, self.one_tick_on(now), leaving, || cpu);
    }

    /// Record that the vCPU is back on a CPU, in KVM.
    #[inline(always)]
    pub fn resume(&self, now: u64) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_resume(now);
        };
        if self.phase.load(Relaxed) != Phase::User as u32 {
            return self.resume_otherwise(now, ticks);
        }
        self.resume_from_user(now, ticks);
    }

    /// Record that a vCPU with tables is back on a CPU, in KVM.
    #[inline(always)]
    pub fn resume_with(&self, tables: &Tables, now: u64) {
        let Some(ticks) = self.begin_transition(now) else {
            return self.late_resume_with(tables, now);
        };
        if self.phase.load(Relaxed) != Phase::User as u32 {
            return self.resume_otherwise_with(tables, now, ticks);
        }
        tables.book_user(ticks);
        tables.slow().note_user_ticks(ticks);
        self.resume_from_user(now, ticks);
    }

    /// Book `ticks` in user space, begin the kernel phase, and end the transition.
    #[inline(always)]
    fn resume_from_user(&self, now: u64, ticks: u64) {
        if ablation::PHASES {
            add(self.row_at(self.place()).cycles(Phase::User), ticks);
        }
        self.phase.store(Phase::Kernel as u32, Relaxed);
        self.end_transition(now);
    }

    /// Slow path of [`Self::resume`]: the vCPU was not in user space.
    #[inline(never)]
    fn resume_otherwise(&self, now: u64, ticks: u64) {
        self.book(self.phase.load(Relaxed), ticks);
        self.phase.store(Phase::Kernel as u32, Relaxed);
        self.end_transition(now);
    }

    /// Slow path of [`Self::resume_with`]: the vCPU was not in user space.
    #[inline(never)]
    fn resume_otherwise_with(&self, tables: &Tables, now: u64, ticks: u64) {
        let left = self.phase.load(Relaxed);
        tables.book(left, ticks);
        match left == Phase::Guest as u32 {
            true => tables.slow().leave_guest(self.last.load(Relaxed)),
            false => tables.slow().note_ticks(left, ticks),
        }
        self.resume_otherwise(now, ticks);
    }

    #[cold]
    #[inline(never)]
    fn late_resume(&self, now: u64) {
        self.resume(self.one_tick_on(now));
    }

    #[cold]
    #[inline(never)]
    fn late_resume_with(&self, tables: &Tables, now: u64) {
        self.resume_with(tables, self.one_tick_on(now));
    }

    /// Book ticks on the latest reason and the phase with a number.
    fn book(&self, phase: u32, ticks: u64) {
        if !ablation::PHASES {
            return;
        }
        let place = self.place();
        let cell = match phase == Phase::Waiting as u32 {
            true => self.waiting.get(place.number()),
            false => self.row_at(place).cycles.get(phase as usize),
        };
        if let Some(cell) = cell {
            add(cell, ticks);
        }
    }

    /// Add the sample of an exit to its row, and raise the row's maximum if needed.
    #[inline(always)]
    fn sample(&self, ticks: u64) {
        let row = self.row_at(self.place());
        // A row that no slot has taken has no histogram yet.
        if row.histogram.load(Relaxed).is_null() {
            return;
        }
        row.max.store(row.max.load(Relaxed).max(ticks), Relaxed);
        // SAFETY: The row has a histogram, and `bucket` returns a bucket below `BUCKETS`.
        unsafe { add_sample(row, bucket(ticks)) };
    }
}

/// Add a sample to the histogram of a row.
///
/// # Safety
///
/// The row must have a histogram, as every row with a maximum has, and `bucket` must be below
/// [`crate::histogram::BUCKETS`].
#[inline(always)]
unsafe fn add_sample(row: &Row, bucket: usize) {
    // SAFETY: As in `begin_transition`; and by the contract of this function.
    unsafe {
        let first: *const AtomicU64 = read_owned(&row.histogram).cast_const().cast();
        add(&*first.add(bucket), 1);
    }
}
