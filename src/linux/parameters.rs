// SPDX-License-Identifier: GPL-2.0

//! The module's parameters, as Linux parsed them.

use crate::bindings;

/// Return the module's parameters, unchecked.
pub(crate) fn given() -> &'static bindings::exitmeter_parameters {
    let given = &raw const bindings::exitmeter_given;
    // SAFETY: The kernel writes them before any of the module's code runs. Nobody writes them later: their
    // files in sysfs are read-only.
    unsafe { &*given }
}
