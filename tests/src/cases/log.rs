// SPDX-License-Identifier: GPL-2.0

//! The host's kernel log: a line for each query while the cases run, and no sign of a fault at their
//! end.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::leaves::{LeafMap, Leaves, LogLine, Registers};
use tiny_guests::{Mode, Registers64};

use super::{answers::ask, Case};
use crate::host::{self, codes, leaves::MAP_2021, log::Log};

/// Taint flags: an out-of-tree module, and an unsigned module.
const OUT_OF_TREE: u64 = 1 << 12;
const UNSIGNED: u64 = 1 << 13;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "log: each query has a line in the course's words",
            || {
                let (expected, logged) = logged_queries()?;
                ensure!(
                    expected == logged,
                    "the guest's answers give the lines {expected:#?}, and the log has {logged:#?}"
                );
                Ok(())
            },
        ),
        Case::with_module(
            "log_queries=0",
            "log: log_queries=0 turns the lines off",
            || {
                let (_, logged) = logged_queries()?;
                ensure!(logged.is_empty(), "the log says {logged:#?}");
                Ok(())
            },
        ),
        Case::with_module(
            "",
            "log: the lines of a flooding guest are limited",
            flood_is_limited,
        )
        .within(180),
    ]
}

/// Throughput of a serial console at 115200 baud, in bytes per second, of ten bits each.
const CONSOLE_BYTES_PER_SECOND: u64 = 11_520;

/// Let a guest flood the log. Its lines must not reach a console with the default level, and may take
/// a tenth of a serial console that shows all levels.
fn flood_is_limited() -> Result<()> {
    // After 44 s the rate limit has recovered from earlier cases.
    thread::sleep(Duration::from_secs(45));
    let mut log = Log::from_now()?;
    let cpuid = codes::cpuid()?;
    // Queries with the longest lines.
    let queries = vec![Registers64::cpuid(MAP_2021.reason_cycles, cpuid); 500];
    // A line on the console starts with its time and the module's name, and ends with CR and LF.
    const FRAME_BYTES: usize = "[  123.456789] exitmeter: \r\n".len();
    let count_lines = |log: &mut Log| -> Result<(u64, u64)> {
        let (mut lines, mut bytes) = (0, 0);
        for (level, line) in log.module_records()? {
            ensure!(
                level
                    == if line.contains("queries of guests") {
                        5
                    } else {
                        7
                    },
                "'{line}' has the level {level}, and a default console shows levels below 7"
            );
            lines += 1;
            bytes += (line.len() + FRAME_BYTES) as u64;
        }
        Ok((lines, bytes))
    };
    let began = Instant::now();
    for _ in 0..4 {
        ask(Mode::Long, &queries)?;
    }
    let (lines, _) = count_lines(&mut log)?;
    let most = 350 + began.elapsed().as_secs() * 8 + 10;
    ensure!(
        (333..most).contains(&lines),
        "2000 queries at once left {lines} lines, not 333 (the demo's two sweeps) to {most}"
    );
    // The limit over a longer time.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        ask(Mode::Long, &queries)?;
    }
    let (lines, bytes) = count_lines(&mut log)?;
    let room = CONSOLE_BYTES_PER_SECOND * began.elapsed().as_millis() as u64 / 1000 / 10;
    ensure!(
        lines >= 40 && bytes <= room + 300,
        "a flood of {:?} left {lines} lines with {bytes} bytes, a tenth of a console's {room}",
        began.elapsed()
    );
    println!("{lines} lines of {bytes} bytes in {:?}", began.elapsed());
    Ok(())
}

/// Return the cases that run last.
pub(super) fn final_cases() -> Vec<Case> {
    let clean = Case::without_module("log: no oops, warning or stall since boot", clean_log);
    let leaks = Path::new(KMEMLEAK).exists().then(|| {
        Case::without_module(
            "log: nothing has leaked, with the module unloaded",
            no_leaks,
        )
    });
    [clean].into_iter().chain(leaks).collect()
}

/// File of the kernel's leak detector: writing starts a scan, reading lists the leaks.
const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// Return a case that checks that a line of the kernel log holds `words`.
pub(super) fn kernel_says(words: String) -> Case {
    let name = format!("log: the kernel says '{words}'");
    Case::without_module(name, move || {
        let lines = Log::from_boot()?.lines()?;
        let line = lines.iter().find(|line| line.contains(&words));
        println!("{}", line.context("no line of the kernel log does")?);
        Ok(())
    })
}

/// Let a guest make a query of each kind. Return the expected lines, and those in the log.
fn logged_queries() -> Result<(Vec<String>, Vec<String>)> {
    let cpuid = codes::cpuid()?;
    let asked = [
        (0x4fff_fff0, 0),
        (0x4fff_fff1, 0),
        (0x4fff_fff2, cpuid | 1 << 16),
        (0x4fff_fff3, cpuid),
        (0x4fff_fff5, 0),
        (0x4fff_fffc, cpuid),
        (0x4fff_fffd, cpuid),
        (0x4fff_fffd, 35 + host::by_vendor(0, 0x8000)?),
        (0x4fff_fffe, 0),
        (0x4fff_ffff, 0),
    ];
    let quads: Vec<Registers64> = asked
        .map(|(leaf, subleaf)| Registers64::cpuid(leaf, subleaf))
        .into();
    let mut log = Log::from_now()?;
    let answers = ask(Mode::Long, &quads)?.1;
    let logged = log.module_lines()?;
    let vendor = host::vendor()?;
    let leaves = Leaves {
        map: LeafMap::Map2021,
        isa: vendor,
        // No query here asks for it.
        life: 1,
    };
    let mut expected = Vec::new();
    for ((leaf, subleaf), answer) in asked.into_iter().zip(answers) {
        let Some(query) = leaves.classify(leaf) else {
            anyhow::bail!("leaf {leaf:#x} is not ours");
        };
        let line = LogLine {
            leaf,
            query,
            subleaf,
            answer: Registers {
                eax: answer.rax as u32,
                ebx: answer.rbx as u32,
                ecx: answer.rcx as u32,
                edx: answer.rdx as u32,
            },
            isa: vendor,
        };
        expected.push(format!("kvm-{}: {line}", std::process::id()));
    }
    Ok((expected, logged))
}

/// Let the kernel search for unreferenced memory.
fn no_leaks() -> Result<()> {
    // The kernel reports only memory older than 5 s. Scan repeatedly, as an old stack may still hold
    // a reference for a while.
    for _ in 0..4 {
        thread::sleep(Duration::from_secs(6));
        fs::write(KMEMLEAK, "scan").context("the kernel does not scan for leaks")?;
    }
    let leaks = fs::read_to_string(KMEMLEAK)?;
    ensure!(leaks.is_empty(), "memory has leaked:\n{leaks}");
    Ok(())
}

/// Remove the KCSAN reports of data races that involve no function of the meter from the log, and
/// return their titles.
fn remove_foreign_races(lines: &mut Vec<String>) -> Vec<String> {
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

fn clean_log() -> Result<()> {
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
    let races = remove_foreign_races(&mut lines);
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
        taint & !UNSIGNED == OUT_OF_TREE,
        "the kernel's taint is {taint:#x} instead of {OUT_OF_TREE:#x}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_races_are_removed() {
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
        let titles = remove_foreign_races(&mut lines);
        assert_eq!(titles.len(), 2, "{titles:?}");
        let left = lines.iter().filter(|line| line.contains("BUG:")).count();
        assert_eq!(left, 1, "{lines:?}");
        assert!(lines.contains(&"before".to_owned()) && lines.contains(&"between".to_owned()));
    }
}
