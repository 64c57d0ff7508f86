// SPDX-License-Identifier: GPL-2.0

//! Which ledger belongs to which vCPU, and for how long.
//!
//! Each CPU notes the vCPU that it metered last, so that an exit finds its ledger by one
//! compare; another vCPU's is looked up in a table, without a lock. A vCPU is taken in at the
//! first event that a callback may allocate in (load, exit or entry), so VMs that ran before
//! the module was loaded are metered as well; it is let go when KVM destroys it, its numbers
//! folded into the totals. A vCPU that cannot be taken in, for lack of memory or past
//! `max_vcpus`, is counted, noted in the table as unmetered, and runs on undisturbed: by the
//! note it stays unmetered, whatever room there is later.
//!
//! Notes are bounded as well, as whoever may open /dev/kvm makes vCPUs. Once one could not be
//! noted, no vCPU is taken in, or counted, but at the first load of its life, which KVM's own
//! record of its CPU tells. So those made since the module was loaded are still counted once each,
//! and none is taken in in mid-life; only of those made before, some may never be seen.
//!
//! Who may touch a ledger when:
//!
//! - The thread that holds a vCPU writes its ledger. It may look it up without a lock, for
//!   only this thread, or the one that destroys the vCPU after it, lets it go.
//! - Everyone else goes through a list, under that list's lock, and only reads.
//!
//! Locks: `walking`, then `state`, then the `members` of a VM. None of them is taken when a vCPU
//! leaves its CPU, as the scheduler's own lock is held then. A guest's query takes the lock of its
//! own VM alone, so that guests cannot make each other wait. A snapshot takes `state` for a few
//! vCPUs at a time, so that neither vCPUs that come and go nor the CPU it runs on wait for long.

use core::sync::atomic::{
    AtomicBool,
    AtomicUsize,
    Ordering::Relaxed, //
};

use kernel::{
    alloc::flags::GFP_NOWAIT,
    list::{
        impl_list_arc_safe,
        impl_list_item,
        List,
        ListArc,
        ListLinks, //
    },
    new_mutex, new_spinlock, pr_warn_once,
    prelude::*,
    sync::{
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
        leaves::{
            Leaves,
            Numbers,
            Query,
            Registers, //
        },
        ledger::{
            Ledger,
            LedgerCopy,
            Totals, //
        },
        phase::Phase,
        reasons::{
            self,
            Isa,
            Slot, //
        },
        snapshot::{
            self,
            Encoder,
            Full,
            Host,
            Identity,
            NAME_SIZE, //
        },
        table::{
            Entry,
            Table, //
        },
    },
};

// SAFETY: All-zero bytes are a valid ledger that has not begun, as `Ledger` promises.
unsafe impl Zeroable for Ledger {}
// SAFETY: All-zero bytes are a valid, empty copy, as `LedgerCopy` promises.
unsafe impl Zeroable for LedgerCopy {}
// SAFETY: All-zero bytes are valid totals of nothing, as `Totals` promises.
unsafe impl Zeroable for Totals {}

/// The table's value for a vCPU that is known and not metered. No address is 1.
const UNMETERED: usize = 1;

/// How many vCPUs can be noted as unmetered at a time, whatever `max_vcpus` is: so the table takes
/// 256 KiB up to the default of that.
const NOTES: usize = 4096;

/// How many vCPUs a snapshot sees before it lets go of the lock: some 50 µs.
const AT_A_TIME: usize = 16;

/// A metered vCPU.
#[pin_data]
struct Member {
    ledger: Ledger,
    /// Grows from each vCPU to the next one that is taken in.
    serial: u64,
    identity: Identity,
    vm: Arc<Vm>,
    #[pin]
    links: ListLinks,
}

impl_list_arc_safe! {
    impl ListArcSafe<0> for Member { untracked; }
}
impl_list_item! {
    impl ListItem<0> for Member { using ListLinks { self.links }; }
}

/// A VM with metered vCPUs.
#[pin_data]
struct Vm {
    /// What tells this VM from every other that lives.
    key: usize,
    /// What tells it from every other that ever lived, while the module is loaded.
    number: u64,
    #[pin]
    members: SpinLock<List<Member>>,
    #[pin]
    links: ListLinks,
}

