// SPDX-License-Identifier: GPL-2.0

//! Guests read the host's numbers by CPUID, in every CPU mode and for every reason. KVM answers all
//! other leaves as before.

use std::{thread, time::Duration};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    leaves::phases_of_query,
    phase::Phase,
    reasons::{self, Isa},
};
use tiny_guests::{Config, Mode, Registers64, TinyVm};

use super::Case;
use crate::host::{
    self, codes,
    leaves::{Map, EXITS_64, IDENTITY, INTERFACE, LIFE, MAP_2021, MAP_2022, PHASE_CYCLES},
    meter::{LedgerNumbers, MeterSnapshot},
    module,
};

/// Answer to a query of an undefined reason.
const UNDEFINED: Registers64 = Registers64 {
    rax: 0,
    rbx: 0,
    rcx: 0,
    rdx: 0xffff_ffff,
};

const MODES: [(Mode, &str); 3] = [
    (Mode::Real, "real mode"),
    (Mode::Long, "64-bit mode"),
    (Mode::User, "64-bit mode at CPL 3"),
];

pub(super) fn cases() -> Vec<Case> {
    const QUIET: &str = "log_queries=0";
    let mut cases = Vec::new();
    for (mode, words) in MODES {
        cases.push(Case::with_module(
            QUIET,
            format!("answers: a guest in {words} reads the host's numbers"),
            move || reasons_match_the_host(mode),
        ));
    }
    cases.push(Case::with_module(
        QUIET,
        "answers: the guest reads the host's totals",
        totals_match_the_host,
    ));
    cases.push(Case::with_module(
        QUIET,
        "answers: a guest with 2 vCPUs reads their sum",
        sum_of_two_vcpus,
    ));
    cases.push(Case::with_module(
        QUIET,
        "answers: in a VM of 40 vCPUs each reads the sum over all",
        sum_of_many_vcpus,
    ));
    cases.push(Case::with_module(
        "log_queries=0 host_scope=1",
        "answers: on a host of 45 vCPUs host_scope=1 gives the sum over all",
        sum_of_a_host,
    ));
    cases.push(Case::without_module(
        "answers: each load of the module gives the meter a new life number",
        life_numbers,
    ));
    for (mode, words) in MODES {
        cases.push(Case::with_module(
            QUIET,
            format!("answers: a sweep of valid and invalid reasons in {words}, leaf map 2021"),
            move || sweep(mode, MAP_2021, 2021),
        ));
    }
    for (mode, words) in MODES {
        cases.push(Case::with_module(
            "log_queries=0 leaf_map=2022",
            format!("answers: a sweep of valid and invalid reasons in {words}, leaf map 2022"),
            move || sweep(mode, MAP_2022, 2022),
        ));
    }
    cases.push(Case::without_module(
        "answers: with leaf_map=0 the guest reads what KVM answers",
        || {
            let ours: Vec<Registers64> = (0x4fff_fff0..=0x4fff_ffff)
                .flat_map(|leaf| {
                    [0, 1, 10, 0x1_000a, u32::MAX].map(|sub| Registers64::cpuid(leaf, sub))
                })
                .collect();
            unchanged_answers(&ours, &["leaf_map=0"])
        },
    ));
    cases.push(Case::without_module(
        "answers: leaves next to the meter's keep KVM's answers",
        || {
            let mut beside = vec![
                0,
                1,
                4,
                7,
                0xb,
                0xd,
                0x4000_0000,
                0x4000_0001,
                0x4fff_ff0f,
                0x4fff_ffef,
                0x5000_0000,
                0x5fff_ffff,
                0x8000_0000,
                0x8000_0001,
                0x8000_0008,
                0xcfff_ffff,
                u32::MAX,
            ];
            beside.extend(0x4fff_fff6..=0x4fff_fffb);
            let beside: Vec<Registers64> = beside
                .into_iter()
                .flat_map(|leaf| [0, 1, 10].map(|sub| Registers64::cpuid(leaf, sub)))
                .collect();
            unchanged_answers(&beside, &["leaf_map=2021", "leaf_map=2022"])
        },
    ));
    cases
}

/// Run a guest with `queries` to its end. Return its VM, which still exists, and the answers.
pub(super) fn ask(mode: Mode, queries: &[Registers64]) -> Result<(TinyVm, Vec<Registers64>)> {
    let mut machine = TinyVm::new(Config::query(mode, queries.to_vec()))?;
    machine.run()?;
    let answers = machine.answers(0);
    Ok((machine, answers))
}

