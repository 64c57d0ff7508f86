// SPDX-License-Identifier: GPL-2.0

//! Tests of the registry by its interface, in one thread, beside a plain model: which vCPUs are
//! metered, which numbers are reported, and that all memory comes back.
//!
//! Other vCPUs come and go between the steps of a walk, which is where the platform yields the CPU.
//! And each allocation fails in turn.

use std::{
    alloc::{alloc_zeroed, dealloc, Layout},
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    ptr::NonNull,
    rc::Rc,
};

use exitmeter_meter::{
    leaves::{LeafMap, Leaves, Query},
    ledger::{Copying, LedgerCopy, MoreHistograms, NoSupply, Supply, Totals, TRIES},
    phase::Phase,
    reader::Snapshot,
    reasons::{slot, Isa},
    registry::{
        platform::Retired,
        walk::{NoSnapshot, TableOptions, Walker},
        Newcomer, NoMemory, Owner, Platform, Refused, Registry, Settings, GROUP, MARKS,
    },
    snapshot::{size_for, HostHeader, NAME_SIZE},
    tables::About,
};
use proptest::prelude::*;

/// A host whose facts do not matter here.
const HOST: HostHeader = HostHeader {
    isa: Isa::Vmx,
    leaf_map: LeafMap::Map2021,
    host_scope: false,
    by_bpf: false,
    tsc_khz: 0,
    tsc_stable: true,
    loaded: 0,
    now: 0,
    clock_offset: 0,
    life: 1,
};

/// Number of the clock's ticks in a millisecond.
const MILLISECOND: u64 = 1000;

/// Callback at a pause.
type Meanwhile = Box<dyn FnMut(&Registry<Plain>)>;

/// State that the platform and the test share.
#[derive(Default)]
struct Shared {
    locked: Cell<bool>,
    readers: Cell<usize>,
    now: Cell<u64>,
    objects: Cell<i64>,
    allocations: Cell<usize>,
    /// Number of the allocation that fails, from 1.
    fails: Cell<usize>,
    retired: RefCell<Vec<(NonNull<u8>, Layout)>>,
    /// Time that KVM polled for each living vCPU.
    polled: RefCell<HashMap<usize, u64>>,
    steps: Cell<u64>,
    most_steps: Cell<u64>,
    /// CPU of each vCPU, and the number of copies made there.
    cpus: RefCell<HashMap<usize, u32>>,
    interrupts: Cell<u32>,
    /// Number of interrupts that fail.
    failing: Cell<u32>,
    registry: Cell<*const Registry<Plain>>,
    meanwhile: RefCell<Option<Meanwhile>>,
}

impl Shared {
    /// Free retired memory, if nobody reads.
    fn pass_time(&self) {
        if self.readers.get() > 0 {
            return;
        }
        for (memory, layout) in self.retired.take() {
            // SAFETY: It comes from `allocate`, and nobody reads it any more.
            unsafe { self.free(memory, layout) };
        }
    }

    /// # Safety
    ///
    /// As for [`Platform::free`].
    unsafe fn free(&self, memory: NonNull<u8>, layout: Layout) {
        // SAFETY: By the contract of this function.
        unsafe {
            memory.as_ptr().write_bytes(0xdb, layout.size());
            dealloc(memory.as_ptr(), layout);
        }
        self.objects.set(self.objects.get() - 1);
    }
}

/// Platform with one thread.
struct Plain(Rc<Shared>);

// SAFETY: As for `Platform`, whose memory it is.
unsafe impl Supply for &Plain {
    fn more(&self) -> Option<NonNull<MoreHistograms>> {
        Some(
            self.allocate(Layout::new::<MoreHistograms>(), false)?
                .cast(),
        )
    }
}

/// Guard that keeps retired memory.
struct Reading(Rc<Shared>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.readers.set(self.0.readers.get() - 1);
    }
}

// SAFETY: There is one thread. The lock panics when it is taken twice, memory comes from the
// allocator, and retired memory is freed while nobody reads.
unsafe impl Platform for Plain {
    type Reading = Reading;

    fn lock(&self) {
        assert!(!self.0.locked.replace(true), "the lock is taken twice");
        self.0.steps.set(0);
    }

    unsafe fn unlock(&self) {
        assert!(self.0.locked.replace(false), "the lock is not held");
        let most = self.0.most_steps.get().max(self.0.steps.get());
        self.0.most_steps.set(most);
    }

    fn read(&self) -> Reading {
        self.0.readers.set(self.0.readers.get() + 1);
        Reading(Rc::clone(&self.0))
    }

    fn allocate(&self, layout: Layout, _may_sleep: bool) -> Option<NonNull<u8>> {
        assert!(!self.0.locked.get(), "memory is allocated under the lock");
        self.0.allocations.set(self.0.allocations.get() + 1);
        if self.0.allocations.get() == self.0.fails.get() {
            return None;
        }
        self.0.objects.set(self.0.objects.get() + 1);
        // SAFETY: The registry has no empty objects.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    unsafe fn free(&self, memory: NonNull<u8>, layout: Layout) {
        assert!(!self.0.locked.get(), "memory is freed under the lock");
        // SAFETY: By the contract of this function.
        unsafe { self.0.free(memory, layout) };
    }

    unsafe fn retire(&self, memory: NonNull<u8>, layout: Layout, room: NonNull<Retired>) {
        // SAFETY: By the contract of this function nobody uses the room.
        unsafe { room.as_ptr().write([usize::MAX; 2]) };
        self.0.retired.borrow_mut().push((memory, layout));
    }