impl_list_arc_safe! {
    impl ListArcSafe<0> for Vm { untracked; }
}
impl_list_item! {
    impl ListItem<0> for Vm { using ListLinks { self.links }; }
}

/// What changes as vCPUs come and go.
struct State {
    /// In the order of their numbers, and in each VM the members in the order of theirs.
    vms: List<Vm>,
    /// The number of the latest VM.
    number: u64,
    /// The number of the latest member.
    serial: u64,
    /// A snapshot that is being taken.
    walk: Option<Walk>,
    /// vCPUs that have gone while that snapshot still awaits them.
    awaited: List<Member>,
    /// vCPUs that are metered now.
    metered: usize,
    /// vCPUs that the table notes as unmetered now.
    noted: usize,
    /// vCPUs that run or ran unmetered, noted or not.
    unmetered: u64,
    /// The numbers of the vCPUs that are gone.
    gone: KVBox<Totals>,
    /// Room for a copy of a ledger: too large for a kernel stack.
    copy: KVBox<LedgerCopy>,
}

/// How far a snapshot has come, which sees those vCPUs that there were when it began.
#[derive(Clone, Copy)]
struct Walk {
    /// The latest member when it began.
    newest: u64,
    /// The VM and the member that it saw last.
    seen: (u64, u64),
}

impl Walk {
    fn awaits(&self, vm: &Vm, member: &Member) -> bool {
        member.serial <= self.newest && (vm.number, member.serial) > self.seen
    }
}

/// The ledgers of all vCPUs.
///
/// # Invariants
///
/// A value of the table is 0, [`UNMETERED`], or the address of a [`Member`] that the list of
/// its VM holds; what a CPU notes of a vCPU is such an address. A member stays until the thread
/// that has the vCPU to itself lets it go.
#[pin_data(PinnedDrop)]
pub(crate) struct Registry {
    leaves: Leaves,
    host_scope: bool,
    loaded: u64,
    places: KVVec<Entry>,
    max_vcpus: usize,
    /// How many vCPUs may be noted as unmetered at a time.
    max_notes: usize,
    /// A vCPU could not be noted, now or at some time before: one that the table does not know
    /// may be known all the same.
    unnoted: AtomicBool,
    /// What the latest snapshot took, in bytes.
    latest_size: AtomicUsize,
    /// Held by the one who takes a snapshot.
    #[pin]
    walking: Mutex<()>,
    #[pin]
    state: SpinLock<State>,
}

/// A vCPU and the VM that owns it, as KVM names them.
pub(crate) struct Owner {
    /// What tells the VM from every other that lives: its address.
    pub(crate) vm: usize,
    /// KVM's name of the VM.
    pub(crate) name: [u8; NAME_SIZE],
    /// The process that made the VM.
    pub(crate) pid: u32,
    /// The vCPU's id.
    pub(crate) vcpu: u32,
}

