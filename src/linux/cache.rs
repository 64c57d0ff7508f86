// SPDX-License-Identifier: GPL-2.0

//! One key and its value for each CPU: `exitmeter_cache` in `shim.c`.
//!
//! The kernel's crate has no per-CPU variables. The functions here are what C's `this_cpu_read()` and
//! `this_cpu_write()` compile to.

use core::{
    arch::asm,
    ptr::NonNull, //
};

use kernel::prelude::*;

use crate::bindings;

/// Return the value of `key`, if this CPU's cache holds it.
///
/// The compare reads the cache in the same instruction.
///
/// # Safety
///
/// `key` must not be 0, and preemption must be off.
#[inline(always)]
pub(crate) unsafe fn find(key: usize) -> Option<NonNull<()>> {
    'miss: {
        let value: usize;
        // SAFETY: Each CPU has the shim's variable at this offset of GS. This reads its first word and
        // touches nothing else.
        unsafe {
            asm!(
                "cmp gs:[rip + {cache}], {key}",
                "jne {miss}",
                key = in(reg) key,
                cache = sym bindings::exitmeter_cache,
                miss = label { break 'miss },
                options(nostack, readonly),
            )
        };
        // SAFETY: As above, its second word.
        unsafe {
            asm!(
                "mov {value}, gs:[rip + {cache} + 8]",
                value = out(reg) value,
                cache = sym bindings::exitmeter_cache,
                options(nostack, readonly, preserves_flags),
            )
        };
        // SAFETY: `put` writes a value, which is never null, before its key.
        unsafe { core::hint::assert_unchecked(value != 0) };
        return NonNull::new(value as *mut ());
    }
    None
}

/// Put a key and its value into this CPU's cache.
///
/// # Safety
///
/// Preemption must be off.
#[inline(always)]
pub(crate) unsafe fn put(key: usize, value: NonNull<()>) {
    // SAFETY: As in `find`. The value is written first: a key is never seen with the value of another,
    // not by this CPU either, as no callback interrupts another one.
    unsafe {
        asm!(
            "mov gs:[rip + {cache} + 8], {value}",
            "mov gs:[rip + {cache} + 16], {key}",
            "mov gs:[rip + {cache}], {key}",
            key = in(reg) key,
            value = in(reg) value.as_ptr(),
            cache = sym bindings::exitmeter_cache,
            options(nostack, preserves_flags),
        )
    };
}

/// Return the key that this CPU put last.
///
/// This reads a word that no other CPU writes. [`forget`] may clear the word that [`find`] compares at any
/// moment, also on behalf of another key.
///
/// # Safety
///
/// Preemption must be off.
#[inline(always)]
pub(crate) unsafe fn latest_key() -> usize {
    let key: usize;
    // SAFETY: As in `find`, its third word.
    unsafe {
        asm!(
            "mov {key}, gs:[rip + {cache} + 16]",
            key = out(reg) key,
            cache = sym bindings::exitmeter_cache,
            options(nostack, readonly, preserves_flags),
        )
    };
    key
}

/// Remove a key from all CPUs' caches. No CPU may put that key meanwhile.
pub(crate) fn forget(key: usize) {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_forget(key as c_ulong) };
}
