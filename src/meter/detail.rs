// SPDX-License-Identifier: GPL-2.0

//! What an exit was about: the port, the MSR, the address, the vector.
//!
//! A detail is composed at each exit from what the CPU tells of it. On VMX that is the exit
//! qualification (SDM, "Basic VM-Exit Information"), the guest-physical address and the
//! interruption information; on SVM EXITINFO1 and EXITINFO2 (APM, "SVM Intercept Exit Codes").
//!
//! A detail has [`BITS`] bits at most, so that it fits into one word with the reason.

use super::reasons::Isa;

/// The bits of a detail.
pub const BITS: u32 = 55;

/// The highest number that a CPUID subleaf is told by: that one or a higher one.
pub const LAST_SUBLEAF: u32 = (1 << 23) - 1;

/// Of a nested page fault: the detail is an address, and not an access.
const IS_ADDRESS: u64 = 1 << (BITS - 1);
/// The bits of a guest-physical address.
const ADDRESS: u64 = (1 << 52) - 1;

/// A number that says what a detail is. The numbers are those of the snapshot.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// None: the exits of a reason that has no details.
    None = 0,
    /// A port: bits 0 to 15; bit 32 in, 33 string, 34 with a prefix REP, bits 36 to 38 bytes.
    Port = 1,
    /// An MSR: bits 0 to 31; bit 32 write.
    Msr = 2,
    /// A guest-physical address, of a device's register.
    Address = 3,
    /// Memory: bits 0 to 21 which GiB of it; bit 32 read, 33 write, 34 fetch.
    Memory = 4,
    /// A vector: bits 0 to 7; bits 8 to 10 its type (SDM, "Information for VM Exits Due to
    /// Vectored Events").
    Vector = 5,
    /// A CPUID leaf: bits 0 to 31; bits 32 to 54 its subleaf, where the leaf has some.
    Cpuid = 6,
    /// A hypercall: bits 0 to 31; bit 32 one of Hyper-V's.
    Hypercall = 7,
    /// A control register: bits 0 to 3; bits 4 and 5 the access (SDM, "Exit Qualification for
    /// Control-Register Accesses").
    Control = 8,
    /// A debug register: bits 0 to 2; bit 4 read.
    Debug = 9,
    /// An access to the APIC: bits 0 to 11 the offset; bits 12 to 15 its type (SDM, "Exit
    /// Qualification for APIC-Access VM Exits"), on SVM bit 12 write.
    ApicAccess = 10,
    /// A write to the virtual APIC: bits 0 to 11 the offset.
    ApicWrite = 11,
    /// An interrupt's end: bits 0 to 7 the vector.
    Eoi = 12,
}

/// What an exit can be asked for, each only where it is wanted.
pub trait Exit {
    /// Return VMX's exit qualification, or SVM's EXITINFO1.
    fn qualification(&self) -> u64;
    /// Return the guest-physical address: VMX's field, or SVM's EXITINFO2; `None` where it cannot be
    /// read.
    fn address(&self) -> Option<u64>;
    /// Return VMX's interruption information.
    fn interruption(&self) -> u32;
    /// Return the guest's RAX.
    fn rax(&self) -> u64;
    /// Return the guest's RCX.
    fn rcx(&self) -> u64;
    /// Return the code of the Hyper-V hypercall that this exit is; `None` where the guest's
    /// hypercalls are not Hyper-V's.
    fn hyperv_call(&self) -> Option<u16>;
}

/// Return the detail of an exit; `None` where its reason has none, or the CPU does not tell.
///
/// `code` is VMX's basic exit reason or SVM's exit code.
#[inline(always)]
pub fn of(isa: Isa, code: u32, exit: &impl Exit) -> Option<u64> {
    match isa {
        Isa::Vmx => of_vmx(code, exit),
        Isa::Svm => of_svm(code, exit),
    }
}

