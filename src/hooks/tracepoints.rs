// SPDX-License-Identifier: GPL-2.0

//! The probes of KVM's tracepoints kvm_exit and kvm_entry.
//!
//! They run with interrupts off, on the vCPU's CPU.

use core::{
    mem::MaybeUninit,
    ptr::null_mut, //
};

use kernel::{
    error::to_result,
    prelude::*, //
};

use crate::{
    bindings,
    kvm::{
        exit::{
            ExitByKvm,
            VmxExit, //
        },
        vcpu::Vcpu,
        vendor::ExitSource, //
    },
    linux::clock,
    meter::{
        ablation,
        reasons::Isa, //
    },
    registry::transitions, //
};

/// Probe of kvm:kvm_exit on VMX. `RING` is true if vCPUs with details have rings of their latest exits.
///
/// # Safety
///
/// Only the tracepoint may call this.
unsafe extern "C" fn on_exit_vmx<const RING: bool>(
    _data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    if !ablation::CALLBACKS {
        return;
    }
    // SAFETY: KVM holds the vCPU, on this thread.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    transitions::exit::<RING, _>(vcpu, clock::now(), Isa::Vmx, |vcpu| {
        // SAFETY: This is the probe, and the vCPU is its own.
        unsafe { VmxExit::new(vcpu) }
    });
}

/// Probe of kvm:kvm_exit on VMX under Hyper-V, whose enlightened VMCS is ordinary memory: with it
/// VMREAD is "unsupported and can result in unexpected behavior" (TLFS, "Enlightened VMCS").
///
/// KVM's own reader takes the reason from `vcpu_vt.exit_reason`, which `vmx_vcpu_enter_exit()` has
/// just set, and reads through the enlightened VMCS where there is one.
///
/// # Safety
///
/// Only the tracepoint may call this.
unsafe extern "C" fn on_exit_vmx_by_kvm<const RING: bool>(
    _data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    // SAFETY: By the contract of this function.
    unsafe { record_exit_by_kvm::<RING, false>(vcpu) };
}

/// Probe of kvm:kvm_exit on SVM.
///
/// # Safety
///
/// Only the tracepoint may call this.
unsafe extern "C" fn on_exit_svm<const RING: bool>(
    _data: *mut c_void,
    vcpu: *mut bindings::kvm_vcpu,
    _isa: u32,
) {
    // SAFETY: By the contract of this function.
    unsafe { record_exit_by_kvm::<RING, true>(vcpu) };
}

/// Record an exit that KVM's own reader reads. `SVM` is true on AMD.
///
/// # Safety
///
/// Only probes of kvm:kvm_exit may call this, with the vCPU that KVM passes.
#[inline(always)]
unsafe fn record_exit_by_kvm<const RING: bool, const SVM: bool>(vcpu: *mut bindings::kvm_vcpu) {
    if !ablation::CALLBACKS {
        return;
    }
    let now = clock::now();
    // SAFETY: By the contract of this function; KVM holds the vCPU, on this thread.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    let mut room = MaybeUninit::uninit();
    // SAFETY: By the contract of this function.
    let exit = unsafe { ExitByKvm::<SVM>::read(vcpu, &mut room) };
    let isa = match SVM {
        true => Isa::Svm,
        false => Isa::Vmx,
    };
    transitions::exit::<RING, _>(vcpu, now, isa, |_| exit);
}

/// Probe of kvm:kvm_entry.
///
/// # Safety
///
/// Only the tracepoint may call this.
unsafe extern "C" fn on_entry(_data: *mut c_void, vcpu: *mut bindings::kvm_vcpu, _force: u8) {
    if !ablation::CALLBACKS {
        return;
    }
    // SAFETY: KVM holds the vCPU, on this thread.
    let vcpu = unsafe { Vcpu::from_raw(vcpu) };
    transitions::entry(vcpu, clock::now());
}

/// Probes on the two tracepoints.
pub(crate) struct Tracepoints {
    exit: bindings::exitmeter_exit_probe,
}

impl Tracepoints {
    /// Attach the probes. `ring` is true if vCPUs with details have rings of their latest exits.
    ///
    /// The registry must be published, and the reader of exits attached, for as long as this lives.
    pub(crate) fn attach(source: ExitSource, ring: bool) -> Result<Self> {
        // Not in a small function of its own: rustc would let other crates inline that, and so compile all
        // that the probes call for outside callers, which makes the path of an exit longer.
        let exit: bindings::exitmeter_exit_probe = match (source, ring) {
            (ExitSource::Vmcs, false) => Some(on_exit_vmx::<false>),
            (ExitSource::Vmcs, true) => Some(on_exit_vmx::<true>),
            (ExitSource::EnlightenedVmcs, false) => Some(on_exit_vmx_by_kvm::<false>),
            (ExitSource::EnlightenedVmcs, true) => Some(on_exit_vmx_by_kvm::<true>),
            (ExitSource::Vmcb, false) => Some(on_exit_svm::<false>),
            (ExitSource::Vmcb, true) => Some(on_exit_svm::<true>),
        };
        // Entries are attached first, and detached last in `drop`: the entry after a counted exit is seen
        // too, so each exit has its sample.
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
