// SPDX-License-Identifier: GPL-2.0

//! The kernel's random numbers.

use crate::bindings;

/// Return a random number that is not 0.
pub(crate) fn nonzero() -> u64 {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_random() }.max(1)
}
