// SPDX-License-Identifier: GPL-2.0

//! The guests, and the exits that each is known to cause.

use std::{collections::BTreeMap, fmt};

use clap::ValueEnum;
use exitmeter_meter::reasons::{self, Isa};

use crate::window::PAGE;

/// Action that a guest repeats `count` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Program {
    /// CPUID of leaf 0.
    Cpuid,
    /// OUT to a port that the VMM answers.
    OutUser,
    /// IN from a port that the VMM answers.
    InUser,
    /// IN from the port of KVM's own speaker.
    InKernel,
    /// OUT to a port that is an ioeventfd.
    OutEventfd,
    /// HLT that sleeps in KVM until an interrupt, which the VMM sends now and then.
    HltKernel,
    /// HLT without an interrupt controller in KVM, so that the VMM gets it.
    HltUser,
    /// RDMSR of the microcode's update level.
    Rdmsr,
    /// WRMSR of the microcode's update level.
    Wrmsr,
    /// WRMSR of 0 to the TSC deadline, which KVM does in its fastpath; nothing is armed.
    WrmsrFast,
    /// MOV to CR0 that flips AM.
    CrWrite,
    /// VMCALL on VMX, VMMCALL on SVM.
    Hypercall,
    /// INVD.
    Invd,
    /// WBINVD.
    Wbinvd,
    /// Nothing: a loop that computes.
    Spin,
    /// A byte written to a page that was never touched.
    Touch,
    /// A byte read from a page that was never touched.
    Look,
    /// A call into a page that was never touched.
    Call,
    /// Three accesses to registers of a device that the VMM answers for: one written, two read.
    Device,
    /// UD2.
    Undefined,
    /// Instructions of more reasons than a ledger holds histograms in itself.
    Varied,
    /// DR7 written and DR6 read, with CPUID of leaf 0 after each.
    Debug,
    /// CPUID of a leaf and subleaf that the VMM chose, the answer handed back.
    Query,
}

/// CPU mode that a guest runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Real mode.
    Real,
    /// 64-bit mode at CPL 0.
    Long,
    /// 64-bit mode at CPL 3.
    User,
}

impl Program {
    /// Return true if the guest can run in a mode. At CPL 3 most of what exits would fault instead.
    /// In real mode, calls do not reach the pages to touch, and exceptions have no handler.
    pub fn runs_in(self, mode: Mode) -> bool {
        use Program::*;
        match mode {
            Mode::Real => !matches!(self, Call | Undefined | Varied),
            Mode::Long => true,
            Mode::User => matches!(
                self,
                Cpuid
                    | OutUser
                    | InUser
                    | InKernel
                    | OutEventfd
                    | Spin
                    | Touch
                    | Look
                    | Call
                    | Device
                    | Query
            ),
        }
    }
}

/// Number of exits that a guest causes, by reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    isa: Isa,
    mode: Mode,
    exact: BTreeMap<u32, u64>,
    /// Reasons of exits caused by the clock or by chance, any number of times.
    noise: Vec<u32>,
}

/// SVM's reasons for reads and writes of DR0 to DR7.
const DEBUG_REGISTERS: [u32; 16] = [
    0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37,
];

/// Return the number of a vCPU's own pages: its code, and in 64-bit mode the three tables that map
/// it.
fn own_pages(mode: Mode) -> u64 {
    match mode {
        Mode::Real => 1,
        Mode::Long | Mode::User => 4,
    }
}

