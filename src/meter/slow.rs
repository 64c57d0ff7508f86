// SPDX-License-Identifier: GPL-2.0

//! The slowest exits of one vCPU, and its last ones before one that was too slow.
//!
//! An exit is as long as it was in the kernel, in user space, waiting and preempted: that the guest
//! slept by its own wish makes it no slower. Kept are the [`KEPT`] longest of the current window and
//! as many of the one before, and where there is a limit a ring of the last [`RING`]. The ring freezes
//! when an exit takes longer than that, so that who comes later finds what led to it.
//!
//! # How it costs little
//!
//! Nothing is written for it at an exit. At an entry the kernel's ticks since the exit are compared
//! with a floor, below which nothing is to be done: that is 0 while the window has room, and while the
//! vCPU has been off its CPU since the exit; else the length of the shortest exit that is kept, or
//! the limit. An exit above the floor is told out of line, by what the ledger and the tables know of
//! the latest exit, and by what was noted when the vCPU left its CPU.
//!
//! The ring takes four words at each exit, and more when the vCPU leaves its CPU. So there is one
//! only with a limit, and the exits of vCPUs that have one are told as they come.
//!
//! # Windows
//!
//! A window ends at the first occasion after [`WINDOW`] ticks: an entry that finds its exit above
//! the floor, an exit whose rows are not the latest ones, or the entry after somebody has read the
//! recorder. An exit belongs to the window in which the vCPU is entered after it.
//!
//! # Freezing
//!
//! A frozen ring stays until somebody asks for another one, or details are turned off. It does not
//! thaw by itself: the first exit that was too slow is what one looks for, and the next ones are
//! often its consequences. Meanwhile exits go to a small ring that nobody reads, so that they cost
//! the same.

use super::{
    atomic::{self, add, AtomicU32, AtomicU64, Cell, Ordering::Relaxed},
    detail,
    phase::Phase,
    reasons::Slot,
};

mod copy;
mod own;
pub use copy::{SlowCopy, SlowExit};

/// Exits that are kept of a window.
pub const KEPT: usize = 16;
/// Exits of the ring.
pub const RING: usize = 64;
/// TSC ticks of a window at least: 11 s at 3 GHz.
pub const WINDOW: u64 = 1 << 35;
/// The most that this takes, in bytes.
pub const MOST_BYTES: usize = 10 * 1024;

/// Exits of the ring that nobody reads.
const SCRATCH: usize = 16;
/// Bytes of a step.
const STEP: u32 = size_of::<Step>() as u32;
/// Where the ring begins, behind the one that nobody reads.
const RING_LOW: u32 = SCRATCH as u32 * STEP;
/// The last step of the ring. It is the first one to be written: a ring is written downwards.
const RING_TOP: u32 = RING_LOW + (RING as u32 - 1) * STEP;
/// The last step of the ring that nobody reads.
const SCRATCH_TOP: u32 = RING_LOW - STEP;

/// What each exit leaves behind. Without a course it was in the kernel up to the latest transition
/// before the next one, on one CPU.
#[repr(C)]
#[derive(Debug)]
struct Step {
    /// TSC at the exit.
    exited: AtomicU64,
    /// Ticks between that and the latest transition before it, an entry.
    guest: AtomicU64,
    /// Reason, nested or not, and detail; 0 for none.
    key: AtomicU64,
    rip: AtomicU64,
}

/// How many phases an exit is made of: all but the guest's.
const PHASES: usize = Phase::COUNT - 1;

/// What is noted of an exit while the vCPU is off its CPU: all 0 at the exit.
#[repr(C)]
#[derive(Debug)]
struct Away {
    /// By phase, without the guest's and the kernel's.
    ticks: [AtomicU64; PHASES - 1],
    /// How often the scheduler took the vCPU off its CPU.
    outs: AtomicU32,
    /// See [`WENT`].
    why: AtomicU32,
}

/// What is told of an exit that has ended.
#[repr(C)]
#[derive(Debug)]
struct Told {
    /// TSC at the exit.
    exited: AtomicU64,
    /// By phase, without the guest's.
    ticks: [AtomicU64; PHASES],
    outs: AtomicU32,
    /// See [`WENT`].
    why: AtomicU32,
    /// The CPU at the exit, and in the high half at the entry; each from 1, 0 where not known.
    cpus: AtomicU32,
    /// In a ring the CPU on which the vCPU went on.
    after: AtomicU32,
}

