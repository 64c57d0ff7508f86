// SPDX-License-Identifier: GPL-2.0

//! The objects of the registry: metered vCPUs, their VMs, and the groups in which queries read them.

use core::{
    cell::UnsafeCell,
    ptr::{null_mut, NonNull},
    sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use crate::meter::{
    ledger::{Copying, Ledger, LedgerCopy, More, WithTables},
    phase::Phase,
    reasons::{Slot, SLOTS},
    snapshot::Identity,
};

use super::platform::Retired;

/// Maximum number of vCPUs that a query reads one by one. Miri takes a thousand times as long for each.
pub const GROUP: usize = if cfg!(miri) { 2 } else { 32 };

/// Number of walks over all vCPUs that the registry takes, each with its own cursor: snapshots, and
/// the sums of the host.
pub(super) const WALKS: usize = 2;

/// A metered vCPU. All-zero bytes are one that is not placed yet.
///
/// Fields in an `UnsafeCell` are read and written with the registry's lock held. All others are
/// written before anyone else can see the vCPU.
#[repr(C)]
#[derive(Debug)]
pub struct Member {
    /// Room for the platform, once the vCPU is released. In the first page, as `kvfree_rcu()` demands.
    pub(super) retired: UnsafeCell<Retired>,
    /// Number of holders: the registry itself, and each walk that has not seen the vCPU yet.
    pub(super) holders: AtomicUsize,
    /// Key of the vCPU in the table.
    pub(super) key: usize,
    /// Serial number. It grows from each new vCPU to the next.
    pub(super) serial: u64,
    pub(super) identity: Identity,
    pub(super) group: *mut Group,
    /// Place in the group.
    pub(super) place: u32,
    /// True once KVM has destroyed the vCPU. Nobody writes the ledger any more.
    pub(super) gone: AtomicBool,
    /// Time that KVM had polled before the vCPU became a member, in ns; once the vCPU is gone, the
    /// time since then.
    pub(super) polled: AtomicU64,
    /// Next vCPU that is gone, but that a walk has not seen yet.
    pub(super) awaited: UnsafeCell<[*mut Member; WALKS]>,
    pub(super) ledger: Ledger,
}

/// A VM with metered vCPUs. All-zero bytes are one that is not placed yet.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) key: usize,
    /// Number of the VM. It grows from each new VM to the next.
    pub(super) number: u64,
    /// Read and written under the lock.
    pub(super) links: UnsafeCell<Links>,
    /// First group; the others follow it.
    pub(super) groups: AtomicPtr<Group>,
    /// Sums of a VM that has more than one group; null in others.
    pub(super) sums: AtomicPtr<Rows>,
    /// True while a query renews the sums.
    pub(super) renewing: AtomicBool,
    /// Time from which on the next query renews the sums, in ticks.
    pub(super) due: AtomicU64,
}

/// The part of a VM that changes as vCPUs come and go.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) next: *mut Vm,
    pub(super) previous: *mut Vm,
    /// Latest group.
    pub(super) last: *mut Group,
    /// First group with a free place.
    pub(super) vacant: *mut Group,
    /// Number of metered vCPUs.
    pub(super) members: u32,
}

/// Up to [`GROUP`] vCPUs of a VM. It stays for as long as its VM does. All-zero bytes are an
/// empty one.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) vm: *mut Vm,
    /// Number of the group, from 0 in each VM.
    pub(super) number: u32,
    /// Bitmap of the places in use. Written under the lock.
    pub(super) taken: AtomicU32,
    pub(super) members: [AtomicPtr<Member>; GROUP],
    pub(super) next: AtomicPtr<Group>,
    /// Next group with a free place. Read and written under the lock.
    pub(super) next_vacant: UnsafeCell<*mut Group>,
    /// Sums over this group and over all others of the VM; null while it is the only one.
    pub(super) sums: AtomicPtr<GroupSums>,
}

/// Sums of a VM: over one of its groups, and over all others.
#[derive(Debug)]
pub(super) struct GroupSums {
    /// Sums over this group's vCPUs. For the query that renews the sums.
    pub(super) own: Rows,
    /// Sums over the vCPUs of all other groups.
    pub(super) others: Rows,
    /// True once `others` was renewed after the group was created.
    pub(super) renewed: AtomicBool,
}

/// Number of columns of a row.
const COLUMNS: usize = 2 + Phase::COUNT;
/// Row with the sums over all slots.
const ALL: usize = SLOTS;

/// Sums over vCPUs, by slot and column. All-zero bytes are sums over no vCPU.
#[derive(Debug)]
pub struct Rows([[AtomicU64; COLUMNS]; SLOTS + 1]);

/// A column of [`Rows`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Sum {
    /// Exits.
    Exits,
    /// Exits from nested guests.
    Nested,
    /// TSC ticks in a phase.
    Cycles(Phase),
}

impl Sum {
    const fn column(self) -> usize {
        match self {
            Sum::Exits => 0,
            Sum::Nested => 1,
            Sum::Cycles(phase) => 2 + phase as usize,
        }
    }
}

impl Rows {
    /// Create sums over no vCPU.
    pub fn new() -> Self {
        Self([const { [const { AtomicU64::new(0) }; COLUMNS] }; SLOTS + 1])
    }

    fn at(&self, row: usize, column: usize) -> Option<&AtomicU64> {
        self.0.get(row)?.get(column)
    }

    /// Return a sum of one slot, or with `None` over all slots.
    pub(super) fn get(&self, slot: Option<Slot>, sum: Sum) -> u64 {
        let row = slot.map_or(ALL, Slot::index);
        self.at(row, sum.column())
            .map_or(0, |cell| cell.load(Relaxed))
    }

