// SPDX-License-Identifier: GPL-2.0

//! The hooks into KVM, and the only room that names C.
//!
//! Everything here is either a registration that undoes itself when it is dropped,
//! a callback that turns C's pointers into safe values and calls one safe method,
//! or a safe reader of what KVM holds.

use core::{
    arch::asm,
    marker::PhantomPinned,
    mem::MaybeUninit,
    ptr::null_mut,
    sync::atomic::{
        AtomicPtr,
        AtomicUsize,
        Ordering, //
    },
};

use kernel::{error::to_result, prelude::*, sync::Arc, types::Opaque};

use crate::{
    bindings, cpuid,
    linux::{
        clock,
        symbols,
        task,
        types::TypesFile, //
    },
    meter::{
        btf::{
            Parameter,
            Probe,
            Types,
            Unknown,
            Verdict, //
        },
        detail::{
            source,
            Exit,
            Register, //
        },
        leaves::{
            Leaves,
            Registers, //
        },
        ledger::Ledger,
        parts,
        phase::Phase,
        reasons::{
            self,
            Isa,
            Slot, //
        },
        registry::{
            Newcomer,
            Owner, //
        },
        snapshot::NAME_SIZE, //
    },
    registry::{
        self,
        Event,
        Registry, //
    },
};

/// The field of the VMCS that holds the exit reason (SDM, "Field Encoding in VMCS":
/// 32-bit read-only data fields).
const VMCS_EXIT_REASON: u64 = 0x4402;
/// The field of the guest's RIP (natural-width guest-state fields).
const VMCS_GUEST_RIP: u64 = 0x681e;

/// Places of the registers in `kvm_vcpu_arch.regs` (`enum kvm_reg`: x86's own numbering).
const RAX: usize = 0;
/// See [`RAX`].
const RCX: usize = 1;
/// See [`RAX`].
const RDX: usize = 2;
/// See [`RAX`].
const RBX: usize = 3;

/// The vector of a general protection fault.
const GP_VECTOR: u8 = 13;

/// Return what this CPU's cache holds of a vCPU, if it is the one in there. Preemption is off.
///
/// The kernel crate has no per-CPU variables; this is what C's this_cpu_read() compiles to, with the
/// compare in the same instruction.
#[inline(always)]
fn cached(vcpu: usize) -> Option<usize> {
    'miss: {
        let value: usize;
        // SAFETY: The shim's variable is one of each CPU, at this offset of GS; this reads its first
        // word and touches nothing else.
        unsafe {
            asm!(
                "cmp gs:[rip + {note}], {key}",
                "jne {miss}",
                key = in(reg) vcpu,
                note = sym bindings::exitmeter_cache,
                miss = label { break 'miss },
                options(nostack, readonly),
            )
        };
        // SAFETY: As above, its second word.
        unsafe {
            asm!(
                "mov {value}, gs:[rip + {note} + 8]",
                value = out(reg) value,
                note = sym bindings::exitmeter_cache,
                options(nostack, readonly, preserves_flags),
            )
        };
        // SAFETY: `cache` puts a ledger there before the vCPU's key.
        unsafe { core::hint::assert_unchecked(value != 0) };
        return Some(value);
    }
    None
}

/// Put a vCPU's ledger into this CPU's cache. Preemption is off.
#[inline(always)]
pub(crate) fn cache(vcpu: Vcpu<'_>, ledger: &Ledger) {
    // SAFETY: As in `cached`. The value comes first: a key is never seen with the value of
    // another, not by the CPU itself, as no callback interrupts one.
    unsafe {
        asm!(
            "mov gs:[rip + {note} + 8], {value}",
            "mov gs:[rip + {note} + 16], {key}",
            "mov gs:[rip + {note}], {key}",
            key = in(reg) vcpu.key(),
            value = in(reg) ledger,
            note = sym bindings::exitmeter_cache,
            options(nostack, preserves_flags),
        )
    };
}

/// Take a vCPU out of all CPUs' caches. It runs nowhere any more.
pub(crate) fn forget(vcpu: usize) {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_forget(vcpu as c_ulong) };
}

/// A vCPU of KVM, for the time of one callback.
#[derive(Clone, Copy)]
pub(crate) struct Vcpu<'a>(&'a Opaque<bindings::kvm_vcpu>);

