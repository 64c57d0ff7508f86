// SPDX-License-Identifier: GPL-2.0

//! All kinds of callers at once, and each number held against what the writers did.
//!
//! Every vCPU has a `Life`: the marks of a common clock around its birth and its death, and its
//! exits, counted apart from the meter before and after each. From these follow, for a snapshot
//! between two marks, the vCPUs that have to be in it, those that have to be in its totals, and
//! between which bounds each number lies.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
        },
        Arc, Mutex,
    },
    time::{Duration, Instant},
};

use exitmeter_meter::{
    leaves::{Query, Registers},
    ledger::{LedgerCopy, Totals},
    phase::Phase,
    reader::{Row, Snapshot},
    reasons::{slot, Isa, Slot},
    registry::{
        walk::{NoSnapshot, Show, Walker},
        Refused,
    },
    snapshot::{size_for, Reason},
};

use crate::{
    cpu::{Chance, Vcpu},
    measure::MOST_STEPS,
    platform::{Holds, MemoryInUse, Native},
    writer::{self, host, load, newcomer, put, settings, spend, Meter},
};

/// Reasons that vCPUs exit for.
const REASONS: u32 = 24;

/// A VM of one group, one of more, and those whose vCPUs come and go.
const SMALL: usize = 1;
const LARGE: usize = 2;
const COMING: usize = 10;

/// What runs at once.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// For how long.
    pub time: Duration,
    /// The most vCPUs that are metered.
    pub max_vcpus: usize,
    /// vCPUs that stay, of the small VM and of the large one.
    pub staying: (usize, usize),
    /// The most vCPUs that have come and not gone.
    pub coming: usize,
    /// Guests read the sums of the host.
    pub host_scope: bool,
    /// Fill freed memory.
    pub poison: bool,
}

/// Return the slot of a reason of the reader's.
fn slot_of(reason: Reason) -> Slot {
    match reason {
        Reason::Code(code) => slot(Isa::Vmx, code),
        Reason::Start => Slot::START,
        Reason::Other => Slot::OTHER,
    }
}

fn samples(row: &Row<'_>) -> u64 {
    row.histogram().expect("a histogram").iter().sum()
}

/// Demand that each record of a snapshot balances to the tick and that each exit has its sample, up
/// to the entry after it; return the number of vCPUs and the exits of all.
pub fn check_records(snapshot: &Snapshot<'_>) -> (usize, u64) {
    let (mut vcpus, mut exits) = (0, 0);
    for vcpu in snapshot.vcpus() {
        assert!(vcpu.balances(), "vCPU {} does not balance", vcpu.id());
        let in_guest = vcpu.phase() == Some(Phase::Guest);
        for row in vcpu.rows() {
            let is_latest = vcpu.latest() == Some(row.reason());
            // The vCPUs of the stress leave the guest by an exit alone.
            let open = u64::from(is_latest && !in_guest && row.exits() > 0);
            assert_eq!(
                samples(&row) + open,
                row.exits(),
                "vCPU {}, {:?}: samples and exits",
                vcpu.id(),
                row.reason()
            );
            exits += row.exits();
        }
        vcpus += 1;
    }
    (vcpus, exits)
}

/// What a vCPU lived through, told apart from the meter.
#[derive(Debug, Default)]
struct Life {
    id: u32,
    /// The common clock before and after it was made known and had its first event; 0 for not yet.
    born: [AtomicU64; 2],
    /// The common clock before and after it was destroyed; 0 for not yet.
    died: [AtomicU64; 2],
    /// It has had an event while it was metered.
    counts: AtomicBool,
    /// Exits that have begun, and those that are done.
    begun: AtomicU64,
    done: AtomicU64,
    /// Its numbers at the end.
    last: Mutex<Option<Box<LedgerCopy>>>,
}

/// A vCPU that waits for a CPU.
struct Runnable {
    vcpu: &'static Vcpu,
    vm: usize,
    life: Arc<Life>,
    /// Exits by reason, as they were caused.
    exits: [u64; REASONS as usize],
    nested: [u64; REASONS as usize],
    /// Turns on a CPU before it is destroyed; `None` for one that stays.
    turns: Option<u64>,
    metered: bool,
}

