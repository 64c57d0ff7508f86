// SPDX-License-Identifier: GPL-2.0

//! I/O ports of PCs and of the devices that VMMs give to guests.
//!
//! Each range has its source above it. "PC" is the PC AT, as in Linux's `standard_io_resources` of
//! arch/x86/kernel/setup.c and in the headers of its drivers.

use super::Range;

/// Return the name of a port.
pub fn name(port: u16) -> Option<String> {
    RANGES.iter().find_map(|range| range.name(port))
}

/// Registers of a serial port: include/uapi/linux/serial_reg.h, by offset.
const UART: &[&str] = &[
    "data",
    "interrupt enable",
    "interrupt identity",
    "line control",
    "modem control",
    "line status",
    "modem status",
    "scratch",
];

/// Registers of an ATA channel: include/linux/ata.h, `ATA_REG_...`.
const ATA: &[&str] = &[
    "data", "error", "sectors", "LBA low", "LBA mid", "LBA high", "device", "status",
];

/// Registers of ACPI's power management: ACPI specification, "Power Management Timer" and those
/// before it, as Intel's chipsets lay them out.
const ACPI: &[&str] = &[
    "PM1 status",
    "",
    "PM1 enable",
    "",
    "PM1 control",
    "",
    "",
    "",
    "PM timer",
];

const fn range(
    first: u16,
    last: u16,
    name: &'static str,
    parts: &'static [&'static str],
) -> Range<u16> {
    Range {
        first,
        last,
        name,
        parts,
    }
}

