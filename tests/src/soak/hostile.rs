// SPDX-License-Identifier: GPL-2.0

//! Guests that mean harm, and VMMs that do odd things to them: nothing but a VM's own numbers can
//! be read, and nobody else pays.

use std::{
    sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::phase::Phase;
use tiny_guests::{pin, Config, Machine, Mode, Program, Quad, Stepped, MAX_QUERIES, UNANSWERED};

use super::{part_of, random::Random};
use crate::{
    cases::Case,
    host::{
        self,
        leaves::{EXITS_64, MAP_2021, PHASE_CYCLES},
        log::Log,
        meter::Meter,
        span::Span,
    },
};

/// How many queries by chance.
const QUERIES: u64 = 10_000_000;

/// The most lines about queries that the module logs at once, and in each second after; see src/log.rs.
const LINES: u64 = 350;
const LINES_A_SECOND: u64 = 8;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "soak: queries by chance show nothing of another VM",
            || by_chance(part_of(QUERIES)),
        )
        .within(7200),
        Case::with_module(
            "",
            "soak: a flood of queries costs a neighbour nothing",
            flood,
        )
        .within(900),
        Case::with_module(
            "log_queries=0",
            "soak: where CPUID faults, the meter's leaves fault as well",
            cpuid_faults,
        ),
        Case::with_module(
            "log_queries=0",
            "soak: a guest that is single-stepped reads what it should",
            single_stepped,
        )
        .within(300),
        Case::with_module(
            "log_queries=0",
            "soak: signals, and registers written back between exit and entry",
            interrupted,
        )
        .within(300),
        Case::with_module(
            "log_queries=0",
            "soak: a VM that is saved and restored in mid-query",
            migrated,
        )
        .within(600),
    ]
}

/// Demands that the module logged no more than it may in that time; how many lines.
fn lines_within_rate(log: &mut Log, time: Duration) -> Result<u64> {
    let lines = log.module_lines()?.len() as u64;
    // And each 30 s one about those that had none.
    let most = LINES + (LINES_A_SECOND + 1) * (time.as_secs() + 1);
    ensure!(
        lines <= most,
        "{lines} lines were logged, at most {most} may"
    );
    Ok(lines)
}

/// A query that asks for reads and writes of MSRs, which those who ask never do and their
/// neighbour does all the time: whoever reads anything but 0 reads another's numbers.
fn about_the_neighbour(random: &mut Random) -> Result<(u32, u32)> {
    let rdmsr = host::pick(31, 0x7c)?;
    Ok(match random.below(5) {
        0 => (MAP_2021.reason_exits, rdmsr),
        1 => (MAP_2021.reason_cycles, rdmsr),
        2 => (EXITS_64, rdmsr),
        3 => (EXITS_64, rdmsr | 1 << 16),
        _ => (
            PHASE_CYCLES,
            rdmsr | (random.below(Phase::COUNT as u64) as u32) << 16,
        ),
    })
}

fn anything(random: &mut Random) -> (u32, u32) {
    let leaf = match random.below(8) {
        0..5 => 0x4fff_fff0 | random.below(16) as u32,
        5 => 0x4fff_ff00 | random.below(256) as u32,
        6 => [0, 1, 7, 0xd, 0x4000_0000, 0x8000_0000, 0x8000_0008][random.below(7) as usize],
        _ => random.next() as u32,
    };
    let subleaf = match random.below(3) {
        0 => random.below(0x500) as u32,
        1 => random.below(0x100) as u32 | (random.below(16) as u32) << 16,
        _ => random.next() as u32,
    };
    (leaf, subleaf)
}

fn by_chance(count: u64) -> Result<()> {
    // The neighbour knows its own numbers, and rests.
    let mut neighbour = Machine::new(Config::new(Program::Rdmsr, Mode::Long, 100_003))?;
    neighbour.run()?;
    let of_neighbour = Meter::read()?.only()?.clone();
    let mut log = Log::from_now()?;
    let started = Instant::now();
    let asked = AtomicU64::new(0);
    let probes = AtomicU64::new(0);
    thread::scope(|scope| {
        let threads: Vec<_> = [Mode::Long, Mode::User, Mode::Real]
            .into_iter()
            .zip(1_u64..)
            .map(|(mode, seed)| {
                let (asked, probes) = (&asked, &probes);
                scope.spawn(move || ask_by_chance(mode, seed, count, asked, probes))
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().ok().context("a thread panicked")??;
            anyhow::Ok(())
        })
    })?;
    let time = started.elapsed();
    let after = Meter::read()?;
    let now = after
        .vcpus
        .iter()
        .find(|vcpu| vcpu.vm == of_neighbour.vm)
        .context("the neighbour is not metered any more")?;
    ensure!(
        now.numbers.exits == of_neighbour.numbers.exits,
        "the neighbour's exits changed while it rested"
    );
    let lines = lines_within_rate(&mut log, time)?;
    println!(
        "{} queries in {:.0} s, {} of them for the neighbour's numbers, all answered 0; {lines} lines logged",
        asked.into_inner(),
        time.as_secs_f64(),
        probes.into_inner()
    );
    Ok(())
}

