// SPDX-License-Identifier: GPL-2.0

//! Registry of ledgers: which ledger belongs to which vCPU, and for how long. The algorithm runs on
//! any [`Platform`].
//!
//! The registry learns of a vCPU when KVM creates it, where the thread may wait for memory. The
//! vCPU's ledger begins at its first event. A vCPU older than the module is registered at its first
//! event, without waiting. When KVM destroys a vCPU, the registry releases it and adds its numbers
//! to the totals. A vCPU that cannot be registered, for lack of memory or past `max_vcpus`, is
//! counted, marked in the table as unmetered, and runs on undisturbed. The mark keeps it unmetered,
//! even if there is room later.
//!
//! Marks are bounded too, because anyone who may open /dev/kvm creates vCPUs. Once a vCPU could not be
//! marked, unknown vCPUs are registered or counted only at the first load of their lives. So vCPUs created
//! since the module was loaded are still counted once each, and none is registered in mid-life. A vCPU
//! created before that, and without an event since, is never registered nor counted.
//!
//! Nobody waits for long, and nobody waits for a guest:
//!
//! - The thread that holds a vCPU writes its ledger. It looks the ledger up without a lock, because
//!   only this thread, or the one that later destroys the vCPU, releases it.
//! - A query ([`answer`]) takes no lock, unless guests read the sums of the whole host. It reads up to
//!   [`GROUP`] vCPUs one by one, and the sums over the other vCPUs of its VM, which one query renews now
//!   and then.
//! - A snapshot ([`walk`]) takes references to a few vCPUs with the lock held, and copies them
//!   without it.
//! - The one lock is held for a constant number of steps, however many vCPUs and VMs there are, except in
//!   [`Registry::rebase`], while no other CPU runs. Memory is allocated and freed without the lock.

pub mod answer;
pub mod platform;
mod vm;
pub mod walk;

use core::{
    alloc::Layout,
    cell::UnsafeCell,
    ops::{Deref, DerefMut},
    ptr::{null_mut, NonNull},
    sync::atomic::{
        fence, AtomicBool, AtomicPtr, AtomicU32, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use super::{
    hash_table::{HashEntry, HashTable},
    leaves::Leaves,
    ledger::{Ledger, LedgerCopy, Totals},
    phase::Phase,
    snapshot::{self, Identity, NAME_SIZE},
    tables::Tables,
};

pub use platform::Platform;
use vm::{Group, GroupSums, Links, Vm, WALKS};
pub use vm::{Member, Rows, GROUP};
use walk::Walk;

/// Value in the table for a vCPU that runs unmetered. No address is 1.
const UNMETERED: usize = 1;

/// Minimum number of vCPUs that can be marked as unmetered at a time, whatever `max_vcpus` is. With
/// it, the table takes 256 KiB up to the default of `max_vcpus`. Miri takes a thousand times as
/// long for each.
pub const MARKS: usize = if cfg!(miri) { 40 } else { 4096 };

/// A vCPU and the VM that owns it, as KVM names them.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// Number of the VM, unique among living VMs: its address.
    pub vm: usize,
    /// KVM's name of the VM.
    pub name: [u8; NAME_SIZE],
    /// Thread that created the VM (`kvm->userspace_pid`): for most VMMs, their process.
    pub pid: u32,
    /// The vCPU's id.
    pub vcpu: u32,
}

/// A vCPU that the registry does not know yet.
#[derive(Clone, Copy, Debug)]
pub struct Newcomer {
    /// The vCPU and its VM; `None` when the host cannot read the vCPU's exit reasons.
    pub owner: Option<Owner>,
    /// Set if the vCPU has never been on a CPU.
    pub is_new: bool,
    /// Time that KVM polled for the vCPU before now, in ns.
    pub polled: u64,
}

/// Reason why a vCPU runs unmetered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// `max_vcpus` others are metered.
    NoRoom,
    /// There is no memory for its ledger.
    NoMemory,
    /// The host cannot read the vCPU's exit reasons.
    Unreadable,
}

/// Error: there is no memory for the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