impl Vcpu<'_> {
    /// # Safety
    ///
    /// `vcpu` must be a vCPU that KVM keeps for the time of `'a`.
    #[inline(always)]
    unsafe fn from_raw(vcpu: *mut bindings::kvm_vcpu) -> Self {
        // SAFETY: By the contract of this function; `Opaque` is transparent.
        Self(unsafe { &*vcpu.cast() })
    }

    /// What tells this vCPU from every other that lives: its address.
    #[inline(always)]
    pub(crate) fn key(&self) -> usize {
        self.0.get() as usize
    }

    /// Return the vCPU with a key.
    ///
    /// # Safety
    ///
    /// The key must be that of a vCPU that KVM keeps for the time of `'a`.
    pub(crate) unsafe fn from_key(key: usize) -> Self {
        // SAFETY: By the contract of this function.
        unsafe { Self::from_raw(key as *mut bindings::kvm_vcpu) }
    }

    /// Return its ledger from this CPU's cache. The callbacks run with preemption off.
    #[inline(always)]
    pub(crate) fn cached(&self) -> Option<*const Ledger> {
        Some(cached(self.key())? as *const Ledger)
    }

    /// Return the same vCPU, read from this CPU's cache, in which it was just found. A way that few take does
    /// not hold a register for it so on the way that most take.
    ///
    /// It is read from where no other CPU writes: [`forget`] may clear the word in which it was found at any
    /// moment, also on behalf of a vCPU that was here before.
    #[inline(always)]
    pub(crate) fn read_anew(self) -> Self {
        let key: usize;
        // SAFETY: As in `cached`, its third word.
        unsafe {
            asm!(
                "mov {key}, gs:[rip + {note} + 16]",
                key = out(reg) key,
                note = sym bindings::exitmeter_cache,
                options(nostack, readonly, preserves_flags),
            )
        };
        // SAFETY: This CPU has put the vCPU's key there with the word in which it was found (`cache`), and
        // nothing else since, as preemption is off.
        unsafe { Self::from_key(key) }
    }

    /// Return the CPU that it was loaded on last; `None` for a vCPU that has never been on one. A
    /// trust domain's vCPU is so again when its CPU goes offline or its VM ends.
    pub(crate) fn cpu(&self) -> Option<u32> {
        let vcpu = self.0.get();
        // SAFETY: The vCPU lives; who writes the field writes it whole.
        let cpu = unsafe { (&raw const (*vcpu).cpu).read_volatile() };
        u32::try_from(cpu).ok()
    }

    /// Return the CPU that the vCPU is on, whose thread asks.
    #[inline(always)]
    pub(crate) fn cpu_loaded(&self) -> u32 {
        // SAFETY: The vCPU lives, and this thread holds it, which alone writes the field.
        unsafe { (*self.0.get()).cpu as u32 }
    }

    /// Return the time that KVM polled before it let the vCPU sleep, in ns: KVM's own count.
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

    /// Describe the vCPU to the registry, which does not know it.
    pub(crate) fn newcomer(&self) -> Newcomer {
        Newcomer {
            owner: self.owner(),
            is_new: self.cpu().is_none(),
            polled: self.polled(),
        }
    }

    /// Whether it runs, or has just left, a guest of its guest: an L2.
    #[inline(always)]
    pub(crate) fn runs_nested(&self) -> bool {
        // SAFETY: The vCPU is held by this thread, which alone writes the flags.
        let flags = unsafe { (*self.0.get()).arch.hflags };
        flags & bindings::HF_GUEST_MASK != 0
    }

    /// Return true if the vCPU is a trust domain's. Its state is kept by the TDX module, so no VMCS
    /// that the host may read holds its exit reason.
    pub(crate) fn is_of_trust_domain(&self) -> bool {
        // SAFETY: KVM sets `kvm` before the first event of a vCPU, keeps the VM at least as long as
        // the vCPU, and writes its type when the VM is made, not later.
        let vm_type = unsafe { (*(*self.0.get()).kvm).arch.vm_type };
        u32::from(vm_type) == bindings::KVM_X86_TDX_VM
    }

    /// Return the vCPU and its VM, as KVM names them. `None` for a vCPU whose exit reason the
    /// host cannot read, as that of a trust domain.
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

    /// Return true if the scheduler takes this vCPU off its CPU, by what `kvm_sched_out()` has
    /// written; false if its thread leaves KVM. Called by that thread.
    #[inline(always)]
    fn is_scheduled_out(&self) -> bool {
        // SAFETY: The vCPU lives; other CPUs only read the field.
        unsafe { (&raw const (*self.0.get()).scheduled_out).read_volatile() }
    }

    /// Return the phase that begins as the scheduler takes this vCPU off its CPU, from what
    /// `kvm_sched_out()` and `kvm_vcpu_block()` have written. Called by the vCPU's own thread.
    ///
    /// KVM takes a vCPU for preempted in KVM_RUN alone; here it is so in any ioctl.
    fn phase_scheduled_out(&self) -> Phase {
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

    /// Return where the guest was when it exited, where KVM has read that from the VMCB; `None` for
    /// a guest whose registers are encrypted.
    #[inline(always)]
    fn rip(&self) -> Option<u64> {
        // SAFETY: The vCPU is held by this thread.
        let protected = unsafe { (*self.0.get()).arch.guest_state_protected };
        (!protected).then(|| self.likely_rip())
    }

    /// Return the same, and of a guest whose registers are encrypted what KVM has in place of it.
    #[inline(always)]
    fn likely_rip(&self) -> u64 {
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
    fn wide_register(&self, register: Register) -> u64 {
        // SAFETY: As in `register`. Both numbers are below that of the registers.
        unsafe { (*self.0.get()).arch.regs[register as usize] as u64 }
    }

    /// Return KVM_EXIT_* of a vCPU that leaves its CPU, for user space: why, where KVM_RUN ends;
    /// `None` for another ioctl.
    ///
    /// All of KVM's are below 2^16, so the low half is read, the first one on x86. What the VMM may
    /// write there itself is told of its own VM alone.
    #[inline(always)]
    pub(crate) fn user_exit(&self) -> Option<u16> {
        let vcpu = self.0.get();
        // SAFETY: The vCPU is held by this thread, and its page for user space is there as long as
        // it is. User space may write to the page, so it is read once.
        unsafe {
            let run = (*vcpu)
                .run
                .byte_add(bindings::LAYOUT_RUN_EXIT_REASON as usize);
            (*vcpu)
                .wants_to_run
                .then(|| run.cast::<u16>().read_volatile())
        }
    }

    /// The low half of a register of the guest, as CPUID reads it in every mode.
    #[inline(always)]
    fn register(&self, register: usize) -> u32 {
        // SAFETY: The vCPU is held by this thread; `register` is one of the constants
        // above, and KVM keeps the general registers in memory between exit and entry.
        unsafe { (*self.0.get()).arch.regs[register & 7] as u32 }
    }

    /// Puts an answer of CPUID into the guest's registers. CPUID clears the upper halves
    /// (SDM and APM, CPUID), as KVM's own writes do.
    fn write_answer(&self, answer: Registers) {
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

    /// Return true if the guest's kernel runs: CPL 0, and not of a guest of its own. False where
    /// the host cannot know, as for SEV-ES, whose guest tells KVM any level it likes.
    ///
    /// Real mode and SMM are CPL 0, virtual-8086 mode is CPL 3.
    fn is_at_cpl_0(&self) -> bool {
        // SAFETY: The vCPU is held and loaded by this thread, which is between exit and entry.
        !self.runs_nested() && unsafe { bindings::exitmeter_cpl(self.0.get()) } == 0
    }

    /// Return true if KVM has queued a general protection fault for the guest, or for the
    /// hypervisor in it: that gets an L2's faults which it intercepts as exits, by a place of their
    /// own (`kvm_queue_exception_vmexit()`).
    fn fault_is_pending(&self) -> bool {
        let vcpu = self.0.get();
        // SAFETY: The vCPU is held by this thread.
        let (own, of_l2) = unsafe { (&(*vcpu).arch.exception, &(*vcpu).arch.exception_vmexit) };
        [own, of_l2]
            .iter()
            .any(|queued| queued.pending && queued.vector == GP_VECTOR)
    }
}

/// The registry, for the callbacks and the files of the node. Set for as long as there can be
/// one of them.
static REGISTRY: AtomicPtr<Registry> = AtomicPtr::new(null_mut());

/// The registry as [`registry`] finds it, while this lives. Everything that is attached here
/// has to go before it.
pub(crate) struct Published(#[expect(dead_code, reason = "held")] Arc<Registry>);

impl Published {
    /// Makes it known. There is at most one.
    pub(crate) fn new(registry: Arc<Registry>) -> Self {
        REGISTRY.store(Arc::as_ptr(&registry).cast_mut(), Ordering::Release);
        Self(registry)
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        REGISTRY.store(null_mut(), Ordering::Release);
    }
}

/// The registry, in a callback or behind an open file of the node.
#[inline(always)]
pub(crate) fn registry<'a>() -> Option<&'a Registry> {
    // SAFETY: Null, or published by the module's state. That lets it go after the last run of
    // a callback, and an open file pins the module.
    unsafe { REGISTRY.load(Ordering::Acquire).as_ref() }
}

/// Probe of kvm:kvm_exit on VMX. Runs with interrupts off, on the vCPU's CPU. `RING` tells whether
/// vCPUs have rings of their last exits, where exits are told with details.
///
/// # Safety
///
/// For the tracepoint alone.
unsafe extern "C" fn on_exit_vmx<const RING: bool>(
    _data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    if !parts::CALLBACKS {
        return;
    }
    // SAFETY: KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    registry::exit::<RING, _>(vcpu, clock::now(), Isa::Vmx, VmxExit);
}

/// Read a field from the VMCS that this CPU has loaded. The field's number stays where VMREAD fails,
/// as it does with no VMCS, and where it faults, as it does with VMX off.
#[inline(always)]
fn vmread(field: u64) -> u64 {
    let mut value = field;
    // SAFETY: VMREAD touches nothing but the operand and the flags. KVM fires the tracepoint with the
    // vCPU's VMCS loaded. At a fault the kernel goes on behind it, by an entry in the table of
    // exceptions (asm/asm.h, _ASM_EXTABLE_TYPE: where it may fault, where to go on, EX_TYPE_DEFAULT).
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

/// Return the code of the Hyper-V hypercall that a vCPU has just exited for.
#[inline(never)]
fn hyperv_call(vcpu: Vcpu<'_>) -> Option<u16> {
    // SAFETY: The vCPU is held and loaded by this thread, which is between exit and entry.
    let code = unsafe { bindings::exitmeter_hyperv_call(vcpu.0.get()) };
    u16::try_from(code).ok()
}

/// An exit of VMX, read from the VMCS.
#[derive(Clone, Copy)]
struct VmxExit<'a>(Vcpu<'a>);

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
        hyperv_call(self.0)
    }
}

impl Event for VmxExit<'_> {
    const HIDES_RIP: bool = false;

    #[inline(always)]
    fn code(&self) -> u32 {
        // The basic exit reason is the low half; the rest tells of failed entries and SMM. No basic exit
        // reason is as large as the field's number, so with that the exit is counted among "other".
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

/// An exit as KVM's own reader tells it, on SVM or of an enlightened VMCS.
#[derive(Clone, Copy)]
struct ExitByKvm<'a, const SVM: bool> {
    vcpu: Vcpu<'a>,
    info: &'a bindings::exitmeter_exit_info,
}

impl<'a, const SVM: bool> ExitByKvm<'a, SVM> {
    /// Read the exit that a vCPU has just taken on this CPU, with room for it.
    #[inline(always)]
    fn read(vcpu: Vcpu<'a>, room: &'a mut MaybeUninit<bindings::exitmeter_exit_info>) -> Self {
        // SAFETY: The callers are probes of kvm_exit, and the shim writes all of it.
        let info = unsafe {
            bindings::exitmeter_read_exit(vcpu.0.get(), room.as_mut_ptr());
            room.assume_init_ref()
        };
        Self { vcpu, info }
    }

    #[inline(always)]
    fn info(&self) -> &bindings::exitmeter_exit_info {
        self.info
    }
}

impl<const SVM: bool> Event for ExitByKvm<'_, SVM> {
    const HIDES_RIP: bool = true;

    #[inline(always)]
    fn code(&self) -> u32 {
        match SVM {
            true => self.info.code,
            // As of any VMCS.
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
            source::QUALIFICATION => Some(self.info().info1),
            source::INTERRUPTION => Some(self.info().intr_info.into()),
            // The second number of VMX is the IDT-vectoring information (`vmx_get_exit_info()`).
            _ => SVM.then_some(self.info().info2),
        }
    }

    #[inline(always)]
    fn read_plain(&self, source: i32) -> Option<u64> {
        match SVM {
            // There is no other on SVM.
            true => Some(self.info().info1),
            false => self.read(source),
        }
    }

    #[inline(always)]
    fn register(&self, register: Register) -> u64 {
        self.vcpu.wide_register(register)
    }

    #[inline(always)]
    fn hyperv_call(&self) -> Option<u16> {
        hyperv_call(self.vcpu)
    }
}

