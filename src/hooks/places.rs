// SPDX-License-Identifier: GPL-2.0

//! Places: code of the module in which a task of KVM's may sleep, and which must not go under it.

use kernel::prelude::*;

use crate::{
    bindings,
    linux::task, //
};

/// KVM's own `kvm_emulate_cpuid()`, called by `exitmeter_emulate_cpuid`.
///
/// KVM sleeps there where it fetches the instruction from a guest's memory that is swapped out or
/// userfaultfd's: on SVM without NRIPS (`svm_skip_emulated_instruction()`).
pub(super) const IN_CPUID: bindings::exitmeter_place =
    bindings::exitmeter_place_EXITMETER_PLACE_CPUID;

/// The allocation of a ledger, by `on_create`.
pub(super) const IN_CREATION: bindings::exitmeter_place =
    bindings::exitmeter_place_EXITMETER_PLACE_CREATION;

/// A task inside a place.
///
/// Nothing else keeps that code for a task that sleeps: RCU-tasks, for which ftrace waits when a
/// hook goes, takes a sleeping task for one that has left.
pub(super) struct Inside(bindings::exitmeter_place);

impl Inside {
    /// Enter a place that nobody [closes](close). The hook that leads here goes before
    /// [`wait_for_none`] is called.
    pub(super) fn enter(place: bindings::exitmeter_place) -> Self {
        // SAFETY: No requirements.
        unsafe { bindings::exitmeter_enter(place) };
        Self(place)
    }

    /// Enter a place, unless it is [closed](close).
    pub(super) fn try_enter(place: bindings::exitmeter_place) -> Option<Self> {
        // SAFETY: No requirements.
        unsafe { bindings::exitmeter_try_enter(place) }.then_some(Self(place))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // SAFETY: This task entered when this was made.
        unsafe { bindings::exitmeter_leave(self.0) };
    }
}

/// Close a place for [`Inside::try_enter`], or open it.
///
/// For a callback that sleeps: ftrace frees the trampoline that called it as the hook goes, so the callback
/// has to be over before. Close the place, call [`wait_for_none`], then let the hook go.
pub(super) fn close(place: bindings::exitmeter_place, closed: bool) {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_close(place, closed) };
}

/// Wait until no task is in a place, however long they sleep, nor in the few instructions by which
/// they leave the module's code. `where_they_sleep` and `what_for` are for the log.
///
/// Nobody may enter any more: the hook that let them in is gone, or the place is closed.
pub(super) fn wait_for_none(
    place: bindings::exitmeter_place,
    where_they_sleep: &str,
    what_for: &str,
) {
    /// Time between two looks, in ms: short while it may be over at once.
    const STEPS: [u32; 2] = [1, 50];
    /// Time until the first line in the log, in ms.
    const FIRST_LINE: u32 = 1000;
    /// Time between two lines in the log, in ms.
    const NEXT_LINE: u32 = 30_000;

    let mut waited = 0_u32;
    let mut next_line = FIRST_LINE;
    loop {
        // SAFETY: No requirements.
        let inside = unsafe { bindings::exitmeter_inside(place) };
        if inside == 0 {
            break;
        }
        if waited >= next_line {
            let (vcpus, sleep) = if inside == 1 {
                ("vCPU", "sleeps")
            } else {
                ("vCPUs", "sleep")
            };
            pr_info!(
                "unloading waits: {inside} {vcpus} {sleep} in {where_they_sleep}(), until {what_for}\n"
            );
            next_line = waited.saturating_add(NEXT_LINE);
        }
        let step = if waited < STEPS[1] {
            STEPS[0]
        } else {
            STEPS[1]
        };
        task::doze(step);
        waited = waited.saturating_add(step);
    }
    // SAFETY: The callers may sleep.
    unsafe { bindings::exitmeter_wait_for_tails() };
}
