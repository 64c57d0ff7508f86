// SPDX-License-Identifier: GPL-2.0

//! Malicious guests, and VMMs that manipulate their guests: a VM can read only its own numbers, and
//! does not slow down others.

use std::{
    sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::phase::Phase;
use tiny_guests::{
    pin, Config, Mode, Program, Registers64, Stepped, TinyVm, MAX_QUERIES, UNANSWERED,
};

use super::{random::Random, scaled};
use crate::{
    cases::Case,
    host::{
        self, codes,
        leaves::{EXITS_64, MAP_2021, PHASE_CYCLES},
        log::Log,
        meter::MeterSnapshot,
        span::Span,
        task,
    },
};

/// Number of random queries.
const QUERIES: u64 = 10_000_000;

/// Limits on the module's lines about queries: at once, and in each later second; see src/log.rs.
const BURST_LINES: u64 = 350;
const LINES_PER_SECOND: u64 = 8;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "soak: random queries show nothing of another VM",
            || random_queries(scaled(QUERIES)),
        )
        .within(7200),
        Case::with_module(
            "",
            "soak: a flood of queries does not slow down a neighbour",
            flood,
        )
        .within(900),
        Case::with_module(
            "log_queries=0",
            "soak: where CPUID faults, the meter's leaves fault, too",
            cpuid_faults,
        ),
        Case::with_module(
            "log_queries=0",
            "soak: a single-stepped guest reads the right answers",
            single_stepped,
        )
        .within(300),
        Case::with_module(
            "log_queries=0",
            "soak: signals and register writes between exit and entry do not change answers",
            signals_and_register_writes,
        )
        .within(300),
        Case::with_module(
            "log_queries=0",
            "soak: a VM that is saved and restored reads the numbers of its new vCPU",
            saved_and_restored,
        )
        .within(600),
    ]
}

/// Check that the module logged no more lines in `time` than its limit allows, and return their number.
fn check_line_rate(log: &mut Log, time: Duration) -> Result<u64> {
    let lines = log.module_lines()?.len() as u64;
    // One more line each 30 s reports the queries without a line.
    let most = BURST_LINES + (LINES_PER_SECOND + 1) * (time.as_secs() + 1);
    ensure!(
        lines <= most,
        "{lines} lines were logged, and the limit is {most}"
    );
    Ok(lines)
}

