// SPDX-License-Identifier: GPL-2.0

//! Machine code of the guests, and the offsets of their entry points.

use std::arch::global_asm;

use exitmeter_meter::reasons::Isa;

use crate::catalogue::{Mode, Program};

global_asm!(include_str!("guests.s"));

/// Declare the labels of guests.s, and the table from guest to label.
macro_rules! labels {
    ($($guest:pat => $real:ident $long:ident,)*) => {
        extern "C" {
            static tiny_code: u8;
            static tiny_code_end: u8;
            static tiny_interrupt_16: u8;
            static tiny_interrupt_64: u8;
            static tiny_resume_64: u8;
            static tiny_resume_error_64: u8;
            static tiny_moved_64: u8;
            static tiny_vmrun_64: u8;
            static tiny_inner_64: u8;
            $(static $real: u8; static $long: u8;)*
        }

        fn label(program: Program, isa: Isa, mode: Mode) -> *const u8 {
            match (program, isa) {
                $($guest => match mode {
                    Mode::Real => &raw const $real,
                    Mode::Long | Mode::User => &raw const $long,
                },)*
            }
        }
    };
}

labels! {
    (Program::Cpuid, _) => tiny_cpuid_16 tiny_cpuid_64,
    (Program::OutUser, _) => tiny_out_user_16 tiny_out_user_64,
    (Program::InUser, _) => tiny_in_user_16 tiny_in_user_64,
    (Program::InKernel, _) => tiny_in_kernel_16 tiny_in_kernel_64,
    (Program::OutEventfd, _) => tiny_out_eventfd_16 tiny_out_eventfd_64,
    (Program::HltKernel, _) => tiny_hlt_kernel_16 tiny_hlt_kernel_64,
    (Program::HltUser, _) => tiny_hlt_user_16 tiny_hlt_user_64,
    (Program::Rdmsr, _) => tiny_rdmsr_16 tiny_rdmsr_64,
    (Program::Wrmsr, _) => tiny_wrmsr_16 tiny_wrmsr_64,
    (Program::WrmsrFast, _) => tiny_wrmsr_fast_16 tiny_wrmsr_fast_64,
    (Program::CrWrite, _) => tiny_cr_write_16 tiny_cr_write_64,
    (Program::Hypercall, Isa::Vmx) => tiny_vmcall_16 tiny_vmcall_64,
    (Program::Hypercall, Isa::Svm) => tiny_vmmcall_16 tiny_vmmcall_64,
    (Program::Invd, _) => tiny_invd_16 tiny_invd_64,
    (Program::Wbinvd, _) => tiny_wbinvd_16 tiny_wbinvd_64,
    (Program::Spin, _) => tiny_spin_16 tiny_spin_64,
    (Program::Touch, _) => tiny_touch_16 tiny_touch_64,
    (Program::Look, _) => tiny_look_16 tiny_look_64,
    (Program::Call, _) => tiny_call_16 tiny_call_64,
    (Program::Device, _) => tiny_device_16 tiny_device_64,
    (Program::Undefined, _) => tiny_undefined_16 tiny_undefined_64,
    (Program::Varied, Isa::Vmx) => tiny_varied_vmx_16 tiny_varied_vmx_64,
    (Program::Varied, Isa::Svm) => tiny_varied_svm_16 tiny_varied_svm_64,
    (Program::Debug, _) => tiny_debug_16 tiny_debug_64,
    (Program::Query, _) => tiny_query_16 tiny_query_64,
}

/// Return the code of all guests. It runs at any address.
pub(crate) fn bytes() -> &'static [u8] {
    let (start, end) = (&raw const tiny_code, &raw const tiny_code_end);
    // SAFETY: Both labels are in one section, in this order, and nothing writes to it.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// Return the offset of a guest in [`bytes`].
pub(crate) fn entry(program: Program, isa: Isa, mode: Mode) -> u64 {
    offset(label(program, isa, mode))
}

/// Return the offset of the handler of the interrupt that ends a HLT.
pub(crate) fn interrupt_handler(mode: Mode) -> u64 {
    offset(match mode {
        Mode::Real => &raw const tiny_interrupt_16,
        Mode::Long | Mode::User => &raw const tiny_interrupt_64,
    })
}

/// Return the offset of the handler of exceptions without an error code.
pub(crate) fn exception_handler() -> u64 {
    offset(&raw const tiny_resume_64)
}

/// Return the offset of the handler of exceptions with an error code.
pub(crate) fn error_handler() -> u64 {
    offset(&raw const tiny_resume_error_64)
}

/// Return the offset of the guest that moves its own code.
pub(crate) fn moved() -> u64 {
    offset(&raw const tiny_moved_64)
}

/// Return the offset of the hypervisor that runs a guest once.
pub(crate) fn hypervisor() -> u64 {
    offset(&raw const tiny_vmrun_64)
}

/// Return the offset of the hypervisor's guest.
pub(crate) fn inner() -> u64 {
    offset(&raw const tiny_inner_64)
}

fn offset(label: *const u8) -> u64 {
    (label as usize - &raw const tiny_code as usize) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_one_page_and_entries_point_to_their_guests() {
        let code = bytes();
        assert!(!code.is_empty() && code.len() <= 4096);
        let at = |program, mode| &code[entry(program, Isa::Vmx, mode) as usize..];
        // Expect xor eax, eax; xor ecx, ecx; cpuid; dec edi: with operand prefixes in real mode.
        assert!(at(Program::Cpuid, Mode::Long)
            .starts_with(&[0x31, 0xc0, 0x31, 0xc9, 0x0f, 0xa2, 0xff, 0xcf]));
        assert!(at(Program::Cpuid, Mode::Real)
            .starts_with(&[0x66, 0x31, 0xc0, 0x66, 0x31, 0xc9, 0x0f, 0xa2, 0x66, 0x4f]));
        assert_eq!(at(Program::HltKernel, Mode::Real)[..3], [0xfb, 0xf4, 0xfa]);
        assert_eq!(code[interrupt_handler(Mode::Real) as usize], 0xcf);
        assert_eq!(
            code[interrupt_handler(Mode::Long) as usize..][..2],
            [0x48, 0xcf]
        );
        // Expect vmrun; then cpuid and vmmcall.
        assert!(code[hypervisor() as usize..].starts_with(&[0x0f, 0x01, 0xd8]));
        assert!(code[inner() as usize..].starts_with(&[0x0f, 0xa2, 0x0f, 0x01, 0xd9]));
    }
}
