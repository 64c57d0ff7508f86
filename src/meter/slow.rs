// SPDX-License-Identifier: GPL-2.0

//! Recorder of the slowest exits of one vCPU, and of its latest exits before one that was too slow.
//!
//! The length of an exit is its time in the kernel, in user space, waiting and preempted: time that
//! the guest sleeps by its own wish does not make it slower. The recorder keeps the [`KEPT`]
//! longest exits of the current window, as many of the window before, and, if there is a limit, a
//! ring of the last [`RING`]. The ring freezes when an exit takes longer than the limit, so that a
//! later reader finds what led to it.
//!
//! # Cost
//!
//! The recorder writes nothing at an exit. At an entry, the kernel ticks since the exit are
//! compared with a floor; at or below it there is nothing to do. The floor is 0 while the window
//! has room, and while the vCPU has been off its CPU since the exit. Otherwise it is the length of
//! the shortest exit that is kept, or the limit. An exit above the floor is recorded out of line,
//! from what the ledger and the tables know of the latest exit, and from what was noted when the
//! vCPU left its CPU.
//!
//! The ring takes four words at each exit, and more when the vCPU leaves its CPU. So a ring exists
//! only with a limit, and each exit of a vCPU with a limit is recorded.
//!
//! # Windows
//!
//! A window ends at the first of these after [`WINDOW`] ticks: an entry that finds its exit above
//! the floor, an exit whose rows are not cached, or the entry after a reader has read the recorder.
//! An exit belongs to the window that its entry falls into.
//!
//! # Freezing
//!
//! A frozen ring stays until a reader asks for another one, or details are turned off. It does not
//! thaw by itself: the first exit that was too slow is the interesting one, and the next slow ones
//! are often its consequences. Meanwhile exits go to a small scratch ring that nobody reads, so
//! that they cost the same.

use super::{
    atomic::{self, add, AtomicU32, AtomicU64, Cell, Ordering::Relaxed},
    detail,
    phase::Phase,
    reasons::Slot,
};

mod copy;
mod own;
pub use copy::{SlowCopy, SlowExit};

/// Exits that a window keeps.
pub const KEPT: usize = 16;
/// Exits in the ring.
pub const RING: usize = 64;
/// Minimum length of a window, in TSC ticks: 11 s at 3 GHz.
pub const WINDOW: u64 = 1 << 35;
/// Upper bound for the size of the recorder, in bytes.
pub const MAX_BYTES: usize = 10 * 1024;

/// Exits in the scratch ring, which nobody reads.
const SCRATCH: usize = 16;
/// Size of a step, in bytes.
const STEP: u32 = size_of::<Step>() as u32;
/// Offset of the ring, which follows the scratch ring.
const RING_LOW: u32 = SCRATCH as u32 * STEP;
/// Offset of the last step of the ring. It is written first: a ring is written downwards.
const RING_TOP: u32 = RING_LOW + (RING as u32 - 1) * STEP;
/// Offset of the last step of the scratch ring.
const SCRATCH_TOP: u32 = RING_LOW - STEP;

/// Record of each exit. An exit without a course was in the kernel up to the latest transition
/// before the next exit, on one CPU.
#[repr(C)]
#[derive(Debug)]
struct Step {
    /// TSC at the exit.
    exited: AtomicU64,
    /// Ticks between the exit and the latest transition before it, an entry.
    guest: AtomicU64,
    /// Key of reason, nested flag and detail; 0 in an empty step.
    key: AtomicU64,
    rip: AtomicU64,
}

/// Number of phases that an exit can have: all but the guest phase.
const PHASES: usize = Phase::COUNT - 1;

/// Notes on an exit while the vCPU is off its CPU. All 0 at the exit.
#[repr(C)]
#[derive(Debug)]
struct Away {
    /// Ticks by phase, without the guest and kernel phases.
    ticks: [AtomicU64; PHASES - 1],
    /// Times that the scheduler took the vCPU off its CPU.
    outs: AtomicU32,
    /// See [`WENT`].
    why: AtomicU32,
}

