// SPDX-License-Identifier: GPL-2.0

//! The kernel's half of the registry: the lock, memory, RCU and interrupts that the algorithm in
//! [`crate::meter::registry`] takes, and the way from a callback to a vCPU's ledger.
//!
//! Each CPU keeps the vCPU that it metered last in a cache, so that an exit finds its ledger by
//! one compare. Another vCPU's is looked up in the registry's table, without a lock. Nothing is
//! allocated, and the lock is not taken, when a vCPU leaves its CPU, as the scheduler's own lock is
//! held then.

use core::{
    alloc::Layout,
    ptr::NonNull,
    sync::atomic::{
        AtomicU64,
        Ordering::Relaxed, //
    },
};

use kernel::{
    new_mutex, new_spinlock, pr_warn_once,
    prelude::*,
    sync::{
        lock::{
            spinlock::SpinLockBackend,
            Guard, //
        },
        rcu,
        Arc,
        Mutex,
        SpinLock, //
    },
};

use crate::{
    hooks::{
        self,
        Vcpu, //
    },
    meter::{
        detail,
        leaves::{
            Leaves,
            Query,
            Registers, //
        },
        ledger::{
            Copying,
            Ledger,
            Totals, //
        },
        phase::Phase,
        reasons::{
            self,
            Isa,
            Slot, //
        },
        registry::{
            self as algorithm,
            platform::Retired,
            walk::{
                NoSnapshot,
                Show,
                Walker, //
            },
            Platform,
            Refused,
            Settings, //
        },
        slow::Leaving,
        snapshot::{
            Host,
            Identity, //
        },
        tables::{
            About,
            Tables, //
        },
    },
};

// SAFETY: All-zero bytes are valid totals of nothing, as `Totals` promises.
unsafe impl Zeroable for Totals {}
// SAFETY: All-zero bytes are an empty copy, as `LedgerCopy` promises, and a walker is one.
unsafe impl Zeroable for Walker {}

/// What the kernel gives to the registry's algorithm.
struct Kernel {
    lock: Pin<KBox<Lock>>,
}

#[pin_data]
struct Lock {
    #[pin]
    spin: SpinLock<()>,
}

// SAFETY:
// - `lock` and `unlock` are the kernel's spinlock.
// - `allocate` gives what the kernel's allocator gives, zeroed. Its caches and page allocator align
//   a size that is a multiple of 64 to 64 at least (ARCH_KMALLOC_MINALIGN, and vmalloc by pages).
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
        hooks::allocate(layout.size(), may_sleep)
    }

    unsafe fn free(&self, memory: NonNull<u8>, _layout: Layout) {
        // SAFETY: By the contract of this function.
        unsafe { hooks::free(memory) };
    }

    unsafe fn retire(&self, memory: NonNull<u8>, _layout: Layout, room: NonNull<Retired>) {
        // SAFETY: By the contract of this function.
        unsafe { hooks::retire(memory, room) };
    }

    fn forget(&self, key: usize) {
        hooks::forget(key);
    }

    fn polled(&self, key: usize) -> u64 {
        // SAFETY: By the contract of this function the vCPU has not been let go. KVM destroys it after
        // that, for which it takes the lock that the caller holds.
        unsafe { Vcpu::from_key(key) }.polled()
    }

    fn cpu(&self, key: usize) -> Option<u32> {
        // SAFETY: As above.
        unsafe { Vcpu::from_key(key) }.cpu()
    }

    fn copy_on(&self, cpu: u32, copying: &mut Copying<'_>) -> bool {
        hooks::copy_on(cpu, copying)
    }

    fn now(&self) -> u64 {
        hooks::timestamp()
    }

    fn millisecond(&self) -> u64 {
        match hooks::clock() {
            (0, _) => 1 << 20,
            (khz, _) => khz.into(),
        }
    }

    fn pause(&self) {
        hooks::pause();
    }
}

/// The ledgers of all vCPUs.
#[pin_data]
pub(crate) struct Registry {
    vcpus: algorithm::Registry<Kernel>,
    /// Held by the one who takes a snapshot, or turns details on or off.
    #[pin]
    walker: Mutex<Walks>,
    /// Added to the TSC, it gives a clock that goes on when the TSC begins anew.
    clock_offset: AtomicU64,
}

