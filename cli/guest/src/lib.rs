// SPDX-License-Identifier: GPL-2.0

//! Reads the VM exits that a VM caused, from inside the guest, by the CPUID instruction alone.
//!
//! It needs no operating system and no memory but the stack: no allocation, no privilege, no
//! device, and nothing but `core`. So it can be built into a kernel, a boot loader or a bare
//! program, as long as that runs in a VM whose host has the module exitmeter loaded.
//!
//! Each query is a CPUID instruction, thus an exit, and counted by the host like any other.
//! [`Meter`] subtracts these: its numbers are those that the host would have without the reader.
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
//! [`Cpuid`] is where the answers come from. A test can give its own, without a VM:
//!
//! ```
//! use exitmeter_guest::{Cpuid, Isa, Meter, Registers};
//!
//! /// A host with a meter, on which the VM has exited 7 times by HLT, reason 12.
//! struct Host;
//!
//! impl Cpuid for Host {
//!     fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
//!         let [ebx, ecx, edx] = [*b"Exit", *b"Mete", *b"r\0\0\0"].map(u32::from_le_bytes);
//!         let zero = Registers { eax: 0, ebx: 0, ecx: 0, edx: 0 };
//!         match (leaf, subleaf) {
//!             (0x4fff_fff0, _) => Registers { eax: 0x4fff_ffff, ebx, ecx, edx },
//!             // Version 3 of the leaves; VMX.
//!             (0x4fff_fff1, _) => Registers { eax: 3, ebx: 1, ..zero },
//!             (0x4fff_fff3, 12) => Registers { eax: 7, ..zero },
//!             _ => zero,
//!         }
//!     }
//! }
//!
//! let mut meter = Meter::find(Host, Isa::Vmx)?;
//! assert_eq!(meter.exits(12), 7);
//! # Ok::<(), exitmeter_guest::Error>(())
//! ```
//!
//! A host whose module has `leaf_cpl=0` answers only at CPL 0. A program in user space finds no
//! meter there by [`Instruction`]. It can implement [`Cpuid`] to let its kernel execute CPUID.
//!
//! [`TableReader`] reads the details of the exits of one vCPU, while the host keeps details.
//!
//! docs/interface.md describes each leaf. This crate uses 0x4FFFFFF0 to 0x4FFFFFF5, which do not
//! depend on the host's `leaf_map`.

#![no_std]

use core::fmt;

use exitmeter_meter::{
    leaves::{INTERFACE_VERSION, NESTED},
    reasons::{self, Slot},
};

mod tables;

pub use exitmeter_meter::{
    leaves::{tables::Description, Registers},
    phase::Phase,
    reader::TableRow,
    reasons::{name, Isa},
};
pub use tables::{leaf_of, Asked, SlowExit, TableReader};

/// Leaf that identifies the meter.
const IDENTIFY: u32 = 0x4fff_fff0;
/// Leaf with version, ISA, number of reasons and leaf map.
const INTERFACE: u32 = 0x4fff_fff1;
/// Leaf with the cycles of a reason in a phase.
const PHASE_CYCLES: u32 = 0x4fff_fff2;
/// Leaf with the exits of a reason, or only those of L2 guests.
const EXITS: u32 = 0x4fff_fff3;
/// Leaf with the number of the meter's life, since version 2.
const LIFE: u32 = 0x4fff_fff4;
/// Leaf with the details of the asking vCPU's exits, since version 3.
const TABLES: u32 = 0x4fff_fff5;
/// First version of the leaves. It has one phase for both sleeps, and no life.
const VERSION_1: u32 = 1;
/// Phase of [`VERSION_1`] for both sleeps.
const BLOCKED: u32 = 3;
/// Leaf with the processor's features; bit 31 of ecx is set in a VM.
const FEATURES: u32 = 1;
const HYPERVISOR: u32 = 1 << 31;

