// SPDX-License-Identifier: GPL-2.0

//! Measures how long each kind of caller waits, and how long and for how many steps the lock is held.

use std::{
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release},
    },
    time::{Duration, Instant},
};

use exitmeter_meter::{
    leaves::Query,
    ledger::{LedgerCopy, Totals, TRIES},
    phase::Phase,
    reader::Snapshot,
    registry::{
        walk::{NoSnapshot, TableOptions, Walker},
        Platform,
    },
    snapshot::size_for,
};

use crate::{
    cpu::{be_real_time, pin, ticks, Random, SimVcpu},
    platform::{millisecond, pauses, Holds, Native},
    spread::Spread,
    together::check_records,
    writer::{self, host, load, newcomer, put, settings, spend, spend_between, Meter, GAP},
};

/// One kind of caller: a function that repeats its call for the plan's time.
type Caller = fn(&Guests);

/// Upper bound of the steps in one hold of the lock, for any number of vCPUs.
pub const MOST_STEPS: u64 = 64;

/// Upper bound of the interrupts for one copy.
pub const MOST_INTERRUPTS: u32 = 16;

/// Parameters of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Time for each kind of caller.
    pub time: Duration,
    /// Number of exit reasons in each vCPU's ledger.
    pub reasons: u32,
    /// Fill freed memory with a pattern, so that a use after free fails.
    pub poison: bool,
    /// Run callers and writer at a real-time priority.
    pub real_time: bool,
}

/// Number of vCPUs and VMs.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// vCPUs in total.
    pub vcpus: usize,
    /// VMs, each with the same number of vCPUs.
    pub vms: usize,
}

/// Orders to the writer's CPU: run nothing, one vCPU, or all vCPUs in turn.
const NOTHING: u32 = 0;
const ONE: u32 = 1;
const ALL: u32 = 2;
/// Run one vCPU with transitions faster than any guest's, or with nothing between its transitions.
const FAST: u32 = 3;
const FASTEST: u32 = 4;
const END: u32 = 5;

/// Exits of one vCPU before the next vCPU gets the CPU.
const STINT: usize = 200;

/// CPUs of the machine for the callers and for the writer.
const CALLER: usize = 0;
const WRITER: usize = 1;

fn micros(ticks: f64) -> f64 {
    ticks * 1000.0 / millisecond() as f64
}

fn print_line(what: &str, spread: &Spread, beside: &str) {
    let of = |share| micros(spread.quantile(share) as f64);
    println!(
        "| {what} | {} | {:.2} | {:.2} | {:.1} | {:.1} | {:.1} | {beside}",
        spread.count(),
        micros(spread.mean()),
        of(0.5),
        of(0.99),
        of(0.999),
        micros(spread.worst() as f64),
    );
}

fn set_up_thread(cpu: usize, real_time: bool) {
    pin(cpu);
    if real_time {
        be_real_time();
    }
}

/// Print the heads of the columns.
pub fn print_head() {
    println!("| µs | count | mean | median | 99% | 99.9% | worst | beside |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |");
}

/// Measure how the machine delays a loop that waits for nothing. All other results include that delay.
pub fn measure_machine(time: Duration, real_time: bool) {
    let _: () = std::thread::scope(|scope| {
        scope.spawn(|| {
            set_up_thread(CALLER, real_time);
            let mut spread = Spread::default();
            let (began, round) = (Instant::now(), millisecond() / 100);
            while began.elapsed() < time {
                let from = ticks();
                while ticks() - from < round {
                    core::hint::spin_loop();
                }
                spread.add(ticks() - from - round);
            }
            print_line(
                "a loop of 10 µs, above that",
                &spread,
                "the machine's own |",
            );
        });
    });
}

fn summary(what: &str, spread: &Spread) -> String {
    format!(
        "{what} {:.2}, 99.9% {}, most {}",
        spread.mean(),
        spread.quantile(0.999),
        spread.worst()
    )
}

/// The vCPUs of one measurement and the registry that meters them.
struct Guests {
    meter: Meter,
    vcpus: Vec<SimVcpu>,
    size: Size,
    plan: Plan,
}

