// SPDX-License-Identifier: GPL-2.0

//! Runs all kinds of callers at once and compares each number with what the writers did.
//!
//! Every vCPU has a `History`: the marks of a common clock around its birth and its death, and its
//! exits, counted independently of the meter before and after each. For a snapshot between two
//! marks they tell which vCPUs must be in it, which must be in its totals, and the bounds of
//! each number.

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
        walk::{NoSnapshot, TableOptions, Walker},
        Refused,
    },
    snapshot::{size_for, Reason},
};

use crate::{
    cpu::{Random, SimVcpu},
    measure::MOST_STEPS,
    platform::{Holds, MemoryInUse, Native},
    writer::{self, host, load, newcomer, put, settings, spend, Meter},
};

/// Number of exit reasons.
const REASONS: u32 = 24;

/// A VM with one group of vCPUs, a VM with several, and the first VM whose vCPUs come and go.
const SMALL: usize = 1;
const LARGE: usize = 2;
const COMING: usize = 10;

/// Parameters of a run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Duration of the run.
    pub time: Duration,
    /// Upper bound of the metered vCPUs.
    pub max_vcpus: usize,
    /// vCPUs that stay, in the small VM and in the large one.
    pub staying: (usize, usize),
    /// Upper bound of the vCPUs that come and go and are alive.
    pub coming: usize,
    /// Guests read the sums of the whole host.
    pub host_scope: bool,
    /// Fill freed memory with a pattern, so that a use after free fails.
    pub poison: bool,
}

/// Return the slot of a reason in a snapshot.
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

/// Assert that each record of a snapshot balances to the tick and that each exit followed by an entry
/// has its sample. Return the number of vCPUs and the sum of their exits.
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

/// History of a vCPU, recorded independently of the meter.
#[derive(Debug, Default)]
struct History {
    id: u32,
    /// Marks of the common clock before its announcement and after its first event; 0 is not yet.
    born: [AtomicU64; 2],
    /// Marks of the common clock before and after it was destroyed; 0 is not yet.
    died: [AtomicU64; 2],
    /// True once it had an event while it was metered.
    has_event: AtomicBool,
    /// Number of exits that have begun, and of those that are done.
    begun: AtomicU64,
    done: AtomicU64,
    /// Copy of its ledger at the end.
    last: Mutex<Option<Box<LedgerCopy>>>,
}

/// A vCPU that waits for a CPU.
struct Runnable {
    vcpu: &'static SimVcpu,
    vm: usize,
    history: Arc<History>,
    /// Exits by reason, as the writer caused them.
    exits: [u64; REASONS as usize],
    nested: [u64; REASONS as usize],
    /// Turns on a CPU before it is destroyed; `None` if it stays.
    turns: Option<u64>,
    metered: bool,
}

/// State that all threads of a run share.
struct World {
    plan: Plan,
    meter: Meter,
    clock: AtomicU64,
    stop: AtomicBool,
    ids: AtomicU64,
    /// Histories that the checker of snapshots has not taken yet.
    new_histories: Mutex<Vec<Arc<History>>>,
    queue: Mutex<VecDeque<Runnable>>,
    /// Memory of destroyed vCPUs. The next vCPU gets the same address, as in the kernel.
    unused: Mutex<Vec<&'static SimVcpu>>,
    /// Number of vCPUs that come and go and are alive.
    coming: AtomicU64,
    /// True while no vCPU is created.
    calm: AtomicBool,
    /// vCPUs that the meter refused.
    refused: AtomicU64,
    deaths: AtomicU64,
}

