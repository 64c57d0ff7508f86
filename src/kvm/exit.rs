// SPDX-License-Identifier: GPL-2.0

//! Readers of an exit that a vCPU has just taken: by VMREAD, or by KVM's own reader.

use core::{
    arch::asm,
    mem::MaybeUninit, //
};

use crate::{
    bindings,
    kvm::vcpu::Vcpu,
    meter::{
        detail::{
            source,
            Exit,
            Register, //
        },
        reasons::{
            self,
            Isa,
            Slot, //
        },
    },
};

/// Field of the VMCS that holds the exit reason (SDM, "Field Encoding in VMCS": 32-bit read-only data
/// fields).
const VMCS_EXIT_REASON: u64 = 0x4402;
/// Field of the VMCS that holds the guest's RIP (natural-width guest-state fields).
const VMCS_GUEST_RIP: u64 = 0x681e;

/// An exit that a callback handles. Its parts are read only when they are needed.
pub(crate) trait Event: Exit + Copy {
    /// True if the host may not know the guest's RIP.
    const HIDES_RIP: bool;
    /// Return the exit's code.
    fn code(&self) -> u32;
    /// Return the slot of the exit's code, if that takes few instructions.
    #[inline(always)]
    fn usual_slot(&self, isa: Isa) -> Option<Slot> {
        Some(reasons::slot(isa, self.code()))
    }
    /// Return the guest's RIP, or `None` if its registers are encrypted or the host cannot know it.
    fn rip(&self) -> Option<u64>;
    /// Return the guest's RIP, or any number if the host does not know it. No exit is recorded with such a
    /// number.
    fn likely_rip(&self) -> u64;
}

/// Read a field of the VMCS that this CPU has loaded. Returns the field's own number if VMREAD fails, as
/// without a current VMCS, or faults, as with VMX off.
#[inline(always)]
fn vmread(field: u64) -> u64 {
    let mut value = field;
    // SAFETY: VMREAD touches nothing but the operand and the flags. KVM fires the tracepoint with the
    // vCPU's VMCS loaded. After a fault the kernel continues behind the instruction, by an entry in the
    // exception table (asm/asm.h, _ASM_EXTABLE_TYPE: where it may fault, where to go on, EX_TYPE_DEFAULT).
    unsafe {
        asm!(
            "2: vmread {0}, {0}",
            "3:",
            ".pushsection __ex_table, \"aM\", @progbits, 12",
            ".balign 4",
            ".long 2b - .",
            ".long 3b - .",
            ".long 1",
            ".popsection",
            inlateout(reg) value,
            options(nostack, nomem),
        )
    };
    value
}

/// An exit of VMX, read from the VMCS.
///
/// # Invariants
///
/// The vCPU is in a probe of kvm:kvm_exit.
#[derive(Clone, Copy)]
pub(crate) struct VmxExit<'a>(Vcpu<'a>);

impl<'a> VmxExit<'a> {
    /// Take the exit of a vCPU.
    ///
    /// # Safety
    ///
    /// Only a probe of kvm:kvm_exit may call this, for its vCPU.
    #[inline(always)]
    pub(crate) unsafe fn new(vcpu: Vcpu<'a>) -> Self {
        // INVARIANT: By the contract of this function.
        Self(vcpu)
    }
}

impl Exit for VmxExit<'_> {
    #[inline(always)]
    fn read(&self, source: i32) -> Option<u64> {
        Some(vmread(source as u64))
    }

    #[inline(always)]
    fn read_plain(&self, source: i32) -> Option<u64> {
        self.read(source)
    }

    #[inline(always)]
    fn register(&self, register: Register) -> u64 {
        self.0.wide_register(register)
    }

    #[inline(always)]
    fn hyperv_call(&self) -> Option<u16> {
        self.0.hyperv_call()
    }
}

impl Event for VmxExit<'_> {
    const HIDES_RIP: bool = false;

    #[inline(always)]
    fn code(&self) -> u32 {
        // The low half is the basic exit reason; the bits above are for failed entries, SMM and so on. No
        // basic exit reason is as large as the field's number, so an exit with that number is counted as
        // "other".
        vmread(VMCS_EXIT_REASON) as u32 & 0xffff
    }

    #[inline(always)]
    fn usual_slot(&self, _isa: Isa) -> Option<Slot> {
        reasons::usual_vmx_slot(vmread(VMCS_EXIT_REASON))
    }

    #[inline(always)]
    fn rip(&self) -> Option<u64> {
        Some(self.likely_rip())
    }

    #[inline(always)]
    fn likely_rip(&self) -> u64 {
        vmread(VMCS_GUEST_RIP)
    }
}

/// An exit that KVM's own reader has read, on SVM or from an enlightened VMCS.
#[derive(Clone, Copy)]
pub(crate) struct ExitByKvm<'a, const SVM: bool> {
    vcpu: Vcpu<'a>,
    info: &'a bindings::exitmeter_exit_info,
}

impl<'a, const SVM: bool> ExitByKvm<'a, SVM> {
    /// Read the exit of a vCPU into `room`.
    ///
    /// # Safety
    ///
    /// Only a probe of kvm:kvm_exit may call this, for its vCPU.
    #[inline(always)]
    pub(crate) unsafe fn read(
        vcpu: Vcpu<'a>,
        room: &'a mut MaybeUninit<bindings::exitmeter_exit_info>,
    ) -> Self {
        // SAFETY: By the contract of this function; the shim writes all of it.
        let info = unsafe {
            bindings::exitmeter_read_exit(vcpu.as_raw(), room.as_mut_ptr());
            room.assume_init_ref()
        };
        Self { vcpu, info }
    }
}

impl<const SVM: bool> Event for ExitByKvm<'_, SVM> {
    const HIDES_RIP: bool = true;

    #[inline(always)]
    fn code(&self) -> u32 {
        match SVM {
            true => self.info.code,
            // The low half is the basic exit reason, as in any VMCS.
            false => self.info.code & 0xffff,
        }
    }

    #[inline(always)]
    fn rip(&self) -> Option<u64> {
        match SVM {
            true => self.vcpu.rip(),
            // KVM has not read it yet.
            false => None,
        }
    }

    #[inline(always)]
    fn likely_rip(&self) -> u64 {
        self.vcpu.likely_rip()
    }
}

impl<const SVM: bool> Exit for ExitByKvm<'_, SVM> {
    #[inline(always)]
    fn read(&self, source: i32) -> Option<u64> {
        match source {
            source::QUALIFICATION => Some(self.info.info1),
            source::INTERRUPTION => Some(self.info.intr_info.into()),
            // The second number of VMX is the IDT-vectoring information (`vmx_get_exit_info()`).
            _ => SVM.then_some(self.info.info2),
        }
    }

    #[inline(always)]
    fn read_plain(&self, source: i32) -> Option<u64> {
        match SVM {
            // SVM's other one, EXITINFO2, is never a detail by itself.
            true => Some(self.info.info1),
            false => self.read(source),
        }
    }

    #[inline(always)]
    fn register(&self, register: Register) -> u64 {
        self.vcpu.wide_register(register)
    }

    #[inline(always)]
    fn hyperv_call(&self) -> Option<u16> {
        self.vcpu.hyperv_call()
    }
}