/// An exit that is kept.
#[repr(C)]
#[derive(Debug)]
struct Kept {
    sequence: AtomicU64,
    key: AtomicU64,
    rip: AtomicU64,
    told: Told,
}

/// Return the key of an exit without a detail, which is not 0: the reason from 1, and bit 8 for a
/// nested guest. Where the key of a detail has its reason, there is 0.
#[inline(always)]
pub(super) fn key(slot: Slot, nested: bool) -> u64 {
    (slot.index() as u64).wrapping_add(1) | u64::from(nested) << 8
}

/// Return true if a key is that of an exit with a detail.
pub(super) fn has_detail(key: u64) -> bool {
    key >> detail::BITS != 0
}

/// Set where an exit went to user space, above why: KVM_EXIT_*.
const WENT: u32 = 1 << 16;

/// The slowest exits of one window.
#[repr(C)]
#[derive(Debug)]
struct Window {
    /// TSC when it began.
    begun: AtomicU64,
    /// How many exits it keeps.
    count: AtomicU64,
    kept: [Kept; KEPT],
}

/// A step, by how many bytes from the first one it begins.
///
/// # Invariants
///
/// It is a multiple of [`STEP`] up to [`RING_TOP`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Place(u32);

/// An exit, as the ledger tells a ring of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// TSC at the exit.
    pub(super) now: u64,
    /// Ticks since the transition before it.
    pub(super) guest: u64,
    /// See [`key`].
    pub(super) key: u64,
    pub(super) rip: u64,
}

/// An exit that has ended, as the tables tell of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exited {
    /// Which exit of the vCPU's it was, from 0 when the tables began.
    pub(super) sequence: u64,
    /// See [`key`].
    pub(super) key: u64,
    pub(super) rip: u64,
}

/// How a vCPU leaves its CPU.
#[derive(Clone, Copy, Debug)]
pub struct Leaving {
    /// The phase that begins.
    pub phase: Phase,
    /// KVM_EXIT_* (linux/kvm.h) where KVM_RUN ends.
    pub to_user: Option<u16>,
}

/// The recorder of one vCPU's slow exits. All-zero bytes are one that has recorded nothing and has
/// no ring.
///
/// All but `floor`, `limit` and `asked` is written in the vCPU's transitions alone, and read as a
/// ledger is.
///
/// # Invariants
///
/// `at` holds the number of a `Place`, and `low` 0 or `RING_LOW`, not above `at`.
#[repr(C)]
#[derive(Debug)]
pub struct Slow {
    /// An exit of so many kernel ticks or less needs nothing to be done at the entry.
    floor: AtomicU64,
    /// An exit of so many ticks or less, in which the vCPU has left its CPU, needs not be told.
    usual: AtomicU64,
    /// The length of the shortest exit that the window keeps; 0 while it has room.
    shortest: AtomicU64,
    /// TSC at which the window may end.
    over: AtomicU64,
    away: Away,
    /// The CPU of the latest entry that was noted, and 1; 0 before there was one.
    cpu: AtomicU32,
    has_begun: AtomicU32,
    /// Which window is the current one.
    current: AtomicU32,
    /// The step of the latest exit.
    at: AtomicU32,
    /// The last step before the ring is full.
    low: AtomicU32,
    /// The step of the exit that froze the ring, 0 while it is not frozen.
    frozen: AtomicU32,
    /// An exit of more ticks freezes the ring; 0: there is none.
    limit: AtomicU64,
    /// The number of the exit that took or takes the top step.
    base: AtomicU64,
    /// The number of the exit that froze the ring.
    culprit: AtomicU64,
    /// How often a ring was asked for that is not frozen.
    asked: AtomicU32,
    /// How many of these requests were met.
    met: AtomicU32,
    steps: [Step; SCRATCH + RING],
    /// The courses of the ring's steps, and behind them that of all others. One is of a step if it
    /// has its TSC.
    courses: [Told; RING + 1],
    windows: [Window; 2],
}

// Loom's atomics are larger.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Slow>() <= MOST_BYTES);
// cli/bpf/tables.h says the same.
#[cfg(not(loom))]
const _: () = assert!(core::mem::offset_of!(Slow, windows) == 6848);

