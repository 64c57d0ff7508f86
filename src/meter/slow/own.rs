// SPDX-License-Identifier: GPL-2.0

//! What the thread that holds a vCPU reads of its recorder, between two transitions: exit by exit,
//! without a copy of all.

use crate::meter::atomic::Ordering::Relaxed;

use super::{Slow, SlowExit, KEPT, RING, RING_LOW, SCRATCH, STEP};

impl Slow {
    /// Return true if the ring is frozen.
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Relaxed) != 0
    }

    /// Return one of the slowest exits: those of the current window come first, then [`KEPT`]
    /// places on those of the one before. On which CPUs it was is not told.
    pub fn kept_exit(&self, index: usize) -> Option<SlowExit> {
        let [first, second] = &self.windows;
        let is_first = (self.current.load(Relaxed) == 0) == (index < KEPT);
        let window = if is_first { first } else { second };
        let place = index % KEPT;
        let count = window.count.load(Relaxed) as usize;
        let kept = window.kept.get(place).filter(|_| place < count)?;
        Some(kept.copied())
    }

    /// Return an exit of a frozen ring, counted from the oldest place to the exit that froze it. On
    /// which CPUs it was is not told.
    pub fn frozen_exit(&self, index: usize) -> Option<SlowExit> {
        let newest = self.frozen.load(Relaxed).checked_sub(RING_LOW)? / STEP;
        let age = (RING - 1).checked_sub(index)?;
        // They are written downwards.
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
            // The one that froze it has a course. Any other was followed by the next exit.
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
