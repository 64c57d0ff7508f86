// SPDX-License-Identifier: GPL-2.0

//! Guests read their own details: a vCPU that asks by CPUID gets the rows of the host's snapshot, and
//! the tool in a Linux guest gets those of a command.

use std::{collections::BTreeMap, fs::File, thread, time::Duration};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    detail::Kind,
    leaves::{
        tables::{pair, word, Description, Head, Place, DESCRIPTION},
        Registers,
    },
    reader::Snapshot,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS},
    tables::{CODES, DETAILS},
};
use serde_json::Value;
use tiny_guests::{Config, Mode, Registers64, TinyVm};

use super::{answers::ask, details::turn_on, Case};
use crate::host::{
    codes,
    leaves::TABLES,
    linux::Linux,
    log::Log,
    meter::{read_device, DEVICE},
    task, tool, KVM_EXIT_IO,
};

/// Leaves that a guest asks for before it asks for its rows: leaf, subleaf, and number of queries.
const ASKED: [(u32, u32, usize); 3] = [(0, 0, 30), (0xd, 1, 20), (7, 0, 10)];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in [Mode::Real, Mode::Long, Mode::User] {
        cases.push(Case::with_module(
            "details=1 log_queries=0",
            format!("own: a guest in {mode:?} mode reads its details"),
            move || own_details(mode),
        ));
    }
    for mode in [Mode::Long, Mode::User] {
        cases.push(Case::with_module(
            "details=1 log_queries=0",
            format!("own: a guest in {mode:?} mode reads its code at CPL 0 only"),
            move || own_code(mode),
        ));
    }
    cases.push(Case::with_module(
        "",
        "own: with details off a guest reads that there are none",
        details_off,
    ));
    cases.push(Case::with_module(
        "log_queries=0",
        "own: a guest reads its rows while details are turned on and off",
        details_switched,
    ));
    cases.push(Case::with_module(
        "details=1",
        "own: reading many rows logs one line",
        one_log_line,
    ));
    cases.push(
        Case::with_module(
            "log_queries=0",
            "own: a Linux guest reads what a command's exits were about, and its kernel's code",
            in_linux,
        )
        .with_linux()
        .within(600),
    );
    cases
}

fn query(table: u32, word: u32, index: u32) -> Registers64 {
    Registers64::cpuid(TABLES, Place { table, word, index }.subleaf())
}

fn registers(answer: &Registers64) -> Registers {
    // CPUID clears the upper halves.
    Registers {
        eax: answer.rax as u32,
        ebx: answer.rbx as u32,
        ecx: answer.rcx as u32,
        edx: answer.rdx as u32,
    }
}

/// A row that a guest read. `asked` is the number of queries for rows up to the one that read `exits`.
struct ReadRow {
    head: Head,
    exits: u64,
    asked: u64,
}

/// Let a guest query the leaves of [`ASKED`], then the head of the first row from each of `places` on,
/// and then the exits of each row found.
fn read_rows(mode: Mode, table: u32, places: usize) -> Result<(TinyVm, Description, Vec<ReadRow>)> {
    let mut queries: Vec<Registers64> = ASKED
        .iter()
        .flat_map(|(leaf, subleaf, times)| vec![Registers64::cpuid(*leaf, *subleaf); *times])
        .collect();
    let before = queries.len();
    queries.push(query(DESCRIPTION, 0, 0));
    queries.extend((0..places as u32).map(|index| query(table, word::HEAD, index)));
    let (mut machine, answers) = ask(mode, &queries)?;
    let answers: Vec<_> = answers.iter().skip(before).map(registers).collect();
    let (described, heads) = answers.split_first().context("answers")?;
    let heads: Vec<_> = heads
        .iter()
        .enumerate()
        // An answer has the first row from the place on: keep those at the place itself.
        .filter_map(|(at, answer)| {
            Head::from_registers(*answer).filter(|head| head.index as usize == at)
        })
        .collect();
    let asked = 1 + places;
    let count = queries.len();
    queries.clear();
    queries.extend(
        heads
            .iter()
            .map(|head| query(table, word::COUNTS, head.index)),
    );
    queries.resize(count, query(table, word::COUNTS, 0));
    machine.set_queries(&queries)?;
    machine.run()?;
    let counts = machine.answers(0);
    let rows = heads.iter().zip(counts).enumerate();
    let rows = rows.map(|(at, (head, counts))| ReadRow {
        head: *head,
        exits: pair(registers(&counts)).0,
        asked: (asked + at + 1) as u64,
    });
    let rows = rows.collect();
    Ok((machine, Description::from_registers(*described), rows))
}