    fn forget(&self, _key: usize) {}

    fn polled(&self, key: usize) -> u64 {
        assert!(self.0.locked.get());
        let polled = self.0.polled.borrow();
        *polled.get(&key).expect("a vCPU that lives")
    }

    fn cpu(&self, key: usize) -> Option<u32> {
        assert!(self.0.locked.get());
        assert!(self.0.polled.borrow().contains_key(&key), "it lives");
        self.0.cpus.borrow().get(&key).copied()
    }

    fn copy_on(&self, _cpu: u32, copying: &mut Copying<'_>) -> bool {
        assert!(
            !self.0.locked.get(),
            "an interrupt is awaited under the lock"
        );
        self.0.interrupts.set(self.0.interrupts.get() + 1);
        self.0.interrupts.get() > self.0.failing.get() && copying.try_copy()
    }

    fn now(&self) -> u64 {
        self.0.now.get()
    }

    fn millisecond(&self) -> u64 {
        MILLISECOND
    }

    fn pause(&self) {
        assert!(!self.0.locked.get(), "it pauses under the lock");
        self.0.pass_time();
        let meanwhile = self.0.meanwhile.take();
        if let Some(mut meanwhile) = meanwhile {
            // SAFETY: The registry that pauses is alive, and the call takes only a shared
            // reference.
            meanwhile(unsafe { &*self.0.registry.get() });
            *self.0.meanwhile.borrow_mut() = Some(meanwhile);
        }
    }

    fn step(&self) {
        assert!(self.0.locked.get(), "a step without the lock");
        self.0.steps.set(self.0.steps.get() + 1);
    }
}

const MOST_STEPS: u64 = 64;

fn settings(max_vcpus: usize, host_scope: bool) -> Settings {
    Settings {
        leaves: Leaves {
            map: LeafMap::Map2021,
            isa: Isa::Vmx,
            life: 1,
        },
        host_scope,
        max_vcpus,
        copy_tries: TRIES,
        slow_ticks: 0,
    }
}

/// A registry, and the state that it shares with the test.
struct Bench {
    registry: Rc<Registry<Plain>>,
    shared: Rc<Shared>,
}

/// Numbers of a snapshot: exits by vCPU id, all exits of the totals, vCPUs that are gone, and
/// unmetered vCPUs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Reported {
    exits: BTreeMap<u32, u64>,
    totals: u64,
    gone: u64,
    unmetered: u64,
}

/// First and latest event by vCPU id.
type Lives = BTreeMap<u32, (u64, u64)>;

impl Bench {
    fn new(max_vcpus: usize, host_scope: bool) -> Self {
        let shared = Rc::new(Shared::default());
        shared.now.set(1 << 30);
        let registry = Registry::new(Plain(Rc::clone(&shared)), settings(max_vcpus, host_scope));
        let registry = Rc::new(registry.expect("memory"));
        shared.registry.set(Rc::as_ptr(&registry));
        Self { registry, shared }
    }

    fn register_new(&self, key: usize, vm: usize, id: u32) -> Result<(), Refused> {
        register_new(&self.registry, &self.shared, key, vm, id)
    }

    fn exits(&self, key: usize, count: u64) -> bool {
        exits(&self.registry, &self.shared, key, count)
    }

    fn destroy(&self, key: usize) {
        destroy(&self.registry, &self.shared, key);
    }

    fn snapshot(&self) -> Reported {
        self.snapshot_at(0).0
    }

    /// Take a snapshot with a clock that has lost some ticks in sleeps of the host.
    fn snapshot_at(&self, clock_offset: u64) -> (Reported, Lives) {
        let mut buffer = vec![0; size_for(600, 2000)];
        let mut gone = Totals::new();
        let mut walker = Walker::new();
        let host = HostHeader {
            loaded: self.registry.loaded(),
            now: self.shared.now.get().wrapping_add(clock_offset),
            clock_offset,
            ..HOST
        };
        let size = self.registry.snapshot(
            &mut walker,
            &mut buffer,
            &mut gone,
            host,
            TableOptions::default(),
        );
        let snapshot = Snapshot::parse(&buffer[..size.expect("it fits")]).expect("a snapshot");
        let mut reported = Reported {
            gone: snapshot.departed(),
            unmetered: snapshot.unmetered(),
            totals: snapshot.totals().map(|row| row.exits()).sum(),
            ..Reported::default()
        };
        let mut lives = Lives::new();
        for vcpu in snapshot.vcpus() {
            assert!(vcpu.balances());
            lives.insert(vcpu.id(), (vcpu.first(), vcpu.last()));
            let exits = vcpu.rows().map(|row| row.exits()).sum();
            let twice = reported.exits.insert(vcpu.id(), exits);
            assert_eq!(twice, None, "vCPU {} stands there twice", vcpu.id());
        }
        (reported, lives)
    }

    fn ask(&self, key: usize) -> Option<u64> {
        let (_, answer) = self.registry.answer(key, Query::TotalExits, 0)?;
        Some(u64::from(answer.ebx) << 32 | u64::from(answer.eax))
    }

    /// Let two milliseconds pass, so that sums are due.
    fn wait(&self) {
        self.shared.now.set(self.shared.now.get() + 2 * MILLISECOND);
    }

