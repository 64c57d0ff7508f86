// SPDX-License-Identifier: GPL-2.0

//! The report of a snapshot, as text.

use std::{fmt::Write as _, path::PathBuf};

use exitmeter_meter::phase::Phase;

use crate::{
    model::{Host, Label, Ledger, ReasonRow, Report, Vcpu, Vm},
    numbers::{bar, exact, mean, rough, share, time},
    output::Output,
    source,
    spread::Spread,
    table::{
        Side::{Left, Right},
        Table,
    },
};

/// Characters of a bar for the whole.
const BAR: u32 = 40;

/// On the host: where each VM's time went, and the table of its exits.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
p50, p99 and max are the kernel cycles of single exits, from an exit to the next entry
without sleep, preemption and user space. Quantiles are within 20%, max is exact.

Examples:
  exitmeter report
  exitmeter report --json | jq '.vms[] | {name, exits}'
  cat /dev/exitmeter > before; exitmeter report --input before")]
pub struct Args {
    /// Prints JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Reads a saved snapshot instead of the device.
    #[arg(long, value_name = "FILE", default_value = source::DEVICE)]
    input: PathBuf,
}

impl Args {
    /// Prints the report.
    ///
    /// # Errors
    ///
    /// When there is no snapshot to read, or nowhere to print.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        let bytes = source::read(&self.input)?;
        let report = Report::new(&source::parse(&self.input, &bytes)?);
        if self.json {
            out.json(&report)?;
        } else {
            out.print(&text(&report))?;
        }
        Ok(())
    }
}

/// The whole report.
pub fn text(report: &Report) -> String {
    let mut text = host(&report.host);
    if report.unmetered_vcpus != 0 {
        text += &format!(
            "not metered: {} (past the module's max_vcpus, no memory, or a trust domain)\n",
            count(report.unmetered_vcpus, "vCPU")
        );
    }
    if report.vms.is_empty() {
        text += "\nNo VM runs.\n";
    }
    for vm in &report.vms {
        let exits = count(vm.ledger.exits, "exit");
        let vcpus = count(vm.vcpus.len() as u64, "vCPU");
        let Vm { name, pid, .. } = vm;
        text += &format!("\n{name}, process {pid}: {exits}, {vcpus}\n\n");
        text += &format!("{}\n", phases(&vm.ledger));
        text += &format!("{}\n", vcpu_table(&report.host, &vm.vcpus));
        text += &reason_table(&vm.ledger).to_string();
    }
    let departed = &report.departed;
    if departed.vcpus_gone != 0 {
        let exits = count(departed.ledger.exits, "exit");
        let vcpus = count(departed.vcpus_gone, "vCPU");
        text += &format!("\ngone: {exits}, {vcpus}\n\n");
        text += &format!("{}\n", phases(&departed.ledger));
        text += &reason_table(&departed.ledger).to_string();
    }
    text
}

/// The line about the host.
fn host(host: &Host) -> String {
    let mut text = format!("host: {}, TSC ", host.isa.name().to_uppercase());
    let _ = match host.tsc_khz {
        Some(khz) => write!(text, "{:.3} MHz", f64::from(khz) / 1000.0),
        None => write!(text, "of unknown rate"),
    };
    text += if host.tsc_stable { "" } else { ", unstable" };
    match host.leaf_map {
        Some(0) => text += ", guests read nothing",
        map => {
            let map = map.map_or("?".to_owned(), |map| map.to_string());
            let scope = if host.host_scope {
                "the host"
            } else {
                "their VM"
            };
            text += &format!(", guests read the sums of {scope} by leaf map {map}");
        }
    }
    let age = host.snapshot_tsc.saturating_sub(host.loaded_tsc);
    text + &format!(", loaded {} ago\n", time(age, host.tsc_khz))
}

/// Where the time went.
fn phases(ledger: &Ledger) -> Table<4> {
    let mut table = Table::new([
        ("phase", Left),
        ("cycles", Right),
        ("share", Right),
        ("", Left),
    ]);
    let whole = ledger.cycles.sum();
    for phase in Phase::ALL {
        let cycles = ledger.cycles.of(phase);
        table.row([
            phase.name().to_owned(),
            exact(cycles),
            share(cycles, whole),
            bar(cycles, whole, BAR),
        ]);
    }
    table
}