/// Settings that are fixed when the module is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The CPUID leaves that are answered.
    pub leaves: Leaves,
    /// Set if guests read the sums of the whole host.
    pub host_scope: bool,
    /// Maximum number of vCPUs metered at a time, at least 1.
    pub max_vcpus: usize,
    /// Attempts to copy a ledger before an interrupt goes to the vCPU's CPU, at most
    /// [`TRIES`](super::ledger::TRIES).
    pub copy_tries: u32,
    /// Length of an exit, in ticks, above which it freezes its vCPU's ring; 0: no ring freezes.
    pub slow_ticks: u64,
}

/// State that changes as vCPUs come and go. All-zero bytes are a state without vCPUs.
#[derive(Debug)]
struct State {
    /// Ends of the list of VMs, in the order of their numbers.
    first: *mut Vm,
    last: *mut Vm,
    /// Number of the latest VM.
    number: u64,
    /// Number of the latest vCPU.
    serial: u64,
    walks: [Walk; WALKS],
    /// vCPUs that are metered now, or have a place reserved.
    metered: usize,
    /// Groups of all VMs.
    groups: usize,
    /// vCPUs that the table marks as unmetered now.
    marked: usize,
    /// vCPUs that run or ran unmetered, marked or not.
    unmetered: u64,
    /// Set if new vCPUs get tables.
    wants_tables: bool,
    /// Numbers of the vCPUs that are gone.
    gone: Totals,
    /// Buffer for a copy of a ledger, which is too large for a kernel stack.
    copy: LedgerCopy,
}

/// The ledgers of all vCPUs.
///
/// # Invariants
///
/// - A value in the table of vCPUs is 0, `UNMETERED`, or the address of a [`Member`] that the
///   registry holds. The value stays until the thread that has the vCPU to itself releases it.
/// - A value in the table of VMs is 0 or the address of a `Vm` in the list of VMs, which has at
///   least one member.
#[derive(Debug)]
pub struct Registry<P: Platform> {
    platform: P,
    settings: Settings,
    /// Clock when the registry was created.
    loaded: u64,
    vcpus: Array<HashEntry>,
    vms: Array<HashEntry>,
    max_marks: usize,
    /// Set once a vCPU could not be marked. From then on, a vCPU that the table does not have may
    /// be old.
    unmarked: AtomicBool,
    /// Size of the latest snapshot, in bytes.
    latest_size: AtomicUsize,
    /// Times that details were turned on and off, as guests read it. Details are on when it is odd.
    switches: AtomicU32,
    /// Protected by the lock.
    state: NonNull<UnsafeCell<State>>,
    /// Sums of the host, for its guests; null unless guests read them.
    host: AtomicPtr<answer::HostSums>,
}

// SAFETY: Atomics are shared without the lock. All else is read and written with the lock held, by
// the thread that owns a vCPU, or before other threads can see it.
unsafe impl<P: Platform + Send> Send for Registry<P> {}
// SAFETY: As above.
unsafe impl<P: Platform + Sync> Sync for Registry<P> {}

/// Zeroed memory for a number of equal objects.
#[derive(Debug)]
struct Array<T> {
    first: NonNull<T>,
    count: usize,
}

impl<T> Array<T> {
    fn layout(count: usize) -> Result<Layout, NoMemory> {
        Layout::array::<T>(count).map_err(|_| NoMemory)
    }

    /// # Safety
    ///
    /// All-zero bytes must be a valid `T`.
    unsafe fn new(platform: &impl Platform, count: usize) -> Result<Self, NoMemory> {
        let memory = platform.allocate(Self::layout(count)?, true);
        let first = memory.ok_or(NoMemory)?.cast();
        Ok(Self { first, count })
    }

