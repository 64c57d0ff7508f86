// SPDX-License-Identifier: GPL-2.0

//! Exit reasons of VMX and exit codes of SVM: their numbers, names and places in a ledger.
//!
//! VMX: the basic exit reasons of the SDM, appendix "VMX Basic Exit Reasons"; names as in
//! the kernel's `arch/x86/include/uapi/asm/vmx.h` where it has one, after the SDM where it
//! does not. SVM: the codes of the APM, volume 2, appendix "SVM Intercept Exit Codes";
//! names as in `uapi/asm/svm.h`. What KVM handles: `kvm_vmx_exit_handlers` in `vmx.c` and
//! `svm_exit_handlers` in `svm.c` of Linux 7.3.

/// Whose numbers exit reasons are.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Intel's VT-x.
    Vmx = 1,
    /// AMD's SVM.
    Svm = 2,
}

impl Isa {
    /// The name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Vmx => "vmx",
            Isa::Svm => "svm",
        }
    }
}

/// How many rows a ledger has.
pub const SLOTS: usize = 176;

/// The row of an exit reason in a ledger.
///
/// # Invariants
///
/// The number is below [`SLOTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u8);

/// Codes below this one have the row of their own number.
const DIRECT: u32 = 168;
/// SVM's second range of codes (nested page fault and what follows it): first code, count.
const SVM_HIGH: (u32, u32) = (0x400, 4);

impl Slot {
    /// Time before a vCPU's first exit.
    pub const START: Slot = Slot(175);
    /// Exits whose code has no row of its own.
    pub const OTHER: Slot = Slot(174);
    /// SVM's -1: the entry failed.
    const SVM_INVALID: Slot = Slot(172);
    /// SVM's -2: the VMSA is busy.
    const SVM_BUSY: Slot = Slot(173);

    /// The row's place, below [`SLOTS`].
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The row at a place; `None` from [`SLOTS`] on.
    #[inline]
    pub const fn from_index(index: usize) -> Option<Slot> {
        if index < SLOTS {
            // INVARIANT: Just checked; below 256 as SLOTS is.
            Some(Slot(index as u8))
        } else {
            None
        }
    }

    /// Every row.
    pub fn all() -> impl Iterator<Item = Slot> {
        (0..SLOTS).filter_map(Slot::from_index)
    }
}

/// The row in which exits with a code are counted: total over all codes.
#[inline(always)]
pub const fn slot(isa: Isa, code: u32) -> Slot {
    if code < DIRECT {
        // INVARIANT: DIRECT is below SLOTS.
        return Slot(code as u8);
    }
    match isa {
        Isa::Vmx => Slot::OTHER,
        Isa::Svm => svm_high_slot(code),
    }
}

#[inline]
const fn svm_high_slot(code: u32) -> Slot {
    let above = code.wrapping_sub(SVM_HIGH.0);
    if above < SVM_HIGH.1 {
        // INVARIANT: At most 171.
        Slot((DIRECT as u8).wrapping_add(above as u8))
    } else if code == u32::MAX {
        Slot::SVM_INVALID
    } else if code == u32::MAX - 1 {
        Slot::SVM_BUSY
    } else {
        Slot::OTHER
    }
}

/// The code that a row counts; `None` for [`Slot::START`] and [`Slot::OTHER`], and for
/// rows that the ISA does not use.
pub const fn code(isa: Isa, slot: Slot) -> Option<u32> {
    let place = slot.0 as u32;
    match (isa, place) {
        (_, 0..DIRECT) => Some(place),
        (Isa::Svm, 168..=171) => Some(SVM_HIGH.0.wrapping_add(place.wrapping_sub(DIRECT))),
        (Isa::Svm, 172) => Some(u32::MAX),
        (Isa::Svm, 173) => Some(u32::MAX - 1),
        _ => None,
    }
}