#[inline(always)]
fn of_vmx(reason: u32, exit: &impl Exit) -> Option<u64> {
    Some(match reason {
        32 => msr(exit.rcx(), true),
        31 => msr(exit.rcx(), false),
        49 => exit.address()? & ADDRESS,
        30 => {
            // Bits 0 to 2 size less 1, 3 in, 4 string, 5 REP, 16 to 31 port (SDM, "Exit
            // Qualification for I/O Instructions").
            let told = exit.qualification();
            let size = (told & 7).wrapping_add(1) & 7;
            (told >> 16 & 0xffff) | (told >> 3 & 7) << 32 | size << 36
        }
        1 | 0 => u64::from(exit.interruption() & 0x7ff),
        10 => cpuid(exit.rax() as u32, exit.rcx() as u32),
        48 => memory(exit.address()?, exit.qualification() & 7),
        18 => hypercall(exit),
        28 => exit.qualification() & 0x3f,
        29 => exit.qualification() & 0x17,
        44 => exit.qualification() & 0xffff,
        45 => exit.qualification() & 0xff,
        56 => exit.qualification() & 0xfff,
        // The immediate forms: the MSR is in the qualification (vmx_get_msr_imm_reg() and its
        // callers in vmx.c).
        84 => msr(exit.qualification(), false),
        85 => msr(exit.qualification(), true),
        _ => return None,
    })
}

#[inline(always)]
fn of_svm(code: u32, exit: &impl Exit) -> Option<u64> {
    /// Page fault error codes (`PFERR_*` in kvm_host.h): write, reserved bit, fetch.
    const WRITE: u64 = 1 << 1;
    const RESERVED: u64 = 1 << 3;
    const FETCH: u64 = 1 << 4;

    Some(match code {
        0x7c => msr(exit.rcx(), exit.qualification() != 0),
        0x400 => {
            let error = exit.qualification();
            if error & RESERVED != 0 {
                exit.address()? & ADDRESS | IS_ADDRESS
            } else {
                let (write, fetch) = (error & WRITE != 0, error & FETCH != 0);
                let read = u64::from(!write && !fetch);
                let access = read | u64::from(write) << 1 | u64::from(fetch) << 2;
                memory(exit.address()?, access)
            }
        }
        0x7b => {
            // `SVM_IOIO_*` in svm.h: bit 0 in, 2 string, 3 REP, 4 to 6 size, 16 to 31 port.
            let told = exit.qualification();
            (told >> 16 & 0xffff) | (told & 1) << 32 | (told >> 2 & 3) << 33 | (told >> 4 & 7) << 36
        }
        0x72 => cpuid(exit.rax() as u32, exit.rcx() as u32),
        0x81 => hypercall(exit),
        // `avic_unaccelerated_access_interception()`: bits 4 to 11 the offset, bit 32 write.
        0x402 => {
            let told = exit.qualification();
            told & 0xff0 | (told >> 32 & 1) << 12
        }
        _ => return None,
    })
}

#[inline(always)]
fn msr(number: u64, write: bool) -> u64 {
    number & 0xffff_ffff | u64::from(write) << 32
}

#[inline(always)]
fn memory(address: u64, access: u64) -> u64 {
    (address & ADDRESS) >> 30 | access << 32
}

#[inline(always)]
fn cpuid(leaf: u32, subleaf: u32) -> u64 {
    let subleaf = match has_subleaves(leaf) {
        true => subleaf.min(LAST_SUBLEAF),
        false => 0,
    };
    u64::from(leaf) | u64::from(subleaf) << 32
}

/// Return true if a CPUID leaf tells different things by ECX.
///
/// Those of which the SDM ("CPUID - CPU Identification") and the APM (volume 3, appendix E) say so,
/// and exitmeter's own.
#[inline(always)]
pub const fn has_subleaves(leaf: u32) -> bool {
    /// Of the leaves below 64, by bit.
    const BASIC: u64 = 1 << 0x04
        | 1 << 0x07
        | 1 << 0x0b
        | 1 << 0x0d
        | 1 << 0x0f
        | 1 << 0x10
        | 1 << 0x12
        | 1 << 0x14
        | 1 << 0x17
        | 1 << 0x18
        | 1 << 0x1a
        | 1 << 0x1b
        | 1 << 0x1d
        | 1 << 0x1e
        | 1 << 0x1f
        | 1 << 0x20
        | 1 << 0x23
        | 1 << 0x24;
    if leaf < 64 {
        return BASIC >> leaf & 1 != 0;
    }
    matches!(
        leaf,
        0x4fff_ff00..=0x4fff_ffff | 0x8000_001d | 0x8000_0020 | 0x8000_0026
    )
}