fn own_details(mode: Mode) -> Result<()> {
    let (machine, described, rows) = read_rows(mode, TABLE_DETAILS, DETAILS)?;
    let bytes = read_device()?;
    drop(machine);
    ensure!(
        described.is_on && described.has_tables && !described.is_frozen && !described.tells_host,
        "{described:?}"
    );
    ensure!(
        described.tells_code == (mode != Mode::User),
        "{described:?}"
    );
    let snapshot = Snapshot::parse(&bytes)?;
    let held: BTreeMap<_, _> = snapshot
        .tables()
        .flat_map(|tables| tables.entries())
        .filter(|entry| entry.table == TABLE_DETAILS && !entry.others)
        .map(|entry| ((entry.detail_kind, entry.key), entry.exits))
        .collect();
    let cpuid = Reason::Code(codes::cpuid()?);
    let mut leaves = BTreeMap::new();
    for row in &rows {
        let Head {
            reason,
            detail_kind,
            key,
            ..
        } = row.head;
        let at_end = held.get(&(detail_kind, key)).copied();
        ensure!(
            at_end.is_some_and(|at_end| row.exits <= at_end) && row.head.exact,
            "the guest read {} exits of kind {detail_kind}, key {key:#x}, the host has {at_end:?}",
            row.exits
        );
        ensure!(
            detail_kind != Kind::Vector as u8 || key >> 8 & 7 == 3,
            "the guest reads the host's vector {key:#x}"
        );
        if reason == cpuid {
            leaves.insert(key, row);
        }
    }
    for (leaf, subleaf, times) in ASKED {
        let key = u64::from(leaf) | u64::from(subleaf) << 32;
        let row = leaves.remove(&key).context("a leaf has no row")?;
        ensure!(
            row.exits == times as u64,
            "leaf {leaf:#x}: {} exits of {times}",
            row.exits
        );
        ensure!(held.get(&(Kind::Cpuid as u8, key)) == Some(&row.exits));
    }
    // All queries for rows share one row, which counts up to the query that read it.
    let own = leaves.remove(&TABLES.into()).context("no row of its own")?;
    ensure!(
        own.exits == own.asked && leaves.is_empty(),
        "{} queries for rows came, and {} are in their row; other leaves: {:x?}",
        own.asked,
        own.exits,
        leaves.keys()
    );
    Ok(())
}

/// Return the exits of all vCPUs by reason and RIP, from a snapshot.
fn held_code(bytes: &[u8]) -> Result<BTreeMap<(u32, u64), u64>> {
    let snapshot = Snapshot::parse(bytes)?;
    let mut held = BTreeMap::new();
    for entry in snapshot.tables().flat_map(|tables| tables.entries()) {
        if let (TABLE_CODE, false, Reason::Code(code)) = (entry.table, entry.others, entry.reason) {
            *held.entry((code, entry.key)).or_default() += entry.exits;
        }
    }
    Ok(held)
}

fn own_code(mode: Mode) -> Result<()> {
    let (machine, described, rows) = read_rows(mode, TABLE_CODE, CODES)?;
    let bytes = read_device()?;
    drop(machine);
    if mode == Mode::User {
        ensure!(
            rows.is_empty() && !described.tells_code,
            "CPL 3 reads {} rows of code",
            rows.len()
        );
        return Ok(());
    }
    let held = held_code(&bytes)?;
    let cpuid = codes::cpuid()?;
    let before: usize = ASKED.iter().map(|(_, _, times)| times).sum();
    let mut of_cpuid = 0;
    for row in &rows {
        let Reason::Code(code) = row.head.reason else {
            continue;
        };
        let at_end = held.get(&(code, row.head.key));
        ensure!(
            at_end.is_some_and(|at_end| row.exits <= *at_end),
            "the guest read {} exits at {:#x}, the host has {at_end:?}",
            row.exits,
            row.head.key
        );
        if code == cpuid {
            of_cpuid += 1;
            // The guest has one CPUID instruction.
            ensure!(
                row.exits == before as u64 + row.asked,
                "{} exits at {:#x}, not {before} and {}",
                row.exits,
                row.head.key,
                row.asked
            );
        }
    }
    ensure!(of_cpuid == 1, "{of_cpuid} places of CPUID");
    Ok(())
}

fn details_off() -> Result<()> {
    for mode in [Mode::Long, Mode::User] {
        let mut queries = vec![query(DESCRIPTION, 0, 0)];
        for table in 1..8 {
            queries.extend([0, 1, 5, 0xff].map(|word| query(table, word, 0)));
        }
        let answers = ask(mode, &queries)?.1;
        let (described, rows) = answers.split_first().context("answers")?;
        let described = Description::from_registers(registers(described));
        ensure!(
            described
                == Description {
                    tells_code: mode == Mode::Long,
                    ..Description::default()
                },
            "{described:?}"
        );
        ensure!(
            rows.iter()
                .all(|row| registers(row) == Registers::UNDEFINED),
            "without details there are rows: {rows:x?}"
        );
    }
    Ok(())
}

