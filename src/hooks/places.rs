// SPDX-License-Identifier: GPL-2.0

//! Places: code of the module in which a task of KVM may sleep, so that unloading has to wait for the task.

use kernel::prelude::*;

use crate::{
    bindings,
    linux::task, //
};

/// KVM's own `kvm_emulate_cpuid()`, called by `exitmeter_emulate_cpuid`.
///
/// KVM sleeps there on SVM without NRIPS (`svm_skip_emulated_instruction()`), when it fetches the instruction
/// from guest memory that is swapped out or that userfaultfd provides.
pub(super) const IN_CPUID: bindings::exitmeter_place =
    bindings::exitmeter_place_EXITMETER_PLACE_CPUID;

/// The allocation of a ledger, by `on_create`.
pub(super) const IN_CREATION: bindings::exitmeter_place =
    bindings::exitmeter_place_EXITMETER_PLACE_CREATION;

/// A task inside a place.
///
/// Nothing else keeps that code for a task that sleeps: when a hook goes, ftrace waits for RCU-tasks, and
/// RCU-tasks counts a sleeping task as one that has left.
pub(super) struct Inside(bindings::exitmeter_place);

impl Inside {
    /// Enter a place that nobody [closes](close). The hook that leads here must be gone before
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
/// A callback that sleeps needs this: when its hook goes, ftrace frees the trampoline that called it, so the
/// callback must be over by then. Close the place, call [`wait_for_none`], then drop the hook.
pub(super) fn close(place: bindings::exitmeter_place, closed: bool) {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_close(place, closed) };
}

/// Wait until no task is in a place, however long they sleep, nor in the few instructions by which they leave
/// the module's code. `where_they_sleep` and `what_for` are for the log.
///
/// No task may enter any more: the hook that let them in is gone, or the place is closed.
pub(super) fn wait_for_none(
    place: bindings::exitmeter_place,
    where_they_sleep: &str,
    what_for: &str,
) {
    /// Time between two checks, in ms: short at first, then long.
    const STEPS: [u32; 2] = [1, 50];
    /// Time until the first line in the log, in ms.
    const FIRST_LINE: u32 = 1000;
    /// Time between two lines, in ms.
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