impl World {
    fn mark(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst) + 1
    }

    fn allocate_vcpu(&self) -> &'static SimVcpu {
        let unused = self.unused.lock().expect("no panic").pop();
        let vcpu = unused.unwrap_or_else(|| Box::leak(Box::default()));
        vcpu.polled.store(1000, Relaxed);
        vcpu.alive.store(true, Release);
        vcpu
    }

    /// Create a vCPU. It is announced, as KVM does, or else found at its first event.
    fn birth(&self, vm: usize, announced: bool, turns: Option<u64>) -> Runnable {
        let id = self.ids.fetch_add(1, Relaxed) as u32;
        let history = Arc::new(History {
            id,
            ..History::default()
        });
        self.new_histories
            .lock()
            .expect("no panic")
            .push(Arc::clone(&history));
        let vcpu = self.allocate_vcpu();
        history.born[0].store(self.mark(), SeqCst);
        let mut metered = true;
        if announced {
            let known = self.meter.register_new(vcpu.key(), newcomer(vcpu, vm, id));
            metered = self.is_metered(known.map(|()| true));
        }
        Runnable {
            vcpu,
            vm,
            history,
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

    /// Run a vCPU for some exits. Calls `ask` after each exit, before the entry.
    fn run(
        &self,
        number: u32,
        runnable: &mut Runnable,
        exits: u64,
        random: &mut Random,
        mut ask: impl FnMut(&Runnable),
    ) {
        let cpu = self.meter.platform().cpu_at(number as usize);
        let (key, history) = (runnable.vcpu.key(), &runnable.history);
        let known = load(&self.meter, (number, cpu), runnable.vcpu, || {
            newcomer(runnable.vcpu, runnable.vm, history.id)
        });
        let known = known.map(|member| member.is_some());
        if runnable.metered {
            runnable.metered = self.is_metered(known);
        } else {
            assert_eq!(known, Ok(false), "a refused vCPU is never metered");
        }
        if runnable.metered && history.born[1].load(Relaxed) == 0 {
            history.has_event.store(true, SeqCst);
            history.born[1].store(self.mark(), SeqCst);
        }
        for _ in 0..exits {
            writer::entry(&self.meter, cpu, key);
            spend(random);
            let code = random.below(REASONS.into()) as u32;
            let nested = random.below(8) == 0;
            history
                .begun
                .store(history.begun.load(Relaxed) + 1, Release);
            writer::exit(&self.meter, cpu, key, code, nested);
            history.done.store(history.done.load(Relaxed) + 1, Release);
            runnable.exits[code as usize] += 1;
            runnable.nested[code as usize] += u64::from(nested);
            ask(runnable);
            spend(random);
        }
        runnable.vcpu.polled.fetch_add(7, Relaxed);
        let phase = Phase::ALL[2 + random.below(4) as usize];
        put(&self.meter, cpu, runnable.vcpu, phase);
    }

    /// Destroy a vCPU that is loaded on no CPU.
    fn death(&self, runnable: Runnable) {
        let (key, history) = (runnable.vcpu.key(), &runnable.history);
        if runnable.metered && history.has_event.load(Relaxed) {
            *history.last.lock().expect("no panic") = Some(self.last_of(&runnable));
        }
        history.died[0].store(self.mark(), SeqCst);
        self.meter.destroy(key, runnable.vcpu.polled.load(Relaxed));
        history.died[1].store(self.mark(), SeqCst);
        runnable.vcpu.alive.store(false, Release);
        self.deaths.fetch_add(1, Relaxed);
        self.unused.lock().expect("no panic").push(runnable.vcpu);
    }

    /// Return a copy of the ledger of a vCPU that is loaded on no CPU, after comparing it with its exits.
    fn last_of(&self, runnable: &Runnable) -> Box<LedgerCopy> {
        let member = self
            .meter
            .metered(runnable.vcpu.key())
            .expect("it is metered");
        let mut last = Box::new(LedgerCopy::new());
        let failed = self.meter.copy(member, &mut last);
        assert_eq!(failed, Some((0, 0)), "nobody writes it");
        assert!(last.balances());
        let mut exits = 0;
        for (slot, row, _) in last.rows().filter(|(slot, ..)| *slot != Slot::START) {
            let place = slot.index();
            assert_eq!(
                (row.exits, row.nested_exits),
                (runnable.exits[place], runnable.nested[place])
            );
            exits += row.exits;
        }
        assert_eq!(exits, runnable.exits.iter().sum::<u64>());
        last
    }

    /// Run vCPUs of the queue on a CPU.
    fn run_queue(&self, number: u32) {
        let cpu = self.meter.platform().cpu_at(number as usize);
        cpu.run(None, || {
            let mut random = Random::new(u64::from(number) + 10);
            while !self.stop.load(Relaxed) {
                let next = self.queue.lock().expect("no panic").pop_front();
                let Some(mut runnable) = next else {
                    std::thread::sleep(Duration::from_micros(200));
                    continue;
                };
                let exits = 1 + random.below(100);
                self.run(number, &mut runnable, exits, &mut random, |_| {});
                match &mut runnable.turns {
                    Some(0) => {
                        self.death(runnable);
                        self.coming.fetch_sub(1, Relaxed);
                        continue;
                    }
                    Some(turns) => *turns -= 1,
                    None => {}
                }
                self.queue.lock().expect("no panic").push_back(runnable);
            }
        });
    }

    /// Create vCPUs that come and go: in a VM that grows past two groups and ends, and in small VMs.
    fn create_vcpus(&self, seed: u64) {
        let mut random = Random::new(seed);
        let mut vm = COMING;
        while !self.stop.load(Relaxed) {
            let is_full = self.coming.load(Relaxed) >= self.plan.coming as u64;
            if is_full || self.calm.load(Relaxed) {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            // Many vCPUs in a row belong to one VM, so that it grows; then comes another VM.
            if random.below(60) == 0 {
                vm = COMING + random.below(6) as usize;
            }
            match random.below(8) {
                // KVM fails to create it, or it never runs.
                0 => self.death(self.birth(vm, true, None)),
                1..=2 => self.queue_up(self.birth(vm, false, Some(random.below(3)))),
                _ => self.queue_up(self.birth(vm, true, Some(random.below(3)))),
            }
        }
    }

    fn queue_up(&self, runnable: Runnable) {
        self.coming.fetch_add(1, Relaxed);
        let mut queue = self.queue.lock().expect("no panic");
        queue.push_back(runnable);
    }

    /// Run a vCPU that queries on a CPU. `all` are the vCPUs of its VM. Return the vCPU and the number
    /// of its queries.
    fn ask(
        &self,
        number: u32,
        mut runnable: Runnable,
        all: &[Arc<History>],
        seed: u64,
    ) -> (Runnable, u64) {
        let cpu = self.meter.platform().cpu_at(number as usize);
        let mut asked = 0;
        cpu.run(None, || {
            let mut random = Random::new(seed);
            let mut earlier = EarlierAnswers::new();
            while !self.stop.load(Relaxed) {
                let mut gaps = Random::new(random.below(u64::MAX));
                self.run(number, &mut runnable, 50, &mut gaps, |runnable| {
                    self.check_query(runnable, all, &mut random, &mut earlier);
                    asked += 1;
                });
            }
        });
        (runnable, asked)
    }

    /// Make a random query from a vCPU, and compare the answer with what the writers did and with earlier answers.
    /// `all` are the vCPUs of its VM.
    fn check_query(
        &self,
        runnable: &Runnable,
        all: &[Arc<History>],
        random: &mut Random,
        earlier: &mut EarlierAnswers,
    ) {
        let code = random.below(REASONS.into()) as u32;
        let kind = random.below(QUERIES.len() as u64) as u32;
        let (query, subleaf, number_in) = QUERIES[kind as usize];
        let sum = |of: fn(&History) -> &AtomicU64| {
            all.iter()
                .map(|history| of(history).load(Acquire))
                .sum::<u64>()
        };
        let done = sum(|history| &history.done);
        let answer = self
            .meter
            .answer(runnable.vcpu.key(), query, subleaf + code);
        let answer = number_in(answer.expect("it is metered").1);
        let begun = sum(|history| &history.begun);
        let own = match query {
            // The sums are those of the latest renewal.
            _ if self.plan.host_scope => 0,
            Query::TotalExits => runnable.exits.iter().sum(),
            Query::Exits64 => runnable.exits[code as usize],
            _ => 0,
        };
        let reason = match query {
            Query::TotalExits | Query::TotalCycles => 0,
            _ => code,
        };
        let (before, own_before) = earlier
            .insert((kind, reason), (answer, own))
            .unwrap_or((0, 0));
        assert!(
            answer >= before + (own - own_before),
            "{query:?} {code}: {answer} after {before}, own {own} after {own_before}"
        );
        if query == Query::TotalExits && !self.plan.host_scope {
            assert!(
                answer <= begun,
                "{answer} exits in the answer, {begun} begun"
            );
            // The sums of a large VM may be a little old.
            assert!(
                runnable.vm == LARGE || answer >= done,
                "{answer} exits in the answer, {done} done"
            );
        }
    }

    /// Take snapshots one after the other and compare each with the histories.
    fn check_snapshots(&self) -> Checked {
        let mut checker = Checker {
            world: self,
            histories: HashMap::new(),
            settled: Box::new(Totals::new()),
            walker: Box::new(Walker::new()),
            buffer: Vec::new(),
            checked: Checked::default(),
        };
        while !self.stop.load(Relaxed) {
            // While no vCPU is created, each death is known to be before or after the snapshot, so the
            // totals are known exactly. Every other snapshot is taken at such a time.
            let calm = checker.checked.snapshots % 2 == 1;
            self.calm.store(calm, Relaxed);
            if calm {
                std::thread::sleep(Duration::from_millis(20));
            }
            checker.snapshot();
        }
        self.calm.store(false, Relaxed);
        checker.checked
    }
}

/// Latest answers, by query and reason: the number, and the asker's own exits in it.
type EarlierAnswers = HashMap<(u32, u32), (u64, u64)>;

/// Function that returns the number in an answer.
type NumberIn = fn(Registers) -> u64;

/// Queries: the query, a subleaf to which the reason is added, and the function that returns the number.
const QUERIES: [(Query, u32, NumberIn); 6] = [
    (Query::TotalExits, 0, ebx_eax),
    (Query::TotalCycles, 0, ebx_ecx),
    (Query::Exits64, 0, edx_eax),
    (Query::ReasonCycles, 0, ebx_ecx),
    (Query::PhaseCycles, 0, edx_eax),
    (Query::PhaseCycles, 1 << 16, edx_eax),
];

fn ebx_eax(answer: Registers) -> u64 {
    u64::from(answer.ebx) << 32 | u64::from(answer.eax)
}

fn ebx_ecx(answer: Registers) -> u64 {
    u64::from(answer.ebx) << 32 | u64::from(answer.ecx)
}

fn edx_eax(answer: Registers) -> u64 {
    u64::from(answer.edx) << 32 | u64::from(answer.eax)
}

/// Counts of the checked snapshots.
#[derive(Debug, Default)]
struct Checked {
    snapshots: u64,
    /// Snapshots whose totals were known exactly.
    exact: u64,
    /// Records of vCPUs in all snapshots.
    vcpus: u64,
}

/// Takes snapshots and compares them with the histories.
struct Checker<'a> {
    world: &'a World,
    /// Histories by vCPU ID, except of those vCPUs that are surely in the totals for good.
    histories: HashMap<u32, Arc<History>>,
    /// Sums of the vCPUs that are surely in the totals for good.
    settled: Box<Totals>,
    walker: Box<Walker>,
    buffer: Vec<u8>,
    checked: Checked,
}

impl Checker<'_> {
    fn take_new(&mut self) {
        let new = core::mem::take(&mut *self.world.new_histories.lock().expect("no panic"));
        self.histories
            .extend(new.into_iter().map(|history| (history.id, history)));
    }

    fn snapshot(&mut self) {
        let world = self.world;
        self.take_new();
        let start = world.mark();
        let before: HashMap<u32, u64> = self
            .histories
            .values()
            .map(|history| (history.id, history.done.load(Acquire)))
            .collect();
        let mut gone = Box::new(Totals::new());
        let header = host(&world.meter);
        let meter = &world.meter;
        let size = match meter.snapshot(
            &mut self.walker,
            &mut self.buffer,
            &mut gone,
            header,
            TableOptions::default(),
        ) {
            Ok(size) => size,
            Err(NoSnapshot::CopyFailed) => panic!("a ledger was not copied"),
            // The walk was run; its unfinished result is not checked.
            Err(NoSnapshot::BufferTooSmall(full)) => {
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
            let history = self
                .histories
                .get(&vcpu.id())
                .expect("its history is not settled");
            assert!(
                seen.insert(vcpu.id()),
                "vCPU {} is in the snapshot twice",
                vcpu.id()
            );
            let exits: u64 = vcpu.rows().map(|row| row.exits()).sum();
            let begun = history.begun.load(Acquire);
            let done = before.get(&vcpu.id()).copied().unwrap_or(0);
            assert!(
                done <= exits && exits <= begun,
                "{done} <= {exits} <= {begun}"
            );
            let died = history.died[1].load(SeqCst);
            assert!(
                died == 0 || died > start,
                "vCPU {} was destroyed before",
                vcpu.id()
            );
        }

        let mut expected = self.settled.clone();
        let mut unsure = 0;
        let mut settled = Vec::new();
        for history in self.histories.values() {
            let [born_from, born_to] = [0, 1].map(|at| history.born[at].load(SeqCst));
            let [died_from, died_to] = [0, 1].map(|at| history.died[at].load(SeqCst));
            let is = |mark: u64, before: u64| mark != 0 && mark < before;
            let is_seen = seen.contains(&history.id);
            assert!(
                !is_seen || is(born_from, end),
                "vCPU {} is in the snapshot before its birth",
                history.id
            );
            if is(died_to, start) && !history.has_event.load(SeqCst) {
                assert!(
                    !is_seen,
                    "vCPU {} is in the snapshot without an event",
                    history.id
                );
                settled.push(history.id);
            } else if is(died_from, end) {
                if is_seen || !history.has_event.load(SeqCst) {
                    continue;
                }
                if is(born_to, start) {
                    let last = history.last.lock().expect("no panic");
                    expected.fold(last.as_ref().expect("it is set before it dies"));
                } else {
                    unsure += 1;
                }
                if is(died_to, start) {
                    settled.push(history.id);
                }
            } else if is(born_to, start) {
                assert!(is_seen, "vCPU {} is missing in the snapshot", history.id);
            }
        }
        let departed = snapshot.departed();
        assert!(
            expected.vcpus <= departed && departed <= expected.vcpus + unsure,
            "{departed} departed vCPUs, expected {} to {}",
            expected.vcpus,
            expected.vcpus + unsure
        );
        if unsure == 0 {
            assert_totals(&snapshot, &expected);
            self.checked.exact += 1;
        }
        for id in settled {
            let history = self.histories.remove(&id).expect("it was there");
            let last = history.last.lock().expect("no panic").take();
            if let Some(last) = last {
                self.settled.fold(&last);
            }
        }
        self.checked.snapshots += 1;
        self.checked.vcpus += vcpus as u64;
    }
}

/// Assert that a snapshot's totals are those expected.
fn assert_totals(snapshot: &Snapshot<'_>, expected: &Totals) {
    let mut rows = 0;
    for row in snapshot.totals() {
        let slot = slot_of(row.reason());
        let its = expected.row(slot);
        assert_eq!(row.exits(), its.exits, "{:?}", row.reason());
        assert_eq!(row.nested_exits(), Some(its.nested_exits));
        assert_eq!(row.max(), Some(its.max));
        assert_eq!(Phase::ALL.map(|phase| row.cycles(phase)), its.cycles);
        let (_, _, histogram) = expected.rows().find(|(at, ..)| *at == slot).expect("a row");
        assert_eq!(row.histogram().as_ref(), Some(histogram));
        rows += 1;
    }
    assert_eq!(rows, expected.rows().count());
}

/// Run all kinds of callers at once and print a summary.
pub fn together(plan: Plan) {
    /// CPUs that run vCPUs of the queue, and CPUs whose vCPUs query.
    const WORKERS: u32 = 2;
    const ASKERS: u32 = 3;
    let native = Native::new((WORKERS + ASKERS) as usize, plan.poison);
    let memory = native.memory_in_use();
    let world = World {
        plan,
        meter: Meter::new(native, settings(plan.max_vcpus, plan.host_scope)).expect("memory"),
        clock: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        ids: AtomicU64::new(0),
        new_histories: Mutex::default(),
        queue: Mutex::default(),
        unused: Mutex::default(),
        coming: AtomicU64::new(0),
        calm: AtomicBool::new(false),
        refused: AtomicU64::new(0),
        deaths: AtomicU64::new(0),
    };
    let mut histories: [Vec<Arc<History>>; 2] = Default::default();
    for (place, (vm, count)) in [(SMALL, plan.staying.0), (LARGE, plan.staying.1)]
        .into_iter()
        .enumerate()
    {
        for _ in 0..count {
            let runnable = world.birth(vm, true, None);
            histories[place].push(Arc::clone(&runnable.history));
            world.queue.lock().expect("no panic").push_back(runnable);
        }
    }
    let askers = [SMALL, LARGE, LARGE].map(|vm| {
        let runnable = world.birth(vm, true, None);
        histories[usize::from(vm == LARGE)].push(Arc::clone(&runnable.history));
        runnable
    });
    let began = Instant::now();
    let (checked, askers) = std::thread::scope(|scope| {
        let world = &world;
        let histories = &histories;
        for number in 0..WORKERS {
            scope.spawn(move || world.run_queue(number));
        }
        // Two of them query in the large VM, so that they compete for its sums.
        let askers: Vec<_> = (WORKERS..)
            .zip(askers)
            .map(|(number, runnable)| {
                let all = &histories[usize::from(runnable.vm == LARGE)];
                scope.spawn(move || world.ask(number, runnable, all, number.into()))
            })
            .collect();
        scope.spawn(|| world.create_vcpus(100));
        let checker = scope.spawn(|| world.check_snapshots());
        std::thread::sleep(plan.time);
        world.stop.store(true, Release);
        let askers: Vec<_> = askers
            .into_iter()
            .map(|asker| asker.join().expect("no panic"))
            .collect();
        (checker.join().expect("no panic"), askers)
    });
    let took = began.elapsed();
    let holds = world.meter.platform().take_holds();
    assert!(holds.most_steps <= MOST_STEPS, "{} steps", holds.most_steps);
    finish(world, askers, &checked, &holds, &memory, took);
}

/// Compare all numbers with what the writers did, at rest. Then destroy everything and assert that
/// nothing is left.
fn finish(
    world: World,
    askers: Vec<(Runnable, u64)>,
    checked: &Checked,
    holds: &Holds,
    memory: &MemoryInUse,
    took: Duration,
) {
    assert!(
        checked.snapshots < 10 || checked.exact > 0,
        "no snapshot had totals that are known exactly"
    );
    let asked: u64 = askers.iter().map(|(_, asked)| asked).sum();
    let mut left: Vec<Runnable> = askers.into_iter().map(|(runnable, _)| runnable).collect();
    left.extend(core::mem::take(&mut *world.queue.lock().expect("no panic")));

    // The sums of a large VM are at most a second old; after that the next query renews them.
    std::thread::sleep(Duration::from_millis(1200));
    if !world.plan.host_scope {
        for vm in [SMALL, LARGE] {
            assert_answers(&world, &left, vm);
        }
    }
    let mut expected = Box::new(Totals::new());
    let mut totals = Box::new(Totals::new());
    let mut walker = Box::new(Walker::new());
    world.meter.add_totals(&mut walker, &mut totals);
    if let (true, Some(asker)) = (
        world.plan.host_scope,
        left.iter().find(|runnable| runnable.metered),
    ) {
        let (query, subleaf, number_in) = QUERIES[0];
        let answer = world.meter.answer(asker.vcpu.key(), query, subleaf);
        let answer = number_in(answer.expect("it is metered").1);
        assert_eq!(answer, exits(&totals), "all exits of the host");
    }
    for runnable in left {
        world.death(runnable);
    }
    let histories = core::mem::take(&mut *world.new_histories.lock().expect("no panic"));
    drop(histories);
    world.meter.add_totals(&mut walker, &mut expected);
    assert_eq!(
        totals.vcpus, expected.vcpus,
        "totals before and after the end"
    );
    assert_eq!(totals.polled, expected.polled);
    for slot in Slot::all() {
        assert_eq!(totals.row(slot), expected.row(slot));
    }

    let mut checker = Checker {
        world: &world,
        histories: HashMap::new(),
        settled: expected.clone(),
        walker,
        buffer: Vec::new(),
        checked: Checked::default(),
    };
    checker.snapshot();
    let snapshot = Snapshot::parse(&checker.buffer).expect("a snapshot");
    assert_eq!(snapshot.vcpus().count(), 0, "no vCPU is left");
    assert_eq!(snapshot.unmetered(), world.refused.load(SeqCst));
    assert_eq!(expected.vcpus, snapshot.departed());
    drop(checker);

    let (deaths, refused) = (world.deaths.load(SeqCst), world.refused.load(SeqCst));
    let (.., retired) = memory.now();
    drop(world.meter);
    memory.assert_all_freed();
    println!(
        "{:.1} s: {} exits of {} vCPUs, {refused} of them refused; {deaths} deaths, {retired} objects retired, all memory given back;",
        took.as_secs_f64(),
        exits(&expected),
        deaths,
    );
    println!(
        "  {} snapshots with {} records, {} of them with totals known exactly; {asked} queries; {} holds of the lock, most steps {}",
        checked.snapshots,
        checked.vcpus,
        checked.exact,
        holds.held.count(),
        holds.most_steps,
    );
}

fn exits(totals: &Totals) -> u64 {
    totals.rows().map(|(_, row, _)| row.exits).sum()
}

/// Assert that queries of a VM at rest are answered exactly.
fn assert_answers(world: &World, left: &[Runnable], vm: usize) {
    let members: Vec<_> = left
        .iter()
        .filter(|runnable| runnable.vm == vm && runnable.metered)
        .collect();
    let Some(asker) = members.first() else {
        return;
    };
    let ask = |query, subleaf| {
        let answer = world.meter.answer(asker.vcpu.key(), query, subleaf);
        answer.expect("it is metered").1
    };
    let sum =
        |of: &dyn Fn(&Runnable) -> u64| members.iter().map(|runnable| of(runnable)).sum::<u64>();
    let answer = ebx_eax(ask(Query::TotalExits, 0));
    assert_eq!(
        answer,
        sum(&|runnable| runnable.exits.iter().sum()),
        "all exits of VM {vm}"
    );
    for code in 0..REASONS {
        let answer = edx_eax(ask(Query::Exits64, code));
        assert_eq!(
            answer,
            sum(&|runnable| runnable.exits[code as usize]),
            "VM {vm}, {code}"
        );
        let answer = edx_eax(ask(Query::Exits64, code | 1 << 16));
        assert_eq!(
            answer,
            sum(&|runnable| runnable.nested[code as usize]),
            "VM {vm}, {code}, nested"
        );
    }
}
