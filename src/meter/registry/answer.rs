// SPDX-License-Identifier: GPL-2.0

//! Answers to a guest's queries. An answer adds the vCPUs of the asking vCPU's group, read one by
//! one, and the sums over the others, which one query renews now and then.
//!
//! A query for the numbers of a VM takes no lock, and one for the whole host takes it for a constant number
//! of steps. A query waits only for sums that were never published, a millisecond at most. So no guest can
//! make another one wait. A VM with up to [`GROUP`] vCPUs has one group, and its numbers are exact. In a
//! larger VM, the numbers of other groups are those of the latest renewal, and a query takes the same time
//! however many vCPUs there are. The query that renews the sums is the exception: it reads them all, at
//! most once a millisecond, and for at most a sixteenth of the time.

use core::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::meter::{
    leaves::{
        tables::{Place, TableQuery},
        Numbers, Query, Registers,
    },
    phase::Phase,
    reasons::Slot,
    snapshot::Identity,
};

use super::{
    vm::{Group, Rows, Sum, Vm, GROUP},
    walk::{self, WalkItem},
    Member, Platform, Registry, State,
};

/// Inverse of the share of the time spent renewing sums, at most.
const RENEWING_SHARE: u64 = 16;

/// Maximum number of pauses of a query that waits for sums, in case the clock stands still.
const MOST_PAUSES: u32 = 1 << 16;

/// Maximum time between two renewals, in ms, however long the renewing thread was off its CPU.
const LONGEST_WAIT: u64 = 1000;

/// Sums of the host. All-zero bytes are sums that were never renewed.
#[derive(Debug)]
pub(super) struct HostSums {
    /// Sums that guests read.
    published: Rows,
    /// Sums under construction, for the thread that renews them.
    next: Rows,
    renewing: AtomicBool,
    due: AtomicU64,
    /// Answers not read from `published`, while there were few vCPUs. Written with the lock held.
    few: AtomicU64,
    /// Number of these answers that are not newer than `published`, plus 1; 0 before the first
    /// renewal.
    covered: AtomicU64,
}

impl HostSums {
    /// Return true if `published` is not older than any answer so far.
    fn is_new(&self) -> bool {
        // ORDERING: A thread that sees that the sums cover an answer sees the sums.
        self.covered.load(Acquire) == self.few.load(Relaxed).wrapping_add(1)
    }
}

/// Numbers that a guest may read: those of its group, and the sums over the others.
struct VmNumbers<'a, P: Platform> {
    registry: &'a Registry<P>,
    group: &'a Group,
    others: Option<&'a Rows>,
}

/// Numbers of a host with few vCPUs, with the lock held.
struct FewVcpus<'a>(&'a State);

/// Numbers of a host, as of the latest renewal.
struct Renewed<'a>(&'a Rows);

impl<P: Platform> Registry<P> {
    /// Answer a guest's query. Return the identity of the asking vCPU as well, or `None` for an
    /// unmetered vCPU. The caller holds the vCPU, and may sleep.
    pub fn answer(&self, key: usize, query: Query, subleaf: u32) -> Option<(&Identity, Registers)> {
        let member = self.metered(key)?;
        let answer = if self.settings.host_scope {
            self.answer_for_host(query, subleaf)?
        } else {
            self.answer_for_vm(member, query, subleaf)?
        };
        Some((&member.identity, answer))
    }

    /// Answer a guest from the tables of the asking vCPU. Return the identity of that vCPU as well,
    /// or `None` for an unmetered vCPU. `at_cpl_0` is true if the guest's kernel asks. The caller
    /// holds the vCPU, between two of its transitions.
    ///
    /// Takes constant time for any question: it reads each row of a table at most once.
    pub fn answer_by_tables(
        &self,
        key: usize,
        subleaf: u32,
        at_cpl_0: bool,
    ) -> Option<(&Identity, Registers)> {
        let member = self.metered(key)?;
        let reading = self.platform.read();
        let table_query = TableQuery {
            isa: self.settings.leaves.isa,
            ledger: &member.ledger,
            // SAFETY: `reading` keeps the tables.
            tables: unsafe { member.ledger.tables() },
            switches: self.switches.load(Relaxed),
            now: self.platform.now(),
            at_cpl_0,
            host_scope: self.settings.host_scope,
        };
        let answer = table_query.answer(Place::from_subleaf(subleaf));
        drop(reading);
        Some((&member.identity, answer))
    }

