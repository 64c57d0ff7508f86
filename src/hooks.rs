// SPDX-License-Identifier: GPL-2.0

//! The hooks into KVM, and the only room that names C.
//!
//! Everything here is either a registration that undoes itself when it is dropped,
//! a callback that turns C's pointers into safe values and calls one safe method,
//! or a safe reader of what KVM holds.

use core::{
    marker::PhantomPinned,
    mem::MaybeUninit,
    ptr::null_mut,
    sync::atomic::{
        AtomicUsize,
        Ordering, //
    },
};

use kernel::{
    error::to_result,
    prelude::*,
    types::Opaque, //
};

use crate::{
    bindings, cpuid,
    kvm::{
        exit::{
            ExitByKvm,
            VmxExit, //
        },
        vcpu::{
            Vcpu,
            RAX,
            RCX, //
        },
        vendor::ExitSource, //
    },
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
        leaves::Leaves,
        parts,
        reasons::Isa, //
    },
    registry::{
        published,
        transitions, //
    },
};

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
    transitions::exit::<RING, _>(vcpu, clock::now(), Isa::Vmx, |vcpu| {
        // SAFETY: This is the probe, and the vCPU is its own.
        unsafe { VmxExit::new(vcpu) }
    });
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
    // SAFETY: This is the probe, and the vCPU is its own.
    let exit = unsafe { ExitByKvm::<false>::read(vcpu, &mut room) };
    transitions::exit::<RING, _>(vcpu, now, Isa::Vmx, |_| exit);
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
    // SAFETY: This is the probe, and the vCPU is its own.
    let exit = unsafe { ExitByKvm::<true>::read(vcpu, &mut room) };
    transitions::exit::<RING, _>(vcpu, now, Isa::Svm, |_| exit);
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
    transitions::entry(vcpu, clock::now());
}

/// Probes on the two tracepoints of KVM.
pub(crate) struct Tracepoints {
    exit: bindings::exitmeter_exit_probe,
}

impl Tracepoints {
    /// Begins to see every exit and entry. The registry has to be published for as long as
    /// this lives, and the reader of exits attached.
    pub(crate) fn attach(source: ExitSource, ring: bool) -> Result<Self> {
        let exit: bindings::exitmeter_exit_probe = match (source, ring) {
            (ExitSource::Vmcs, false) => Some(on_exit_vmx::<false>),
            (ExitSource::Vmcs, true) => Some(on_exit_vmx::<true>),
            (ExitSource::EnlightenedVmcs, false) => Some(on_exit_vmx_by_kvm::<false>),
            (ExitSource::EnlightenedVmcs, true) => Some(on_exit_vmx_by_kvm::<true>),
            (ExitSource::Vmcb, false) => Some(on_exit_svm::<false>),
            (ExitSource::Vmcb, true) => Some(on_exit_svm::<true>),
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
    unsafe { exitmeter_load(hooked(fregs).as_raw()) };
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
    transitions::resume(vcpu, clock::now());
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
    unsafe { exitmeter_put(hooked(fregs).as_raw()) };
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
    transitions::leave_to_user(vcpu, now);
}

/// Take the way off its CPU of a vCPU that the scheduler takes off it. Apart, so that the way to
/// user space saves no registers for this.
#[inline(never)]
fn leave_scheduled_out(vcpu: Vcpu<'_>, now: u64) {
    transitions::leave(vcpu, now, vcpu.phase_scheduled_out());
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
    if let Some(registry) = published() {
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
    if let Some(registry) = published() {
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
    if published().is_none_or(|registry| registry.leaves().classify(leaf).is_none()) {
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
        published().and_then(|it| cpuid::answer(it, guest, leaf, subleaf, at_cpl_0))
    {
        guest.write_answer(answer);
    }
    ret
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
pub(crate) fn demand_prototypes() -> Result {
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
    if let Some(registry) = published() {
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
