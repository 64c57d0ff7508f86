// SPDX-License-Identifier: GPL-2.0

//! This CPU's cache: the vCPU that the CPU metered last, and its ledger. One compare finds it.
//!
//! Only for callbacks, in which preemption is off.

use core::ptr::NonNull;

use crate::{
    kvm::vcpu::Vcpu,
    linux::cache,
    meter::ledger::Ledger, //
};

/// Return the ledger of a vCPU that the caller holds, if it is in this CPU's cache.
#[inline(always)]
pub(super) fn find(vcpu: Vcpu<'_>) -> Option<&Ledger> {
    // SAFETY: No vCPU's address is 0, and preemption is off in a callback.
    let ledger = unsafe { cache::find(vcpu.key()) }?;
    // SAFETY: Beside a vCPU, a CPU's cache holds the ledger of a member of the registry. The callers hold the
    // vCPU, so it is not released while they use the ledger.
    Some(unsafe { ledger.cast().as_ref() })
}

/// Put a vCPU's ledger into this CPU's cache.
///
/// # Safety
///
/// The ledger must live until a [`forget`] of the vCPU has returned.
#[inline(always)]
pub(super) unsafe fn put(vcpu: Vcpu<'_>, ledger: &Ledger) {
    // SAFETY: Preemption is off in a callback.
    unsafe { cache::put(vcpu.key(), NonNull::from(ledger).cast()) };
}

/// Return the same vCPU, which was just [`found`](find), from this CPU's cache.
///
/// The slow paths read it from there, so that the fast path needs no register for them.
#[inline(always)]
pub(super) fn read_again<'a>(_vcpu: Vcpu<'a>) -> Vcpu<'a> {
    // SAFETY: Preemption is off in a callback, so this CPU has put no other key since it found this
    // vCPU's.
    unsafe { Vcpu::from_key(cache::latest_key()) }
}

/// Remove a vCPU, which runs nowhere any more, from all CPUs' caches.
pub(super) fn forget(key: usize) {
    cache::forget(key);
}
