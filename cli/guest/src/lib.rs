// SPDX-License-Identifier: GPL-2.0

//! Reads in a guest the VM exits that its VM caused, by the CPUID instruction alone.
//!
//! It needs no operating system and no memory but the stack: no allocation, no privilege, no
//! device, and nothing but `core`. So it can be built into a kernel, a boot loader or a bare
//! program, as long as that runs in a VM whose host has the module exitmeter loaded.
//!
//! Each question asked is a CPUID instruction, thus an exit, and counted by the host like any
//! other. [`Meter`] takes those out: what it tells is what would have been told had nobody
//! asked.
//!
//! ```no_run
//! use exitmeter_guest::{Instruction, Isa, Meter};
//!
//! # fn print(line: core::fmt::Arguments<'_>) {}
//! # fn main() -> Result<(), exitmeter_guest::Error> {
//! let mut meter = Meter::find(Instruction, Isa::Vmx)?;
//! let isa = meter.isa();
//! meter.read(|row| {
//!     let name = exitmeter_guest::name(isa, row.code).unwrap_or("?");
//!     print(format_args!("{name}: {} exits", row.exits));
//! });
//! print(format_args!("reading them took {} exits, which are not among them", meter.queries()));
//! # Ok(())
//! # }
//! ```
//!
//! A host whose module has `leaf_cpl=0` answers only at CPL 0. There a program in user space finds
//! no meter by [`Instruction`]; a [`Cpuid`] of its own may have its kernel execute CPUID.
//!
//! [`TableReader`] reads what the exits of one vCPU were about, while the host keeps details.
//!
//! docs/interface.md has the leaves one by one. This crate uses 0x4FFFFFF0 to 0x4FFFFFF5, which
//! are the same whatever `leaf_map` the host has.

#![no_std]

use core::fmt;

mod tables;

pub use tables::{leaf_of, Asked, SlowExit, TableReader};

pub use exitmeter_meter::{
    leaves::{tables::Description, Registers},
    phase::Phase,
    reader::Entry,
    reasons::{name, Isa},
};
use exitmeter_meter::{
    leaves::{INTERFACE_VERSION, NESTED},
    reasons::{self, Slot},
};

/// Identifies the meter.
const IDENTIFY: u32 = 0x4fff_fff0;
/// Version, ISA, number of reasons, leaf map.
const INTERFACE: u32 = 0x4fff_fff1;
/// Cycles of a reason in a phase.
const PHASE_CYCLES: u32 = 0x4fff_fff2;
/// Exits of a reason, or those from nested guests alone.
const EXITS: u32 = 0x4fff_fff3;
/// The number of the meter's life, since version 2.
const LIFE: u32 = 0x4fff_fff4;
/// What the exits of the vCPU that asks were about, since version 3.
const TABLES: u32 = 0x4fff_fff5;
/// The first version of the leaves. It has one phase for both sleeps, and no life.
const VERSION_1: u32 = 1;
/// The phase of [`VERSION_1`] for both sleeps.
const BLOCKED: u32 = 3;
/// The processor's features; ecx has bit 31 set in a VM.
const FEATURES: u32 = 1;
const HYPERVISOR: u32 = 1 << 31;

/// Why the exits cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// This is not a VM.
    NoVm,
    /// This is a VM, and no meter answers in it.
    NoMeter,
    /// The leaves are of another version.
    Version(u32),
    /// The ISA is unknown.
    Isa(u32),
    /// The meter's numbers began anew while they were read.
    Anew,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoVm => write!(
                f,
                "this is not a virtual machine: run this in one, or 'exitmeter report' on the host"
            ),
            Error::NoMeter => write!(
                f,
                "no meter answers CPUID leaf {IDENTIFY:#X}: run this in a VM whose host has \
                 exitmeter.ko loaded, with a leaf_map other than 0"
            ),
            Error::Version(version) => write!(
                f,
                "the host's meter has version {version} of its CPUID leaves, this tool reads \
                 versions {VERSION_1} to {INTERFACE_VERSION}: use the tool that came with the module"
            ),
            Error::Isa(number) => write!(
                f,
                "the host's meter names an unknown instruction set extension, {number}"
            ),
            Error::Anew => write!(
                f,
                "the meter began anew while it was read, as when the module is loaded again or \
                 the VM is moved to another host: read again"
            ),
        }
    }
}

impl core::error::Error for Error {}

/// Who answers CPUID.
pub trait Cpuid {
    /// The answer for a leaf (eax) and a subleaf (ecx).
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers;
}

impl<C: Cpuid + ?Sized> Cpuid for &mut C {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        (**self).ask(leaf, subleaf)
    }
}

/// The CPU that this runs on.
#[derive(Clone, Copy, Debug)]
pub struct Instruction;

impl Cpuid for Instruction {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        #[allow(unused_unsafe, reason = "safe since Rust 1.94, unsafe before")]
        // SAFETY: Every CPU of 64 bits has CPUID.
        let answer = unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) };
        Registers {
            eax: answer.eax,
            ebx: answer.ebx,
            ecx: answer.ecx,
            edx: answer.edx,
        }
    }
}

