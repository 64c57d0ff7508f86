// SPDX-License-Identifier: GPL-2.0

//! The kernel's half of the registry: which ledger belongs to which vCPU, snapshots, and requests for
//! details. The algorithm is in [`crate::meter::registry`].
//!
//! - [`transitions`]: the way from a callback to a vCPU's ledger.
//! - [`cache`]: the vCPU that this CPU metered last, so that an exit finds its ledger by one compare. The
//!   ledgers of other vCPUs are looked up in the registry's table, without a lock.
//! - [`platform`]: the kernel's lock, memory, RCU, interrupts and clock, for the algorithm.
//!
//! When a vCPU leaves its CPU, nothing is allocated and the registry's lock is not taken, because the
//! scheduler's lock is held then.

mod cache;
mod platform;
pub(crate) mod transitions;

use core::{
    ptr::null_mut,
    sync::atomic::{
        AtomicPtr, AtomicU64,
        Ordering::{
            Acquire,
            Relaxed,
            Release, //
        },
    },
};

use kernel::{
    new_mutex, pr_warn_once,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
};

use crate::{
    kvm::vcpu::Vcpu,
    linux::{
        clock,
        details, //
    },
    meter::{
        leaves::{
            Leaves,
            Query,
            Registers, //
        },
        ledger::{
            Ledger,
            Totals, //
        },
        phase::Phase,
        registry::{
            self as algorithm,
            walk::{
                NoSnapshot,
                TableOptions,
                Walker, //
            },
            Refused,
            Settings, //
        },
        snapshot::{
            HostHeader,
            Identity, //
        },
    },
};

use platform::Kernel;

// SAFETY: All-zero bytes are valid totals of nothing, as `Totals` promises.
unsafe impl Zeroable for Totals {}
// SAFETY: All-zero bytes are an empty copy, as `LedgerCopy` promises, and a walker is one.
unsafe impl Zeroable for Walker {}

/// The registry, for callbacks and open files of the node. Set while there can be any of them.
static PUBLISHED: AtomicPtr<Registry> = AtomicPtr::new(null_mut());

