// SPDX-License-Identifier: GPL-2.0

//! The host's clocks: the TSC and the kernel's tick.

use core::arch::x86_64::_rdtsc;

use crate::bindings;

/// Return the TSC.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: Every x86-64 CPU has RDTSC, and the kernel may use it.
    unsafe { _rdtsc() }
}

/// Return the TSC's frequency in kHz, or 0 if the kernel does not know it.
pub(crate) fn tsc_khz() -> u32 {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_tsc_khz() }
}

/// Return true if the kernel trusts the TSC.
pub(crate) fn tsc_is_stable() -> bool {
    // SAFETY: No requirements.
    !unsafe { bindings::exitmeter_tsc_unstable() }
}

/// Return the monotonic time in ns, as exact as the kernel's tick.
pub(crate) fn coarse_ns() -> u64 {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_coarse_ns() }
}