    /// Drop the registry, and check that it has freed all memory.
    fn end(self) {
        assert!(self.shared.most_steps.get() <= MOST_STEPS);
        drop(self.registry);
        self.shared.pass_time();
        assert_eq!(self.shared.objects.get(), 0, "objects not given back");
    }
}

fn newcomer(shared: &Shared, key: usize, vm: usize, id: u32) -> Newcomer {
    let polled = *shared.polled.borrow_mut().entry(key).or_insert(100);
    Newcomer {
        owner: Some(Owner {
            vm: (1 << 40) + vm * 4096,
            name: [0; NAME_SIZE],
            pid: vm as u32,
            vcpu: id,
        }),
        is_new: true,
        polled,
    }
}

fn register_new(
    registry: &Registry<Plain>,
    shared: &Shared,
    key: usize,
    vm: usize,
    id: u32,
) -> Result<(), Refused> {
    registry.register_new(key, newcomer(shared, key, vm, id))
}

/// Let a registered vCPU exit `count` times. Return false if it is unmetered.
fn exits(registry: &Registry<Plain>, shared: &Shared, key: usize, count: u64) -> bool {
    let tick = || {
        shared.now.set(shared.now.get() + 7);
        shared.now.get()
    };
    let newcomer = || -> Newcomer { panic!("vCPU {key} is known") };
    let member = registry.at_event(key, tick(), Phase::Kernel, newcomer);
    let Some(member) = member.expect("it is known") else {
        return false;
    };
    for _ in 0..count {
        member.ledger().entry(tick());
        member.ledger().exit(tick(), slot(Isa::Vmx, 10));
    }
    true
}

fn destroy(registry: &Registry<Plain>, shared: &Shared, key: usize) {
    let polled = shared.polled.borrow().get(&key).copied().unwrap_or(0);
    registry.destroy(key, polled);
    shared.polled.borrow_mut().remove(&key);
    shared.pass_time();
}

fn key(place: usize) -> usize {
    0x10_0000 + place * 0x2340
}

/// A vCPU of the model.
#[derive(Clone, Debug)]
struct Known {
    id: u32,
    vm: usize,
    exits: u64,
    /// Set once it has had an event.
    began: bool,
    metered: bool,
}

#[derive(Debug, Default)]
struct Model {
    vcpus: BTreeMap<usize, Known>,
    next: u32,
    gone: u64,
    gone_exits: u64,
    unmetered: u64,
}

impl Model {
    fn metered(&self) -> impl Iterator<Item = &Known> {
        self.vcpus.values().filter(|it| it.metered)
    }

    fn reported(&self) -> Reported {
        let began = self.metered().filter(|it| it.began);
        Reported {
            exits: began.map(|it| (it.id, it.exits)).collect(),
            totals: self.gone_exits,
            gone: self.gone,
            unmetered: self.unmetered,
        }
    }

    /// Change one vCPU: create it, let it exit, or destroy it.
    fn change(
        &mut self,
        (registry, shared): (&Registry<Plain>, &Shared),
        max_vcpus: usize,
        (place, vm, what): (usize, usize, u64),
    ) {
        let key = key(place);
        let Some(known) = self.vcpus.get_mut(&place) else {
            let id = self.next;
            self.next += 1;
            let room = self.metered().count() < max_vcpus;
            let known = register_new(registry, shared, key, vm, id);
            assert_eq!(known, if room { Ok(()) } else { Err(Refused::NoRoom) });
            self.unmetered += u64::from(!room);
            self.vcpus.insert(
                place,
                Known {
                    id,
                    vm,
                    exits: 0,
                    began: false,
                    metered: room,
                },
            );
            return;
        };
        if what % 3 == 0 {
            let known = known.clone();
            destroy(registry, shared, key);
            self.vcpus.remove(&place);
            if known.metered && known.began {
                self.gone += 1;
                self.gone_exits += known.exits;
            }
        } else {
            assert_eq!(exits(registry, shared, key, what), known.metered);
            known.began = true;
            known.exits += what;
        }
    }
}