/// What walks over all vCPUs take.
struct Walks {
    walker: KVBox<Walker>,
    /// How many want details.
    want_details: usize,
}

impl Registry {
    /// Create a registry without a vCPU.
    pub(crate) fn new(settings: Settings) -> Result<Arc<Self>> {
        let lock = KBox::pin_init(
            pin_init!(Lock {
                spin <- new_spinlock!((), "exitmeter::registry"),
            }),
            GFP_KERNEL,
        )?;
        let vcpus = algorithm::Registry::new(Kernel { lock }, settings).map_err(|_| ENOMEM)?;
        let walker = KVBox::<Walker>::zeroed(GFP_KERNEL)?;
        Arc::pin_init(
            pin_init!(Self {
                vcpus,
                walker <- new_mutex!(
                    Walks {
                        walker,
                        want_details: 0,
                    },
                    "exitmeter::walker"
                ),
                clock_offset: AtomicU64::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// The leaves that are answered.
    #[inline(always)]
    pub(crate) fn leaves(&self) -> &Leaves {
        self.vcpus.leaves()
    }

    /// Take in a vCPU that KVM is making, where memory can be waited for.
    pub(crate) fn announce(&self, vcpu: Vcpu<'_>) {
        if let Err(refused) = self.vcpus.announce(vcpu.key(), vcpu.newcomer()) {
            self.say_why_not(refused);
        }
    }

    /// Let a vCPU go that KVM destroys, and will not load again.
    pub(crate) fn destroy(&self, vcpu: Vcpu<'_>) {
        self.vcpus.destroy(vcpu.key(), vcpu.polled());
    }

    /// Return the ledger of a vCPU that the caller holds, by the table; taken in at this event
    /// if it is new, in `phase` from `now` on.
    fn ledger(&self, vcpu: Vcpu<'_>, now: u64, phase: Phase) -> Option<&Ledger> {
        let found = self
            .vcpus
            .at_event(vcpu.key(), now, phase, || vcpu.newcomer());
        let ledger = found
            .unwrap_or_else(|refused| {
                self.say_why_not(refused);
                None
            })?
            .ledger();
        // INVARIANT: `destroy` has all CPUs forget the vCPU before it lets the member go.
        hooks::cache(vcpu, ledger);
        Some(ledger)
    }

    /// Tell the log why a vCPU runs unmetered, of each reason once.
    fn say_why_not(&self, refused: Refused) {
        match refused {
            Refused::NoRoom => {
                pr_warn_once!(
                    "a vCPU runs unmetered: max_vcpus={} are metered already\n",
                    self.vcpus.max_vcpus()
                );
            }
            Refused::Unreadable => {
                pr_warn_once!("a vCPU runs unmetered: it is a trust domain's\n");
            }
            Refused::NoMemory => {
                pr_warn_once!("a vCPU runs unmetered: there is no memory for its ledger\n");
            }
        }
    }

    /// Answer a query of a guest, whose kernel asks if `at_cpl_0`; return who asked as well. `None`
    /// for an unmetered vCPU.
    pub(crate) fn answer(
        &self,
        vcpu: Vcpu<'_>,
        query: Query,
        subleaf: u32,
        at_cpl_0: bool,
    ) -> Option<(&Identity, Registers)> {
        match query {
            Query::Tables => self.vcpus.answer_by_tables(vcpu.key(), subleaf, at_cpl_0),
            _ => self.vcpus.answer(vcpu.key(), query, subleaf),
        }
    }

    /// Write a snapshot into `buffer`; return its size in bytes. `gone` is room for the totals,
    /// empty.
    ///
    /// # Errors
    ///
    /// When the buffer is too small, or a vCPU could not be copied.
    pub(crate) fn snapshot(
        &self,
        buffer: &mut [u8],
        gone: &mut Totals,
        show: Show,
    ) -> Result<usize, NoSnapshot> {
        let (tsc_khz, tsc_stable) = hooks::clock();
        let leaves = self.leaves();
        let mut walks = self.walker.lock();
        // Nobody takes a snapshot while the host sleeps, so this stays as it is.
        let clock_offset = self.clock_offset.load(Relaxed);
        let host = Host {
            isa: leaves.isa,
            leaf_map: leaves.map,
            host_scope: self.vcpus.host_scope(),
            tsc_khz,
            tsc_stable,
            loaded: self.vcpus.loaded(),
            now: hooks::timestamp().wrapping_add(clock_offset),
            clock_offset,
            life: leaves.life,
        };
        self.vcpus
            .snapshot(&mut walks.walker, buffer, gone, host, show)
    }

    /// Have exits told with details, until [`Self::release_details`] is called as often as this.
    pub(crate) fn hold_details(&self) {
        let mut walks = self.walker.lock();
        walks.want_details = walks.want_details.saturating_add(1);
        // First the branch, then the tables: whoever finds tables tells all of an exit with them.
        if walks.want_details == 1 {
            hooks::switch_details(true);
        }
        // The next ones are here for vCPUs for which there was no memory before.
        self.vcpus.give_tables(&mut walks.walker);
    }

    /// Ask for rings of the last exits that are not frozen.
    pub(crate) fn thaw_rings(&self) {
        self.vcpus.thaw_rings(&mut self.walker.lock().walker);
    }

    /// Want no details any more.
    pub(crate) fn release_details(&self) {
        let mut walks = self.walker.lock();
        walks.want_details = walks.want_details.saturating_sub(1);
        // First the branch: the tables are seen by nobody meanwhile, as no snapshot can be taken.
        if walks.want_details == 0 {
            hooks::switch_details(false);
            self.vcpus.take_tables(&mut walks.walker);
        }
    }

    /// Estimate the size of the next snapshot, in bytes.
    pub(crate) fn likely_size(&self) -> usize {
        self.vcpus.likely_size()
    }

    /// Return the numbers of all vCPUs, those that are gone and those that live.
    pub(crate) fn totals(&self) -> Result<KVBox<Totals>> {
        let mut totals = KVBox::<Totals>::zeroed(GFP_KERNEL)?;
        let mut walks = self.walker.lock();
        self.vcpus.add_totals(&mut walks.walker, &mut totals);
        drop(walks);
        Ok(totals)
    }

    /// Go on at `now` by a TSC that has begun anew while the host slept; without that it would be
    /// `then`. No other CPU runs.
    pub(crate) fn rebase(&self, then: u64, now: u64) {
        self.vcpus.rebase(then, now);
        self.clock_offset.fetch_add(then.wrapping_sub(now), Relaxed);
    }
}

// The transitions. The fast path, that of a vCPU in this CPU's cache, does not even look for the
// registry.

/// Return the ledger of a vCPU that the caller holds, from this CPU's cache.
#[inline(always)]
fn cached(vcpu: Vcpu<'_>) -> Option<&Ledger> {
    let ledger = vcpu.cached()?;
    // SAFETY: With a vCPU, a CPU's cache holds the ledger of a member of the registry. The callers
    // hold the vCPU, so that it is not let go while they use it.
    Some(unsafe { &*ledger })
}

/// Return the ledger of any other vCPU that the caller holds; taken in at this event if it is new.
fn looked_up<'a>(vcpu: Vcpu<'a>, now: u64, phase: Phase) -> Option<&'a Ledger> {
    hooks::registry()?.ledger(vcpu, now, phase)
}

/// As [`looked_up`], at an exit or entry. A trust domain's vCPU is in no cache, and comes here at each
/// of its own: it was marked as unmetered when it was made, or is when it is loaded next. Here it
/// costs a look at its VM's type and no more.
fn looked_up_unless_of_trust_domain<'a>(
    vcpu: Vcpu<'a>,
    now: u64,
    phase: Phase,
) -> Option<&'a Ledger> {
    if vcpu.is_of_trust_domain() {
        return None;
    }
    looked_up(vcpu, now, phase)
}

