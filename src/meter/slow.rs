// SPDX-License-Identifier: GPL-2.0

//! The slowest exits of one vCPU, and its last ones before one that was too slow.
//!
//! An exit is as long as it was in the kernel, in user space, waiting and preempted: that the guest
//! slept by its own wish makes it no slower. Kept are the [`KEPT`] longest of the current window and
//! as many of the one before, and a ring of the last [`RING`]. The ring freezes when an exit takes
//! longer than a limit, so that who comes later finds what led to it.
//!
//! # How it costs little
//!
//! An exit writes four words into the ring. At an entry the ticks since the exit are compared with a
//! floor, below which nothing is to be done: that is 0 while the window has room, and while the
//! vCPU has been off its CPU since the exit; else the length of the shortest exit that is kept, or
//! the limit. All else is done when an exit is above the floor, when the vCPU leaves its CPU, and
//! when the ring is full.
//!
//! # Windows
//!
//! A window ends at the first occasion after [`WINDOW`] ticks: an entry that finds its exit above
//! the floor, or an exit that finds the ring full. So it ends with the 64th exit after that time at
//! the latest. An exit belongs to the window in which the vCPU is entered after it.
//!
//! # Freezing
//!
//! A frozen ring stays until somebody asks for another one, or details are turned off. It does not
//! thaw by itself: the first exit that was too slow is what one looks for, and the next ones are
//! often its consequences. Meanwhile exits go to a small ring that nobody reads, so that they cost
//! the same.