/// Course of an exit that has ended: its ticks by phase, its CPUs, and why it went to user space.
#[repr(C)]
#[derive(Debug)]
struct Course {
    /// TSC at the exit.
    exited: AtomicU64,
    /// Ticks by phase, without the guest phase.
    ticks: [AtomicU64; PHASES],
    outs: AtomicU32,
    /// See [`WENT`].
    why: AtomicU32,
    /// CPU at the exit in the low half, at the entry in the high half; each counts from 1, and 0 is
    /// unknown.
    cpus: AtomicU32,
    /// CPU on which the vCPU went on; used in a ring.
    after: AtomicU32,
}

/// An exit that a window keeps.
#[repr(C)]
#[derive(Debug)]
struct Kept {
    sequence: AtomicU64,
    key: AtomicU64,
    rip: AtomicU64,
    course: Course,
}

/// Return the key of an exit without a detail: the reason from 1, and bit 8 for a nested guest. It
/// is never 0. The field that holds the reason in a key with a detail is 0 here.
#[inline(always)]
pub(super) fn key(slot: Slot, nested: bool) -> u64 {
    (slot.index() as u64).wrapping_add(1) | u64::from(nested) << 8
}

/// Return true if a key has a detail.
pub(super) fn has_detail(key: u64) -> bool {
    key >> detail::BITS != 0
}

/// Flag in `why` of an exit that went to user space. The bits below hold KVM_EXIT_*.
const WENT: u32 = 1 << 16;

/// The slowest exits of one window.
#[repr(C)]
#[derive(Debug)]
struct Window {
    /// TSC when the window began.
    begun: AtomicU64,
    /// Number of exits in `kept`.
    count: AtomicU64,
    kept: [Kept; KEPT],
}

/// A step, by its byte offset from the first one.
///
/// # Invariants
///
/// It is a multiple of [`STEP`] up to [`RING_TOP`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Place(u32);

/// An exit, as the ledger passes it to a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingExit {
    /// TSC at the exit.
    pub(super) now: u64,
    /// Ticks since the transition before it.
    pub(super) guest: u64,
    /// See [`key`].
    pub(super) key: u64,
    pub(super) rip: u64,
}

/// An exit that has ended, as the tables describe it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exited {
    /// Number of the exit, from 0 when the tables began.
    pub(super) sequence: u64,
    /// See [`key`].
    pub(super) key: u64,
    pub(super) rip: u64,
}

/// Description of how a vCPU leaves its CPU.
#[derive(Clone, Copy, Debug)]
pub struct Leaving {
    /// The phase that begins.
    pub phase: Phase,
    /// KVM_EXIT_* (linux/kvm.h), if KVM_RUN ends.
    pub to_user: Option<u16>,
}

/// Recorder of one vCPU's slow exits. All-zero bytes are a recorder that has recorded nothing and
/// has no ring.
///
/// Only the vCPU's transitions write the fields, except `floor`, `limit` and `asked`. They are read
/// as a ledger is.
///
/// # Invariants
///
/// `at` holds the number of a `Place`, and `low` 0 or `RING_LOW`, not above `at`.
#[repr(C)]
#[derive(Debug)]
pub struct Slow {
    /// Kernel ticks of an exit up to which its entry has nothing to do.
    floor: AtomicU64,
    /// Length of an exit, in ticks, up to which it need not be recorded although the vCPU has left
    /// its CPU.
    usual: AtomicU64,
    /// Length of the shortest exit that the window keeps; 0 while the window has room.
    shortest: AtomicU64,
    /// TSC at which the window may end.
    over: AtomicU64,
    away: Away,
    /// CPU of the latest entry that was noted, plus 1; 0 before there was one.
    cpu: AtomicU32,
    has_begun: AtomicU32,
    /// Index of the current window.
    current: AtomicU32,
    /// Offset of the step of the latest exit.
    at: AtomicU32,
    /// Offset of the step at which the ring is full.
    low: AtomicU32,
    /// Offset of the step that froze the ring; 0 while it is not frozen.
    frozen: AtomicU32,
    /// Length of an exit, in ticks, above which it freezes the ring; 0 without a ring.
    limit: AtomicU64,
    /// Number of the exit at the top step, the latest or the next one there.
    base: AtomicU64,
    /// Number of the exit that froze the ring.
    culprit: AtomicU64,
    /// Number of requests for a ring that is not frozen.
    asked: AtomicU32,
    /// Number of these requests that were met.
    met: AtomicU32,
    steps: [Step; SCRATCH + RING],
    /// Courses of the ring's steps, and one more for all other steps. A course belongs to a step if
    /// it has the step's TSC.
    courses: [Course; RING + 1],
    windows: [Window; 2],
}

