// SPDX-License-Identifier: GPL-2.0

//! Window of a vCPU: its 64 KiB of guest memory, and the registers that point into it.

use exitmeter_meter::reasons::Isa;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::{
    catalogue::{Mode, Program},
    code,
    config::{Config, Registers64},
    memory::Memory,
};

/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;

/// Size of a window, in bytes, and offsets in it.
pub(crate) const WINDOW: u64 = 0x1_0000;
const VECTORS: u64 = 0;
const CODE: u64 = 0x1000;
const STACK_END: u64 = 0x3000;
const IDT: u64 = 0x3000;
const GDT: u64 = 0x4000;
const PML4: u64 = 0x5000;
const PDPT: u64 = 0x6000;
const PD: u64 = 0x7000;
pub(crate) const QUERIES: u64 = 0x8000;

/// Address of the pages to touch, behind the windows.
pub(crate) const FRESH: u64 = 0x40_0000;

/// Address of a device's registers: in the fourth GiB, where no guest has memory.
pub const REGISTERS: u64 = 0xd000_0000;

/// Size of a query in guest memory, in bytes: four numbers in, four out.
pub(crate) const QUERY: u64 = 64;

/// Value that the VMM puts in the place of an answer.
pub const UNANSWERED: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// Line of the interrupt that ends a HLT, and its vector in the guest.
pub(crate) const IRQ: u32 = 5;
pub(crate) const VECTOR_BASE: u8 = 0x20;
const VECTOR: u64 = VECTOR_BASE as u64 + IRQ as u64;

/// Vectors of the exceptions of an undefined instruction, and of one that KVM does not allow.
const INVALID_OPCODE: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;

/// Entry of a page directory without its address: present, writable, for CPL 3 too, of 2 MiB.
const LARGE_PAGE: u64 = 0x87;

/// Selectors of code and data in 64-bit mode.
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;

/// Bits of control registers and of EFER.
const CR0_PE: u64 = 1 << 0;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bits of RFLAGS: bit 1 is always set; IOPL 3 lets CPL 3 use ports.
pub(crate) const RFLAGS: u64 = 1 << 1;
const RFLAGS_IOPL: u64 = 3 << 12;

/// Window of a vCPU, by its address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window(u64);

impl Window {
    /// Return the window of a vCPU.
    pub(crate) fn of(vcpu: u8) -> Self {
        Self(u64::from(vcpu) * WINDOW)
    }

    /// Write code, tables and queries.
    pub(crate) fn fill(self, memory: &mut Memory, config: &Config) {
        let Self(window) = self;
        let handler = CODE + code::interrupt_handler(config.mode);
        memory.write(window + CODE, code::bytes());
        match config.mode {
            Mode::Real => {
                let vector = (window >> 4) << 16 | handler;
                memory.write(
                    window + VECTORS + VECTOR * 4,
                    &(vector as u32).to_le_bytes(),
                );
            }
            Mode::Long | Mode::User => {
                for (vector, handler) in [
                    (VECTOR, handler),
                    (INVALID_OPCODE, CODE + code::exception_handler()),
                    (GENERAL_PROTECTION, CODE + code::error_handler()),
                ] {
                    let handler = window + handler;
                    // Interrupt gate: present, offset in three parts, selector.
                    let gate = handler & 0xffff
                        | u64::from(CODE_SELECTOR) << 16
                        | 0x8e00 << 32
                        | (handler >> 16 & 0xffff) << 48;
                    memory.write_u64(window + IDT + vector * 16, gate);
                }
                memory.write_u64(window + GDT + 8, 0x00af_9b00_0000_ffff);
                memory.write_u64(window + GDT + 16, 0x00cf_9300_0000_ffff);
                // Present, writable, for CPL 3 too; the last level in pages of 2 MiB.
                memory.write_u64(window + PML4, (window + PDPT) | 7);
                memory.write_u64(window + PDPT, (window + PD) | 7);
                for entry in 0..512 {
                    memory.write_u64(window + PD + entry * 8, entry << 21 | LARGE_PAGE);
                }
                if config.program == Program::Device {
                    // This guest makes no queries, so their page is the directory of the device's
                    // GiB.
                    let (directory, gib) = (window + QUERIES, REGISTERS >> 30);
                    memory.write_u64(window + PDPT + gib * 8, directory | 7);
                    for entry in 0..512 {
                        let page = gib << 30 | entry << 21;
                        memory.write_u64(directory + entry * 8, page | LARGE_PAGE);
                    }
                }
            }
        }
        for (number, query) in (0..).zip(&config.queries) {
            let at = window + QUERIES + number * QUERY;
            let words = [
                query.rax, query.rbx, query.rcx, query.rdx, UNANSWERED, UNANSWERED, UNANSWERED,
                UNANSWERED,
            ];
            for (place, word) in (0..).zip(words) {
                memory.write_u64(at + place * 8, word);
            }
        }
    }

    /// Set the registers that select the CPU mode.
    pub(crate) fn set_mode(self, sregs: &mut kvm_sregs, config: &Config) {
        match config.mode {
            Mode::Real => set_real_mode(sregs, self.0, config.program),
            Mode::Long => set_long_mode(sregs, self.0, 0),
            Mode::User => set_long_mode(sregs, self.0, 3),
        }
    }