    fn answer_for_vm(&self, member: &Member, query: Query, subleaf: u32) -> Option<Registers> {
        // SAFETY: A vCPU that is held has a place, and its group and VM stay as long as it has.
        let (group, vm) = unsafe {
            let group = member.group.as_ref()?;
            (group, group.vm.as_ref()?)
        };
        // ORDERING: See `State::add_group`.
        // SAFETY: Sums stay for as long as their VM.
        let (sums, its) = unsafe {
            let sums = vm.sums.load(Acquire).as_ref();
            (sums, group.sums.load(Acquire).as_ref())
        };
        if let (Some(sums), Some(its)) = (sums, its) {
            // ORDERING: A thread that sees that sums were renewed sees the sums.
            let are_there = || its.renewed.load(Acquire);
            self.renew_or_wait(&vm.renewing, &vm.due, are_there, || self.renew(vm, sums));
        }
        let numbers = VmNumbers {
            registry: self,
            group,
            others: its.map(|its| &its.others),
        };
        Some(self.settings.leaves.answer(query, subleaf, &numbers))
    }

    /// Renew sums that are due, or that this query may not read yet: by `renew`, unless another
    /// thread is renewing them. Numbers must never fall between two answers, so for sums that were
    /// never published the query waits, a millisecond at most.
    fn renew_or_wait(
        &self,
        renewing: &AtomicBool,
        due: &AtomicU64,
        may_be_read: impl Fn() -> bool,
        renew: impl Fn(),
    ) {
        let began = self.platform.now();
        if may_be_read() && !self.is_due(due, began) {
            return;
        }
        for _ in 0..MOST_PAUSES {
            if let Some(_turn) = Turn::take(&self.platform, renewing, due) {
                // Another thread may have just had the turn.
                if !may_be_read() || self.is_due(due, self.platform.now()) {
                    renew();
                }
                return;
            }
            let waited = self.platform.now().wrapping_sub(began);
            if may_be_read() || waited > self.platform.millisecond() {
                return;
            }
            self.platform.pause();
        }
    }

    /// Return true if sums are due for renewal. A time further ahead than the longest wait comes
    /// from before the clock restarted.
    fn is_due(&self, due: &AtomicU64, now: u64) -> bool {
        let ahead = due.load(Relaxed).wrapping_sub(now);
        let longest = self.platform.millisecond().saturating_mul(LONGEST_WAIT);
        ahead == 0 || ahead > longest
    }

    /// Renew the sums of a VM. The caller has the turn.
    #[cold]
    fn renew(&self, vm: &Vm, sums: &Rows) {
        sums.clear();
        each_group(vm, |group| {
            // SAFETY: Sums stay for as long as their VM.
            let Some(its) = (unsafe { group.sums.load(Acquire).as_ref() }) else {
                return;
            };
            its.own.clear();
            let reading = self.platform.read();
            // SAFETY: `reading` keeps the vCPUs.
            unsafe { group.each(|member| its.own.add_ledger(&member.ledger)) };
            drop(reading);
            sums.add_rows(&its.own);
            self.platform.pause();
        });
        each_group(vm, |group| {
            // SAFETY: As above.
            if let Some(its) = unsafe { group.sums.load(Acquire).as_ref() } {
                its.others.set_difference(sums, &its.own);
                // ORDERING: See `answer_for_vm`.
                its.renewed.store(true, Release);
            }
        });
    }

    fn answer_for_host(&self, query: Query, subleaf: u32) -> Option<Registers> {
        let leaves = &self.settings.leaves;
        // SAFETY: The sums stay for as long as the registry.
        let host = unsafe { self.host.load(Relaxed).as_ref() }?;
        let state = self.lock();
        if state.metered <= GROUP && state.groups <= GROUP {
            let few = host.few.load(Relaxed);
            host.few.store(few.wrapping_add(1), Relaxed);
            return Some(leaves.answer(query, subleaf, &FewVcpus(&state)));
        }
        drop(state);
        let is_new = || host.is_new();
        self.renew_or_wait(&host.renewing, &host.due, is_new, || self.renew_host(host));
        Some(leaves.answer(query, subleaf, &Renewed(&host.published)))
    }

    /// Renew the sums of the host. The caller has the turn.
    #[cold]
    fn renew_host(&self, host: &HostSums) {
        host.next.clear();
        let mut few = 0;
        self.walk(walk::HOST, |seen| match seen {
            WalkItem::Start(state) => {
                few = host.few.load(Relaxed);
                for (slot, row, _) in state.gone.rows() {
                    host.next.add(slot, Sum::Exits, row.exits);
                    host.next.add(slot, Sum::Nested, row.nested_exits);
                    for phase in Phase::ALL {
                        host.next.add(slot, Sum::Cycles(phase), row.cycles(phase));
                    }
                }
            }
            WalkItem::Vcpu(member, _) => host.next.add_ledger(&member.ledger),
        });
        host.published.set(&host.next);
        // ORDERING: See `HostSums::is_new`.
        host.covered.store(few.wrapping_add(1), Release);
    }
}

