// SPDX-License-Identifier: GPL-2.0

//! Copies of a vCPU's recorder, and the exits in them.

use crate::meter::{
    atomic::{AtomicU64, Ordering::Relaxed},
    detail,
    phase::Phase,
    reasons::Slot,
};

use super::{Course, Kept, Slow, KEPT, PHASES, RING, RING_LOW, RING_TOP, SCRATCH, STEP, WENT};

/// An exit with its course.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlowExit {
    /// Number of the exit, from 0 when the recorder began.
    pub sequence: u64,
    /// TSC at the exit.
    pub exited: u64,
    pub(super) key: u64,
    /// Guest RIP; 0 where it cannot be read.
    pub rip: u64,
    /// TSC ticks by phase, without the guest phase, which comes first.
    ticks: [u64; PHASES],
    /// Times that the scheduler took the vCPU off its CPU.
    pub outs: u32,
    why: u32,
    cpus: [u16; 2],
}

impl SlowExit {
    pub(super) const EMPTY: Self = Self {
        sequence: 0,
        exited: 0,
        key: 0,
        rip: 0,
        ticks: [0; PHASES],
        outs: 0,
        why: 0,
        cpus: [0; 2],
    };

    /// Return the slot of the reason.
    pub fn slot(&self) -> Option<Slot> {
        match detail::slot_of(self.key) {
            None => Slot::from_index((self.key as usize & 0xff).wrapping_sub(1)),
            slot => slot,
        }
    }

    /// Return true if the exit came from a nested guest.
    pub fn is_nested(&self) -> bool {
        match detail::slot_of(self.key) {
            None => self.key >> 8 & 1 != 0,
            Some(_) => self.key & detail::NESTED != 0,
        }
    }

    /// Return the detail, as a row of details has it, or `None` where the exit had none.
    pub fn detail(&self) -> Option<u64> {
        detail::slot_of(self.key).map(|_| detail::detail_of(self.key))
    }

    /// Return the TSC ticks in a phase up to the entry after the exit; 0 in the guest phase.
    pub fn ticks(&self, phase: Phase) -> u64 {
        let place = (phase as usize).wrapping_sub(1);
        self.ticks.get(place).copied().unwrap_or(0)
    }

    /// Return the length in ticks: all ticks but those of the guest's own sleep.
    pub fn length(&self) -> u64 {
        [Phase::Kernel, Phase::User, Phase::Waiting, Phase::Preempted]
            .into_iter()
            .fold(0, |sum: u64, phase| sum.saturating_add(self.ticks(phase)))
    }

    /// Return KVM_EXIT_* if the exit went to user space, the latest one if it did so several times.
    pub fn user_exit(&self) -> Option<u16> {
        (self.why & WENT != 0).then_some(self.why as u16)
    }

    /// Return the host CPU at the exit and at the entry, where known.
    pub fn cpus(&self) -> [Option<u16>; 2] {
        self.cpus.map(|cpu| cpu.checked_sub(1))
    }

    pub(super) fn set_kernel(&mut self, kernel: u64) {
        if let Some(cell) = self.ticks.first_mut() {
            *cell = kernel;
        }
    }

    /// Copy the exit's course, except for its CPUs.
    pub(super) fn set_course(&mut self, course: &Course) {
        self.ticks = copied(&course.ticks);
        self.outs = course.outs.load(Relaxed);
        self.why = course.why.load(Relaxed);
    }
}

/// Copy of a step.
#[derive(Clone, Copy, Debug)]
struct StepCopy {
    exited: u64,
    guest: u64,
    key: u64,
    rip: u64,
}

/// Copy of a course.
#[derive(Clone, Copy, Debug)]
struct CourseCopy {
    exited: u64,
    ticks: [u64; PHASES],
    outs: u32,
    why: u32,
    cpus: [u16; 2],
    after: u16,
}

/// Copy of a window.
#[derive(Clone, Debug)]
struct WindowCopy {
    begun: u64,
    count: usize,
    kept: [SlowExit; KEPT],
}

/// Copy of a recorder, taken at the same moment as the copy of its ledger. All-zero bytes are a
/// copy of a recorder that has recorded nothing.
#[derive(Clone, Debug)]
pub struct SlowCopy {
    has_begun: u32,
    at: u32,
    low: u32,
    frozen: u32,
    culprit: u64,
    base: u64,
    cpu: u16,
    current: usize,
    steps: [StepCopy; RING],
    courses: [CourseCopy; RING],
    windows: [WindowCopy; 2],
}

