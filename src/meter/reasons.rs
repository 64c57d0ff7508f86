// SPDX-License-Identifier: GPL-2.0

//! Exit reasons of VMX and exit codes of SVM: their codes, their names and their slots.
//!
//! The modules of the two vendors list them, with their sources.

mod svm;
mod vmx;

use super::clamp::clamp;

/// Vendor whose exit reasons the codes are.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Intel's VT-x.
    Vmx = 1,
    /// AMD's SVM.
    Svm = 2,
}

impl Isa {
    /// Return the vendor's name, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Vmx => "vmx",
            Isa::Svm => "svm",
        }
    }
}

/// Number of slots.
pub const SLOTS: usize = 178;

/// Index of an exit reason, for tables with one place for each. A ledger has fewer rows: a slot takes one
/// at its first exit.
///
/// # Invariants
///
/// The number is below [`SLOTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// Number of codes, from 0, that have the slot of their own number.
const DIRECT: u32 = 168;
/// SVM's second range of codes, which starts with the nested page fault: its first code and its
/// first slot.
const SVM_HIGH: (u32, u32) = (0x400, DIRECT);
/// SVM's negative codes, up to -1: failed entries.
const SVM_FAILED: (u32, u32) = (-4_i32 as u32, DIRECT + SVM_RANGE);
/// Number of codes in each of these two ranges.
const SVM_RANGE: u32 = 4;

impl Slot {
    /// Time before a vCPU's first exit.
    pub const START: Slot = Slot(177);
    /// Exits whose code has no slot of its own.
    pub const OTHER: Slot = Slot(176);

    /// Return the index, below [`SLOTS`].
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.0
    }

    /// Return the slot with an index, or `None` from [`SLOTS`] on.
    #[inline]
    pub const fn from_index(index: usize) -> Option<Slot> {
        if index < SLOTS {
            // INVARIANT: Just checked.
            Some(Slot(index))
        } else {
            None
        }
    }

    /// Return every slot.
    pub fn all() -> impl Iterator<Item = Slot> {
        (0..SLOTS).filter_map(Slot::from_index)
    }
}

/// Return the slot of exits with `code`. Every code has one.
#[inline(always)]
pub const fn slot(isa: Isa, code: u32) -> Slot {
    if code < DIRECT {
        // INVARIANT: DIRECT is below SLOTS.
        return Slot(code as usize);
    }
    match isa {
        Isa::Vmx => Slot::OTHER,
        Isa::Svm => svm_high_slot(code),
    }
}

/// Return the slot of a VMX exit reason as VMREAD returns it, with all bits, by one compare. Return
/// `None` if one compare is not enough: for a reason that no manual defines yet, or with a bit
/// set beside the basic reason, as after a failed entry, a bus lock or an exit from an enclave
/// (SDM, "Format of Exit Reason").
#[inline(always)]
pub const fn usual_vmx_slot(exit_reason: u64) -> Option<Slot> {
    match exit_reason < DIRECT as u64 {
        // INVARIANT: DIRECT is below SLOTS.
        true => Some(Slot(exit_reason as usize)),
        false => None,
    }
}

#[inline]
const fn svm_high_slot(code: u32) -> Slot {
    let high = code.wrapping_sub(SVM_HIGH.0);
    let failed = code.wrapping_sub(SVM_FAILED.0);
    if high < SVM_RANGE {
        // INVARIANT: At most 171.
        Slot(high.wrapping_add(SVM_HIGH.1) as usize)
    } else if failed < SVM_RANGE {
        // INVARIANT: At most 175.
        Slot(failed.wrapping_add(SVM_FAILED.1) as usize)
    } else {
        Slot::OTHER
    }
}

/// Return the code of a slot, or `None` for [`Slot::START`], [`Slot::OTHER`] and slots that the ISA
/// does not use.
pub const fn code(isa: Isa, slot: Slot) -> Option<u32> {
    let index = slot.0 as u32;
    match (isa, index) {
        (_, 0..DIRECT) => Some(index),
        (Isa::Svm, 168..=171) => Some(index.wrapping_sub(SVM_HIGH.1).wrapping_add(SVM_HIGH.0)),
        (Isa::Svm, 172..=175) => Some(index.wrapping_sub(SVM_FAILED.1).wrapping_add(SVM_FAILED.0)),
        _ => None,
    }
}

/// An exit reason that the vendor's manual defines.
struct Defined {
    code: u32,
    name: &'static str,
    /// True if KVM of Linux 7.3 has a handler for it: `kvm_vmx_exit_handlers` in `vmx.c` and
    /// `svm_exit_handlers` in `svm.c`. An exit without a handler ends KVM_RUN with an error, so its
    /// count stays 0.
    handled: bool,
}

/// Return an exit reason that KVM has a handler for.
const fn handled(code: u32, name: &'static str) -> Defined {
    Defined {
        code,
        name,
        handled: true,
    }
}

/// Return an exit reason that KVM has no handler for.
const fn unhandled(code: u32, name: &'static str) -> Defined {
    Defined {
        code,
        name,
        handled: false,
    }
}