/// Keeps the registry published while this lives. There is at most one, and it goes after everything that
/// calls [`published`].
pub(crate) struct Publication(#[expect(dead_code, reason = "held")] Arc<Registry>);

impl Publication {
    /// Publish the registry.
    pub(crate) fn new(registry: Arc<Registry>) -> Self {
        PUBLISHED.store(Arc::as_ptr(&registry).cast_mut(), Release);
        Self(registry)
    }
}

impl Drop for Publication {
    fn drop(&mut self) {
        PUBLISHED.store(null_mut(), Release);
    }
}

/// Return the registry. Only for callbacks and open files of the node.
#[inline(always)]
pub(crate) fn published<'a>() -> Option<&'a Registry> {
    // SAFETY: Null, or published by the module's state, which drops the registry after the last run of a
    // callback. An open file pins the module.
    unsafe { PUBLISHED.load(Acquire).as_ref() }
}

/// The ledgers of all vCPUs.
#[pin_data]
pub(crate) struct Registry {
    vcpus: algorithm::Registry<Kernel>,
    /// State of walks over all vCPUs. Locked while a snapshot is taken, or details are turned on or off.
    #[pin]
    walker: Mutex<Walks>,
    /// Offset in ticks from the TSC to a clock that goes on when the TSC restarts.
    clock_offset: AtomicU64,
}

/// State of walks over all vCPUs.
struct Walks {
    walker: KVBox<Walker>,
    /// Callers of [`Registry::hold_details`] that have not released them.
    want_details: usize,
}

impl Registry {
    /// Create a registry without a vCPU.
    pub(crate) fn new(settings: Settings) -> Result<Arc<Self>> {
        let kernel = Kernel::new()?;
        let vcpus = algorithm::Registry::new(kernel, settings).map_err(|_| ENOMEM)?;
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

    /// Return the CPUID leaves that guests get answers to.
    #[inline(always)]
    pub(crate) fn leaves(&self) -> &Leaves {
        self.vcpus.leaves()
    }

    /// Add a vCPU that KVM is creating, in a context that may sleep for memory.
    pub(crate) fn register_new(&self, vcpu: Vcpu<'_>) {
        if let Err(refused) = self.vcpus.register_new(vcpu.key(), vcpu.newcomer()) {
            self.warn_unmetered(refused);
        }
    }

    /// Remove a vCPU that KVM destroys, and will not load again.
    pub(crate) fn destroy(&self, vcpu: Vcpu<'_>) {
        self.vcpus.destroy(vcpu.key(), vcpu.polled());
    }

    /// Look up the ledger of a vCPU that the caller holds, in the table, and put it into this CPU's cache.
    /// A new vCPU becomes a member at this event, and is in `phase` from `now` on.
    fn ledger(&self, vcpu: Vcpu<'_>, now: u64, phase: Phase) -> Option<&Ledger> {
        let found = self
            .vcpus
            .at_event(vcpu.key(), now, phase, || vcpu.newcomer());
        let ledger = found
            .unwrap_or_else(|refused| {
                self.warn_unmetered(refused);
                None
            })?
            .ledger();
        // INVARIANT: `destroy` has all CPUs forget the vCPU before it lets the member go.
        // SAFETY: By that invariant.
        unsafe { cache::put(vcpu, ledger) };
        Some(ledger)
    }

    /// Log why a vCPU runs unmetered, once for each reason.
    fn warn_unmetered(&self, refused: Refused) {
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

    /// Return the answer to a guest's query and the vCPU's identity, or `None` for an unmetered vCPU.
    /// `at_cpl_0` is true if the guest's kernel asks.
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

    /// Write a snapshot into `buffer`, and return its size in bytes. `gone` is an empty buffer for the
    /// totals.
    ///
    /// # Errors
    ///
    /// Fails when the buffer is too small, or a vCPU could not be copied.
    pub(crate) fn snapshot(
        &self,
        buffer: &mut [u8],
        gone: &mut Totals,
        options: TableOptions,
    ) -> Result<usize, NoSnapshot> {
        let leaves = self.leaves();
        let mut walks = self.walker.lock();
        // No task runs while the host sleeps and this changes.
        let clock_offset = self.clock_offset.load(Relaxed);
        let host = HostHeader {
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
            .snapshot(&mut walks.walker, buffer, gone, host, options)
    }

    /// Turn details on until [`Self::release_details`] has been called as often as this.
    pub(crate) fn hold_details(&self) {
        let mut walks = self.walker.lock();
        walks.want_details = walks.want_details.saturating_add(1);
        // First the branch, then the tables: a callback that finds tables must record a whole exit in them.
        if walks.want_details == 1 {
            details::switch(true);
        }
        // A later call does this for vCPUs that got no memory before.
        self.vcpus.give_tables(&mut walks.walker);
    }

    /// Thaw the rings of the latest exits.
    pub(crate) fn thaw_rings(&self) {
        self.vcpus.thaw_rings(&mut self.walker.lock().walker);
    }

    /// Turn details off, if no other caller of [`Self::hold_details`] is left.
    pub(crate) fn release_details(&self) {
        let mut walks = self.walker.lock();
        walks.want_details = walks.want_details.saturating_sub(1);
        // First the tables: without them a vCPU's exits have no details, in whatever order the kernel patches
        // the callbacks.
        if walks.want_details == 0 {
            self.vcpus.take_tables(&mut walks.walker);
            details::switch(false);
        }
    }

    /// Estimate the size of the next snapshot, in bytes.
    pub(crate) fn estimated_size(&self) -> usize {
        self.vcpus.estimated_size()
    }

    /// Return the sums of all vCPUs, departed and alive.
    pub(crate) fn totals(&self) -> Result<KVBox<Totals>> {
        let mut totals = KVBox::<Totals>::zeroed(GFP_KERNEL)?;
        let mut walks = self.walker.lock();
        self.vcpus.add_totals(&mut walks.walker, &mut totals);
        drop(walks);
        Ok(totals)
    }

    /// Move to a TSC that restarted while the host slept. It reads `now`, and would read `then` if it had
    /// gone on. No other CPU runs.
    pub(crate) fn rebase(&self, then: u64, now: u64) {
        self.vcpus.rebase(then, now);
        self.clock_offset.fetch_add(then.wrapping_sub(now), Relaxed);
    }
}