/// Join the halves of a 64-bit number.
fn join(high: u64, low: u64) -> u64 {
    high << 32 | low
}

fn low(number: u64) -> u64 {
    number & 0xffff_ffff
}

/// Return the exit reasons that this host's vendor defines.
fn defined_codes() -> Result<Vec<u32>> {
    let vendor = host::vendor()?;
    Ok(reasons::Slot::all()
        .filter_map(|slot| reasons::code(vendor, slot))
        .filter(|code| reasons::is_defined(vendor, *code))
        .collect())
}

/// Compare a guest's answers about every defined reason with the host's ledger: exits by two leaves,
/// and the cycles of page faults.
fn reasons_match_the_host(mode: Mode) -> Result<()> {
    let vendor = host::vendor()?;
    let paging = host::nested_paging()?;
    let (cpuid, io) = (codes::cpuid()?, codes::io()?);
    // The reason of an exit for a page that KVM has not mapped yet.
    let fault = match paging {
        true => codes::nested_page_fault()?,
        false => host::by_vendor(0, 0x4e)?,
    };
    let codes = defined_codes()?;
    let mut asked: Vec<(u32, u32)> = Vec::new();
    asked.extend(codes.iter().map(|code| (MAP_2021.reason_exits, *code)));
    // This leaf takes reasons of 16 bits only.
    let short = codes.iter().filter(|code| **code <= 0xffff);
    asked.extend(short.map(|code| (EXITS_64, *code)));
    let mut queries: Vec<Registers64> = asked
        .iter()
        .map(|(leaf, code)| Registers64::cpuid(*leaf, *code))
        .collect();
    let tail = queries.len();
    queries.push(Registers64::cpuid(MAP_2021.reason_cycles, fault));
    let phases = || (0..).map_while(phases_of_query).zip(0_u32..);
    queries
        .extend(phases().map(|(_, number)| Registers64::cpuid(PHASE_CYCLES, fault | number << 16)));
    let expected = host::expected(&Config::query(mode, queries.clone()))?;
    let (machine, answers) = ask(mode, &queries)?;
    let meter = MeterSnapshot::read()?;
    let host = &meter.only()?.numbers;
    drop(machine);

    let count = queries.len();
    expected.check(&host.exits)?;
    // A page of guest memory holds 64 queries; each page faults once.
    let faults_after = |query: usize| ((count - 1) / 64 - query / 64) as u64;
    for (query, (leaf, code)) in asked.iter().enumerate() {
        let at_end = host.exits_of(*code);
        let answer = answers[query];
        let (exits, rest) = if *leaf == EXITS_64 {
            (join(answer.rdx, answer.rax), [answer.rbx, answer.rcx])
        } else {
            (join(answer.rbx, answer.rax), [answer.rcx, answer.rdx])
        };
        let name = reasons::name(vendor, *code).unwrap_or("?");
        // The query itself is counted; the later ones and the OUT at the end are not yet.
        let right = if *code == cpuid {
            exits == query as u64 + 1
        } else if *code == io {
            exits == 0
        } else if *code == fault && paging {
            exits == at_end - faults_after(query)
        } else if is_clock_exit(vendor, *code) || !paging {
            exits <= at_end
        } else {
            exits == at_end
        };
        ensure!(
            right && rest == [0, 0],
            "query {query}, leaf {leaf:#x}, reason {code} ({name}): the guest reads {answer:x?}, \
             the host holds {at_end} exits at the end"
        );
    }

    if vendor == Isa::Vmx && !paging && mode == Mode::Real {
        // KVM uses virtual 8086 mode for real mode there, so the OUT at the end faults, too.
        return Ok(());
    }
    // No page faults follow, so every tick of page faults is booked.
    ensure!(faults_after(tail) == 0, "the last queries are on one page");
    let kernel = host.cycles_of(Phase::Kernel, fault);
    let answer = answers[tail];
    let expected = Registers64 {
        rax: 0,
        rbx: kernel >> 32,
        rcx: low(kernel),
        rdx: 0,
    };
    ensure!(
        answer == expected && kernel != 0,
        "the guest reads {answer:x?} for the cycles of page faults, the host holds {kernel}"
    );
    for (((name, summed), _), answer) in phases().zip(&answers[tail + 1..]) {
        let held: u64 = summed
            .iter()
            .map(|phase| host.cycles_of(*phase, fault))
            .sum();
        let expected = Registers64 {
            rax: low(held),
            rbx: 0,
            rcx: 0,
            rdx: held >> 32,
        };
        ensure!(
            *answer == expected,
            "the guest reads {answer:x?} for the cycles in phase {name} after page faults, the \
             host holds {held}"
        );
    }
    Ok(())
}