/// Reason why the exits cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// This is not a VM.
    NoVm,
    /// This is a VM without a meter.
    NoMeter,
    /// The leaves have another version.
    Version(u32),
    /// The ISA is unknown.
    Isa(u32),
    /// The meter's numbers began anew while they were read.
    NewLife,
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
            Error::NewLife => write!(
                f,
                "the meter began anew while it was read, as when the module is loaded again or \
                 the VM is moved to another host: read again"
            ),
        }
    }
}

impl core::error::Error for Error {}

/// Source of CPUID answers.
pub trait Cpuid {
    /// Return the answer for a leaf (eax) and a subleaf (ecx).
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers;
}

impl<C: Cpuid + ?Sized> Cpuid for &mut C {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        (**self).ask(leaf, subleaf)
    }
}

/// The CPU that this code runs on.
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

/// Numbers of an exit reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasonNumbers {
    /// VMX's basic exit reason or SVM's exit code, below 65536.
    pub code: u32,
    /// VM exits.
    pub exits: u64,
    /// VM exits of L2 guests among them, if the host reports these.
    pub nested_exits: Option<u64>,
    /// TSC ticks of the host by [`Phase`].
    pub cycles: [u64; Phase::COUNT],
    /// True if the host tells the two sleeps apart. Otherwise, [`Phase::Halted`] has the ticks of
    /// both.
    pub separates_waits: bool,
}

impl ReasonNumbers {
    /// Return the TSC ticks of the host in a phase.
    pub fn cycles(&self, phase: Phase) -> u64 {
        self.cycles.get(phase as usize).copied().unwrap_or(0)
    }
}

/// Return the exit reason of a CPUID instruction.
pub const fn cpuid_reason(isa: Isa) -> u32 {
    match isa {
        Isa::Vmx => 10,
        Isa::Svm => 0x72,
    }
}

/// Return the reasons that the vendor's manual defines, sorted by code, but with SVM's negative
/// codes last.
pub fn defined(isa: Isa) -> impl Iterator<Item = u32> {
    Slot::all()
        .filter_map(move |slot| reasons::code(isa, slot))
        .filter(move |code| reasons::is_defined(isa, *code))
}

/// Return the number of a phase in the subleaf of leaf 0x4FFFFFF2, or `None` if this version of the
/// leaves does not have the phase.
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

/// Return true if the identity is that of a meter.
fn is_meter(identity: Registers) -> bool {
    let name = [identity.ebx, identity.ecx, identity.edx].map(u32::to_le_bytes);
    name == [*b"Exit", *b"Mete", *b"r\0\0\0"]
}

/// Return a 64-bit answer.
fn wide(answer: Registers) -> u64 {
    u64::from(answer.edx) << 32 | u64::from(answer.eax)
}

/// The meter of the host, with the number of queries that it was asked.
#[derive(Debug)]
pub struct Meter<C> {
    cpuid: C,
    isa: Isa,
    version: u32,
    leaf_map: u32,
    life: Option<u64>,
    queries: u64,
    /// Kernel ticks of CPUID exits after `asked_before` queries. That is none, or the queries of
    /// [`Self::find`] if it was given the other ISA.
    kernel_before: u64,
    asked_before: u64,
}