impl Guests {
    fn new(size: Size, plan: Plan) -> Self {
        let native = Native::new(2, plan.poison);
        let meter = Meter::new(native, settings(size.vcpus + 256, false)).expect("memory");
        let vcpus: Vec<_> = (0..size.vcpus).map(|_| SimVcpu::new()).collect();
        let mut random = Random::new(1);
        let cpu = meter.platform().cpu_at(WRITER);
        for (id, vcpu) in vcpus.iter().enumerate() {
            let vm = id / (size.vcpus / size.vms);
            meter
                .register_new(vcpu.key(), newcomer(vcpu, vm, id as u32))
                .expect("there is room");
            load(&meter, (WRITER as u32, cpu), vcpu, || {
                unreachable!("it is known")
            })
            .expect("it is known");
            for code in 0..plan.reasons {
                writer::entry(&meter, cpu, vcpu.key());
                spend(&mut random);
                writer::exit(&meter, cpu, vcpu.key(), code, false);
            }
            put(&meter, cpu, vcpu, Phase::User);
        }
        meter.platform().take_holds();
        Self {
            meter,
            vcpus,
            size,
            plan,
        }
    }

    /// Run vCPUs on the writer's CPU, as `order` says.
    fn write(&self, order: &AtomicU32) {
        let cpu = self.meter.platform().cpu_at(WRITER);
        let mut random = Random::new(2);
        let mut turn = 0;
        if self.plan.real_time {
            be_real_time();
        }
        cpu.run(Some(WRITER), || loop {
            let ordered = order.load(Acquire);
            match ordered {
                END => return,
                NOTHING => {
                    std::thread::sleep(Duration::from_micros(200));
                    continue;
                }
                ONE | FAST | FASTEST => turn = 0,
                _ => turn = (turn + 1) % self.vcpus.len(),
            }
            let gap = match ordered {
                FAST => (GAP.0, GAP.0),
                FASTEST => (0, 0),
                _ => GAP,
            };
            let vcpu = &self.vcpus[turn];
            let key = vcpu.key();
            load(&self.meter, (WRITER as u32, cpu), vcpu, || {
                unreachable!("it is known")
            })
            .expect("it is known");
            for _ in 0..STINT {
                writer::entry(&self.meter, cpu, key);
                spend_between(&mut random, gap);
                let code = random.below(self.plan.reasons.into()) as u32;
                writer::exit(&self.meter, cpu, key, code, false);
                spend_between(&mut random, gap);
            }
            put(&self.meter, cpu, vcpu, Phase::User);
        });
    }

    /// Describe the holds of the lock since the last call.
    fn describe_new_holds(&self) -> String {
        Self::describe_holds(&self.meter.platform().take_holds())
    }

    fn describe_holds(holds: &Holds) -> String {
        assert!(
            holds.most_steps <= MOST_STEPS,
            "{} steps in one hold of the lock",
            holds.most_steps
        );
        if holds.held.count() == 0 {
            return "no lock |".to_owned();
        }
        format!(
            "lock held {:.2}, 99.9% {:.1}, worst {:.1}; most steps {} |",
            micros(holds.held.mean()),
            micros(holds.held.quantile(0.999) as f64),
            micros(holds.held.worst() as f64),
            holds.most_steps
        )
    }

    fn copies(&self) {
        self.copy("copy of one ledger");
    }

    fn copies_of_fast(&self) {
        self.copy("the same, a transition each 300 ticks");
    }

    /// Copy a ledger that is written all the time: all attempts fail, then interrupts follow.
    fn copies_of_fastest(&self) {
        self.copy("the same, one transition at once after the other");
        let member = self
            .meter
            .metered(self.vcpus[0].key())
            .expect("it is known");
        let mut copy = Box::new(LedgerCopy::new());
        let [mut tries, mut forced, mut sent_all] = [(); 3].map(|()| Spread::default());
        let began = Instant::now();
        while began.elapsed() < self.plan.time {
            let from = ticks();
            if member.copying(&mut copy, None).copy(TRIES).is_none() {
                tries.add(ticks() - from);
            }
            let (from, mut sent) = (ticks(), 1);
            let mut copying = member.copying(&mut copy, None);
            let platform = self.meter.platform();
            while !platform.copy_on(WRITER as u32, &mut copying) {
                sent += 1;
                assert!(sent <= MOST_INTERRUPTS.into(), "{sent} interrupts");
            }
            forced.add(ticks() - from);
            sent_all.add(sent);
            assert!(copy.balances(), "a copy that does not balance");
        }
        print_line("all attempts in vain", &tries, "|");
        let sent = summary("signals", &sent_all);
        print_line(
            "a signal in place of the interrupt",
            &forced,
            &format!("{sent} |"),
        );
    }