/// Number of changes in each try of a property. Miri takes a thousand times as long.
const CHANGES: usize = if cfg!(miri) { 30 } else { 600 };
/// Number of vCPUs: more than two groups, and more than a walk takes holds on at a time.
const PLACES: usize = if cfg!(miri) { 20 } else { 150 };

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 60 }, ..ProptestConfig::default() })]

    /// vCPUs come and go in any order, up to `max_vcpus` of them metered: snapshots, queries and
    /// totals match the model.
    #[test]
    fn vcpus_that_come_and_go_count_once(
        max_vcpus in prop_oneof![Just(3_usize), Just(40), Just(200)],
        changes in proptest::collection::vec((0..PLACES, 0_usize..4, 0_u64..9), 0..CHANGES),
    ) {
        let bench = Bench::new(max_vcpus, false);
        let mut model = Model::default();
        for (number, change) in changes.into_iter().enumerate() {
            // Most belong to one VM, so that it grows past two groups.
            let change = (change.0, change.1.saturating_sub(2), change.2);
            model.change((&bench.registry, &bench.shared), max_vcpus, change);
            if number % 50 == 0 {
                prop_assert_eq!(bench.snapshot(), model.reported());
                bench.wait();
                for (place, known) in &model.vcpus {
                    let of_vm = model.metered().filter(|it| it.vm == known.vm);
                    let sum = of_vm.map(|it| it.exits).sum::<u64>();
                    let due = (known.metered && known.began).then_some(sum);
                    bench.wait();
                    prop_assert_eq!(bench.ask(key(*place)), due);
                }
            }
        }
        prop_assert_eq!(bench.snapshot(), model.reported());
        let mut totals = Totals::new();
        bench.registry.add_totals(&mut Walker::new(), &mut totals);
        let live: u64 = model.metered().map(|it| it.exits).sum();
        prop_assert_eq!(totals.row(slot(Isa::Vmx, 10)).exits, live + model.gone_exits);
        bench.end();
    }

    /// vCPUs come and go while a snapshot is taken. It has each vCPU that existed when it began,
    /// once, and no later one. The next snapshot has all.
    #[test]
    fn snapshot_has_the_vcpus_of_its_start(
        first in 0..PLACES,
        changes in proptest::collection::vec((0..PLACES, 0_usize..3, 0_u64..9), 0..CHANGES),
    ) {
        let bench = Bench::new(200, false);
        let model = Rc::new(RefCell::new(Model::default()));
        for place in 0..first {
            for what in [0, 1] {
                let change = (place, place % 3, what);
                model.borrow_mut().change((&bench.registry, &bench.shared), 200, change);
            }
        }
        let before = model.borrow().reported();
        let (after, mut left) = (Rc::clone(&model), changes.into_iter());
        let shared = Rc::downgrade(&bench.shared);
        *bench.shared.meanwhile.borrow_mut() = Some(Box::new(move |registry| {
            let shared = shared.upgrade().expect("it is there");
            for change in left.by_ref().take(40) {
                after.borrow_mut().change((registry, &shared), 200, change);
            }
        }));
        let reported = bench.snapshot();
        drop(bench.shared.meanwhile.take());
        prop_assert_eq!(reported.gone, before.gone);
        prop_assert_eq!(reported.totals, before.totals);
        let ids: Vec<_> = reported.exits.keys().collect();
        prop_assert_eq!(ids, before.exits.keys().collect::<Vec<_>>());
        for (id, exits) in &before.exits {
            prop_assert!(reported.exits[id] >= *exits);
        }
        prop_assert_eq!(bench.snapshot(), model.borrow().reported());
        bench.end();
    }
}

/// The VM at a walk's cursor ends: the walk goes on behind it, and reports its vCPU.
#[test]
fn walk_survives_the_end_of_its_vm() {
    // A walk takes holds on this many at a time.
    const AT_A_TIME: usize = 16;
    let bench = Bench::new(100, false);
    for place in 0..AT_A_TIME + 2 {
        bench
            .register_new(key(place), place, place as u32)
            .expect("room");
        assert!(bench.exits(key(place), 1));
    }
    let shared = Rc::downgrade(&bench.shared);
    let mut done = false;
    *bench.shared.meanwhile.borrow_mut() = Some(Box::new(move |registry| {
        if !core::mem::replace(&mut done, true) {
            let shared = shared.upgrade().expect("it is there");
            destroy(registry, &shared, key(AT_A_TIME));
        }
    }));
    let reported = bench.snapshot();
    assert_eq!((reported.exits.len(), reported.gone), (AT_A_TIME + 2, 0));
    let reported = bench.snapshot();
    assert_eq!((reported.exits.len(), reported.gone), (AT_A_TIME + 1, 1));
    bench.end();
}

/// A VM grows past one, two and three groups and shrinks again; free places are reused.
#[test]
fn vm_grows_and_shrinks_by_groups() {
    let bench = Bench::new(1000, false);
    let count = 3 * GROUP + 1;
    let mut sum = 0;
    // In Miri, no place is reused for a third time.
    for round in 0..if cfg!(miri) { 2 } else { 3 } {
        for place in 0..count {
            if round == 0 || place % 2 == 1 {
                bench
                    .register_new(key(place), 0, (round * count + place) as u32)
                    .expect("room");
            }
            assert!(bench.exits(key(place), 2));
        }
        sum += 2 * count as u64;
        bench.wait();
        for place in 0..count {
            assert_eq!(bench.ask(key(place)), Some(sum), "vCPU {place}");
        }
        assert_eq!(bench.snapshot().exits.len(), count);
        for place in (1..count).step_by(2) {
            let member = bench.registry.metered(key(place)).expect("it is known");
            sum -= member.ledger().total_exits();
            bench.destroy(key(place));
        }
        bench.wait();
        assert_eq!(bench.ask(key(0)), Some(sum));
    }
    // A VM has no more groups than its highest number of vCPUs needs.
    let objects = bench.shared.objects.get();
    for place in (1..count).step_by(2) {
        bench.register_new(key(place), 0, 0).expect("room");
    }
    assert_eq!(bench.shared.objects.get() - objects, (count / 2) as i64);
    bench.end();
}

/// A guest's numbers do not fall when a vCPU of a new group asks, although the sums were renewed
/// just before.
#[test]
fn new_group_reads_the_others_at_once() {
    let bench = Bench::new(1000, false);
    for place in 0..=3 * GROUP {
        bench
            .register_new(key(place), 0, place as u32)
            .expect("room");
        assert!(bench.exits(key(place), 5));
        // No time passes except that of the exits.
        assert_eq!(
            bench
                .ask(key(place))
                .map(|reported| reported >= 5 * place as u64),
            Some(true),
            "{place}"
        );
    }
    bench.end();
}