/// What the host holds of an exit reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// VMX's basic exit reason or SVM's exit code, below 65536.
    pub code: u32,
    /// VM exits.
    pub exits: u64,
    /// Of these, those from nested guests, when the host tells them.
    pub nested_exits: Option<u64>,
    /// TSC ticks of the host by [`Phase`].
    pub cycles: [u64; Phase::COUNT],
    /// Whether the host tells the two sleeps apart. When it does not, [`Phase::Halted`] has the
    /// ticks of both.
    pub has_waits: bool,
}

impl Row {
    /// TSC ticks of the host in a phase.
    pub fn cycles(&self, phase: Phase) -> u64 {
        self.cycles.get(phase as usize).copied().unwrap_or(0)
    }
}

/// The exit reason of a CPUID instruction.
pub const fn cpuid_reason(isa: Isa) -> u32 {
    match isa {
        Isa::Vmx => 10,
        Isa::Svm => 0x72,
    }
}

/// The reasons that the vendor's manual defines, in the order of their codes but for SVM's
/// negative ones, which are last.
pub fn defined(isa: Isa) -> impl Iterator<Item = u32> {
    Slot::all()
        .filter_map(move |slot| reasons::code(isa, slot))
        .filter(move |code| reasons::is_defined(isa, *code))
}

/// Return the number by which leaf 0x4FFFFFF2 is asked for a phase; `None` for one that a version
/// of the leaves does not have.
const fn phase_number(phase: Phase, version: u32) -> Option<u32> {
    Some(match (phase, version) {
        (Phase::Guest, _) => 0,
        (Phase::Kernel, _) => 1,
        (Phase::User, _) => 2,
        (Phase::Preempted, _) => 4,
        (Phase::Halted, VERSION_1) => BLOCKED,
        (Phase::Waiting, VERSION_1) => return None,
        (Phase::Halted, _) => 5,
        (Phase::Waiting, _) => 6,
    })
}

/// Return true for a meter's answer to who it is.
fn is_meter(identity: Registers) -> bool {
    let name = [identity.ebx, identity.ecx, identity.edx].map(u32::to_le_bytes);
    name == [*b"Exit", *b"Mete", *b"r\0\0\0"]
}

/// A 64-bit answer.
fn wide(answer: Registers) -> u64 {
    u64::from(answer.edx) << 32 | u64::from(answer.eax)
}

/// The meter of the host, and how many questions it has been asked.
#[derive(Debug)]
pub struct Meter<C> {
    cpuid: C,
    isa: Isa,
    version: u32,
    leaf_map: u32,
    life: Option<u64>,
    queries: u64,
    /// Kernel ticks of CPUID exits, as they were told when so many questions had been asked:
    /// none, or those of [`Self::find`] when it was given the other ISA.
    kernel_before: u64,
    asked_before: u64,
}

impl<C: Cpuid> Meter<C> {
    /// Finds the meter. `likely` says whose CPU this is: Intel's is [`Isa::Vmx`], AMD's
    /// [`Isa::Svm`]. That cannot be asked here, as the very first question must be what CPUID
    /// exits have cost so far, or its answer would hold the cost of questions. A wrong guess
    /// does no more harm than that.
    ///
    /// # Errors
    ///
    /// When this is no VM, there is no meter, or one of another version.
    pub fn find(mut cpuid: C, likely: Isa) -> Result<Self, Error> {
        let mut queries = 0;
        let mut ask = |leaf, subleaf| {
            queries += 1;
            cpuid.ask(leaf, subleaf)
        };
        // In each version kernel is 1.
        let cost = |isa| 1 << 16 | cpuid_reason(isa);
        let mut kernel_before = wide(ask(PHASE_CYCLES, cost(likely)));
        if !is_meter(ask(IDENTIFY, 0)) {
            return Err(match ask(FEATURES, 0).ecx & HYPERVISOR {
                0 => Error::NoVm,
                _ => Error::NoMeter,
            });
        }
        let interface = ask(INTERFACE, 0);
        if !(VERSION_1..=INTERFACE_VERSION).contains(&interface.eax) {
            return Err(Error::Version(interface.eax));
        }
        let isa = match interface.ebx {
            1 => Isa::Vmx,
            2 => Isa::Svm,
            other => return Err(Error::Isa(other)),
        };
        let mut asked_before = 0;
        if isa != likely {
            asked_before = 3;
            kernel_before = wide(ask(PHASE_CYCLES, cost(isa)));
        }
        let mut meter = Self {
            cpuid,
            isa,
            version: interface.eax,
            leaf_map: interface.edx,
            life: None,
            queries,
            kernel_before,
            asked_before,
        };
        meter.life = meter.life_now();
        Ok(meter)
    }