/// Probe of kvm:kvm_exit on VMX under Hyper-V, whose enlightened VMCS is ordinary memory: with it
/// VMREAD is "unsupported and can result in unexpected behavior" (TLFS, "Enlightened VMCS"). Runs
/// with interrupts off, on the vCPU's CPU.
///
/// KVM's own reader takes the reason from `vcpu_vt.exit_reason`, which `vmx_vcpu_enter_exit()` has
/// just set, and reads through the enlightened VMCS where there is one.
///
/// # Safety
///
/// For the tracepoint alone.
unsafe extern "C" fn on_exit_vmx_by_kvm<const RING: bool>(
    _data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    if !parts::CALLBACKS {
        return;
    }
    let now = clock::now();
    // SAFETY: KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    let mut room = MaybeUninit::uninit();
    let exit = ExitByKvm::<false>::read(vcpu, &mut room);
    registry::exit::<RING, _>(vcpu, now, Isa::Vmx, |_| exit);
}

/// Probe of kvm:kvm_exit on SVM. Runs with interrupts off, on the vCPU's CPU.
///
/// # Safety
///
/// For the tracepoint alone.
unsafe extern "C" fn on_exit_svm<const RING: bool>(
    _data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    if !parts::CALLBACKS {
        return;
    }
    let now = clock::now();
    // SAFETY: KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    let mut room = MaybeUninit::uninit();
    let exit = ExitByKvm::<true>::read(vcpu, &mut room);
    registry::exit::<RING, _>(vcpu, now, Isa::Svm, |_| exit);
}

