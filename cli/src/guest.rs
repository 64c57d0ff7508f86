// SPDX-License-Identifier: GPL-2.0

//! `exitmeter guest`: the guest's own exits, read by CPUID inside the guest.

use std::path::{Path, PathBuf};

use exitmeter_guest::{Cpuid, Error, Isa, Meter, ReasonNumbers};
use exitmeter_meter::snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_USER};
use serde::Serialize;

use self::{slow::Slow, tables::Reading};
use crate::{
    model::{isa_name, Counts, Label, Ledger, ReasonRow, Sort, FORMAT},
    numbers::rough,
    output::{Output, TextOptions},
    report::{format_count, Writer},
    why::{
        export::collapsed_of,
        model::Weight,
        symbols::{self, Symbols},
    },
};

mod access;
mod details;
mod slow;
pub(crate) mod tables;

pub use access::{find, Access, NoAnswer, Querier};
pub use details::GuestDetails;

/// In a guest: show the exits that this VM caused, read by CPUID.
///
/// The host must have the module loaded. No privilege is needed, unless the module answers only the
/// guest's kernel (leaf_cpl=0). Then the command reads /dev/cpu/*/cpuid, which takes root and
/// 'modprobe cpuid'. If it is moved to another CPU meanwhile, the kernel interrupts the previous
/// CPU, and these exits are among the numbers. The numbers are sums over the vCPUs of this VM. Each
/// CPUID that the command executes is an exit, too; these exits are subtracted from the numbers.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
--why, --code and --slow show what the host keeps while its details are on, as with the module's
parameter details=1; a guest cannot turn them on. Each vCPU answers only for itself, so this command
runs on each CPU in turn, and reports CPUs that it may not use. The age of the numbers is given in
TSC ticks of the host. Vectors of the host's interrupts are not shown: their exits are in no row.

--code shows which code of this guest caused its exits. It takes root: the module tells it only to a
guest's kernel, which is asked through /dev/cpu/*/cpuid ('modprobe cpuid'). Names come from
/proc/kallsyms. The exits of the reading itself are included.

Cycles are TSC ticks of the host. The kernel cycles of HLT include the time that KVM polled before
it let the vCPU sleep; `exitmeter report` on the host shows it separately.

Examples:
  exitmeter guest
  exitmeter guest --json | jq '.reasons[] | select(.exits > 1000)'
  exitmeter guest --why
  exitmeter guest --code --collapsed | flamegraph.pl > exits.svg")]
pub struct Args {
    /// Sort order of the table of reasons.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Show what the exits were about, since the host keeps details.
    #[arg(long, group = "what")]
    why: bool,
    /// Show which code of this guest caused the exits. Takes root.
    #[arg(long, group = "what")]
    code: bool,
    /// Show the slowest exits, and the exits before one that was too slow.
    #[arg(long, group = "what")]
    slow: bool,
    /// Name code by the symbols in FILE instead of /proc/kallsyms.
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Sort order of details and code, and weight of a profile: exits, or the ticks that they took.
    #[arg(long, value_enum, default_value_t, requires = "what")]
    weight: Weight,
    /// Show up to N rows of each reason, or N of the slowest exits.
    #[arg(long, value_name = "N", default_value_t = 10, requires = "what")]
    limit: usize,
    /// Print code as collapsed stacks, for flamegraph.pl and inferno.
    #[arg(long, requires = "code", conflicts_with = "json")]
    collapsed: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Symbols of the guest's kernel.
const KALLSYMS: &str = "/proc/kallsyms";

impl Args {
    /// Print the guest's exits.
    ///
    /// # Errors
    ///
    /// Returns an error if no meter answers, or the output cannot be written.
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
            out.print(&sweep.text(out.text_options()))?;
        }
        Ok(())
    }
}