struct World {
    plan: Plan,
    meter: Meter,
    clock: AtomicU64,
    stop: AtomicBool,
    ids: AtomicU64,
    /// Those that the one who takes snapshots does not know yet.
    new_lives: Mutex<Vec<Arc<Life>>>,
    queue: Mutex<VecDeque<Runnable>>,
    /// Memory of vCPUs that are gone: the next one has the same address, as in the kernel.
    unused: Mutex<Vec<&'static Vcpu>>,
    coming: AtomicU64,
    /// No vCPU is made for a while.
    calm: AtomicBool,
    /// vCPUs that the meter refused.
    refused: AtomicU64,
    deaths: AtomicU64,
}

impl World {
    fn mark(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst) + 1
    }

    fn vcpu(&self) -> &'static Vcpu {
        let unused = self.unused.lock().expect("no panic").pop();
        let vcpu = unused.unwrap_or_else(|| Box::leak(Box::default()));
        vcpu.polled.store(1000, Relaxed);
        vcpu.lives.store(true, Release);
        vcpu
    }

    /// Make a vCPU; `announced`, as by KVM, or to be found at its first event.
    fn birth(&self, vm: usize, announced: bool, turns: Option<u64>) -> Runnable {
        let id = self.ids.fetch_add(1, Relaxed) as u32;
        let life = Arc::new(Life {
            id,
            ..Life::default()
        });
        self.new_lives
            .lock()
            .expect("no panic")
            .push(Arc::clone(&life));
        let vcpu = self.vcpu();
        life.born[0].store(self.mark(), SeqCst);
        let mut metered = true;
        if announced {
            let known = self.meter.announce(vcpu.key(), newcomer(vcpu, vm, id));
            metered = self.is_metered(known.map(|()| true));
        }
        Runnable {
            vcpu,
            vm,
            life,
            exits: [0; REASONS as usize],
            nested: [0; REASONS as usize],
            turns,
            metered,
        }
    }

    fn is_metered(&self, known: Result<bool, Refused>) -> bool {
        match known {
            Ok(metered) => metered,
            Err(Refused::NoRoom) => {
                self.refused.fetch_add(1, SeqCst);
                false
            }
            Err(refused) => panic!("{refused:?}"),
        }
    }

    /// Have a vCPU run for some exits; `ask` after each of them, before the entry.
    fn run(
        &self,
        number: u32,
        it: &mut Runnable,
        exits: u64,
        chance: &mut Chance,
        mut ask: impl FnMut(&Runnable),
    ) {
        let cpu = self.meter.platform().cpu_at(number as usize);
        let (key, life) = (it.vcpu.key(), &it.life);
        let known = load(&self.meter, (number, cpu), it.vcpu, || {
            newcomer(it.vcpu, it.vm, life.id)
        });
        let known = known.map(|member| member.is_some());
        if it.metered {
            it.metered = self.is_metered(known);
        } else {
            assert_eq!(known, Ok(false), "one that was refused is never metered");
        }
        if it.metered && life.born[1].load(Relaxed) == 0 {
            life.counts.store(true, SeqCst);
            life.born[1].store(self.mark(), SeqCst);
        }
        for _ in 0..exits {
            writer::entry(&self.meter, cpu, key);
            spend(chance);
            let code = chance.below(REASONS.into()) as u32;
            let nested = chance.below(8) == 0;
            life.begun.store(life.begun.load(Relaxed) + 1, Release);
            writer::exit(&self.meter, cpu, key, code, nested);
            life.done.store(life.done.load(Relaxed) + 1, Release);
            it.exits[code as usize] += 1;
            it.nested[code as usize] += u64::from(nested);
            ask(it);
            spend(chance);
        }
        it.vcpu.polled.fetch_add(7, Relaxed);
        let phase = Phase::ALL[2 + chance.below(4) as usize];
        put(&self.meter, cpu, it.vcpu, phase);
    }

    /// Destroy a vCPU that runs nowhere.
    fn death(&self, it: Runnable) {
        let (key, life) = (it.vcpu.key(), &it.life);
        if it.metered && life.counts.load(Relaxed) {
            *life.last.lock().expect("no panic") = Some(self.last_of(&it));
        }
        life.died[0].store(self.mark(), SeqCst);
        self.meter.destroy(key, it.vcpu.polled.load(Relaxed));
        life.died[1].store(self.mark(), SeqCst);
        it.vcpu.lives.store(false, Release);
        self.deaths.fetch_add(1, Relaxed);
        self.unused.lock().expect("no panic").push(it.vcpu);
    }

    /// Return the numbers of a vCPU that runs nowhere, held against what it did.
    fn last_of(&self, it: &Runnable) -> Box<LedgerCopy> {
        let member = self.meter.known(it.vcpu.key()).expect("it is metered");
        let mut last = Box::new(LedgerCopy::new());
        assert!(member.ledger().try_copy(&mut last), "nobody writes it");
        assert!(last.balances());
        let mut exits = 0;
        for (slot, row, _) in last.rows().filter(|(slot, ..)| *slot != Slot::START) {
            let place = slot.index();
            assert_eq!(
                (row.exits, row.nested_exits),
                (it.exits[place], it.nested[place])
            );
            exits += row.exits;
        }
        assert_eq!(exits, it.exits.iter().sum::<u64>());
        last
    }

    /// Be a CPU that runs what is runnable.
    fn work(&self, number: u32) {
        let cpu = self.meter.platform().cpu_at(number as usize);
        cpu.run(None, || {
            let mut chance = Chance::new(u64::from(number) + 10);
            while !self.stop.load(Relaxed) {
                let next = self.queue.lock().expect("no panic").pop_front();
                let Some(mut it) = next else {
                    std::thread::sleep(Duration::from_micros(200));
                    continue;
                };
                let exits = 1 + chance.below(100);
                self.run(number, &mut it, exits, &mut chance, |_| {});
                match &mut it.turns {
                    Some(0) => {
                        self.death(it);
                        self.coming.fetch_sub(1, Relaxed);
                        continue;
                    }
                    Some(turns) => *turns -= 1,
                    None => {}
                }
                self.queue.lock().expect("no panic").push_back(it);
            }
        });
    }

    /// Make vCPUs that come and go: in a VM that grows past two groups and ends, and in small ones.
    fn make(&self, seed: u64) {
        let mut chance = Chance::new(seed);
        let mut vm = COMING;
        while !self.stop.load(Relaxed) {
            let is_full = self.coming.load(Relaxed) >= self.plan.coming as u64;
            if is_full || self.calm.load(Relaxed) {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            // A run of vCPUs of one VM, so that it grows; then another one.
            if chance.below(60) == 0 {
                vm = COMING + chance.below(6) as usize;
            }
            match chance.below(8) {
                // KVM fails to make it, or nobody ever runs it.
                0 => self.death(self.birth(vm, true, None)),
                1..=2 => self.queue_up(self.birth(vm, false, Some(chance.below(3)))),
                _ => self.queue_up(self.birth(vm, true, Some(chance.below(3)))),
            }
        }
    }

    fn queue_up(&self, it: Runnable) {
        self.coming.fetch_add(1, Relaxed);
        let mut queue = self.queue.lock().expect("no panic");
        queue.push_back(it);
    }

    /// Be a CPU whose vCPU asks, in a VM whose vCPUs are `all`; return it with the number of its
    /// queries.
    fn ask(&self, number: u32, mut it: Runnable, all: &[Arc<Life>], seed: u64) -> (Runnable, u64) {
        let cpu = self.meter.platform().cpu_at(number as usize);
        let mut asked = 0;
        cpu.run(None, || {
            let mut chance = Chance::new(seed);
            let mut told = HashMap::<(u32, u32), (u64, u64)>::new();
            while !self.stop.load(Relaxed) {
                self.run(
                    number,
                    &mut it,
                    50,
                    &mut Chance::new(chance.below(u64::MAX)),
                    |it| {
                        let code = chance.below(REASONS.into()) as u32;
                        let kind = chance.below(KINDS.len() as u64) as u32;
                        let (query, subleaf, read) = KINDS[kind as usize];
                        let sum = |of: fn(&Life) -> &AtomicU64| {
                            all.iter().map(|life| of(life).load(Acquire)).sum::<u64>()
                        };
                        let done = sum(|life| &life.done);
                        let answer = self.meter.answer(it.vcpu.key(), query, subleaf + code);
                        let answer = read(answer.expect("it is metered").1);
                        let begun = sum(|life| &life.begun);
                        let own = match query {
                            // As of the latest renewal.
                            _ if self.plan.host_scope => 0,
                            Query::TotalExits => it.exits.iter().sum(),
                            Query::Exits64 => it.exits[code as usize],
                            _ => 0,
                        };
                        let per_reason =
                            if query == Query::TotalExits || query == Query::TotalCycles {
                                0
                            } else {
                                code
                            };
                        let (before, own_before) = told
                            .insert((kind, per_reason), (answer, own))
                            .unwrap_or((0, 0));
                        assert!(
                        answer >= before + (own - own_before),
                        "{query:?} {code}: {answer} after {before}, own {own} after {own_before}"
                    );
                        if query == Query::TotalExits && !self.plan.host_scope {
                            assert!(answer <= begun, "{answer} exits told, {begun} begun");
                            // Those of a large VM may be a little old.
                            assert!(
                                it.vm == LARGE || answer >= done,
                                "{answer} told, {done} done"
                            );
                        }
                        asked += 1;
                    },
                );
            }
        });
        (it, asked)
    }

    /// Take snapshots one after the other, and hold each against the lives; return how many, how many
    /// of these had totals that are known exactly, and the vCPUs in all of them.
    fn watch(&self) -> Watched {
        let mut watcher = Watcher {
            world: self,
            lives: HashMap::new(),
            settled: Box::new(Totals::new()),
            walker: Box::new(Walker::new()),
            buffer: Vec::new(),
            watched: Watched::default(),
        };
        while !self.stop.load(Relaxed) {
            // While none is made, it is known of each that goes on which side of the snapshot it
            // went; so every other one is taken at such a time.
            let calm = watcher.watched.snapshots % 2 == 1;
            self.calm.store(calm, Relaxed);
            if calm {
                std::thread::sleep(Duration::from_millis(20));
            }
            watcher.snapshot();
        }
        self.calm.store(false, Relaxed);
        watcher.watched
    }
}

