// SPDX-License-Identifier: GPL-2.0

//! The kernel's half of the registry: the lock, memory, RCU and interrupts that the algorithm in
//! [`crate::meter::registry`] takes, and the way from a callback to a vCPU's ledger.
//!
//! Each CPU keeps the vCPU that it metered last in a cache, so that an exit finds its ledger by
//! one compare. Another vCPU's is looked up in the registry's table, without a lock. Nothing is
//! allocated, and the lock is not taken, when a vCPU leaves its CPU, as the scheduler's own lock is
//! held then.

mod cache;

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
    hooks,
    kvm::{
        exit::Event,
        vcpu::Vcpu, //
    },
    linux::{
        clock,
        details,
        interrupt,
        memory,
        task, //
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
            MoreHistograms,
            Supply,
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
        // SAFETY: By the contract of this function the vCPU has not been let go. KVM destroys it after
        // that, for which it takes the lock that the caller holds.
        unsafe { Vcpu::from_key(key) }.polled()
    }

    fn cpu(&self, key: usize) -> Option<u32> {
        // SAFETY: As above.
        unsafe { Vcpu::from_key(key) }.cpu()
    }

    fn copy_on(&self, cpu: u32, copying: &mut Copying<'_>) -> bool {
        let mut copied = false;
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

/// The kernel's allocator, for vCPUs that exit for more reasons than their ledgers have histograms.
struct Allocator;

// SAFETY: The memory is zeroed and nobody else's. The registry frees it with the vCPU.
unsafe impl Supply for Allocator {
    fn more(&self) -> Option<NonNull<MoreHistograms>> {
        let layout = Layout::new::<MoreHistograms>();
        Some(hooks::allocate(layout.size(), false)?.cast())
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
        // SAFETY: By that invariant.
        unsafe { cache::put(vcpu, ledger) };
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
        let leaves = self.leaves();
        let mut walks = self.walker.lock();
        // Nobody takes a snapshot while the host sleeps, so this stays as it is.
        let clock_offset = self.clock_offset.load(Relaxed);
        let host = Host {
            isa: leaves.isa,
            leaf_map: leaves.map,
            host_scope: self.vcpus.host_scope(),
            by_bpf: false,
            tsc_khz: clock::tsc_khz(),
            tsc_stable: clock::tsc_is_stable(),
            loaded: self.vcpus.loaded(),
            now: clock::now().wrapping_add(clock_offset),
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
            details::switch(true);
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
        // First the tables: a vCPU whose tables are gone is told without, in whatever order the
        // kernel patches the callbacks.
        if walks.want_details == 0 {
            self.vcpus.take_tables(&mut walks.walker);
            details::switch(false);
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

/// Return the tables of a vCPU that the caller holds, in a callback.
#[inline(always)]
fn tables(ledger: &Ledger) -> Option<&Tables> {
    // SAFETY: All callbacks of transitions run with preemption off, so what they find is freed after
    // them.
    unsafe { ledger.tables() }
}

/// Take a VM exit at TSC `now`, which is read once the vCPU is known to be metered.
///
/// Each callback has one branch for details, behind what both ways need. `RING` tells whether vCPUs
/// have rings of their last exits then; `event` makes the vCPU's exit.
#[inline(always)]
pub(crate) fn exit<'a, const RING: bool, E: Event>(
    vcpu: Vcpu<'a>,
    now: u64,
    isa: Isa,
    event: impl Fn(Vcpu<'a>) -> E,
) {
    let Some(ledger) = cache::find(vcpu) else {
        return exit_slow(vcpu, now, isa, event(vcpu));
    };
    let Some(slot) = event(vcpu).usual_slot(isa) else {
        let vcpu = cache::read_again(vcpu);
        return exit_unusual(vcpu, ledger, now, isa, event(vcpu));
    };
    if details::are_on() {
        let vcpu = cache::read_again(vcpu);
        return exit_with::<RING, _>((ledger, vcpu), now, isa, slot, event(vcpu));
    }
    exit_of(vcpu, ledger, now, slot);
}

#[inline(always)]
fn exit_of(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, slot: Slot) {
    if vcpu.runs_nested() {
        exit_from_nested(ledger, now, slot);
    } else {
        ledger.exit_of::<false>(now, slot, Allocator);
    }
}

/// Take an exit of a nested guest.
#[inline(never)]
fn exit_from_nested(ledger: &Ledger, now: u64, slot: Slot) {
    ledger.exit_of::<true>(now, slot, Allocator);
}

/// Take an exit whose code has more to it.
#[cold]
#[inline(never)]
fn exit_unusual(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, isa: Isa, event: impl Event) {
    let slot = reasons::slot(isa, event.code());
    exit_apart((ledger, vcpu), now, isa, slot, event);
}

/// Slow path of [`exit`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn exit_slow(vcpu: Vcpu<'_>, now: u64, isa: Isa, event: impl Event) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Guest) {
        let slot = reasons::slot(isa, event.code());
        exit_apart((ledger, vcpu), now, isa, slot, event);
    }
}

/// Take a VM exit with details.
#[inline(always)]
fn exit_with<const RING: bool, E: Event>(
    (ledger, vcpu): (&Ledger, Vcpu<'_>),
    now: u64,
    isa: Isa,
    slot: Slot,
    event: E,
) {
    let Some(tables) = tables(ledger) else {
        return exit_without(ledger, vcpu, now, slot);
    };
    // So that nothing rare is on the way of all others.
    if vcpu.runs_nested() {
        return exit_apart((ledger, vcpu), now, isa, slot, event);
    }
    let Ok(key) = detail::plain(isa, slot, &event) else {
        return exit_composed((ledger, vcpu), now, isa, slot, event);
    };
    let rip = event.likely_rip();
    let about = About {
        slot,
        nested: false,
        key,
        rip: Some(rip),
    };
    let Err(key) = ledger.exit_like_before::<RING>(tables, now, &about) else {
        return;
    };
    match E::HIDES_RIP {
        true if detail::is_leaf(isa, slot) => {
            exit_composed((ledger, vcpu), now, isa, slot, event);
        }
        // It is found out there whether there is one.
        true => exit_apart((ledger, vcpu), now, isa, slot, event),
        false => ledger.exit_otherwise(tables, now, &about, key, Allocator),
    }
}

/// Take an exit of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn exit_without(ledger: &Ledger, vcpu: Vcpu<'_>, now: u64, slot: Slot) {
    exit_of(vcpu, ledger, now, slot);
}

/// Take an exit by a hypercall, or one by CPUID: on VMX of a leaf that may have subleaves, on SVM one
/// that is not like the latest ones, as any of a leaf that has some.
#[inline(never)]
fn exit_composed(
    (ledger, vcpu): (&Ledger, Vcpu<'_>),
    now: u64,
    isa: Isa,
    slot: Slot,
    event: impl Event,
) {
    if !detail::is_leaf(isa, slot) {
        return exit_apart((ledger, vcpu), now, isa, slot, event);
    }
    let Some(tables) = tables(ledger) else {
        return exit_without(ledger, vcpu, now, slot);
    };
    let about = About {
        slot,
        nested: false,
        key: Some(detail::leaf(isa, slot, &event)),
        rip: event.rip(),
    };
    match tables.has_ring() {
        true => ledger.exit_with::<true>(tables, now, &about, Allocator),
        false => ledger.exit_with::<false>(tables, now, &about, Allocator),
    }
}

/// Take an exit of a nested guest, one by a hypercall, one whose RIP cannot be read, one that is not
/// like the latest ones, or one of a vCPU that is not in this CPU's cache.
#[inline(never)]
fn exit_apart(
    (ledger, vcpu): (&Ledger, Vcpu<'_>),
    now: u64,
    isa: Isa,
    slot: Slot,
    event: impl Event,
) {
    let Some(tables) = tables(ledger) else {
        return exit_without(ledger, vcpu, now, slot);
    };
    let about = About {
        slot,
        nested: vcpu.runs_nested(),
        key: detail::key(isa, slot, &event),
        rip: event.rip(),
    };
    ledger.exit_otherwise(tables, now, &about, about.whole_key(), Allocator);
}

/// Take a VM entry.
#[inline(always)]
pub(crate) fn entry(vcpu: Vcpu<'_>, now: u64) {
    let Some(ledger) = cache::find(vcpu) else {
        return entry_slow(vcpu, now);
    };
    if details::are_on() {
        return match tables(ledger) {
            Some(tables) => ledger.entry_with(tables, now, || vcpu.cpu_loaded()),
            None => entry_without(ledger, now),
        };
    }
    ledger.entry(now);
}

/// Take an entry of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn entry_without(ledger: &Ledger, now: u64) {
    ledger.entry(now);
}

/// Slow path of [`entry`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn entry_slow(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Kernel) {
        match tables(ledger) {
            Some(tables) => ledger.entry_with(tables, now, || vcpu.cpu_loaded()),
            None => ledger.entry(now),
        }
    }
}

/// Take the vCPU's way onto a CPU.
#[inline(always)]
pub(crate) fn resume(vcpu: Vcpu<'_>, now: u64) {
    let Some(ledger) = cache::find(vcpu) else {
        return resume_slow(vcpu, now);
    };
    if details::are_on() {
        return match tables(ledger) {
            Some(tables) => ledger.resume_with(tables, now),
            None => resume_without(ledger, now),
        };
    }
    ledger.resume(now);
}

/// Take the way onto a CPU of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn resume_without(ledger: &Ledger, now: u64) {
    ledger.resume(now);
}

/// Slow path of [`resume`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn resume_slow(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up(vcpu, now, Phase::Kernel) {
        match tables(ledger) {
            Some(tables) => ledger.resume_with(tables, now),
            None => ledger.resume(now),
        }
    }
}

