// SPDX-License-Identifier: GPL-2.0

//! Walks over all vCPUs, a few at a time: for snapshots, and for the totals at the end.
//!
//! A walk visits each vCPU that exists when it begins, once. It keeps a cursor, so it never starts
//! over. It takes holds on the next vCPUs with the lock held, and reads them without the lock. A
//! vCPU that goes before the walk has reached it is kept for the end of the walk.

use core::{
    alloc::Layout,
    ptr::{null_mut, NonNull},
    sync::atomic::Ordering::{Acquire, Relaxed},
};

use crate::meter::{
    ledger::{Copying, LedgerCopy, Totals, TRIES},
    snapshot::{BufferTooSmall, Encoder, HostHeader},
    tables::{Tables, TablesCopy},
};

use super::{
    vm::{Group, Member, Vm},
    Locked, Platform, Registry, State,
};

/// Maximum number of vCPUs that a walk takes holds on before it releases the lock.
pub const AT_A_TIME: usize = 16;

/// Maximum number of steps of a walk, from one group or vCPU to the next, before it releases the
/// lock. A VM that once had many vCPUs may have mostly empty groups.
const STEPS_AT_A_TIME: usize = 64;

/// Maximum number of interrupts sent for one copy. One fails when it comes in the middle of a
/// vCPU's load or put, some twenty instructions, which no guest can aim at; or when the vCPU has
/// just moved.
const INTERRUPTS: u32 = 16;

/// Kind of walk: for snapshots and totals.
pub(super) const SNAPSHOT: usize = 0;
/// Kind of walk: to renew the host's sums.
pub(super) const HOST: usize = 1;

/// Progress of a walk. All-zero bytes are an inactive walk.
#[derive(Debug)]
pub(super) struct Walk {
    /// Set while the walk is under way.
    active: bool,
    /// Number of the latest vCPU when the walk began.
    newest: u64,
    /// Next VM, group and place.
    vm: *mut Vm,
    group: *mut Group,
    place: u32,
    /// vCPUs that went before the walk has reached them.
    gone: *mut Member,
}

/// A vCPU that a walk has a hold on, and the time that KVM polled for it, in ns.
type Held<'a> = (&'a Member, u64);

/// The vCPUs of one step of a walk.
type Batch<'a> = [Option<Held<'a>>; AT_A_TIME];

/// Visit of a walk.
pub(super) enum WalkItem<'a, 's> {
    /// The state as the walk begins, with the lock held.
    Start(&'s State),
    /// A vCPU, and the time that KVM polled for it, in ns.
    Vcpu(&'a Member, u64),
}

/// Buffer for a walk's copies. At most one walk of each kind may be under way.
#[derive(Debug)]
pub struct Walker {
    copy: LedgerCopy,
    tables: TablesCopy,
}

/// Options of a snapshot's tables.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableOptions {
    /// Include the guest's code, by its addresses.
    pub code: bool,
}

/// Reason why there is no snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSnapshot {
    /// The buffer is too small.
    BufferTooSmall(BufferTooSmall),
    /// A vCPU could not be copied: it had a transition at each attempt.
    CopyFailed,
}

impl Walk {
    /// Move on to `next`, the VM behind one that is removed.
    pub(super) fn step_over(&mut self, vm: &Vm, next: *mut Vm) {
        if core::ptr::eq(self.vm, vm) {
            self.vm = next;
            self.group = null_mut();
            self.place = 0;
        }
    }

    /// Return true if the walk has yet to reach a vCPU. The caller holds the lock.
    fn awaits(&self, member: &Member) -> bool {
        if !self.active || member.serial > self.newest {
            return false;
        }
        // SAFETY: VMs and groups of placed vCPUs stay while the lock is held.
        unsafe {
            let (Some(at), Some(its)) = (self.vm.as_ref(), member.group.as_ref()) else {
                return false;
            };
            let number = its.vm.as_ref().map_or(0, |vm| vm.number);
            let group = self.group.as_ref().map_or(0, |group| group.number);
            (number, its.number, member.place) >= (at.number, group, self.place)
        }
    }
}

