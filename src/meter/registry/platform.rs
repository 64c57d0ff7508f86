// SPDX-License-Identifier: GPL-2.0

//! Boundary of the registry: the services of the kernel, or of user space in the stress test.

use core::{alloc::Layout, ptr::NonNull};

use crate::meter::ledger::Copying;

/// Room in a retired object for the platform's own use: a `struct rcu_head`.
pub type Retired = [usize; 2];

/// Services that the registry needs.
///
/// # Safety
///
/// - [`Self::lock`] gives mutual exclusion up to [`Self::unlock`], and orders memory as a lock
///   does.
/// - [`Self::allocate`] returns zeroed memory of that layout that nobody else uses.
/// - Memory passed to [`Self::retire`] stays as it is until every value of [`Self::Reading`] that
///   was alive then is gone.
pub unsafe trait Platform {
    /// Guard that keeps all that is retired while it lives. Creating one waits for nobody.
    type Reading;

    /// Take the registry's one lock. It is held for a constant number of steps, except in a rebase.
    fn lock(&self);

    /// Release the lock.
    ///
    /// # Safety
    ///
    /// The caller must hold it.
    unsafe fn unlock(&self);

    /// Begin to read objects that others may retire.
    fn read(&self) -> Self::Reading;

    /// Return zeroed memory, or `None` when there is none. Called without the lock.
    fn allocate(&self, layout: Layout, may_sleep: bool) -> Option<NonNull<u8>>;

    /// Free memory that no other thread has seen, or sees any more.
    ///
    /// # Safety
    ///
    /// The memory must come from [`Self::allocate`] with the same layout.
    unsafe fn free(&self, memory: NonNull<u8>, layout: Layout);

    /// Free memory once all current readers have ended. Does not wait.
    ///
    /// # Safety
    ///
    /// The memory must come from [`Self::allocate`] with the same layout. `room` must lie in it,
    /// within its first page, and be unused.
    unsafe fn retire(&self, memory: NonNull<u8>, layout: Layout, room: NonNull<Retired>);

    /// Remove a vCPU from the caches of all CPUs. It runs nowhere any more.
    fn forget(&self, key: usize);

    /// Return the time that KVM has polled for a vCPU, in ns. Called with the lock held, for a vCPU
    /// that has not been released.
    fn polled(&self, key: usize) -> u64;

    /// Return the CPU that a vCPU was loaded on last, or `None` while it is on none. Called with
    /// the lock held, for a vCPU that has not been released.
    fn cpu(&self, key: usize) -> Option<u32>;

    /// Try to copy a ledger on a CPU, between two transitions of the vCPU that runs there. Return
    /// false if that failed. Called without the lock; may wait for that CPU to take an interrupt.
    fn copy_on(&self, cpu: u32, copying: &mut Copying<'_>) -> bool;

    /// Return the current time, in ticks of the clock.
    fn now(&self) -> u64;

    /// Return the number of the clock's ticks in a millisecond.
    fn millisecond(&self) -> u64;

    /// Yield the CPU to other threads. Called without the lock, where it may sleep.
    fn pause(&self);

    /// Count a step taken with the lock held. Only the stress test uses this.
    #[inline(always)]
    fn step(&self) {}
}