type Read = fn(Registers) -> u64;

/// Queries, with a subleaf to which a reason is added, and how their answers are read.
const KINDS: [(Query, u32, Read); 6] = [
    (Query::TotalExits, 0, |it| {
        u64::from(it.ebx) << 32 | u64::from(it.eax)
    }),
    (Query::TotalCycles, 0, |it| {
        u64::from(it.ebx) << 32 | u64::from(it.ecx)
    }),
    (Query::Exits64, 0, |it| {
        u64::from(it.edx) << 32 | u64::from(it.eax)
    }),
    (Query::ReasonCycles, 0, |it| {
        u64::from(it.ebx) << 32 | u64::from(it.ecx)
    }),
    (Query::PhaseCycles, 0, |it| {
        u64::from(it.edx) << 32 | u64::from(it.eax)
    }),
    (Query::PhaseCycles, 1 << 16, |it| {
        u64::from(it.edx) << 32 | u64::from(it.eax)
    }),
];

#[derive(Debug, Default)]
struct Watched {
    snapshots: u64,
    exact: u64,
    vcpus: u64,
}

/// The one who takes snapshots.
struct Watcher<'a> {
    world: &'a World,
    /// Those of which it is not yet sure that they stand in the totals for good.
    lives: HashMap<u32, Arc<Life>>,
    /// The numbers of all others.
    settled: Box<Totals>,
    walker: Box<Walker>,
    buffer: Vec<u8>,
    watched: Watched,
}