// Loom's atomics are larger.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Slow>() <= MAX_BYTES);
// cli/bpf/tables.h has the same offset.
#[cfg(not(loom))]
const _: () = assert!(core::mem::offset_of!(Slow, windows) == 6848);

/// Read a cell of a recorder, in a transition of its vCPU.
#[inline(always)]
fn read_owned<C: Cell>(cell: &C) -> C::Value {
    // SAFETY: Only transitions write this cell, and there is one at a time.
    unsafe { atomic::read_owned(cell) }
}

/// Return the length of an exit: the ticks that make it slow.
fn length(ticks: &[AtomicU64; PHASES]) -> u64 {
    let [kernel, user, _, preempted, waiting] = ticks;
    [kernel, user, preempted, waiting]
        .into_iter()
        .fold(0, |sum: u64, cell| sum.saturating_add(read_owned(cell)))
}

/// Return a CPU number as the recorder holds it: from 1, in 16 bits.
#[inline(always)]
fn held(cpu: u32) -> u32 {
    cpu.saturating_add(1).min(0xffff)
}

/// Pack the CPU at the exit and the CPU at the entry into one word.
const fn pair(exit: u32, entry: u32) -> u32 {
    exit & 0xffff | entry << 16
}

impl Course {
    /// Record an exit that was in the kernel for all its time, on one CPU.
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
    /// Record an exit that ended at `now`, with the notes here.
    fn write_to(&self, course: &Course, now: u64, kernel: u64, cpus: [u32; 2]) {
        let [exit, entry] = cpus;
        let all = self
            .ticks
            .iter()
            .fold(kernel, |sum, cell| sum.wrapping_add(read_owned(cell)));
        course.set(now.wrapping_sub(all), kernel, entry);
        let [_, others @ ..] = &course.ticks;
        for (to, from) in others.iter().zip(&self.ticks) {
            to.store(read_owned(from), Relaxed);
        }
        course.outs.store(read_owned(&self.outs), Relaxed);
        course.why.store(read_owned(&self.why), Relaxed);
        course.cpus.store(pair(exit, entry), Relaxed);
    }
}

impl Slow {
    /// Create a ring that freezes at an exit of more than `ticks`; 0 for no ring. Call before the
    /// first event.
    pub fn set_limit(&self, ticks: u64) {
        self.limit.store(ticks, Relaxed);
    }

    /// Return true if there is a ring.
    #[inline(always)]
    pub(super) fn has_ring(&self) -> bool {
        // Nobody writes the limit after the first event.
        read_owned(&self.limit) != 0
    }

    /// Ask for a ring that is not frozen. It comes at the next slow exit, or within 16 exits. Any
    /// thread may call this; callers take turns.
    pub fn ask(&self) {
        self.asked
            .store(self.asked.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// Let the window end at the next entry if its time is over. Any thread may call this: 0 is
    /// always a valid floor, and the reader calls again if the vCPU has just set another one.
    /// `last` is the TSC of the vCPU's latest transition.
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
        // INVARIANT: By the invariant of `Slow`.
        Place(read_owned(&self.at))
    }

    fn course_at(&self, place: Place) -> &Course {
        let of_ring = (place.0 / STEP).wrapping_sub(SCRATCH as u32) as usize;
        let [.., others] = &self.courses;
        self.courses.get(of_ring).unwrap_or(others)
    }

    /// Begin recording, at the vCPU's first exit at TSC `now`.
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
        read_owned(&self.at) != read_owned(&self.low)
    }