/// The same of each vCPU, and what it does now.
fn vcpu_table(host: &Host, vcpus: &[Vcpu]) -> Table<10> {
    let mut table = Table::new([
        ("vCPU", Right),
        ("now", Left),
        ("exits", Right),
        (NESTED, Right),
        ("cycles", Right),
        ("guest", Right),
        ("kernel", Right),
        ("user", Right),
        ("blocked", Right),
        ("preempted", Right),
    ]);
    for vcpu in vcpus {
        let whole = vcpu.ledger.cycles.sum();
        let of = |phase| share(vcpu.ledger.cycles.of(phase), whole);
        let phase = vcpu.phase.unwrap_or("?");
        table.row([
            vcpu.vcpu.to_string(),
            format!("{phase} for {}", time(vcpu.phase_ticks, host.tsc_khz)),
            exact(vcpu.ledger.exits),
            nested(vcpu.ledger.nested_exits),
            exact(whole),
            of(Phase::Guest),
            of(Phase::Kernel),
            of(Phase::User),
            of(Phase::Blocked),
            of(Phase::Preempted),
        ]);
    }
    if none_nested(vcpus.iter().map(|vcpu| vcpu.ledger.nested_exits)) {
        table.leave_out(&[NESTED]);
    }
    table
}

/// What each reason cost. "share" is its part of all kernel cycles; the phases behind it
/// are the time that vCPUs spent there with this as their latest exit. Without the columns of
/// single exits when the snapshot does not have them.
fn reason_table(ledger: &Ledger) -> Table<14> {
    let mut table = Table::new([
        ("code", Right),
        ("reason", Left),
        ("exits", Right),
        (NESTED, Right),
        ("kernel cycles", Right),
        ("per exit", Right),
        ("p50", Right),
        ("p99", Right),
        ("max", Right),
        ("share", Right),
        ("guest", Right),
        ("user", Right),
        ("blocked", Right),
        ("preempted", Right),
    ]);
    for ReasonRow {
        label,
        exits,
        nested_exits,
        cycles,
        spread,
    } in &ledger.reasons
    {
        let single = |ticks: fn(&Spread) -> Option<u64>| {
            let ticks = spread.as_ref().and_then(ticks);
            ticks.map_or_else(|| "-".to_owned(), rough)
        };
        table.row([
            code(label.code),
            name(label),
            exact(*exits),
            nested(*nested_exits),
            exact(cycles.kernel),
            mean(cycles.kernel, *exits),
            single(|spread| spread.quantile(50)),
            single(|spread| spread.quantile(99)),
            single(|spread| Some(spread.max).filter(|max| *max != 0)),
            share(cycles.kernel, ledger.cycles.kernel),
            rough(cycles.guest),
            rough(cycles.user),
            rough(cycles.blocked),
            rough(cycles.preempted),
        ]);
    }
    if ledger.reasons.iter().all(|row| row.spread.is_none()) {
        table.leave_out(&["p50", "p99", "max"]);
    }
    if none_nested([ledger.nested_exits]) {
        table.leave_out(&[NESTED]);
    }
    table
}

/// The title of the column of exits from nested guests, shown when there are some.
pub(crate) const NESTED: &str = "nested";

/// What that column says.
pub(crate) fn nested(exits: Option<u64>) -> String {
    exits.map_or_else(|| "-".to_owned(), exact)
}

/// Whether that column would say nothing.
pub(crate) fn none_nested(exits: impl IntoIterator<Item = Option<u64>>) -> bool {
    exits
        .into_iter()
        .all(|exits| matches!(exits, None | Some(0)))
}

/// A code as guests ask for it and the kernel log has it; nothing for rows without one.
pub(crate) fn code(code: Option<u32>) -> String {
    code.map_or_else(String::new, |code| code.to_string())
}

/// A reason's name, or what stands for one.
fn name(label: &Label) -> String {
    match (label.kind, label.name) {
        (_, Some(name)) => name,
        ("start", _) => "(before the first exit)",
        ("other", _) => "(other codes)",
        _ => "(not defined)",
    }
    .to_owned()
}

/// So many of a thing.
pub(crate) fn count(number: u64, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {thing}{plural}", exact(number))
}