/// Take a VM exit at TSC `now`. `code` reads its exit code, once the vCPU is known to be metered.
#[inline(always)]
pub(crate) fn exit(vcpu: Vcpu<'_>, now: u64, isa: Isa, code: impl FnOnce() -> u32) {
    let slot = move || reasons::slot(isa, code());
    match cached(vcpu) {
        Some(ledger) => exit_of(vcpu, ledger, now, slot()),
        None => exit_slow(vcpu, now, slot),
    }
}

#[inline(always)]
fn exit_of(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, slot: Slot) {
    if vcpu.runs_nested() {
        ledger.exit_from_nested(now, slot);
    } else {
        ledger.exit(now, slot);
    }
}

/// Slow path of [`exit`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn exit_slow(vcpu: Vcpu<'_>, now: u64, slot: impl FnOnce() -> Slot) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Guest) {
        exit_of(vcpu, ledger, now, slot());
    }
}

/// Take a VM entry.
#[inline(always)]
pub(crate) fn entry(vcpu: Vcpu<'_>, now: u64) {
    match cached(vcpu) {
        Some(ledger) => ledger.entry(now),
        None => entry_slow(vcpu, now),
    }
}

/// Slow path of [`entry`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn entry_slow(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Kernel) {
        ledger.entry(now);
    }
}

