// SPDX-License-Identifier: GPL-2.0

//! The parameter `leaf_cpl`: with `leaf_cpl=0` a guest's kernel reads the numbers, and everybody else
//! in the guest reads what KVM answers.

use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use tiny_guests::{Mode, Registers64};

use super::{answers::ask, loading::UNCHECKED_LINE, tool::check_equal_between, Case};
use crate::host::{
    codes,
    leaves::{EXITS_64, IDENTITY, INTERFACE, MAP_2021, PHASE_CYCLES},
    linux::{CpuidLine, Linux},
    log::Log,
    module, tool,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::without_module(
            "access: with leaf_cpl=0 CPL 0 reads the numbers, CPL 3 reads what KVM answers",
            by_level,
        ),
        Case::with_module(
            "leaf_cpl=0 log_queries=0",
            "access: with leaf_cpl=0 a Linux guest's root reads its exits, other users do not",
            in_linux,
        )
        .with_linux()
        .within(300),
        Case::without_module(
            "access: the example configuration for hosts with other people's VMs loads",
            example_configuration,
        ),
    ]
}

/// Query each leaf from tiny guests at CPL 0 and CPL 3.
fn by_level() -> Result<()> {
    let cpuid = codes::cpuid()?;
    let queries: Vec<Registers64> = (0x4fff_fff0..=0x4fff_ffff)
        .map(|leaf| Registers64::cpuid(leaf, cpuid))
        .collect();
    let without = ask(Mode::User, &queries)?.1;
    for (parameters, total) in [("leaf_cpl=0", MAP_2021.total_exits), ("leaf_cpl=3", 0)] {
        let mut log = Log::from_now()?;
        let loaded = module::Loaded::with(parameters)?;
        let lines = log.module_lines()?;
        ensure!(
            lines
                .iter()
                .any(|line| line.ends_with("2021, to CPL 0 alone"))
                == (total != 0),
            "with {parameters} the module says {lines:?}"
        );
        // The queries ask for CPUID exits, so each answer counts the queries before it.
        for mode in [Mode::Real, Mode::Long] {
            let answers = ask(mode, &queries)?.1;
            for (place, (query, answer)) in (1..).zip(queries.iter().zip(&answers)) {
                let leaf = query.rax as u32;
                let right = match leaf {
                    IDENTITY => answer.rbx == u64::from(u32::from_le_bytes(*b"Exit")),
                    INTERFACE => answer.rdx == 2021,
                    EXITS_64 => answer.rax == place,
                    PHASE_CYCLES => answer.rax != 0,
                    _ if leaf == MAP_2021.reason_exits => answer.rax == place,
                    _ => true,
                };
                ensure!(
                    right,
                    "with {parameters} a guest in {mode:?} mode reads {answer:x?} from leaf {leaf:#x}"
                );
            }
        }
        let lines = log.module_lines()?.len();
        let user = ask(Mode::User, &queries)?.1;
        let user_lines = log.module_lines()?.len();
        loaded.unload()?;
        // 10 of the 16 leaves are the meter's.
        ensure!(
            lines == 20,
            "with {parameters} two guests' queries of 10 leaves log {lines} lines"
        );
        if total == 0 {
            ensure!(
                user != without && user_lines == 10,
                "with {parameters} CPL 3 reads {user:x?}, logged by {user_lines} lines"
            );
        } else {
            ensure!(
                user == without && user_lines == 0,
                "with {parameters} CPL 3 reads {user:x?} instead of {without:x?}, logged by \
                 {user_lines} lines"
            );
        }
    }
    Ok(())
}