impl Watcher<'_> {
    fn take_new(&mut self) {
        let new = core::mem::take(&mut *self.world.new_lives.lock().expect("no panic"));
        self.lives
            .extend(new.into_iter().map(|life| (life.id, life)));
    }

    fn snapshot(&mut self) {
        let world = self.world;
        self.take_new();
        let start = world.mark();
        let before: HashMap<u32, u64> = self
            .lives
            .values()
            .map(|life| (life.id, life.done.load(Acquire)))
            .collect();
        let mut gone = Box::new(Totals::new());
        let told = host(&world.meter);
        let meter = &world.meter;
        let size = match meter.snapshot(
            &mut self.walker,
            &mut self.buffer,
            &mut gone,
            told,
            Show::default(),
        ) {
            Ok(size) => size,
            Err(NoSnapshot::Busy) => panic!("a ledger was not copied"),
            // What was seen in vain is not looked at: the walk as such was.
            Err(NoSnapshot::Full(full)) => {
                let room = size_for(64, 64 * (REASONS as usize + 1));
                self.buffer = vec![0; full.needed + room];
                return self.snapshot();
            }
        };
        let end = world.mark();
        self.take_new();
        let snapshot = Snapshot::parse(&self.buffer[..size]).expect("a snapshot");
        let (vcpus, _) = check_records(&snapshot);

        let mut seen = HashSet::new();
        for vcpu in snapshot.vcpus() {
            let life = self
                .lives
                .get(&vcpu.id())
                .expect("one that is not long gone");
            assert!(
                seen.insert(vcpu.id()),
                "vCPU {} stands there twice",
                vcpu.id()
            );
            let exits: u64 = vcpu.rows().map(|row| row.exits()).sum();
            let begun = life.begun.load(Acquire);
            let done = before.get(&vcpu.id()).copied().unwrap_or(0);
            assert!(
                done <= exits && exits <= begun,
                "{done} <= {exits} <= {begun}"
            );
            let died = life.died[1].load(SeqCst);
            assert!(died == 0 || died > start, "vCPU {} was gone", vcpu.id());
        }

        let mut due = self.settled.clone();
        let mut unsure = 0;
        let mut settled = Vec::new();
        for life in self.lives.values() {
            let [born_from, born_to] = [0, 1].map(|at| life.born[at].load(SeqCst));
            let [died_from, died_to] = [0, 1].map(|at| life.died[at].load(SeqCst));
            let is = |mark: u64, before: u64| mark != 0 && mark < before;
            let is_seen = seen.contains(&life.id);
            assert!(
                !is_seen || is(born_from, end),
                "vCPU {} was not born",
                life.id
            );
            if is(died_to, start) && !life.counts.load(SeqCst) {
                assert!(!is_seen, "one without an event");
                settled.push(life.id);
            } else if is(died_from, end) {
                if is_seen || !life.counts.load(SeqCst) {
                    continue;
                }
                if is(born_to, start) {
                    let last = life.last.lock().expect("no panic");
                    due.fold(last.as_ref().expect("it is set before it dies"));
                } else {
                    unsure += 1;
                }
                if is(died_to, start) {
                    settled.push(life.id);
                }
            } else if is(born_to, start) {
                assert!(is_seen, "vCPU {} was told by nobody", life.id);
            }
        }
        let told = snapshot.gone();
        assert!(
            due.vcpus <= told && told <= due.vcpus + unsure,
            "{told} gone, {} to {} were",
            due.vcpus,
            due.vcpus + unsure
        );
        if unsure == 0 {
            demand_equal(&snapshot, &due);
            self.watched.exact += 1;
        }
        for id in settled {
            let life = self.lives.remove(&id).expect("it was there");
            let last = life.last.lock().expect("no panic").take();
            if let Some(last) = last {
                self.settled.fold(&last);
            }
        }
        self.watched.snapshots += 1;
        self.watched.vcpus += vcpus as u64;
    }
}