impl<C: Cpuid> Meter<C> {
    /// Find the meter. `likely` is the vendor of this CPU: [`Isa::Vmx`] for Intel, [`Isa::Svm`] for
    /// AMD. This method cannot query the vendor. Its very first query must be the cost of CPUID
    /// exits so far, because otherwise that would include the cost of queries. A wrong guess has no
    /// other effect.
    ///
    /// # Errors
    ///
    /// Returns an error if this is no VM, there is no meter, or its leaves have an unknown version.
    pub fn find(mut cpuid: C, likely: Isa) -> Result<Self, Error> {
        let mut queries = 0;
        let mut ask = |leaf, subleaf| {
            queries += 1;
            cpuid.ask(leaf, subleaf)
        };
        // In each version, the number of the kernel phase is 1.
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

    /// Count queries that this reader made before it found the meter, for example by another
    /// [`Cpuid`]. They are then subtracted from the exits. The kernel ticks that they cost are not.
    #[must_use]
    pub fn with_earlier(mut self, queries: u64) -> Self {
        self.queries = self.queries.wrapping_add(queries);
        self.asked_before = self.asked_before.wrapping_add(queries);
        self
    }

    /// Return the vendor whose exit reasons the codes are.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Return the version of the leaves.
    pub fn interface(&self) -> u32 {
        self.version
    }

    /// Return the number of the meter's life when it was found. It changes when the meter's numbers
    /// begin anew. `None` if the host does not report it, as in version 1.
    pub fn life(&self) -> Option<u64> {
        self.life
    }

    /// Return true if the host tells the two sleeps apart. Version 1 does not.
    pub fn separates_waits(&self) -> bool {
        self.version != VERSION_1
    }

    /// Check that all numbers read are of one life of the meter: that it has not begun anew since
    /// it was found, because the module was loaded again or the VM moved to another host.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NewLife`] otherwise.
    pub fn check_life(&mut self) -> Result<(), Error> {
        match self.life_now() == self.life {
            true => Ok(()),
            false => Err(Error::NewLife),
        }
    }

    /// Query the life, if the version has that leaf.
    fn life_now(&mut self) -> Option<u64> {
        if self.version == VERSION_1 {
            return None;
        }
        Some(wide(self.ask(LIFE, 0)))
    }

    /// Return the order of the upper four leaves, which this crate does not use: 2021 or 2022.
    pub fn leaf_map(&self) -> u32 {
        self.leaf_map
    }

    /// Return the number of queries made. Each was an exit of this reader's own, and is in none of
    /// its numbers.
    pub fn queries(&self) -> u64 {
        self.queries
    }

    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        self.queries = self.queries.wrapping_add(1);
        self.cpuid.ask(leaf, subleaf)
    }

    /// Return the exits of a reason up to now, without this reader's own. Return 0 for an undefined
    /// reason.
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

    /// Return the host's TSC ticks in a phase, booked on a reason below 65536. Return 0 for an
    /// undefined reason. The ticks include the cost of this reader's own exits. If the host does
    /// not tell the two sleeps apart ([`Self::separates_waits`]), [`Phase::Halted`] has both.
    pub fn cycles(&mut self, code: u32, phase: Phase) -> u64 {
        let Some(number) = phase_number(phase, self.version) else {
            return 0;
        };
        match self.ask(PHASE_CYCLES, number << 16 | code) {
            Registers::UNDEFINED => 0,
            answer => wide(answer),
        }
    }

    /// Read all reasons that have exits, CPUID's last.
    ///
    /// Each number is of the moment at which it was read. For CPUID, the exits are exactly those of
    /// other code in the VM. Its kernel ticks are those before the first query, so they do not
    /// include the cost of queries. Its guest ticks include the time between queries, in which this
    /// reader ran.
    ///
    /// SVM's four negative codes, of failed entries, are left out: no leaf has their phases.
    pub fn read(&mut self, mut each: impl FnMut(ReasonNumbers)) {
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
            each(ReasonNumbers {
                code,
                exits,
                nested_exits: (nested != Registers::UNDEFINED).then(|| wide(nested)),
                cycles,
                separates_waits: self.separates_waits(),
            });
        }
    }

    /// Return the cost of all queries so far, this one included, in the host's kernel TSC ticks.
    /// The cost of the earlier queries is exact if no other code in the VM executed CPUID
    /// meanwhile. The cost of this query is estimated as their mean.
    pub fn cost(&mut self) -> u64 {
        let now = self.cycles(cpuid_reason(self.isa), Phase::Kernel);
        let ticks = u128::from(now.wrapping_sub(self.kernel_before));
        // The answer includes all queries since then but this one.
        let asked = self.queries.wrapping_sub(self.asked_before);
        let all = ticks
            .wrapping_mul(asked.into())
            .checked_div(asked.wrapping_sub(1).into());
        all.and_then(|all| u64::try_from(all).ok()).unwrap_or(0)
    }
}