/// Whether the vendor's manual defines the code.
pub const fn is_defined(isa: Isa, code: u32) -> bool {
    match isa {
        Isa::Vmx => matches!(code, 0..=34 | 36 | 37 | 39..=41 | 43..=70 | 72..=79 | 84 | 85),
        Isa::Svm => {
            matches!(code, 0..=0x8f | 0x90..=0x97 | 0xa2..=0xa6 | 0x400..=0x403)
                || code >= u32::MAX - 1
        }
    }
}

/// Whether KVM of Linux 7.3 has a handler for the code.
pub const fn is_handled(isa: Isa, code: u32) -> bool {
    match isa {
        Isa::Vmx => matches!(
            code,
            0..=2 | 7..=10 | 12..=15 | 18..=32 | 36 | 37 | 39..=41 | 43..=50 | 52..=62
                | 74..=77 | 84 | 85
        ),
        Isa::Svm => matches!(
            code,
            0x00 | 0x02..=0x04 | 0x08 | 0x10 | 0x13..=0x14 | 0x18 | 0x20..=0x2f | 0x41 | 0x43
                | 0x46 | 0x4a | 0x4c | 0x4e | 0x51 | 0x52 | 0x60..=0x66 | 0x6d..=0x7d | 0x80..=0x85
                | 0x88..=0x8f | 0x90..=0x97 | 0xa2 | 0xa5 | 0x400..=0x403
        ),
    }
}

/// How many codes the vendor's manual defines.
pub fn defined_count(isa: Isa) -> u32 {
    let mut count = 0_u32;
    for slot in Slot::all() {
        if code(isa, slot).is_some_and(|code| is_defined(isa, code)) {
            count = count.wrapping_add(1);
        }
    }
    count
}

/// The name of a defined code.
pub fn name(isa: Isa, code: u32) -> Option<&'static str> {
    if !is_defined(isa, code) {
        return None;
    }
    match isa {
        Isa::Vmx => VMX.iter(),
        Isa::Svm => SVM.iter(),
    }
    .find(|(number, _)| *number == code)
    .map(|(_, name)| *name)
}

/// Names of VMX's basic exit reasons.
const VMX: &[(u32, &str)] = &[
    (0, "EXCEPTION_NMI"),
    (1, "EXTERNAL_INTERRUPT"),
    (2, "TRIPLE_FAULT"),
    (3, "INIT_SIGNAL"),
    (4, "SIPI_SIGNAL"),
    (5, "IO_SMI"),
    (6, "OTHER_SMI"),
    (7, "INTERRUPT_WINDOW"),
    (8, "NMI_WINDOW"),
    (9, "TASK_SWITCH"),
    (10, "CPUID"),
    (11, "GETSEC"),
    (12, "HLT"),
    (13, "INVD"),
    (14, "INVLPG"),
    (15, "RDPMC"),
    (16, "RDTSC"),
    (17, "RSM"),
    (18, "VMCALL"),
    (19, "VMCLEAR"),
    (20, "VMLAUNCH"),
    (21, "VMPTRLD"),
    (22, "VMPTRST"),
    (23, "VMREAD"),
    (24, "VMRESUME"),
    (25, "VMWRITE"),
    (26, "VMOFF"),
    (27, "VMON"),
    (28, "CR_ACCESS"),
    (29, "DR_ACCESS"),
    (30, "IO_INSTRUCTION"),
    (31, "MSR_READ"),
    (32, "MSR_WRITE"),
    (33, "INVALID_STATE"),
    (34, "MSR_LOAD_FAIL"),
    (36, "MWAIT_INSTRUCTION"),
    (37, "MONITOR_TRAP_FLAG"),
    (39, "MONITOR_INSTRUCTION"),
    (40, "PAUSE_INSTRUCTION"),
    (41, "MCE_DURING_VMENTRY"),
    (43, "TPR_BELOW_THRESHOLD"),
    (44, "APIC_ACCESS"),
    (45, "EOI_INDUCED"),
    (46, "GDTR_IDTR"),
    (47, "LDTR_TR"),
    (48, "EPT_VIOLATION"),
    (49, "EPT_MISCONFIG"),
    (50, "INVEPT"),
    (51, "RDTSCP"),
    (52, "PREEMPTION_TIMER"),
    (53, "INVVPID"),
    (54, "WBINVD"),
    (55, "XSETBV"),
    (56, "APIC_WRITE"),
    (57, "RDRAND"),
    (58, "INVPCID"),
    (59, "VMFUNC"),
    (60, "ENCLS"),
    (61, "RDSEED"),
    (62, "PML_FULL"),
    (63, "XSAVES"),
    (64, "XRSTORS"),
    (65, "PCONFIG"),
    (66, "SPP_EVENT"),
    (67, "UMWAIT"),
    (68, "TPAUSE"),
    (69, "LOADIWKEY"),
    (70, "ENCLV"),
    (72, "ENQCMD_PASID_FAILURE"),
    (73, "ENQCMDS_PASID_FAILURE"),
    (74, "BUS_LOCK"),
    (75, "NOTIFY"),
    (76, "SEAMCALL"),
    (77, "TDCALL"),
    (78, "RDMSRLIST"),
    (79, "WRMSRLIST"),
    (84, "MSR_READ_IMM"),
    (85, "MSR_WRITE_IMM"),
];