    /// Restart the ring if it is full. An exit must follow.
    pub(super) fn make_room(&self) {
        if self.has_room() {
            return;
        }
        if read_owned(&self.low) == 0 && read_owned(&self.frozen) == 0 {
            // The first exit.
            return self.go_to(RING_LOW, RING_TOP);
        }
        let is_frozen = read_owned(&self.frozen) != 0;
        let len = if is_frozen { SCRATCH } else { RING };
        add(&self.base, len as u64);
        if self.take_requests() && is_frozen {
            self.thaw(read_owned(&self.base));
            add(&self.base, RING as u64);
        }
        match read_owned(&self.frozen) {
            0 => self.go_to(RING_LOW, RING_TOP),
            _ => self.go_to(0, SCRATCH_TOP),
        }
    }

    /// Make the next exit take the step `top`, in the ring that starts at `low`.
    fn go_to(&self, low: u32, top: u32) {
        // INVARIANT: The exit that must follow makes this the offset of a place.
        self.at.store(top.wrapping_add(STEP), Relaxed);
        self.low.store(low, Relaxed);
    }

    /// Write an exit into the next step of the ring. The ring must have room.
    #[inline(always)]
    pub(super) fn take_exit(&self, taken: &RingExit) {
        // Loaded again, so that no register has to hold it since `has_room`.
        // INVARIANT: `low` is not above `at`, and they differed.
        let place = Place(self.at.load(Relaxed).wrapping_sub(STEP));
        self.at.store(place.0, Relaxed);
        let step = self.step_at(place);
        step.exited.store(taken.now, Relaxed);
        step.guest.store(taken.guest, Relaxed);
        step.key.store(taken.key, Relaxed);
        step.rip.store(taken.rip, Relaxed);
    }

    /// Return the kernel ticks of an exit up to which its entry has nothing to do.
    #[inline(always)]
    pub(super) fn floor(&self) -> u64 {
        self.floor.load(Relaxed)
    }

    /// Note that the vCPU leaves its CPU in the kernel, for user space, not for the first time.
    #[inline(always)]
    pub(super) fn leave_to_user(&self, why: u16) {
        self.floor.store(0, Relaxed);
        self.away.why.store(WENT | u32::from(why), Relaxed);
    }

    /// Note that the vCPU leaves a CPU in the kernel.
    pub(super) fn leave(&self, leaving: Leaving, cpu: u32) {
        self.floor.store(0, Relaxed);
        if read_owned(&self.cpu) == 0 {
            self.cpu.store(held(cpu), Relaxed);
        }
        if leaving.phase != Phase::User {
            let outs = read_owned(&self.away.outs);
            self.away.outs.store(outs.saturating_add(1), Relaxed);
        }
        if let Some(why) = leaving.to_user {
            self.away.why.store(WENT | u32::from(why), Relaxed);
        }
    }

    /// Note that the vCPU leaves its CPU in the guest phase, by an entry at `last` without an exit
    /// after it.
    pub(super) fn leave_guest(&self, last: u64) {
        self.floor.store(0, Relaxed);
        self.close(last);
    }

    /// Note ticks in the user phase.
    #[inline(always)]
    pub(super) fn note_user_ticks(&self, ticks: u64) {
        let [user, ..] = &self.away.ticks;
        add(user, ticks);
    }

    /// Note ticks of an exit in a phase, by the phase's number.
    pub(super) fn note_ticks(&self, phase: u32, ticks: u64) {
        if let Some(cell) = self.away.ticks.get((phase as usize).wrapping_sub(2)) {
            add(cell, ticks);
        }
    }

    /// Return true if an exit that ended at `now`, after `kernel` kernel ticks, must be recorded.
    #[inline(always)]
    pub(super) fn must_record(&self, now: u64, kernel: u64) -> bool {
        let [user, _, preempted, waiting] = &self.away.ticks;
        let length = kernel
            .wrapping_add(read_owned(user))
            .wrapping_add(read_owned(preempted))
            .wrapping_add(read_owned(waiting));
        length > read_owned(&self.usual) || now >= read_owned(&self.over) || self.has_ring()
    }

    /// Clear the notes for the next exit. The vCPU is on a CPU.
    #[inline(always)]
    pub(super) fn end(&self, cpu: u32) {
        for cell in &self.away.ticks {
            cell.store(0, Relaxed);
        }
        self.away.outs.store(0, Relaxed);
        self.away.why.store(0, Relaxed);
        self.cpu.store(held(cpu), Relaxed);
        self.floor.store(read_owned(&self.usual), Relaxed);
    }

