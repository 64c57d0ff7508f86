// SPDX-License-Identifier: GPL-2.0

//! The current task.

use crate::bindings;

/// Let another task run, if one wants to. May sleep.
pub(crate) fn pause() {
    // SAFETY: By the contract of this function.
    unsafe { bindings::exitmeter_pause() };
}

/// Sleep for `ms` milliseconds, without counting as load or as a hung task.
pub(crate) fn doze(ms: u32) {
    // SAFETY: The callers may sleep.
    unsafe { bindings::exitmeter_doze(ms) };
}

/// Return true if the current task may sleep: preemption and interrupts are on.
pub(crate) fn may_sleep() -> bool {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_may_sleep() }
}

/// Return true if the current task is runnable, by the test of `kvm_sched_out()`.
pub(crate) fn is_runnable() -> bool {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_current_is_runnable() }
}

/// Return true if the current task may see details and the guest's code: CAP_PERFMON.
pub(crate) fn may_see_details() -> bool {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_may_see_details() }
}