/// Return true if exits with `code` come from the host's clock, so that their number varies.
fn is_clock_exit(vendor: Isa, code: u32) -> bool {
    match vendor {
        Isa::Vmx => matches!(code, 1 | 52),
        Isa::Svm => code == 0x60,
    }
}

fn clock_exits(vendor: Isa, numbers: &LedgerNumbers) -> u64 {
    numbers
        .exits
        .iter()
        .filter(|(code, _)| is_clock_exit(vendor, **code))
        .map(|(_, exits)| exits)
        .sum()
}

/// Check the two leaves of totals, and the two that identify the meter.
fn totals_match_the_host() -> Result<()> {
    const QUERIES: u64 = 16;
    let vendor = host::vendor()?;
    let mut undisturbed = 0;
    for _ in 0..20 {
        let queries: Vec<Registers64> = (0..QUERIES)
            .map(|query| match query % 2 {
                0 => Registers64::cpuid(MAP_2021.total_cycles, 0),
                _ => Registers64::cpuid(MAP_2021.total_exits, 0),
            })
            .collect();
        let (machine, answers) = ask(Mode::Long, &queries)?;
        let meter = MeterSnapshot::read()?;
        let host = &meter.only()?.numbers;
        drop(machine);

        let total: u64 = host.exits.values().sum();
        let kernel = host.phases[Phase::Kernel as usize];
        let clock_exits = clock_exits(vendor, host);
        let mut cycles_before = 0;
        for (query, answer) in (0..QUERIES).zip(&answers) {
            if query % 2 == 0 {
                let cycles = join(answer.rbx, answer.rcx);
                ensure!(
                    answer.rax == 0 && answer.rdx == 0 && answer.rcx <= u64::from(u32::MAX),
                    "the guest reads {answer:x?} for the total cycles"
                );
                ensure!(
                    cycles_before < cycles && cycles < kernel,
                    "the guest reads {cycles} cycles after {cycles_before}, the host holds \
                     {kernel} at the end"
                );
                cycles_before = cycles;
            } else {
                let exits = join(answer.rbx, answer.rax);
                // Exits still to come: the later queries and the OUT at the end.
                let left = QUERIES - 1 - query + 1;
                ensure!(
                    (total - left - clock_exits..=total - left).contains(&exits)
                        && answer.rcx == 0
                        && answer.rdx == 0,
                    "the guest reads {answer:x?} for the total exits, the host holds {total} at the end"
                );
            }
        }
        undisturbed += u32::from(clock_exits == 0);
        if undisturbed == 3 {
            return identity();
        }
    }
    anyhow::bail!("the host's clock disturbed all but {undisturbed} of 20 short guests")
}

fn identity() -> Result<()> {
    let (_machine, answers) = ask(
        Mode::Long,
        &[
            Registers64::cpuid(IDENTITY, 0),
            Registers64::cpuid(INTERFACE, 0),
        ],
    )?;
    let word = |text: &[u8; 4]| u64::from(u32::from_le_bytes(*text));
    let expected = [
        Registers64 {
            rax: 0x4fff_ffff,
            rbx: word(b"Exit"),
            rcx: word(b"Mete"),
            rdx: word(b"r\0\0\0"),
        },
        Registers64 {
            rax: 3,
            rbx: host::by_vendor(1, 2)?,
            rcx: defined_codes()?.len() as u64,
            rdx: 2021,
        },
    ];
    ensure!(
        answers == expected,
        "the meter calls itself {answers:x?} instead of {expected:x?}"
    );
    Ok(())
}

/// Pause after which the next query renews the sums. With more vCPUs than a query reads one by one,
/// these sums cover the others, and the first query a second after the last renewal renews them
/// (docs/interface.md).
const RENEWAL: Duration = Duration::from_millis(1050);

