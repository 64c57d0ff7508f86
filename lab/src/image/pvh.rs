// SPDX-License-Identifier: GPL-2.0

//! Booting a kernel that lies in memory already, by its entry for PVH.
//!
//! Bochs loads files into memory before the machine starts, so that nothing has to be read by a boot loader that is
//! emulated itself. What is left to do is little: a ROM that the BIOS calls as it calls those of adapters asks the
//! BIOS for the memory map, enters protected mode, and jumps to the kernel with the address of [`Info`] in EBX
//! (Xen's "x86/HVM direct boot ABI", xen/include/public/arch-x86/hvm/start_info.h).

use std::arch::global_asm;
use std::slice;

/// Where the ROM goes: the BIOS looks for such ROMs between C8000h and E0000h.
pub const ROM_ADDRESS: u64 = 0xd_0000;

/// Where the information for kernel and ROM goes; just before a kernel that begins at 16 MiB, as they do.
pub const INFO_ADDRESS: u64 = 0xff_e000;

/// The longest command line, in bytes with its end (COMMAND_LINE_SIZE of x86).
const COMMAND_LINE: usize = 2048;

/// Where the ROM puts the memory map: above what the BIOS uses below 1 MiB.
const MAP_ADDRESS: u64 = 0x8000;

const MAGIC: u32 = 0x336e_c578;

const ROM_SIZE: usize = 512;

// Offsets within the information, for the ROM.
const ENTRIES: usize = 48;
const ENTRY_POINT: usize = 56;

global_asm!(
    ".section .rodata.exitmeter_pvh_rom, \"a\"",
    ".globl exitmeter_pvh_rom",
    ".code16",
    "exitmeter_pvh_rom:",
    "    .byte 0x55, 0xaa, {size} / 512",
    // The BIOS calls this place.
    "    cli",
    "    cld",
    // The memory map, one entry a call; the kernel wants the BIOS's entries with 4 bytes behind each.
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
    // A20, protected mode, flat segments.
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

/// The ROM, with the checksum that the BIOS wants.
pub fn rom() -> Vec<u8> {
    // SAFETY: the symbol is the assembly's above, of that size, and nobody writes to it.
    let mut rom =
        unsafe { slice::from_raw_parts((&raw const ROM).cast::<u8>(), ROM_SIZE) }.to_vec();
    let sum = rom.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
    if let Some(last) = rom.last_mut() {
        *last = last.wrapping_sub(sum);
    }
    rom
}

/// What the kernel is told at its start.
#[derive(Debug)]
pub struct Info<'a> {
    /// Where its entry is.
    pub entry: u32,
    /// Where the initramfs is, and its size.
    pub initramfs: (u64, u64),
    /// Its command line.
    pub command_line: &'a str,
}

impl Info<'_> {
    /// The bytes that belong to [`INFO_ADDRESS`]; none when the command line is too long.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        const MODULES: u64 = INFO_ADDRESS + 64;
        const TEXT: u64 = MODULES + 32;
        if self.command_line.len() >= COMMAND_LINE {
            return None;
        }
        let mut bytes = Vec::new();
        let mut put = |part: &[u8]| bytes.extend_from_slice(part);
        // struct hvm_start_info.
        put(&MAGIC.to_le_bytes());
        put(&1u32.to_le_bytes()); // version
        put(&0u32.to_le_bytes()); // flags
        put(&1u32.to_le_bytes()); // modules
        put(&MODULES.to_le_bytes());
        put(&TEXT.to_le_bytes());
        put(&0u64.to_le_bytes()); // ACPI's root: the kernel finds it as behind any BIOS
        put(&MAP_ADDRESS.to_le_bytes());
        put(&0u32.to_le_bytes()); // entries of the memory map: the ROM counts them
        put(&0u32.to_le_bytes());
        // For the ROM.
        put(&u64::from(self.entry).to_le_bytes());
        // struct hvm_modlist_entry.
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
    fn the_rom_is_one_to_a_bios() {
        let rom = rom();
        assert_eq!(rom.len(), ROM_SIZE);
        assert_eq!(rom[..3], [0x55, 0xaa, 1]);
        assert_eq!(rom.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)), 0);
    }

    #[test]
    fn the_rom_finds_in_the_information_what_it_wants() {
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