/// Demand that a snapshot's totals are those that are due.
fn demand_equal(snapshot: &Snapshot<'_>, due: &Totals) {
    let mut rows = 0;
    for row in snapshot.totals() {
        let slot = slot_of(row.reason());
        let its = due.row(slot);
        assert_eq!(row.exits(), its.exits, "{:?}", row.reason());
        assert_eq!(row.nested_exits(), Some(its.nested_exits));
        assert_eq!(row.max(), Some(its.max));
        assert_eq!(Phase::ALL.map(|phase| row.cycles(phase)), its.cycles);
        let (_, _, histogram) = due.rows().find(|(at, ..)| *at == slot).expect("a row");
        assert_eq!(row.histogram().as_ref(), Some(histogram));
        rows += 1;
    }
    assert_eq!(rows, due.rows().count());
}

/// Run all kinds of callers at once, and tell what came of it.
pub fn together(plan: Plan) {
    /// CPUs that run vCPUs of the queue, and those whose vCPUs ask.
    const WORKERS: u32 = 2;
    const ASKERS: u32 = 3;
    let native = Native::new((WORKERS + ASKERS) as usize, plan.poison);
    let memory = native.ledger_of_memory();
    let world = World {
        plan,
        meter: Meter::new(native, settings(plan.max_vcpus, plan.host_scope)).expect("memory"),
        clock: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        ids: AtomicU64::new(0),
        new_lives: Mutex::default(),
        queue: Mutex::default(),
        unused: Mutex::default(),
        coming: AtomicU64::new(0),
        calm: AtomicBool::new(false),
        refused: AtomicU64::new(0),
        deaths: AtomicU64::new(0),
    };
    let mut lives: [Vec<Arc<Life>>; 2] = Default::default();
    for (place, (vm, count)) in [(SMALL, plan.staying.0), (LARGE, plan.staying.1)]
        .into_iter()
        .enumerate()
    {
        for _ in 0..count {
            let it = world.birth(vm, true, None);
            lives[place].push(Arc::clone(&it.life));
            world.queue.lock().expect("no panic").push_back(it);
        }
    }
    let askers = [SMALL, LARGE, LARGE].map(|vm| {
        let it = world.birth(vm, true, None);
        lives[usize::from(vm == LARGE)].push(Arc::clone(&it.life));
        it
    });
    let began = Instant::now();
    let (watched, askers) = std::thread::scope(|scope| {
        let world = &world;
        let lives = &lives;
        for number in 0..WORKERS {
            scope.spawn(move || world.work(number));
        }
        // Two of them ask in the large VM, so that they compete for its sums.
        let askers: Vec<_> = (WORKERS..)
            .zip(askers)
            .map(|(number, it)| {
                let all = &lives[usize::from(it.vm == LARGE)];
                scope.spawn(move || world.ask(number, it, all, number.into()))
            })
            .collect();
        scope.spawn(|| world.make(100));
        let watcher = scope.spawn(|| world.watch());
        std::thread::sleep(plan.time);
        world.stop.store(true, Release);
        let askers: Vec<_> = askers
            .into_iter()
            .map(|asker| asker.join().expect("no panic"))
            .collect();
        (watcher.join().expect("no panic"), askers)
    });
    let took = began.elapsed();
    let holds = world.meter.platform().take_holds();
    assert!(holds.most_steps <= MOST_STEPS, "{} steps", holds.most_steps);
    end(world, askers, &watched, &holds, &memory, took);
}

