// SPDX-License-Identifier: GPL-2.0

//! The guest's own exits, read by CPUID inside the guest.

use exitmeter_meter::{
    leaves::{Registers, NESTED},
    phase::Phase,
    reasons::Isa,
    snapshot::Reason,
};
use serde::Serialize;

use crate::{
    model::{isa_name, Cycles, Label, Ledger, ReasonRow, FORMAT},
    numbers::{exact, mean, share},
    output::Output,
    reasons, report,
    table::{
        Side::{Left, Right},
        Table,
    },
};

/// In a guest: the exits that this VM caused, read by CPUID.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  exitmeter guest
  exitmeter guest --json | jq '.reasons[] | select(.exits > 1000)'")]
pub struct Args {
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
        let sweep = Sweep::read(&mut Instruction)?;
        if self.json {
            out.json(&sweep)?;
        } else {
            out.print(&sweep.text())?;
        }
        Ok(())
    }
}

/// Identifies the meter.
const IDENTIFY: u32 = 0x4fff_fff0;
/// Version, ISA, number of reasons, leaf map.
const INTERFACE: u32 = 0x4fff_fff1;
/// Cycles of a reason in a phase.
const PHASE_CYCLES: u32 = 0x4fff_fff2;
/// Exits of a reason, or those from nested guests alone.
const EXITS: u32 = 0x4fff_fff3;
/// The version of the leaves that is understood here.
const VERSION: u32 = 1;

/// Why the exits cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The identity leaf does not answer.
    #[error(
        "no meter answers CPUID leaf {IDENTIFY:#X}: run this in a VM whose host has \
         exitmeter.ko loaded, with a leaf_map other than 0"
    )]
    NoMeter,
    /// The leaves are of another version.
    #[error(
        "the host's meter has version {0} of its CPUID leaves, this tool reads version {VERSION}: \
         use the tool that came with the module"
    )]
    Version(u32),
    /// The ISA is unknown.
    #[error("the host's meter names an unknown instruction set extension, {0}")]
    Isa(u32),
}

/// Who answers CPUID.
pub trait Cpuid {
    /// The answer for a leaf and a subleaf.
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers;
}

/// The CPU that this runs on.
#[derive(Clone, Copy, Debug)]
pub struct Instruction;

impl Cpuid for Instruction {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        #[allow(unused_unsafe, reason = "safe since Rust 1.94, unsafe before")]
        // SAFETY: Every CPU of 64 bits has CPUID.
        let answer = unsafe { std::arch::x86_64::__cpuid_count(leaf, subleaf) };
        Registers {
            eax: answer.eax,
            ebx: answer.ebx,
            ecx: answer.ecx,
            edx: answer.edx,
        }
    }
}

/// All that a guest can read of its own exits.
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
    /// How many CPUID instructions reading took. Each is an exit, and counted.
    pub queries: u64,
    /// Exits by reason. The numbers are of the moments at which each was read.
    #[serde(flatten)]
    pub ledger: Ledger,
}

impl Sweep {
    /// Reads all there is.
    ///
    /// # Errors
    ///
    /// When there is no meter, or one of another version.
    pub fn read(cpuid: &mut impl Cpuid) -> Result<Self, Error> {
        let mut queries = 0;
        let mut ask = |leaf, subleaf| {
            queries += 1;
            cpuid.ask(leaf, subleaf)
        };
        let identity = ask(IDENTIFY, 0);
        let name = [identity.ebx, identity.ecx, identity.edx].map(u32::to_le_bytes);
        if name.concat() != b"ExitMeter\0\0\0" {
            return Err(Error::NoMeter);
        }
        let interface = ask(INTERFACE, 0);
        if interface.eax != VERSION {
            return Err(Error::Version(interface.eax));
        }
        let isa = match interface.ebx {
            1 => Isa::Vmx,
            2 => Isa::Svm,
            other => return Err(Error::Isa(other)),
        };

        let wide = |answer: Registers| u64::from(answer.edx) << 32 | u64::from(answer.eax);
        let mut rows = Vec::new();
        // A subleaf of the phase leaf has 16 bits for the reason.
        for code in reasons::defined(isa).filter(|code| *code <= 0xffff) {
            let exits = wide(ask(EXITS, code));
            if exits == 0 {
                continue;
            }
            let cycles =
                Phase::ALL.map(|phase| wide(ask(PHASE_CYCLES, (phase as u32) << 16 | code)));
            let nested = ask(EXITS, NESTED | code);
            rows.push(ReasonRow {
                label: Label::new(isa, Reason::Code(code)),
                exits,
                nested_exits: (nested != Registers::UNDEFINED).then(|| wide(nested)),
                cycles: Cycles::by_phase(|phase| cycles[phase as usize]),
                // No leaf tells it.
                spread: None,
            });
        }
        Ok(Self {
            format: FORMAT,
            isa,
            interface: interface.eax,
            leaf_map: interface.edx,
            queries,
            ledger: Ledger::of(rows),
        })
    }

    /// The sweep as a table.
    pub fn text(&self) -> String {
        let mut table = Table::new([
            ("code", Right),
            ("reason", Left),
            ("exits", Right),
            (report::NESTED, Right),
            ("cycles", Right),
            ("per exit", Right),
            ("share", Right),
        ]);
        let whole = self.ledger.cycles.kernel;
        for ReasonRow {
            label,
            exits,
            nested_exits,
            cycles,
            ..
        } in &self.ledger.reasons
        {
            table.row([
                report::code(label.code),
                label.name.unwrap_or_default().to_owned(),
                exact(*exits),
                report::nested(*nested_exits, exact),
                exact(cycles.kernel),
                mean(cycles.kernel, *exits),
                share(cycles.kernel, whole),
            ]);
        }
        if report::none_nested([self.ledger.nested_exits]) {
            table.leave_out(&[report::NESTED]);
        }
        format!(
            "{table}\n{}, {} cycles; reading them took {} CPUID exits of its own\n",
            report::count(self.ledger.exits, "exit"),
            exact(whole),
            self.queries
        )
    }
}