/// Take the vCPU's way onto a CPU.
#[inline(always)]
pub(crate) fn resume(vcpu: Vcpu<'_>, now: u64) {
    match cached(vcpu) {
        Some(ledger) => ledger.resume(now),
        None => resume_slow(vcpu, now),
    }
}

/// Slow path of [`resume`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn resume_slow(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up(vcpu, now, Phase::Kernel) {
        ledger.resume(now);
    }
}

/// Take the vCPU's way off its CPU. The scheduler's lock may be held, so a vCPU that is not known
/// yet is left for its next event: nothing may be allocated here.
#[inline(always)]
pub(crate) fn leave(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    match cached(vcpu) {
        Some(ledger) => ledger.leave(now, phase),
        None => leave_slow(vcpu, now, phase),
    }
}

/// Slow path of [`leave`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn leave_slow(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    let Some(registry) = hooks::registry() else {
        return;
    };
    if let Some(member) = registry.vcpus.known(vcpu.key()) {
        member.ledger().leave(now, phase);
    }
}

// The same with details, for vCPUs that have tables.

/// Return the tables of a vCPU that the caller holds, in a callback.
#[inline(always)]
fn tables(ledger: &Ledger) -> Option<&Tables> {
    // SAFETY: All callbacks of transitions run with preemption off, so what they find is freed after
    // them.
    unsafe { ledger.tables() }
}

/// Take a VM exit at TSC `now`, with what it was about and where the guest was. `code`, `exit` and
/// `rip` are read once the vCPU is known to be metered.
#[inline(always)]
pub(crate) fn exit_with(
    vcpu: Vcpu<'_>,
    now: u64,
    isa: Isa,
    code: impl FnOnce() -> u32,
    exit: impl detail::Exit,
    rip: impl FnOnce() -> Option<u64>,
) {
    let Some(ledger) = cached(vcpu) else {
        return exit_with_slow(vcpu, now, isa, code, exit, rip);
    };
    let slot = reasons::slot(isa, code());
    let Some(tables) = tables(ledger) else {
        return exit_without(vcpu, ledger, now, slot);
    };
    // So that nothing rare is on the way of all others.
    if vcpu.runs_nested() {
        return exit_nested((vcpu, ledger), now, isa, slot, exit, rip);
    }
    let Some(rip) = rip() else {
        return exit_apart((vcpu, ledger), now, isa, slot, exit, None);
    };
    let Ok(key) = detail::plain(detail::rule(isa, slot), &exit) else {
        return exit_composed((vcpu, ledger), now, isa, slot, exit, rip);
    };
    let about = About {
        slot,
        nested: false,
        key,
        rip: Some(rip),
    };
    ledger.exit_with(tables, now, &about);
}

/// Take an exit of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn exit_without(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, slot: Slot) {
    exit_of(vcpu, ledger, now, slot);
}