    /// Return the registers at the start of the guest. `fresh` is the address of its pages to
    /// touch.
    pub(crate) fn registers(self, config: &Config, isa: Isa, fresh: u64) -> kvm_regs {
        let Self(window) = self;
        // Base that the CPU adds to the guest's addresses: in real mode that of the segment.
        let base = match config.mode {
            Mode::Real => window,
            Mode::Long | Mode::User => 0,
        };
        let operand = match config.program {
            Program::Touch | Program::Look | Program::Call => fresh,
            Program::Device => REGISTERS,
            _ => window + QUERIES,
        };
        kvm_regs {
            rip: window - base + CODE + code::entry(config.program, isa, config.mode),
            rsp: window - base + STACK_END,
            rdi: u64::from(config.loops()),
            rsi: operand - base,
            rflags: match config.mode {
                Mode::User => RFLAGS | RFLAGS_IOPL,
                Mode::Real | Mode::Long => RFLAGS,
            },
            ..Default::default()
        }
    }

    /// Return the registers at the start of the 64-bit guest that moves its own code to the pages
    /// to touch, and makes `query` there.
    pub(crate) fn moved(self, query: Registers64) -> kvm_regs {
        let Self(window) = self;
        kvm_regs {
            rip: window + CODE + code::moved(),
            // Map the first 2 MiB of addresses, which hold the windows, to the next 2 MiB.
            rsi: window + PD,
            rbx: FRESH | LARGE_PAGE,
            rax: query.rax,
            rcx: query.rcx,
            rdx: query.rdx,
            rflags: RFLAGS,
            ..Default::default()
        }
    }

    /// Return the registers at the start of a hypervisor that runs a guest of its own once. The
    /// guest gets `query` from it, except for RAX, which its VMCB holds.
    pub(crate) fn hypervisor(self, query: Registers64) -> kvm_regs {
        kvm_regs {
            rip: self.0 + CODE + code::hypervisor(),
            rax: self.vmcb(),
            rbx: query.rbx,
            rcx: query.rcx,
            rdx: query.rdx,
            rflags: RFLAGS,
            ..Default::default()
        }
    }

    /// Return the start of a hypervisor's guest.
    pub(crate) fn inner(self) -> u64 {
        self.0 + CODE + code::inner()
    }

    /// Return the page of a hypervisor's VMCB. It takes the place of queries, which a hypervisor
    /// does not have.
    pub(crate) fn vmcb(self) -> u64 {
        self.0 + QUERIES
    }

    /// Return the page where the CPU keeps a hypervisor's own state (VM_HSAVE_PA).
    pub(crate) fn host_save_area(self) -> u64 {
        self.vmcb() + PAGE
    }

    /// Return the page that holds the code, and the page that it is at after it has moved.
    pub(crate) fn code_pages(self) -> (u64, u64) {
        (self.0 + CODE, FRESH + self.0 + CODE)
    }

    /// Return the answers of the vCPU. In real mode the upper halves are not visible to the guest,
    /// and 0 here.
    pub(crate) fn answers(self, memory: &Memory, config: &Config) -> Vec<Registers64> {
        (0..config.queries.len() as u64)
            .map(|number| {
                let at = self.0 + QUERIES + number * QUERY + QUERY / 2;
                let word = |place: u64| {
                    let word = memory.read_u64(at + place * 8);
                    match config.mode {
                        Mode::Real => word & 0xffff_ffff,
                        Mode::Long | Mode::User => word,
                    }
                };
                Registers64 {
                    rax: word(0),
                    rbx: word(1),
                    rcx: word(2),
                    rdx: word(3),
                }
            })
            .collect()
    }
}

fn set_real_mode(sregs: &mut kvm_sregs, window: u64, program: Program) {
    let segment = |type_| kvm_segment {
        base: window,
        limit: 0xffff,
        selector: (window >> 4) as u16,
        type_,
        present: 1,
        s: 1,
        ..Default::default()
    };
    sregs.cs = segment(0xb);
    let mut data = segment(0x3);
    sregs.ss = data;
    if matches!(program, Program::Touch | Program::Look | Program::Device) {
        // Segments of 4 GiB, to reach beyond the first MiB.
        data.limit = 0xffff_ffff;
        data.g = 1;
    }
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
        *register = data;
    }
    sregs.idt.base = window + VECTORS;
    sregs.idt.limit = 0x3ff;
    // Not the reset value: that turns the caches off, and then KVM on SVM intercepts every access
    // to CR0.
    sregs.cr0 = CR0_NE;
}

fn set_long_mode(sregs: &mut kvm_sregs, window: u64, cpl: u8) {
    let segment = |selector: u16, type_, l| kvm_segment {
        limit: 0xffff_ffff,
        selector: selector | u16::from(cpl),
        type_,
        present: 1,
        dpl: cpl,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(CODE_SELECTOR, 0xb, 1);
    let data = segment(DATA_SELECTOR, 0x3, 0);
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.gdt.base = window + GDT;
    sregs.gdt.limit = 0x17;
    sregs.idt.base = window + IDT;
    sregs.idt.limit = 0xfff;
    sregs.cr0 = CR0_PE | CR0_NE | CR0_PG;
    sregs.cr3 = window + PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}