/// In a VM with more than one group, a query has its own group's numbers at once, and the others'
/// within a millisecond.
#[test]
fn own_group_is_fresh() {
    let bench = Bench::new(1000, false);
    for place in 0..2 * GROUP {
        bench
            .register_new(key(place), 0, place as u32)
            .expect("room");
        assert!(bench.exits(key(place), 1));
    }
    bench.wait();
    let all = 2 * GROUP as u64;
    assert_eq!(bench.ask(key(0)), Some(all));
    // Fewer ticks than a millisecond has.
    assert!(bench.exits(key(1), 10) && bench.exits(key(GROUP), 20));
    assert_eq!(bench.ask(key(0)), Some(all + 10));
    assert_eq!(bench.ask(key(GROUP)), Some(all + 20));
    bench.wait();
    assert_eq!(bench.ask(key(0)), Some(all + 30));
    bench.end();
}

/// The sums of the host are exact while there are few vCPUs, and as of the latest renewal
/// otherwise. They include vCPUs that are gone, and never fall.
#[test]
fn sums_of_the_host_are_exact_and_never_fall() {
    let bench = Bench::new(1000, true);
    let mut sum = 0;
    for place in 0..2 * GROUP {
        bench
            .register_new(key(place), place % 5, place as u32)
            .expect("room");
        assert!(bench.exits(key(place), 3));
        sum += 3;
        let reported = bench.ask(key(place)).expect("metered");
        assert!(reported <= sum);
        if place <= GROUP {
            // This holds when the 33rd comes, too: earlier answers are not newer than the sums.
            assert_eq!(reported, sum, "{place}");
        }
        bench.wait();
        assert_eq!(bench.ask(key(0)), Some(sum));
    }
    for place in 1..2 * GROUP {
        bench.destroy(key(place));
        bench.wait();
        assert_eq!(bench.ask(key(0)), Some(sum), "those that are gone count on");
    }
    // Few again, and then many, within a millisecond.
    assert!(bench.exits(key(0), 1));
    sum += 1;
    assert_eq!(bench.ask(key(0)), Some(sum));
    for place in 1..2 * GROUP {
        bench
            .register_new(key(place), 7, place as u32)
            .expect("room");
    }
    assert_eq!(bench.ask(key(0)), Some(sum), "not as of before");
    bench.end();
}

/// Summing few vCPUs of the host takes steps whose number does not grow with the vCPUs that are
/// gone.
#[test]
fn steps_with_the_lock_held_do_not_grow() {
    // More than the steps allowed with the lock held. Miri looks only for undefined behaviour.
    const MANY: usize = if cfg!(miri) { 9 } else { 300 };
    for (vcpus, vms) in [(1, 1), (MANY, 1), (MANY, MANY)] {
        let bench = Bench::new(1000, true);
        for place in 0..vcpus {
            bench
                .register_new(key(place), place % vms, place as u32)
                .expect("room");
            assert!(bench.exits(key(place), 1));
            bench.ask(key(place));
        }
        bench.wait();
        assert_eq!(bench.snapshot().exits.len(), vcpus);
        // These groups are empty now.
        for place in 0..vcpus - 1 {
            bench.destroy(key(place));
        }
        assert_eq!(bench.snapshot().exits.len(), 1);
        assert!(bench.shared.most_steps.get() <= MOST_STEPS);
        bench.end();
    }
}

/// Each allocation fails in turn: the vCPU is unmetered and counted, and leaves nothing behind.
#[test]
fn failed_allocation_undoes_all() {
    // A VM's first vCPU, its second, and the ones that need a second and a third group.
    for before in [0, 1, GROUP, 2 * GROUP] {
        for fails in 1.. {
            let bench = Bench::new(1000, false);
            for place in 0..before {
                bench
                    .register_new(key(place), 0, place as u32)
                    .expect("room");
                assert!(bench.exits(key(place), 1));
            }
            let objects = bench.shared.objects.get();
            bench
                .shared
                .fails
                .set(bench.shared.allocations.get() + fails);
            let known = bench.register_new(key(before), 0, before as u32);
            bench.shared.fails.set(0);
            if known.is_ok() {
                assert!(fails > 1, "a vCPU takes memory");
                bench.end();
                break;
            }
            assert_eq!(known, Err(Refused::NoMemory));
            assert_eq!(
                bench.shared.objects.get(),
                objects,
                "before {before}, fails {fails}"
            );
            assert!(!bench.exits(key(before), 1), "it stays unmetered");
            // The next one is metered, with the memory that is there.
            bench
                .register_new(key(before + 1), 0, 1000)
                .expect("memory");
            assert!(bench.exits(key(before + 1), 1));
            let reported = bench.snapshot();
            assert_eq!((reported.exits.len(), reported.unmetered), (before + 1, 1));
            bench.wait();
            assert_eq!(bench.ask(key(before + 1)), Some(before as u64 + 1));
            bench.destroy(key(before));
            bench.end();
        }
    }
}

/// Creating a registry without memory fails, and leaks nothing.
#[test]
fn no_registry_without_memory() {
    for host_scope in [false, true] {
        for fails in 1.. {
            let shared = Rc::new(Shared::default());
            shared.fails.set(fails);
            let made = Registry::new(Plain(Rc::clone(&shared)), settings(10, host_scope));
            if let Ok(registry) = made {
                assert_eq!(fails, if host_scope { 5 } else { 4 });
                drop(registry);
                assert_eq!(shared.objects.get(), 0);
                break;
            }
            assert_eq!(made.err(), Some(NoMemory));
            assert_eq!(shared.objects.get(), 0, "fails {fails}");
        }
    }
}