/// Read a cell of a recorder, in a transition of its vCPU.
#[inline(always)]
fn own<C: Cell>(cell: &C) -> C::Value {
    // SAFETY: It is one of those that only transitions write, of which there is one at a time.
    unsafe { atomic::own(cell) }
}

/// Return the sum of ticks that makes an exit slow.
fn length(ticks: &[AtomicU64; PHASES]) -> u64 {
    let [kernel, user, _, preempted, waiting] = ticks;
    [kernel, user, preempted, waiting]
        .into_iter()
        .fold(0, |sum: u64, cell| sum.saturating_add(own(cell)))
}

/// Return a CPU as it is held.
#[inline(always)]
fn held(cpu: u32) -> u32 {
    cpu.saturating_add(1).min(0xffff)
}

/// Return a CPU at the exit and at the entry as one word.
const fn pair(exit: u32, entry: u32) -> u32 {
    exit & 0xffff | entry << 16
}

impl Told {
    /// Tell of an exit that it was in the kernel for all the time, on one CPU.
    fn set(&self, exited: u64, kernel: u64, cpu: u32) {
        self.exited.store(exited, Relaxed);
        let [first, others @ ..] = &self.ticks;
        first.store(kernel, Relaxed);
        for cell in others {
            cell.store(0, Relaxed);
        }
        self.outs.store(0, Relaxed);
        self.why.store(0, Relaxed);
        self.cpus.store(pair(cpu, cpu), Relaxed);
        self.after.store(cpu, Relaxed);
    }
}

impl Away {
    /// Tell of an exit that ended at `now`, with what is noted here.
    fn tell(&self, told: &Told, now: u64, kernel: u64, cpus: [u32; 2]) {
        let [exit, entry] = cpus;
        let all = self
            .ticks
            .iter()
            .fold(kernel, |sum, cell| sum.wrapping_add(own(cell)));
        told.set(now.wrapping_sub(all), kernel, entry);
        let [_, others @ ..] = &told.ticks;
        for (to, from) in others.iter().zip(&self.ticks) {
            to.store(own(from), Relaxed);
        }
        told.outs.store(own(&self.outs), Relaxed);
        told.why.store(own(&self.why), Relaxed);
        told.cpus.store(pair(exit, entry), Relaxed);
    }
}

impl Slow {
    /// Have a ring, which freezes at an exit of more ticks; 0 for none. Before its first event.
    pub fn set_limit(&self, ticks: u64) {
        self.limit.store(ticks, Relaxed);
    }

    /// Return true if there is a ring.
    #[inline(always)]
    pub(super) fn has_ring(&self) -> bool {
        // Nobody writes it after the first event.
        own(&self.limit) != 0
    }