impl Walker {
    /// Create the buffer for a walk.
    pub const fn new() -> Self {
        Self {
            copy: LedgerCopy::new(),
            tables: TablesCopy::new(),
        }
    }
}

impl Default for Walker {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// Begin a walk of a kind, [`SNAPSHOT`] or [`HOST`].
    pub(super) fn begin_walk(&mut self, kind: usize) {
        let (newest, vm) = (self.serial, self.first);
        if let Some(walk) = self.walks.get_mut(kind) {
            *walk = Walk {
                active: true,
                newest,
                vm,
                group: null_mut(),
                place: 0,
                gone: null_mut(),
            };
        }
    }

    /// End a walk. Return the vCPUs that it still awaits; they belong to the caller.
    fn end_walk(&mut self, kind: usize) -> *mut Member {
        let Some(walk) = self.walks.get_mut(kind) else {
            return null_mut();
        };
        walk.active = false;
        core::mem::replace(&mut walk.gone, null_mut())
    }

    /// Hand a vCPU that goes to the walks that await it.
    pub(super) fn await_gone(&mut self, member: &Member) {
        for (kind, walk) in self.walks.iter_mut().enumerate() {
            if !walk.awaits(member) {
                continue;
            }
            // SAFETY: The lock is held.
            if let Some(next) = unsafe { (*member.awaited.get()).get_mut(kind) } {
                member.holders.fetch_add(1, Relaxed);
                *next = core::mem::replace(&mut walk.gone, member.address().as_ptr());
            }
        }
    }
}

impl<P: Platform> Locked<'_, P> {
    /// Take holds on the next few vCPUs of a walk. Return true if there may be more.
    fn walk_on<'a>(&mut self, kind: usize, batch: &mut Batch<'a>) -> bool {
        let platform = &self.registry.platform;
        let Some(walk) = self.walks.get_mut(kind) else {
            return false;
        };
        let mut places = batch.iter_mut();
        for _ in 0..STEPS_AT_A_TIME {
            platform.step();
            // SAFETY: A VM in the list stays while the lock is held, and a walk moves on when its
            // VM is removed.
            let Some(vm) = (unsafe { walk.vm.as_ref() }) else {
                return false;
            };
            if walk.group.is_null() {
                walk.group = vm.groups.load(Acquire);
            }
            // SAFETY: A group stays for as long as its VM.
            let Some(group) = (unsafe { walk.group.as_ref() }) else {
                return false;
            };
            let ahead = u32::MAX.checked_shl(walk.place).unwrap_or(0);
            let place = (group.taken.load(Relaxed) & ahead).trailing_zeros();
            let Some(member) = group.members.get(place as usize) else {
                // No vCPU is ahead in this group.
                walk.group = group.next.load(Acquire);
                walk.place = 0;
                if walk.group.is_null() {
                    // SAFETY: The lock is held.
                    walk.vm = unsafe { (*vm.links.get()).next };
                }
                continue;
            };
            // SAFETY: A placed vCPU stays while the lock is held, and as long as there is a hold on
            // it.
            let member = unsafe { member.load(Acquire).as_ref() };
            if let Some(member) = member.filter(|it| it.serial <= walk.newest) {
                let Some(to) = places.next() else {
                    return true;
                };
                member.holders.fetch_add(1, Relaxed);
                let before = member.polled.load(Relaxed);
                let polled = platform.polled(member.key).wrapping_sub(before);
                *to = Some((member, polled));
            }
            walk.place = place.wrapping_add(1);
        }
        true
    }
}

