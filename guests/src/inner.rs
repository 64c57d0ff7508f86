// SPDX-License-Identifier: GPL-2.0

//! A guest in the guest, on SVM. The outer guest is a hypervisor of a few bytes, which runs an
//! inner guest at CPL 3. The inner guest executes CPUID once. The VMM writes its VMCB.
//!
//! The hypervisor does not intercept CPUID, as Linux's would, so KVM itself answers. VMX leaves a
//! hypervisor no such choice (SDM, "Instructions That Cause VM Exits Unconditionally"): there KVM
//! hands it each CPUID (`nested_vmx_l1_wants_exit()`) that does not fault
//! (`nested_vmx_l0_wants_exit()`).

use exitmeter_meter::reasons::Isa;
use kvm_bindings::kvm_segment;

use crate::{
    catalogue::{Mode, Program},
    config::{Config, Error, Registers64, Result},
    interfere::set_msrs,
    machine::{host_isa, TinyVm},
    window::{Window, PAGE, RFLAGS},
};

/// MSR VM_HSAVE_PA, which a hypervisor must set before its first VMRUN.
const VM_HSAVE_PA: u32 = 0xc001_0117;
/// Bit of EFER that turns SVM on.
const EFER_SVME: u64 = 1 << 12;

// Offsets in the VMCB (APM Volume 2, "VMCB Layout").
const EXCEPTIONS: usize = 0x08;
const INSTRUCTIONS_1: usize = 0x0c;
const INSTRUCTIONS_2: usize = 0x10;
const ASID: usize = 0x58;
const EXIT_CODE: usize = 0x70;
const ES: usize = 0x400;
const CS: usize = 0x410;
const SS: usize = 0x420;
const DS: usize = 0x430;
const GDTR: usize = 0x460;
const IDTR: usize = 0x480;
const CPL: usize = 0x4cb;
const EFER: usize = 0x4d0;
const CR4: usize = 0x548;
const CR3: usize = 0x550;
const CR0: usize = 0x558;
const DR7: usize = 0x560;
const DR6: usize = 0x568;
const RFLAGS_PLACE: usize = 0x570;
const RIP: usize = 0x578;
const RAX: usize = 0x5f8;

/// Bit for shutdown, in the first word of intercepted instructions.
const SHUTDOWN: u32 = 1 << 31;
/// Bits for VMRUN, which SVM requires, and VMMCALL, in the second word.
const VMRUN_AND_VMMCALL: u32 = 0b11;

/// State of the inner guest after it has run, as the hypervisor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Exit {
    /// Exit code.
    pub exit: u64,
    /// Bytes of code that it has executed: 0 at CPUID, 2 at the VMMCALL after it.
    pub behind: u64,
    /// Registers.
    pub registers: Registers64,
}

impl TinyVm {
    /// Create a VM of one vCPU that is a hypervisor, with a guest that makes `query` at CPL 3. It
    /// intercepts the end of that guest, and the exceptions whose bits are set in `exceptions`.
    ///
    /// # Errors
    ///
    /// See [`TinyVm::new`]. Also returns [`Error::Settings`] on VMX.
    pub fn with_l2_guest(query: Registers64, exceptions: u32) -> Result<Self> {
        if host_isa() != Some(Isa::Svm) {
            return Err(Error::Settings(
                "only on SVM can a hypervisor leave its guest's CPUID to KVM".to_owned(),
            ));
        }
        let mut machine = Self::new(Config::new(Program::Cpuid, Mode::Long, 1))?;
        let window = Window::of(0);
        let vcpu = machine.first_vcpu();
        let mut sregs = vcpu
            .get_sregs()
            .map_err(|error| Error::Kvm("read a vCPU's registers", error))?;
        sregs.efer |= EFER_SVME;
        vcpu.set_sregs(&sregs)
            .map_err(|error| Error::Kvm("enable SVM for a vCPU", error))?;
        set_msrs(
            vcpu,
            &[(VM_HSAVE_PA, window.host_save_area())],
            "enable SVM for a vCPU",
        )?;
        vcpu.set_regs(&window.hypervisor(query))
            .map_err(|error| Error::Kvm("set a vCPU's registers", error))?;

        // Set the guest's own mode, on the hypervisor's tables.
        let user = Config::new(Program::Cpuid, Mode::User, 1);
        window.set_mode(&mut sregs, &user);
        sregs.efer |= EFER_SVME;
        let mut vmcb = Vmcb([0; PAGE as usize]);
        vmcb.put(EXCEPTIONS, exceptions.to_le_bytes());
        vmcb.put(INSTRUCTIONS_1, SHUTDOWN.to_le_bytes());
        vmcb.put(INSTRUCTIONS_2, VMRUN_AND_VMMCALL.to_le_bytes());
        vmcb.put(ASID, 1_u32.to_le_bytes());
        vmcb.put_segment(ES, &sregs.es);
        vmcb.put_segment(CS, &sregs.cs);
        vmcb.put_segment(SS, &sregs.ss);
        vmcb.put_segment(DS, &sregs.ds);
        for (place, table) in [(GDTR, &sregs.gdt), (IDTR, &sregs.idt)] {
            vmcb.put(place + 4, u32::from(table.limit).to_le_bytes());
            vmcb.put(place + 8, table.base.to_le_bytes());
        }
        vmcb.put(CPL, [sregs.cs.dpl]);
        let words = [
            (EFER, sregs.efer),
            (CR4, sregs.cr4),
            (CR3, sregs.cr3),
            (CR0, sregs.cr0),
            // The values after a reset.
            (DR7, 0x400),
            (DR6, 0xffff_0ff0),
            (RFLAGS_PLACE, RFLAGS),
            (RIP, window.inner()),
            (RAX, query.rax),
        ];
        for (place, word) in words {
            vmcb.put(place, word.to_le_bytes());
        }
        machine.memory_mut().write(window.vmcb(), &vmcb.0);
        Ok(machine)
    }

    /// Return the state of the guest of [`TinyVm::with_l2_guest`] after it has run.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Kvm`] if KVM refuses.
    pub fn inner(&mut self) -> Result<L2Exit> {
        let window = Window::of(0);
        // Of these registers, VMRUN and its end switch only RAX.
        let others = self.registers()?;
        let word = |place: usize| self.memory().read_u64(window.vmcb() + place as u64);
        Ok(L2Exit {
            exit: word(EXIT_CODE),
            behind: word(RIP).wrapping_sub(window.inner()),
            registers: Registers64 {
                rax: word(RAX),
                ..others
            },
        })
    }
}

/// VMCB that a hypervisor gives to VMRUN.
struct Vmcb([u8; PAGE as usize]);

impl Vmcb {
    fn put<const SIZE: usize>(&mut self, place: usize, bytes: [u8; SIZE]) {
        self.0[place..place + SIZE].copy_from_slice(&bytes);
    }

    fn put_segment(&mut self, place: usize, segment: &kvm_segment) {
        let kvm_segment {
            type_,
            s,
            dpl,
            present,
            avl,
            l,
            db,
            g,
            ..
        } = *segment;
        let attributes = [
            (type_, 0),
            (s, 4),
            (dpl, 5),
            (present, 7),
            (avl, 8),
            (l, 9),
            (db, 10),
            (g, 11),
        ]
        .into_iter()
        .fold(0, |all, (field, shift)| all | u16::from(field) << shift);
        self.put(place, segment.selector.to_le_bytes());
        self.put(place + 2, attributes.to_le_bytes());
        self.put(place + 4, segment.limit.to_le_bytes());
        self.put(place + 8, segment.base.to_le_bytes());
    }
}