/// Asks, until all together have asked `count`.
fn ask_by_chance(
    mode: Mode,
    seed: u64,
    count: u64,
    asked: &AtomicU64,
    probes: &AtomicU64,
) -> Result<()> {
    const VCPUS: u8 = 2;
    let mut random = Random::new(seed);
    let mut machine: Option<Machine> = None;
    while asked.load(Ordering::Relaxed) < count {
        let mut queries = Vec::new();
        let mut zero = Vec::new();
        for _ in 0..MAX_QUERIES {
            let probe = random.below(4) == 0;
            let (leaf, subleaf) = match probe {
                true => about_the_neighbour(&mut random)?,
                false => anything(&mut random),
            };
            let high = |random: &mut Random| random.next() << 32;
            queries.push(Quad {
                rax: high(&mut random) | u64::from(leaf),
                rbx: random.next(),
                rcx: high(&mut random) | u64::from(subleaf),
                rdx: random.next(),
            });
            zero.push(probe);
        }
        let machine = match &mut machine {
            Some(machine) => {
                machine.ask(&queries)?;
                machine
            }
            none => none.insert(Machine::new(Config {
                vcpus: VCPUS,
                ..Config::query(mode, queries.clone())
            })?),
        };
        machine.run()?;
        for vcpu in 0..VCPUS {
            for ((query, answer), zero) in queries.iter().zip(machine.answers(vcpu)).zip(&zero) {
                let wide = [answer.rax, answer.rbx, answer.rcx, answer.rdx]
                    .iter()
                    .any(|register| register >> 32 != 0);
                ensure!(
                    !wide && (!zero || answer == Quad::default()),
                    "leaf {:#x}, subleaf {:#x} is answered {answer:x?}",
                    query.rax as u32,
                    query.rcx as u32
                );
            }
        }
        asked.fetch_add(u64::from(VCPUS) * u64::from(MAX_QUERIES), Ordering::Relaxed);
        let probed = zero.iter().filter(|zero| **zero).count() as u64;
        probes.fetch_add(u64::from(VCPUS) * probed, Ordering::Relaxed);
    }
    Ok(())
}

