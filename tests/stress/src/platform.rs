// SPDX-License-Identifier: GPL-2.0

//! Implements the registry's platform in user space: lock, memory, RCU, clock and copies.

use std::{
    alloc::{alloc_zeroed, dealloc, Layout},
    cell::{Cell, UnsafeCell},
    ptr::NonNull,
    sync::{
        atomic::{
            AtomicBool, AtomicI64, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
        Arc, OnceLock,
    },
    time::{Duration, Instant},
};

use crossbeam_epoch::{pin, Guard};
use exitmeter_meter::{
    ledger::{Copying, MoreHistograms, Supply},
    registry::{platform::Retired, Platform},
};

use crate::{
    cpu::{ticks, SimCpu, SimVcpu, NOWHERE},
    spread::Spread,
};

/// Pattern of freed memory: not an address, and not a number that balances.
const POISON: u8 = 0xdb;

/// Return the TSC ticks in a millisecond, measured once.
pub fn millisecond() -> u64 {
    static TICKS: OnceLock<u64> = OnceLock::new();
    *TICKS.get_or_init(|| {
        let (began, from) = (Instant::now(), ticks());
        while began.elapsed() < Duration::from_millis(50) {
            core::hint::spin_loop();
        }
        (ticks() - from) * 1_000_000 / began.elapsed().as_nanos() as u64
    })
}

/// Statistics of the lock.
#[derive(Clone, Debug, Default)]
pub struct Holds {
    /// TSC ticks for which the lock was held.
    pub held: Spread,
    /// TSC ticks for which a thread waited for the lock.
    pub waited: Spread,
    /// Maximum of the steps in one hold.
    pub most_steps: u64,
    /// Sum of the steps in all holds.
    pub all_steps: u64,
    since: u64,
    steps: u64,
}

impl Holds {
    /// Add the statistics of `other`.
    pub fn add(&mut self, other: &Holds) {
        self.held.add_all(&other.held);
        self.waited.add_all(&other.waited);
        self.most_steps = self.most_steps.max(other.most_steps);
        self.all_steps += other.all_steps;
    }
}

/// Memory that the registry has in use.
#[derive(Debug, Default)]
struct Memory {
    objects: AtomicI64,
    bytes: AtomicI64,
    retired: AtomicU64,
}

thread_local! {
    static PAUSES: Cell<u64> = const { Cell::new(0) };
}

/// Return how often this thread has yielded its CPU in [`Platform::pause`].
pub fn pauses() -> u64 {
    PAUSES.get()
}

/// A [`Platform`] in user space.
#[derive(Debug)]
pub struct Native {
    locked: AtomicBool,
    /// Protected by the lock.
    holds: UnsafeCell<Holds>,
    cpus: Vec<SimCpu>,
    memory: Arc<Memory>,
    /// Fill freed memory with [`POISON`], so that a use after free fails.
    poison: bool,
}

// SAFETY: `holds` is only accessed with the lock held.
unsafe impl Sync for Native {}

impl Native {
    /// Create a platform with `cpus` CPUs.
    pub fn new(cpus: usize, poison: bool) -> Self {
        millisecond();
        Self {
            locked: AtomicBool::new(false),
            holds: UnsafeCell::new(Holds::default()),
            cpus: (0..cpus).map(|_| SimCpu::new()).collect(),
            memory: Arc::new(Memory::default()),
            poison,
        }
    }

    /// Return the CPU with a number.
    pub fn cpu_at(&self, number: usize) -> &SimCpu {
        &self.cpus[number]
    }

    /// Return the statistics of the lock since the last call.
    pub fn take_holds(&self) -> Holds {
        self.lock();
        // SAFETY: The lock is held.
        let holds = unsafe { core::mem::take(&mut *self.holds.get()) };
        self.locked.store(false, Release);
        holds
    }

    /// Return a view of the memory that outlives the platform.
    pub fn memory_in_use(&self) -> MemoryInUse {
        MemoryInUse(Arc::clone(&self.memory))
    }
}

/// A view of the memory that the registry has not given back.
#[derive(Clone, Debug)]
pub struct MemoryInUse(Arc<Memory>);

impl MemoryInUse {
    /// Return the objects and bytes in use, and the number of objects retired so far.
    pub fn now(&self) -> (i64, i64, u64) {
        let memory = &self.0;
        (
            memory.objects.load(Acquire),
            memory.bytes.load(Acquire),
            memory.retired.load(Acquire),
        )
    }

    /// Wait until all retired objects are freed, and assert that nothing is left.
    pub fn assert_all_freed(&self) {
        let began = Instant::now();
        while self.now().0 != 0 && began.elapsed() < Duration::from_secs(20) {
            pin().flush();
            std::thread::yield_now();
        }
        let (objects, bytes, _) = self.now();
        assert_eq!((objects, bytes), (0, 0), "objects and bytes not given back");
    }
}

/// # Safety
///
/// The contract is that of [`Platform::free`].
unsafe fn free(memory: &Memory, poison: bool, at: NonNull<u8>, layout: Layout) {
    // SAFETY: By the contract of this function.
    unsafe {
        if poison {
            core::ptr::write_bytes(at.as_ptr(), POISON, layout.size());
        }
        dealloc(at.as_ptr(), layout);
    }
    memory.bytes.fetch_sub(layout.size() as i64, Release);
    memory.objects.fetch_sub(1, Release);
}

/// # Safety
///
/// `key` must be that of a vCPU that is alive.
unsafe fn vcpu_at<'a>(key: usize) -> &'a SimVcpu {
    // SAFETY: By the contract of this function. The memory of vCPUs stays until the end of a run.
    let vcpu = unsafe { &*(key as *const SimVcpu) };
    assert!(vcpu.alive.load(Acquire), "a vCPU is read after it is gone");
    vcpu
}

// SAFETY: As for `Platform`, whose memory it is.
unsafe impl Supply for &Native {
    fn more(&self) -> Option<NonNull<MoreHistograms>> {
        Some(
            self.allocate(Layout::new::<MoreHistograms>(), false)?
                .cast(),
        )
    }
}

// SAFETY:
// - The lock is a flag that one thread at a time sets, with Acquire and Release.
// - The allocator returns zeroed memory.
// - crossbeam-epoch runs deferred functions once all guards of that time are gone.
unsafe impl Platform for Native {
    type Reading = Guard;

    fn lock(&self) {
        let from = ticks();
        let mut spins = 0_u32;
        while self.locked.swap(true, Acquire) {
            while self.locked.load(Relaxed) {
                spins += 1;
                // The holder may be preempted, which a holder in the kernel is not.
                if spins % 1024 == 0 {
                    std::thread::yield_now();
                }
                core::hint::spin_loop();
            }
        }
        // SAFETY: The lock is held.
        let holds = unsafe { &mut *self.holds.get() };
        holds.since = ticks();
        holds.steps = 0;
        holds.waited.add(holds.since.saturating_sub(from));
    }

    unsafe fn unlock(&self) {
        // SAFETY: The lock is held, by the contract of this function.
        let holds = unsafe { &mut *self.holds.get() };
        holds.held.add(ticks().saturating_sub(holds.since));
        holds.most_steps = holds.most_steps.max(holds.steps);
        holds.all_steps += holds.steps;
        self.locked.store(false, Release);
    }

    fn read(&self) -> Guard {
        pin()
    }

    fn allocate(&self, layout: Layout, _may_sleep: bool) -> Option<NonNull<u8>> {
        assert_ne!(layout.size(), 0, "the registry has no empty objects");
        // SAFETY: The size is not 0.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        self.memory.objects.fetch_add(1, Relaxed);
        self.memory.bytes.fetch_add(layout.size() as i64, Relaxed);
        Some(memory)
    }

    unsafe fn free(&self, memory: NonNull<u8>, layout: Layout) {
        // SAFETY: By the contract of this function.
        unsafe { free(&self.memory, self.poison, memory, layout) };
    }

    unsafe fn retire(&self, memory: NonNull<u8>, layout: Layout, room: NonNull<Retired>) {
        let from = room.as_ptr() as usize - memory.as_ptr() as usize;
        assert!(
            from + size_of::<Retired>() <= layout.size().min(4096),
            "the room is not in it"
        );
        // The kernel also writes there while others still read the object.
        // SAFETY: By the contract of this function nobody uses the room.
        unsafe { room.as_ptr().write([usize::from_ne_bytes([POISON; 8]); 2]) };
        let (counts, poison) = (Arc::clone(&self.memory), self.poison);
        counts.retired.fetch_add(1, Relaxed);
        let at = memory.as_ptr() as usize;
        // SAFETY: The closure borrows from no thread's stack, and by the contract of this function nobody
        // can find the object any more.
        unsafe {
            pin().defer_unchecked(move || {
                if let Some(memory) = NonNull::new(at as *mut u8) {
                    free(&counts, poison, memory, layout);
                }
            });
        }
    }

    fn forget(&self, key: usize) {
        for cpu in &self.cpus {
            cpu.forget(key);
        }
    }

    fn polled(&self, key: usize) -> u64 {
        // SAFETY: By the contract of the platform the vCPU has not been let go.
        unsafe { vcpu_at(key) }.polled.load(Relaxed)
    }

    fn cpu(&self, key: usize) -> Option<u32> {
        // SAFETY: As above.
        let cpu = unsafe { vcpu_at(key) }.cpu.load(Relaxed);
        (cpu != NOWHERE).then_some(cpu)
    }

    fn copy_on(&self, cpu: u32, copying: &mut Copying<'_>) -> bool {
        self.cpus[cpu as usize].copy(copying)
    }

    fn now(&self) -> u64 {
        ticks()
    }

    fn millisecond(&self) -> u64 {
        millisecond()
    }

    fn pause(&self) {
        PAUSES.set(PAUSES.get() + 1);
        std::thread::yield_now();
    }

    #[inline(always)]
    fn step(&self) {
        // SAFETY: Called with the lock held.
        unsafe { (*self.holds.get()).steps += 1 };
    }
}
