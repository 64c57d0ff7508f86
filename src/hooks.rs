// SPDX-License-Identifier: GPL-2.0

//! The hooks into KVM, and the only room that names C.
//!
//! Everything here is either a registration that undoes itself when it is dropped,
//! a callback that turns C's pointers into safe values and calls one safe method,
//! or a safe reader of what KVM holds.

use core::{
    arch::{
        asm,
        x86_64::_rdtsc, //
    },
    marker::PhantomPinned,
    ptr::null_mut,
    sync::atomic::{
        AtomicPtr,
        AtomicUsize,
        Ordering, //
    },
};

use kernel::{
    bindings as kernel_bindings,
    error::to_result,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions, //
    },
    prelude::*,
    sync::Arc,
    types::Opaque,
};

use crate::{
    bindings, cpuid,
    meter::{
        leaves::Registers,
        parts,
        phase::Phase,
        reasons::Isa,
        snapshot::NAME_SIZE, //
    },
    registry::{
        self,
        Owner,
        Registry, //
    },
};

/// The field of the VMCS that holds the exit reason (SDM, "Field Encoding in VMCS":
/// 32-bit read-only data fields).
const VMCS_EXIT_REASON: u64 = 0x4402;

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

/// What this CPU noted for a vCPU, if that is the one it noted. Preemption is off.
///
/// The kernel crate has no per-CPU variables; this is what C's this_cpu_read() compiles to.
#[inline(always)]
fn noted(vcpu: usize) -> Option<usize> {
    let (key, value): (usize, usize);
    // SAFETY: The shim's variable is one of each CPU, at this offset of GS; these
    // instructions read its two words and touch nothing else.
    unsafe {
        asm!(
            "mov {key}, gs:[rip + {note}]",
            "mov {value}, gs:[rip + {note} + 8]",
            key = out(reg) key,
            value = out(reg) value,
            note = sym bindings::exitmeter_note,
            options(nostack, readonly, preserves_flags),
        )
    };
    (key == vcpu).then_some(value)
}

/// Has this CPU note a value for a vCPU. Preemption is off.
#[inline(always)]
pub(crate) fn note(vcpu: Vcpu<'_>, value: usize) {
    // SAFETY: As in `noted`. The value comes first: a key is never seen with the value of
    // another, not by the CPU itself, as no callback interrupts one.
    unsafe {
        asm!(
            "mov gs:[rip + {note} + 8], {value}",
            "mov gs:[rip + {note}], {key}",
            key = in(reg) vcpu.key(),
            value = in(reg) value,
            note = sym bindings::exitmeter_note,
            options(nostack, preserves_flags),
        )
    };
}

/// Has no CPU note a vCPU, which runs nowhere any more.
pub(crate) fn forget(vcpu: Vcpu<'_>) {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_forget(vcpu.key() as c_ulong) };
}