/// Turn details on and off between any two queries and while one is answered.
fn details_switched() -> Result<()> {
    let tables = [1, 2, 3, 4, 5];
    let queries: Vec<Registers64> = (0..100)
        .flat_map(|index| tables.map(|table| query(table, index % 3, index / 3)))
        .collect();
    let mut machine = TinyVm::new(Config::query(Mode::Long, queries.clone()))?;
    let (switched, heads) = thread::scope(|scope| {
        let guest = scope.spawn(|| -> Result<[usize; 2]> {
            let mut heads = [0; 2];
            for _ in 0..40 {
                machine.set_queries(&queries)?;
                machine.run()?;
                for (query, answer) in queries.iter().zip(machine.answers(0)) {
                    let place = Place::from_subleaf(query.rcx as u32);
                    let answer = registers(&answer);
                    let none = answer == Registers::UNDEFINED;
                    if place.word == word::HEAD {
                        heads[usize::from(none)] += 1;
                        ensure!(
                            none || Head::from_registers(answer).is_some(),
                            "{place:x?} is answered by {answer:x?}"
                        );
                    }
                }
            }
            Ok(heads)
        });
        let mut switched = 0;
        while !guest.is_finished() {
            let device = File::open(DEVICE)?;
            turn_on(&device)?;
            // Details are on and off for equal times.
            thread::sleep(Duration::from_millis(2));
            drop(device);
            thread::sleep(Duration::from_millis(2));
            switched += 1;
        }
        let heads = task::join(guest)?;
        anyhow::Ok((switched, heads))
    })?;
    println!("details were turned on and off {switched} times; heads answered and not: {heads:?}");
    ensure!(
        switched > 3 && heads.iter().all(|heads| *heads > 100),
        "turned on and off {switched} times; heads answered and not: {heads:?}"
    );
    Ok(())
}

fn one_log_line() -> Result<()> {
    let mut log = Log::from_now()?;
    read_rows(Mode::Long, TABLE_DETAILS, 50)?;
    let lines = log.module_lines()?;
    ensure!(
        lines.len() == 1 && lines[0].ends_with(": CPUID(0x4FFFFFF5), details on"),
        "one reading logs the lines {lines:?}"
    );
    Ok(())
}

/// Return the only row in `groups` for which `is` returns true.
fn only_row(groups: &Value, is: impl Fn(&Value) -> bool) -> Result<&Value> {
    let groups = groups.as_array().context("groups")?.iter();
    let rows = groups
        .filter_map(|group| group["rows"].as_array())
        .flatten();
    let mut rows = rows.filter(|row| is(row));
    let row = rows.next().context("no such row")?;
    ensure!(rows.next().is_none(), "more rows than {row}");
    Ok(row)
}

