// SPDX-License-Identifier: GPL-2.0

//! Booting a kernel that is in memory already, by its PVH entry.
//!
//! Bochs loads files into memory before the machine starts, so no emulated boot loader has to read them. The rest is
//! done by a ROM, which the BIOS calls like the ROMs of adapters. It asks the BIOS for the memory map, enters protected
//! mode, and jumps to the kernel with the address of [`Info`] in EBX (Xen's "x86/HVM direct boot ABI",
//! xen/include/public/arch-x86/hvm/start_info.h).

use std::{arch::global_asm, slice};

/// Physical address of the ROM. The BIOS looks for such ROMs between C8000h and E0000h.
pub const ROM_ADDRESS: u64 = 0xd_0000;

/// Physical address of the information for kernel and ROM, just before the kernel, which begins at 16 MiB.
pub const INFO_ADDRESS: u64 = 0xff_e000;

/// Longest command line, in bytes with its NUL (COMMAND_LINE_SIZE of x86).
const COMMAND_LINE: usize = 2048;

/// Physical address of the memory map that the ROM writes, above the BIOS's data below 1 MiB.
const MAP_ADDRESS: u64 = 0x8000;

const MAGIC: u32 = 0x336e_c578;

const ROM_SIZE: usize = 512;

// Offsets in the information, for the ROM.
const ENTRIES: usize = 48;
const ENTRY_POINT: usize = 56;

global_asm!(
    ".section .rodata.exitmeter_pvh_rom, \"a\"",
    ".globl exitmeter_pvh_rom",
    ".code16",
    "exitmeter_pvh_rom:",
    "    .byte 0x55, 0xaa, {size} / 512",
    // The BIOS calls the ROM here.
    "    cli",
    "    cld",
    // Read the memory map, one entry per call. The kernel expects 4 bytes behind each of the BIOS's entries.
    "    xor %ebp, %ebp",
    "    mov %bp, %es",
    "    mov ${map}, %edi",
    "    xor %ebx, %ebx",
    "1:  mov $0xe820, %eax",
    "    mov $0x534d4150, %edx",
    "    mov $20, %ecx",
    "    int $0x15",
    "    jc 2f",
    "    movl $0, %es:20(%di)",
    "    add $24, %di",
    "    inc %ebp",
    "    test %ebx, %ebx",
    "    jnz 1b",
    // Enable A20, and enter protected mode with flat segments.
    "2:  in $0x92, %al",
    "    or $2, %al",
    "    out %al, $0x92",
    "    cli",
    "    lgdtl %cs:(gdtr - exitmeter_pvh_rom)",
    "    mov %cr0, %eax",
    "    or $1, %al",
    "    mov %eax, %cr0",
    "    ljmpl $8, $({rom} + 3f - exitmeter_pvh_rom)",
    ".code32",
    "3:  mov $16, %eax",
    "    mov %eax, %ds",
    "    mov %eax, %es",
    "    mov %eax, %ss",
    "    mov ${info}, %ebx",
    "    mov %ebp, {entries}(%ebx)",
    "    jmp *{entry_point}(%ebx)",
    ".balign 8",
    "gdt:",
    "    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff",
    "gdtr:",
    "    .word gdtr - gdt - 1",
    "    .long {rom} + gdt - exitmeter_pvh_rom",
    "    .org exitmeter_pvh_rom + {size}",
    ".code64",
    ".text",
    size = const ROM_SIZE,
    map = const MAP_ADDRESS,
    rom = const ROM_ADDRESS,
    info = const INFO_ADDRESS,
    entries = const ENTRIES,
    entry_point = const ENTRY_POINT,
    options(att_syntax),
);

extern "C" {
    #[link_name = "exitmeter_pvh_rom"]
    static ROM: [u8; ROM_SIZE];
}

/// Return the ROM with the checksum that the BIOS expects.
pub fn rom() -> Vec<u8> {
    // SAFETY: The assembly above defines the symbol with that size, and nobody writes to it.
    let mut rom =
        unsafe { slice::from_raw_parts((&raw const ROM).cast::<u8>(), ROM_SIZE) }.to_vec();
    let sum = rom.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
    if let Some(last) = rom.last_mut() {
        *last = last.wrapping_sub(sum);
    }
    rom
}

/// Boot information for the kernel.
#[derive(Debug)]
pub struct Info<'a> {
    /// Physical address of the kernel's PVH entry.
    pub entry: u32,
    /// Physical address and size of the initramfs, in bytes.
    pub initramfs: (u64, u64),
    /// The kernel's command line.
    pub command_line: &'a str,
}

impl Info<'_> {
    /// Encode the information for [`INFO_ADDRESS`]. Return `None` if the command line is too long.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        const MODULES: u64 = INFO_ADDRESS + 64;
        const TEXT: u64 = MODULES + 32;
        if self.command_line.len() >= COMMAND_LINE {
            return None;
        }
        let mut bytes = Vec::new();
        let mut put = |part: &[u8]| bytes.extend_from_slice(part);
        // This is struct hvm_start_info.
        put(&MAGIC.to_le_bytes());
        put(&1u32.to_le_bytes()); // version
        put(&0u32.to_le_bytes()); // flags
        put(&1u32.to_le_bytes()); // modules
        put(&MODULES.to_le_bytes());
        put(&TEXT.to_le_bytes());
        put(&0u64.to_le_bytes()); // ACPI's root: the kernel finds it as with any BIOS
        put(&MAP_ADDRESS.to_le_bytes());
        put(&0u32.to_le_bytes()); // entries of the memory map, which the ROM counts
        put(&0u32.to_le_bytes());
        // The ROM reads this field.
        put(&u64::from(self.entry).to_le_bytes());
        // This is struct hvm_modlist_entry.
        put(&self.initramfs.0.to_le_bytes());
        put(&self.initramfs.1.to_le_bytes());
        put(&0u64.to_le_bytes()); // its command line
        put(&0u64.to_le_bytes());
        put(self.command_line.as_bytes());
        put(&[0]);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bios_accepts_the_rom() {
        let rom = rom();
        assert_eq!(rom.len(), ROM_SIZE);
        assert_eq!(rom[..3], [0x55, 0xaa, 1]);
        assert_eq!(rom.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0);
    }

    #[test]
    fn the_information_has_the_fields_of_the_rom() {
        let info = Info {
            entry: 0x1234_5678,
            initramfs: (0x800_0000, 0x10),
            command_line: "quiet",
        };
        let bytes = info.bytes().unwrap();
        assert_eq!(
            bytes[ENTRY_POINT..ENTRY_POINT + 4],
            0x1234_5678u32.to_le_bytes()
        );
        assert_eq!(bytes[ENTRIES..ENTRIES + 4], [0; 4]);
        assert!(bytes.ends_with(b"quiet\0"));
    }

    #[test]
    fn a_command_line_that_linux_would_cut_is_refused() {
        let line = "x".repeat(COMMAND_LINE);
        let info = Info {
            entry: 0,
            initramfs: (0, 0),
            command_line: &line,
        };
        assert!(info.bytes().is_none());
    }
}