/// Names of VMX's slots.
static VMX: Names = by_slot(Isa::Vmx, vmx::DEFINED);
/// Names of SVM's slots.
static SVM: Names = by_slot(Isa::Svm, svm::DEFINED);

/// Name of each slot, or `None` for slots without a defined code.
type Names = [Option<&'static str>; SLOTS];

/// Return the names of a vendor's codes in the order of their slots.
const fn by_slot(isa: Isa, codes: &[Defined]) -> Names {
    let mut slots: Names = [None; SLOTS];
    let mut next = 0;
    while next < codes.len() {
        let Defined { code, name, .. } = codes[next];
        let index = slot(isa, code).index();
        // PANIC: Only in the compiler, which evaluates this function: a defined code needs a slot of
        // its own.
        assert!(
            index != Slot::OTHER.index(),
            "the code has no slot of its own"
        );
        assert!(slots[index].is_none(), "the code is listed twice");
        slots[index] = Some(name);
        next += 1;
    }
    slots
}

/// Return true if the vendor's manual defines exit reason `code`.
#[inline]
pub fn is_defined(isa: Isa, code: u32) -> bool {
    name(isa, code).is_some()
}

/// Return true if KVM of Linux 7.3 has a handler for exit reason `code`. Only the tools use this.
pub fn is_handled(isa: Isa, code: u32) -> bool {
    let codes = match isa {
        Isa::Vmx => vmx::DEFINED,
        Isa::Svm => svm::DEFINED,
    };
    codes.iter().any(|it| it.code == code && it.handled)
}

/// Return the number of codes that the vendor's manual defines.
pub fn defined_count(isa: Isa) -> u32 {
    let mut count = 0_u32;
    for slot in Slot::all() {
        if code(isa, slot).is_some_and(|code| is_defined(isa, code)) {
            count = count.wrapping_add(1);
        }
    }
    count
}

/// Return the name of a defined code.
pub fn name(isa: Isa, code: u32) -> Option<&'static str> {
    let names = match isa {
        Isa::Vmx => &VMX,
        Isa::Svm => &SVM,
    };
    // Other codes have the slot OTHER, which has no name. A guest chooses the code, by CPUID.
    let index = clamp(slot(isa, code).index(), SLOTS);
    names.get(index).copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_listed_codes_are_defined_and_each_has_a_slot_of_its_own() {
        for (isa, codes) in [(Isa::Vmx, vmx::DEFINED), (Isa::Svm, svm::DEFINED)] {
            for number in (0..0x500).chain(u32::MAX - 9..=u32::MAX) {
                let listed = codes.iter().find(|it| it.code == number);
                assert_eq!(
                    name(isa, number),
                    listed.map(|it| it.name),
                    "{isa:?} {number:#x}"
                );
                assert_eq!(is_defined(isa, number), listed.is_some());
                assert_eq!(is_handled(isa, number), listed.is_some_and(|it| it.handled));
                if listed.is_some() {
                    assert_eq!(code(isa, slot(isa, number)), Some(number));
                }
            }
            assert_eq!(defined_count(isa) as usize, codes.len());
        }
    }

    #[test]
    fn every_code_has_a_slot() {
        for isa in [Isa::Vmx, Isa::Svm] {
            // Miri takes a thousand times as long.
            let many = if cfg!(miri) { 0x500 } else { 0x1_0000 };
            for number in (0..=many).chain(u32::MAX - many..=u32::MAX) {
                let slot = slot(isa, number);
                assert!(slot.index() < SLOTS && slot != Slot::START);
                assert!(code(isa, slot).is_none_or(|code| code == number));
            }
        }
    }

    #[test]
    fn one_compare_finds_the_slot_unless_other_bits_are_set() {
        for number in 0..0x200_u32 {
            let usual = usual_vmx_slot(number.into());
            let slot = slot(Isa::Vmx, number);
            assert_eq!(usual, (slot != Slot::OTHER).then_some(slot));
            // Set after a bus lock, in an enclave and after a failed entry (SDM, "Format of Exit
            // Reason").
            for bit in [26, 27, 31, 63] {
                assert_eq!(usual_vmx_slot(u64::from(number) | 1 << bit), None);
            }
        }
    }

    #[test]
    fn knows_undefined_and_unhandled_reasons_and_names() {
        for number in [35, 38, 42, 71, 80, 83, 0x8000_0030, u32::MAX] {
            assert!(!is_defined(Isa::Vmx, number));
        }
        assert_eq!(name(Isa::Vmx, 10), Some("CPUID"));
        assert_eq!(name(Isa::Svm, 0x72), Some("CPUID"));
        assert_eq!(name(Isa::Svm, u32::MAX), Some("INVALID"));
        assert!(is_handled(Isa::Vmx, 10) && !is_handled(Isa::Vmx, 11));
        assert!(is_handled(Isa::Svm, 0x72) && !is_handled(Isa::Svm, 0x75));
    }
}