impl Registry {
    /// An empty registry for at most `max_vcpus` vCPUs at a time.
    pub(crate) fn new(leaves: Leaves, host_scope: bool, max_vcpus: u32) -> Result<Arc<Self>> {
        let max_vcpus = max_vcpus as usize;
        let max_notes = max_vcpus.max(NOTES);
        // At most half of the places are taken, so a look-up finds its key, or that there is
        // none, within a place or two.
        let count = max_vcpus
            .saturating_add(max_notes)
            .saturating_mul(2)
            .next_power_of_two();
        let mut places = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            places.push(Entry::default(), GFP_KERNEL)?;
        }
        let state = State {
            vms: List::new(),
            number: 0,
            serial: 0,
            walk: None,
            awaited: List::new(),
            metered: 0,
            noted: 0,
            unmetered: 0,
            gone: KVBox::zeroed(GFP_KERNEL)?,
            copy: KVBox::zeroed(GFP_KERNEL)?,
        };
        Arc::pin_init(
            try_pin_init!(Self {
                leaves,
                host_scope,
                loaded: hooks::timestamp(),
                places,
                max_vcpus,
                max_notes,
                unnoted: AtomicBool::new(false),
                latest_size: AtomicUsize::new(snapshot::size_for(8, 256)),
                walking <- new_mutex!((), "exitmeter::walking"),
                state <- new_spinlock!(state, "exitmeter::registry"),
            }),
            GFP_KERNEL,
        )
    }

    /// Which leaves are answered.
    #[inline(always)]
    pub(crate) fn leaves(&self) -> &Leaves {
        &self.leaves
    }

    fn table(&self) -> Table<'_> {
        Table::new(&self.places)
    }

    /// The member at a value of the table.
    fn member_at(&self, value: usize) -> Option<&Member> {
        if value <= UNMETERED {
            return None;
        }
        // SAFETY: By the invariant of `Registry` a member is there. The callers hold the
        // vCPU that it is of, so that it is not let go while they use it.
        Some(unsafe { &*(value as *const Member) })
    }

    /// The ledger of a vCPU that the caller holds, by the table; taken in at this event if it
    /// is new, in `phase` from `now` on.
    fn ledger(&self, vcpu: Vcpu<'_>, now: u64, phase: Phase) -> Option<&Ledger> {
        let value = match self.table().get(vcpu.key()) {
            0 => self.take_in(vcpu, now, phase),
            value => value,
        };
        let member = self.member_at(value)?;
        // INVARIANT: `destroy` has all CPUs forget the vCPU before it lets the member go.
        hooks::note(vcpu, value);
        Some(&member.ledger)
    }

    /// Takes in a vCPU that the table does not know, or notes it as unmetered; its value.
    #[cold]
    #[inline(never)]
    fn take_in(&self, vcpu: Vcpu<'_>, now: u64, phase: Phase) -> usize {
        // The thread that had a vCPU when it could not be noted set this; whoever has the vCPU
        // after it sees that, by KVM's lock of the vCPU.
        if self.unnoted.load(Relaxed) && !vcpu.is_new() {
            return UNMETERED;
        }
        let mut state = self.state.lock();
        let error = match self.try_take_in(&mut state, vcpu, now, phase) {
            Ok(value) => return value,
            Err(error) => error,
        };
        state.unmetered = state.unmetered.wrapping_add(1);
        if state.noted < self.max_notes && self.table().insert(vcpu.key(), UNMETERED).is_ok() {
            state.noted = state.noted.wrapping_add(1);
        } else {
            self.unnoted.store(true, Relaxed);
        }
        drop(state);
        self.say_why_not(error);
        UNMETERED
    }

    /// Tells the log why a vCPU runs unmetered, of each reason once.
    fn say_why_not(&self, error: Error) {
        if error == ENOSPC {
            pr_warn_once!(
                "a vCPU runs unmetered: max_vcpus={} are metered already\n",
                self.max_vcpus
            );
        } else if error == ENOTSUPP {
            pr_warn_once!("a vCPU runs unmetered: it is a trust domain's\n");
        } else {
            pr_warn_once!("a vCPU runs unmetered: there is no memory for its ledger\n");
        }
    }

    /// # Errors
    ///
    /// `ENOTSUPP` for a vCPU of a trust domain, `ENOSPC` past `max_vcpus`, `ENOMEM`.
    fn try_take_in(
        &self,
        state: &mut State,
        vcpu: Vcpu<'_>,
        now: u64,
        phase: Phase,
    ) -> Result<usize> {
        let owner = vcpu.owner().ok_or(ENOTSUPP)?;
        if state.metered >= self.max_vcpus {
            return Err(ENOSPC);
        }
        let known = state.vms.iter().find(|vm| vm.key == owner.vm);
        let (vm, new) = match known {
            Some(vm) => (Arc::from(vm), None),
            None => {
                let vm = Vm::new(owner.vm, state.number.wrapping_add(1))?;
                (vm.clone_arc(), Some(vm))
            }
        };
        let member = Member::new(&vm, &owner, state.serial.wrapping_add(1))?;
        member.ledger.begin(now, phase);
        let value = &raw const *member as usize;
        // INVARIANT: The member goes to the list of its VM right below.
        self.table().insert(vcpu.key(), value).map_err(|_| ENOSPC)?;
        state.serial = member.serial;
        vm.members.lock().push_back(member);
        if let Some(new) = new {
            state.number = new.number;
            state.vms.push_back(new);
        }
        state.metered = state.metered.wrapping_add(1);
        Ok(value)
    }

    /// KVM destroys the vCPU, and will not load it again: lets it go.
    pub(crate) fn destroy(&self, vcpu: Vcpu<'_>) {
        hooks::forget(vcpu);
        let mut state = self.state.lock();
        let value = self.table().remove(vcpu.key());
        if value == UNMETERED {
            state.noted = state.noted.wrapping_sub(1);
        }
        let member = self.member_at(value);
        if let Some(member) = member {
            state.fold(&member.ledger);
            state.metered = state.metered.wrapping_sub(1);
        }
        let Some(member) = member else { return };
        let vm = member.vm.clone();
        let mut members = vm.members.lock();
        // SAFETY: A member is in no list but that of its VM.
        let member = unsafe { members.remove(member) };
        let was_last = members.is_empty();
        drop(members);
        if was_last {
            // SAFETY: A VM is in no list but that of the registry.
            unsafe { state.vms.remove(&vm) };
        }
        let member = match (member, state.walk) {
            (Some(member), Some(walk)) if walk.awaits(&vm, &member) => {
                state.awaited.push_back(member);
                None
            }
            (member, _) => member,
        };
        drop(state);
        // Memory is given back without the lock.
        drop(member);
    }

    /// The answer to a query of a guest, and who asked; `None` for an unmetered vCPU.
    pub(crate) fn answer(
        &self,
        vcpu: Vcpu<'_>,
        query: Query,
        subleaf: u32,
    ) -> Option<(&Identity, Registers)> {
        let member = self.member_at(self.table().get(vcpu.key()))?;
        let answer = if self.host_scope {
            let state = self.state.lock();
            self.leaves.answer(query, subleaf, &*state)
        } else {
            let members = member.vm.members.lock();
            self.leaves.answer(query, subleaf, &*members)
        };
        Some((&member.identity, answer))
    }

    /// Writes a snapshot into `buffer`; its size in bytes. `gone` is room for the totals, empty.
    ///
    /// It is of the vCPUs that there are when it begins, each as of the moment when it is seen.
    /// One that goes in the meantime is seen all the same, and stands in the totals of the next
    /// snapshot: so none is in both or in neither.
    ///
    /// # Errors
    ///
    /// [`Full`] when the buffer is too small.
    pub(crate) fn snapshot(&self, buffer: &mut [u8], gone: &mut Totals) -> Result<usize, Full> {
        let (tsc_khz, tsc_stable) = hooks::clock();
        let host = Host {
            isa: self.leaves.isa,
            leaf_map: self.leaves.map,
            host_scope: self.host_scope,
            tsc_khz,
            tsc_stable,
            loaded: self.loaded,
            now: hooks::timestamp(),
        };
        let mut encoder = Encoder::new(buffer, host);
        let walking = self.walking.lock();
        let unmetered = self.state.lock().begin_walk(gone);
        while self
            .state
            .lock()
            .walk_on(|whose, ledger| encoder.vcpu(whose, ledger))
        {}
        self.state.lock().walk = None;
        loop {
            let seen = self
                .state
                .lock()
                .see_awaited(|whose, ledger| encoder.vcpu(whose, ledger));
            // Its memory is given back without that lock.
            if seen.is_none() {
                break;
            }
        }
        drop(walking);
        let result = encoder.finish(gone, unmetered);
        let (Ok(size) | Err(Full { needed: size })) = result;
        self.latest_size.store(size, Relaxed);
        result
    }

    /// What the next snapshot is likely to take, in bytes: an eighth more than the latest, as
    /// vCPUs may have come.
    pub(crate) fn likely_size(&self) -> usize {
        let latest = self.latest_size.load(Relaxed);
        latest.saturating_add(latest / 8)
    }

    /// The numbers of all vCPUs, those that are gone and those that live.
    pub(crate) fn totals(&self) -> Result<KVBox<Totals>> {
        let mut totals = KVBox::<Totals>::zeroed(GFP_KERNEL)?;
        let mut state = self.state.lock();
        totals.add(&state.gone);
        state.each(|_, ledger| totals.fold(ledger));
        Ok(totals)
    }
}

