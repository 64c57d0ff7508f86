// SPDX-License-Identifier: GPL-2.0

//! Reads of a recorder by the thread that holds the vCPU, between two transitions: exit by exit,
//! without copying all.

use crate::meter::atomic::Ordering::Relaxed;

use super::{Slow, SlowExit, KEPT, RING, RING_LOW, SCRATCH, STEP};

impl Slow {
    /// Return true if the ring is frozen.
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Relaxed) != 0
    }

    /// Return one of the slowest exits, without its CPUs. Indices below [`KEPT`] are the current
    /// window, the next [`KEPT`] the window before.
    pub fn kept_exit(&self, index: usize) -> Option<SlowExit> {
        let [first, second] = &self.windows;
        let is_first = (self.current.load(Relaxed) == 0) == (index < KEPT);
        let window = if is_first { first } else { second };
        let place = index % KEPT;
        let count = window.count.load(Relaxed) as usize;
        let kept = window.kept.get(place).filter(|_| place < count)?;
        Some(kept.copied())
    }

    /// Return an exit of a frozen ring, without its CPUs. Index 0 is the oldest place; the last is
    /// the exit that froze the ring.
    pub fn frozen_exit(&self, index: usize) -> Option<SlowExit> {
        let newest = self.frozen.load(Relaxed).checked_sub(RING_LOW)? / STEP;
        let age = (RING - 1).checked_sub(index)?;
        // A ring is written downwards.
        let place_of = |age: usize| (newest as usize).wrapping_add(age) % RING;
        let step_of = |age| self.steps.get(place_of(age).wrapping_add(SCRATCH));
        let step = step_of(age).filter(|step| step.key.load(Relaxed) != 0)?;
        let exited = step.exited.load(Relaxed);
        let mut exit = SlowExit::EMPTY;
        exit.sequence = self.culprit.load(Relaxed).wrapping_sub(age as u64);
        exit.exited = exited;
        exit.key = step.key.load(Relaxed);
        exit.rip = step.rip.load(Relaxed);
        let course = self.courses.get(place_of(age));
        match course.filter(|course| course.exited.load(Relaxed) == exited) {
            Some(course) => exit.set_course(course),
            // The exit that froze the ring has a course. Any other exit was followed by the next
            // one.
            None => {
                let next = step_of(age.checked_sub(1)?)?;
                let until = next.exited.load(Relaxed);
                let until = until.wrapping_sub(next.guest.load(Relaxed));
                exit.set_kernel(until.wrapping_sub(exited));
            }
        }
        Some(exit)
    }
}