impl Expected {
    /// Return the exits of `vcpus` vCPUs that each run `program` with `count`, under KVM with EPT
    /// or NPT and with unrestricted guests.
    pub fn of(isa: Isa, program: Program, mode: Mode, count: u32, vcpus: u8) -> Self {
        use Program::*;

        let (count, vcpus) = (u64::from(count), u64::from(vcpus));
        let io = [30, 0x7b];
        // Reasons of the instructions in the loop, on VMX and on SVM, and those of one of them.
        let looped: &[[u32; 2]] = match program {
            Cpuid | Query => &[[10, 0x72]],
            OutUser | InUser | InKernel | OutEventfd => &[io],
            HltKernel | HltUser => &[[12, 0x78]],
            Rdmsr => &[[31, 0x7c]],
            Wrmsr | WrmsrFast => &[[32, 0x7c]],
            CrWrite => &[[28, 0x65]],
            Hypercall => &[[18, 0x81]],
            Invd => &[[13, 0x76]],
            Wbinvd => &[[54, 0x89]],
            Device => &[[49, 0x400]; 3],
            Undefined => &[[0, 0x46]],
            Debug => &[[10, 0x72]; 2],
            Varied => &[
                [0, 0x46],
                [10, 0x72],
                [12, 0x78],
                [13, 0x76],
                [15, 0x6f],
                [18, 0x81],
                [28, 0x65],
                io,
                [31, 0x7c],
                [32, 0x7c],
                [54, 0x89],
            ],
            Spin | Touch | Look | Call => &[],
        };
        let own: &[u32] = match (program, isa) {
            (Varied, Isa::Vmx) => &[19, 20, 21, 22, 23, 24, 25, 26, 27, 50, 53],
            (Varied, Isa::Svm) => &[0x14, 0x18, 0x73, 0x7a, 0x80, 0x82, 0x83, 0x84, 0x85, 0x86],
            _ => &[],
        };
        // Each page of guest memory faults once, when it is first touched.
        let pages = own_pages(mode)
            + match program {
                Touch | Look => count,
                // One more for the stack.
                Call => count + 1,
                // One more table.
                Device if mode != Mode::Real => 1,
                Query => (count * 64).div_ceil(PAGE),
                _ => 0,
            };
        let pick = |reasons: [u32; 2]| match isa {
            Isa::Vmx => reasons[0],
            Isa::Svm => reasons[1],
        };

        let mut exact = BTreeMap::new();
        let mut add = |reasons, count: u64| {
            *exact.entry(pick(reasons)).or_insert(0) += count * vcpus;
        };
        for reasons in looped {
            add(*reasons, count);
        }
        for reason in own {
            add([*reason; 2], count);
        }
        if (program, isa) == (Varied, Isa::Svm) {
            // CPUID behind each access to a debug register.
            add([10, 0x72], DEBUG_REGISTERS.len() as u64 * count);
        }
        // The OUT that ends the guest.
        add(io, 1);

        // The host's interrupts, and the timer with which KVM ends a guest's time slice.
        let mut noise = match isa {
            Isa::Vmx => vec![1, 52],
            Isa::Svm => vec![0x60],
        };
        if vcpus == 1 && !matches!(program, HltKernel | Undefined | Varied) {
            add([48, 0x400], pages);
            if program == Device && isa == Isa::Vmx {
                // KVM does not know yet that a page is not memory when it is first touched.
                for (reason, change) in [(48, 2), (49, -2)] {
                    let exits = exact.entry(reason).or_insert(0);
                    *exits = exits.saturating_add_signed(change);
                }
            }
        } else {
            // Two vCPUs that fault at once race for KVM's tables, and the loser faults again. An
            // interrupt can come at any time: its delivery was seen to fault once more.
            noise.push(pick([48, 0x400]));
            if program == Device {
                noise.push(pick([49, 0x400]));
            }
        }
        if matches!(program, Debug | Varied) {
            // KVM stops intercepting, and lets the instruction begin again. An interrupt in between
            // makes it exit once more.
            match isa {
                Isa::Vmx => noise.push(29),
                Isa::Svm => noise.extend(DEBUG_REGISTERS),
            }
        }
        if program == HltKernel {
            // The interrupt that ends the HLT may come before it, and wait.
            noise.push(pick([7, 0x64]));
        }
        Self {
            isa,
            mode,
            exact,
            noise,
        }
    }