/// KVM creates a vCPU and fails before its first event: nothing is reported, and nothing is left.
#[test]
fn vcpu_without_an_event_leaves_nothing() {
    let bench = Bench::new(10, false);
    let objects = bench.shared.objects.get();
    bench.register_new(key(1), 0, 1).expect("room");
    assert!(bench.registry.metered(key(1)).is_none(), "it has not begun");
    assert_eq!(bench.snapshot(), Reported::default());
    bench.destroy(key(1));
    bench.shared.pass_time();
    assert_eq!(bench.shared.objects.get(), objects);
    assert_eq!(bench.snapshot(), Reported::default());
    // A vCPU that KVM destroys without an event.
    bench.destroy(key(2));
    assert_eq!(bench.snapshot(), Reported::default());
    bench.end();
}

/// Past `max_vcpus`, a vCPU is counted once and never metered, even if there is room later. Past
/// the marks this holds too, unless it is new.
#[test]
fn unmetered_vcpu_stays_unmetered() {
    let bench = Bench::new(1, false);
    bench.register_new(key(0), 0, 0).expect("room");
    let refused = MARKS + 3;
    for place in 1..=refused {
        assert_eq!(
            bench.register_new(key(place), 0, place as u32),
            Err(Refused::NoRoom)
        );
    }
    // KVM loads each one once as it creates it. vCPUs past the marks are counted then.
    assert_eq!(bench.snapshot().unmetered, MARKS as u64);
    for place in 1..=refused {
        let new = || newcomer(&bench.shared, key(place), 0, place as u32);
        let load = bench.registry.at_event(key(place), 1, Phase::Kernel, new);
        match place {
            1..=MARKS => assert!(load.expect("it was counted").is_none()),
            _ => assert_eq!(load.err(), Some(Refused::NoRoom)),
        }
    }
    assert_eq!(bench.snapshot().unmetered, refused as u64);
    bench.destroy(key(0));
    // One with a mark, and one without a mark, created before.
    let old = |place| Newcomer {
        is_new: false,
        ..newcomer(&bench.shared, key(place), 0, place as u32)
    };
    for place in [1, refused] {
        let now = bench.shared.now.get();
        let event = bench
            .registry
            .at_event(key(place), now, Phase::Kernel, || old(place));
        assert!(event.expect("it was counted").is_none());
    }
    assert_eq!(
        bench.snapshot().unmetered,
        refused as u64,
        "each is counted once"
    );
    // A new one is metered, because there is room.
    bench.register_new(key(refused + 1), 0, 1).expect("room");
    assert!(bench.exits(key(refused + 1), 1));
    for place in 1..=refused + 1 {
        bench.destroy(key(place));
    }
    let reported = bench.snapshot();
    assert_eq!(
        (reported.gone, reported.totals, reported.unmetered),
        (1, 1, refused as u64)
    );
    bench.end();
}

/// A vCPU with unreadable exit reasons is marked, and counted once.
#[test]
fn unreadable_vcpu_counts_once() {
    let bench = Bench::new(10, false);
    let newcomer = Newcomer {
        owner: None,
        ..newcomer(&bench.shared, key(1), 0, 1)
    };
    let event = bench
        .registry
        .at_event(key(1), 1, Phase::Kernel, || newcomer);
    assert_eq!(event.err(), Some(Refused::Unreadable));
    let event = bench
        .registry
        .at_event(key(1), 2, Phase::Kernel, || panic!("it is known"));
    assert!(event.expect("it was counted").is_none());
    assert_eq!(bench.snapshot().unmetered, 1);
    bench.destroy(key(1));
    bench.end();
}

/// Polling time counts from the registration of the vCPU to its end.
#[test]
fn polled_time_counts_once() {
    let bench = Bench::new(10, false);
    let totals = || {
        let mut totals = Totals::new();
        bench.registry.add_totals(&mut Walker::new(), &mut totals);
        totals.polled
    };
    for place in 0..2 {
        bench
            .register_new(key(place), 0, place as u32)
            .expect("room");
        assert!(bench.exits(key(place), 1));
    }
    assert_eq!(totals(), 0);
    *bench
        .shared
        .polled
        .borrow_mut()
        .get_mut(&key(0))
        .expect("it lives") += 40;
    *bench
        .shared
        .polled
        .borrow_mut()
        .get_mut(&key(1))
        .expect("it lives") += 2;
    assert_eq!(totals(), 42);
    bench.destroy(key(0));
    assert_eq!(totals(), 42);
    bench.end();
}

/// A vCPU that exits for more reasons than its ledger has histograms keeps all of them, while it lives
/// and in the totals, and gives back the memory.
#[test]
fn histograms_outside_the_ledger_are_copied_and_freed() {
    let bench = Bench::new(10, false);
    bench.register_new(key(0), 0, 0).expect("room");
    assert!(bench.exits(key(0), 1));
    let member = bench.registry.metered(key(0)).expect("it lives");
    let objects = bench.shared.objects.get();
    for code in 0..30 {
        let now = (1 << 40) + u64::from(code) * 1000;
        member.ledger().exit_of::<false>(
            now,
            slot(Isa::Vmx, code),
            &Plain(Rc::clone(&bench.shared)),
        );
        member.ledger().entry(now + 100);
    }
    assert_eq!(bench.shared.objects.get(), objects + 1);
    let samples = || {
        let mut totals = Totals::new();
        bench.registry.add_totals(&mut Walker::new(), &mut totals);
        totals
            .rows()
            .map(|(_, _, histogram)| histogram.iter().sum::<u64>())
            .sum::<u64>()
    };
    // The exit that was taken before has had no entry.
    assert_eq!(samples(), 30);
    bench.destroy(key(0));
    assert_eq!(samples(), 30);
    bench.end();
}

