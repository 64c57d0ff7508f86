// SPDX-License-Identifier: GPL-2.0

//! `exitmeter guest`: the guest's own exits, read by CPUID inside the guest.

use std::path::{Path, PathBuf};

use exitmeter_guest::{Cpuid, Error, Isa, Meter, Row};
use exitmeter_meter::snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_USER};
use serde::Serialize;

use self::{slow::Slow, tables::Reading};
use crate::{
    model::{isa_name, Cycles, Label, Ledger, ReasonRow, Sort, FORMAT},
    numbers::rough,
    output::{Look, Output},
    report::{count, Writer},
    why::{
        export::collapsed_of,
        model::Weight,
        symbols::{self, Symbols},
    },
};

mod slow;
pub(crate) mod tables;
mod told;
mod way;

pub use told::Told;
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
--why, --code and --slow tell what the host keeps while its details are on, as by the module's
parameter details=1; a guest cannot turn them on. Each vCPU answers for itself, so this command runs
on each CPU in turn, and says so where it may not. Whose exits they are since when is told by the
host's TSC ticks. Vectors of the host's interrupts are not told: their exits are in no row.

--code tells where in this guest's code its exits were, to root alone: the module answers that
to a guest's kernel, which is asked through /dev/cpu/*/cpuid ('modprobe cpuid'). It is named by
/proc/kallsyms. Reading is among it.

The cycles are TSC ticks of the host. The kernel's of HLT hold the time for which KVM polled before
it let the vCPU sleep; `exitmeter report` on the host tells them apart.

Examples:
  exitmeter guest
  exitmeter guest --json | jq '.reasons[] | select(.exits > 1000)'
  exitmeter guest --why
  exitmeter guest --code --collapsed | flamegraph.pl > exits.svg")]
pub struct Args {
    /// What comes first in the table of reasons.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Tells what the exits were about, since the host keeps details.
    #[arg(long, group = "what")]
    why: bool,
    /// Tells where in this guest's code they were. Only root is told.
    #[arg(long, group = "what")]
    code: bool,
    /// Tells the slowest ones, and what came before one that was too slow.
    #[arg(long, group = "what")]
    slow: bool,
    /// Names code by the symbols in FILE, and not by /proc/kallsyms.
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// What leads in details and code, and what a profile weighs: exits, or the ticks that they took.
    #[arg(long, value_enum, default_value_t, requires = "what")]
    weight: Weight,
    /// Shows up to N rows of each reason, or N of the slowest exits.
    #[arg(long, value_name = "N", default_value_t = 10, requires = "what")]
    limit: usize,
    /// Prints code as collapsed stacks, as flamegraph.pl and inferno read them.
    #[arg(long, requires = "code", conflicts_with = "json")]
    collapsed: bool,
    /// Prints JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Where a guest's kernel tells its symbols.
const KALLSYMS: &str = "/proc/kallsyms";

impl Args {
    /// Prints the guest's exits.
    ///
    /// # Errors
    ///
    /// When no meter answers, or there is nowhere to print.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        if self.why || self.code || self.slow {
            return self.tables(out);
        }
        let (_, sweep) = find(likely_isa(), Sweep::of)?;
        let mut sweep = sweep?;
        sweep.ledger.sort(self.sort);
        if self.json {
            out.json(&sweep)?;
        } else {
            out.print(&sweep.text(out.look()))?;
        }
        Ok(())
    }
}