/// Ranges, sorted by their first port.
pub(super) const RANGES: &[Range<u16>] = &[
    // PC.
    range(0x00, 0x1f, "DMA 1", &[]),
    // arch/x86/include/asm/i8259.h.
    range(0x20, 0x21, "PIC 1", &["command", "mask"]),
    // include/linux/i8253.h.
    range(
        0x40,
        0x43,
        "PIT",
        &["channel 0", "channel 1", "channel 2", "mode"],
    ),
    // PC.
    range(0x50, 0x53, "timer 1", &[]),
    // drivers/input/serio/i8042-acpipnpio.h; port 0x61: the speaker of arch/x86/kvm/i8254.h.
    range(0x60, 0x60, "keyboard data", &[]),
    range(0x61, 0x61, "speaker and PIT gate", &[]),
    range(0x64, 0x64, "keyboard command", &[]),
    // arch/x86/include/asm/mc146818rtc.h, `RTC_PORT(x)`.
    range(0x70, 0x71, "RTC", &["index", "data"]),
    // PC; io_delay() also writes to 0x80 (arch/x86/kernel/io_delay.c).
    range(0x80, 0x80, "POST code, I/O delay", &[]),
    range(0x81, 0x8f, "DMA page", &[]),
    // PC: "System control port A" of the PS/2, with the fast A20 gate (arch/x86/boot/a20.c).
    range(0x92, 0x92, "port A, A20 gate", &[]),
    range(0xa0, 0xa1, "PIC 2", &["command", "mask"]),
    // Advanced Power Management's SMI command, as QEMU's firmware uses it: QEMU hw/isa/apm.c.
    range(0xb2, 0xb3, "SMI", &["command", "status"]),
    range(0xc0, 0xdf, "DMA 2", &[]),
    // QEMU hw/char/debugcon.c (isa-debugcon) and Bochs' port_e9_hack.
    range(0xe9, 0xe9, "debug console", &[]),
    // io_delay() with outb 0xed.
    range(0xed, 0xed, "I/O delay", &[]),
    // PC; QEMU's isa-debug-exit is often put at 0xf4.
    range(0xf0, 0xff, "FPU", &["", "", "", "", "or isa-debug-exit"]),
    // drivers/ata/pata_legacy.c, `legacy_port`.
    range(0x170, 0x177, "IDE 2", ATA),
    range(0x1f0, 0x1f7, "IDE 1", ATA),
    // PC.
    range(0x200, 0x207, "game port", &[]),
    // drivers/pnp/isapnp/core.c, `_PNPWRP`.
    range(0x279, 0x279, "PnP address", &[]),
    // arch/x86/include/asm/serial.h.
    range(0x2e8, 0x2ef, "COM4", UART),
    range(0x2f8, 0x2ff, "COM2", UART),
    range(0x376, 0x376, "IDE 2 control", &[]),
    // drivers/parport/parport_pc.c.
    range(0x378, 0x37a, "LPT1", &["data", "status", "control"]),
    // include/video/vga.h.
    range(0x3b0, 0x3bb, "VGA (mono)", &[]),
    range(
        0x3c0,
        0x3cf,
        "VGA",
        &[
            "attribute",
            "attribute data",
            "misc",
            "",
            "sequencer index",
            "sequencer data",
            "palette mask",
            "palette read index",
            "palette write index",
            "palette data",
            "feature control",
            "",
            "misc",
            "",
            "graphics index",
            "graphics data",
        ],
    ),
    range(
        0x3d4,
        0x3da,
        "VGA",
        &["CRTC index", "CRTC data", "", "", "", "", "input status"],
    ),
    // arch/x86/include/asm/serial.h.
    range(0x3e8, 0x3ef, "COM3", UART),
    // include/uapi/linux/fdreg.h; 0x3f6 belongs to IDE.
    range(
        0x3f0,
        0x3f5,
        "floppy",
        &["", "", "control", "", "status", "data"],
    ),
    range(0x3f6, 0x3f6, "IDE 1 control", &[]),
    range(0x3f7, 0x3f7, "floppy", &[]),
    range(0x3f8, 0x3ff, "COM1", UART),
    // QEMU's isa-debugcon, at the port that SeaBIOS (`CONFIG_DEBUG_IO`) and OVMF write to.
    range(0x402, 0x402, "firmware debug console", &[]),
    // arch/x86/include/asm/pci-direct.h has 0xcf8; edge/level control: arch/x86/kvm/i8259.c.
    range(0x4d0, 0x4d1, "PIC edge or level", &[]),
    // QEMU docs/specs/fw_cfg.rst; drivers/firmware/qemu_fw_cfg.c.
    range(
        0x510,
        0x51b,
        "fw_cfg",
        &[
            "selector", "data", "", "", "DMA", "DMA", "DMA", "DMA", "DMA", "DMA", "DMA", "DMA",
        ],
    ),
    // ICH9's ACPI registers at 0x600, where QEMU's q35 firmware puts them, with the PM timer at 8
    // (QEMU hw/acpi/ich9.c; ACPI specification, "Power Management Timer"). cloud-hypervisor has
    // its PM timer at 0x608 as well.
    range(0x600, 0x60b, "ACPI", ACPI),
    range(0x620, 0x62f, "ACPI GPE", &[]),
    // PnP, as above.
    range(0xa79, 0xa79, "PnP write", &[]),
    // QEMU docs/specs/acpi_cpu_hotplug.rst, of q35.
    range(0xcd8, 0xce3, "ACPI CPU hotplug", &[]),
    // arch/x86/pci/direct.c. 0xcf9 is the reset control of Intel's chipsets
    // (arch/x86/kernel/reboot.c).
    range(0xcf8, 0xcf8, "PCI config address", &[]),
    range(0xcf9, 0xcf9, "reset control", &[]),
    range(0xcfa, 0xcfb, "PCI config address", &[]),
    range(0xcfc, 0xcff, "PCI config data", &[]),
    // VMware's backdoor: arch/x86/include/asm/vmware.h, `VMWARE_HYPERVISOR_PORT`, and `_HB`.
    range(0x5658, 0x5659, "VMware backdoor", &[]),
    // QEMU docs/specs/acpi_pci_hotplug.rst and acpi_cpu_hotplug.rst, of the PC with PIIX4.
    range(0xae00, 0xae17, "ACPI PCI hotplug", &[]),
    range(0xaf00, 0xaf0b, "ACPI CPU hotplug", &[]),
    // PIIX4's ACPI registers at 0xb000, by Bochs' and old SeaBIOS' firmware, with the PM timer at 8.
    range(0xb000, 0xb00b, "ACPI", ACPI),
];