/// A ledger that keeps changing is copied by interrupts, up to the limit; then the copy fails.
#[test]
fn copy_takes_a_bounded_number_of_interrupts() {
    for (failing, due) in [(0, Some(1)), (15, Some(16)), (16, None)] {
        let bench = Bench::new(10, false);
        bench.register_new(key(1), 0, 1).expect("room");
        assert!(bench.exits(key(1), 3));
        bench.shared.failing.set(failing);
        bench.shared.cpus.borrow_mut().insert(key(1), 0);
        let member = bench.registry.metered(key(1)).expect("it is known");
        let mut copy = LedgerCopy::new();
        // At rest, no interrupt is sent.
        assert_eq!(bench.registry.copy(member, &mut copy), Some((0, 0)));
        let tries = Settings {
            copy_tries: 0,
            ..settings(10, false)
        };
        bench.end();
        let shared = Rc::new(Shared::default());
        shared.failing.set(failing);
        let registry = Registry::new(Plain(Rc::clone(&shared)), tries).expect("memory");
        register_new(&registry, &shared, key(1), 0, 1).expect("room");
        shared.now.set(1);
        assert!(exits(&registry, &shared, key(1), 3));
        shared.cpus.borrow_mut().insert(key(1), 0);
        let member = registry.metered(key(1)).expect("it is known");
        let copied = registry.copy(member, &mut copy);
        assert_eq!(copied.map(|(_, sent)| sent), due);
        assert_eq!(shared.interrupts.get(), failing.min(15) + 1);
        let mut buffer = vec![0; size_for(4, 40)];
        shared.interrupts.set(0);
        let snapshot = registry.snapshot(
            &mut Walker::new(),
            &mut buffer,
            &mut Totals::new(),
            HOST,
            TableOptions::default(),
        );
        assert_eq!(
            snapshot.err(),
            due.is_none().then_some(NoSnapshot::CopyFailed)
        );
        destroy(&registry, &shared, key(1));
        drop(registry);
        assert_eq!(shared.objects.get(), 0);
    }
}

/// A clock that restarts moves all ledgers, and no time is lost or added: the numbers go on as if
/// nothing had happened.
#[test]
fn new_clock_moves_all_ledgers() {
    const SLEPT: u64 = 1_000_000_000_000;
    // The last one has not begun.
    const LAST: usize = if cfg!(miri) { 5 } else { 39 };
    let bench = Bench::new(100, false);
    for place in 0..=LAST {
        bench
            .register_new(key(place), place % 2, place as u32)
            .expect("room");
        assert!(place == LAST || bench.exits(key(place), 2));
    }
    let (before, began) = bench.snapshot_at(0);
    let mut offset = 0_u64;
    // Twice: the second restart does not lose what the first one kept.
    for round in 1..=2 {
        let then = bench.shared.now.get() + SLEPT;
        bench.shared.now.set(50 * round);
        bench.registry.rebase(then, 50 * round);
        offset = offset.wrapping_add(then.wrapping_sub(50 * round));
        let (reported, lives) = bench.snapshot_at(offset);
        let firsts = |lives: &Lives| -> Vec<u64> { lives.values().map(|life| life.0).collect() };
        assert_eq!(firsts(&lives), firsts(&began));
        // The sleep is booked to its end, which is now.
        let end = bench.shared.now.get().wrapping_add(offset);
        assert!(lives.values().all(|life| life.1 == end), "{lives:?}");
        assert!(lives.values().all(|life| bench.registry.loaded() <= life.0));
        assert_eq!(reported.exits.len(), LAST);
        assert!(reported.exits.values().all(|exits| *exits == 1 + round));
        for place in 0..LAST {
            assert!(bench.exits(key(place), 1));
        }
        let (reported, lives) = bench.snapshot_at(offset);
        assert!(reported.exits.values().all(|exits| *exits == 2 + round));
        // Two events of 7 ticks for each of them, and no more.
        let latest = lives.values().map(|life| life.1).max();
        assert_eq!(latest, Some(bench.shared.now.get().wrapping_add(offset)));
        assert!(latest <= Some(end + LAST as u64 * 3 * 7));
    }
    // A vCPU that comes now begins now.
    assert!(bench.exits(key(LAST), 1));
    let (reported, lives) = bench.snapshot_at(offset);
    assert_eq!(reported.exits.len(), before.exits.len() + 1);
    assert!(lives[&(LAST as u32)].0 > began[&(LAST as u32 - 1)].1 + 2 * SLEPT);
    bench.end();
}

/// Sums that are renewed each millisecond are renewed by a new clock too, at once.
#[test]
fn new_clock_does_not_delay_sums() {
    let bench = Bench::new(100, false);
    for place in 0..3 * GROUP {
        let id = place as u32;
        bench.register_new(key(place), 0, id).expect("room");
        assert!(bench.exits(key(place), 1));
    }
    let all = 3 * GROUP as u64;
    bench.wait();
    assert_eq!(bench.ask(key(0)), Some(all));
    let then = bench.shared.now.get() + 1000;
    bench.shared.now.set(50);
    bench.registry.rebase(then, 50);
    assert!(bench.exits(key(3 * GROUP - 1), 5));
    bench.wait();
    assert_eq!(bench.ask(key(0)), Some(all + 5));
    bench.end();
}