/// Probe of kvm:kvm_entry. Runs with interrupts off, on the vCPU's CPU.
///
/// # Safety
///
/// For the tracepoint alone.
unsafe extern "C" fn on_entry(_data: *mut c_void, vcpu: *mut bindings::kvm_vcpu, _force: u8) {
    if !parts::CALLBACKS {
        return;
    }
    // SAFETY: KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    registry::entry(vcpu, clock::now());
}

/// The probe of kvm:kvm_exit that can read why a guest exits on this host.
#[derive(Clone, Copy)]
pub(crate) struct ExitProbe(bindings::exitmeter_exit_probe);

/// Probes on the two tracepoints of KVM.
pub(crate) struct Tracepoints {
    exit: bindings::exitmeter_exit_probe,
}

impl Tracepoints {
    /// Begins to see every exit and entry. The registry has to be published for as long as
    /// this lives.
    pub(crate) fn attach(exit: ExitProbe) -> Result<Self> {
        let ExitProbe(exit) = exit;
        // Entries first, and last in `drop`: whoever's exit is seen is seen to be entered again,
        // so that each exit has its sample.
        // SAFETY: The probe is detached before its code goes, and takes no data.
        to_result(unsafe { bindings::exitmeter_attach_entry(Some(on_entry), null_mut()) })
            .inspect_err(|_| pr_err!("tracepoint kvm:kvm_entry cannot be hooked\n"))?;
        // SAFETY: As above.
        let attached = unsafe { bindings::exitmeter_attach_exit(exit, null_mut()) };
        if let Err(error) = to_result(attached) {
            pr_err!("tracepoint kvm:kvm_exit cannot be hooked\n");
            // SAFETY: Attached above.
            unsafe { bindings::exitmeter_detach_entry(Some(on_entry), null_mut()) };
            return Err(error);
        }
        Ok(Self { exit })
    }
}

impl Drop for Tracepoints {
    fn drop(&mut self) {
        // SAFETY: Both were attached, with the same data.
        unsafe {
            bindings::exitmeter_detach_exit(self.exit, null_mut());
            bindings::exitmeter_detach_entry(Some(on_entry), null_mut());
        }
    }
}

/// A function of KVM whose every call is seen, by ftrace. The registry has to be published
/// for as long as one lives.
#[pin_data(PinnedDrop)]
pub(crate) struct Function {
    #[pin]
    ops: Opaque<bindings::ftrace_ops>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: ftrace may be told to drop a registration from any thread, and a shared
// reference to one allows nothing.
unsafe impl Send for Function {}
// SAFETY: As above.
unsafe impl Sync for Function {}

impl Function {
    /// Hooks `kvm_arch_vcpu_load()`: a vCPU thread takes a CPU.
    pub(crate) fn vcpu_load() -> impl PinInit<Self, Error> {
        Self::attach(
            c"kvm:kvm_arch_vcpu_load",
            on_load,
            bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_LOAD,
            false,
        )
    }

    /// Hooks `kvm_arch_vcpu_put()`: a vCPU thread leaves its CPU.
    pub(crate) fn vcpu_put() -> impl PinInit<Self, Error> {
        Self::attach(
            c"kvm:kvm_arch_vcpu_put",
            on_put,
            bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_PUT,
            false,
        )
    }

    /// Hooks `kvm_mmu_destroy()`: a vCPU ends.
    ///
    /// Not `kvm_arch_vcpu_destroy()`, which calls this last of all: in between VMX loads
    /// and puts the vCPU once more, to free what it keeps for nested guests. A vCPU let go
    /// before that would be taken in again, and its ledger would outlive it.
    pub(crate) fn vcpu_destroy() -> impl PinInit<Self, Error> {
        Self::attach(
            c"kvm:kvm_mmu_destroy",
            on_destroy,
            bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_NONE,
            false,
        )
    }

