// SPDX-License-Identifier: GPL-2.0

//! Guest-physical addresses of devices that have the same address in every PC.

use super::{apic, Range};

/// Return the name of the device's register at an address.
pub fn name(address: u64) -> Option<String> {
    let offset = address & 0xfff;
    match address & !0xfff {
        // `APIC_DEFAULT_PHYS_BASE`, arch/x86/include/asm/apicdef.h. Devices also write MSIs to it.
        0xfee0_0000 => named("APIC", u32::try_from(offset).ok().and_then(apic::name)),
        // `IO_APIC_DEFAULT_PHYS_BASE`, the same header; registers as in Intel's 82093AA data sheet,
        // and the EOI register of later ones (arch/x86/kernel/apic/io_apic.c, `struct io_apic`).
        0xfec0_0000 => {
            let register = match offset {
                0x00 => Some("IOREGSEL"),
                0x10 => Some("IOWIN"),
                0x40 => Some("EOI"),
                _ => None,
            };
            named("IOAPIC", register.map(str::to_owned))
        }
        // IA-PC HPET specification; registers as in arch/x86/include/asm/hpet.h.
        0xfed0_0000 if offset < 0x400 => named("HPET", hpet(offset)),
        _ => RANGES.iter().find_map(|range| range.name(address)),
    }
}

fn named(device: &str, register: Option<String>) -> Option<String> {
    Some(match register {
        Some(register) => format!("{device} {register}"),
        None => device.to_owned(),
    })
}

fn hpet(offset: u64) -> Option<String> {
    // An access to the high half of a register is an access to that register.
    let register = offset & !7;
    if let (Some(of_timers), true) = (register.checked_sub(0x100), register < 0x200) {
        let part = match of_timers % 0x20 {
            0x00 => "configuration",
            0x08 => "comparator",
            0x10 => "route",
            _ => return None,
        };
        return Some(format!("timer {} {part}", of_timers / 0x20));
    }
    let name = match register {
        0x000 => "capabilities",
        0x010 => "configuration",
        0x020 => "interrupt status",
        0x0f0 => "main counter",
        _ => return None,
    };
    Some(name.to_owned())
}

/// Other known addresses.
const RANGES: &[Range<u64>] = &[
    // `VGA_FB_PHYS_BASE`, include/video/vga.h; with the text modes', as all PCs have it.
    Range {
        first: 0xa_0000,
        last: 0xb_ffff,
        name: "VGA memory",
        parts: &[],
    },
    // TCG PC Client Platform TPM Profile; drivers/char/tpm/tpm_tis.c.
    Range {
        first: 0xfed4_0000,
        last: 0xfed4_4fff,
        name: "TPM",
        parts: &[],
    },
];