    fn copy(&self, what: &str) {
        let member = self
            .meter
            .metered(self.vcpus[0].key())
            .expect("it is known");
        let mut copy = Box::new(LedgerCopy::new());
        let [mut alone, mut interrupted] = [(); 2].map(|()| Spread::default());
        let [mut attempts, mut interrupts] = [(); 2].map(|()| Spread::default());
        let mut random = Random::new(3);
        let began = Instant::now();
        while began.elapsed() < self.plan.time {
            let from = ticks();
            let (tries, sent) = self.meter.copy(member, &mut copy).expect("a copy");
            let took = ticks() - from;
            assert!(tries <= TRIES && sent <= MOST_INTERRUPTS, "{tries}, {sent}");
            assert!(copy.balances(), "a copy that does not balance");
            attempts.add(u64::from(tries) + u64::from(sent == 0));
            match sent {
                0 => alone.add(took),
                _ => {
                    interrupted.add(took);
                    interrupts.add(sent.into());
                }
            }
            let until = ticks() + random.below(20_000);
            while ticks() < until {}
        }
        let lock = self.describe_new_holds();
        print_line(
            what,
            &alone,
            &format!("{}; {lock}", summary("attempts", &attempts)),
        );
        if interrupted.count() > 0 {
            let interrupts = summary("interrupts", &interrupts);
            print_line(
                &format!("{what}, by an interrupt"),
                &interrupted,
                &format!("{interrupts} |"),
            );
        }
    }

    fn snapshots(&self) {
        let (mut walker, mut gone) = (Box::new(Walker::new()), Box::new(Totals::new()));
        let rows = self.size.vcpus * (self.plan.reasons as usize + 2);
        let mut buffer = vec![0; size_for(self.size.vcpus + 1, rows)];
        let mut spread = Spread::default();
        let (began, mut exits) = (Instant::now(), 0);
        let mut steps = 0;
        while began.elapsed() < self.plan.time || spread.count() < 2 {
            *gone = Totals::new();
            let from = ticks();
            let head = host(&self.meter);
            let size = match self.meter.snapshot(
                &mut walker,
                &mut buffer,
                &mut gone,
                head,
                TableOptions::default(),
            ) {
                Ok(size) => size,
                Err(NoSnapshot::BufferTooSmall(_)) => panic!("the buffer is large enough"),
                Err(NoSnapshot::CopyFailed) => panic!("a ledger was not copied"),
            };
            spread.add(ticks() - from);
            let snapshot = Snapshot::parse(&buffer[..size]).expect("a snapshot");
            let (vcpus, now) = check_records(&snapshot);
            assert_eq!(
                vcpus, self.size.vcpus,
                "each vCPU stands in the snapshot once"
            );
            assert!(now >= exits, "exits fell from {exits} to {now}");
            exits = now;
            steps += 1;
        }
        let holds = self.meter.platform().take_holds();
        assert!(holds.most_steps <= MOST_STEPS, "{} steps", holds.most_steps);
        print_line(
            "snapshot",
            &spread,
            &format!(
                "each {} holds, {} steps; lock held {:.2}, 99.9% {:.1}, worst {:.1}; most steps {} |",
                holds.held.count() / steps,
                holds.all_steps / steps,
                micros(holds.held.mean()),
                micros(holds.held.quantile(0.999) as f64),
                micros(holds.held.worst() as f64),
                holds.most_steps
            ),
        );
    }

