// SPDX-License-Identifier: GPL-2.0

//! Memory for ledgers and tables.

use core::ptr::NonNull;

use crate::{
    bindings,
    meter::registry::platform::Retired, //
};

/// Allocate zeroed memory, charged to the memory cgroup of the current task. Set `may_sleep` only in a
/// context that can sleep.
pub(crate) fn allocate(size: usize, may_sleep: bool) -> Option<NonNull<u8>> {
    // SAFETY: By the contract of this function the context can sleep if `may_sleep` is set.
    NonNull::new(unsafe { bindings::exitmeter_allocate(size, may_sleep) }.cast())
}

/// Free memory.
///
/// # Safety
///
/// The memory must come from [`allocate`], and nobody may use it any more.
pub(crate) unsafe fn free(memory: NonNull<u8>) {
    // SAFETY: By the contract of this function.
    unsafe { bindings::exitmeter_free(memory.as_ptr().cast()) };
}

/// Free memory after a grace period of RCU.
///
/// # Safety
///
/// The memory must come from [`allocate`], and nobody but RCU's readers may use it any more. `room` must lie
/// within its first page, and be used by nobody.
pub(crate) unsafe fn retire(memory: NonNull<u8>, room: NonNull<Retired>) {
    // SAFETY: By the contract of this function.
    unsafe { bindings::exitmeter_retire(memory.as_ptr().cast(), room.as_ptr().cast()) };
}