/// Let every vCPU of a large VM exit. Then let the first and the last vCPU of each group of 32 ask for
/// the sum, one after the other.
fn sum_of_many_vcpus() -> Result<()> {
    const VCPUS: u8 = 40;
    const EACH: u64 = 5;
    let cpuid = codes::cpuid()?;
    let queries = vec![Registers64::cpuid(MAP_2021.reason_exits, cpuid); EACH as usize];
    let mut machine = TinyVm::new(Config {
        vcpus: VCPUS,
        ..Config::query(Mode::Long, queries.clone())
    })?;
    machine.run()?;
    let mut before = EACH * u64::from(VCPUS);
    for round in 0..2 {
        let host = MeterSnapshot::read()?;
        let held: u64 = host
            .own()
            .iter()
            .map(|vcpu| vcpu.numbers.exits_of(cpuid))
            .sum();
        ensure!(
            held == before,
            "round {round}: the host holds {held} instead of {before}"
        );
        machine.set_queries(&queries)?;
        for vcpu in [0, 31, 32, VCPUS - 1] {
            thread::sleep(RENEWAL);
            machine.run_one(vcpu)?;
            for answer in machine.answers(vcpu) {
                before += 1;
                // The sum includes the vCPU's own exits at once, and all others after a renewal.
                let read = join(answer.rbx, answer.rax);
                ensure!(
                    read == before,
                    "vCPU {vcpu} of {VCPUS} reads {read} instead of {before}"
                );
            }
        }
    }
    Ok(())
}

/// Check the sum that a guest reads on a host with many vCPUs, some of them departed.
fn sum_of_a_host() -> Result<()> {
    const EACH: u64 = 5;
    let cpuid = codes::cpuid()?;
    let queries = vec![Registers64::cpuid(MAP_2021.reason_exits, cpuid); EACH as usize];
    let mut before = MeterSnapshot::read()?
        .exits()
        .get(&cpuid)
        .copied()
        .unwrap_or(0);
    let mut machines = Vec::new();
    for vcpus in [15, 15, 15, 4] {
        let mut machine = TinyVm::new(Config {
            vcpus,
            ..Config::query(Mode::Long, queries.clone())
        })?;
        machine.run()?;
        before += EACH * u64::from(vcpus);
        machines.push(machine);
    }
    // The last VM goes, and its exits stay in the sum.
    machines.pop();
    thread::sleep(RENEWAL);
    let machine = machines.first_mut().context("there are three")?;
    machine.set_queries(&queries)?;
    machine.run_one(0)?;
    let read: Vec<u64> = machine
        .answers(0)
        .iter()
        .map(|answer| join(answer.rbx, answer.rax))
        .collect();
    // A renewal may come at any of the queries, or between two of them.
    ensure!(
        read.iter()
            .all(|read| (before + 1..=before + EACH).contains(read))
            && read.is_sorted(),
        "a guest reads {read:?} where {} CPUID exits came before its own",
        before
    );
    Ok(())
}

/// Check that a guest reads the snapshot's life number, and that each load changes it.
fn life_numbers() -> Result<()> {
    let mut seen = Vec::new();
    for _ in 0..2 {
        let loaded = module::Loaded::with("log_queries=0")?;
        let (machine, answers) = ask(Mode::Long, &[Registers64::cpuid(LIFE, 0); 2])?;
        let read = answers.iter().map(|answer| join(answer.rdx, answer.rax));
        let read: Vec<u64> = read.collect();
        let held = MeterSnapshot::read()?.life;
        ensure!(
            read == [held; 2] && held != 0 && !seen.contains(&held),
            "a guest reads the lives {read:?}, the host holds {held}, and held {seen:?} before"
        );
        seen.push(held);
        drop(machine);
        loaded.unload()?;
    }
    Ok(())
}

/// Let each of two vCPUs ask for the CPUID exits of its VM.
fn sum_of_two_vcpus() -> Result<()> {
    const EACH: u64 = 200;
    let cpuid = codes::cpuid()?;
    let queries = vec![Registers64::cpuid(MAP_2021.reason_exits, cpuid); EACH as usize];
    let mut machine = TinyVm::new(Config {
        vcpus: 2,
        ..Config::query(Mode::Long, queries)
    })?;
    machine.run()?;
    let mut highest = 0;
    for vcpu in 0..2 {
        let counts: Vec<u64> = machine
            .answers(vcpu)
            .iter()
            .map(|answer| answer.rax)
            .collect();
        ensure!(
            counts.windows(2).all(|pair| pair[0] < pair[1]),
            "the counts that vCPU {vcpu} reads do not grow: {counts:?}"
        );
        highest = highest.max(*counts.last().context("it asked")?);
    }
    // The query that was counted last was answered after all others were counted.
    ensure!(
        highest == 2 * EACH,
        "both vCPUs asked {EACH} times, and the highest count read is {highest}"
    );
    let meter = MeterSnapshot::read()?;
    let each: Vec<u64> = meter
        .own()
        .iter()
        .map(|vcpu| vcpu.numbers.exits_of(cpuid))
        .collect();
    ensure!(
        each == [EACH, EACH],
        "the host holds {each:?} CPUID exits for the two vCPUs"
    );
    Ok(())
}

