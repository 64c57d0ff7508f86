// SPDX-License-Identifier: GPL-2.0

//! The hooks at a vCPU's creation, load, put and end.

use kernel::prelude::*;

use super::{
    functions::{
        hooked,
        Function, //
    },
    places::{
        close,
        wait_for_none,
        Inside,
        IN_CREATION, //
    },
};
use crate::{
    bindings,
    kvm::vcpu::Vcpu,
    linux::{
        clock,
        task, //
    },
    meter::ablation,
    registry::{
        published,
        transitions, //
    },
};

/// Hook `kvm_arch_vcpu_load()`: a vCPU's thread loads it on a CPU.
pub(crate) fn load() -> impl PinInit<Function, Error> {
    Function::attach(
        c"kvm:kvm_arch_vcpu_load",
        on_load,
        bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_LOAD,
        false,
    )
}

/// # Safety
///
/// Only ftrace may call this, as a callback for `kvm_arch_vcpu_load()`.
unsafe extern "C" fn on_load(
    _ip: c_ulong,
    _parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // SAFETY: By the contract of this function.
    unsafe { exitmeter_load(hooked(fregs).as_raw()) };
}

/// Record that a vCPU's thread loads it on a CPU.
///
/// # Safety
///
/// Only [`on_load`] and the trampoline of `kvm_arch_vcpu_load()` may call this (src/trampolines.S).
#[no_mangle]
unsafe extern "C" fn exitmeter_load(vcpu: *mut bindings::kvm_vcpu) {
    if !ablation::CALLBACKS {
        return;
    }
    // SAFETY: By the contract of this function; KVM holds the vCPU.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    transitions::resume(vcpu, clock::now());
}

/// Hook `kvm_arch_vcpu_put()`: a vCPU leaves its CPU.
pub(crate) fn put() -> impl PinInit<Function, Error> {
    Function::attach(
        c"kvm:kvm_arch_vcpu_put",
        on_put,
        bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_PUT,
        false,
    )
}

/// # Safety
///
/// Only ftrace may call this, as a callback for `kvm_arch_vcpu_put()`.
unsafe extern "C" fn on_put(
    _ip: c_ulong,
    _parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // SAFETY: By the contract of this function.
    unsafe { exitmeter_put(hooked(fregs).as_raw()) };
}

/// Record that a vCPU leaves its CPU.
///
/// # Safety
///
/// Only [`on_put`] and the trampoline of `kvm_arch_vcpu_put()` may call this (src/trampolines.S).
#[no_mangle]
unsafe extern "C" fn exitmeter_put(vcpu: *mut bindings::kvm_vcpu) {
    if !ablation::CALLBACKS {
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

/// Record that the scheduler takes a vCPU off its CPU. Not inlined, so that the path to user space saves no
/// registers for this.
#[inline(never)]
fn leave_scheduled_out(vcpu: Vcpu<'_>, now: u64) {
    transitions::leave(vcpu, now, vcpu.phase_scheduled_out());
}

/// Hook `kvm_mmu_destroy()`: a vCPU ends.
///
/// Not `kvm_arch_vcpu_destroy()`, which calls this last. Before that, VMX loads and puts the vCPU once more,
/// to free its state for nested guests: a vCPU that was removed earlier would be added again, and its ledger
/// would outlive it.
pub(crate) fn destroy() -> impl PinInit<Function, Error> {
    Function::attach(
        c"kvm:kvm_mmu_destroy",
        on_destroy,
        bindings::exitmeter_trampoline_EXITMETER_TRAMPOLINE_NONE,
        false,
    )
}

/// # Safety
///
/// Only ftrace may call this, as a callback for `kvm_mmu_destroy()`.
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

/// The hook at a vCPU's creation.
///
/// The fields are dropped in this order: the callback may sleep below ftrace's trampoline, so no task may be
/// in it when the trampoline is freed.
pub(crate) struct CreationHook {
    _gate: CreationGate,
    _function: Pin<KBox<Function>>,
}

/// Gate that lets tasks into the callback. Dropping it closes the gate, and waits for the tasks inside.
struct CreationGate;

impl Drop for CreationGate {
    fn drop(&mut self) {
        close(IN_CREATION, true);
        wait_for_none(IN_CREATION, "kvm_create_lapic", "memory is there");
    }
}

impl CreationHook {
    /// Hook `kvm_create_lapic()`: KVM creates a vCPU, and has created its MMU.
    ///
    /// From there on each vCPU reaches `kvm_mmu_destroy()`, even if its creation fails
    /// (`kvm_arch_vcpu_create()`, Linux 7.3). The registry must be published for as long as this lives.
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

/// # Safety
///
/// Only ftrace may call this, as a callback for `kvm_create_lapic()`.
unsafe extern "C" fn on_create(
    _ip: c_ulong,
    _parent: c_ulong,
    _ops: *mut bindings::ftrace_ops,
    fregs: *mut bindings::ftrace_regs,
) {
    // If the function has another user, ftrace calls both with preemption off. The vCPU is then added at its
    // first event, if there is memory without sleeping.
    if !task::may_sleep() {
        return;
    }
    let Some(_inside) = Inside::try_enter(IN_CREATION) else {
        return;
    };
    // SAFETY: By the contract of this function.
    let vcpu = unsafe { hooked(fregs) };
    if let Some(registry) = published() {
        registry.register_new(vcpu);
    }
}