    fn as_slice(&self) -> &[T] {
        // SAFETY: `count` objects were allocated, and stay as long as this is borrowed.
        unsafe { core::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }

    /// # Safety
    ///
    /// No thread may use the memory any more.
    unsafe fn free(&self, platform: &impl Platform) {
        if let Ok(layout) = Self::layout(self.count) {
            // SAFETY: Allocated by `new` with that layout.
            unsafe { platform.free(self.first.cast(), layout) };
        }
    }
}

/// Allocate zeroed memory for a value.
///
/// # Safety
///
/// All-zero bytes must be a valid `T`.
unsafe fn zeroed<T>(platform: &impl Platform, may_sleep: bool) -> Option<NonNull<T>> {
    Some(platform.allocate(Layout::new::<T>(), may_sleep)?.cast())
}

/// Free a value, if there is one.
///
/// # Safety
///
/// The value must come from [`zeroed`], and no thread may use it any more.
unsafe fn free<T>(platform: &impl Platform, value: *mut T) {
    if let Some(value) = NonNull::new(value) {
        // SAFETY: By the contract of this function.
        unsafe { platform.free(value.cast(), Layout::new::<T>()) };
    }
}

/// Free the histograms for which a vCPU's ledger had no room.
///
/// # Safety
///
/// Nobody may write or copy the ledger any more, and the [`Supply`](super::ledger::Supply) that gave
/// them must take memory from the same platform.
unsafe fn free_more(platform: &impl Platform, member: &Member) {
    // SAFETY: By the contract of this function.
    if let Some(more) = unsafe { member.ledger.take_more() } {
        // SAFETY: As above.
        unsafe { free(platform, more.as_ptr()) };
    }
}

/// The state, while the lock is held.
struct Locked<'a, P: Platform> {
    registry: &'a Registry<P>,
}

impl<P: Platform> Deref for Locked<'_, P> {
    type Target = State;

    fn deref(&self) -> &State {
        // SAFETY: The lock is held, so no other thread has a reference.
        unsafe { &*self.registry.state.as_ref().get() }
    }
}

impl<P: Platform> DerefMut for Locked<'_, P> {
    fn deref_mut(&mut self) -> &mut State {
        // SAFETY: As above.
        unsafe { &mut *self.registry.state.as_ref().get() }
    }
}

impl<P: Platform> Drop for Locked<'_, P> {
    fn drop(&mut self) {
        // SAFETY: The lock was taken when this was created.
        unsafe { self.registry.platform.unlock() };
    }
}

/// Objects that placing a vCPU may need, allocated before the lock is taken.
struct Spare {
    vm: *mut Vm,
    group: *mut Group,
    /// Sums of the VM, of its first group and of its new group, for a VM that gets its second
    /// group.
    rows: *mut Rows,
    first_sums: *mut GroupSums,
    sums: *mut GroupSums,
    tables: *mut Tables,
    /// Set if there was no memory for tables: the vCPU gets none.
    no_tables: bool,
}

/// An object that placing a vCPU still needs.
#[derive(Clone, Copy)]
enum Lacking {
    Vm,
    Group,
    Sums,
    Tables,
}

impl<P: Platform> Registry<P> {
    /// Create a registry without vCPUs.
    ///
    /// # Errors
    ///
    /// [`NoMemory`] when the platform has none.
    pub fn new(platform: P, settings: Settings) -> Result<Self, NoMemory> {
        let max_marks = settings.max_vcpus.max(MARKS);
        // At most half of the places are taken, so a look-up finds its key, or finds that it is
        // missing, within a place or two.
        let places = |keys: usize| keys.saturating_mul(2).next_power_of_two();
        // SAFETY: All-zero bytes are an empty place of a table.
        let vcpus = unsafe {
            Array::new(
                &platform,
                places(settings.max_vcpus.saturating_add(max_marks)),
            )?
        };
        // SAFETY: As above.
        let vms = unsafe { Array::new(&platform, places(settings.max_vcpus)) };
        // SAFETY: All-zero bytes are a state without a vCPU.
        let state = unsafe { zeroed::<UnsafeCell<State>>(&platform, true) };
        let host = match settings.host_scope {
            // SAFETY: All-zero bytes are sums over no vCPU that were never renewed.
            true => unsafe { zeroed::<answer::HostSums>(&platform, true) },
            false => Some(NonNull::dangling()),
        };
        let (Ok(vms), Some(state), Some(host)) = (&vms, state, host) else {
            // SAFETY: Allocated above, and not used.
            unsafe {
                vcpus.free(&platform);
                if let Ok(vms) = vms {
                    vms.free(&platform);
                }
                free(&platform, state.map_or(null_mut(), NonNull::as_ptr));
                if let (true, Some(host)) = (settings.host_scope, host) {
                    free(&platform, host.as_ptr());
                }
            }
            return Err(NoMemory);
        };
        Ok(Self {
            loaded: platform.now(),
            platform,
            settings,
            vcpus,
            vms: Array {
                first: vms.first,
                count: vms.count,
            },
            max_marks,
            unmarked: AtomicBool::new(false),
            latest_size: AtomicUsize::new(snapshot::size_for(8, 256)),
            switches: AtomicU32::new(0),
            state,
            host: AtomicPtr::new(match settings.host_scope {
                true => host.as_ptr(),
                false => null_mut(),
            }),
        })
    }

