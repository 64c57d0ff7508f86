// SPDX-License-Identifier: GPL-2.0

//! Exit reasons that KVM has a handler for. Only the tools use this.
//!
//! Source: `kvm_vmx_exit_handlers` in `vmx.c` and `svm_exit_handlers` in `svm.c` of Linux 7.3. An
//! exit without a handler ends KVM_RUN with an error, so its count stays 0.

use crate::reasons::Isa;

/// Return true if KVM of Linux 7.3 has a handler for exit reason `code`.
pub const fn is_handled(isa: Isa, code: u32) -> bool {
    match isa {
        Isa::Vmx => matches!(
            code,
            0..=2 | 7..=10 | 12..=15 | 18..=32 | 36 | 37 | 39..=41 | 43..=50 | 52..=62
                | 74..=77 | 84 | 85
        ),
        Isa::Svm => matches!(
            code,
            0x00 | 0x03 | 0x04 | 0x08 | 0x10 | 0x13 | 0x14 | 0x18 | 0x20..=0x27 | 0x30..=0x37
                | 0x41 | 0x43 | 0x46 | 0x4d | 0x4e | 0x51 | 0x52 | 0x60..=0x62 | 0x64 | 0x65
                | 0x6f | 0x72..=0x74 | 0x76..=0x7d | 0x7f..=0x8b | 0x8d..=0x90 | 0x94 | 0x98
                | 0xa2 | 0xa5 | 0xa6 | 0x400..=0x403
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reasons::{is_defined, name};

    #[test]
    fn every_handled_code_is_defined() {
        for isa in [Isa::Vmx, Isa::Svm] {
            for code in 0..0x1000 {
                assert!(is_defined(isa, code) || !is_handled(isa, code), "{code:#x}");
            }
        }
        assert_eq!(
            (0..99).filter(|code| is_handled(Isa::Vmx, *code)).count(),
            56
        );
        let first =
            (0..0x1000).find(|code| is_defined(Isa::Svm, *code) && !is_handled(Isa::Svm, *code));
        assert_eq!(
            first.and_then(|code| name(Isa::Svm, code)),
            Some("READ_CR1")
        );
    }
}