    fn attach(
        name: &'static CStr,
        callback: Callback,
        trampoline: bindings::exitmeter_trampoline,
        redirect: bool,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            ops <- Opaque::try_ffi_init(move |slot: *mut bindings::ftrace_ops| {
                // SAFETY: The slot is ours to write; all-zero bytes are a valid ftrace_ops.
                unsafe {
                    slot.write_bytes(0, 1);
                    (*slot).func = Some(callback);
                }
                // SAFETY: The slot stays in place and is detached before it goes; the name
                // ends with a NUL.
                let ret = unsafe {
                    bindings::exitmeter_attach_function(
                        slot,
                        name.as_char_ptr(),
                        trampoline,
                        redirect,
                    )
                };
                to_result(ret).inspect_err(|error| {
                    let why = if *error == EBUSY {
                        "another module or a live patch redirects it, or kernel.ftrace_enabled is 0"
                    } else {
                        "it must be in kvm.ko and traceable by ftrace"
                    };
                    pr_err!("function {} cannot be hooked ({:?}): {}\n", name, error, why);
                })
            }),
            _pin: PhantomPinned,
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Function {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Attached when this was made, and only detached here.
        unsafe { bindings::exitmeter_detach_function(self.ops.get()) };
    }
}

/// The type of ftrace's callbacks.
type Callback =
    unsafe extern "C" fn(c_ulong, c_ulong, *mut bindings::ftrace_ops, *mut bindings::ftrace_regs);

/// The vCPU that is the first argument of each function that is hooked.
///
/// # Safety
///
/// For the arguments of a callback that [`Function::attach`] registered, for a function
/// whose first argument is a vCPU that KVM keeps during the call.
#[inline(always)]
unsafe fn hooked<'a>(fregs: *mut bindings::ftrace_regs) -> Vcpu<'a> {
    // SAFETY: By the contract of this function; ftrace keeps the first argument in DI.
    unsafe {
        let regs = &raw const (*fregs.cast::<bindings::__arch_ftrace_regs>()).regs;
        Vcpu::from_raw((*regs).di as *mut bindings::kvm_vcpu)
    }
}

/// # Safety
///
/// For ftrace alone, as a callback for `kvm_arch_vcpu_load()`.
unsafe extern "C" fn on_load(
    _ip: c_ulong,
    _parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // SAFETY: By the contract of this function.
    unsafe { exitmeter_load(hooked(fregs).0.get()) };
}

/// Take a vCPU that its thread loads on a CPU.
///
/// # Safety
///
/// For [`on_load`] and the trampoline of `kvm_arch_vcpu_load()` alone (src/trampolines.S).
#[no_mangle]
unsafe extern "C" fn exitmeter_load(vcpu: *mut bindings::kvm_vcpu) {
    if !parts::CALLBACKS {
        return;
    }
    // SAFETY: By the contract of this function; KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    registry::resume(vcpu, clock::now());
}

/// # Safety
///
/// For ftrace alone, as a callback for `kvm_arch_vcpu_put()`.
unsafe extern "C" fn on_put(
    _ip: c_ulong,
    _parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // SAFETY: By the contract of this function.
    unsafe { exitmeter_put(hooked(fregs).0.get()) };
}

/// Take a vCPU whose thread leaves its CPU.
///
/// # Safety
///
/// For [`on_put`] and the trampoline of `kvm_arch_vcpu_put()` alone (src/trampolines.S).
#[no_mangle]
unsafe extern "C" fn exitmeter_put(vcpu: *mut bindings::kvm_vcpu) {
    if !parts::CALLBACKS {
        return;
    }
    // SAFETY: By the contract of this function; KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    let now = clock::now();
    if vcpu.is_scheduled_out() {
        return leave_scheduled_out(vcpu, now);
    }
    registry::leave_to_user(vcpu, now);
}

/// Take the way off its CPU of a vCPU that the scheduler takes off it. Apart, so that the way to
/// user space saves no registers for this.
#[inline(never)]
fn leave_scheduled_out(vcpu: Vcpu<'_>, now: u64) {
    registry::leave(vcpu, now, vcpu.phase_scheduled_out());
}

/// # Safety
///
/// For ftrace alone, as a callback for `kvm_create_lapic()`.
unsafe extern "C" fn on_create(
    _ip: c_ulong,
    _parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // Another user of the function has ftrace call all of them with preemption off. Then the vCPU is
    // taken in at its first event, if there is memory at once.
    if !task::may_sleep() {
        return;
    }
    let Some(_inside) = Inside::try_enter(IN_CREATION) else {
        return;
    };
    // SAFETY: By the contract of this function.
    let vcpu = unsafe { hooked(fregs) };
    if let Some(registry) = registry() {
        registry.announce(vcpu);
    }
}

/// # Safety
///
/// For ftrace alone, as a callback for `kvm_mmu_destroy()`.
unsafe extern "C" fn on_destroy(
    _ip: c_ulong,
    _parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // SAFETY: By the contract of this function.
    let vcpu = unsafe { hooked(fregs) };
    if let Some(registry) = registry() {
        registry.destroy(vcpu);
    }
}

/// A task of KVM's in code of the module in which it may sleep.
///
/// Nothing else keeps that code for a task that sleeps: RCU-tasks, for which ftrace waits when a
/// hook goes, takes a sleeping task for one that has left.
pub(crate) struct Inside(bindings::exitmeter_place);

/// KVM's own `kvm_emulate_cpuid()`, called by [`exitmeter_emulate_cpuid`]. KVM sleeps there where it fetches
/// the instruction from a guest's memory that is swapped out or userfaultfd's: on SVM without
/// NRIPS (`svm_skip_emulated_instruction()`).
const IN_CPUID: bindings::exitmeter_place = bindings::exitmeter_place_EXITMETER_PLACE_CPUID;

/// The allocation of a ledger, by [`on_create`].
const IN_CREATION: bindings::exitmeter_place = bindings::exitmeter_place_EXITMETER_PLACE_CREATION;

impl Inside {
    /// Comes into a place whose door is shut otherwise, before [`wait_for_none`] is called.
    fn enter(place: bindings::exitmeter_place) -> Self {
        // SAFETY: No requirements.
        unsafe { bindings::exitmeter_enter(place) };
        Self(place)
    }

