// SPDX-License-Identifier: GPL-2.0

//! Selection of a VM and a reason.

use exitmeter_guest::defined;
use exitmeter_meter::reasons::{self, Isa};

use super::{model::Why, tables::TableSet};
use crate::names::{self, Candidate, NameBook, NoVm};

/// Reason why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No VM matches.
    #[error(transparent)]
    NoVm(#[from] NoVm),
    /// No reason matches.
    #[error(
        "no exit reason of {isa} is called '{reason}' or has that number: \
         'exitmeter reasons --isa {isa}' lists them"
    )]
    NoReason {
        /// Name or number that was asked for.
        reason: String,
        /// Vendor whose reasons were searched.
        isa: &'static str,
    },
    /// Symbols belong to one guest, but there are several.
    #[error("symbols are of one guest, and {0} VMs are shown: name the guest by --vm")]
    Symbols(usize),
}

/// Keep the VM with this name in the book, or the VMs of this process.
///
/// # Errors
///
/// Returns an error if no VM matches, or several do.
pub fn vm(table_set: &mut TableSet, vm: &str, names: &NameBook) -> Result<(), NoVm> {
    let life = table_set.host.life;
    let known = table_set
        .vms
        .iter()
        .map(|(&number, (name, pid))| Candidate {
            vm: number,
            kvm: name,
            pid: *pid,
            given: names.vm_of(life, number),
        });
    let selected = names::find(vm, known)?;
    table_set.vms.retain(|number, _| selected.contains(number));
    Ok(())
}

/// Keep the rows of one reason, given by its name or number.
///
/// # Errors
///
/// Returns an error if there is no such reason.
pub fn reason(why: &mut Why, reason: &str) -> Result<(), Error> {
    let code = code(why.host.isa, reason)?;
    for vm in &mut why.vms {
        for groups in [&mut vm.details, &mut vm.code, &mut vm.user_exits] {
            groups.retain(|group| group.label.code == Some(code));
        }
    }
    Ok(())
}

/// Return the code of a reason.
///
/// # Errors
///
/// Returns an error if there is no such reason.
pub fn code(isa: Isa, reason: &str) -> Result<u32, Error> {
    let number = match reason.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => reason.parse().ok(),
    };
    let called = |code: &u32| {
        reasons::name(isa, *code).is_some_and(|name| name.eq_ignore_ascii_case(reason))
    };
    let mut codes = defined(isa);
    codes
        .find(|code| number == Some(*code) || called(code))
        .ok_or_else(|| Error::NoReason {
            reason: reason.to_owned(),
            isa: isa.name(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_found_by_name_and_number() {
        let vmx = |reason| code(Isa::Vmx, reason).ok();
        assert_eq!(vmx("MSR_WRITE"), Some(32));
        assert_eq!(vmx("msr_write"), Some(32));
        assert_eq!([vmx("32"), vmx("0x20")], [Some(32), Some(32)]);
        assert_eq!([vmx("NPF"), vmx("999"), vmx(""), vmx("0x")], [None; 4]);
        assert_eq!(code(Isa::Svm, "npf").ok(), Some(0x400));
    }
}
