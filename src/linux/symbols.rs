// SPDX-License-Identifier: GPL-2.0

//! Functions of the kernel and of its modules, by name and by address.

use kernel::prelude::*;

use crate::bindings;

/// Return the address of a function: `module:name`, or `name` in the kernel or any module.
pub(crate) fn find(name: &'static CStr) -> Option<usize> {
    // SAFETY: The name ends with a NUL.
    let address = unsafe { bindings::exitmeter_find_function(name.as_char_ptr()) };
    (address != 0).then_some(address as usize)
}

/// Return true if IBT and CFI allow an indirect call to `function`. `like` is a function of ours that has the
/// type of the call.
pub(crate) fn may_call(function: usize, like: usize) -> bool {
    // SAFETY: Any address may be asked for; `like` is one of ours.
    unsafe { bindings::exitmeter_may_call(function as c_ulong, like as c_ulong) }
}

/// Return true if an address lies in the code of this module.
pub(crate) fn is_own_text(address: usize) -> bool {
    // SAFETY: Any address may be asked for.
    unsafe { bindings::exitmeter_is_own_text(address as c_ulong) }
}