    /// Note an entry at `now` on a CPU without an exit since the latest entry.
    pub(super) fn enter_without_exit(&self, now: u64, cpu: u32) {
        if self.has_begun.load(Relaxed) != 0 {
            self.turn_window_if_over(now);
        }
        if self.has_ring() {
            let place = self.place();
            if let Some(course) = self.course(place) {
                course.after.store(held(cpu), Relaxed);
            }
        }
        self.end(cpu);
    }

    /// Record an exit that ended at `now`, after `kernel` kernel ticks, by an entry on a CPU.
    /// `left` is true if the vCPU has left its CPU meanwhile.
    pub(super) fn record(&self, exited: &Exited, now: u64, kernel: u64, left: bool, cpu: u32) {
        if now >= read_owned(&self.over) {
            self.turn_window(now);
        }
        let [user, _, preempted, waiting] = &self.away.ticks;
        let length = [user, preempted, waiting]
            .into_iter()
            .fold(kernel, |sum, cell| sum.saturating_add(read_owned(cell)));
        let cpu = held(cpu);
        let cpus = match read_owned(&self.cpu) {
            // The vCPU has not left its CPU yet.
            0 => [cpu; 2],
            before => [before, cpu],
        };
        if length > read_owned(&self.shortest) {
            self.keep(exited, now, kernel, cpus);
        }
        if self.has_ring() {
            self.record_in_ring((now, kernel), length, left, cpus);
        }
        self.set_usual();
    }

    /// Keep an exit in the window, in place of the shortest one.
    fn keep(&self, exited: &Exited, now: u64, kernel: u64, cpus: [u32; 2]) {
        let window = self.window();
        let count = read_owned(&window.count);
        let place = match window.kept.get(count as usize) {
            Some(free) => {
                window.count.store(count.wrapping_add(1), Relaxed);
                Some(free)
            }
            None => window
                .kept
                .iter()
                .min_by_key(|kept| length(&kept.course.ticks)),
        };
        let Some(kept) = place else {
            return;
        };
        kept.sequence.store(exited.sequence, Relaxed);
        kept.key.store(exited.key, Relaxed);
        kept.rip.store(exited.rip, Relaxed);
        self.away.write_to(&kept.course, now, kernel, cpus);
        if read_owned(&window.count) < KEPT as u64 {
            return;
        }
        let lengths = window.kept.iter().map(|kept| length(&kept.course.ticks));
        self.shortest
            .store(lengths.fold(u64::MAX, u64::min), Relaxed);
    }

    /// Record an exit in the ring, as [`Self::record`].
    fn record_in_ring(&self, end: (u64, u64), length: u64, left: bool, cpus: [u32; 2]) {
        let (now, kernel) = end;
        let place = self.place();
        let step = self.step_at(place);
        if read_owned(&step.key) == 0 {
            return;
        }
        let was_frozen = read_owned(&self.frozen) != 0;
        let is_asked = self.take_requests();
        let freezes = !was_frozen && length > read_owned(&self.limit);
        if left || freezes {
            let course = self.course_at(place);
            self.away.write_to(course, now, kernel, cpus);
            course.exited.store(read_owned(&step.exited), Relaxed);
        }
        if freezes {
            self.freeze(place);
        }
        if was_frozen && is_asked {
            self.thaw(self.sequence().wrapping_add(1));
        }
    }

    /// Freeze the ring at the latest exit, which took the step `place`.
    fn freeze(&self, place: Place) {
        let sequence = self.sequence();
        self.culprit.store(sequence, Relaxed);
        self.frozen.store(place.0, Relaxed);
        // Treat the scratch ring as full: the next exit restarts it.
        self.base
            .store(sequence.wrapping_sub(SCRATCH as u64 - 1), Relaxed);
        // INVARIANT: Both are 0.
        self.low.store(0, Relaxed);
        self.at.store(0, Relaxed);
        // Clear the key, so that nobody takes the step there for this exit.
        self.step_at(Place(0)).key.store(0, Relaxed);
    }