    /// Comes into a place unless it is [`closed`](close).
    fn try_enter(place: bindings::exitmeter_place) -> Option<Self> {
        // SAFETY: No requirements.
        unsafe { bindings::exitmeter_try_enter(place) }.then_some(Self(place))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // SAFETY: This task came in when this was made.
        unsafe { bindings::exitmeter_leave(self.0) };
    }
}

/// Has a place refuse, from now on or until now, whoever would come in by [`Inside::try_enter`].
///
/// For a callback that sleeps: ftrace frees the trampoline that called it as the hook goes, so it
/// has to be over before: close, [`wait_for_none`], then let the hook go.
fn close(place: bindings::exitmeter_place, closed: bool) {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_close(place, closed) };
}

/// Waits until no task is in a place, however long they sleep, nor in the few instructions by which
/// they leave the module's code. `where_they_sleep` and `what_for` are for the log.
///
/// Nobody may come in any more: the hook that let them in is gone, or the place is closed.
fn wait_for_none(place: bindings::exitmeter_place, where_they_sleep: &str, what_for: &str) {
    /// The time between two looks, in ms: short while it may be over at once.
    const STEPS: [u32; 2] = [1, 50];
    /// When the log is told, in ms, and how long after that again.
    const FIRST_LINE: u32 = 1000;
    const NEXT_LINE: u32 = 30_000;

    let mut waited = 0_u32;
    let mut next_line = FIRST_LINE;
    loop {
        // SAFETY: No requirements.
        let inside = unsafe { bindings::exitmeter_inside(place) };
        if inside == 0 {
            break;
        }
        if waited >= next_line {
            let (vcpus, sleep) = if inside == 1 {
                ("vCPU", "sleeps")
            } else {
                ("vCPUs", "sleep")
            };
            pr_info!(
                "unloading waits: {inside} {vcpus} {sleep} in {where_they_sleep}(), until {what_for}\n"
            );
            next_line = waited.saturating_add(NEXT_LINE);
        }
        let step = if waited < STEPS[1] {
            STEPS[0]
        } else {
            STEPS[1]
        };
        task::doze(step);
        waited = waited.saturating_add(step);
    }
    // SAFETY: The callers may sleep.
    unsafe { bindings::exitmeter_wait_for_tails() };
}

/// The hook by which vCPUs are announced that KVM makes. Its fields go in this order: the callback
/// sleeps in ftrace's trampoline, so no task may be in it when that is freed.
pub(crate) struct CreationHook {
    _gate: CreationGate,
    _function: Pin<KBox<Function>>,
}

/// Lets tasks into the callback. Dropping this shuts them out, and waits for those inside.
struct CreationGate;

impl Drop for CreationGate {
    fn drop(&mut self) {
        close(IN_CREATION, true);
        wait_for_none(IN_CREATION, "kvm_create_lapic", "memory is there");
    }
}

impl CreationHook {
    /// Hooks `kvm_create_lapic()`: KVM makes a vCPU, and has made its MMU. From there on each vCPU
    /// comes to `kvm_mmu_destroy()`, also one that KVM fails to make (`kvm_arch_vcpu_create()`,
    /// Linux 7.3). The registry has to be published for as long as this lives.
    pub(crate) fn attach() -> Result<Self> {
        let name = c"kvm:kvm_create_lapic";
        let none = bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_NONE;
        let function = Function::attach(name, on_create, none, false);
        let function = KBox::try_pin_init(function, GFP_KERNEL)?;
        close(IN_CREATION, false);
        Ok(Self {
            _gate: CreationGate,
            _function: function,
        })
    }
}

/// KVM's own `kvm_emulate_cpuid()`; set while the redirect is in place.
static EMULATE_CPUID: AtomicUsize = AtomicUsize::new(0);

/// The hook by which guests are answered. Its fields go in this order.
pub(crate) struct CpuidRedirect {
    _function: Pin<KBox<Function>>,
    _asleep: AsleepInCpuid,
}

/// The tasks that the redirect sent to [`exitmeter_emulate_cpuid`]. Dropping this waits for all of them; the
/// redirect has to be gone.
struct AsleepInCpuid;

impl Drop for AsleepInCpuid {
    fn drop(&mut self) {
        wait_for_none(IN_CPUID, "kvm_emulate_cpuid", "the guest's memory is there");
    }
}

/// Finds KVM's own `kvm_emulate_cpuid()`, and hooks it to answer for our leaves. The registry
/// has to be published for as long as this lives.
pub(crate) fn redirect_cpuid() -> Result<CpuidRedirect> {
    let name = c"kvm:kvm_emulate_cpuid";
    // Ours is of the type that it calls KVM's as.
    let like = exitmeter_emulate_cpuid as unsafe extern "C" fn(_) -> _ as usize;
    let Some(function) = symbols::find(name).filter(|it| symbols::may_call(*it, like)) else {
        pr_err!("function kvm_emulate_cpuid not found in kvm.ko, or not callable\n");
        return Err(ENOENT);
    };
    EMULATE_CPUID.store(function, Ordering::Relaxed);
    let trampoline = bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_CPUID;
    let function = Function::attach(name, on_cpuid, trampoline, true);
    let function = KBox::try_pin_init(function, GFP_KERNEL)?;
    Ok(CpuidRedirect {
        _function: function,
        _asleep: AsleepInCpuid,
    })
}

/// # Safety
///
/// For ftrace alone, as a callback for `kvm_emulate_cpuid()`.
unsafe extern "C" fn on_cpuid(
    _ip: c_ulong,
    parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // SAFETY: By the contract of this function.
    let vcpu = unsafe { hooked(fregs) };
    if Leaves::are_near(vcpu.register(RAX)) && is_query(vcpu, parent) {
        // SAFETY: ftrace lets a redirect write the address to go on at.
        unsafe {
            (*fregs.cast::<bindings::__arch_ftrace_regs>()).regs.ip =
                exitmeter_emulate_cpuid as unsafe extern "C" fn(_) -> _ as usize as c_ulong;
        }
    }
}

/// Return true to go on in [`exitmeter_emulate_cpuid`].
///
/// # Safety
///
/// For the trampoline of `kvm_emulate_cpuid()` alone (src/trampolines.S), for a leaf that is near.
#[no_mangle]
unsafe extern "C" fn exitmeter_is_query(vcpu: *mut bindings::kvm_vcpu, parent: c_ulong) -> bool {
    // SAFETY: By the contract of this function; KVM holds the vCPU.
    is_query(unsafe { Vcpu::from_raw(vcpu) }, parent)
}

/// Return true if the guest asks for one of our leaves, and may. `parent` is where
/// `kvm_emulate_cpuid()` returns to.
#[inline(never)]
fn is_query(vcpu: Vcpu<'_>, parent: c_ulong) -> bool {
    let leaf = vcpu.register(RAX);
    if registry().is_none_or(|registry| registry.leaves().classify(leaf).is_none()) {
        return false;
    }
    // The replacement calls the original: let it through.
    if symbols::is_own_text(parent as usize) {
        return false;
    }
    // Before KVM's own function has done anything: who may not ask gets just that.
    !cpuid::for_cpl_0_alone() || vcpu.is_at_cpl_0()
}

/// Stands in for `kvm_emulate_cpuid()` when the guest asks for one of our leaves: lets
/// KVM emulate the instruction, then puts our answer in place of KVM's.
///
/// # Safety
///
/// For [`on_cpuid`] and the trampoline (src/trampolines.S), in place of the call that KVM made.
#[no_mangle]
unsafe extern "C" fn exitmeter_emulate_cpuid(vcpu: *mut bindings::kvm_vcpu) -> c_int {
    type EmulateCpuid = unsafe extern "C" fn(*mut bindings::kvm_vcpu) -> c_int;

    // From here on `CpuidRedirect` waits for this task as it goes. Before, this task does not
    // sleep, so that ftrace waits for it.
    let _inside = Inside::enter(IN_CPUID);
    // SAFETY: The redirect was in place, so the address is set, and the registry and kvm.ko stay
    // until no task is in here any more. KVM holds the vCPU.
    let (original, guest) = unsafe {
        (
            core::mem::transmute::<usize, EmulateCpuid>(EMULATE_CPUID.load(Ordering::Relaxed)),
            Vcpu::from_raw(vcpu),
        )
    };
    let (leaf, subleaf) = (guest.register(RAX), guest.register(RCX));
    // Before KVM handles the exit, as in `is_query`.
    let at_cpl_0 = guest.is_at_cpl_0();
    // SAFETY: KVM's own function with KVM's own argument, in KVM's own context.
    let ret = unsafe { original(vcpu) };
    // CPUID faulting: KVM has queued a fault instead of emulating. No fault can have
    // been queued before, as KVM injects it at the entry that led to this exit.
    if guest.fault_is_pending() {
        return ret;
    }
    if let Some(answer) =
        registry().and_then(|it| cpuid::answer(it, guest, leaf, subleaf, at_cpl_0))
    {
        guest.write_answer(answer);
    }
    ret
}

/// KVM's own reader of exit codes, found in the vendor's module.
pub(crate) struct ExitReader(());

impl ExitReader {
    /// Finds the reader, and finds it anew whenever the vendor's module is loaded again.
    fn attach(vendor: bindings::exitmeter_vendor, module: &str) -> Result<Self> {
        // SAFETY: Called once, by `Vendor::attach`.
        to_result(unsafe { bindings::exitmeter_attach_reader(vendor) }).inspect_err(|error| {
            if *error == ENOENT {
                pr_err!("no reader of exit codes (get_exit_info) found in {module}: nothing else tells why a guest exits\n");
            } else if *error == ENOEXEC {
                pr_err!("the reader of exit codes (get_exit_info) of {module} cannot be called: IBT takes an ENDBR, and CFI the type that it is called as\n");
            } else {
                pr_err!("loads of {module} cannot be watched ({:?})\n", error);
            }
        })?;
        Ok(Self(()))
    }
}

impl Drop for ExitReader {
    fn drop(&mut self) {
        // SAFETY: Attached when this was made; the tracepoints are detached before.
        unsafe { bindings::exitmeter_detach_reader() };
    }
}

/// The vendor's half of KVM, checked when the meter is loaded.
pub(crate) struct Vendor {
    isa: Isa,
    exit_probes: [ExitProbe; 2],
    _reader: Option<ExitReader>,
}

impl Vendor {
    /// Checks the CPU, and that its vendor module is loaded.
    pub(crate) fn attach() -> Result<Self> {
        // SAFETY: No requirements.
        let vendor = unsafe { bindings::exitmeter_vendor() };
        let (isa, module, unload) = match vendor {
            bindings::exitmeter_vendor_EXITMETER_VENDOR_VMX => {
                (Isa::Vmx, "kvm_intel", c"kvm_intel:cleanup_module")
            }
            bindings::exitmeter_vendor_EXITMETER_VENDOR_SVM => {
                (Isa::Svm, "kvm_amd", c"kvm_amd:cleanup_module")
            }
            _ => {
                pr_err!("this CPU has neither VT-x nor SVM\n");
                return Err(ENODEV);
            }
        };
        demand_module()?;
        demand_loaded(module, unload)?;
        demand_prototypes()?;
        // SAFETY: No requirements.
        let enlightened = isa == Isa::Vmx && unsafe { bindings::exitmeter_has_enlightened_vmcs() };
        if enlightened {
            pr_info!("this host runs under Hyper-V with an enlightened VMCS: exit reasons come from kvm_intel's own reader\n");
        }
        let exit_probes: [bindings::exitmeter_exit_probe; 2] = match isa {
            Isa::Svm => [Some(on_exit_svm::<false>), Some(on_exit_svm::<true>)],
            Isa::Vmx if enlightened => [
                Some(on_exit_vmx_by_kvm::<false>),
                Some(on_exit_vmx_by_kvm::<true>),
            ],
            Isa::Vmx => [Some(on_exit_vmx::<false>), Some(on_exit_vmx::<true>)],
        };
        let by_kvm = isa == Isa::Svm || enlightened;
        Ok(Self {
            isa,
            exit_probes: exit_probes.map(ExitProbe),
            _reader: by_kvm
                .then(|| ExitReader::attach(vendor, module))
                .transpose()?,
        })
    }