/// Return a random query for reads and writes of MSRs. The asking guests never access one, and their
/// neighbour does nothing else, so an answer other than 0 shows the neighbour's numbers.
fn query_for_neighbour(random: &mut Random) -> Result<(u32, u32)> {
    let rdmsr = codes::rdmsr()?;
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

fn random_query(random: &mut Random) -> (u32, u32) {
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

fn random_queries(count: u64) -> Result<()> {
    // The neighbour has known numbers, and is at rest.
    let mut neighbour = TinyVm::new(Config::new(Program::Rdmsr, Mode::Long, 100_003))?;
    neighbour.run()?;
    let neighbour_before = MeterSnapshot::read()?.only()?.clone();
    let mut log = Log::from_now()?;
    let started = Instant::now();
    let asked = AtomicU64::new(0);
    let for_neighbour = AtomicU64::new(0);
    thread::scope(|scope| {
        let threads: Vec<_> = [Mode::Long, Mode::User, Mode::Real]
            .into_iter()
            .zip(1_u64..)
            .map(|(mode, seed)| {
                let (asked, for_neighbour) = (&asked, &for_neighbour);
                scope.spawn(move || ask_random_queries(mode, seed, count, asked, for_neighbour))
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| task::join(thread).map(drop))
    })?;
    let time = started.elapsed();
    let after = MeterSnapshot::read()?;
    let now = after
        .vcpus
        .iter()
        .find(|vcpu| vcpu.vm == neighbour_before.vm)
        .context("the neighbour is not metered any more")?;
    ensure!(
        now.numbers.exits == neighbour_before.numbers.exits,
        "the neighbour's exits changed while it rested"
    );
    let lines = check_line_rate(&mut log, time)?;
    println!(
        "{} queries in {:.0} s, {} of them for the neighbour's numbers, all answered 0; {lines} lines logged",
        asked.into_inner(),
        time.as_secs_f64(),
        for_neighbour.into_inner()
    );
    Ok(())
}

/// Ask random queries until all threads together have asked `count`.
fn ask_random_queries(
    mode: Mode,
    seed: u64,
    count: u64,
    asked: &AtomicU64,
    for_neighbour: &AtomicU64,
) -> Result<()> {
    const VCPUS: u8 = 2;
    let mut random = Random::new(seed);
    let mut machine: Option<TinyVm> = None;
    while asked.load(Ordering::Relaxed) < count {
        let mut queries = Vec::new();
        let mut zero = Vec::new();
        for _ in 0..MAX_QUERIES {
            let probe = random.below(4) == 0;
            let (leaf, subleaf) = match probe {
                true => query_for_neighbour(&mut random)?,
                false => random_query(&mut random),
            };
            let high = |random: &mut Random| random.next() << 32;
            queries.push(Registers64 {
                rax: high(&mut random) | u64::from(leaf),
                rbx: random.next(),
                rcx: high(&mut random) | u64::from(subleaf),
                rdx: random.next(),
            });
            zero.push(probe);
        }
        let machine = match &mut machine {
            Some(machine) => {
                machine.set_queries(&queries)?;
                machine
            }
            none => none.insert(TinyVm::new(Config {
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
                    !wide && (!zero || answer == Registers64::default()),
                    "leaf {:#x}, subleaf {:#x} is answered {answer:x?}",
                    query.rax as u32,
                    query.rcx as u32
                );
            }
        }
        asked.fetch_add(u64::from(VCPUS) * u64::from(MAX_QUERIES), Ordering::Relaxed);
        let probed = zero.iter().filter(|zero| **zero).count() as u64;
        for_neighbour.fetch_add(u64::from(VCPUS) * probed, Ordering::Relaxed);
    }
    Ok(())
}

/// Compare KVM's time for an exit of a neighbour with and without a guest that floods the meter.
fn flood() -> Result<()> {
    const ROUNDS: usize = 15;
    const EXITS: u32 = 3000;
    let out = codes::io()?;
    let stop = AtomicBool::new(false);
    let flooding = AtomicBool::new(false);
    let asked = AtomicU64::new(0);
    let mut log = Log::from_now()?;
    let started = Instant::now();
    let [quiet, loud] = thread::scope(|scope| {
        let flooder = scope.spawn(|| -> Result<()> {
            let queries = vec![Registers64::cpuid(MAP_2021.total_exits, 0); MAX_QUERIES as usize];
            let mut machine = TinyVm::new(Config::query(Mode::Long, queries))?;
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
                    TinyVm::new(Config::new(Program::OutEventfd, Mode::Long, EXITS))?;
                neighbour.run_with(|_| pin(last_cpu))?;
                let meter = MeterSnapshot::read()?;
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
        task::join(flooder)?;
        result
    })?
    .map(|mut costs: Vec<u64>| {
        costs.sort_unstable();
        costs[costs.len() / 2]
    });
    let lines = check_line_rate(&mut log, started.elapsed())?;
    println!(
        "an OUT to an ioeventfd takes KVM {quiet} ticks, beside {} queries {loud}; {lines} lines logged",
        asked.into_inner()
    );
    // On the AMD host the TSC is the wall clock, which varies more on a busy machine.
    let bound = host::by_vendor(quiet / 10, quiet / 2)?;
    ensure!(loud <= quiet + bound, "a neighbour's exits cost more");
    Ok(())
}

fn cpuid_faults() -> Result<()> {
    let query = Registers64::cpuid(MAP_2021.total_exits, 0);
    let mut user = TinyVm::new(Config::query(Mode::User, vec![query; 3]))?;
    user.make_cpuid_fault()?;
    // Without a handler the fault ends the vCPU.
    match user.run() {
        Err(error) if error.to_string().contains("Shutdown") => {}
        other => bail!("CPUID at CPL 3 ends with {other:?} instead of a fault"),
    }
    let unanswered = user.answers(0)[0];
    let mut kernel = TinyVm::new(Config::query(Mode::Long, vec![query; 3]))?;
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

/// Check the answers of a guest that asks for its own CPUID exits: they count up from `first`.
fn check_counts_up(answers: &[Registers64], first: u64) -> Result<()> {
    for (expected, answer) in (first..).zip(answers) {
        ensure!(
            *answer
                == Registers64 {
                    rax: expected,
                    ..Registers64::default()
                },
            "where {expected} CPUID exits are due, the guest reads {answer:x?}"
        );
    }
    Ok(())
}

fn query_own_cpuid_exits(count: u32) -> Result<Config> {
    let query = Registers64::cpuid(MAP_2021.reason_exits, codes::cpuid()?);
    Ok(Config::query(Mode::Long, vec![query; count as usize]))
}

fn single_stepped() -> Result<()> {
    let span = Span::begin()?;
    let mut machine = TinyVm::new(query_own_cpuid_exits(MAX_QUERIES)?)?;
    let Stepped::ToTheEnd(steps) = machine.step(u32::MAX)? else {
        bail!("the guest has no end");
    };
    check_counts_up(&machine.answers(0), 1)?;
    span.end()?;
    println!("{MAX_QUERIES} queries in {steps} single steps");
    Ok(())
}

fn signals_and_register_writes() -> Result<()> {
    let span = Span::begin()?;
    let thread_id = AtomicI32::new(0);
    // SAFETY: The handler does nothing; without SA_RESTART, KVM_RUN ends with EINTR.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore_signal as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
    let mut signals = 0_u64;
    let mut rounds = 0_u64;
    thread::scope(|scope| {
        let guest = scope.spawn(|| -> Result<u64> {
            let mut rounds = 0;
            for _ in 0..20 {
                let mut machine = TinyVm::new(Config {
                    rewrite_registers: true,
                    ..query_own_cpuid_exits(MAX_QUERIES)?
                })?;
                machine.run_with(|_| {
                    // SAFETY: gettid() has no requirements.
                    thread_id.store(unsafe { libc::gettid() }, Ordering::Relaxed);
                    Ok(())
                })?;
                thread_id.store(0, Ordering::Relaxed);
                check_counts_up(&machine.answers(0), 1)?;
                let mut machine = TinyVm::new(Config {
                    rewrite_registers: true,
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
                // Address the thread by its ID: if it has just ended, this is an error and no use after
                // free.
                // SAFETY: tgkill() touches no memory, and the signal has a handler.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, libc::SIGUSR1) };
                signals += 1;
            }
            thread::sleep(Duration::from_micros(200));
        }
        rounds = task::join(guest)?;
        anyhow::Ok(())
    })?;
    span.end()?;
    println!("{rounds} guests, {signals} signals");
    Ok(())
}

extern "C" fn ignore_signal(_: libc::c_int) {}

/// Stop a guest at a random instruction and continue it in another VM. There it reads the new VM's
/// numbers, from 1 again.
fn saved_and_restored() -> Result<()> {
    let times = scaled(200);
    const ASKED: u32 = 60;
    let mut random = Random::new(3);
    let mut split = 0_u64;
    for _ in 0..times {
        let span = Span::begin()?;
        let mut machine = TinyVm::new(query_own_cpuid_exits(ASKED)?)?;
        let steps = random.below(u64::from(ASKED) * 14) as u32;
        if machine.step(steps)? != Stepped::AllSteps {
            continue;
        }
        let mut other = machine.migrate()?;
        other.run()?;
        let answers = other.answers(0);
        // The answers before and after the move each count up.
        let restart = (1..answers.len())
            .find(|at| answers[*at].rax <= answers[at - 1].rax)
            .unwrap_or(answers.len());
        let (before, after) = answers.split_at(restart);
        check_counts_up(before, 1)?;
        check_counts_up(after, 1)?;
        split += u64::from(!after.is_empty());
        drop(other);
        span.end()?;
    }
    ensure!(
        split > times / 2,
        "only {split} of {times} were stopped between two queries"
    );
    println!("{times} VMs saved and restored, {split} of them between two queries");
    Ok(())
}
