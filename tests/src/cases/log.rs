// SPDX-License-Identifier: GPL-2.0

//! What the host's kernel log holds: a line for each query while the cases run, and nothing
//! that should not be there at their end.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::leaves::{LeafMap, Leaves, Registers, Spoken};
use tiny_guests::{Mode, Quad};

use super::{answers::ask, Case};
use crate::host::{self, leaves::MAP_2021, log::Log};

/// Taint: a module from outside the kernel's tree, which is not signed where the kernel looks.
const OUTSIDE: u64 = 1 << 12;
const UNSIGNED: u64 = 1 << 13;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "log: each query has its line, in the course's words",
            || {
                let said = queries()?;
                ensure!(
                    said.0 == said.1,
                    "the guest was answered {:#?} and the log says {:#?}",
                    said.0,
                    said.1
                );
                Ok(())
            },
        ),
        Case::with_module(
            "log_queries=0",
            "log: log_queries=0 turns the lines off",
            || {
                let (_, logged) = queries()?;
                ensure!(logged.is_empty(), "the log says {logged:#?}");
                Ok(())
            },
        ),
        Case::with_module("", "log: a guest that floods it is held back", held_back).within(180),
    ]
}

/// What a serial console of 115200 baud takes in a second, in bytes: ten bits each.
const CONSOLE: u64 = 11_520;

/// The lines of a guest that floods the log reach no console that is as by default, and would leave nine
/// tenths of a serial one that is told to show all.
fn held_back() -> Result<()> {
    // What cases before this one took is back in 44 s.
    thread::sleep(Duration::from_secs(45));
    let mut log = Log::from_now()?;
    let cpuid = host::pick(10, 0x72)?;
    // The longest lines there are.
    let queries = vec![Quad::cpuid(MAP_2021.reason_cycles, cpuid); 500];
    // A line ends by CR and LF, and has its time before it, and the module's name.
    const FRAME: usize = "[  123.456789] exitmeter: \r\n".len();
    let flood = |log: &mut Log| -> Result<(u64, u64)> {
        let (mut lines, mut bytes) = (0, 0);
        for (level, line) in log.module_records()? {
            ensure!(
                level
                    == if line.contains("queries of guests") {
                        5
                    } else {
                        7
                    },
                "'{line}' has the level {level}: a default console shows those below 7"
            );
            lines += 1;
            bytes += (line.len() + FRAME) as u64;
        }
        Ok((lines, bytes))
    };
    let began = Instant::now();
    for _ in 0..4 {
        ask(Mode::Long, &queries)?;
    }
    let (lines, _) = flood(&mut log)?;
    let most = 350 + began.elapsed().as_secs() * 8 + 10;
    ensure!(
        (333..most).contains(&lines),
        "2000 queries at once left {lines} lines, not 333 (the demo's two sweeps) to {most}"
    );
    // And now the long run.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        ask(Mode::Long, &queries)?;
    }
    let (lines, bytes) = flood(&mut log)?;
    let room = CONSOLE * began.elapsed().as_millis() as u64 / 1000 / 10;
    ensure!(
        lines >= 40 && bytes <= room + 300,
        "a flood of {:?} left {lines} lines of {bytes} bytes, a tenth of a console is {room}",
        began.elapsed()
    );
    println!("{lines} lines of {bytes} bytes in {:?}", began.elapsed());
    Ok(())
}

/// The last cases of all.
pub(super) fn final_cases() -> Vec<Case> {
    let clean = Case::without_module("log: no oops, no warning, no stall in all of it", clean);
    let lost = Path::new(KMEMLEAK).exists().then(|| {
        Case::without_module(
            "log: nothing is lost, now that the module is unloaded",
            nothing_lost,
        )
    });
    [clean].into_iter().chain(lost).collect()
}

/// Where a kernel that looks for lost memory is told to, and tells what it found.
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// The kernel log holds these words.
pub(super) fn kernel_says(words: String) -> Case {
    let name = format!("log: the kernel says '{words}'");
    Case::without_module(name, move || {
        let lines = Log::from_boot()?.lines()?;
        let line = lines.iter().find(|line| line.contains(&words));
        println!("{}", line.context("no line of the kernel log does")?);
        Ok(())
    })
}