/// Ask both leaves that take a reason for reasons 0 to 99 and for invalid ones.
fn sweep(mode: Mode, map: Map, number: u64) -> Result<()> {
    let vendor = host::vendor()?;
    let hostile = [
        100,
        175,
        176,
        255,
        256,
        0x400,
        0x404,
        0xffff,
        0x1_0000,
        0x1_000a,
        0xffff_000a,
        0x7fff_ffff,
        0x8000_0000,
        0x8000_0001,
        0x8000_0030,
        0xffff_ff00,
        u32::MAX - 1,
        u32::MAX,
    ];
    let reasons: Vec<u32> = (0..100).chain(hostile).collect();
    let mut queries = Vec::new();
    for reason in &reasons {
        queries.push(Registers64::cpuid(map.reason_exits, *reason));
        queries.push(Registers64::cpuid(map.reason_cycles, *reason));
    }
    queries.push(Registers64::cpuid(INTERFACE, 0));
    let (machine, answers) = ask(mode, &queries)?;
    let meter = MeterSnapshot::read()?;
    let host = &meter.only()?.numbers;
    drop(machine);

    for (answers, reason) in answers.chunks_exact(2).zip(&reasons) {
        let (exits, cycles) = (answers[0], answers[1]);
        let right = if !is_defined(vendor, *reason) {
            exits == UNDEFINED && cycles == UNDEFINED
        } else if host.exits_of(*reason) == 0 {
            // KVM does not handle the reason, or this guest never exited for it.
            exits == Registers64::default() && cycles == Registers64::default()
        } else {
            (exits.rcx, exits.rdx, cycles.rax, cycles.rdx) == (0, 0, 0, 0)
                && join(exits.rbx, exits.rax) <= host.exits_of(*reason)
                && join(cycles.rbx, cycles.rcx) <= host.cycles_of(Phase::Kernel, *reason)
        };
        ensure!(
            right,
            "reason {reason:#x}: the guest reads {exits:x?} for exits and {cycles:x?} for cycles"
        );
    }
    let map_year = answers.last().context("it asked")?.rdx;
    ensure!(map_year == number, "the guest reads leaf map {map_year}");
    // The leaf of exits also gives the right value: one exit for each earlier query.
    let cpuid = codes::cpuid()?;
    if let Some(place) = reasons.iter().position(|reason| *reason == cpuid) {
        let exits = answers[2 * place].rax;
        ensure!(
            exits == 2 * place as u64 + 1,
            "the guest reads {exits} CPUID exits"
        );
    }
    let total = ask(mode, &[Registers64::cpuid(map.total_exits, 0)])?.1[0];
    ensure!(
        total.rax != 0 && (total.rbx, total.rcx, total.rdx) == (0, 0, 0),
        "the guest reads {total:x?} for the total exits"
    );
    let total = ask(mode, &[Registers64::cpuid(map.total_cycles, 0)])?.1[0];
    ensure!(
        total.rcx != 0 && (total.rax, total.rdx) == (0, 0),
        "the guest reads {total:x?} for the total cycles"
    );
    Ok(())
}

/// Return true if the vendor's manual defines `code`; for VMX up to 85, as the course lists the codes
/// (src/meter/leaves.rs).
fn is_defined(vendor: Isa, code: u32) -> bool {
    match (vendor, code) {
        (Isa::Vmx, 0..=85) => !matches!(code, 35 | 38 | 42 | 71 | 80..=83),
        _ => reasons::is_defined(vendor, code),
    }
}

/// Check that a guest reads the same with the module, under each of `parameters`, as without it.
fn unchanged_answers(queries: &[Registers64], parameters: &[&str]) -> Result<()> {
    let read = || MODES.map(|(mode, _)| Ok(ask(mode, queries)?.1));
    let without = read().into_iter().collect::<Result<Vec<_>>>()?;
    for parameters in parameters {
        let loaded = module::Loaded::with(parameters)?;
        let with = read().into_iter().collect::<Result<Vec<_>>>()?;
        loaded.unload()?;
        for (((_, words), with), without) in MODES.iter().zip(&with).zip(&without) {
            for ((query, with), without) in queries.iter().zip(with).zip(without) {
                ensure!(
                    with == without,
                    "with {parameters} a guest in {words} reads {with:x?} from leaf {:#x}, subleaf \
                     {:#x}, and without the module {without:x?}",
                    low(query.rax),
                    low(query.rcx)
                );
            }
        }
    }
    Ok(())
}