/// The TSC now.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: Every x86-64 CPU has RDTSC, and the kernel may use it.
    unsafe { _rdtsc() }
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

    /// What this CPU noted for it, by [`note`]. The callbacks run with preemption off.
    #[inline(always)]
    pub(crate) fn noted(&self) -> Option<usize> {
        noted(self.key())
    }

    /// Whether it has never been on a CPU: its first load, and nothing later, finds it so.
    ///
    /// But for a trust domain's vCPU, which is so again when its CPU goes offline or its VM ends.
    pub(crate) fn is_new(&self) -> bool {
        let vcpu = self.0.get();
        // SAFETY: The vCPU lives; who writes the field writes it whole.
        unsafe { (&raw const (*vcpu).cpu).read_volatile() == -1 }
    }

    /// Whether it runs, or has just left, a guest of its guest: an L2.
    #[inline(always)]
    pub(crate) fn runs_nested(&self) -> bool {
        // SAFETY: The vCPU is held by this thread, which alone writes the flags.
        let flags = unsafe { (*self.0.get()).arch.hflags };
        flags & bindings::HF_GUEST_MASK != 0
    }

    /// Whose this vCPU is. `None` for a vCPU whose exit reason the host cannot read, as
    /// that of a trust domain, whose state the TDX module keeps.
    pub(crate) fn owner(&self) -> Option<Owner> {
        let vcpu = self.0.get();
        // SAFETY: KVM sets `kvm` before the first event of a vCPU and keeps the VM at
        // least as long as the vCPU.
        let (kvm, vcpu_id) = unsafe { ((*vcpu).kvm, (*vcpu).vcpu_id) };
        // SAFETY: As above; these fields are written when the VM is made, not later.
        let (vm_type, pid, stats_id) =
            unsafe { ((*kvm).arch.vm_type, (*kvm).userspace_pid, (*kvm).stats_id) };
        if u32::from(vm_type) == bindings::KVM_X86_TDX_VM {
            return None;
        }
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

    /// The phase that begins when this vCPU leaves its CPU, from what
    /// `kvm_sched_out()` noted before it called `kvm_arch_vcpu_put()`.
    #[inline]
    fn phase_after_put(&self) -> Phase {
        let vcpu = self.0.get();
        // SAFETY: The vCPU lives; other CPUs only read these two fields.
        let (out, preempted) = unsafe {
            (
                (&raw const (*vcpu).scheduled_out).read_volatile(),
                (&raw const (*vcpu).preempted).read_volatile(),
            )
        };
        match (out, preempted) {
            (false, _) => Phase::User,
            (true, true) => Phase::Preempted,
            (true, false) => Phase::Blocked,
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

    /// Whether KVM has queued a general protection fault for the guest.
    fn fault_is_pending(&self) -> bool {
        // SAFETY: The vCPU is held by this thread.
        let exception = unsafe { &raw const (*self.0.get()).arch.exception };
        // SAFETY: As above.
        unsafe { (*exception).pending && (*exception).vector == GP_VECTOR }
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

/// Probe of kvm:kvm_exit on VMX. Runs with interrupts off, on the vCPU's CPU.
///
/// # Safety
///
/// For the tracepoint alone.
unsafe extern "C" fn on_exit_vmx(_data: *mut c_void, vcpu: *mut bindings::kvm_vcpu, _isa: u32) {
    if !parts::CALLBACKS {
        return;
    }
    let now = now();
    // The field's number stays where VMREAD fails, as it does with no VMCS: no basic exit
    // reason is as large, so the exit is counted among "other".
    let mut reason = VMCS_EXIT_REASON;
    // SAFETY: KVM fires the tracepoint between exit and entry with the vCPU's VMCS
    // loaded; VMREAD reads it, and touches but the operand and the flags.
    unsafe { asm!("vmread {0}, {0}", inlateout(reg) reason, options(nostack, nomem)) };
    // SAFETY: KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    // The basic exit reason is the low half; the rest tells of failed entries and SMM.
    registry::exit(vcpu, now, Isa::Vmx, reason as u32 & 0xffff);
}

/// Probe of kvm:kvm_exit on SVM. Runs with interrupts off, on the vCPU's CPU.
///
/// # Safety
///
/// For the tracepoint alone.
unsafe extern "C" fn on_exit_svm(_data: *mut c_void, vcpu: *mut bindings::kvm_vcpu, _isa: u32) {
    if !parts::CALLBACKS {
        return;
    }
    let now = now();
    // SAFETY: The vCPU has just taken an exit on this CPU.
    let code = unsafe { bindings::exitmeter_svm_exit_code(vcpu) };
    // SAFETY: KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    registry::exit(vcpu, now, Isa::Svm, code);
}

/// Probe of kvm:kvm_entry. Runs with interrupts off, on the vCPU's CPU.
///
/// # Safety
///
/// For the tracepoint alone.
unsafe extern "C" fn on_entry(_data: *mut c_void, vcpu: *mut bindings::kvm_vcpu, _force: bool) {
    if !parts::CALLBACKS {
        return;
    }
    // SAFETY: KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    registry::entry(vcpu, now());
}

/// Probes on the two tracepoints of KVM.
pub(crate) struct Tracepoints {
    exit: bindings::exitmeter_exit_probe,
}

impl Tracepoints {
    /// Begins to see every exit and entry. The registry has to be published for as long as
    /// this lives.
    pub(crate) fn attach(isa: Isa) -> Result<Self> {
        let exit: bindings::exitmeter_exit_probe = match isa {
            Isa::Vmx => Some(on_exit_vmx),
            Isa::Svm => Some(on_exit_svm),
        };
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
        Self::attach(c"kvm:kvm_arch_vcpu_load", on_load, false)
    }

    /// Hooks `kvm_arch_vcpu_put()`: a vCPU thread leaves its CPU.
    pub(crate) fn vcpu_put() -> impl PinInit<Self, Error> {
        Self::attach(c"kvm:kvm_arch_vcpu_put", on_put, false)
    }

    /// Hooks `kvm_mmu_destroy()`: a vCPU ends.
    ///
    /// Not `kvm_arch_vcpu_destroy()`, which calls this last of all: in between VMX loads
    /// and puts the vCPU once more, to free what it keeps for nested guests. A vCPU let go
    /// before that would be taken in again, and its ledger would outlive it.
    pub(crate) fn vcpu_destroy() -> impl PinInit<Self, Error> {
        Self::attach(c"kvm:kvm_mmu_destroy", on_destroy, false)
    }

    fn attach(
        name: &'static CStr,
        callback: Callback,
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
                    bindings::exitmeter_attach_function(slot, name.as_char_ptr(), redirect)
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
    if !parts::CALLBACKS {
        return;
    }
    // SAFETY: By the contract of this function.
    let vcpu = unsafe { hooked(fregs) };
    registry::resume(vcpu, now());
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
    if !parts::CALLBACKS {
        return;
    }
    // SAFETY: By the contract of this function.
    let vcpu = unsafe { hooked(fregs) };
    registry::leave(vcpu, now(), vcpu.phase_after_put());
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

/// KVM's own `kvm_emulate_cpuid()`; set while the redirect is in place.
static EMULATE_CPUID: AtomicUsize = AtomicUsize::new(0);

/// Finds KVM's own `kvm_emulate_cpuid()`, and hooks it to answer for our leaves. The registry
/// has to be published for as long as this lives.
pub(crate) fn redirect_cpuid() -> Result<Pin<KBox<Function>>> {
    let name = c"kvm:kvm_emulate_cpuid";
    // SAFETY: The name ends with a NUL.
    let function = unsafe { bindings::exitmeter_find_function(name.as_char_ptr()) };
    let like = emulate_cpuid as unsafe extern "C" fn(_) -> _ as usize as c_ulong;
    // SAFETY: Any address may be asked for; ours is of the type that `emulate_cpuid` calls it as.
    if function == 0 || !unsafe { bindings::exitmeter_may_call(function, like) } {
        pr_err!("function kvm_emulate_cpuid not found in kvm.ko, or not callable\n");
        return Err(ENOENT);
    }
    EMULATE_CPUID.store(function as usize, Ordering::Relaxed);
    KBox::try_pin_init(
        Function::attach(c"kvm:kvm_emulate_cpuid", on_cpuid, true),
        GFP_KERNEL,
    )
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
    let ours = |registry: &Registry| registry.leaves().is_ours(vcpu.register(RAX));
    if !registry().is_some_and(ours) {
        return;
    }
    // SAFETY: Any address may be asked for.
    if unsafe { bindings::exitmeter_is_own_text(parent) } {
        // The replacement calls the original: let it through.
        return;
    }
    // SAFETY: ftrace lets a redirect write the address to go on at.
    unsafe {
        (*fregs.cast::<bindings::__arch_ftrace_regs>()).regs.ip =
            emulate_cpuid as unsafe extern "C" fn(_) -> _ as usize as c_ulong;
    }
}

/// Stands in for `kvm_emulate_cpuid()` when the guest asks for one of our leaves: lets
/// KVM emulate the instruction, then puts our answer in place of KVM's.
///
/// # Safety
///
/// For `on_cpuid` alone, in place of the call that KVM made.
unsafe extern "C" fn emulate_cpuid(vcpu: *mut bindings::kvm_vcpu) -> c_int {
    type EmulateCpuid = unsafe extern "C" fn(*mut bindings::kvm_vcpu) -> c_int;

    // SAFETY: The redirect is in place, so the address is set, and the registry and
    // kvm.ko stay until no task is in here any more: KVM sleeps nowhere in the original, so
    // unregistering, which waits for RCU-tasks, waits for it. KVM holds the vCPU.
    let (original, guest) = unsafe {
        (
            core::mem::transmute::<usize, EmulateCpuid>(EMULATE_CPUID.load(Ordering::Relaxed)),
            Vcpu::from_raw(vcpu),
        )
    };
    let (leaf, subleaf) = (guest.register(RAX), guest.register(RCX));
    // SAFETY: KVM's own function with KVM's own argument, in KVM's own context.
    let ret = unsafe { original(vcpu) };
    // CPUID faulting: KVM has queued a fault instead of emulating. No fault can have
    // been queued before, as KVM injects it at the entry that led to this exit.
    if guest.fault_is_pending() {
        return ret;
    }
    if let Some(answer) = registry().and_then(|it| cpuid::answer(it, guest, leaf, subleaf)) {
        guest.write_answer(answer);
    }
    ret
}

/// KVM's reader of SVM's exit codes, found in kvm_amd.
pub(crate) struct SvmExitCode(());

impl SvmExitCode {
    /// Finds the reader, and finds it anew whenever kvm_amd is loaded again.
    fn attach() -> Result<Self> {
        // SAFETY: Called once, by `Vendor::attach`.
        to_result(unsafe { bindings::exitmeter_attach_svm() }).inspect_err(|error| {
            if *error == ENOENT {
                pr_err!("function svm_get_exit_info not found in kvm_amd: nothing else tells why a guest exits\n");
            } else if *error == ENOEXEC {
                pr_err!("function svm_get_exit_info of kvm_amd cannot be called: IBT takes an ENDBR, and CFI the type that it is called as\n");
            } else {
                pr_err!("loads of kvm_amd cannot be watched ({:?})\n", error);
            }
        })?;
        Ok(Self(()))
    }
}

impl Drop for SvmExitCode {
    fn drop(&mut self) {
        // SAFETY: Attached when this was made; the tracepoints are detached before.
        unsafe { bindings::exitmeter_detach_svm() };
    }
}

/// The vendor's half of KVM, checked when the meter is loaded.
pub(crate) struct Vendor {
    isa: Isa,
    _svm: Option<SvmExitCode>,
}

impl Vendor {
    /// Checks the CPU, and that its vendor module is loaded.
    pub(crate) fn attach() -> Result<Self> {
        // SAFETY: No requirements.
        match unsafe { bindings::exitmeter_vendor() } {
            bindings::exitmeter_vendor_EXITMETER_VENDOR_VMX => {
                demand_loaded("kvm_intel", c"kvm_intel:cleanup_module")?;
                Ok(Self {
                    isa: Isa::Vmx,
                    _svm: None,
                })
            }
            bindings::exitmeter_vendor_EXITMETER_VENDOR_SVM => {
                demand_loaded("kvm_amd", c"kvm_amd:cleanup_module")?;
                Ok(Self {
                    isa: Isa::Svm,
                    _svm: Some(SvmExitCode::attach()?),
                })
            }
            _ => {
                pr_err!("this CPU has neither VT-x nor SVM\n");
                Err(ENODEV)
            }
        }
    }

    /// Which numbers this host's exit reasons are.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }
}

/// Demands that a module of KVM's is loaded, and tells that from a function that is not in it: by
/// the function that unloads it, which has the same name in every module.
fn demand_loaded(module: &str, unload: &'static CStr) -> Result {
    // SAFETY: The name ends with a NUL. The address is not used.
    if unsafe { bindings::exitmeter_find_function(unload.as_char_ptr()) } == 0 {
        pr_err!("{module} is not loaded: run 'modprobe {module}' first\n");
        return Err(ENODEV);
    }
    Ok(())
}

/// The host's TSC: its rate in kHz, and whether the kernel trusts it.
pub(crate) fn clock() -> (u32, bool) {
    // SAFETY: No requirements.
    unsafe {
        (
            bindings::exitmeter_tsc_khz(),
            !bindings::exitmeter_tsc_unstable(),
        )
    }
}

/// The TSC now, for a time stamp.
pub(crate) fn timestamp() -> u64 {
    now()
}

/// Whether one more line about a query may go to the kernel log.
pub(crate) fn log_allowed() -> bool {
    // SAFETY: No requirements.
    unsafe { bindings::exitmeter_log_allowed() }
}

/// The node in /dev, readable by root and by the group that udev gives it.
///
/// The kernel crate's own registration leaves the mode at 0600, hence this one; the file
/// operations are the kernel crate's.
#[pin_data(PinnedDrop)]
pub(crate) struct Node {
    #[pin]
    device: Opaque<kernel_bindings::miscdevice>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: A misc device may be deregistered from any thread.
unsafe impl Send for Node {}
// SAFETY: A shared reference to a registration allows nothing.
unsafe impl Sync for Node {}

impl Node {
    /// Makes the node `/dev/<name>`.
    pub(crate) fn register<T: MiscDevice>(
        name: &'static CStr,
        mode: u16,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            device <- Opaque::try_ffi_init(move |slot: *mut kernel_bindings::miscdevice| {
                let mut device = MiscDeviceOptions { name }.into_raw::<T>();
                device.mode = mode;
                // SAFETY: The slot is ours to write.
                unsafe { slot.write(device) };
                // SAFETY: Just written; it stays in place and is deregistered in `drop`.
                to_result(unsafe { kernel_bindings::misc_register(slot) })
                    .inspect_err(|_| pr_err!("/dev/exitmeter cannot be made\n"))
            }),
            _pin: PhantomPinned,
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Node {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered when this was made. Open files pin the module.
        unsafe { kernel_bindings::misc_deregister(self.device.get()) };
    }
}