impl Args {
    /// Prints what the tables of this VM's vCPUs hold.
    fn tables(&self, out: &mut Output) -> anyhow::Result<()> {
        let found = |meter: Meter<&mut dyn Cpuid>| Found {
            isa: meter.isa(),
            version: meter.interface(),
            life: meter.life(),
        };
        let (way, found) = find(likely_isa(), found)?;
        let way = match self.code {
            true => Way::Device,
            false => way,
        };
        found.check()?;
        let mut cpus = tables::Cpus::open(way).map_err(|error| match error.downcast() {
            Ok(Silence::NoDevice { error }) if self.code => Silence::NoKernel { error }.into(),
            Ok(silence) => silence.into(),
            Err(other) => other,
        })?;
        if self.slow {
            let (reading, slow) = tables::slow(&mut cpus, found.isa)?;
            reading.check()?;
            let slow = Slow::new(&reading, slow, found.isa, &self.symbols()?);
            match self.json {
                true => out.json(&slow)?,
                false => out.print(&slow.text(self.limit, out.look()))?,
            }
            return Ok(());
        }
        let wanted: &[u32] = match self.code {
            true => &[TABLE_CODE],
            false => &[TABLE_DETAILS, TABLE_USER],
        };
        let reading = Reading::now(&mut cpus, found.isa, wanted)?;
        reading.check()?;
        if self.code {
            reading.check_code()?;
        }
        let told = Told::new(
            &reading,
            &reading.rows(),
            found.isa,
            &self.symbols()?,
            self.weight,
        );
        if self.collapsed {
            return Ok(out.print(&collapsed_of("guest", &told.code, self.weight))?);
        }
        let about = About {
            format: FORMAT,
            isa: found.isa,
            interface: found.version,
            life: found.life,
            ticks: reading.age(),
            queries: reading.queries(),
            told,
        };
        match self.json {
            true => out.json(&about)?,
            false => out.print(&about.text(self.code, self.limit, out.look()))?,
        }
        Ok(())
    }

    /// Read the symbols that code is named by: of the guest itself, where it has some.
    fn symbols(&self) -> Result<Symbols, symbols::Error> {
        match &self.symbols {
            Some(path) => Symbols::read(path),
            None if self.code => Symbols::read(Path::new(KALLSYMS)).or_else(|error| match error {
                // A kernel may have none.
                symbols::Error::Unreadable { .. } => Ok(Symbols::default()),
                error => Err(error),
            }),
            None => Ok(Symbols::default()),
        }
    }
}

/// A meter that was found.
struct Found {
    isa: Isa,
    version: u32,
    life: Option<u64>,
}

/// The first version of the leaves that has tables.
pub(crate) const TABLES_SINCE: u32 = 3;

impl Found {
    fn check(&self) -> Result<(), tables::Error> {
        match self.version < TABLES_SINCE {
            true => Err(tables::Error::Version(self.version)),
            false => Ok(()),
        }
    }
}

/// What the exits of this VM were about since the host keeps details.
#[derive(Clone, Debug, Serialize)]
struct About {
    /// [`FORMAT`].
    format: u32,
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    isa: Isa,
    /// The version of the leaves.
    interface: u32,
    /// The number of the meter's life.
    #[serde(skip_serializing_if = "Option::is_none")]
    life: Option<u64>,
    /// TSC ticks of the host since the oldest tables began.
    ticks: u64,
    /// How many CPUID instructions reading took. The details do not hold them, the code does.
    queries: u64,
    #[serde(flatten)]
    told: Told,
}

impl About {
    fn text(&self, code: bool, limit: usize, look: Look) -> String {
        let own = count(self.queries, "CPUID exit");
        let among = if code { "among them" } else { "not among them" };
        format!(
            "exits of {} in {} cycles\n{}{own} of this tool's own {among}\n",
            count(self.told.vcpus as u64, "vCPU"),
            rough(self.ticks),
            self.told.text(code, limit, look),
        )
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
    /// The number of the meter's life, another one when its numbers have begun anew; when the
    /// host tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub life: Option<u64>,
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
    /// When there is no meter, or one of another version, or it began anew meanwhile.
    pub fn read(mut cpuid: impl Cpuid, likely: Isa) -> Result<Self, Error> {
        Self::of(Meter::find(&mut cpuid as &mut dyn Cpuid, likely)?)
    }

    /// Reads all there is from a meter that was found.
    ///
    /// # Errors
    ///
    /// When the meter began anew meanwhile.
    pub fn of(mut meter: Meter<&mut dyn Cpuid>) -> Result<Self, Error> {
        let isa = meter.isa();
        let mut rows = Vec::new();
        meter.read(|row| rows.push(reason_row(isa, &row)));
        meter.check_life()?;
        let mut ledger = Ledger::of(rows);
        ledger.cycles.has_waits = meter.has_waits();
        Ok(Self {
            format: FORMAT,
            isa,
            interface: meter.interface(),
            leaf_map: meter.leaf_map(),
            life: meter.life(),
            queries: meter.queries(),
            ledger,
        })
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
        cycles: Cycles::counted(row.has_waits, |phase| row.cycles(phase)),
        polled: None,
        // No leaf tells it.
        spread: None,
    }
}