/// Take an exit of a nested guest. It is here that its RIP is read, so that the check for it stays
/// one instruction.
#[inline(never)]
fn exit_nested(
    held: (Vcpu<'_>, &Ledger),
    now: u64,
    isa: Isa,
    slot: Slot,
    exit: impl detail::Exit,
    rip: impl FnOnce() -> Option<u64>,
) {
    exit_apart(held, now, isa, slot, exit, rip());
}

/// Take an exit whose detail is composed.
#[inline(never)]
fn exit_composed(
    (vcpu, ledger): (Vcpu<'_>, &Ledger),
    now: u64,
    isa: Isa,
    slot: Slot,
    exit: impl detail::Exit,
    rip: u64,
) {
    if detail::rule(isa, slot).source() == detail::source::HYPERCALL {
        return exit_apart((vcpu, ledger), now, isa, slot, exit, Some(rip));
    }
    let Some(tables) = tables(ledger) else {
        return exit_without(vcpu, ledger, now, slot);
    };
    let about = About {
        slot,
        nested: false,
        key: detail::composed(isa, slot, &exit),
        rip: Some(rip),
    };
    ledger.exit_with(tables, now, &about);
}

/// Take an exit of a nested guest, one by a hypercall, or one whose RIP cannot be read.
#[inline(never)]
fn exit_apart(
    (vcpu, ledger): (Vcpu<'_>, &Ledger),
    now: u64,
    isa: Isa,
    slot: Slot,
    exit: impl detail::Exit,
    rip: Option<u64>,
) {
    let Some(tables) = tables(ledger) else {
        return exit_without(vcpu, ledger, now, slot);
    };
    let about = About {
        slot,
        nested: vcpu.runs_nested(),
        key: detail::key(isa, slot, &exit),
        rip,
    };
    ledger.exit_with(tables, now, &about);
}

/// Slow path of [`exit_with`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn exit_with_slow(
    vcpu: Vcpu<'_>,
    now: u64,
    isa: Isa,
    code: impl FnOnce() -> u32,
    exit: impl detail::Exit,
    rip: impl FnOnce() -> Option<u64>,
) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Guest) {
        exit_apart(
            (vcpu, ledger),
            now,
            isa,
            reasons::slot(isa, code()),
            exit,
            rip(),
        );
    }
}

/// Take a VM entry.
#[inline(always)]
pub(crate) fn entry_with(vcpu: Vcpu<'_>, now: u64) {
    let Some(ledger) = cached(vcpu) else {
        return entry_with_slow(vcpu, now);
    };
    match tables(ledger) {
        Some(tables) => ledger.entry_with(tables, now),
        None => entry_without(ledger, now),
    }
}

/// Take an entry of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn entry_without(ledger: &Ledger, now: u64) {
    ledger.entry(now);
}

/// Slow path of [`entry_with`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn entry_with_slow(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Kernel) {
        match tables(ledger) {
            Some(tables) => ledger.entry_with(tables, now),
            None => ledger.entry(now),
        }
    }
}

/// Take the vCPU's way onto CPU `cpu`.
#[inline(never)]
pub(crate) fn resume_with(vcpu: Vcpu<'_>, now: u64, cpu: u32) {
    let found = cached(vcpu).or_else(|| looked_up(vcpu, now, Phase::Kernel));
    let Some(ledger) = found else {
        return;
    };
    match tables(ledger) {
        Some(tables) => ledger.resume_with(tables, now, cpu),
        None => ledger.resume(now),
    }
}

/// Take the vCPU's way off its CPU. As for [`leave`], nothing is allocated.
#[inline(always)]
pub(crate) fn leave_with(vcpu: Vcpu<'_>, now: u64, leaving: &Leaving) {
    let known = || hooks::registry()?.vcpus.known(vcpu.key());
    let found = cached(vcpu).or_else(|| known().map(|member| member.ledger()));
    let Some(ledger) = found else {
        return;
    };
    match tables(ledger) {
        Some(tables) => ledger.leave_with(tables, now, leaving),
        None => ledger.leave(now, leaving.phase),
    }
}