    /// Count questions that this reader asked before it found the meter among its own, as when it
    /// has looked for one by another [`Cpuid`]. No number of exits holds them then; the ticks that
    /// they cost the kernel stay in.
    #[must_use]
    pub fn with_earlier(mut self, queries: u64) -> Self {
        self.queries = self.queries.wrapping_add(queries);
        self.asked_before = self.asked_before.wrapping_add(queries);
        self
    }

    /// Whose reasons.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The version of the leaves.
    pub fn interface(&self) -> u32 {
        self.version
    }

    /// The number of the meter's life when it was found: another one when its numbers have begun
    /// anew. `None` when the host does not tell it, as version 1.
    pub fn life(&self) -> Option<u64> {
        self.life
    }

    /// Whether the host tells the two sleeps apart, which version 1 does not.
    pub fn has_waits(&self) -> bool {
        self.version != VERSION_1
    }

    /// Asks whether all that was read is of one life of the meter: whether it has not begun anew
    /// since it was found, as when the module is loaded again or the VM moves to another host.
    ///
    /// # Errors
    ///
    /// [`Error::Anew`] when it has.
    pub fn check_life(&mut self) -> Result<(), Error> {
        match self.life_now() == self.life {
            true => Ok(()),
            false => Err(Error::Anew),
        }
    }

    /// Asks for the life, where there is such a leaf.
    fn life_now(&mut self) -> Option<u64> {
        if self.version == VERSION_1 {
            return None;
        }
        Some(wide(self.ask(LIFE, 0)))
    }

    /// The order of the upper four leaves, which are not used here: 2021 or 2022.
    pub fn leaf_map(&self) -> u32 {
        self.leaf_map
    }

    /// How many questions were asked: exits of this reader's own, which none of its numbers
    /// hold.
    pub fn queries(&self) -> u64 {
        self.queries
    }

    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        self.queries = self.queries.wrapping_add(1);
        self.cpuid.ask(leaf, subleaf)
    }

    /// Exits of a reason up to now, but for this reader's own; 0 of a reason that is not
    /// defined.
    pub fn exits(&mut self, code: u32) -> u64 {
        let answer = self.ask(EXITS, code);
        if answer == Registers::UNDEFINED {
            return 0;
        }
        let own = if code == cpuid_reason(self.isa) {
            self.queries
        } else {
            0
        };
        wide(answer).wrapping_sub(own)
    }

    /// TSC ticks of the host in a phase, booked on a reason below 65536; 0 of a reason that is
    /// not defined. With the cost of this reader's own exits. When the host does not tell the two
    /// sleeps apart ([`Self::has_waits`]), all of them are [`Phase::Halted`].
    pub fn cycles(&mut self, code: u32, phase: Phase) -> u64 {
        let Some(number) = phase_number(phase, self.version) else {
            return 0;
        };
        match self.ask(PHASE_CYCLES, number << 16 | code) {
            Registers::UNDEFINED => 0,
            answer => wide(answer),
        }
    }

    /// Reads all reasons that have exits, the one of CPUID last.
    ///
    /// The numbers are of the moments at which each was read. Of CPUID, the exits are all but
    /// this reader's own, exactly; the kernel's ticks are those before the first question, so
    /// that its own are not among them; and the guest's hold the time between questions, in
    /// which this reader ran.
    ///
    /// SVM's four negative codes, of entries that failed, are left out: no leaf tells in which
    /// phases they were.
    pub fn read(&mut self, mut each: impl FnMut(Row)) {
        let cpuid = cpuid_reason(self.isa);
        let others = defined(self.isa).filter(|code| *code <= 0xffff && *code != cpuid);
        for code in others.chain([cpuid]) {
            let exits = self.exits(code);
            if exits == 0 {
                continue;
            }
            let nested = self.ask(EXITS, NESTED | code);
            let mut cycles = [0; Phase::COUNT];
            for (cycles, phase) in cycles.iter_mut().zip(Phase::ALL) {
                *cycles = match (code == cpuid, phase) {
                    (true, Phase::Kernel) => self.kernel_before,
                    _ => self.cycles(code, phase),
                };
            }
            each(Row {
                code,
                exits,
                nested_exits: (nested != Registers::UNDEFINED).then(|| wide(nested)),
                cycles,
                has_waits: self.has_waits(),
            });
        }
    }

    /// What all questions so far cost the host, in TSC ticks of the kernel, this one too: those
    /// of the others exactly, if nobody else in the VM executed CPUID meanwhile, and of this one
    /// as their mean.
    pub fn cost(&mut self) -> u64 {
        let now = self.cycles(cpuid_reason(self.isa), Phase::Kernel);
        let told = u128::from(now.wrapping_sub(self.kernel_before));
        // The answer holds all questions since then but this one.
        let asked = self.queries.wrapping_sub(self.asked_before);
        let all = told
            .wrapping_mul(asked.into())
            .checked_div(asked.wrapping_sub(1).into());
        all.and_then(|all| u64::try_from(all).ok()).unwrap_or(0)
    }
}