/// Unpack the two CPUs of one word.
const fn unpair(cpus: u32) -> [u16; 2] {
    [cpus as u16, (cpus >> 16) as u16]
}

/// Return a copy of ticks by phase.
fn copied(ticks: &[AtomicU64; PHASES]) -> [u64; PHASES] {
    let mut copy = [0; PHASES];
    for (to, from) in copy.iter_mut().zip(ticks) {
        *to = from.load(Relaxed);
    }
    copy
}

impl Kept {
    /// Return a copy of the exit.
    #[inline]
    pub(super) fn copied(&self) -> SlowExit {
        SlowExit {
            sequence: self.sequence.load(Relaxed),
            exited: self.course.exited.load(Relaxed),
            key: self.key.load(Relaxed),
            rip: self.rip.load(Relaxed),
            ticks: copied(&self.course.ticks),
            outs: self.course.outs.load(Relaxed),
            why: self.course.why.load(Relaxed),
            cpus: unpair(self.course.cpus.load(Relaxed)),
        }
    }
}

impl SlowCopy {
    /// Create a copy of a recorder that has recorded nothing.
    pub const fn new() -> Self {
        const STEP: StepCopy = StepCopy {
            exited: 0,
            guest: 0,
            key: 0,
            rip: 0,
        };
        const COURSE: CourseCopy = CourseCopy {
            exited: 0,
            ticks: [0; PHASES],
            outs: 0,
            why: 0,
            cpus: [0; 2],
            after: 0,
        };
        const WINDOW: WindowCopy = WindowCopy {
            begun: 0,
            count: 0,
            kept: [SlowExit::EMPTY; KEPT],
        };
        Self {
            has_begun: 0,
            at: 0,
            low: 0,
            frozen: 0,
            culprit: 0,
            base: 0,
            cpu: 0,
            current: 0,
            steps: [STEP; RING],
            courses: [COURSE; RING],
            windows: [WINDOW; 2],
        }
    }

    /// Return true if the ring is frozen.
    pub fn is_frozen(&self) -> bool {
        self.frozen != 0
    }

    /// Return the number of the exit that froze the ring.
    pub fn culprit(&self) -> Option<u64> {
        self.is_frozen().then_some(self.culprit)
    }

    fn window(&self, is_current: bool) -> Option<&WindowCopy> {
        let index = match is_current {
            true => self.current,
            false => self.current ^ 1,
        };
        self.windows.get(index)
    }

    /// Return the TSC when the current window began and the previous one ended, or `None` before
    /// the first exit.
    pub fn window_begun(&self) -> Option<u64> {
        let window = self.window(true).filter(|_| self.has_begun != 0)?;
        Some(window.begun)
    }

