// SPDX-License-Identifier: GPL-2.0

//! Registers of the local APIC, by their offset in its page.
//!
//! From Linux 7.3, arch/x86/include/asm/apicdef.h, without `APIC_`. Where Linux uses a short name
//! of its own, the name here is that of the manual: Intel's SDM, volume 3, chapter on the APIC,
//! table "Local APIC Register Address Map".

use super::{find, Names};

/// Return the name of the register at an offset.
pub fn name(offset: u32) -> Option<String> {
    let row = match offset & !0x7f {
        0x100 => Some("ISR"),
        0x180 => Some("TMR"),
        0x200 => Some("IRR"),
        _ => None,
    };
    match row {
        Some(row) if offset & 0xf == 0 => Some(format!("{row}{}", (offset & 0x7f) >> 4)),
        _ => find(NAMES, offset).map(str::to_owned),
    }
}

/// Return the name of a register in x2APIC mode, which has no ICR2 and no DFR.
pub fn x2apic(offset: u32) -> Option<String> {
    (![0x310, 0xe0].contains(&offset)).then(|| name(offset))?
}

pub(super) const NAMES: Names = &[
    (0x20, "ID"),
    (0x30, "version"),
    (0x80, "TPR"),
    (0x90, "APR"),
    (0xa0, "PPR"),
    (0xb0, "EOI"),
    (0xc0, "RRR"),
    (0xd0, "LDR"),
    (0xe0, "DFR"),
    (0xf0, "SVR"),
    (0x280, "ESR"),
    (0x2f0, "LVT CMCI"),
    (0x300, "ICR"),
    (0x310, "ICR2"),
    (0x320, "LVT timer"),
    (0x330, "LVT thermal"),
    (0x340, "LVT PMI"),
    (0x350, "LVT LINT0"),
    (0x360, "LVT LINT1"),
    (0x370, "LVT error"),
    (0x380, "initial count"),
    (0x390, "current count"),
    (0x3e0, "divide configuration"),
    (0x3f0, "self IPI"),
    (0x400, "EFEAT"),
    (0x410, "ECTRL"),
    (0x420, "SEOI"),
    (0x480, "IER"),
    (0x500, "EILVT0"),
    (0x510, "EILVT1"),
    (0x520, "EILVT2"),
    (0x530, "EILVT3"),
];