impl<P: Platform> Registry<P> {
    /// Call `see` for the state at the moment that the walk begins, then for each vCPU that exists
    /// at that moment. Not called with the lock held.
    pub(super) fn walk<'a>(&'a self, kind: usize, mut see: impl FnMut(WalkItem<'a, '_>)) {
        let mut state = self.lock();
        see(WalkItem::Start(&state));
        state.begin_walk(kind);
        drop(state);
        loop {
            let mut batch: Batch<'a> = [None; AT_A_TIME];
            let more = self.lock().walk_on(kind, &mut batch);
            for (member, polled) in batch.into_iter().flatten() {
                see(WalkItem::Vcpu(member, polled));
                self.let_go(member);
            }
            if !more {
                break;
            }
            self.platform.pause();
        }
        let mut gone = self.lock().end_walk(kind);
        // SAFETY: The walk holds each of them, and owns the list from here on.
        while let Some(member) = unsafe { gone.as_ref() } {
            // SAFETY: As above.
            gone = unsafe { (*member.awaited.get()).get(kind).copied() }.unwrap_or(null_mut());
            see(WalkItem::Vcpu(member, member.polled.load(Relaxed)));
            self.let_go(member);
            self.platform.pause();
        }
    }

    /// Copy the ledger of a vCPU that the caller has a hold on. Return the failed attempts and the
    /// interrupts sent for it, or `None` when it could not be copied.
    pub fn copy(&self, member: &Member, out: &mut LedgerCopy) -> Option<(u32, u32)> {
        self.make_copy(member, member.copying(out, None))
    }

    /// Return the CPU that a vCPU was loaded on last. The caller has a hold on the vCPU.
    fn cpu_of(&self, member: &Member) -> Option<u32> {
        let _state = self.lock();
        match member.gone.load(Relaxed) {
            true => None,
            false => self.platform.cpu(member.key),
        }
    }

    /// Copy a vCPU that the caller has a hold on, as [`Self::copy`].
    fn make_copy(&self, member: &Member, mut copying: Copying<'_>) -> Option<(u32, u32)> {
        let tries = self.settings.copy_tries;
        if let Some(failed) = copying.copy(tries) {
            return Some((failed, 0));
        }
        for sent in 0..INTERRUPTS {
            let copied = match self.cpu_of(member) {
                Some(cpu) => self.platform.copy_on(cpu, &mut copying),
                // No thread writes it, or none that does so as fast.
                None => copying.copy(TRIES).is_some(),
            };
            if copied {
                return Some((tries, sent.wrapping_add(1)));
            }
        }
        None
    }

    /// Write a snapshot into `buffer`. Return its size in bytes. `gone` is a buffer for the totals,
    /// empty. `host` describes the host and the module at this moment.
    ///
    /// The snapshot has the vCPUs that exist when it begins, each as of the moment when it is
    /// visited. A vCPU that goes in the meantime is included, and joins the totals of the next
    /// snapshot: so no vCPU is in both or in neither.
    ///
    /// # Errors
    ///
    /// When the buffer is too small, or a vCPU could not be copied.
    pub fn snapshot(
        &self,
        walker: &mut Walker,
        buffer: &mut [u8],
        gone: &mut Totals,
        host: HostHeader,
        options: TableOptions,
    ) -> Result<usize, NoSnapshot> {
        let mut encoder = Encoder::new(buffer, host);
        let mut unmetered = 0;
        let mut wants_tables = false;
        let mut without_tables = 0_u32;
        let mut busy = false;
        self.walk(SNAPSHOT, |seen| match seen {
            WalkItem::Start(state) => {
                gone.add(&state.gone);
                unmetered = state.unmetered;
                wants_tables = state.wants_tables;
            }
            WalkItem::Vcpu(member, polled) => {
                let Walker { copy, tables } = &mut *walker;
                // SAFETY: There is a hold on the vCPU. Otherwise only `take_tables` takes its
                // tables away, and that is a walk of the same kind.
                let its_tables = unsafe { member.ledger.tables() };
                tables.clear();
                let copying = member.copying(copy, its_tables.map(|it| (it, &mut *tables)));
                if self.make_copy(member, copying).is_none() {
                    busy = true;
                } else if !copy.is_empty() {
                    copy.polled = polled;
                    if let Some(its_tables) = its_tables {
                        its_tables.slow().end_window_after(copy.last);
                    }
                    encoder.vcpu(&member.identity, copy);
                    encoder.tables(copy, tables, options.code);
                    without_tables = without_tables.wrapping_add(its_tables.is_none().into());
                }
            }
        });
        if wants_tables {
            encoder.set_details_on(without_tables);
        }
        let result = encoder.finish(gone, unmetered);
        let (Ok(size) | Err(BufferTooSmall { needed: size })) = result;
        self.latest_size.store(size, Relaxed);
        match busy {
            true => Err(NoSnapshot::CopyFailed),
            false => result.map_err(NoSnapshot::BufferTooSmall),
        }
    }

    /// Give tables to all vCPUs, including those to come. A vCPU has none if there is no memory for
    /// them. May sleep. The walker proves that no snapshot is being taken.
    ///
    /// From now on, each transition of a vCPU that has tables must be reported together with them.
    pub fn give_tables(&self, _walker: &mut Walker) {
        self.want_tables(true);
        self.walk(SNAPSHOT, |seen| {
            let WalkItem::Vcpu(member, _) = seen else {
                return;
            };
            // SAFETY: As in `snapshot`.
            if unsafe { member.ledger.tables() }.is_some() {
                return;
            }
            if let Some(tables) = self.new_tables(true) {
                // SAFETY: They stay until they are retired.
                unsafe { member.ledger.set_tables(tables.as_ptr()) };
            }
        });
    }

    /// Record whether new vCPUs get tables, and count the changes for guests.
    fn want_tables(&self, wants: bool) {
        let mut state = self.lock();
        if state.wants_tables != wants {
            state.wants_tables = wants;
            let switches = self.switches.load(Relaxed);
            self.switches.store(switches.wrapping_add(1), Relaxed);
        }
    }

    /// Ask all vCPUs for rings that are not frozen.
    pub fn thaw_rings(&self, _walker: &mut Walker) {
        self.walk(SNAPSHOT, |seen| {
            if let WalkItem::Vcpu(member, _) = seen {
                // SAFETY: As in `snapshot`.
                if let Some(tables) = unsafe { member.ledger.tables() } {
                    tables.slow().ask();
                }
            }
        });
    }

    /// Take the tables from all vCPUs, while transitions are still reported with the tables of
    /// those that have some. Transitions under way are waited for before memory is freed.
    pub fn take_tables(&self, _walker: &mut Walker) {
        self.want_tables(false);
        self.walk(SNAPSHOT, |seen| {
            if let WalkItem::Vcpu(member, _) = seen {
                self.retire_tables(member);
            }
        });
    }

    /// Take the tables from a vCPU that the caller has a hold on.
    pub(super) fn retire_tables(&self, member: &Member) {
        // SAFETY: The returned tables are retired below.
        let tables = unsafe { member.ledger.set_tables(null_mut()) };
        let Some(tables) = NonNull::new(tables) else {
            return;
        };
        // SAFETY: They stay until they are retired.
        let room = NonNull::from(unsafe { tables.as_ref() }.room()).cast();
        // SAFETY: Only a transition that began before can still find them, and the room is for this
        // alone.
        unsafe {
            self.platform
                .retire(tables.cast(), Layout::new::<Tables>(), room);
        };
    }

    /// Estimate the size of the next snapshot, in bytes. Adds an eighth to the latest size to leave
    /// room for new vCPUs.
    pub fn estimated_size(&self) -> usize {
        let latest = self.latest_size.load(Relaxed);
        latest.saturating_add(latest / 8)
    }

    /// Return the clock when the registry was created.
    pub fn loaded(&self) -> u64 {
        self.loaded
    }

    /// Add the numbers of all vCPUs, gone and living, to `totals`.
    pub fn add_totals(&self, walker: &mut Walker, totals: &mut Totals) {
        self.walk(SNAPSHOT, |seen| match seen {
            WalkItem::Start(state) => totals.add(&state.gone),
            WalkItem::Vcpu(member, polled) => {
                let copy = &mut walker.copy;
                if self.copy(member, copy).is_some() && !copy.is_empty() {
                    copy.polled = polled;
                    totals.fold(copy);
                }
            }
        });
    }
}