/// Take the vCPU's way off its CPU, to user space. The scheduler's lock may be held, so a vCPU that is
/// not known yet is left for its next event: nothing may be allocated here.
#[inline(always)]
pub(crate) fn leave_to_user(vcpu: Vcpu<'_>, now: u64) {
    let Some(ledger) = cache::find(vcpu) else {
        return leave_slow(vcpu, now, Phase::User);
    };
    if details::are_on() {
        return match tables(ledger) {
            Some(tables) => {
                ledger.leave_to_user_with(tables, now, || vcpu.user_exit(), || vcpu.cpu_loaded())
            }
            None => leave_without(ledger, now, Phase::User),
        };
    }
    ledger.leave(now, Phase::User);
}

/// As [`leave_to_user`], where the scheduler takes the vCPU off its CPU.
#[inline(always)]
pub(crate) fn leave(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    match cache::find(vcpu) {
        Some(ledger) => leave_from(vcpu, ledger, now, phase),
        None => leave_slow(vcpu, now, phase),
    }
}

/// Return how a vCPU leaves its CPU for a phase.
#[inline(always)]
fn leaving(vcpu: Vcpu<'_>, phase: Phase) -> Leaving {
    Leaving {
        phase,
        to_user: match phase {
            Phase::User => vcpu.user_exit(),
            _ => None,
        },
    }
}

#[inline(always)]
fn leave_from(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, phase: Phase) {
    match tables(ledger) {
        Some(tables) => {
            let leaving = leaving(vcpu, phase);
            ledger.leave_with(tables, now, leaving, || vcpu.cpu_loaded());
        }
        None => ledger.leave(now, phase),
    }
}

/// Take the way off its CPU of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn leave_without(ledger: &Ledger, now: u64, phase: Phase) {
    ledger.leave(now, phase);
}

/// Slow path of [`leave`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn leave_slow(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    let Some(registry) = hooks::registry() else {
        return;
    };
    if let Some(member) = registry.vcpus.known(vcpu.key()) {
        leave_from(vcpu, member.ledger(), now, phase);
    }
}