/// Tables are given to existing and new vCPUs, and go when details are turned off or with their
/// vCPU.
#[test]
fn tables_come_and_go_with_their_vcpus() {
    let bench = Bench::new(8, false);
    let has = |place: usize| {
        let member = bench.registry.metered(key(place)).expect("it is known");
        // SAFETY: Nothing runs beside this.
        unsafe { member.ledger().tables() }.is_some()
    };
    for place in 0..3 {
        assert_eq!(bench.register_new(key(place), 0, place as u32), Ok(()));
        assert!(bench.exits(key(place), 1) && !has(place));
    }
    bench.registry.give_tables(&mut Walker::new());
    assert!((0..3).all(has));
    assert_eq!(bench.register_new(key(3), 1, 3), Ok(()));
    assert!(bench.exits(key(3), 1) && has(3));
    // There is no memory for this one's tables, and it is metered all the same.
    bench.shared.fails.set(bench.shared.allocations.get() + 2);
    assert_eq!(bench.register_new(key(4), 1, 4), Ok(()));
    assert!(bench.exits(key(4), 1) && !has(4));
    assert_eq!(bench.snapshot().exits.len(), 5);
    bench.registry.give_tables(&mut Walker::new());
    assert!((0..5).all(has));
    // Together with its tables, once the readers have ended.
    let objects = || bench.shared.objects.get();
    let before = objects();
    bench.destroy(key(3));
    assert_eq!(before - objects(), 2);
    let before = objects();
    bench.registry.take_tables(&mut Walker::new());
    assert!([0, 1, 2, 4].into_iter().all(|place| !has(place)));
    assert_eq!(objects(), before, "freed beside those who read");
    bench.shared.pass_time();
    assert_eq!(before - objects(), 4);
    assert_eq!(bench.register_new(key(5), 1, 5), Ok(()));
    assert!(bench.exits(key(5), 1) && !has(5));
    let before = objects();
    bench.destroy(key(5));
    assert_eq!(before - objects(), 1);
    bench.registry.give_tables(&mut Walker::new());
    // The rest goes with the registry.
    bench.end();
}

/// Exits of a vCPU that has not left its CPU have the CPU of its entry. A ring freezes at the
/// registry's limit, until another one is asked for.
#[test]
fn slow_exits_have_their_cpu() {
    let shared = Rc::new(Shared::default());
    let slow = Settings {
        slow_ticks: 1000,
        ..settings(10, false)
    };
    let registry = Registry::new(Plain(Rc::clone(&shared)), slow).expect("memory");
    register_new(&registry, &shared, key(1), 0, 1).expect("room");
    shared.now.set(1);
    assert!(exits(&registry, &shared, key(1), 3));
    registry.give_tables(&mut Walker::new());
    // A vCPU that gets its tables as it comes.
    register_new(&registry, &shared, key(2), 0, 2).expect("room");
    assert!(exits(&registry, &shared, key(2), 3));
    let mut now = shared.now.get() + 1000;
    let mut exit = |place: usize, ticks: u64| {
        let ledger = registry.metered(key(place)).expect("it is known").ledger();
        // SAFETY: Nothing runs beside this.
        let tables = unsafe { ledger.tables() }.expect("it has tables");
        let about = About {
            slot: slot(Isa::Vmx, 12),
            nested: false,
            key: None,
            rip: Some(0x1000),
        };
        ledger.exit_with::<true>(tables, now + 100, &about, NoSupply);
        now += 100 + ticks;
        ledger.entry_with(tables, now, || if place == 1 { 7 } else { 9 });
    };
    let reported = || {
        let mut buffer = vec![0; 1 << 20];
        let show = TableOptions { code: true };
        let (mut walker, mut gone) = (Walker::new(), Totals::new());
        let size = registry
            .snapshot(&mut walker, &mut buffer, &mut gone, HOST, show)
            .expect("room");
        let snapshot = Snapshot::parse(&buffer[..size]).expect("a snapshot");
        let tables = snapshot.tables().map(|tables| {
            let exits: Vec<_> = tables
                .slow()
                .map(|exit| (exit.length(), exit.cpus))
                .collect();
            (tables.vcpu, (tables.is_frozen, exits))
        });
        tables
            .collect::<BTreeMap<_, _>>()
            .into_values()
            .collect::<Vec<_>>()
    };
    for place in [1, 2] {
        exit(place, 500);
        exit(place, 800);
    }
    exit(2, 1001);
    let of = |lengths: &[u64], cpu| -> Vec<_> {
        // In the window, and in the ring.
        let both = lengths.iter().chain(lengths);
        both.map(|length| (*length, [Some(cpu); 2])).collect()
    };
    assert_eq!(
        reported(),
        [
            (false, of(&[500, 800], 7)),
            (true, of(&[500, 800, 1001], 9))
        ]
    );
    registry.thaw_rings(&mut Walker::new());
    exit(2, 900);
    let frozen: Vec<_> = reported()
        .into_iter()
        .map(|(is_frozen, _)| is_frozen)
        .collect();
    assert_eq!(frozen, [false, false]);
    for place in [1, 2] {
        destroy(&registry, &shared, key(place));
    }
    drop(registry);
    assert_eq!(shared.objects.get(), 0);
}