    fn queries(&self) {
        let key = self.vcpus[self.size.vcpus.min(2) - 1].key();
        let kinds: [(&str, &[Query]); 2] = [
            (
                "query of all reasons",
                &[Query::TotalExits, Query::TotalCycles],
            ),
            (
                "query of one reason",
                &[Query::Exits64, Query::PhaseCycles, Query::ReasonCycles],
            ),
        ];
        for (what, queries) in kinds {
            let [mut plain, mut renewing] = [(); 2].map(|()| Spread::default());
            let (mut random, began) = (Random::new(4), Instant::now());
            while began.elapsed() < self.plan.time {
                let query = queries[random.below(queries.len() as u64) as usize];
                let code = random.below(self.plan.reasons.into()) as u32;
                let (from, before) = (ticks(), pauses());
                let answer = self.meter.answer(key, query, code);
                let took = ticks() - from;
                assert!(answer.is_some(), "a vCPU that is known is answered");
                match pauses() == before {
                    true => plain.add(took),
                    false => renewing.add(took),
                }
            }
            let holds = self.meter.platform().take_holds();
            assert_eq!(holds.held.count(), 0, "a query takes no lock");
            print_line(what, &plain, "no lock |");
            if renewing.count() > 0 {
                print_line(&format!("{what}, that renews"), &renewing, "no lock |");
            }
        }
    }

    fn births(&self) {
        let [mut births, mut deaths] = [(); 2].map(|()| Spread::default());
        let began = Instant::now();
        let mut made: Vec<SimVcpu> = (0..64).map(|_| SimVcpu::new()).collect();
        let [mut lock_of_births, mut lock_of_deaths] = [(); 2].map(|()| Holds::default());
        while began.elapsed() < self.plan.time || births.count() == 0 {
            for (number, vcpu) in made.iter_mut().enumerate() {
                *vcpu.alive.get_mut() = true;
                let id = self.size.vcpus + number;
                // The new vCPUs join the one VM, or each has a VM of its own.
                let vm = if self.size.vms == 1 { 0 } else { id };
                let newcomer = newcomer(vcpu, vm, id as u32);
                let from = ticks();
                self.meter
                    .register_new(vcpu.key(), newcomer)
                    .expect("there is room");
                let born = self
                    .meter
                    .at_event(vcpu.key(), ticks(), Phase::Kernel, || newcomer);
                births.add(ticks() - from);
                assert!(born.expect("it is known").is_some(), "it is metered");
            }
            lock_of_births.add(&self.meter.platform().take_holds());
            for vcpu in &mut made {
                let from = ticks();
                self.meter.destroy(vcpu.key(), 0);
                deaths.add(ticks() - from);
                *vcpu.alive.get_mut() = false;
            }
            lock_of_deaths.add(&self.meter.platform().take_holds());
        }
        print_line("birth", &births, &Self::describe_holds(&lock_of_births));
        print_line("death", &deaths, &Self::describe_holds(&lock_of_deaths));
    }

    fn destroy_all(mut self) {
        let memory = self.meter.platform().memory_in_use();
        for vcpu in &mut self.vcpus {
            self.meter.destroy(vcpu.key(), 0);
            *vcpu.alive.get_mut() = false;
        }
        drop(self.meter);
        memory.assert_all_freed();
    }
}

/// Measure all kinds of callers with `size` vCPUs and VMs.
pub fn measure(size: Size, plan: Plan) {
    println!();
    println!(
        "{} vCPUs in {} VMs, {} reasons used:",
        size.vcpus, size.vms, plan.reasons
    );
    println!();
    print_head();
    let guests = Guests::new(size, plan);
    let order = AtomicU32::new(NOTHING);
    std::thread::scope(|scope| {
        scope.spawn(|| guests.write(&order));
        let callers = scope.spawn(|| {
            set_up_thread(CALLER, plan.real_time);
            let callers: [(u32, Caller); 6] = [
                (ONE, Guests::copies),
                (FAST, Guests::copies_of_fast),
                (FASTEST, Guests::copies_of_fastest),
                (ALL, Guests::snapshots),
                // A single vCPU does not run while it queries.
                (if size.vcpus > 1 { ONE } else { NOTHING }, Guests::queries),
                (ALL, Guests::births),
            ];
            for (ordered, caller) in callers {
                order.store(ordered, Release);
                std::thread::sleep(Duration::from_millis(5));
                guests.meter.platform().take_holds();
                caller(&guests);
            }
            order.store(END, Release);
        });
        callers.join().expect("no panic");
    });
    assert_eq!(order.load(Relaxed), END);
    guests.destroy_all();
}
