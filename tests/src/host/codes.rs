// SPDX-License-Identifier: GPL-2.0

//! Codes of the exit reasons that the cases look for, on this host's vendor.
//!
//! They are written down from the manuals. src/meter has them too, but is under test.

use anyhow::Result;

use super::by_vendor;

/// Return the code of CPUID.
pub fn cpuid() -> Result<u32> {
    by_vendor(10, 0x72)
}

/// Return the code of HLT.
pub fn hlt() -> Result<u32> {
    by_vendor(12, 0x78)
}

/// Return the code of hypercalls: VMCALL or VMMCALL.
pub fn hypercall() -> Result<u32> {
    by_vendor(18, 0x81)
}

/// Return the code of I/O instructions.
pub fn io() -> Result<u32> {
    by_vendor(30, 0x7b)
}

/// Return the code of RDMSR. SVM has one code for RDMSR and WRMSR.
pub fn rdmsr() -> Result<u32> {
    by_vendor(31, 0x7c)
}

/// Return the code of WRMSR. SVM has one code for RDMSR and WRMSR.
pub fn wrmsr() -> Result<u32> {
    by_vendor(32, 0x7c)
}

/// Return the code of EPT violations or nested page faults.
pub fn nested_page_fault() -> Result<u32> {
    by_vendor(48, 0x400)
}