/// Return true if an exit is a hypercall, of which [`hypercall`] is the detail.
#[inline(always)]
pub const fn is_hypercall(isa: Isa, code: u32) -> bool {
    match isa {
        Isa::Vmx => code == 18,
        Isa::Svm => code == 0x81,
    }
}

/// Return the detail of a hypercall.
#[inline(always)]
pub fn hypercall(exit: &impl Exit) -> u64 {
    match exit.hyperv_call() {
        Some(code) => u64::from(code) | 1 << 32,
        None => exit.rax() & 0xffff_ffff,
    }
}

/// Return what a detail is, and the number that it is told by.
pub fn to_wire(isa: Isa, code: u32, detail: u64) -> (Kind, u64) {
    let kind = match (isa, code) {
        (Isa::Vmx, 30) | (Isa::Svm, 0x7b) => Kind::Port,
        (Isa::Vmx, 31 | 32 | 84 | 85) | (Isa::Svm, 0x7c) => Kind::Msr,
        (Isa::Vmx, 49) => Kind::Address,
        (Isa::Svm, 0x400) if detail & IS_ADDRESS != 0 => {
            return (Kind::Address, detail & ADDRESS);
        }
        (Isa::Vmx, 48) | (Isa::Svm, 0x400) => Kind::Memory,
        (Isa::Vmx, 0 | 1) => Kind::Vector,
        (Isa::Vmx, 10) | (Isa::Svm, 0x72) => Kind::Cpuid,
        (Isa::Vmx, 18) | (Isa::Svm, 0x81) => Kind::Hypercall,
        (Isa::Vmx, 28) => Kind::Control,
        (Isa::Vmx, 29) => Kind::Debug,
        (Isa::Vmx, 44) | (Isa::Svm, 0x402) => Kind::ApicAccess,
        (Isa::Vmx, 45) => Kind::Eoi,
        (Isa::Vmx, 56) => Kind::ApicWrite,
        _ => Kind::None,
    };
    (kind, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An exit that tells what it is given.
    #[derive(Default)]
    struct Told {
        qualification: u64,
        address: u64,
        interruption: u32,
        rax: u64,
        rcx: u64,
        hyperv: Option<u16>,
    }

    impl Exit for Told {
        fn qualification(&self) -> u64 {
            self.qualification
        }
        fn address(&self) -> Option<u64> {
            Some(self.address)
        }
        fn interruption(&self) -> u32 {
            self.interruption
        }
        fn rax(&self) -> u64 {
            self.rax
        }
        fn rcx(&self) -> u64 {
            self.rcx
        }
        fn hyperv_call(&self) -> Option<u16> {
            self.hyperv
        }
    }

    fn wire(isa: Isa, code: u32, told: Told) -> (Kind, u64) {
        to_wire(isa, code, of(isa, code, &told).expect("a detail"))
    }

    #[test]
    fn a_port_is_told_alike_on_both() {
        // IN AL from 0x3f8; REP OUTSW to 0x1f0.
        for (vmx, svm, key) in [
            (0x03f8_0008, 0x03f8_0011, 0x3f8 | 1 << 32 | 1 << 36),
            (0x01f0_0031, 0x01f0_002c, 0x1f0 | 3 << 33 | 2 << 36),
            (0x0cf8_0003, 0x0cf8_0040, 0xcf8 | 4 << 36),
        ] {
            for (isa, code, qualification) in [(Isa::Vmx, 30, vmx), (Isa::Svm, 0x7b, svm)] {
                let told = Told {
                    qualification,
                    ..Told::default()
                };
                assert_eq!(wire(isa, code, told), (Kind::Port, key), "{isa:?}");
            }
        }
    }

    #[test]
    fn an_msr_is_in_rcx_but_for_the_immediate_forms() {
        let told = |qualification, rcx| Told {
            qualification,
            rcx,
            ..Told::default()
        };
        let (read, write) = (0xc000_0080, 0xc000_0080 | 1 << 32);
        for (isa, code, told, key) in [
            (Isa::Vmx, 31, told(7, 0xffff_ffff_c000_0080), read),
            (Isa::Vmx, 32, told(7, 0xc000_0080), write),
            (Isa::Vmx, 84, told(0xc000_0080, 7), read),
            (Isa::Vmx, 85, told(0xc000_0080, 7), write),
            (Isa::Svm, 0x7c, told(0, 0xc000_0080), read),
            (Isa::Svm, 0x7c, told(1, 0xc000_0080), write),
        ] {
            assert_eq!(wire(isa, code, told), (Kind::Msr, key), "{isa:?} {code}");
        }
    }

    #[test]
    fn a_device_is_told_by_its_address_and_memory_by_its_gib() {
        let told = |qualification, address| Told {
            qualification,
            address,
            ..Told::default()
        };
        let address = 0xfee0_0300;
        for (isa, code, told, expected) in [
            (Isa::Vmx, 49, told(0, address), (Kind::Address, address)),
            (
                Isa::Svm,
                0x400,
                told(0xd, address),
                (Kind::Address, address),
            ),
            (Isa::Svm, 0x400, told(0xd, 0), (Kind::Address, 0)),
            (
                Isa::Vmx,
                48,
                told(0x182, address),
                (Kind::Memory, 3 | 1 << 33),
            ),
            (
                Isa::Vmx,
                48,
                told(1, 1 << 40),
                (Kind::Memory, 1 << 10 | 1 << 32),
            ),
            (
                Isa::Svm,
                0x400,
                told(0x1_0000_0006, address),
                (Kind::Memory, 3 | 1 << 33),
            ),
            (
                Isa::Svm,
                0x400,
                told(4, 1 << 40),
                (Kind::Memory, 1 << 10 | 1 << 32),
            ),
            (Isa::Svm, 0x400, told(0x14, 5), (Kind::Memory, 1 << 34)),
        ] {
            assert_eq!(wire(isa, code, told), expected, "{isa:?} {code}");
        }
    }

    #[test]
    fn a_subleaf_is_told_of_leaves_that_have_some() {
        let told = |leaf, subleaf| Told {
            rax: leaf,
            rcx: subleaf,
            ..Told::default()
        };
        for (leaf, subleaf, key) in [
            (1, 9, 1),
            (0xd, 9, 0xd | 9 << 32),
            (0xffff_ffff_0000_000d, 0xffff_ffff, 0xd | 0x7f_ffff << 32),
            (0x4fff_fffc, 48, 0x4fff_fffc | 48 << 32),
            (0x4000_0000, 48, 0x4000_0000),
        ] {
            for (isa, code) in [(Isa::Vmx, 10), (Isa::Svm, 0x72)] {
                assert_eq!(wire(isa, code, told(leaf, subleaf)), (Kind::Cpuid, key));
            }
        }
    }

    #[test]
    fn a_hypercall_is_in_rax_unless_it_is_of_hyperv() {
        for (isa, code) in [(Isa::Vmx, 18), (Isa::Svm, 0x81)] {
            for (hyperv, key) in [(None, 5), (Some(0x5c), 0x5c | 1 << 32)] {
                let told = Told {
                    rax: 5,
                    hyperv,
                    ..Told::default()
                };
                assert_eq!(wire(isa, code, told), (Kind::Hypercall, key));
            }
        }
    }

    /// Nothing that a guest or the CPU tells makes a detail too large.
    #[test]
    fn every_detail_has_room_beside_its_reason() {
        let told = Told {
            qualification: u64::MAX,
            address: u64::MAX,
            interruption: u32::MAX,
            rax: u64::MAX,
            rcx: u64::MAX,
            hyperv: None,
        };
        let mut with_detail = 0;
        for (isa, code) in [Isa::Vmx, Isa::Svm]
            .map(|isa| (0..0x500).map(move |it| (isa, it)))
            .into_iter()
            .flatten()
        {
            let Some(detail) = of(isa, code, &told) else {
                continue;
            };
            assert!(detail < 1 << BITS, "{isa:?} {code:#x}: {detail:#x}");
            let (kind, key) = to_wire(isa, code, detail);
            assert_ne!(kind, Kind::None, "{isa:?} {code:#x}");
            assert!(kind != Kind::Address || key & IS_ADDRESS == 0);
            with_detail += 1;
        }
        assert_eq!(with_detail, 16 + 6);
    }
}
