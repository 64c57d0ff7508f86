// SPDX-License-Identifier: GPL-2.0

//! A vCPU of KVM, and its readers.

use kernel::{
    prelude::*,
    types::Opaque, //
};

use crate::{
    bindings,
    linux::task,
    meter::{
        detail::Register,
        leaves::Registers,
        phase::Phase,
        registry::{
            Newcomer,
            Owner, //
        },
        snapshot::NAME_SIZE, //
    },
};

/// Indices of the registers in `kvm_vcpu_arch.regs` (`enum kvm_reg`: x86's own numbering).
pub(crate) const RAX: usize = 0;
/// See [`RAX`].
pub(crate) const RCX: usize = 1;
/// See [`RAX`].
const RDX: usize = 2;
/// See [`RAX`].
const RBX: usize = 3;

/// Vector of a general protection fault.
const GP_VECTOR: u8 = 13;

/// A vCPU of KVM.
///
/// # Invariants
///
/// KVM keeps the vCPU for the time of `'a`. The current thread holds it, that is, runs, creates or destroys
/// it, unless the value was made by [`Vcpu::from_key`].
#[derive(Clone, Copy)]
pub(crate) struct Vcpu<'a>(&'a Opaque<bindings::kvm_vcpu>);

impl Vcpu<'_> {
    /// Wrap KVM's pointer to a vCPU.
    ///
    /// # Safety
    ///
    /// KVM must keep the vCPU for the time of `'a`, and the current thread must run, create or destroy it.
    #[inline(always)]
    pub(crate) unsafe fn from_raw(vcpu: *mut bindings::kvm_vcpu) -> Self {
        // SAFETY: By the contract of this function; `Opaque` is transparent.
        Self(unsafe { &*vcpu.cast() })
    }

    /// Return KVM's pointer to the vCPU.
    #[inline(always)]
    pub(crate) fn as_raw(&self) -> *mut bindings::kvm_vcpu {
        self.0.get()
    }

    /// Return the vCPU's address, which no other living vCPU has. It is never 0.
    #[inline(always)]
    pub(crate) fn key(&self) -> usize {
        self.0.get() as usize
    }

    /// Return the vCPU that has a key.
    ///
    /// # Safety
    ///
    /// The key must be that of a vCPU that KVM keeps for the time of `'a`. Unless the current thread holds
    /// the vCPU, the caller may call only [`Self::key`], [`Self::cpu`] and [`Self::polled`].
    #[inline(always)]
    pub(crate) unsafe fn from_key(key: usize) -> Self {
        // SAFETY: By the contract of this function; `Opaque` is transparent.
        Self(unsafe { &*(key as *const Opaque<bindings::kvm_vcpu>) })
    }

    /// Return the CPU that the vCPU was loaded on last, or `None` if it has never been on one. A
    /// trust domain's vCPU returns to `None` when its CPU goes offline or its VM ends.
    pub(crate) fn cpu(&self) -> Option<u32> {
        let vcpu = self.0.get();
        // SAFETY: The vCPU lives; every writer of the field writes it whole.
        let cpu = unsafe { (&raw const (*vcpu).cpu).read_volatile() };
        u32::try_from(cpu).ok()
    }

    /// Return the CPU that the vCPU is loaded on.
    #[inline(always)]
    pub(crate) fn cpu_loaded(&self) -> u32 {
        // SAFETY: The vCPU lives, and this thread holds it, which alone writes the field.
        unsafe { (*self.0.get()).cpu as u32 }
    }

    /// Return the time that KVM polled before it let the vCPU sleep, in ns, by KVM's own count.
    pub(crate) fn polled(&self) -> u64 {
        let vcpu = self.0.get();
        // SAFETY: The vCPU lives; its thread writes each field whole.
        let (success, fail) = unsafe {
            let stat = &raw const (*vcpu).stat.generic;
            (
                (&raw const (*stat).halt_poll_success_ns).read_volatile(),
                (&raw const (*stat).halt_poll_fail_ns).read_volatile(),
            )
        };
        success.wrapping_add(fail)
    }

    /// Describe the vCPU for a registry that does not know it yet.
    pub(crate) fn newcomer(&self) -> Newcomer {
        Newcomer {
            owner: self.owner(),
            is_new: self.cpu().is_none(),
            polled: self.polled(),
        }
    }

    /// Return true if the vCPU runs, or has just left, an L2 guest.
    #[inline(always)]
    pub(crate) fn runs_nested(&self) -> bool {
        // SAFETY: The vCPU is held by this thread, which alone writes the flags.
        let flags = unsafe { (*self.0.get()).arch.hflags };
        flags & bindings::HF_GUEST_MASK != 0
    }

    /// Return true if the vCPU is a trust domain's. The TDX module keeps its state, so no VMCS that the
    /// host may read holds its exit reason.
    pub(crate) fn is_of_trust_domain(&self) -> bool {
        // SAFETY: KVM sets `kvm` before the first event of a vCPU, keeps the VM at least as long as
        // the vCPU, and writes its type when the VM is made, not later.
        let vm_type = unsafe { (*(*self.0.get()).kvm).arch.vm_type };
        u32::from(vm_type) == bindings::KVM_X86_TDX_VM
    }

    /// Return the vCPU and its VM, as KVM names them, or `None` if the host cannot read the vCPU's exit
    /// reason, as for a trust domain.
    fn owner(&self) -> Option<Owner> {
        if self.is_of_trust_domain() {
            return None;
        }
        let vcpu = self.0.get();
        // SAFETY: KVM sets `kvm` before the first event of a vCPU and keeps the VM at
        // least as long as the vCPU.
        let (kvm, vcpu_id) = unsafe { ((*vcpu).kvm, (*vcpu).vcpu_id) };
        // SAFETY: As above; these fields are written when the VM is made, not later.
        let (pid, stats_id) = unsafe { ((*kvm).userspace_pid, (*kvm).stats_id) };
        let mut name = [0; NAME_SIZE];
        for (to, from) in name.iter_mut().zip(stats_id) {
            *to = from;
        }
        Some(Owner {
            vm: kvm as usize,
            name,
            pid: pid as u32,
            vcpu: vcpu_id as u32,
        })
    }

    /// Return true if the scheduler takes the vCPU off its CPU, as `kvm_sched_out()` has recorded, and false
    /// if its thread leaves KVM.
    #[inline(always)]
    pub(crate) fn is_scheduled_out(&self) -> bool {
        // SAFETY: The vCPU lives; other CPUs only read the field.
        unsafe { (&raw const (*self.0.get()).scheduled_out).read_volatile() }
    }

    /// Return the phase that begins when the scheduler takes the vCPU off its CPU, by the records of
    /// `kvm_sched_out()` and `kvm_vcpu_block()`.
    ///
    /// KVM calls a vCPU preempted only in KVM_RUN. Here it may be preempted in any ioctl.
    pub(crate) fn phase_scheduled_out(&self) -> Phase {
        let vcpu = self.0.get();
        // SAFETY: The vCPU lives; other CPUs only read these fields.
        let (preempted, blocking) = unsafe {
            (
                (&raw const (*vcpu).preempted).read_volatile(),
                (&raw const (*vcpu).stat.generic.blocking).read_volatile(),
            )
        };
        match blocking {
            _ if preempted || task::is_runnable() => Phase::Preempted,
            0 => Phase::Waiting,
            _ => Phase::Halted,
        }
    }

    /// Return the guest's RIP at the exit, where KVM has read it from the VMCB, or `None` if the guest's
    /// registers are encrypted.
    #[inline(always)]
    pub(crate) fn rip(&self) -> Option<u64> {
        // SAFETY: The vCPU is held by this thread.
        let protected = unsafe { (*self.0.get()).arch.guest_state_protected };
        (!protected).then(|| self.likely_rip())
    }

    /// Return the guest's RIP at the exit, or any number if the guest's registers are encrypted.
    #[inline(always)]
    pub(crate) fn likely_rip(&self) -> u64 {
        // SAFETY: The vCPU is held by this thread; the offset is that of the field in the kernel's
        // own layout.
        unsafe {
            self.0
                .get()
                .byte_add(bindings::LAYOUT_VCPU_RIP as usize)
                .cast::<u64>()
                .read()
        }
    }

    /// Return a register of the guest.
    #[inline(always)]
    pub(crate) fn wide_register(&self, register: Register) -> u64 {
        // SAFETY: As in `register`. Both numbers are below that of the registers.
        unsafe { (*self.0.get()).arch.regs[register as usize] as u64 }
    }

    /// Return the KVM_EXIT_* with which KVM_RUN ends for a vCPU that leaves its CPU for user space, or `None`
    /// if another ioctl ends.
    ///
    /// All of KVM's codes are below 2^16, so this reads the low half, the first one on x86. A VMM can write a
    /// code there itself, which affects only its own VM.
    #[inline(always)]
    pub(crate) fn user_exit(&self) -> Option<u16> {
        let vcpu = self.0.get();
        // SAFETY: The vCPU is held by this thread, and its page for user space lives as long as the vCPU.
        // User space may write to the page, so it is read once.
        unsafe {
            let run = (*vcpu)
                .run
                .byte_add(bindings::LAYOUT_RUN_EXIT_REASON as usize);
            (*vcpu)
                .wants_to_run
                .then(|| run.cast::<u16>().read_volatile())
        }
    }

    /// Return the low half of a guest register, such as [`RAX`]. CPUID reads the low half in every mode.
    #[inline(always)]
    pub(crate) fn register(&self, register: usize) -> u32 {
        // SAFETY: The vCPU is held by this thread; `register` is one of the constants
        // above, and KVM keeps the general registers in memory between exit and entry.
        unsafe { (*self.0.get()).arch.regs[register & 7] as u32 }
    }

    /// Put an answer of CPUID into the guest's registers. CPUID clears the upper halves
    /// (SDM and APM, CPUID), as KVM's own writes do.
    pub(crate) fn write_answer(&self, answer: Registers) {
        let vcpu = self.0.get();
        for (register, value) in [
            (RAX, answer.eax),
            (RBX, answer.ebx),
            (RCX, answer.ecx),
            (RDX, answer.edx),
        ] {
            // SAFETY: The vCPU is held by this thread, which is between exit and entry.
            unsafe { (*vcpu).arch.regs[register & 7] = value as c_ulong };
        }
    }

    /// Return true if the guest's kernel runs, at CPL 0, and not an L2 guest. Returns false if the host
    /// cannot know the CPL, as for SEV-ES, where the guest tells KVM any level it likes.
    ///
    /// Real mode and SMM are CPL 0, virtual-8086 mode is CPL 3.
    pub(crate) fn is_at_cpl_0(&self) -> bool {
        // SAFETY: The vCPU is held and loaded by this thread, which is between exit and entry.
        !self.runs_nested() && unsafe { bindings::exitmeter_cpl(self.0.get()) } == 0
    }

    /// Return true if KVM has queued a general protection fault for the guest, or for a hypervisor in it.
    /// Such a hypervisor gets the faults of its L2 guest that it intercepts as exits, and KVM queues these in
    /// another field (`kvm_queue_exception_vmexit()`).
    pub(crate) fn fault_is_pending(&self) -> bool {
        let vcpu = self.0.get();
        // SAFETY: The vCPU is held by this thread.
        let (own, of_l2) = unsafe { (&(*vcpu).arch.exception, &(*vcpu).arch.exception_vmexit) };
        [own, of_l2]
            .iter()
            .any(|queued| queued.pending && queued.vector == GP_VECTOR)
    }

    /// Return the code of the Hyper-V hypercall that the vCPU has just exited for, or `None` if the guest's
    /// hypercalls are not Hyper-V's.
    #[inline(never)]
    pub(crate) fn hyperv_call(self) -> Option<u16> {
        // SAFETY: The vCPU is held and loaded by this thread, which is between exit and entry.
        let code = unsafe { bindings::exitmeter_hyperv_call(self.0.get()) };
        u16::try_from(code).ok()
    }
}