fn in_linux() -> Result<()> {
    const SENTENCE: &str = "details are off on the host, and no guest turns them on: it takes the \
         module's parameter details=1 there";
    let file = tool::guest_file_option()?;
    let linux = Linux::boot(&["--vcpus", "2", "--file", &file])?;
    let text = linux.run(
        "exitmeter stat --why -- true 2>&1; echo status $?; exitmeter guest --why 2>&1; echo status $?",
    )?;
    ensure!(
        text.matches(SENTENCE).count() == 2
            && text.contains("status 125\n")
            && text.ends_with("status 1\n"),
        "without details the tool says: {text}"
    );

    let device = File::open(DEVICE)?;
    turn_on(&device)?;
    // 5 reads from an unused port, 4 queries of an unknown leaf, 3 reads of an MSR.
    let command = "for i in 1 2 3 4 5; do \
         dd if=/dev/port of=/dev/null bs=1 count=1 skip=888 2>/dev/null; done; \
         for i in 1 2 3 4; do cpuid -1 -r -l 0x12345678 -s 0 >/dev/null; done; \
         for i in 1 2 3; do dd if=/dev/cpu/1/msr of=/dev/null bs=8 count=1 skip=52 2>/dev/null; done";
    linux.run("modprobe msr")?;
    let line = format!(
        "exitmeter stat --why --json -o /tmp/stat -- sh -c '{command}'; echo $? >&2; cat /tmp/stat"
    );
    let stat = tool::json(&linux.run(&line)?)?;
    let why = &stat["why"];
    ensure!(
        why["vcpus"] == 2 && why["vcpus_unread"] == 0 && why["vcpus_without_tables"] == 0,
        "{why}"
    );
    let details = &why["details"];
    for (wanted, expected) in [
        (("port", "port", 0x378), 5),
        (("cpuid", "leaf", 0x1234_5678), 4),
        (("msr", "msr", 0x1a0), 3),
    ] {
        let (kind, field, number) = wanted;
        let row = only_row(details, |row| {
            row["detail"]["kind"] == kind && row["detail"][field] == number
        })
        .with_context(|| format!("{wanted:x?} in {details}"))?;
        ensure!(
            row["exits"] == expected && row["exact"] == true && row["nested"] == false,
            "{wanted:x?}: {row}"
        );
    }
    // Neither number includes the tool's own queries.
    let cpuid = codes::cpuid()?;
    let groups = details.as_array().context("groups")?;
    let group = groups.iter().find(|group| group["code"] == cpuid);
    let exits = group.and_then(|group| group["exits"].as_u64());
    ensure!(
        exits.is_some() && exits == tool::mean_exits(&stat, cpuid),
        "details have {exits:?} CPUID exits, the command {:?}",
        tool::mean_exits(&stat, cpuid)
    );
    let own = only_row(details, |row| {
        row["detail"]["leaf"]
            .as_u64()
            .is_some_and(|leaf| leaf >> 4 == 0x4ff_ffff)
    });
    ensure!(own.is_err(), "the tool's own queries are included: {own:?}");
    let io = only_row(&why["user_exits"], |row| row["exit_reason"] == KVM_EXIT_IO)?;
    ensure!(io["exits"].as_u64() >= Some(5), "{io}");

    let text = linux.run("taskset 1 exitmeter stat --why -o /tmp/stat -- true; cat /tmp/stat")?;
    ensure!(text.contains("read on 1 of 2 CPUs"), "on one CPU: {text}");

    code_in_linux(&linux)?;
    let text = linux.run_compressed("exitmeter guest --slow --json")?;
    let slow = tool::json(&text)?;
    let slowest = slow["slowest"].as_array().context("slow exits")?;
    ensure!(
        slowest.len() >= 32 && slowest.iter().all(|exit| exit["rip"].is_null()),
        "{text}"
    );
    drop(device);
    linux.stop()
}

/// Check who can read code in a Linux guest, and that the rows match the host's.
fn code_in_linux(linux: &Linux) -> Result<()> {
    let refused = |command: &str| linux.run(&format!("{command} 2>&1; echo status $?"));
    let text = refused("exitmeter guest --code")?;
    ensure!(
        text.contains("run 'modprobe cpuid' as root here") && text.ends_with("status 1\n"),
        "without the driver: {text}"
    );
    linux.run("modprobe cpuid; echo 'nobody:x:65534:65534::/:/bin/sh' >>/etc/passwd")?;
    let text = refused("su nobody -s /bin/sh -c 'exitmeter guest --code'")?;
    ensure!(
        text.contains("run this command as root") && text.ends_with("status 1\n"),
        "as nobody: {text}"
    );
    let text = linux.run_compressed("su nobody -s /bin/sh -c 'exitmeter guest --why --json'")?;
    let output = tool::json(&text)?;
    ensure!(
        output["vcpus"] == 2 && output.get("code").is_none(),
        "as nobody: {text}"
    );

    // Printing causes more exits than there are rows, so read the host before.
    linux.run("exitmeter guest --code --json >/tmp/code")?;
    let bytes = read_device()?;
    let text = linux.run_compressed("cat /tmp/code")?;
    let output = tool::json(&text)?;
    let held = held_code(&bytes)?;
    let groups = output["code"].as_array().context("code")?;
    let (mut rows, mut as_held, mut named) = (0, 0, 0);
    for group in groups {
        let code = group["code"].as_u64().context("a reason")?;
        for row in group["rows"].as_array().context("rows")? {
            let rip = row["rip"].as_str().and_then(|rip| rip.strip_prefix("0x"));
            let rip = u64::from_str_radix(rip.context("a RIP")?, 16)?;
            let exits = row["exits"].as_u64().context("exits")?;
            // The row may have given way since and come back, as each tick of the host's clock is at
            // another place. So not every row matches, unlike with tiny guests.
            let at_end = held.get(&(code as u32, rip)).copied();
            rows += 1;
            as_held += usize::from(at_end.is_some_and(|at_end| exits <= at_end));
            let in_kernel = row["half"] == "kernel";
            ensure!(
                !in_kernel || row["symbol"].is_string(),
                "code of the kernel has no name: {row}"
            );
            named += usize::from(in_kernel);
        }
    }
    ensure!(
        as_held > 20 && named > 20,
        "of {rows} rows, {as_held} match the host's and {named} are in the guest's kernel"
    );
    // The rows include the driver's CPUID, by which the tool reads.
    let text = linux.run("exitmeter guest --code --collapsed --weight exits")?;
    ensure!(
        text.lines()
            .any(|line| line.contains(";CPUID;") && line.contains("cpuid")),
        "{text}"
    );
    Ok(())
}
