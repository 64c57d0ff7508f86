// SPDX-License-Identifier: GPL-2.0

//! Exit reasons of VMX and exit codes of SVM: their numbers, their names and their rows in a
//! ledger.
//!
//! The modules of the two vendors hold numbers and names, with their sources.

mod svm;
mod vmx;

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

/// Number of rows in a ledger.
pub const SLOTS: usize = 178;

/// The row of an exit reason in a ledger.
///
/// # Invariants
///
/// The number is below [`SLOTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// Number of codes, from 0, that have the row of their own number.
const DIRECT: u32 = 168;
/// SVM's second range of codes, which starts with the nested page fault: its first code and its
/// first row.
const SVM_HIGH: (u32, u32) = (0x400, DIRECT);
/// SVM's negative codes, up to -1: failed entries.
const SVM_FAILED: (u32, u32) = (-4_i32 as u32, DIRECT + SVM_RANGE);
/// Number of codes in each of these two ranges.
const SVM_RANGE: u32 = 4;

impl Slot {
    /// Time before a vCPU's first exit.
    pub const START: Slot = Slot(177);
    /// Exits whose code has no row of its own.
    pub const OTHER: Slot = Slot(176);

    /// Return the row's index, below [`SLOTS`].
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.0
    }

    /// Return the row at an index, or `None` from [`SLOTS`] on.
    #[inline]
    pub const fn from_index(index: usize) -> Option<Slot> {
        if index < SLOTS {
            // INVARIANT: Just checked.
            Some(Slot(index))
        } else {
            None
        }
    }

    /// Return every row.
    pub fn all() -> impl Iterator<Item = Slot> {
        (0..SLOTS).filter_map(Slot::from_index)
    }
}

/// Return the row that counts exits with `code`. Every code has one.
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

/// Return the row of a VMX exit reason as VMREAD returns it, with all bits, by one compare. Return
/// `None` when one compare is not enough: for a reason that no manual defines yet, or with a bit
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

/// Return the code that a row counts, or `None` for [`Slot::START`], [`Slot::OTHER`] and rows that
/// the ISA does not use.
pub const fn code(isa: Isa, slot: Slot) -> Option<u32> {
    let row = slot.0 as u32;
    match (isa, row) {
        (_, 0..DIRECT) => Some(row),
        (Isa::Svm, 168..=171) => Some(row.wrapping_sub(SVM_HIGH.1).wrapping_add(SVM_HIGH.0)),
        (Isa::Svm, 172..=175) => Some(row.wrapping_sub(SVM_FAILED.1).wrapping_add(SVM_FAILED.0)),
        _ => None,
    }
}

/// Return true if the vendor's manual defines exit reason `code`.
pub const fn is_defined(isa: Isa, code: u32) -> bool {
    match isa {
        Isa::Vmx => matches!(code, 0..=34 | 36 | 37 | 39..=41 | 43..=70 | 72..=79 | 84 | 85),
        Isa::Svm => matches!(code, 0..=0xa6 | 0x400..=0x403) || code >= SVM_FAILED.0,
    }
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
    if !is_defined(isa, code) {
        return None;
    }
    match isa {
        Isa::Vmx => vmx::NAMES.iter(),
        Isa::Svm => svm::NAMES.iter(),
    }
    .find(|(number, _)| *number == code)
    .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_defined_code_has_a_name_and_a_row_of_its_own() {
        for isa in [Isa::Vmx, Isa::Svm] {
            let mut seen = [false; SLOTS];
            for number in (0..0x500).chain(u32::MAX - 9..=u32::MAX) {
                assert_eq!(
                    is_defined(isa, number),
                    name(isa, number).is_some(),
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
        assert_eq!(defined_count(Isa::Svm), 175);
    }

    #[test]
    fn every_code_has_a_row_within_the_ledger() {
        for isa in [Isa::Vmx, Isa::Svm] {
            // Miri takes a thousand times as long.
            let many = if cfg!(miri) { 0x500 } else { 0x1_0000 };
            for number in (0..=many).chain(u32::MAX - many..=u32::MAX) {
                let row = slot(isa, number);
                assert!(row.index() < SLOTS && row != Slot::START);
                assert!(code(isa, row).is_none_or(|code| code == number));
            }
        }
    }

    #[test]
    fn one_compare_finds_the_row_unless_other_bits_are_set() {
        for number in 0..0x200_u32 {
            let usual = usual_vmx_slot(number.into());
            let row = slot(Isa::Vmx, number);
            assert_eq!(usual, (row != Slot::OTHER).then_some(row));
            // Set after a bus lock, in an enclave and after a failed entry (SDM, "Format of Exit
            // Reason").
            for bit in [26, 27, 31, 63] {
                assert_eq!(usual_vmx_slot(u64::from(number) | 1 << bit), None);
            }
        }
    }

    #[test]
    fn knows_undefined_reasons_and_names() {
        for number in [35, 38, 42, 71, 80, 83, 86, 0x8000_0030, u32::MAX] {
            assert!(!is_defined(Isa::Vmx, number));
        }
        assert_eq!(name(Isa::Vmx, 10), Some("CPUID"));
        assert_eq!(name(Isa::Svm, 0x72), Some("CPUID"));
        assert_eq!(name(Isa::Svm, u32::MAX), Some("INVALID"));
    }
}