/// A guest asks for something of each kind; the lines that should be logged, and those that
/// are.
fn queries() -> Result<(Vec<String>, Vec<String>)> {
    let cpuid = host::pick(10, 0x72)?;
    let asked = [
        (0x4fff_fff0, 0),
        (0x4fff_fff1, 0),
        (0x4fff_fff2, cpuid | 1 << 16),
        (0x4fff_fff3, cpuid),
        (0x4fff_fff5, 0),
        (0x4fff_fffc, cpuid),
        (0x4fff_fffd, cpuid),
        (0x4fff_fffd, 35 + host::pick(0, 0x8000)?),
        (0x4fff_fffe, 0),
        (0x4fff_ffff, 0),
    ];
    let quads: Vec<Quad> = asked
        .map(|(leaf, subleaf)| Quad::cpuid(leaf, subleaf))
        .into();
    let mut log = Log::from_now()?;
    let answers = ask(Mode::Long, &quads)?.1;
    let logged = log.module_lines()?;
    let isa = host::isa()?;
    let leaves = Leaves {
        map: LeafMap::Map2021,
        isa,
        // No query of it is asked here.
        life: 1,
    };
    let mut said = Vec::new();
    for ((leaf, subleaf), answer) in asked.into_iter().zip(answers) {
        let Some(query) = leaves.classify(leaf) else {
            anyhow::bail!("leaf {leaf:#x} is not ours");
        };
        let spoken = Spoken {
            leaf,
            query,
            subleaf,
            answer: Registers {
                eax: answer.rax as u32,
                ebx: answer.rbx as u32,
                ecx: answer.rcx as u32,
                edx: answer.rdx as u32,
            },
            isa,
        };
        said.push(format!("kvm-{}: {spoken}", std::process::id()));
    }
    Ok((said, logged))
}

/// Has the kernel look for memory that nothing points to.
fn nothing_lost() -> Result<()> {
    // Not before it is 5 s old; and more than once, as an old stack may point to it for a while.
    for _ in 0..4 {
        thread::sleep(Duration::from_secs(6));
        fs::write(KMEMLEAK, "scan").context("the kernel does not look for lost memory")?;
    }
    let lost = fs::read_to_string(KMEMLEAK)?;
    ensure!(lost.is_empty(), "memory is lost:\n{lost}");
    Ok(())
}

/// Takes the data races out of a log that the kernel found (KCSAN) and of which no function of the
/// meter's is a part; their titles.
fn take_races(lines: &mut Vec<String>) -> Vec<String> {
    let mut titles = Vec::new();
    let mut from = 0;
    while let Some(start) = lines[from..]
        .iter()
        .position(|line| line.contains("BUG: KCSAN:"))
    {
        let start = from + start;
        let end = lines[start..]
            .iter()
            .position(|line| line.contains("Reported by Kernel Concurrency Sanitizer"))
            .map_or(lines.len(), |length| start + length);
        let ours = lines[start..end]
            .iter()
            .any(|line| line.contains("[exitmeter]"));
        if ours {
            from = end;
        } else {
            titles.push(lines[start].clone());
            lines.drain(start..end);
            from = start;
        }
    }
    titles
}

fn clean() -> Result<()> {
    const BAD: [&str; 11] = [
        "BUG:",
        "WARNING:",
        "Oops",
        "Call Trace",
        "general protection fault",
        "soft lockup",
        "hard LOCKUP",
        "rcu: INFO",
        "blocked for more than",
        "refcount_t",
        "kernel BUG",
    ];
    let mut lines = Log::from_boot()?.lines()?;
    ensure!(!lines.is_empty(), "the kernel log is empty");
    let races = take_races(&mut lines);
    if !races.is_empty() {
        println!("{} data races of the kernel's own: {races:#?}", races.len());
    }
    let bad: Vec<&String> = lines
        .iter()
        .filter(|line| BAD.iter().any(|bad| line.contains(bad)))
        .collect();
    ensure!(bad.is_empty(), "the kernel log holds {bad:#?}");
    let taint: u64 = fs::read_to_string("/proc/sys/kernel/tainted")?
        .trim()
        .parse()?;
    ensure!(
        taint & !UNSIGNED == OUTSIDE,
        "the kernel's taint is {taint:#x} instead of {OUTSIDE:#x}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_races_of_the_kernels_own_are_taken_out() {
        let log = "before
BUG: KCSAN: data-race in tick_nohz_stop_tick / tick_nohz_stop_tick
 tick_nohz_stop_tick+0x1/0x2
Reported by Kernel Concurrency Sanitizer on:
between
BUG: KCSAN: data-race in memcpy / work
 memcpy+0x1/0x2
 work+0x1/0x2 [exitmeter]
Reported by Kernel Concurrency Sanitizer on:
BUG: KCSAN: data-race in a / b";
        let mut lines: Vec<String> = log.lines().map(str::to_owned).collect();
        let titles = take_races(&mut lines);
        assert_eq!(titles.len(), 2, "{titles:?}");
        let left = lines.iter().filter(|line| line.contains("BUG:")).count();
        assert_eq!(left, 1, "{lines:?}");
        assert!(lines.contains(&"before".to_owned()) && lines.contains(&"between".to_owned()));
    }
}