impl Args {
    /// Print the tables of this VM's vCPUs.
    fn tables(&self, out: &mut Output) -> anyhow::Result<()> {
        let found = |meter: Meter<&mut dyn Cpuid>| Found {
            isa: meter.isa(),
            version: meter.interface(),
            life: meter.life(),
        };
        let (access, found) = find(likely_isa(), found)?;
        let access = match self.code {
            true => Access::Device,
            false => access,
        };
        found.check()?;
        let mut cpus = tables::Cpus::open(access).map_err(|error| match error.downcast() {
            Ok(NoAnswer::NoDevice { error }) if self.code => NoAnswer::NoKernel { error }.into(),
            Ok(no_answer) => no_answer.into(),
            Err(other) => other,
        })?;
        if self.slow {
            let (reading, slow) = tables::slow(&mut cpus, found.isa)?;
            reading.check()?;
            let slow = Slow::new(&reading, slow, found.isa, &self.symbols()?);
            match self.json {
                true => out.json(&slow)?,
                false => out.print(&slow.text(self.limit, out.text_options()))?,
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
        let told = GuestDetails::new(
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
            false => out.print(&about.text(self.code, self.limit, out.text_options()))?,
        }
        Ok(())
    }

    /// Read the symbols that name code. The default is the guest's own kernel, if it has some.
    fn symbols(&self) -> Result<Symbols, symbols::Error> {
        match &self.symbols {
            Some(path) => Symbols::read(path),
            None if self.code => Symbols::read(Path::new(KALLSYMS)).or_else(|error| match error {
                // A kernel may lack the file.
                symbols::Error::Unreadable { .. } => Ok(Symbols::default()),
                error => Err(error),
            }),
            None => Ok(Symbols::default()),
        }
    }
}

/// Properties of a meter that answers.
struct Found {
    isa: Isa,
    version: u32,
    life: Option<u64>,
}

/// First version of the leaves that has tables.
pub(crate) const TABLES_SINCE: u32 = 3;

impl Found {
    fn check(&self) -> Result<(), tables::Error> {
        match self.version < TABLES_SINCE {
            true => Err(tables::Error::Version(self.version)),
            false => Ok(()),
        }
    }
}

/// Details of this VM's exits since the host keeps them, as `--json` prints them.
#[derive(Clone, Debug, Serialize)]
struct About {
    /// [`FORMAT`].
    format: u32,
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    isa: Isa,
    /// Version of the leaves.
    interface: u32,
    /// The meter's life number.
    #[serde(skip_serializing_if = "Option::is_none")]
    life: Option<u64>,
    /// TSC ticks of the host since the oldest tables began.
    ticks: u64,
    /// Number of CPUID instructions that the reading took. Details exclude them, code includes
    /// them.
    queries: u64,
    #[serde(flatten)]
    told: GuestDetails,
}

impl About {
    fn text(&self, code: bool, limit: usize, options: TextOptions) -> String {
        let own_exits = format_count(self.queries, "CPUID exit");
        let among = if code { "among them" } else { "not among them" };
        format!(
            "exits of {} in {} cycles\n{}{own_exits} of this tool's own {among}\n",
            format_count(self.told.vcpus as u64, "vCPU"),
            rough(self.ticks),
            self.told.text(code, limit, options),
        )
    }
}

/// Return the vendor of this CPU. Asks Linux, because CPUID would be an exit.
pub(crate) fn likely_isa() -> Isa {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let vendor = text.lines().find(|line| line.starts_with("vendor_id"));
    match vendor {
        Some(line) if !line.ends_with("GenuineIntel") => Isa::Svm,
        _ => Isa::Vmx,
    }
}

/// All that a guest can read of its own exits, without the exits of the reading.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// [`FORMAT`].
    pub format: u32,
    /// `vmx` or `svm`.
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// Version of the leaves.
    pub interface: u32,
    /// Order of the leaves: 2021 or 2022.
    pub leaf_map: u32,
    /// The meter's life number, if the host tells it. A new one means that the numbers began anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub life: Option<u64>,
    /// Number of CPUID instructions that the reading took. Their exits are not in the numbers.
    pub queries: u64,
    /// Exits by reason. Each number was read at a moment of its own.
    #[serde(flatten)]
    pub ledger: Ledger,
}

impl Sweep {
    /// Find the meter and read all numbers. `likely` is the probable vendor (see [`Meter::find`]).
    ///
    /// # Errors
    ///
    /// Returns an error if there is no meter, if its version is unknown, or if it began anew
    /// meanwhile.
    pub fn read(mut cpuid: impl Cpuid, likely: Isa) -> Result<Self, Error> {
        Self::of(Meter::find(&mut cpuid as &mut dyn Cpuid, likely)?)
    }

    /// Read all numbers of a meter.
    ///
    /// # Errors
    ///
    /// Returns an error if the meter began anew meanwhile.
    pub fn of(mut meter: Meter<&mut dyn Cpuid>) -> Result<Self, Error> {
        let isa = meter.isa();
        let mut rows = Vec::new();
        meter.read(|row| rows.push(reason_row(isa, &row)));
        meter.check_life()?;
        let mut ledger = Ledger::of(rows);
        ledger.counts.cycles.separates_waits = meter.separates_waits();
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

    /// Format the sweep like the host's report.
    pub fn text(&self, options: TextOptions) -> String {
        let mut writer = Writer::new(String::new(), options);
        writer.phases(&self.ledger);
        writer.reasons(&self.ledger, None);
        let own_exits = format_count(self.queries, "CPUID exit");
        writer.end(&format!(
            "{}; reading them took {own_exits} more",
            format_count(self.ledger.exits, "exit"),
        ))
    }
}

/// Convert a row to the form of the host's report.
fn reason_row(isa: Isa, row: &ReasonNumbers) -> ReasonRow {
    ReasonRow {
        label: Label::new(isa, Reason::Code(row.code)),
        counts: Counts::of_guest(row),
        // No leaf provides the distribution.
        spread: None,
    }
}