    /// Ask for a ring that is not frozen. It is given at the next slow exit, or within 16 exits. From
    /// any thread; those that ask take turns.
    pub fn ask(&self) {
        self.asked
            .store(self.asked.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Have the window end at the next entry if it may. From any thread: 0 is always a floor, and
    /// who reads is there again if the vCPU has just set another one. `last` is the TSC of its
    /// latest transition.
    pub fn end_window_after(&self, last: u64) {
        if self.has_begun.load(Relaxed) != 0 && last >= self.over.load(Relaxed) {
            self.floor.store(0, Relaxed);
        }
    }

    #[inline(always)]
    fn step_at(&self, place: Place) -> &Step {
        // SAFETY: By the invariant of `Place`, a step is there.
        unsafe { &*self.steps.as_ptr().byte_add(place.0 as usize) }
    }

    #[inline(always)]
    fn place(&self) -> Place {
        // INVARIANT: By that of `Slow`.
        Place(own(&self.at))
    }

    fn course_at(&self, place: Place) -> &Told {
        let of_ring = (place.0 / STEP).wrapping_sub(SCRATCH as u32) as usize;
        let [.., others] = &self.courses;
        self.courses.get(of_ring).unwrap_or(others)
    }

    /// Begin, at the vCPU's first exit at TSC `now`.
    pub(super) fn begin(&self, now: u64) {
        self.has_begun.store(1, Relaxed);
        for window in &self.windows {
            window.begun.store(now, Relaxed);
        }
        self.over.store(now.wrapping_add(WINDOW), Relaxed);
    }

    /// Return true if the ring has a step for the next exit.
    #[inline(always)]
    pub(super) fn has_room(&self) -> bool {
        own(&self.at) != own(&self.low)
    }

    /// Begin the ring anew where it is full, for an exit that has to follow.
    pub(super) fn make_room(&self) {
        if self.has_room() {
            return;
        }
        if own(&self.low) == 0 && own(&self.frozen) == 0 {
            // The first exit.
            return self.go_to(RING_LOW, RING_TOP);
        }
        let is_frozen = own(&self.frozen) != 0;
        let len = if is_frozen { SCRATCH } else { RING };
        add(&self.base, len as u64);
        if self.is_asked() && is_frozen {
            self.thaw(own(&self.base));
            add(&self.base, RING as u64);
        }
        match own(&self.frozen) {
            0 => self.go_to(RING_LOW, RING_TOP),
            _ => self.go_to(0, SCRATCH_TOP),
        }
    }

    /// Have the next exit take the step `top`, of those from `low` on.
    fn go_to(&self, low: u32, top: u32) {
        // INVARIANT: The next exit, which follows, makes that the number of a place.
        self.at.store(top.wrapping_add(STEP), Relaxed);
        self.low.store(low, Relaxed);
    }

    /// Take an exit into the next step of the ring. There has to be room.
    #[inline(always)]
    pub(super) fn take_exit(&self, taken: &Taken) {
        // Loaded once more, so that no register has to hold it since `has_room`.
        // INVARIANT: `low` is not above `at`, and they were not the same.
        let place = Place(self.at.load(Relaxed).wrapping_sub(STEP));
        self.at.store(place.0, Relaxed);
        let step = self.step_at(place);
        step.exited.store(taken.now, Relaxed);
        step.guest.store(taken.guest, Relaxed);
        step.key.store(taken.key, Relaxed);
        step.rip.store(taken.rip, Relaxed);
    }

    /// Return the most kernel ticks of an exit after which an entry needs nothing to be done.
    #[inline(always)]
    pub(super) fn floor(&self) -> u64 {
        self.floor.load(Relaxed)
    }

    /// The vCPU leaves its CPU in the kernel, for user space, which it has done before.
    #[inline(always)]
    pub(super) fn leave_to_user(&self, why: u16) {
        self.floor.store(0, Relaxed);
        self.away.why.store(WENT | u32::from(why), Relaxed);
    }

    /// The vCPU leaves a CPU in the kernel.
    pub(super) fn leave(&self, leaving: Leaving, cpu: u32) {
        self.floor.store(0, Relaxed);
        if own(&self.cpu) == 0 {
            self.cpu.store(held(cpu), Relaxed);
        }
        if leaving.phase != Phase::User {
            let outs = own(&self.away.outs);
            self.away.outs.store(outs.saturating_add(1), Relaxed);
        }
        if let Some(why) = leaving.to_user {
            self.away.why.store(WENT | u32::from(why), Relaxed);
        }
    }

    /// The vCPU leaves its CPU in the guest's phase, by an entry at `last` that no exit followed.
    pub(super) fn leave_guest(&self, last: u64) {
        self.floor.store(0, Relaxed);
        self.close(last);
    }

    /// Note ticks in user space.
    #[inline(always)]
    pub(super) fn pass_user(&self, ticks: u64) {
        let [user, ..] = &self.away.ticks;
        add(user, ticks);
    }

    /// Note ticks in a phase, by its number, of an exit.
    pub(super) fn pass(&self, phase: u32, ticks: u64) {
        if let Some(cell) = self.away.ticks.get((phase as usize).wrapping_sub(2)) {
            add(cell, ticks);
        }
    }

    /// Return true if an exit needs to be told that has ended at `now`, after so many kernel ticks.
    #[inline(always)]
    pub(super) fn is_to_be_told(&self, now: u64, kernel: u64) -> bool {
        let [user, _, preempted, waiting] = &self.away.ticks;
        let length = kernel
            .wrapping_add(own(user))
            .wrapping_add(own(preempted))
            .wrapping_add(own(waiting));
        length > own(&self.usual) || now >= own(&self.over) || self.has_ring()
    }

    /// Have all that is noted be that of the next exit; the vCPU is on a CPU.
    #[inline(always)]
    pub(super) fn end(&self, cpu: u32) {
        for cell in &self.away.ticks {
            cell.store(0, Relaxed);
        }
        self.away.outs.store(0, Relaxed);
        self.away.why.store(0, Relaxed);
        self.cpu.store(held(cpu), Relaxed);
        self.floor.store(own(&self.usual), Relaxed);
    }

    /// The vCPU is entered at `now` on a CPU, although it has not exited since the latest entry.
    pub(super) fn end_none(&self, now: u64, cpu: u32) {
        if self.has_begun.load(Relaxed) != 0 {
            self.see_to_window(now);
        }
        if self.has_ring() {
            let place = self.place();
            if let Some(course) = self.course(place) {
                course.after.store(held(cpu), Relaxed);
            }
        }
        self.end(cpu);
    }

    /// Tell of an exit that has ended at `now`, after so many kernel ticks, by an entry on a CPU.
    /// `left` tells whether the vCPU has left its CPU meanwhile.
    pub(super) fn tell(&self, exited: &Exited, now: u64, kernel: u64, left: bool, cpu: u32) {
        if now >= own(&self.over) {
            self.turn_window(now);
        }
        let [user, _, preempted, waiting] = &self.away.ticks;
        let length = [user, preempted, waiting]
            .into_iter()
            .fold(kernel, |sum, cell| sum.saturating_add(own(cell)));
        let cpu = held(cpu);
        let cpus = match own(&self.cpu) {
            // It has not left its CPU yet.
            0 => [cpu; 2],
            before => [before, cpu],
        };
        if length > own(&self.shortest) {
            self.keep(exited, now, kernel, cpus);
        }
        if self.has_ring() {
            self.tell_ring((now, kernel), length, left, cpus);
        }
        self.set_usual();
    }

    /// Keep an exit, in place of the shortest one.
    fn keep(&self, exited: &Exited, now: u64, kernel: u64, cpus: [u32; 2]) {
        let window = self.window();
        let count = own(&window.count);
        let place = match window.kept.get(count as usize) {
            Some(free) => {
                window.count.store(count.wrapping_add(1), Relaxed);
                Some(free)
            }
            None => window
                .kept
                .iter()
                .min_by_key(|kept| length(&kept.told.ticks)),
        };
        let Some(kept) = place else {
            return;
        };
        kept.sequence.store(exited.sequence, Relaxed);
        kept.key.store(exited.key, Relaxed);
        kept.rip.store(exited.rip, Relaxed);
        self.away.tell(&kept.told, now, kernel, cpus);
        if own(&window.count) < KEPT as u64 {
            return;
        }
        let lengths = window.kept.iter().map(|kept| length(&kept.told.ticks));
        self.shortest
            .store(lengths.fold(u64::MAX, u64::min), Relaxed);
    }

    /// As [`Self::tell`], for the ring.
    fn tell_ring(&self, end: (u64, u64), length: u64, left: bool, cpus: [u32; 2]) {
        let (now, kernel) = end;
        let place = self.place();
        let step = self.step_at(place);
        if own(&step.key) == 0 {
            return;
        }
        let was_frozen = own(&self.frozen) != 0;
        let is_asked = self.is_asked();
        let freezes = !was_frozen && length > own(&self.limit);
        if left || freezes {
            let course = self.course_at(place);
            self.away.tell(course, now, kernel, cpus);
            course.exited.store(own(&step.exited), Relaxed);
        }
        if freezes {
            self.freeze(place);
        }
        if was_frozen && is_asked {
            self.thaw(self.sequence().wrapping_add(1));
        }
    }

    /// Freeze the ring, for the latest exit, which took a step.
    fn freeze(&self, place: Place) {
        let sequence = self.sequence();
        self.culprit.store(sequence, Relaxed);
        self.frozen.store(place.0, Relaxed);
        // The other ring is as good as full: the next exit begins it anew.
        self.base
            .store(sequence.wrapping_sub(SCRATCH as u64 - 1), Relaxed);
        // INVARIANT: Both are 0.
        self.low.store(0, Relaxed);
        self.at.store(0, Relaxed);
        // So that nobody takes the step there for this exit.
        self.step_at(Place(0)).key.store(0, Relaxed);
    }

    /// Return the number of the latest exit, by the ring.
    fn sequence(&self) -> u64 {
        let top = match own(&self.low) {
            0 => SCRATCH_TOP,
            _ => RING_TOP,
        };
        let steps = top.wrapping_sub(own(&self.at)) / STEP;
        own(&self.base).wrapping_add(steps.into())
    }

    /// Return the course of a step if it has one.
    fn course(&self, place: Place) -> Option<&Told> {
        let course = self.course_at(place);
        let exited = own(&self.step_at(place).exited);
        (own(&course.exited) == exited).then_some(course)
    }

    /// Note in the ring that the latest exit ended with the entry at `last`, although no exit follows
    /// that.
    fn close(&self, last: u64) {
        if !self.has_ring() {
            return;
        }
        let place = self.place();
        let step = self.step_at(place);
        if own(&step.key) == 0 || self.course(place).is_some() {
            return;
        }
        let exited = own(&step.exited);
        self.course_at(place)
            .set(exited, last.wrapping_sub(exited), own(&self.cpu));
    }

    /// Return the window that exits end in.
    fn window(&self) -> &Window {
        let [first, second] = &self.windows;
        match own(&self.current) {
            0 => first,
            _ => second,
        }
    }

    /// Begin another window at `now` if the current one may end.
    pub(super) fn see_to_window(&self, now: u64) {
        if now >= own(&self.over) {
            self.turn_window(now);
            self.floor.store(0, Relaxed);
        }
    }

    /// Begin another window at `now`.
    fn turn_window(&self, now: u64) {
        self.current.store(own(&self.current) ^ 1, Relaxed);
        let window = self.window();
        window.begun.store(now, Relaxed);
        window.count.store(0, Relaxed);
        self.shortest.store(0, Relaxed);
        self.usual.store(0, Relaxed);
        self.over.store(now.wrapping_add(WINDOW), Relaxed);
    }

    /// Return true if somebody has asked for a ring that is not frozen since this was called last.
    fn is_asked(&self) -> bool {
        let asked = self.asked.load(Relaxed);
        let met = own(&self.met);
        self.met.store(asked, Relaxed);
        asked != met
    }

    /// Give up a frozen ring. The exits of the other one are not carried over; the next one has the
    /// number `next`.
    fn thaw(&self, next: u64) {
        self.frozen.store(0, Relaxed);
        for step in self.steps.iter().skip(SCRATCH) {
            step.key.store(0, Relaxed);
        }
        for course in &self.courses {
            course.exited.store(0, Relaxed);
        }
        // The next exit finds the ring full, and begins it anew.
        self.base.store(next.wrapping_sub(RING as u64), Relaxed);
        // INVARIANT: Both are the same.
        self.low.store(RING_LOW, Relaxed);
        self.at.store(RING_LOW, Relaxed);
        // Exits above the limit count again.
        self.usual.store(0, Relaxed);
        self.floor.store(0, Relaxed);
    }

    /// Set below which length exits need not be told, after one was.
    fn set_usual(&self) {
        let limit = own(&self.limit);
        let shortest = own(&self.shortest);
        let usual = match (limit, own(&self.frozen)) {
            (1.., 0) => shortest.min(limit),
            _ => shortest,
        };
        self.usual.store(usual, Relaxed);
    }

    /// Go on at `now` by a clock that has begun anew; it was `then` by the one before. The vCPU was
    /// in `phase` since the transition at `last`.
    pub(super) fn rebase(&self, last: u64, then: u64, now: u64, phase: u32) {
        if phase == Phase::Guest as u32 {
            self.close(last);
        } else {
            self.pass(phase, then.wrapping_sub(last));
        }
        self.floor.store(0, Relaxed);
        let shift = |cell: &AtomicU64| add(cell, now.wrapping_sub(then));
        let left = own(&self.over).saturating_sub(then);
        self.over.store(now.wrapping_add(left), Relaxed);
        for step in &self.steps {
            shift(&step.exited);
        }
        for course in &self.courses {
            shift(&course.exited);
        }
        for window in &self.windows {
            shift(&window.begun);
            for kept in &window.kept {
                shift(&kept.told.exited);
            }
        }
    }
}
