// SPDX-License-Identifier: GPL-2.0

//! `exitmeter guest`: the guest's own exits, read by CPUID inside the guest.

use exitmeter_guest::{Cpuid, Error, Isa, Meter, Row};
use exitmeter_meter::snapshot::Reason;
use serde::Serialize;

use crate::{
    model::{isa_name, Cycles, Label, Ledger, ReasonRow, Sort, FORMAT},
    output::{Look, Output},
    report::{count, Writer},
};

mod way;

pub use way::{find, Asker, Silence, Way};

/// In a guest: the exits that this VM caused, read by CPUID.
///
/// It needs of the host only that it has the module loaded, and no privilege, unless the module
/// answers only the guest's kernel (leaf_cpl=0). Then it reads /dev/cpu/*/cpuid, which takes root and
/// 'modprobe cpuid'. If it is moved to another CPU meanwhile, the kernel interrupts the one that it came
/// from, and these exits are among the numbers. What it reads are
/// sums over the vCPUs of this VM. Reading is done by CPUID, which is an exit, too: those of this
/// command's own are counted, and taken out of what it tells.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The cycles are TSC ticks of the host.

Examples:
  exitmeter guest
  exitmeter guest --json | jq '.reasons[] | select(.exits > 1000)'")]
pub struct Args {
    /// What comes first in the table of reasons.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Prints JSON instead of a table.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Prints the guest's exits.
    ///
    /// # Errors
    ///
    /// When no meter answers, or there is nowhere to print.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        let (_, mut sweep) = find(likely_isa(), Sweep::of)?;
        sweep.ledger.sort(self.sort);
        if self.json {
            out.json(&sweep)?;
        } else {
            out.print(&sweep.text(out.look()))?;
        }
        Ok(())
    }
}

/// Whose CPU this is, told by Linux and not by CPUID, which would be an exit.
pub(crate) fn likely_isa() -> Isa {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let vendor = text.lines().find(|line| line.starts_with("vendor_id"));
    match vendor {
        Some(line) if !line.ends_with("GenuineIntel") => Isa::Svm,
        _ => Isa::Vmx,
    }
}

/// All that a guest can read of its own exits, but for those that reading caused.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// [`FORMAT`].
    pub format: u32,
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// The version of the leaves.
    pub interface: u32,
    /// Their order: 2021 or 2022.
    pub leaf_map: u32,
    /// How many CPUID instructions reading took: exits that are not in the numbers.
    pub queries: u64,
    /// Exits by reason. The numbers are of the moments at which each was read.
    #[serde(flatten)]
    pub ledger: Ledger,
}

impl Sweep {
    /// Reads all there is. `likely` says whose CPU this seems to be (see [`Meter::find`]).
    ///
    /// # Errors
    ///
    /// When there is no meter, or one of another version.
    pub fn read(mut cpuid: impl Cpuid, likely: Isa) -> Result<Self, Error> {
        Ok(Self::of(Meter::find(&mut cpuid as &mut dyn Cpuid, likely)?))
    }

    /// Reads all there is from a meter that was found.
    pub fn of(mut meter: Meter<&mut dyn Cpuid>) -> Self {
        let isa = meter.isa();
        let mut rows = Vec::new();
        meter.read(|row| rows.push(reason_row(isa, &row)));
        Self {
            format: FORMAT,
            isa,
            interface: meter.interface(),
            leaf_map: meter.leaf_map(),
            queries: meter.queries(),
            ledger: Ledger::of(rows),
        }
    }

    /// The sweep as text: the host's report, from this side.
    pub fn text(&self, look: Look) -> String {
        let mut writer = Writer::new(String::new(), look);
        writer.phases(&self.ledger);
        writer.reasons(&self.ledger, None);
        let own = count(self.queries, "CPUID exit");
        writer.end(&format!(
            "{}; reading them took {own} more",
            count(self.ledger.exits, "exit"),
        ))
    }
}

/// A row as the host's report has it.
fn reason_row(isa: Isa, row: &Row) -> ReasonRow {
    ReasonRow {
        label: Label::new(isa, Reason::Code(row.code)),
        exits: row.exits,
        nested_exits: row.nested_exits,
        cycles: Cycles::by_phase(|phase| row.cycles(phase)),
        // No leaf tells it.
        spread: None,
    }
}