/// Hold all numbers against what the writers did, at rest; then end, and demand that nothing is left.
fn end(
    world: World,
    askers: Vec<(Runnable, u64)>,
    watched: &Watched,
    holds: &Holds,
    memory: &MemoryInUse,
    took: Duration,
) {
    assert!(
        watched.snapshots < 10 || watched.exact > 0,
        "totals were held against the lives"
    );
    let asked: u64 = askers.iter().map(|(_, asked)| asked).sum();
    let mut left: Vec<Runnable> = askers.into_iter().map(|(it, _)| it).collect();
    left.extend(core::mem::take(&mut *world.queue.lock().expect("no panic")));

    // The sums of a large VM are at most a second old, and then renewed by the next one who asks.
    std::thread::sleep(Duration::from_millis(1200));
    if !world.plan.host_scope {
        for vm in [SMALL, LARGE] {
            demand_told(&world, &left, vm);
        }
    }
    let mut due = Box::new(Totals::new());
    let mut totals = Box::new(Totals::new());
    let mut walker = Box::new(Walker::new());
    world.meter.add_totals(&mut walker, &mut totals);
    if let (true, Some(asker)) = (world.plan.host_scope, left.iter().find(|it| it.metered)) {
        let (query, subleaf, read) = KINDS[0];
        let answer = world.meter.answer(asker.vcpu.key(), query, subleaf);
        let told = read(answer.expect("it is metered").1);
        assert_eq!(told, exits(&totals), "all exits of the host");
    }
    for it in left {
        world.death(it);
    }
    let lives = core::mem::take(&mut *world.new_lives.lock().expect("no panic"));
    drop(lives);
    world.meter.add_totals(&mut walker, &mut due);
    assert_eq!(totals.vcpus, due.vcpus, "live and gone, and all gone");
    assert_eq!(totals.polled, due.polled);
    for slot in Slot::all() {
        assert_eq!(totals.row(slot), due.row(slot));
    }

    let mut watcher = Watcher {
        world: &world,
        lives: HashMap::new(),
        settled: due.clone(),
        walker,
        buffer: Vec::new(),
        watched: Watched::default(),
    };
    watcher.snapshot();
    let snapshot = Snapshot::parse(&watcher.buffer).expect("a snapshot");
    assert_eq!(snapshot.vcpus().count(), 0, "nobody is left");
    assert_eq!(snapshot.unmetered(), world.refused.load(SeqCst));
    assert_eq!(due.vcpus, snapshot.gone());
    drop(watcher);

    let (deaths, refused) = (world.deaths.load(SeqCst), world.refused.load(SeqCst));
    let (.., retired) = memory.now();
    drop(world.meter);
    memory.demand_none();
    println!(
        "{:.1} s: {} exits of {} vCPUs, {refused} of them refused; {deaths} deaths, {retired} objects retired, all memory given back;",
        took.as_secs_f64(),
        exits(&due),
        deaths,
    );
    println!(
        "  {} snapshots with {} records, {} of them with totals known exactly; {asked} queries; {} holds of the lock, most steps {}",
        watched.snapshots,
        watched.vcpus,
        watched.exact,
        holds.held.count(),
        holds.most_steps,
    );
}