/// Query a Linux guest's numbers by the stock tool and by `exitmeter`, as root and as another user.
fn in_linux() -> Result<()> {
    let file = tool::guest_file_option()?;
    let linux = Linux::boot(&["--file", &file])?;
    let cpuid = codes::cpuid()?;
    let leaf = MAP_2021.reason_exits;

    // A plain CPUID at CPL 3 reads what KVM answers, even as root.
    let printed = |options: &str| -> Result<CpuidLine> {
        let text = linux.run(&format!("cpuid -1 -r {options} -l {leaf:#x} -s {cpuid}"))?;
        let mut lines = text
            .lines()
            .filter(|line| line.trim_start().starts_with("0x4fff"));
        lines.next().context("cpuid prints no answer")?.parse()
    };
    let plain = printed("")?.registers;
    ensure!(
        plain.eax == 0 || plain.eax == plain.ebx,
        "a process reads {plain:x?}"
    );
    let refused = |command: &str| linux.run(&format!("{command} 2>&1; echo status $?"));
    let text = refused("exitmeter guest")?;
    ensure!(
        text.contains("run 'modprobe cpuid' as root here") && text.ends_with("status 1\n"),
        "without the driver the tool says: {text}"
    );
    linux.run("modprobe cpuid && ls /dev/cpu/0/cpuid")?;
    // `cpuid -k` lets the kernel execute CPUID.
    let first = printed("-k")?.registers;
    let second = printed("-k")?.registers;
    ensure!(
        first.eax != 0 && second.eax > first.eax && (second.ecx, second.edx) == (0, 0),
        "the guest's kernel reads {first:x?}, then {second:x?}"
    );

    // As in cases/tool.rs: the exits between two sweeps are always the same if the tool leaves out
    // all of its queries, including those at CPL 3 that get no answer.
    let mut sweeps = Vec::new();
    for _ in 0..4 {
        let sweep = tool::json(&linux.run("exitmeter guest --json")?)?;
        let count = tool::exits(&sweep)?.get(&cpuid).copied();
        let queries = sweep["queries"].as_u64();
        sweeps.push(count.zip(queries).context("there are CPUID exits")?);
    }
    check_equal_between(&sweeps)?;
    let stat = |command: &str| -> Result<Value> {
        let line = format!("exitmeter stat --json -o /tmp/stat -- {command}; cat /tmp/stat");
        tool::json(&linux.run(&line)?)
    };
    let none = tool::mean_exits(&stat("exitmeter reasons >/tmp/out")?, cpuid);
    let sweep = tool::mean_exits(&stat("exitmeter guest --json >/tmp/out")?, cpuid);
    let own = tool::json(&linux.run("cat /tmp/out")?)?["queries"].as_u64();
    ensure!(
        own.is_some() && sweep.zip(none).map(|(sweep, none)| sweep - none) == own,
        "a sweep of {own:?} queries counts as {sweep:?} CPUID exits, no sweep as {none:?}"
    );

    linux.run("echo 'nobody:x:65534:65534::/:/bin/sh' >>/etc/passwd")?;
    let text = refused("su nobody -s /bin/sh -c 'id -u; exitmeter guest; exitmeter stat -- true'")?;
    let refusals = text
        .lines()
        .filter(|line| {
            line.contains("no meter answers") && line.contains("run this command as root")
        })
        .count();
    ensure!(
        text.starts_with("65534\n") && refusals == 2 && text.ends_with("status 125\n"),
        "a user who is not root reads: {text}"
    );
    linux.stop()
}

/// Load the module with each line of options in the example file, as modprobe would.
fn example_configuration() -> Result<()> {
    let text = include_str!("../../../scripts/exitmeter-modprobe.conf");
    // Lines that are commented out hold options, too.
    let options: Vec<&str> = text
        .lines()
        .filter_map(|line| {
            line.trim_start_matches('#')
                .strip_prefix("options exitmeter ")
        })
        .collect();
    ensure!(options.len() == 2, "the file has the options {options:?}");
    let cpuid = codes::cpuid()?;
    let query = [Registers64::cpuid(MAP_2021.reason_exits, cpuid); 2];
    let without = [Mode::Long, Mode::User].map(|mode| ask(mode, &query).map(|asked| asked.1));
    let [kernel, user] = without;
    let (kernel, user) = (kernel?, user?);
    for options in options {
        let mut log = Log::from_now()?;
        let loaded = module::Loaded::with(options)?;
        let answers = ask(Mode::Long, &query)?.1;
        ensure!(
            answers != kernel || options.contains("leaf_map=0"),
            "with {options} a guest's kernel reads {answers:x?}"
        );
        ensure!(
            ask(Mode::User, &query)?.1 == user,
            "with {options} a guest's process reads numbers"
        );
        let mut lines = log.module_lines()?;
        lines.retain(|line| !line.contains(UNCHECKED_LINE));
        loaded.unload()?;
        ensure!(
            lines.len() == 1 && lines[0].starts_with("version "),
            "with {options} the log says {lines:?}"
        );
    }
    Ok(())
}