use super::{
    atomic::{add, own, AtomicU32, AtomicU64, Ordering::Relaxed},
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

/// The course of an exit in which the vCPU left its CPU, or that was too slow.
#[repr(C)]
#[derive(Debug)]
struct Course {
    /// TSC at the exit that it is of. Another one: it is of none.
    exited: AtomicU64,
    /// By phase, without the guest's.
    ticks: [AtomicU64; PHASES],
    outs: AtomicU32,
    /// See [`WENT`].
    why: AtomicU32,
    /// The CPU at the exit, and in the high half at the entry.
    cpus: AtomicU32,
    /// The CPU on which the vCPU went on.
    after: AtomicU32,
}

/// An exit that is kept.
#[repr(C)]
#[derive(Debug)]
struct Kept {
    sequence: AtomicU64,
    exited: AtomicU64,
    key: AtomicU64,
    rip: AtomicU64,
    ticks: [AtomicU64; PHASES],
    outs: AtomicU32,
    why: AtomicU32,
    cpus: AtomicU32,
    _reserved: AtomicU32,
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

/// An exit, as the ledger tells of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told {
    /// TSC at the exit.
    pub(super) now: u64,
    /// Ticks since the transition before it.
    pub(super) guest: u64,
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
    /// The CPU.
    pub cpu: u32,
}

/// The recorder of one vCPU's slow exits. All-zero bytes are one that has recorded nothing and
/// never freezes.
///
/// All but `limit` and `asked` is written in the vCPU's transitions alone, and read as a ledger is.
///
/// # Invariants
///
/// `at` holds the number of a `Place`, and `low` 0 or `RING_LOW`, not above `at`.
#[repr(C)]
#[derive(Debug)]
pub struct Slow {
    /// The step of the latest exit.
    at: AtomicU32,
    /// The last step before the ring is full.
    low: AtomicU32,
    /// An exit of so many ticks or less needs nothing to be done at the entry.
    floor: AtomicU64,
    /// The number of the exit that took or takes the top step.
    base: AtomicU64,
    /// TSC at the latest transition of an exit in whose course the vCPU left its CPU; 0 once it has
    /// ended.
    noted: AtomicU64,
    /// The length of the shortest exit that the window keeps; 0 while it has room.
    shortest: AtomicU64,
    /// An exit of more ticks freezes the ring; 0: none does.
    limit: AtomicU64,
    /// The number of the exit that froze the ring.
    culprit: AtomicU64,
    /// The step of that exit, 0 while the ring is not frozen.
    frozen: AtomicU32,
    /// Which window is the current one.
    current: AtomicU32,
    /// The CPU that the vCPU is on, and 1; 0 until it has left one.
    cpu: AtomicU32,
    /// The CPU that it was on before it left one for the first time, and 1. Exits up to then do not
    /// tell their CPU.
    first_cpu: AtomicU32,
    /// How often a ring was asked for that is not frozen.
    asked: AtomicU32,
    /// How many of these requests were met.
    met: AtomicU32,
    has_begun: AtomicU32,
    steps: [Step; SCRATCH + RING],
    /// Of the ring's steps; the last one is that of all others.
    courses: [Course; RING + 1],
    windows: [Window; 2],
}

// Loom's atomics are larger.
#[cfg(not(loom))]
const _: () = assert!(size_of::<Slow>() <= MOST_BYTES);

/// Return the sum of ticks that makes an exit slow.
fn length(ticks: &[AtomicU64; PHASES]) -> u64 {
    let [kernel, user, _, preempted, waiting] = ticks;
    [kernel, user, preempted, waiting]
        .into_iter()
        .fold(0, |sum: u64, cell| sum.saturating_add(cell.load(Relaxed)))
}

/// Return the cell of a phase, by its number; `None` for the guest's.
fn cell_of(ticks: &[AtomicU64; PHASES], phase: u32) -> Option<&AtomicU64> {
    ticks.get((phase as usize).wrapping_sub(1))
}

/// Return a CPU at the exit and at the entry as one word.
const fn pair(exit: u32, entry: u32) -> u32 {
    exit & 0xffff | entry << 16
}

impl Course {
    /// Begin the course of an exit.
    fn begin(&self, exited: u64, cpu: u32) {
        self.exited.store(exited, Relaxed);
        for cell in &self.ticks {
            cell.store(0, Relaxed);
        }
        self.outs.store(0, Relaxed);
        self.why.store(0, Relaxed);
        self.cpus.store(pair(cpu, cpu), Relaxed);
        self.after.store(cpu, Relaxed);
    }
}

impl Slow {
    /// Have the ring freeze at an exit of more ticks, 0 for never. Before its first event.
    pub fn set_limit(&self, ticks: u64) {
        self.limit.store(ticks, Relaxed);
    }

    /// Ask for a ring that is not frozen. It is given at the next slow exit, or within 16 exits. From
    /// any thread; those that ask take turns.
    pub fn ask(&self) {
        self.asked
            .store(self.asked.load(Relaxed).wrapping_add(1), Relaxed);
    }

    #[inline(always)]
    fn step_at(&self, place: Place) -> &Step {
        // SAFETY: By the invariant of `Place`, a step is there.
        unsafe { &*self.steps.as_ptr().byte_add(place.0 as usize) }
    }

    #[inline(always)]
    fn place(&self) -> Place {
        // INVARIANT: By that of `Slow`.
        Place(self.at.load(Relaxed))
    }

    fn course_at(&self, place: Place) -> &Course {
        let of_ring = (place.0 / STEP).wrapping_sub(SCRATCH as u32) as usize;
        let [.., others] = &self.courses;
        self.courses.get(of_ring).unwrap_or(others)
    }

    /// Return true if there is a step for the next exit.
    #[inline(always)]
    pub(super) fn has_room(&self) -> bool {
        // SAFETY: This thread holds the vCPU, so nobody else writes them.
        unsafe { own(&self.at) != own(&self.low) }
    }

    /// Begin the ring anew where it is full, for an exit at TSC `now`, which has to follow.
    pub(super) fn make_room(&self, now: u64) {
        if self.has_room() {
            return;
        }
        if self.has_begun.load(Relaxed) == 0 {
            self.has_begun.store(1, Relaxed);
            for window in &self.windows {
                window.begun.store(now, Relaxed);
            }
            return self.go_to(RING_LOW, RING_TOP);
        }
        if self.turn_window(now) {
            self.floor.store(0, Relaxed);
        }
        let is_frozen = self.frozen.load(Relaxed) != 0;
        let len = if is_frozen { SCRATCH } else { RING };
        add(&self.base, len as u64);
        if self.is_asked() && is_frozen {
            self.thaw(self.base.load(Relaxed));
            add(&self.base, RING as u64);
        }
        match self.frozen.load(Relaxed) {
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

    /// Take an exit into the next step. There has to be room.
    #[inline(always)]
    pub(super) fn take_exit(&self, told: &Told) {
        // Loaded once more, so that no register has to hold it since `has_room`.
        // INVARIANT: `low` is not above `at`, and they were not the same.
        let place = Place(self.at.load(Relaxed).wrapping_sub(STEP));
        self.at.store(place.0, Relaxed);
        let step = self.step_at(place);
        step.exited.store(told.now, Relaxed);
        step.guest.store(told.guest, Relaxed);
        step.key.store(told.key, Relaxed);
        step.rip.store(told.rip, Relaxed);
    }

    /// Return the most ticks of an exit after which an entry needs nothing to be done.
    #[inline(always)]
    pub(super) fn floor(&self) -> u64 {
        // SAFETY: As in `has_room`.
        unsafe { own(&self.floor) }
    }

    /// Return the number of the latest exit.
    fn sequence(&self) -> u64 {
        let at = self.at.load(Relaxed);
        let top = match self.low.load(Relaxed) {
            0 => SCRATCH_TOP,
            _ => RING_TOP,
        };
        let steps = top.wrapping_sub(at) / STEP;
        self.base.load(Relaxed).wrapping_add(steps.into())
    }

    /// Return the course of the latest exit if it has one.
    fn course(&self) -> Option<&Course> {
        let place = self.place();
        let course = self.course_at(place);
        let exited = self.step_at(place).exited.load(Relaxed);
        (course.exited.load(Relaxed) == exited).then_some(course)
    }

    /// Return the course of the latest exit if that has not ended by the transition at `last`,
    /// and is to be told by `noted`. It gets one if it has none.
    fn open_course(&self, last: u64) -> Option<&Course> {
        let place = self.place();
        let step = self.step_at(place);
        if step.key.load(Relaxed) == 0 {
            return None;
        }
        let exited = step.exited.load(Relaxed);
        if let Some(course) = self.course() {
            return (self.noted.load(Relaxed) == last).then_some(course);
        }
        if exited != last {
            return None;
        }
        let course = self.course_at(place);
        course.begin(exited, self.cpu.load(Relaxed));
        Some(course)
    }

    /// Note that the latest exit ended with the entry at `last`, although no exit follows that.
    fn close(&self, last: u64) {
        let place = self.place();
        let step = self.step_at(place);
        if step.key.load(Relaxed) == 0 || self.course().is_some() {
            return;
        }
        let exited = step.exited.load(Relaxed);
        let course = self.course_at(place);
        course.begin(exited, self.cpu.load(Relaxed));
        if let Some(kernel) = course.ticks.first() {
            kernel.store(last.wrapping_sub(exited), Relaxed);
        }
    }

    /// The vCPU leaves its CPU at `now` for `phase`, after a time in `left`; the transition before
    /// was at `last`.
    pub(super) fn leave(&self, last: u64, now: u64, left: u32, leaving: &Leaving) {
        self.floor.store(0, Relaxed);
        self.on_cpu(leaving.cpu);
        if left == Phase::Guest as u32 {
            return self.close(last);
        }
        if left != Phase::Kernel as u32 {
            return self.pass(last, now, left);
        }
        let Some(course) = self.open_course(last) else {
            return;
        };
        if leaving.phase != Phase::User {
            let outs = course.outs.load(Relaxed);
            course.outs.store(outs.saturating_add(1), Relaxed);
        }
        if let Some(why) = leaving.to_user {
            course.why.store(WENT | u32::from(why), Relaxed);
        }
        self.noted.store(now, Relaxed);
    }

    /// The vCPU is back at `now` on a CPU, after a time in `left`; the transition before was at
    /// `last`.
    pub(super) fn resume(&self, last: u64, now: u64, left: u32, cpu: u32) {
        let cpu = self.on_cpu(cpu);
        self.floor.store(0, Relaxed);
        if left == Phase::Guest as u32 {
            self.close(last);
        } else if left != Phase::Kernel as u32 {
            self.pass(last, now, left);
        } else if self.open_course(last).is_some() {
            self.noted.store(now, Relaxed);
        }
        if let Some(course) = self.course() {
            course.after.store(cpu, Relaxed);
        }
    }

    /// Note which CPU the vCPU is on; return it as it is held.
    fn on_cpu(&self, cpu: u32) -> u32 {
        let cpu = cpu.saturating_add(1).min(0xffff);
        self.cpu.store(cpu, Relaxed);
        if self.first_cpu.load(Relaxed) == 0 {
            self.first_cpu.store(cpu, Relaxed);
        }
        cpu
    }

    /// Book the time from `last` to `now` in a phase other than the kernel's and the guest's, if
    /// the latest exit has not ended.
    fn pass(&self, last: u64, now: u64, left: u32) {
        let Some(course) = self.open_course(last) else {
            return;
        };
        if let Some(cell) = cell_of(&course.ticks, left) {
            add(cell, now.wrapping_sub(last));
        }
        self.noted.store(now, Relaxed);
    }

    /// The vCPU is entered at `now`, after an exit above the floor; the transition before was at
    /// `last`. `kernel` is how many ticks of the exit were the kernel's; `None` where there was no
    /// exit since the latest entry.
    pub(super) fn end(&self, last: u64, now: u64, kernel: Option<u64>) {
        let place = self.place();
        let step = self.step_at(place);
        if step.key.load(Relaxed) == 0 {
            return;
        }
        self.turn_window(now);
        let was_frozen = self.frozen.load(Relaxed) != 0;
        let is_asked = self.is_asked();
        let exited = step.exited.load(Relaxed);
        let course = self.course();
        let is_open = match course {
            Some(_) => self.noted.load(Relaxed) == last,
            None => exited == last,
        };
        if let Some(kernel) = kernel.filter(|_| is_open) {
            self.end_open(place, course, kernel);
        }
        self.noted.store(0, Relaxed);
        if was_frozen && is_asked {
            self.thaw(self.sequence().wrapping_add(1));
        }
        self.set_floor();
    }

    /// The latest exit ends, after so many kernel ticks.
    fn end_open(&self, place: Place, course: Option<&Course>, kernel: u64) {
        let step = self.step_at(place);
        let cpu = self.cpu.load(Relaxed);
        let limit = self.limit.load(Relaxed);
        if let Some(course) = course {
            if let Some(cell) = course.ticks.first() {
                cell.store(kernel, Relaxed);
            }
            let exit = course.cpus.load(Relaxed);
            course.cpus.store(pair(exit, cpu), Relaxed);
            course.after.store(cpu, Relaxed);
        }
        let length = match course {
            Some(course) => length(&course.ticks),
            None => kernel,
        };
        if length > self.shortest.load(Relaxed) {
            self.keep(step, course, kernel, cpu);
        }
        if limit == 0 || length <= limit || self.frozen.load(Relaxed) != 0 {
            return;
        }
        if course.is_none() {
            let course = self.course_at(place);
            course.begin(step.exited.load(Relaxed), cpu);
            if let Some(cell) = course.ticks.first() {
                cell.store(kernel, Relaxed);
            }
        }
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

    /// Return the window that exits end in.
    fn window(&self) -> &Window {
        let [first, second] = &self.windows;
        match self.current.load(Relaxed) {
            0 => first,
            _ => second,
        }
    }

    /// Keep an exit, in place of the shortest one.
    fn keep(&self, step: &Step, course: Option<&Course>, kernel: u64, cpu: u32) {
        let window = self.window();
        let count = window.count.load(Relaxed);
        let place = match window.kept.get(count as usize) {
            Some(free) => {
                window.count.store(count.wrapping_add(1), Relaxed);
                Some(free)
            }
            None => window.kept.iter().min_by_key(|kept| length(&kept.ticks)),
        };
        let Some(kept) = place else {
            return;
        };
        kept.sequence.store(self.sequence(), Relaxed);
        for (to, from) in [
            (&kept.exited, &step.exited),
            (&kept.key, &step.key),
            (&kept.rip, &step.rip),
        ] {
            to.store(from.load(Relaxed), Relaxed);
        }
        match course {
            Some(course) => {
                for (to, from) in kept.ticks.iter().zip(&course.ticks) {
                    to.store(from.load(Relaxed), Relaxed);
                }
                for (to, from) in [
                    (&kept.outs, &course.outs),
                    (&kept.why, &course.why),
                    (&kept.cpus, &course.cpus),
                ] {
                    to.store(from.load(Relaxed), Relaxed);
                }
            }
            None => {
                for cell in &kept.ticks {
                    cell.store(0, Relaxed);
                }
                if let Some(cell) = kept.ticks.first() {
                    cell.store(kernel, Relaxed);
                }
                kept.outs.store(0, Relaxed);
                kept.why.store(0, Relaxed);
                kept.cpus.store(pair(cpu, cpu), Relaxed);
            }
        }
        if window.count.load(Relaxed) < KEPT as u64 {
            return;
        }
        let lengths = window.kept.iter().map(|kept| length(&kept.ticks));
        self.shortest
            .store(lengths.fold(u64::MAX, u64::min), Relaxed);
    }

    /// Begin another window at `now` if the current one is old enough; return true if so.
    fn turn_window(&self, now: u64) -> bool {
        let begun = self.window().begun.load(Relaxed);
        if now.wrapping_sub(begun) < WINDOW {
            return false;
        }
        self.current.store(self.current.load(Relaxed) ^ 1, Relaxed);
        let window = self.window();
        window.begun.store(now, Relaxed);
        window.count.store(0, Relaxed);
        self.shortest.store(0, Relaxed);
        true
    }

    /// Return true if somebody has asked for a ring that is not frozen since this was called last.
    fn is_asked(&self) -> bool {
        let asked = self.asked.load(Relaxed);
        let met = self.met.load(Relaxed);
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
        self.floor.store(0, Relaxed);
    }

    /// Set the floor, after an exit has ended.
    fn set_floor(&self) {
        let limit = self.limit.load(Relaxed);
        let floor = match (limit, self.frozen.load(Relaxed)) {
            (1.., 0) => self.shortest.load(Relaxed).min(limit),
            _ => self.shortest.load(Relaxed),
        };
        self.floor.store(floor, Relaxed);
    }

    /// Go on at `now` by a clock that has begun anew; it was `then` by the one before. The vCPU was
    /// in `phase` since the transition at `last`.
    pub(super) fn rebase(&self, last: u64, then: u64, now: u64, phase: u32) {
        if phase == Phase::Guest as u32 {
            self.close(last);
        } else if phase == Phase::Kernel as u32 {
            if self.open_course(last).is_some() {
                self.noted.store(then, Relaxed);
            }
        } else {
            self.pass(last, then, phase);
        }
        self.floor.store(0, Relaxed);
        let shift = |cell: &AtomicU64| add(cell, now.wrapping_sub(then));
        for step in &self.steps {
            shift(&step.exited);
        }
        for course in &self.courses {
            shift(&course.exited);
        }
        for window in &self.windows {
            shift(&window.begun);
            for kept in &window.kept {
                shift(&kept.exited);
            }
        }
        if self.noted.load(Relaxed) != 0 {
            shift(&self.noted);
        }
    }
}
