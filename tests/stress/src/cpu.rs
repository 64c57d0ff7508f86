// SPDX-License-Identifier: GPL-2.0

//! Simulates CPUs by threads, and the vCPUs that run on them.

use std::{
    cell::Cell,
    ptr::{null, null_mut},
    sync::{
        atomic::{
            AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
        Mutex, Once,
    },
    time::{Duration, Instant},
};

use exitmeter_meter::{ledger::Copying, registry::Member};
use rustix::thread::{sched_setaffinity, CpuSet};

/// CPU number of a vCPU that is loaded on no CPU.
pub const NOWHERE: u32 = u32::MAX;

/// Time limit for a CPU to answer a signal. No machine takes that long, so the thread hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Return the TSC.
#[inline(always)]
pub fn ticks() -> u64 {
    // SAFETY: x86-64 has the instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A vCPU, in place of KVM's `struct kvm_vcpu`. Its address is its key.
#[repr(align(64))]
#[derive(Debug)]
pub struct SimVcpu {
    /// CPU that it is loaded on, or [`NOWHERE`].
    pub cpu: AtomicU32,
    /// True from its creation until it is destroyed.
    pub alive: AtomicBool,
    /// Time that KVM polled for it, in ns.
    pub polled: AtomicU64,
}

impl SimVcpu {
    /// Create a vCPU.
    pub fn new() -> Self {
        Self {
            cpu: AtomicU32::new(NOWHERE),
            alive: AtomicBool::new(true),
            polled: AtomicU64::new(0),
        }
    }

    /// Return the key of the vCPU: its address.
    pub fn key(&self) -> usize {
        core::ptr::from_ref(self) as usize
    }
}

impl Default for SimVcpu {
    fn default() -> Self {
        Self::new()
    }
}

/// A request to a CPU to copy a ledger.
#[derive(Debug)]
struct Request {
    state: AtomicU32,
    copying: AtomicPtr<Copying<'static>>,
}

const IDLE: u32 = 0;
const ASKED: u32 = 1;
const COPIED: u32 = 2;
const FAILED: u32 = 3;

/// A CPU, simulated by a thread that runs one vCPU at a time.
#[derive(Debug)]
pub struct SimCpu {
    /// Thread ID; 0 before the thread begins and after it ends.
    thread: AtomicI32,
    request: Request,
    /// Serializes requests.
    turn: Mutex<()>,
    /// Key of the vCPU that this CPU metered last: the cache of the module's hooks.
    cached: AtomicUsize,
    member: AtomicPtr<Member>,
}

thread_local! {
    static THIS: Cell<*const SimCpu> = const { Cell::new(null()) };
}

/// Serve the copy request of this thread's CPU, between two of its instructions.
extern "C" fn on_signal(_: libc::c_int) {
    // SAFETY: A CPU outlives the thread that simulates it, see `SimCpu::run`.
    let Some(cpu) = (unsafe { THIS.get().as_ref() }) else {
        return;
    };
    let request = &cpu.request;
    // ORDERING: Pairs with the Release store of ASKED in `copy`: `copying` is visible.
    if request.state.load(Acquire) != ASKED {
        return;
    }
    // SAFETY: The requester keeps it alive until the answer, and does not touch it before.
    let copied = unsafe { (*request.copying.load(Relaxed)).try_copy() };
    // ORDERING: A thread that sees the answer sees the copy.
    request
        .state
        .store(if copied { COPIED } else { FAILED }, Release);
}

impl SimCpu {
    /// Create a CPU that runs nothing.
    pub fn new() -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: All-zero bytes are a valid action; the handler is async-signal-safe, as it
            // only loads and stores.
            unsafe {
                let mut action: libc::sigaction = core::mem::zeroed();
                action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
                action.sa_flags = libc::SA_RESTART;
                let set = libc::sigaction(libc::SIGUSR1, &action, null_mut());
                assert_eq!(set, 0, "the handler is set");
            }
        });
        Self {
            thread: AtomicI32::new(0),
            request: Request {
                state: AtomicU32::new(IDLE),
                copying: AtomicPtr::new(null_mut()),
            },
            turn: Mutex::new(()),
            cached: AtomicUsize::new(0),
            member: AtomicPtr::new(null_mut()),
        }
    }

    /// Run `work` on this thread as this CPU. With `pinned`, pin the thread to that CPU of the machine.
    pub fn run<R>(&self, pinned: Option<usize>, work: impl FnOnce() -> R) -> R {
        if let Some(to) = pinned {
            pin(to);
        }
        THIS.set(self);
        // SAFETY: gettid() only returns a number.
        self.thread.store(unsafe { libc::gettid() }, Release);
        let result = work();
        // A request in progress is answered before the thread ends.
        let turn = self.turn.lock().expect("no panic");
        self.thread.store(0, Release);
        drop(turn);
        THIS.set(null());
        result
    }

    /// Have this CPU make a copy between two of its instructions, as in an interrupt.
    pub fn copy(&self, copying: &mut Copying<'_>) -> bool {
        let _turn = self.turn.lock().expect("no panic");
        let thread = self.thread.load(Acquire);
        if thread == 0 {
            // A CPU that runs nothing does not write the ledger.
            return copying.try_copy();
        }
        let request = &self.request;
        request
            .copying
            .store(core::ptr::from_mut(copying).cast(), Relaxed);
        // ORDERING: As in `on_signal`.
        request.state.store(ASKED, Release);
        // SAFETY: This signals a thread of this process. The thread is alive, as it takes `turn` before
        // it ends.
        let sent =
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
        assert_eq!(sent, 0, "the signal is sent");
        let began = Instant::now();
        let mut spins = 0_u32;
        loop {
            match request.state.load(Acquire) {
                ASKED => {}
                answer => {
                    request.state.store(IDLE, Relaxed);
                    return answer == COPIED;
                }
            }
            spins += 1;
            if spins % 4096 == 0 {
                assert!(began.elapsed() < ANSWER_TIMEOUT, "a CPU does not answer");
                std::thread::yield_now();
            }
            core::hint::spin_loop();
        }
    }

    /// Return the member of a vCPU from this CPU's cache.
    #[inline(always)]
    pub fn cached(&self, key: usize) -> Option<&Member> {
        if self.cached.load(Relaxed) != key {
            return None;
        }
        // SAFETY: A cached vCPU has not been let go, as `forget` is called before that; and the caller
        // holds that vCPU.
        unsafe { self.member.load(Relaxed).as_ref() }
    }

    /// Put a vCPU that this CPU meters into its cache.
    pub fn cache(&self, key: usize, member: &Member) {
        self.cached.store(0, Relaxed);
        self.member
            .store(core::ptr::from_ref(member).cast_mut(), Relaxed);
        self.cached.store(key, Relaxed);
    }

    /// Remove a vCPU from the cache. It must not run any more.
    pub fn forget(&self, key: usize) {
        // Only the CPU itself caches a vCPU, and this one runs nowhere, so nothing races with this.
        let _ = self.cached.compare_exchange(key, 0, Relaxed, Relaxed);
    }
}

impl Default for SimCpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Pin this thread to a CPU of the machine: `to` modulo the number of CPUs.
pub fn pin(to: usize) {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(to % count);
    // A machine that refuses leaves the thread where it is.
    let _ = sched_setaffinity(None, &set);
}

/// Give this thread a real-time priority, above all ordinary threads of the machine.
pub fn be_real_time() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: The call only reads the parameters.
    let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters) };
    assert_eq!(set, 0, "real time takes root's rights");
}

/// A pseudorandom number generator (xorshift). Each run gets the same numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Create a generator from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Return the next number, below `bound`.
    #[inline(always)]
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}