    /// Set all sums to 0.
    pub(super) fn clear(&self) {
        for cell in self.0.iter().flatten() {
            cell.store(0, Relaxed);
        }
    }

    /// Add a number to a slot and to the sum over all slots. One thread at a time may do so.
    pub(super) fn add(&self, slot: Slot, sum: Sum, number: u64) {
        for row in [slot.index(), ALL] {
            if let Some(cell) = self.at(row, sum.column()) {
                cell.store(cell.load(Relaxed).wrapping_add(number), Relaxed);
            }
        }
    }

    /// Add the numbers of a vCPU, which may run meanwhile.
    pub(super) fn add_ledger(&self, ledger: &Ledger) {
        for slot in ledger.slots() {
            self.add(slot, Sum::Exits, ledger.exits(slot));
            self.add(slot, Sum::Nested, ledger.nested_exits(slot));
            for phase in Phase::ALL {
                self.add(slot, Sum::Cycles(phase), ledger.cycles(phase, slot));
            }
        }
    }

    /// Set each sum to that of `from` minus that of `less`.
    pub(super) fn set_difference(&self, from: &Rows, less: &Rows) {
        let cells = from.0.iter().flatten().zip(less.0.iter().flatten());
        for (to, (from, less)) in self.0.iter().flatten().zip(cells) {
            to.store(from.load(Relaxed).wrapping_sub(less.load(Relaxed)), Relaxed);
        }
    }

    /// Set each sum to that of `from`.
    pub(super) fn set(&self, from: &Rows) {
        for (to, from) in self.0.iter().flatten().zip(from.0.iter().flatten()) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }

    /// Add the sums of `other`.
    pub(super) fn add_rows(&self, other: &Rows) {
        for (to, from) in self.0.iter().flatten().zip(other.0.iter().flatten()) {
            to.store(to.load(Relaxed).wrapping_add(from.load(Relaxed)), Relaxed);
        }
    }
}

impl Default for Rows {
    fn default() -> Self {
        Self::new()
    }
}

impl Member {
    /// Return the ledger of the vCPU.
    #[inline(always)]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Return a pointer for writing to the vCPU or freeing it. It comes from the address, as the table
    /// has it, because a shared reference gives no right to write.
    pub(super) fn address(&self) -> NonNull<Self> {
        let address = core::ptr::from_ref(self) as usize as *mut Self;
        NonNull::new(address).unwrap_or(NonNull::from(self))
    }

    /// Prepare a copy of the ledger with all its histograms, and of the tables where they are wanted.
    pub fn copying<'a>(
        &'a self,
        out: &'a mut LedgerCopy,
        tables: WithTables<'a, 'a>,
    ) -> Copying<'a> {
        Copying {
            ledger: &self.ledger,
            // SAFETY: The histograms outside the ledger are freed with the member.
            more: unsafe { More::pointed() },
            out,
            tables,
        }
    }

    /// Return the names and numbers of the vCPU and its VM.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

impl Group {
    /// Call `see` for each vCPU of this group.
    ///
    /// # Safety
    ///
    /// The caller must read what others may retire (`Platform::read`) or hold the lock.
    pub(super) unsafe fn each(&self, mut see: impl FnMut(&Member)) {
        // Only places that were ever taken hold anything, and most groups have few.
        let mut taken = self.taken.load(Relaxed);
        while taken != 0 {
            let place = taken.trailing_zeros() as usize;
            taken &= taken.wrapping_sub(1);
            let Some(member) = self.members.get(place) else {
                return;
            };
            // ORDERING: A thread that sees the vCPU sees what was written to it before it was placed.
            // SAFETY: By the contract of this function it is not freed meanwhile.
            if let Some(member) = unsafe { member.load(Acquire).as_ref() } {
                see(member);
            }
        }
    }

    /// Return the sum of one number over the vCPUs of this group.
    ///
    /// # Safety
    ///
    /// As for [`Self::each`].
    pub(super) unsafe fn sum(&self, slot: Option<Slot>, sum: Sum) -> u64 {
        let mut all = 0_u64;
        // SAFETY: By the contract of this function.
        unsafe {
            self.each(|member| {
                let ledger = &member.ledger;
                let number = match (slot, sum) {
                    (Some(slot), Sum::Exits) => ledger.exits(slot),
                    (Some(slot), Sum::Nested) => ledger.nested_exits(slot),
                    (Some(slot), Sum::Cycles(phase)) => ledger.cycles(phase, slot),
                    (None, Sum::Exits) => ledger.total_exits(),
                    (None, Sum::Nested) => 0,
                    (None, Sum::Cycles(phase)) => ledger.total_cycles(phase),
                };
                all = all.wrapping_add(number);
            });
        }
        all
    }

    /// Put a vCPU into a free place. The caller holds the lock, and there is a free place.
    pub(super) fn take(&self, place: u32, member: NonNull<Member>) {
        if let Some(at) = self.members.get(place as usize) {
            // ORDERING: See `each`.
            at.store(member.as_ptr(), Release);
        }
        let bit = 1_u32.wrapping_shl(place);
        self.taken.store(self.taken.load(Relaxed) | bit, Relaxed);
    }

    /// Empty a place. The caller holds the lock.
    pub(super) fn leave(&self, place: u32) {
        let bit = 1_u32.wrapping_shl(place);
        self.taken.store(self.taken.load(Relaxed) & !bit, Relaxed);
        if let Some(at) = self.members.get(place as usize) {
            at.store(null_mut(), Relaxed);
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.taken.load(Relaxed).trailing_ones() as usize >= GROUP
    }
}