    /// Return the slowest exits of the current window or of the one before, unordered.
    pub fn slowest(&self, of_current: bool) -> impl Iterator<Item = SlowExit> + '_ {
        let kept = self
            .window(of_current)
            .filter(|_| self.has_begun != 0)
            .and_then(|window| window.kept.get(..window.count))
            .unwrap_or_default();
        kept.iter().copied()
    }

    /// Return the exits of the ring, from the oldest to the latest that has ended. `last` is the
    /// TSC of the latest transition, and `in_guest` is true if that was an entry.
    pub fn ring(&self, last: u64, in_guest: bool) -> impl Iterator<Item = SlowExit> + '_ {
        let newest = match self.frozen {
            0 if self.low == 0 => None,
            0 => Some(self.at),
            frozen => Some(frozen),
        };
        let newest = newest
            .filter(|_| self.has_begun != 0)
            .and_then(|at| at.checked_sub(RING_LOW))
            .map(|at| (at / STEP) as usize);
        // Number of the newest exit.
        let number = match self.frozen {
            0 => {
                let steps = RING_TOP.wrapping_sub(self.at) / STEP;
                self.base.wrapping_add(steps.into())
            }
            _ => self.culprit,
        };
        let mut cpu = None;
        (0..RING).rev().filter_map(move |age| {
            // A ring is written downwards.
            let place = newest?.wrapping_add(age) % RING;
            let step = self.steps.get(place).filter(|step| step.key != 0)?;
            let course = self.course(place, step);
            let mut exit = SlowExit {
                sequence: number.wrapping_sub(age as u64),
                exited: step.exited,
                key: step.key,
                rip: step.rip,
                ..SlowExit::EMPTY
            };
            match course {
                Some(course) => {
                    cpu = Some(course.after);
                    exit.ticks = course.ticks;
                    exit.outs = course.outs;
                    exit.why = course.why;
                    exit.cpus = course.cpus;
                }
                None => {
                    let until = match age {
                        0 => last,
                        _ => {
                            let next = self.steps.get(place.wrapping_sub(1) % RING)?;
                            next.exited.wrapping_sub(next.guest)
                        }
                    };
                    exit.set_kernel(until.wrapping_sub(step.exited));
                    let on = *cpu.get_or_insert_with(|| self.oldest_cpu());
                    exit.cpus = [on; 2];
                }
            }
            // The latest exit may still be under way.
            let has_ended = age != 0 || in_guest || self.is_frozen();
            has_ended.then_some(exit)
        })
    }

    /// Return the course of a step, if it has one.
    fn course(&self, place: usize, step: &StepCopy) -> Option<&CourseCopy> {
        let course = self.courses.get(place)?;
        (course.exited == step.exited).then_some(course)
    }

    /// Return the CPU of the ring's exits before the first one that has a course.
    fn oldest_cpu(&self) -> u16 {
        let newest = match self.frozen {
            0 => self.at,
            frozen => frozen,
        };
        let newest = (newest.wrapping_sub(RING_LOW) / STEP) as usize;
        let mut ages = (0..RING).rev();
        let first = ages.find_map(|age| {
            let place = newest.wrapping_add(age) % RING;
            let step = self.steps.get(place).filter(|step| step.key != 0)?;
            self.course(place, step)
        });
        first.map_or(self.cpu, |course| {
            let [exit, _] = course.cpus;
            exit
        })
    }
}

impl Default for SlowCopy {
    fn default() -> Self {
        Self::new()
    }
}

impl Slow {
    /// Copy the recorder, in the same window as the ledger. `undisturbed` returns true while that
    /// window still holds; otherwise the copy ends early.
    pub(in crate::meter) fn copy(&self, out: &mut SlowCopy, undisturbed: impl Fn() -> bool) {
        out.has_begun = self.has_begun.load(Relaxed);
        if out.has_begun == 0 {
            return;
        }
        out.at = self.at.load(Relaxed);
        out.low = self.low.load(Relaxed);
        out.frozen = self.frozen.load(Relaxed);
        out.culprit = self.culprit.load(Relaxed);
        out.base = self.base.load(Relaxed);
        out.cpu = self.cpu.load(Relaxed) as u16;
        out.current = self.current.load(Relaxed) as usize;
        self.copy_windows(out);
        if !undisturbed() || !self.has_ring() {
            return;
        }
        let steps = self.steps.iter().skip(SCRATCH);
        for (from, to) in steps.zip(&mut out.steps) {
            *to = StepCopy {
                exited: from.exited.load(Relaxed),
                guest: from.guest.load(Relaxed),
                key: from.key.load(Relaxed),
                rip: from.rip.load(Relaxed),
            };
        }
        if !undisturbed() {
            return;
        }
        for (from, to) in self.courses.iter().zip(&mut out.courses) {
            *to = CourseCopy {
                exited: from.exited.load(Relaxed),
                ticks: copied(&from.ticks),
                outs: from.outs.load(Relaxed),
                why: from.why.load(Relaxed),
                cpus: unpair(from.cpus.load(Relaxed)),
                after: from.after.load(Relaxed) as u16,
            };
        }
    }

    /// Copy the slowest exits.
    fn copy_windows(&self, out: &mut SlowCopy) {
        for (from, to) in self.windows.iter().zip(&mut out.windows) {
            to.begun = from.begun.load(Relaxed);
            to.count = (from.count.load(Relaxed) as usize).min(KEPT);
            let kept = from.kept.iter().take(to.count);
            for (from, to) in kept.zip(&mut to.kept) {
                *to = from.copied();
            }
        }
    }
}
