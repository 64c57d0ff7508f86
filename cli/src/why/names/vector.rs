// SPDX-License-Identifier: GPL-2.0

//! Vectors: exceptions of the guest, and interrupts of the host.

use super::{find, Names};

/// Return the name of an exception: the mnemonic of the manuals, and its meaning.
pub fn exception(vector: u32) -> Option<&'static str> {
    find(EXCEPTIONS, vector)
}

/// Return the name of a host's interrupt. Vectors below those of the system are assigned to
/// devices, on each CPU separately, and only the kernel's debugging files list them.
pub fn host(vector: u32) -> Option<String> {
    match find(LINUX, vector) {
        Some(name) => Some(name.to_owned()),
        None if (FIRST_DEVICE..FIRST_SYSTEM).contains(&vector) => Some("a device".to_owned()),
        None => None,
    }
}

/// `FIRST_EXTERNAL_VECTOR`.
const FIRST_DEVICE: u32 = 0x20;
/// `FIRST_SYSTEM_VECTOR`, with the local APIC.
const FIRST_SYSTEM: u32 = 0xeb;

/// From Linux 7.3, arch/x86/include/asm/trapnr.h.
pub(super) const EXCEPTIONS: Names = &[
    (0, "#DE divide error"),
    (1, "#DB debug"),
    (2, "NMI"),
    (3, "#BP breakpoint"),
    (4, "#OF overflow"),
    (5, "#BR bound range"),
    (6, "#UD invalid opcode"),
    (7, "#NM device not available"),
    (8, "#DF double fault"),
    (9, "coprocessor segment overrun"),
    (10, "#TS invalid TSS"),
    (11, "#NP segment not present"),
    (12, "#SS stack segment"),
    (13, "#GP general protection"),
    (14, "#PF page fault"),
    (15, "spurious interrupt"),
    (16, "#MF x87"),
    (17, "#AC alignment check"),
    (18, "#MC machine check"),
    (19, "#XM SIMD"),
    (20, "#VE virtualization"),
    (21, "#CP control protection"),
    (29, "#VC VMM communication"),
    (30, "#SX security"),
];

/// The host's own vectors, with the line of /proc/interrupts that counts them. From Linux 7.3,
/// arch/x86/include/asm/irq_vectors.h and `irq_stat_info` of arch/x86/kernel/irq.c. Linux 7.2 has
/// the same numbers.
pub(super) const LINUX: Names = &[
    (0x80, "int 0x80"),
    (0xeb, "posted MSI (PMN)"),
    (0xec, "local timer (LOC)"),
    (0xed, "Hyper-V timer (HVS)"),
    (0xee, "Hyper-V reenlightenment (HRE)"),
    (0xef, "managed IRQ shutdown"),
    (0xf0, "nested posted interrupt (NPI)"),
    (0xf1, "posted interrupt wakeup (PIW)"),
    (0xf2, "posted interrupt (PIN)"),
    (0xf3, "hypervisor callback (HYP)"),
    (0xf4, "deferred error (DFR)"),
    (0xf5, "guest's PMI (VPMI)"),
    (0xf6, "IRQ work (IWI)"),
    (0xf7, "platform (PLT)"),
    (0xf8, "reboot"),
    (0xf9, "machine check threshold (THR)"),
    (0xfa, "thermal (TRM)"),
    (0xfb, "function call, single (CAL)"),
    (0xfc, "function call (CAL)"),
    (0xfd, "reschedule (RES)"),
    (0xfe, "APIC error (ERR)"),
    (0xff, "spurious (SPU)"),
];