    /// Return the exact number of exits for each reason that is not noise; all others have 0.
    pub fn exact(&self) -> &BTreeMap<u32, u64> {
        &self.exact
    }

    /// Return the exits under KVM without nested paging. KVM then handles the guest's page tables,
    /// with exits that depend on more than the guest. On VMX there are no unrestricted guests
    /// either, so KVM emulates real mode with an unknown number of exits.
    pub fn without_nested_paging(mut self) -> Self {
        let (fault, paging): (u32, &[u32]) = match self.isa {
            // Exceptions, INVLPG.
            Isa::Vmx => (48, &[0, 14, 49]),
            // Accesses to CR0 and CR3, page faults, INVLPG.
            Isa::Svm => (0x400, &[0x00, 0x03, 0x10, 0x13, 0x4e, 0x65, 0x79]),
        };
        self.exact.remove(&fault);
        self.exact.retain(|reason, _| !paging.contains(reason));
        self.noise.extend(paging);
        if self.isa == Isa::Vmx {
            // MOV to CR0 and CR3.
            self.exact.remove(&28);
            self.noise.push(28);
            if self.mode == Mode::Real {
                self.noise.extend(self.exact.keys());
                self.exact.clear();
            }
        }
        self
    }

    /// Compare with the exits that were counted.
    ///
    /// # Errors
    ///
    /// Returns [`Differs`], which lists every reason whose number differs.
    pub fn check(&self, counted: &BTreeMap<u32, u64>) -> Result<(), Differs> {
        let keys = self.exact.keys().chain(counted.keys());
        let mut differences: Vec<_> = keys
            .filter(|reason| !self.noise.contains(reason))
            .map(|reason| {
                let number = |of: &BTreeMap<u32, u64>| of.get(reason).copied().unwrap_or(0);
                (*reason, number(&self.exact), number(counted))
            })
            .filter(|(_, expected, counted)| expected != counted)
            .collect();
        differences.sort_unstable();
        differences.dedup();
        if differences.is_empty() {
            Ok(())
        } else {
            Err(Differs {
                isa: self.isa,
                differences,
            })
        }
    }
}

/// Error when the counted exits differ from the known ones.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Differs {
    isa: Isa,
    /// Reason, expected and counted exits.
    differences: Vec<(u32, u64, u64)>,
}

impl fmt::Display for Differs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exits differ from those known:")?;
        for (reason, expected, counted) in &self.differences {
            let name = reasons::name(self.isa, *reason).unwrap_or("?");
            write!(
                f,
                " {reason} ({name}) expected {expected}, counted {counted};"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_vcpu_faults_as_often_as_it_touches_pages() {
        for (mode, pages) in [(Mode::Real, 1 + 300), (Mode::Long, 4 + 300)] {
            let expected = Expected::of(Isa::Svm, Program::Touch, mode, 300, 1);
            assert_eq!(
                expected.exact(),
                &BTreeMap::from([(0x7b, 1), (0x400, pages)])
            );
        }
    }

    #[test]
    fn only_noise_may_vary() {
        let expected = Expected::of(Isa::Vmx, Program::Cpuid, Mode::Long, 1000, 2);
        assert_eq!(expected.exact(), &BTreeMap::from([(10, 2000), (30, 2)]));
        let mut counted = expected.exact().clone();
        counted.insert(1, 77);
        counted.insert(48, 9);
        assert_eq!(expected.check(&counted), Ok(()));
        counted.insert(10, 1999);
        counted.insert(31, 1);
        counted.remove(&30);
        assert_eq!(
            expected.check(&counted).expect_err("differs").to_string(),
            "exits differ from those known: 10 (CPUID) expected 2000, counted 1999; \
             30 (IO_INSTRUCTION) expected 2, counted 0; 31 (MSR_READ) expected 0, counted 1;"
        );
    }
}
