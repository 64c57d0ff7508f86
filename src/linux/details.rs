// SPDX-License-Identifier: GPL-2.0

//! The static branch that leads to details.

use kernel::bindings as kernel_bindings;

use crate::bindings;

extern "C" {
    /// The branch's key, in `shim.c`.
    static exitmeter_details: Switch;
}

/// Struct that begins with the branch's key: `exitmeter_switch` in `shim.c`.
#[repr(C)]
struct Switch {
    key: kernel_bindings::static_key_false,
}

/// Return true if details are on. While they are off, this is one NOP.
#[inline(always)]
#[cfg(CONFIG_JUMP_LABEL)]
pub(crate) fn are_on() -> bool {
    'branch: {
        // This is `static_branch_unlikely!` of the kernel's crate, with `nostack`. Without that, the compiler
        // aligns the stack on the path with details.
        // SAFETY: The shim's variable is a struct that begins with a static key of C's.
        unsafe {
            kernel::asm!(
                include!(concat!(
                    env!("OBJTREE"),
                    "/rust/kernel/generated_arch_static_branch_asm.rs"
                ));
                l_yes = label { break 'branch true },
                symb = sym exitmeter_details,
                off = const core::mem::offset_of!(Switch, key),
                branch = const 0,
                options(nostack, preserves_flags),
            )
        };
        false
    }
}

/// Return true if details are on.
#[inline(always)]
#[cfg(not(CONFIG_JUMP_LABEL))]
pub(crate) fn are_on() -> bool {
    // SAFETY: The shim's variable is a struct that begins with a static key of C's.
    unsafe { kernel::jump_label::static_branch_unlikely!(exitmeter_details, Switch, key) }
}

/// Turn details on or off. Returns when all CPUs have seen the change. May sleep; callers take turns.
pub(crate) fn switch(on: bool) {
    // SAFETY: By the contract of this function.
    unsafe { bindings::exitmeter_switch_details(on) };
}
