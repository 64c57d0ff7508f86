// SPDX-License-Identifier: GPL-2.0

//! The CPUs and vCPUs of the stress: threads, and what runs on them.

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

/// The CPU of a vCPU that is on none.
pub const NOWHERE: u32 = u32::MAX;

/// How long a CPU may take to answer a signal. Longer than any machine takes; it tells a thread that
/// hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Return the clock's ticks.
#[inline(always)]
pub fn ticks() -> u64 {
    // SAFETY: x86-64 has the instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A vCPU as KVM has it. Its address is its key.
#[repr(align(64))]
#[derive(Debug)]
pub struct Vcpu {
    /// The CPU that it is loaded on, or [`NOWHERE`].
    pub cpu: AtomicU32,
    /// KVM has made it, and not yet destroyed it.
    pub lives: AtomicBool,
    /// Time that KVM polled for it, in ns.
    pub polled: AtomicU64,
}

impl Vcpu {
    /// A vCPU that KVM makes now.
    pub fn new() -> Self {
        Self {
            cpu: AtomicU32::new(NOWHERE),
            lives: AtomicBool::new(true),
            polled: AtomicU64::new(0),
        }
    }

    /// Return its key.
    pub fn key(&self) -> usize {
        core::ptr::from_ref(self) as usize
    }
}

impl Default for Vcpu {
    fn default() -> Self {
        Self::new()
    }
}

/// What a CPU is asked to copy.
#[derive(Debug)]
struct Request {
    state: AtomicU32,
    copying: AtomicPtr<Copying<'static>>,
}

const IDLE: u32 = 0;
const ASKED: u32 = 1;
const COPIED: u32 = 2;
const FAILED: u32 = 3;

/// A CPU: a thread that runs vCPUs, one at a time.
#[derive(Debug)]
pub struct Cpu {
    /// The thread, 0 before it begins and after it ends.
    thread: AtomicI32,
    request: Request,
    /// One request at a time.
    turn: Mutex<()>,
    /// The vCPU that this CPU has metered last, as the module's hooks note it.
    noted: AtomicUsize,
    member: AtomicPtr<Member>,
}

thread_local! {
    static THIS: Cell<*const Cpu> = const { Cell::new(null()) };
}

/// Copy what this thread's CPU is asked to copy, between two of its instructions.
extern "C" fn on_signal(_: libc::c_int) {
    // SAFETY: A CPU lives longer than the thread that is it, see `Cpu::run`.
    let Some(cpu) = (unsafe { THIS.get().as_ref() }) else {
        return;
    };
    let request = &cpu.request;
    // ORDERING: Who sees that it is asked sees what for.
    if request.state.load(Acquire) != ASKED {
        return;
    }
    // SAFETY: The one who asks keeps it alive until it is answered, and does not touch it.
    let copied = unsafe { (*request.copying.load(Relaxed)).try_copy() };
    // ORDERING: Who sees the answer sees the copy.
    request
        .state
        .store(if copied { COPIED } else { FAILED }, Release);
}

impl Cpu {
    /// A CPU that runs nothing.
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
            noted: AtomicUsize::new(0),
            member: AtomicPtr::new(null_mut()),
        }
    }

    /// Run `work` on this thread as this CPU, pinned to a CPU of the machine where that is given.
    pub fn run<R>(&self, pinned: Option<usize>, work: impl FnOnce() -> R) -> R {
        if let Some(to) = pinned {
            pin(to);
        }
        THIS.set(self);
        // SAFETY: Asks for a number alone.
        self.thread.store(unsafe { libc::gettid() }, Release);
        let result = work();
        // Whoever still asks is answered before the thread goes.
        let turn = self.turn.lock().expect("no panic");
        self.thread.store(0, Release);
        drop(turn);
        THIS.set(null());
        result
    }

    /// Have this CPU make a copy between two of its instructions: as by an interrupt.
    pub fn copy(&self, copying: &mut Copying<'_>) -> bool {
        let _turn = self.turn.lock().expect("no panic");
        let thread = self.thread.load(Acquire);
        if thread == 0 {
            // A CPU that runs nothing has nobody who writes the ledger.
            return copying.try_copy();
        }
        let request = &self.request;
        request
            .copying
            .store(core::ptr::from_mut(copying).cast(), Relaxed);
        // ORDERING: As in `on_signal`.
        request.state.store(ASKED, Release);
        // SAFETY: Sends a signal to a thread of this process, which lives, as it takes a turn
        // before it ends.
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
                assert!(began.elapsed() < PATIENCE, "a CPU does not answer");
                std::thread::yield_now();
            }
            core::hint::spin_loop();
        }
    }

    /// Return the member that this CPU has noted for a vCPU.
    #[inline(always)]
    pub fn noted(&self, key: usize) -> Option<&Member> {
        if self.noted.load(Relaxed) != key {
            return None;
        }
        // SAFETY: What is noted is of a vCPU that has not been let go, as `forget` is called
        // before it is; and the caller holds that vCPU.
        unsafe { self.member.load(Relaxed).as_ref() }
    }

    /// Note a vCPU that this CPU meters.
    pub fn note(&self, key: usize, member: &Member) {
        self.noted.store(0, Relaxed);
        self.member
            .store(core::ptr::from_ref(member).cast_mut(), Relaxed);
        self.noted.store(key, Relaxed);
    }

    /// Forget a vCPU that runs nowhere any more.
    pub fn forget(&self, key: usize) {
        // Only the CPU itself notes a vCPU, so no other one can come between.
        let _ = self.noted.compare_exchange(key, 0, Relaxed, Relaxed);
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Pin this thread to the CPU of the machine with that number, counted around.
pub fn pin(to: usize) {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    // SAFETY: A set of CPUs is plain bytes, and the calls only read and write it. A machine that
    // refuses leaves the thread where it is.
    unsafe {
        let mut set: libc::cpu_set_t = core::mem::zeroed();
        libc::CPU_SET(to % count, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// Have no ordinary thread of the machine run in place of this one.
pub fn be_real_time() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: Reads the parameters alone.
    let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameters) };
    assert_eq!(set, 0, "real time takes root's rights");
}

/// Numbers by chance, the same in each run.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// Numbers by chance that begin anew with each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Return a number below `bound`.
    #[inline(always)]
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}
