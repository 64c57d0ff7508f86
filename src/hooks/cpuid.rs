// SPDX-License-Identifier: GPL-2.0

//! The redirect of `kvm_emulate_cpuid()`, by which guests get their answers.

use core::sync::atomic::{
    AtomicUsize,
    Ordering, //
};

use kernel::prelude::*;

use super::{
    functions::{
        hooked,
        Function, //
    },
    places::{
        wait_for_none,
        Inside,
        IN_CPUID, //
    },
};
use crate::{
    answers,
    bindings,
    kvm::vcpu::{
        Vcpu,
        RAX,
        RCX, //
    },
    linux::symbols,
    meter::leaves::Leaves,
    parameters,
    registry::published, //
};

/// Address of KVM's own `kvm_emulate_cpuid()`. Set while the redirect is in place.
static EMULATE_CPUID: AtomicUsize = AtomicUsize::new(0);

/// The redirect. Its fields are dropped in this order.
pub(crate) struct CpuidRedirect {
    _function: Pin<KBox<Function>>,
    _asleep: AsleepInCpuid,
}

/// Guard for the tasks that the redirect sent to [`exitmeter_emulate_cpuid`]. Dropping it waits for all of
/// them; the redirect must be gone by then.
struct AsleepInCpuid;

impl Drop for AsleepInCpuid {
    fn drop(&mut self) {
        wait_for_none(IN_CPUID, "kvm_emulate_cpuid", "the guest's memory is there");
    }
}

impl CpuidRedirect {
    /// Find KVM's own `kvm_emulate_cpuid()`, and hook it. The registry must be published for as long as this
    /// lives.
    pub(crate) fn attach() -> Result<Self> {
        let name = c"kvm:kvm_emulate_cpuid";
        // Our function has the type by which it calls KVM's.
        let own = exitmeter_emulate_cpuid as unsafe extern "C" fn(_) -> _ as usize;
        let Some(function) = symbols::find(name).filter(|it| symbols::may_call(*it, own)) else {
            pr_err!("function kvm_emulate_cpuid not found in kvm.ko, or not callable\n");
            return Err(ENOENT);
        };
        EMULATE_CPUID.store(function, Ordering::Relaxed);
        let trampoline = bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_CPUID;
        let function = Function::attach(name, on_cpuid, trampoline, true);
        let function = KBox::try_pin_init(function, GFP_KERNEL)?;
        Ok(Self {
            _function: function,
            _asleep: AsleepInCpuid,
        })
    }
}

/// # Safety
///
/// Only ftrace may call this, as a callback for `kvm_emulate_cpuid()`.
unsafe extern "C" fn on_cpuid(
    _ip: c_ulong,
    parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // SAFETY: By the contract of this function.
    let vcpu = unsafe { hooked(fregs) };
    if Leaves::may_answer(vcpu.register(RAX)) && is_query(vcpu, parent) {
        // SAFETY: ftrace lets a redirect change the instruction pointer.
        unsafe {
            (*fregs.cast::<bindings::__arch_ftrace_regs>()).regs.ip =
                exitmeter_emulate_cpuid as unsafe extern "C" fn(_) -> _ as usize as c_ulong;
        }
    }
}

/// Return true if the trampoline must go on in [`exitmeter_emulate_cpuid`].
///
/// # Safety
///
/// Only the trampoline of `kvm_emulate_cpuid()` may call this (src/trampolines.S), for a leaf that passes its
/// test, the one of [`Leaves::may_answer`].
#[no_mangle]
unsafe extern "C" fn exitmeter_is_query(vcpu: *mut bindings::kvm_vcpu, parent: c_ulong) -> bool {
    // SAFETY: By the contract of this function; KVM holds the vCPU.
    is_query(unsafe { Vcpu::from_raw(vcpu) }, parent)
}

/// Return true if the guest asks for one of our leaves and has permission. `parent` is the address that
/// `kvm_emulate_cpuid()` returns to.
#[inline(never)]
fn is_query(vcpu: Vcpu<'_>, parent: c_ulong) -> bool {
    let leaf = vcpu.register(RAX);
    if published().is_none_or(|registry| registry.leaves().classify(leaf).is_none()) {
        return false;
    }
    // The replacement calls the original: let it through.
    if symbols::is_own_text(parent) {
        return false;
    }
    // KVM's own function has done nothing yet, so a guest without permission gets just what that does.
    !parameters::is_for_cpl_0_alone() || vcpu.is_at_cpl_0()
}

/// Emulate a CPUID that asks for one of our leaves, in place of `kvm_emulate_cpuid()`: let KVM emulate the
/// instruction, then put our answer in place of KVM's.
///
/// # Safety
///
/// Only [`on_cpuid`] and the trampoline (src/trampolines.S) may lead here, in place of the call that KVM
/// made.
#[no_mangle]
unsafe extern "C" fn exitmeter_emulate_cpuid(vcpu: *mut bindings::kvm_vcpu) -> c_int {
    type EmulateCpuid = unsafe extern "C" fn(*mut bindings::kvm_vcpu) -> c_int;

    // From here on, dropping `CpuidRedirect` waits for this task. Up to here the task does not sleep, so
    // ftrace waits for it.
    let _inside = Inside::enter(IN_CPUID);
    // SAFETY: The redirect was in place, so the address is set, and the registry and kvm.ko stay until no
    // task is in here any more. KVM holds the vCPU.
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
        published().and_then(|it| answers::answer(it, guest, leaf, subleaf, at_cpl_0))
    {
        guest.write_answer(answer);
    }
    ret
}