    /// Return the CPUID leaves that are answered.
    #[inline(always)]
    pub fn leaves(&self) -> &Leaves {
        &self.settings.leaves
    }

    /// Return true if guests read the sums of the whole host.
    pub fn host_scope(&self) -> bool {
        self.settings.host_scope
    }

    /// Return the maximum number of vCPUs metered at a time.
    pub fn max_vcpus(&self) -> usize {
        self.settings.max_vcpus
    }

    /// Return the platform.
    pub fn platform(&self) -> &P {
        &self.platform
    }

    /// Allocate tables for a vCPU that have not begun, or return `None` when there is no memory.
    fn new_tables(&self, may_sleep: bool) -> Option<NonNull<Tables>> {
        // SAFETY: All-zero bytes are tables that have not begun.
        let tables = unsafe { zeroed::<Tables>(&self.platform, may_sleep) }?;
        // SAFETY: The memory is valid, and no other thread knows it yet.
        let new = unsafe { tables.as_ref() };
        new.prepare();
        new.slow().set_limit(self.settings.slow_ticks);
        Some(tables)
    }

    fn lock(&self) -> Locked<'_, P> {
        self.platform.lock();
        Locked { registry: self }
    }

    fn table(&self) -> HashTable<'_> {
        HashTable::new(self.vcpus.as_slice())
    }

    fn vm_table(&self) -> HashTable<'_> {
        HashTable::new(self.vms.as_slice())
    }

    /// Return the member at a value of the table.
    fn member_at(&self, value: usize) -> Option<&Member> {
        if value <= UNMETERED {
            return None;
        }
        // SAFETY: By the invariant of `Registry` a member is there. The callers hold its vCPU, so
        // it is not released while they use it.
        Some(unsafe { &*(value as *const Member) })
    }

    /// Return a metered vCPU that the caller holds and whose ledger has begun. Does not register
    /// it.
    #[inline]
    pub fn metered(&self, key: usize) -> Option<&Member> {
        let member = self.member_at(self.table().get(key))?;
        member.ledger.has_begun().then_some(member)
    }

    /// Return the vCPU that the caller holds, at an event. Registers a new vCPU, in `phase` from
    /// `now` on. Returns `None` when the vCPU is unmetered, or the reason if that is decided now.
    #[inline]
    pub fn at_event(
        &self,
        key: usize,
        now: u64,
        phase: Phase,
        newcomer: impl FnOnce() -> Newcomer,
    ) -> Result<Option<&Member>, Refused> {
        let value = match self.table().get(key) {
            0 => self.register(key, newcomer(), false)?,
            value => value,
        };
        let Some(member) = self.member_at(value) else {
            return Ok(None);
        };
        if !member.ledger.has_begun() {
            member.ledger.begin(now, phase);
        }
        Ok(Some(member))
    }

    /// Register a vCPU that KVM is creating, before its first event. KVM releases it in any case,
    /// by [`Self::destroy`].
    ///
    /// # Errors
    ///
    /// Reason why the vCPU will run unmetered.
    pub fn register_new(&self, key: usize, newcomer: Newcomer) -> Result<(), Refused> {
        match self.table().get(key) {
            0 => self.register(key, newcomer, true).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Register a vCPU that the table does not have, or mark it as unmetered. Return its value in
    /// the table.
    #[cold]
    #[inline(never)]
    fn register(&self, key: usize, newcomer: Newcomer, may_sleep: bool) -> Result<usize, Refused> {
        // The thread that held a vCPU when it could not be marked set this. The next thread that
        // holds the vCPU sees that, by KVM's lock of the vCPU.
        if self.unmarked.load(Relaxed) && !newcomer.is_new {
            return Ok(UNMETERED);
        }
        let refused = match newcomer.owner {
            None => Refused::Unreadable,
            Some(owner) => match self.admit(key, &owner, newcomer.polled, may_sleep) {
                Ok(member) => return Ok(member.as_ptr() as usize),
                Err(refused) => refused,
            },
        };
        let mut state = self.lock();
        let marked = state.marked < self.max_marks && self.table().insert(key, UNMETERED).is_ok();
        if marked {
            state.marked = state.marked.wrapping_add(1);
        } else if may_sleep {
            // Nothing records that it was counted, so its first load must count it.
            return Err(refused);
        } else {
            self.unmarked.store(true, Relaxed);
        }
        state.unmetered = state.unmetered.wrapping_add(1);
        drop(state);
        Err(refused)
    }

    /// Create a vCPU's ledger, and place it in its VM.
    fn admit(
        &self,
        key: usize,
        owner: &Owner,
        polled: u64,
        may_sleep: bool,
    ) -> Result<NonNull<Member>, Refused> {
        let mut state = self.lock();
        if state.metered >= self.settings.max_vcpus {
            return Err(Refused::NoRoom);
        }
        state.metered = state.metered.wrapping_add(1);
        drop(state);

        let result = self.allocate_and_place(key, owner, polled, may_sleep);
        if result.is_err() {
            let mut state = self.lock();
            state.metered = state.metered.wrapping_sub(1);
        }
        result
    }

    fn allocate_and_place(
        &self,
        key: usize,
        owner: &Owner,
        polled: u64,
        may_sleep: bool,
    ) -> Result<NonNull<Member>, Refused> {
        // SAFETY: All-zero bytes are a member without a place.
        let member = unsafe { zeroed::<Member>(&self.platform, may_sleep) };
        let member = member.ok_or(Refused::NoMemory)?;
        // SAFETY: No other thread knows it yet.
        let new = unsafe { &mut *member.as_ptr() };
        new.holders = AtomicUsize::new(1);
        new.key = key;
        new.polled = polled.into();
        new.identity = Identity {
            vm: 0,
            name: owner.name,
            pid: owner.pid,
            vcpu: owner.vcpu,
        };
        let mut spare = Spare::none();
        // A new VM lacks the VM itself and a group; a growing VM lacks a group and sums; and a vCPU
        // may lack tables.
        let mut result = Err(Refused::NoMemory);
        for _ in 0..6 {
            let placed = self.lock().place(self, member, owner.vm, &mut spare);
            match placed {
                Ok(()) => {
                    result = Ok(member);
                    break;
                }
                Err(lacking) if spare.allocate(self, lacking, may_sleep).is_none() => break,
                Err(_) => {}
            }
        }
        // SAFETY: The objects that are left were not placed.
        unsafe { spare.free(&self.platform) };
        if result.is_err() {
            // SAFETY: It was not placed either.
            unsafe { free(&self.platform, member.as_ptr()) };
        }
        result
    }

    /// Release a vCPU that KVM destroys and will not load again. `polled` is the time that KVM
    /// polled for it in all, in ns.
    pub fn destroy(&self, key: usize, polled: u64) {
        self.platform.forget(key);
        let mut state = self.lock();
        let value = self.table().remove(key);
        if value == UNMETERED {
            state.marked = state.marked.wrapping_sub(1);
        }
        let Some(member) = self.member_at(value) else {
            return;
        };
        let before = member.polled.load(Relaxed);
        member.polled.store(polled.wrapping_sub(before), Relaxed);
        member.gone.store(true, Relaxed);
        if member.ledger.has_begun() {
            state.fold(member);
        }
        state.metered = state.metered.wrapping_sub(1);
        state.await_gone(member);
        let empty = state.remove(self, member);
        drop(state);
        // SAFETY: This was the VM's only vCPU, and the VM is in no list any more, so no thread can
        // find it.
        unsafe { self.free_vm(empty) };
        self.let_go(member);
    }

    /// Release one hold on a vCPU. The last one retires it.
    fn let_go(&self, member: &Member) {
        // ORDERING: The thread that retires it comes after all that other threads did with it.
        if member.holders.fetch_sub(1, Release) != 1 {
            return;
        }
        fence(Acquire);
        self.retire_tables(member);
        // SAFETY: KVM has destroyed the vCPU, and nobody holds it who could copy it. Queries do not
        // look at histograms.
        unsafe { free_more(&self.platform, member) };
        let room = NonNull::from(&member.retired).cast();
        let memory = member.address().cast();
        // SAFETY: The vCPU is in no list any more, and no thread holds it; `retire` waits for
        // queries that still read it. The room is for this alone.
        unsafe { self.platform.retire(memory, Layout::new::<Member>(), room) };
    }

    /// Free a VM with its groups.
    ///
    /// # Safety
    ///
    /// No thread may use it any more.
    unsafe fn free_vm(&self, vm: *mut Vm) {
        // SAFETY: By the contract of this function.
        let Some(it) = (unsafe { vm.as_ref() }) else {
            return;
        };
        let mut group = it.groups.load(Relaxed);
        // SAFETY: As above; a group belongs to one VM.
        while let Some(it) = unsafe { group.as_ref() } {
            let next = it.next.load(Relaxed);
            // SAFETY: As above.
            unsafe {
                free(&self.platform, it.sums.load(Relaxed));
                free(&self.platform, group);
            }
            group = next;
        }
        // SAFETY: As above.
        unsafe {
            free(&self.platform, it.sums.load(Relaxed));
            free(&self.platform, vm);
        }
    }

    /// Move all ledgers to a restarted clock, which reads `now`; the old clock read `then`.
    ///
    /// No other CPU may run meanwhile. This holds the lock for as many steps as there are vCPUs.
    pub fn rebase(&self, then: u64, now: u64) {
        let state = self.lock();
        state.each(|member| {
            if member.ledger.has_begun() {
                member.ledger.rebase(then, now);
            }
        });
    }
}

impl<P: Platform> Drop for Registry<P> {
    fn drop(&mut self) {
        // SAFETY: No other thread has a reference to the registry, nor to what it holds.
        unsafe {
            let mut vm = self
                .state
                .as_ref()
                .get()
                .as_ref()
                .map_or(null_mut(), |it| it.first);
            while let Some(it) = vm.as_ref() {
                let next = (*it.links.get()).next;
                let mut group = it.groups.load(Relaxed);
                while let Some(it) = group.as_ref() {
                    for member in &it.members {
                        let member = member.load(Relaxed);
                        if let Some(it) = member.as_ref() {
                            free(&self.platform, it.ledger.set_tables(null_mut()));
                            free_more(&self.platform, it);
                        }
                        free(&self.platform, member);
                    }
                    group = it.next.load(Relaxed);
                }
                self.free_vm(vm);
                vm = next;
            }
            free(&self.platform, self.state.as_ptr());
            free(&self.platform, self.host.load(Relaxed));
            self.vms.free(&self.platform);
            self.vcpus.free(&self.platform);
        }
    }
}

impl Vm {
    /// Call `see` for each vCPU of this VM.
    ///
    /// # Safety
    ///
    /// The caller must hold the lock, or have the VM to itself.
    unsafe fn each(&self, mut see: impl FnMut(&Member)) {
        let mut group = self.groups.load(Relaxed);
        // SAFETY: A group stays for as long as its VM, which the caller keeps.
        while let Some(it) = unsafe { group.as_ref() } {
            let next = it.next.load(Relaxed);
            // SAFETY: By the contract of this function.
            unsafe { it.each(&mut see) };
            group = next;
        }
    }
}

impl State {
    /// Call `see` for each metered vCPU.
    fn each(&self, mut see: impl FnMut(&Member)) {
        let mut vm = self.first;
        // SAFETY: A VM in the list stays while the lock is held, and the owner of a reference to
        // the state holds it.
        while let Some(it) = unsafe { vm.as_ref() } {
            // SAFETY: As above.
            unsafe {
                it.each(&mut see);
                vm = (*it.links.get()).next;
            }
        }
    }

    /// Place a vCPU in its VM, and add it to the table.
    ///
    /// # Errors
    ///
    /// The object that is lacking. Nothing has changed then.
    fn place<P: Platform>(
        &mut self,
        registry: &Registry<P>,
        member: NonNull<Member>,
        key: usize,
        spare: &mut Spare,
    ) -> Result<(), Lacking> {
        registry.platform.step();
        let known = registry.vm_table().get(key) as *mut Vm;
        let vm = if known.is_null() { spare.vm } else { known };
        // SAFETY: By the invariant of `Registry` a VM is there; or it is the spare one.
        let Some(it) = (unsafe { vm.as_ref() }) else {
            return Err(Lacking::Vm);
        };
        // SAFETY: The lock is held.
        let links = unsafe { &mut *it.links.get() };
        if self.wants_tables && spare.tables.is_null() && !spare.no_tables {
            return Err(Lacking::Tables);
        }
        let group = if links.vacant.is_null() {
            self.add_group(registry, vm, links, spare)?
        } else {
            links.vacant
        };
        // SAFETY: A group stays for as long as its VM.
        let Some(group) = (unsafe { group.as_ref() }) else {
            return Err(Lacking::Group);
        };

        self.serial = self.serial.wrapping_add(1);
        let number = if known.is_null() {
            self.number.wrapping_add(1)
        } else {
            it.number
        };
        let place = group.taken.load(Relaxed).trailing_ones();
        let tables = match self.wants_tables {
            true => core::mem::replace(&mut spare.tables, null_mut()),
            false => null_mut(),
        };
        // SAFETY: No other thread knows the vCPU yet. Its tables stay until they are retired.
        unsafe {
            let new = &mut *member.as_ptr();
            new.ledger.set_tables(tables);
            new.serial = self.serial;
            new.identity.vm = number;
            new.group = core::ptr::from_ref(group).cast_mut();
            new.place = place;
        }
        // SAFETY: As above.
        let vcpu = unsafe { member.as_ref() }.key;
        // INVARIANT: The member is placed right below. There is room, because the table has twice
        // as many places as there can be keys.
        let _ = registry.table().insert(vcpu, member.as_ptr() as usize);
        group.take(place, member);
        if group.is_full() {
            // SAFETY: The lock is held.
            links.vacant = unsafe { core::mem::replace(&mut *group.next_vacant.get(), null_mut()) };
        }
        links.members = links.members.wrapping_add(1);
        if known.is_null() {
            self.add_vm(registry, vm, number, key);
            spare.vm = null_mut();
        }
        Ok(())
    }

    /// Add a group to a VM.
    fn add_group<P: Platform>(
        &mut self,
        registry: &Registry<P>,
        vm: *mut Vm,
        links: &mut Links,
        spare: &mut Spare,
    ) -> Result<*mut Group, Lacking> {
        registry.platform.step();
        // SAFETY: The caller has a reference to the VM; no other thread knows the spare group.
        let (Some(it), Some(new)) = (unsafe { (vm.as_ref(), spare.group.as_mut()) }) else {
            return Err(Lacking::Group);
        };
        // SAFETY: A group stays for as long as its VM.
        if let Some(last) = unsafe { links.last.as_ref() } {
            if spare.sums.is_null() {
                return Err(Lacking::Sums);
            }
            new.number = last.number.wrapping_add(1);
            if it.sums.load(Relaxed).is_null() {
                if spare.rows.is_null() || spare.first_sums.is_null() {
                    return Err(Lacking::Sums);
                }
                last.sums.store(
                    core::mem::replace(&mut spare.first_sums, null_mut()),
                    Release,
                );
                it.sums
                    .store(core::mem::replace(&mut spare.rows, null_mut()), Release);
            }
            new.sums = core::mem::replace(&mut spare.sums, null_mut()).into();
        }
        new.vm = vm;
        let group = core::mem::replace(&mut spare.group, null_mut());
        // SAFETY: As above.
        // ORDERING: A thread that finds the group finds what was written to it.
        match unsafe { links.last.as_ref() } {
            Some(last) => last.next.store(group, Release),
            None => it.groups.store(group, Release),
        }
        links.last = group;
        links.vacant = group;
        self.groups = self.groups.wrapping_add(1);
        Ok(group)
    }

    /// Add a VM to the list and to the table of VMs.
    fn add_vm<P: Platform>(
        &mut self,
        registry: &Registry<P>,
        vm: *mut Vm,
        number: u64,
        key: usize,
    ) {
        // SAFETY: No other thread knows the VM yet.
        let Some(it) = (unsafe { vm.as_mut() }) else {
            return;
        };
        it.key = key;
        it.number = number;
        it.links.get_mut().previous = self.last;
        // INVARIANT: The VM has a member, and is in the list from here on. There is room, because
        // no more VMs than vCPUs are registered.
        let _ = registry.vm_table().insert(key, vm as usize);
        // SAFETY: A VM in the list stays while the lock is held.
        match unsafe { self.last.as_ref() } {
            // SAFETY: As above.
            Some(last) => unsafe { (*last.links.get()).next = vm },
            None => self.first = vm,
        }
        self.last = vm;
        self.number = number;
    }

    /// Remove a vCPU from its VM. If that has no other vCPU, remove the VM from the list and return
    /// it.
    fn remove<P: Platform>(&mut self, registry: &Registry<P>, member: &Member) -> *mut Vm {
        registry.platform.step();
        // SAFETY: The group of a vCPU, and its VM, stay for as long as the vCPU is placed.
        let Some((group, vm)) = (unsafe {
            let group = member.group.as_ref();
            group.and_then(|group| Some((group, group.vm.as_ref()?)))
        }) else {
            return null_mut();
        };
        // SAFETY: The lock is held.
        let links = unsafe { &mut *vm.links.get() };
        if group.is_full() {
            // SAFETY: As above.
            unsafe { *group.next_vacant.get() = links.vacant };
            links.vacant = member.group;
        }
        group.leave(member.place);
        links.members = links.members.wrapping_sub(1);
        if links.members != 0 {
            return null_mut();
        }
        for walk in &mut self.walks {
            walk.step_over(vm, links.next);
        }
        // SAFETY: VMs in the list stay while the lock is held.
        match unsafe { links.previous.as_ref() } {
            // SAFETY: As above.
            Some(previous) => unsafe { (*previous.links.get()).next = links.next },
            None => self.first = links.next,
        }
        // SAFETY: As above.
        match unsafe { links.next.as_ref() } {
            // SAFETY: As above.
            Some(next) => unsafe { (*next.links.get()).previous = links.previous },
            None => self.last = links.previous,
        }
        // SAFETY: Groups of a VM are numbered in order, so the last number gives the count.
        let groups = unsafe { links.last.as_ref() }.map_or(0, |last| last.number as usize);
        self.groups = self.groups.wrapping_sub(groups.wrapping_add(1));
        registry.vm_table().remove(vm.key);
        group.vm
    }

    /// Add the numbers of a vCPU that goes to the totals. No thread writes its ledger any more, so
    /// the copy takes one attempt.
    fn fold(&mut self, member: &Member) {
        if member.copying(&mut self.copy, None).try_copy() {
            self.copy.polled = member.polled.load(Relaxed);
            self.gone.fold(&self.copy);
        }
    }
}

impl Spare {
    const fn none() -> Self {
        Self {
            vm: null_mut(),
            group: null_mut(),
            rows: null_mut(),
            first_sums: null_mut(),
            sums: null_mut(),
            tables: null_mut(),
            no_tables: false,
        }
    }

    /// Allocate the object that is lacking, or return `None` when there is no memory.
    fn allocate<P: Platform>(
        &mut self,
        registry: &Registry<P>,
        lacking: Lacking,
        may_sleep: bool,
    ) -> Option<()> {
        let platform = &registry.platform;
        // SAFETY: All-zero bytes are valid for all of them, as their types say.
        unsafe {
            match lacking {
                Lacking::Vm => self.vm = zeroed(platform, may_sleep)?.as_ptr(),
                Lacking::Group => self.group = zeroed(platform, may_sleep)?.as_ptr(),
                Lacking::Sums => {
                    self.sums = zeroed(platform, may_sleep)?.as_ptr();
                    self.first_sums = zeroed(platform, may_sleep)?.as_ptr();
                    self.rows = zeroed(platform, may_sleep)?.as_ptr();
                }
                Lacking::Tables => match registry.new_tables(may_sleep) {
                    Some(tables) => self.tables = tables.as_ptr(),
                    None => self.no_tables = true,
                },
            }
        }
        Some(())
    }

    /// # Safety
    ///
    /// The objects that it holds must not be placed.
    unsafe fn free(self, platform: &impl Platform) {
        // SAFETY: By the contract of this function.
        unsafe {
            free(platform, self.vm);
            free(platform, self.group);
            free(platform, self.rows);
            free(platform, self.first_sums);
            free(platform, self.sums);
            free(platform, self.tables);
        }
    }
}