/// Names of SVM's exit codes that have one in the kernel or stand for one event each.
/// The ranges of control registers, debug registers and exceptions follow in full.
const SVM: &[(u32, &str)] = &svm_names();

// Single registers come before the range they lie in.
#[allow(
    clippy::match_overlapping_arm,
    reason = "the first arm that fits is meant"
)]
const fn svm_names() -> [(u32, &'static str); SVM_SINGLE.len() + 96] {
    let mut names = [(0, ""); SVM_SINGLE.len() + 96];
    let mut at = 0;
    while at < SVM_SINGLE.len() {
        names[at] = SVM_SINGLE[at];
        at += 1;
    }
    let mut code = 0;
    while code < 96 {
        let name = match code {
            0x00 => "READ_CR0",
            0x03 => "READ_CR3",
            0x04 => "READ_CR4",
            0x08 => "READ_CR8",
            0x10 => "WRITE_CR0",
            0x13 => "WRITE_CR3",
            0x14 => "WRITE_CR4",
            0x18 => "WRITE_CR8",
            0x00..=0x0f => "READ_CR",
            0x10..=0x1f => "WRITE_CR",
            0x20..=0x2f => "READ_DR",
            0x30..=0x3f => "WRITE_DR",
            0x41 => "EXCP_DB",
            0x43 => "EXCP_BP",
            0x46 => "EXCP_UD",
            0x4a => "EXCP_TS",
            0x4b => "EXCP_NP",
            0x4c => "EXCP_SS",
            0x4d => "EXCP_GP",
            0x4e => "EXCP_PF",
            0x51 => "EXCP_AC",
            0x52 => "EXCP_MC",
            _ => "EXCP",
        };
        names[at] = (code, name);
        at += 1;
        code += 1;
    }
    names
}

const SVM_SINGLE: &[(u32, &str)] = &[
    (0x60, "INTR"),
    (0x61, "NMI"),
    (0x62, "SMI"),
    (0x63, "INIT"),
    (0x64, "VINTR"),
    (0x65, "CR0_SEL_WRITE"),
    (0x66, "READ_IDTR"),
    (0x67, "READ_GDTR"),
    (0x68, "READ_LDTR"),
    (0x69, "READ_TR"),
    (0x6a, "WRITE_IDTR"),
    (0x6b, "WRITE_GDTR"),
    (0x6c, "WRITE_LDTR"),
    (0x6d, "WRITE_TR"),
    (0x6e, "RDTSC"),
    (0x6f, "RDPMC"),
    (0x70, "PUSHF"),
    (0x71, "POPF"),
    (0x72, "CPUID"),
    (0x73, "RSM"),
    (0x74, "IRET"),
    (0x75, "SWINT"),
    (0x76, "INVD"),
    (0x77, "PAUSE"),
    (0x78, "HLT"),
    (0x79, "INVLPG"),
    (0x7a, "INVLPGA"),
    (0x7b, "IOIO"),
    (0x7c, "MSR"),
    (0x7d, "TASK_SWITCH"),
    (0x7e, "FERR_FREEZE"),
    (0x7f, "SHUTDOWN"),
    (0x80, "VMRUN"),
    (0x81, "VMMCALL"),
    (0x82, "VMLOAD"),
    (0x83, "VMSAVE"),
    (0x84, "STGI"),
    (0x85, "CLGI"),
    (0x86, "SKINIT"),
    (0x87, "RDTSCP"),
    (0x88, "ICEBP"),
    (0x89, "WBINVD"),
    (0x8a, "MONITOR"),
    (0x8b, "MWAIT"),
    (0x8c, "MWAIT_COND"),
    (0x8d, "XSETBV"),
    (0x8e, "RDPRU"),
    (0x8f, "EFER_WRITE_TRAP"),
    (0x90, "CR0_WRITE_TRAP"),
    (0x91, "CR1_WRITE_TRAP"),
    (0x92, "CR2_WRITE_TRAP"),
    (0x93, "CR3_WRITE_TRAP"),
    (0x94, "CR4_WRITE_TRAP"),
    (0x95, "CR5_WRITE_TRAP"),
    (0x96, "CR6_WRITE_TRAP"),
    (0x97, "CR7_WRITE_TRAP"),
    (0xa2, "INVPCID"),
    (0xa3, "MCOMMIT"),
    (0xa4, "TLBSYNC"),
    (0xa5, "BUS_LOCK"),
    (0xa6, "IDLE_HLT"),
    (0x400, "NPF"),
    (0x401, "AVIC_INCOMPLETE_IPI"),
    (0x402, "AVIC_UNACCELERATED_ACCESS"),
    (0x403, "VMGEXIT"),
    (u32::MAX - 1, "BUSY"),
    (u32::MAX, "INVALID"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_defined_code_has_a_name_and_a_row_of_its_own() {
        for isa in [Isa::Vmx, Isa::Svm] {
            let mut seen = [false; SLOTS];
            for number in (0..0x500).chain([u32::MAX - 1, u32::MAX]) {
                assert_eq!(
                    is_defined(isa, number),
                    name(isa, number).is_some(),
                    "{isa:?} {number:#x}"
                );
                assert!(
                    is_defined(isa, number) || !is_handled(isa, number),
                    "{isa:?} {number:#x}"
                );
                if is_defined(isa, number) {
                    let row = slot(isa, number);
                    assert_eq!(code(isa, row), Some(number));
                    assert!(!core::mem::replace(&mut seen[row.index()], true));
                }
            }
        }
        assert_eq!(defined_count(Isa::Vmx), 78);
    }

    #[test]
    fn the_rows_are_total_and_inside() {
        for isa in [Isa::Vmx, Isa::Svm] {
            for number in (0..=0x1_0000).chain(u32::MAX - 0x1_0000..=u32::MAX) {
                let row = slot(isa, number);
                assert!(row.index() < SLOTS && row != Slot::START);
                assert!(code(isa, row).is_none_or(|code| code == number));
            }
        }
    }

    #[test]
    fn undefined_reasons_of_the_course() {
        for number in [35, 38, 42, 71, 80, 83, 86, 0x8000_0030, u32::MAX] {
            assert!(!is_defined(Isa::Vmx, number));
        }
        assert_eq!(name(Isa::Vmx, 10), Some("CPUID"));
        assert_eq!(name(Isa::Svm, 0x72), Some("CPUID"));
    }
}