/// What an exit of a neighbour takes KVM, with and without a guest that floods the meter.
fn flood() -> Result<()> {
    const ROUNDS: usize = 15;
    const EXITS: u32 = 3000;
    let out = host::pick(30, 0x7b)?;
    let stop = AtomicBool::new(false);
    let flooding = AtomicBool::new(false);
    let asked = AtomicU64::new(0);
    let mut log = Log::from_now()?;
    let started = Instant::now();
    let [quiet, loud] = thread::scope(|scope| {
        let flooder = scope.spawn(|| -> Result<()> {
            let queries = vec![Quad::cpuid(MAP_2021.total_exits, 0); MAX_QUERIES as usize];
            let mut machine = Machine::new(Config::query(Mode::Long, queries))?;
            while !stop.load(Ordering::Relaxed) {
                if flooding.load(Ordering::Relaxed) {
                    machine.run_with(|_| pin(0))?;
                    machine.rewind()?;
                    asked.fetch_add(u64::from(MAX_QUERIES), Ordering::Relaxed);
                } else {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(())
        });
        let last_cpu = thread::available_parallelism()?.get() - 1;
        let result = (|| {
            let mut costs = [Vec::new(), Vec::new()];
            for round in 0..2 * ROUNDS {
                flooding.store(round % 2 == 1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
                let mut neighbour =
                    Machine::new(Config::new(Program::OutEventfd, Mode::Long, EXITS))?;
                neighbour.run_with(|_| pin(last_cpu))?;
                let meter = Meter::read()?;
                let own = meter.own();
                let mine = own.last().context("the neighbour is not metered")?;
                let (exits, cycles) = (
                    mine.numbers.exits_of(out),
                    mine.numbers.cycles_of(Phase::Kernel, out),
                );
                costs[round % 2].push(cycles / exits.max(1));
            }
            anyhow::Ok(costs)
        })();
        stop.store(true, Ordering::Relaxed);
        flooder.join().ok().context("the flooder panicked")??;
        result
    })?
    .map(|mut costs: Vec<u64>| {
        costs.sort_unstable();
        costs[costs.len() / 2]
    });
    let lines = lines_within_rate(&mut log, started.elapsed())?;
    println!(
        "an OUT to an ioeventfd takes KVM {quiet} ticks, beside {} queries {loud}; {lines} lines logged",
        asked.into_inner()
    );
    // On the AMD host the TSC is the wall clock, so that much is chance on a busy machine.
    let bound = host::pick(quiet / 10, quiet / 2)?;
    ensure!(loud <= quiet + bound, "a neighbour's exits cost more");
    Ok(())
}

fn cpuid_faults() -> Result<()> {
    let query = Quad::cpuid(MAP_2021.total_exits, 0);
    let mut user = Machine::new(Config::query(Mode::User, vec![query; 3]))?;
    user.make_cpuid_fault()?;
    // Without a handler a fault is the end of the vCPU.
    match user.run() {
        Err(error) if error.to_string().contains("Shutdown") => {}
        other => bail!("CPUID at CPL 3 ends with {other:?} instead of a fault"),
    }
    let unanswered = user.answers(0)[0];
    let mut kernel = Machine::new(Config::query(Mode::Long, vec![query; 3]))?;
    kernel.make_cpuid_fault()?;
    kernel.run()?;
    let answered = kernel.answers(0)[2];
    ensure!(
        unanswered.rax == UNANSWERED,
        "a guest whose CPUID faults reads {unanswered:x?}"
    );
    ensure!(answered.rax >= 3, "at CPL 0 it reads {answered:x?}");
    Ok(())
}

/// A guest asks for its CPUID exits, so that the answers count up from `first`.
fn counts_up(answers: &[Quad], first: u64) -> Result<()> {
    for (expected, answer) in (first..).zip(answers) {
        ensure!(
            *answer
                == Quad {
                    rax: expected,
                    ..Quad::default()
                },
            "where {expected} CPUID exits are due, the guest reads {answer:x?}"
        );
    }
    Ok(())
}

fn own_cpuid_exits(count: u32) -> Result<Config> {
    let query = Quad::cpuid(MAP_2021.reason_exits, host::pick(10, 0x72)?);
    Ok(Config::query(Mode::Long, vec![query; count as usize]))
}

fn single_stepped() -> Result<()> {
    let span = Span::begin()?;
    let mut machine = Machine::new(own_cpuid_exits(MAX_QUERIES)?)?;
    let Stepped::ToTheEnd(steps) = machine.step(u32::MAX)? else {
        bail!("the guest has no end");
    };
    counts_up(&machine.answers(0), 1)?;
    span.end()?;
    println!("{MAX_QUERIES} queries in {steps} single steps");
    Ok(())
}

fn interrupted() -> Result<()> {
    let span = Span::begin()?;
    let thread_id = AtomicI32::new(0);
    // SAFETY: The handler does nothing; without SA_RESTART, KVM_RUN ends with EINTR.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
    let mut signals = 0_u64;
    let mut rounds = 0_u64;
    thread::scope(|scope| {
        let guest = scope.spawn(|| -> Result<u64> {
            let mut rounds = 0;
            for _ in 0..20 {
                let mut machine = Machine::new(Config {
                    meddle: true,
                    ..own_cpuid_exits(MAX_QUERIES)?
                })?;
                machine.run_with(|_| {
                    // SAFETY: No requirements.
                    thread_id.store(unsafe { libc::gettid() }, Ordering::Relaxed);
                    Ok(())
                })?;
                thread_id.store(0, Ordering::Relaxed);
                counts_up(&machine.answers(0), 1)?;
                let mut machine = Machine::new(Config {
                    meddle: true,
                    ..Config::new(Program::OutUser, Mode::Long, 500)
                })?;
                let seen = machine.run()?;
                ensure!(seen[0].ports == 500, "{} OUTs of 500", seen[0].ports);
                rounds += 1;
            }
            Ok(rounds)
        });
        while !guest.is_finished() {
            let id = thread_id.load(Ordering::Relaxed);
            if id != 0 {
                // By its number in the kernel, for which a thread that has just ended is an error at
                // worst, and not memory that is gone.
                // SAFETY: tgkill() touches no memory, and the signal has a handler.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, libc::SIGUSR1) };
                signals += 1;
            }
            thread::sleep(Duration::from_micros(200));
        }
        rounds = guest.join().ok().context("the guest's thread panicked")??;
        anyhow::Ok(())
    })?;
    span.end()?;
    println!("{rounds} guests, {signals} signals");
    Ok(())
}

extern "C" fn nothing(_: libc::c_int) {}

/// A guest is stopped at a random instruction and goes on in another VM. There it reads the new
/// VM's numbers: from 1 again.
fn migrated() -> Result<()> {
    let times = part_of(200);
    const ASKED: u32 = 60;
    let mut random = Random::new(3);
    let mut halves = 0_u64;
    for _ in 0..times {
        let span = Span::begin()?;
        let mut machine = Machine::new(own_cpuid_exits(ASKED)?)?;
        let steps = random.below(u64::from(ASKED) * 14) as u32;
        if machine.step(steps)? != Stepped::AsTold {
            continue;
        }
        let mut other = machine.migrate()?;
        other.run()?;
        let answers = other.answers(0);
        // Those before count up, and those after again.
        let restart = (1..answers.len())
            .find(|at| answers[*at].rax <= answers[at - 1].rax)
            .unwrap_or(answers.len());
        let (before, after) = answers.split_at(restart);
        counts_up(before, 1)?;
        counts_up(after, 1)?;
        halves += u64::from(!after.is_empty());
        drop(other);
        span.end()?;
    }
    ensure!(
        halves > times / 2,
        "{halves} of {times} were stopped half-way"
    );
    println!("{times} VMs saved and restored, {halves} of them between two queries");
    Ok(())
}