    /// Return the number of the latest exit, from the ring.
    fn sequence(&self) -> u64 {
        let top = match read_owned(&self.low) {
            0 => SCRATCH_TOP,
            _ => RING_TOP,
        };
        let steps = top.wrapping_sub(read_owned(&self.at)) / STEP;
        read_owned(&self.base).wrapping_add(steps.into())
    }

    /// Return the course of a step, if it has one.
    fn course(&self, place: Place) -> Option<&Course> {
        let course = self.course_at(place);
        let exited = read_owned(&self.step_at(place).exited);
        (read_owned(&course.exited) == exited).then_some(course)
    }

    /// Record in the ring that the latest exit ended with the entry at `last`, although no exit
    /// follows that entry.
    fn close(&self, last: u64) {
        if !self.has_ring() {
            return;
        }
        let place = self.place();
        let step = self.step_at(place);
        if read_owned(&step.key) == 0 || self.course(place).is_some() {
            return;
        }
        let exited = read_owned(&step.exited);
        self.course_at(place)
            .set(exited, last.wrapping_sub(exited), read_owned(&self.cpu));
    }

    /// Return the current window.
    fn window(&self) -> &Window {
        let [first, second] = &self.windows;
        match read_owned(&self.current) {
            0 => first,
            _ => second,
        }
    }

    /// Turn to another window at `now` if the current one's time is over.
    pub(super) fn turn_window_if_over(&self, now: u64) {
        if now >= read_owned(&self.over) {
            self.turn_window(now);
            self.floor.store(0, Relaxed);
        }
    }

    /// Turn to another window at `now`.
    fn turn_window(&self, now: u64) {
        self.current.store(read_owned(&self.current) ^ 1, Relaxed);
        let window = self.window();
        window.begun.store(now, Relaxed);
        window.count.store(0, Relaxed);
        self.shortest.store(0, Relaxed);
        self.usual.store(0, Relaxed);
        self.over.store(now.wrapping_add(WINDOW), Relaxed);
    }

    /// Take the requests for a ring that is not frozen. Return true if there was one since the last call.
    fn take_requests(&self) -> bool {
        let asked = self.asked.load(Relaxed);
        let met = read_owned(&self.met);
        self.met.store(asked, Relaxed);
        asked != met
    }

    /// Give up a frozen ring. Exits of the scratch ring are not carried over; the next exit has the
    /// number `next`.
    fn thaw(&self, next: u64) {
        self.frozen.store(0, Relaxed);
        for step in self.steps.iter().skip(SCRATCH) {
            step.key.store(0, Relaxed);
        }
        for course in &self.courses {
            course.exited.store(0, Relaxed);
        }
        // The next exit finds the ring full, and restarts it.
        self.base.store(next.wrapping_sub(RING as u64), Relaxed);
        // INVARIANT: Both are equal.
        self.low.store(RING_LOW, Relaxed);
        self.at.store(RING_LOW, Relaxed);
        // Exits above the limit count again.
        self.usual.store(0, Relaxed);
        self.floor.store(0, Relaxed);
    }

    /// Set the length up to which exits need not be recorded, after one was.
    fn set_usual(&self) {
        let limit = read_owned(&self.limit);
        let shortest = read_owned(&self.shortest);
        let usual = match (limit, read_owned(&self.frozen)) {
            (1.., 0) => shortest.min(limit),
            _ => shortest,
        };
        self.usual.store(usual, Relaxed);
    }

    /// Move to a restarted clock, which reads `now`; the old clock read `then`. The vCPU has been in
    /// `phase` since the transition at `last`.
    pub(super) fn rebase(&self, last: u64, then: u64, now: u64, phase: u32) {
        if phase == Phase::Guest as u32 {
            self.close(last);
        } else {
            self.note_ticks(phase, then.wrapping_sub(last));
        }
        self.floor.store(0, Relaxed);
        let shift = |cell: &AtomicU64| add(cell, now.wrapping_sub(then));
        let left = read_owned(&self.over).saturating_sub(then);
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
                shift(&kept.course.exited);
            }
        }
    }
}