// The transitions. The common way, that of a vCPU which this CPU metered last, needs no more
// than its note, so that even the registry is only looked for on the other way.

/// The ledger of a vCPU that this CPU metered last, and that the caller holds.
#[inline(always)]
fn noted(vcpu: Vcpu<'_>) -> Option<&Ledger> {
    let value = vcpu.noted()?;
    // SAFETY: By the invariant of `Registry` the note is of a member. The callers hold the
    // vCPU that it is of, so that it is not let go while they use it.
    Some(unsafe { &(*(value as *const Member)).ledger })
}

/// The ledger of any other vCPU that the caller holds; taken in at this event if it is new.
fn looked_up<'a>(vcpu: Vcpu<'a>, now: u64, phase: Phase) -> Option<&'a Ledger> {
    hooks::registry()?.ledger(vcpu, now, phase)
}

/// A VM exit with `code`, at TSC `now`.
#[inline(always)]
pub(crate) fn exit(vcpu: Vcpu<'_>, now: u64, isa: Isa, code: u32) {
    let slot = reasons::slot(isa, code);
    match noted(vcpu) {
        Some(ledger) => exit_of(vcpu, ledger, now, slot),
        None => exit_of_another(vcpu, now, slot),
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

/// As [`exit`], of a vCPU that this CPU has not metered last.
#[cold]
#[inline(never)]
fn exit_of_another(vcpu: Vcpu<'_>, now: u64, slot: Slot) {
    if let Some(ledger) = looked_up(vcpu, now, Phase::Guest) {
        exit_of(vcpu, ledger, now, slot);
    }
}

/// A VM entry.
#[inline(always)]
pub(crate) fn entry(vcpu: Vcpu<'_>, now: u64) {
    match noted(vcpu) {
        Some(ledger) => ledger.entry(now),
        None => entry_of_another(vcpu, now),
    }
}

/// As [`entry`], of a vCPU that this CPU has not metered last.
#[cold]
#[inline(never)]
fn entry_of_another(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up(vcpu, now, Phase::Kernel) {
        ledger.entry(now);
    }
}

/// The vCPU takes a CPU.
#[inline(always)]
pub(crate) fn resume(vcpu: Vcpu<'_>, now: u64) {
    match noted(vcpu) {
        Some(ledger) => ledger.resume(now),
        None => resume_of_another(vcpu, now),
    }
}

/// As [`resume`], of a vCPU that this CPU has not metered last.
#[cold]
#[inline(never)]
fn resume_of_another(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up(vcpu, now, Phase::Kernel) {
        ledger.resume(now);
    }
}

/// The vCPU leaves its CPU. The scheduler's lock may be held, so a vCPU that is not known yet
/// is left for its next event: nothing may be allocated here.
#[inline(always)]
pub(crate) fn leave(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    match noted(vcpu) {
        Some(ledger) => ledger.leave(now, phase),
        None => leave_of_another(vcpu, now, phase),
    }
}

/// As [`leave`], of a vCPU that this CPU has not metered last, or whose note it lost.
#[cold]
#[inline(never)]
fn leave_of_another(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    let Some(registry) = hooks::registry() else {
        return;
    };
    if let Some(member) = registry.member_at(registry.table().get(vcpu.key())) {
        member.ledger.leave(now, phase);
    }
}

#[pinned_drop]
impl PinnedDrop for Registry {
    /// A VM and its members hold each other; takes them apart, so that both go.
    fn drop(self: Pin<&mut Self>) {
        let mut state = self.state.lock();
        while let Some(vm) = state.vms.pop_front() {
            while let Some(member) = { vm.members.lock().pop_front() } {
                drop(member);
            }
        }
    }
}

impl State {
    /// Begins a snapshot: adds the numbers of the vCPUs that are gone to `gone`, and says how many
    /// ran unmetered.
    fn begin_walk(&mut self, gone: &mut Totals) -> u64 {
        gone.add(&self.gone);
        self.walk = Some(Walk {
            newest: self.serial,
            seen: (0, 0),
        });
        self.unmetered
    }

    /// Has `see` see the next few vCPUs, with their ledgers at rest; whether there are more.
    fn walk_on(&mut self, mut see: impl FnMut(&Identity, &LedgerCopy)) -> bool {
        let Some(walk) = &mut self.walk else {
            return false;
        };
        let mut seen = 0_usize;
        for vm in self.vms.iter() {
            if vm.number < walk.seen.0 {
                continue;
            }
            for member in vm.members.lock().iter() {
                if !walk.awaits(&vm, &member) {
                    continue;
                }
                if seen == AT_A_TIME {
                    return true;
                }
                member.ledger.copy(&mut self.copy);
                see(&member.identity, &self.copy);
                walk.seen = (vm.number, member.serial);
                seen = seen.wrapping_add(1);
            }
        }
        false
    }

    /// Has `see` see one of the vCPUs that went before they were seen; gives it to be dropped.
    fn see_awaited(&mut self, see: impl FnOnce(&Identity, &LedgerCopy)) -> Option<ListArc<Member>> {
        let member = self.awaited.pop_front()?;
        member.ledger.copy(&mut self.copy);
        see(&member.identity, &self.copy);
        Some(member)
    }

    /// Has `see` see each metered vCPU, with its ledger at rest.
    fn each(&mut self, mut see: impl FnMut(&Identity, &LedgerCopy)) {
        for vm in self.vms.iter() {
            for member in vm.members.lock().iter() {
                member.ledger.copy(&mut self.copy);
                see(&member.identity, &self.copy);
            }
        }
    }

    /// Adds the numbers of a vCPU that is going.
    fn fold(&mut self, ledger: &Ledger) {
        ledger.copy(&mut self.copy);
        self.gone.fold(&self.copy);
    }
}

impl Vm {
    fn new(key: usize, number: u64) -> Result<ListArc<Self>> {
        ListArc::pin_init(
            try_pin_init!(Self {
                key,
                number,
                members <- new_spinlock!(List::new(), "exitmeter::vm"),
                links <- ListLinks::new(),
            }),
            GFP_NOWAIT,
        )
    }
}

impl Member {
    fn new(vm: &Arc<Vm>, owner: &Owner, serial: u64) -> Result<ListArc<Self>> {
        let identity = Identity {
            vm: vm.number,
            name: owner.name,
            pid: owner.pid,
            vcpu: owner.vcpu,
        };
        ListArc::pin_init(
            try_pin_init!(Self {
                ledger <- pin_init::init_zeroed(),
                serial,
                identity,
                vm: vm.clone(),
                links <- ListLinks::new(),
            }),
            // A callback may be anywhere but in the scheduler: it can neither sleep nor
            // reclaim, and the reserves for those who must not fail are not for a meter.
            GFP_NOWAIT,
        )
    }
}

/// A VM's numbers: the sums over its vCPUs.
impl Numbers for List<Member> {
    fn exits(&self, slot: Slot) -> u64 {
        sum(self.iter().map(|member| member.ledger.exits(slot)))
    }

    fn nested_exits(&self, slot: Slot) -> u64 {
        sum(self.iter().map(|member| member.ledger.nested_exits(slot)))
    }

    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        sum(self.iter().map(|member| member.ledger.cycles(phase, slot)))
    }

    fn total_exits(&self) -> u64 {
        sum(self.iter().map(|member| member.ledger.total_exits()))
    }

    fn total_cycles(&self, phase: Phase) -> u64 {
        sum(self.iter().map(|member| member.ledger.total_cycles(phase)))
    }
}

/// The host's numbers: the sums over all VMs, and what those that are gone left.
impl Numbers for State {
    fn exits(&self, slot: Slot) -> u64 {
        let live = sum(self.vms.iter().map(|vm| vm.members.lock().exits(slot)));
        live.wrapping_add(self.gone.exits(slot))
    }

    fn nested_exits(&self, slot: Slot) -> u64 {
        let live = sum(self
            .vms
            .iter()
            .map(|vm| vm.members.lock().nested_exits(slot)));
        live.wrapping_add(self.gone.nested_exits(slot))
    }

    fn cycles(&self, phase: Phase, slot: Slot) -> u64 {
        let live = sum(self
            .vms
            .iter()
            .map(|vm| vm.members.lock().cycles(phase, slot)));
        live.wrapping_add(self.gone.cycles(phase, slot))
    }

    fn total_exits(&self) -> u64 {
        let live = sum(self.vms.iter().map(|vm| vm.members.lock().total_exits()));
        live.wrapping_add(self.gone.total_exits())
    }

    fn total_cycles(&self, phase: Phase) -> u64 {
        let live = sum(self
            .vms
            .iter()
            .map(|vm| vm.members.lock().total_cycles(phase)));
        live.wrapping_add(self.gone.total_cycles(phase))
    }
}

fn sum(numbers: impl Iterator<Item = u64>) -> u64 {
    numbers.fold(0, u64::wrapping_add)
}