fn exits(totals: &Totals) -> u64 {
    totals.rows().map(|(_, row, _)| row.exits).sum()
}

/// Demand that a VM at rest is told its numbers exactly.
fn demand_told(world: &World, left: &[Runnable], vm: usize) {
    let members: Vec<_> = left.iter().filter(|it| it.vm == vm && it.metered).collect();
    let Some(asker) = members.first() else {
        return;
    };
    let ask = |query, subleaf| {
        let answer = world.meter.answer(asker.vcpu.key(), query, subleaf);
        answer.expect("it is metered").1
    };
    let sum = |of: &dyn Fn(&Runnable) -> u64| members.iter().map(|it| of(it)).sum::<u64>();
    let (_, _, read) = KINDS[0];
    let told = read(ask(Query::TotalExits, 0));
    assert_eq!(
        told,
        sum(&|it| it.exits.iter().sum()),
        "all exits of VM {vm}"
    );
    for code in 0..REASONS {
        let (_, _, read) = KINDS[2];
        let told = read(ask(Query::Exits64, code));
        assert_eq!(told, sum(&|it| it.exits[code as usize]), "VM {vm}, {code}");
        let told = read(ask(Query::Exits64, code | 1 << 16));
        assert_eq!(
            told,
            sum(&|it| it.nested[code as usize]),
            "VM {vm}, {code}, nested"
        );
    }
}
