// SPDX-License-Identifier: GPL-2.0

//! The kernel as the platform of the registry's algorithm: its lock, memory, RCU, interrupts and clock.

use core::{
    alloc::Layout,
    ptr::NonNull, //
};

use kernel::{
    new_spinlock,
    prelude::*,
    sync::{
        lock::{
            spinlock::SpinLockBackend,
            Guard, //
        },
        rcu,
        SpinLock, //
    },
};

use crate::{
    kvm::vcpu::Vcpu,
    linux::{
        clock,
        interrupt,
        memory,
        task, //
    },
    meter::{
        ledger::{
            Copying,
            MoreHistograms,
            Supply, //
        },
        registry::{
            platform::Retired,
            Platform, //
        },
    },
    registry::cache,
};

/// The kernel's services for the registry's algorithm.
pub(super) struct Kernel {
    lock: Pin<KBox<Lock>>,
}

#[pin_data]
struct Lock {
    #[pin]
    spin: SpinLock<()>,
}

impl Kernel {
    /// Create the registry's lock.
    pub(super) fn new() -> Result<Self> {
        let lock = KBox::pin_init(
            pin_init!(Lock {
                spin <- new_spinlock!((), "exitmeter::registry"),
            }),
            GFP_KERNEL,
        )?;
        Ok(Self { lock })
    }
}

// SAFETY:
// - `lock` and `unlock` are the kernel's spinlock.
// - `allocate` returns zeroed memory of the kernel's allocator. Its caches and page allocator align a size
//   that is a multiple of 64 to at least 64 (ARCH_KMALLOC_MINALIGN, and vmalloc by pages).
// - `retire` is `kvfree_rcu()`, which waits for RCU's readers; `Reading` is one, and so is each
//   callback of a transition, as preemption is off in it.
unsafe impl Platform for Kernel {
    type Reading = rcu::Guard;

    fn lock(&self) {
        core::mem::forget(self.lock.spin.lock());
    }

    unsafe fn unlock(&self) {
        // SAFETY: By the contract of this function the lock is held, by a guard that was forgotten.
        drop(unsafe { Guard::<'_, (), SpinLockBackend>::new(&self.lock.spin, ()) });
    }

    fn read(&self) -> rcu::Guard {
        rcu::read_lock()
    }

    fn allocate(&self, layout: Layout, may_sleep: bool) -> Option<NonNull<u8>> {
        memory::allocate(layout.size(), may_sleep)
    }

    unsafe fn free(&self, memory: NonNull<u8>, _layout: Layout) {
        // SAFETY: By the contract of this function.
        unsafe { memory::free(memory) };
    }

    unsafe fn retire(&self, memory: NonNull<u8>, _layout: Layout, room: NonNull<Retired>) {
        // SAFETY: By the contract of this function.
        unsafe { memory::retire(memory, room) };
    }

    fn forget(&self, key: usize) {
        cache::forget(key);
    }

    fn polled(&self, key: usize) -> u64 {
        // SAFETY: By the contract of this function the vCPU has not been released. KVM frees it only after
        // `destroy`, which takes the lock that the caller holds.
        unsafe { Vcpu::from_key(key) }.polled()
    }

    fn cpu(&self, key: usize) -> Option<u32> {
        // SAFETY: As above.
        unsafe { Vcpu::from_key(key) }.cpu()
    }

    fn copy_on(&self, cpu: u32, copying: &mut Copying<'_>) -> bool {
        let mut copied = false;
        // The interrupt comes between two transitions of the vCPU that runs there, or in the middle of a load
        // or a put. In the latter case the copy fails.
        interrupt::run_on(cpu, || copied = copying.try_copy()) && copied
    }

    fn now(&self) -> u64 {
        clock::now()
    }

    fn millisecond(&self) -> u64 {
        match clock::tsc_khz() {
            0 => 1 << 20,
            khz => khz.into(),
        }
    }

    fn pause(&self) {
        task::pause();
    }
}

/// The kernel's allocator of histograms, for a vCPU that exits for more reasons than its ledger has room for.
pub(super) struct Allocator;

// SAFETY: The memory is zeroed and nobody else's. The registry frees it with the vCPU.
unsafe impl Supply for Allocator {
    fn more(&self) -> Option<NonNull<MoreHistograms>> {
        Some(memory::allocate(size_of::<MoreHistograms>(), false)?.cast())
    }
}