fn each_group(vm: &Vm, mut see: impl FnMut(&Group)) {
    let mut group = vm.groups.load(Acquire);
    // SAFETY: A group stays for as long as its VM.
    while let Some(it) = unsafe { group.as_ref() } {
        see(it);
        group = it.next.load(Acquire);
    }
}

/// Turn of one thread to renew sums. While it lives, other threads use the existing sums.
struct Turn<'a, P: Platform> {
    platform: &'a P,
    renewing: &'a AtomicBool,
    due: &'a AtomicU64,
    began: u64,
}

impl<'a, P: Platform> Turn<'a, P> {
    fn take(platform: &'a P, renewing: &'a AtomicBool, due: &'a AtomicU64) -> Option<Self> {
        // ORDERING: The turn comes after all that the previous one wrote.
        if renewing.swap(true, Acquire) {
            return None;
        }
        Some(Self {
            platform,
            renewing,
            due,
            began: platform.now(),
        })
    }
}

impl<P: Platform> Drop for Turn<'_, P> {
    fn drop(&mut self) {
        let now = self.platform.now();
        let took = now.wrapping_sub(self.began);
        let wait = took.saturating_mul(RENEWING_SHARE);
        let millisecond = self.platform.millisecond();
        let wait = wait.clamp(millisecond, millisecond.saturating_mul(LONGEST_WAIT));
        self.due.store(now.wrapping_add(wait), Relaxed);
        // ORDERING: As in `take`.
        self.renewing.store(false, Release);
    }
}

impl<P: Platform> VmNumbers<'_, P> {
    fn sum(&self, slot: Option<Slot>, sum: Sum) -> u64 {
        let others = self.others.map_or(0, |others| others.get(slot, sum));
        let reading = self.registry.platform.read();
        // SAFETY: `reading` keeps the vCPUs.
        let own = unsafe { self.group.sum(slot, sum) };
        drop(reading);
        own.wrapping_add(others)
    }
}

impl<P: Platform> Numbers for VmNumbers<'_, P> {
    fn exits(&self, slot: Slot) -> u64 {
        self.sum(Some(slot), Sum::Exits)
    }

    fn nested_exits(&self, slot: Slot) -> u64 {
        self.sum(Some(slot), Sum::Nested)
    }

    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        self.sum(Some(slot), Sum::Cycles(phase))
    }

    fn total_exits(&self) -> u64 {
        self.sum(None, Sum::Exits)
    }

    fn total_cycles(&self, phase: Phase) -> u64 {
        self.sum(None, Sum::Cycles(phase))
    }
}

impl FewVcpus<'_> {
    fn sum(&self, read: impl Fn(&super::Ledger) -> u64) -> u64 {
        let mut all = 0_u64;
        self.0
            .each(|member| all = all.wrapping_add(read(&member.ledger)));
        all
    }
}

impl Numbers for FewVcpus<'_> {
    fn exits(&self, slot: Slot) -> u64 {
        let live = self.sum(|ledger| ledger.exits(slot));
        live.wrapping_add(self.0.gone.exits(slot))
    }

    fn nested_exits(&self, slot: Slot) -> u64 {
        let live = self.sum(|ledger| ledger.nested_exits(slot));
        live.wrapping_add(self.0.gone.nested_exits(slot))
    }

    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        let live = self.sum(|ledger| ledger.cycles(phase, slot));
        live.wrapping_add(self.0.gone.cycles(phase, slot))
    }

    fn total_exits(&self) -> u64 {
        let live = self.sum(super::Ledger::total_exits);
        live.wrapping_add(self.0.gone.total_exits())
    }

    fn total_cycles(&self, phase: Phase) -> u64 {
        let live = self.sum(|ledger| ledger.total_cycles(phase));
        live.wrapping_add(self.0.gone.total_cycles(phase))
    }
}

impl Numbers for Renewed<'_> {
    fn exits(&self, slot: Slot) -> u64 {
        self.0.get(Some(slot), Sum::Exits)
    }

    fn nested_exits(&self, slot: Slot) -> u64 {
        self.0.get(Some(slot), Sum::Nested)
    }

    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        self.0.get(Some(slot), Sum::Cycles(phase))
    }

    fn total_exits(&self) -> u64 {
        self.0.get(None, Sum::Exits)
    }

    fn total_cycles(&self, phase: Phase) -> u64 {
        self.0.get(None, Sum::Cycles(phase))
    }
}
