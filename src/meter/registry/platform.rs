// SPDX-License-Identifier: GPL-2.0

//! The boundary of the registry: what it takes from the kernel, or in the stress from user space.

use core::{alloc::Layout, ptr::NonNull};

use crate::meter::ledger::Copying;

/// Room in a retired object for the platform's own use: a `struct rcu_head`.
pub type Retired = [usize; 2];

/// What the registry needs of its surroundings.
///
/// # Safety
///
/// - [`Self::lock`] gives mutual exclusion up to [`Self::unlock`], and orders memory as a lock does.
/// - [`Self::allocate`] gives memory that nobody else uses, zeroed, of that layout.
/// - What is given to [`Self::retire`] stays as it is until every value of [`Self::Reading`] that
///   was alive then is gone.
pub unsafe trait Platform {
    /// Keeps what is retired from now on, while it lives. Making one waits for nobody.
    type Reading;

    /// Take the one lock. It is held for a constant number of steps.
    fn lock(&self);

    /// Let the lock go.
    ///
    /// # Safety
    ///
    /// The caller must hold it.
    unsafe fn unlock(&self);

    /// Begin to read what others may retire.
    fn read(&self) -> Self::Reading;

    /// Return zeroed memory; `None` when there is none. Called without the lock.
    fn allocate(&self, layout: Layout, may_sleep: bool) -> Option<NonNull<u8>>;

    /// Free memory that nobody else has seen, or sees any more.
    ///
    /// # Safety
    ///
    /// The memory must come from [`Self::allocate`] with the same layout.
    unsafe fn free(&self, memory: NonNull<u8>, layout: Layout);

    /// Free memory once all who read now have ended. Does not wait.
    ///
    /// # Safety
    ///
    /// The memory must come from [`Self::allocate`] with the same layout; `room` must lie in it,
    /// within its first page, and be used by nobody.
    unsafe fn retire(&self, memory: NonNull<u8>, layout: Layout, room: NonNull<Retired>);

    /// Have no CPU keep a vCPU in its cache: it runs nowhere any more.
    fn forget(&self, key: usize);

    /// Return the time that KVM polled for a vCPU so far, in ns. Called with the lock held, for a
    /// vCPU that has not been let go.
    fn polled(&self, key: usize) -> u64;

    /// Return the CPU that a vCPU was loaded on last; `None` while it is on none. Called with the
    /// lock held, for a vCPU that has not been let go.
    fn cpu(&self, key: usize) -> Option<u32>;

    /// Try to copy a ledger on a CPU, between two transitions of the vCPU that runs there; return
    /// false when that did not succeed. Called without the lock; may wait for that CPU to take
    /// an interrupt.
    fn copy_on(&self, cpu: u32, copying: &mut Copying<'_>) -> bool;

    /// Return the clock's ticks now.
    fn now(&self) -> u64;

    /// Return the clock's ticks in a millisecond.
    fn millisecond(&self) -> u64;

    /// Let others have the CPU, if they want it. Called without the lock, where it may sleep.
    fn pause(&self);

    /// Count a step that is taken with the lock held. For the stress alone.
    #[inline(always)]
    fn step(&self) {}
}
