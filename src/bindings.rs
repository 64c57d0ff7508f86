// SPDX-License-Identifier: GPL-2.0

//! The generated bindings of KVM's and ftrace's types and of the shim.
//!
//! Only `hooks`, `kvm` and `linux` may use the bindings; everything else calls safe functions of these.
//! Kbuild makes them from `bindings/kvm.h` with the flags of the C compile.

#![allow(unknown_lints, reason = "compilers from 1.85 to 1.97 read this file")]
#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    rustdoc::all,
    unnecessary_transmutes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused_qualifications,
    reason = "generated code"
)]

use kernel::ffi;

include!(env!("EXITMETER_BINDINGS"));

/// Assert that bindgen's offsets and sizes equal those of the C compiler.
macro_rules! same_layout {
    ($($what:expr => $layout:ident),* $(,)?) => {
        $(kernel::prelude::static_assert!($what as u64 == $layout as u64);)*
    };
}

same_layout! {
    core::mem::offset_of!(kvm_vcpu, kvm) => LAYOUT_VCPU_KVM,
    core::mem::offset_of!(kvm_vcpu, cpu) => LAYOUT_VCPU_CPU,
    core::mem::offset_of!(kvm_vcpu, vcpu_id) => LAYOUT_VCPU_ID,
    core::mem::offset_of!(kvm_vcpu, preempted) => LAYOUT_VCPU_PREEMPTED,
    core::mem::offset_of!(kvm_vcpu, scheduled_out) => LAYOUT_VCPU_SCHEDULED_OUT,
    core::mem::offset_of!(kvm_vcpu, arch.hflags) => LAYOUT_VCPU_HFLAGS,
    core::mem::offset_of!(kvm_vcpu, arch.regs) => LAYOUT_VCPU_REGS,
    core::mem::offset_of!(kvm_vcpu, arch.exception) => LAYOUT_VCPU_EXCEPTION,
    core::mem::offset_of!(kvm_vcpu, arch.exception_vmexit) => LAYOUT_VCPU_EXCEPTION_VMEXIT,
    core::mem::offset_of!(kvm_vcpu, arch.guest_state_protected) => LAYOUT_VCPU_PROTECTED,
    core::mem::offset_of!(kvm_vcpu, run) => LAYOUT_VCPU_RUN,
    core::mem::offset_of!(kvm_vcpu, wants_to_run) => LAYOUT_VCPU_WANTS_TO_RUN,
    core::mem::offset_of!(kvm_queued_exception, pending) => LAYOUT_EXCEPTION_PENDING,
    core::mem::offset_of!(kvm_queued_exception, vector) => LAYOUT_EXCEPTION_VECTOR,
    core::mem::offset_of!(kvm_vcpu, stat.generic.halt_poll_success_ns) => LAYOUT_VCPU_POLL_SUCCESS,
    core::mem::offset_of!(kvm_vcpu, stat.generic.halt_poll_fail_ns) => LAYOUT_VCPU_POLL_FAIL,
    core::mem::offset_of!(kvm_vcpu, stat.generic.blocking) => LAYOUT_VCPU_BLOCKING,
    core::mem::size_of::<crate::meter::registry::platform::Retired>() => LAYOUT_RCU_HEAD_SIZE,
    core::mem::size_of::<kvm_vcpu>() => LAYOUT_VCPU_SIZE,
    core::mem::offset_of!(kvm, userspace_pid) => LAYOUT_KVM_PID,
    core::mem::offset_of!(kvm, stats_id) => LAYOUT_KVM_STATS_ID,
    core::mem::offset_of!(kvm, arch.vm_type) => LAYOUT_KVM_VM_TYPE,
    core::mem::size_of::<kvm>() => LAYOUT_KVM_SIZE,
    core::mem::offset_of!(ftrace_ops, func) => LAYOUT_OPS_FUNC,
    core::mem::size_of::<ftrace_ops>() => LAYOUT_OPS_SIZE,
    core::mem::offset_of!(__arch_ftrace_regs, regs.ip) => LAYOUT_FREGS_IP,
    core::mem::offset_of!(__arch_ftrace_regs, regs.di) => LAYOUT_FREGS_DI,
}