    /// Return the vendor, that is, which numbers this host's exit reasons are.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// Return the probe for this host's exits, to attach for as long as this lives. `ring` tells
    /// whether vCPUs with details have rings of their last exits.
    pub(crate) fn exit_probe(&self, ring: bool) -> ExitProbe {
        let [without, with] = self.exit_probes;
        match ring {
            true => with,
            false => without,
        }
    }
}

/// Demands that KVM is a module, by a function of it that has the module's name, or none if KVM is
/// a part of the kernel.
fn demand_module() -> Result {
    if symbols::find(c"kvm:kvm_arch_vcpu_load").is_none()
        && symbols::find(c"kvm_arch_vcpu_load").is_some()
    {
        pr_err!(
            "KVM is built into this kernel (CONFIG_KVM=y): exitmeter hooks it as a module alone\n"
        );
        return Err(ENODEV);
    }
    Ok(())
}

/// Demands that a module of KVM's is loaded, and tells that from a function that is not in it: by
/// the function that unloads it, which has the same name in every module.
fn demand_loaded(module: &str, unload: &'static CStr) -> Result {
    if symbols::find(unload).is_none() {
        pr_err!("{module} is not loaded: run 'modprobe {module}' first\n");
        return Err(ENODEV);
    }
    Ok(())
}

/// What the probes of kvm:kvm_exit take, `on_exit_vmx` and its like.
const EXIT_PROBE: Probe = Probe {
    typedef: "btf_trace_kvm_exit",
    parameters: &[
        Parameter::Pointer,
        Parameter::PointerTo("kvm_vcpu"),
        Parameter::U32,
    ],
};

/// What [`on_entry`] takes: its `u8` is KVM's bool, which is one byte.
const ENTRY_PROBE: Probe = Probe {
    typedef: "btf_trace_kvm_entry",
    parameters: &[
        Parameter::Pointer,
        Parameter::PointerTo("kvm_vcpu"),
        Parameter::Bool,
    ],
};

/// Demands that KVM's tracepoints call probes as ours are, where the kernel has types that tell.
///
/// KVM stays meanwhile: this module needs its symbols.
fn demand_prototypes() -> Result {
    // The small file first: most kernels without types have none of them.
    let files = TypesFile::read(c"/sys/kernel/btf/kvm")
        .and_then(|module| Some((TypesFile::read(c"/sys/kernel/btf/vmlinux")?, module)));
    let Some((kernel, module)) = files else {
        pr_info!("kvm_exit and kvm_entry are taken for what they were when exitmeter was written: this kernel shows no types of kvm (/sys/kernel/btf)\n");
        return Ok(());
    };
    let types = Types::read(kernel.bytes(), module.bytes());
    for (tracepoint, probe) in [("kvm_exit", EXIT_PROBE), ("kvm_entry", ENTRY_PROBE)] {
        let verdict = match &types {
            Ok(types) => types.compare(&probe),
            Err(unknown) => Err(*unknown),
        };
        match verdict {
            Ok(Verdict::Fits) => (),
            Ok(Verdict::Differs(place, found)) => {
                pr_err!(
                    "this kernel's tracepoint kvm:{tracepoint} calls {}, and exitmeter takes {}: they differ in {}\n",
                    Shown(found),
                    Shown(probe),
                    Shown(place)
                );
                return Err(ENOEXEC);
            }
            Err(why) => pr_warn!(
                "{tracepoint} is taken for what it was when exitmeter was written: {}\n",
                match why {
                    Unknown::Damaged => "the types of kvm in /sys/kernel/btf cannot be read",
                    Unknown::Missing => "the types of kvm in /sys/kernel/btf do not hold it",
                }
            ),
        }
    }
    Ok(())
}

/// Lets the kernel, which formats through a trait of its own, show what core shows.
struct Shown<T>(T);

impl<T: core::fmt::Display> kernel::fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(&self.0, f)
    }
}

/// Have the registry go on after the host's sleep, when the TSC has begun anew. `then` and `now` are
/// one moment, by the TSC as it would have gone on, and as it is.
///
/// # Safety
///
/// For the shim alone, when no other CPU runs.
unsafe extern "C" fn on_rebase(then: u64, now: u64) {
    if let Some(registry) = registry() {
        registry.rebase(then, now);
    }
}

/// The host's sleep is watched. The registry has to be published for as long as this lives.
pub(crate) struct Sleep(());

impl Sleep {
    /// Begin to watch it.
    pub(crate) fn watch() -> Self {
        // SAFETY: Called once, by the module's init; undone in `drop`.
        unsafe { bindings::exitmeter_attach_sleep(Some(on_rebase)) };
        Self(())
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        // SAFETY: Attached when this was made.
        unsafe { bindings::exitmeter_detach_sleep() };
    }
}
