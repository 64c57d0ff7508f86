// SPDX-License-Identifier: GPL-2.0

//! The vendor's half of KVM, kvm_intel or kvm_amd, and the source of its exit reasons.

use kernel::{
    error::to_result,
    prelude::*, //
};

use crate::{
    bindings,
    linux::symbols,
    meter::reasons::Isa, //
};

/// Source of an exit's reason.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum ExitSource {
    /// The VMCS, by VMREAD.
    Vmcs,
    /// An enlightened VMCS, by kvm_intel's own reader.
    EnlightenedVmcs,
    /// The VMCB, by kvm_amd's own reader.
    Vmcb,
}

/// The vendor's half of KVM.
#[derive(Clone, Copy)]
pub(crate) struct Vendor {
    vendor: bindings::exitmeter_vendor,
    source: ExitSource,
    module: &'static str,
}

impl Vendor {
    /// Detect the CPU's vendor, and check that KVM is a module and the vendor's half of it is loaded.
    pub(crate) fn detect() -> Result<Self> {
        // SAFETY: No requirements.
        let vendor = unsafe { bindings::exitmeter_vendor() };
        let (source, module, unload) = match vendor {
            bindings::exitmeter_vendor_EXITMETER_VENDOR_VMX => {
                // SAFETY: No requirements.
                let source = match unsafe { bindings::exitmeter_has_enlightened_vmcs() } {
                    true => ExitSource::EnlightenedVmcs,
                    false => ExitSource::Vmcs,
                };
                (source, "kvm_intel", c"kvm_intel:cleanup_module")
            }
            bindings::exitmeter_vendor_EXITMETER_VENDOR_SVM => {
                (ExitSource::Vmcb, "kvm_amd", c"kvm_amd:cleanup_module")
            }
            _ => {
                pr_err!("this CPU has neither VT-x nor SVM\n");
                return Err(ENODEV);
            }
        };
        check_is_module()?;
        check_is_loaded(module, unload)?;
        Ok(Self {
            vendor,
            source,
            module,
        })
    }

    /// Return the vendor, whose exit reasons this host's codes are.
    pub(crate) fn isa(&self) -> Isa {
        match self.source {
            ExitSource::Vmcs | ExitSource::EnlightenedVmcs => Isa::Vmx,
            ExitSource::Vmcb => Isa::Svm,
        }
    }

    /// Return the source of this host's exit reasons.
    pub(crate) fn exit_source(&self) -> ExitSource {
        self.source
    }
}

/// Check that KVM is a module. Then kallsyms has its functions under the module's name, and without that name
/// if KVM is a part of the kernel.
fn check_is_module() -> Result {
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

/// Check that a module of KVM is loaded, by the function that unloads it, which has the same name in every
/// module. So the error is not mistaken for a function that the module lacks.
fn check_is_loaded(module: &str, unload: &'static CStr) -> Result {
    if symbols::find(unload).is_none() {
        pr_err!("{module} is not loaded: run 'modprobe {module}' first\n");
        return Err(ENODEV);
    }
    Ok(())
}

/// KVM's own reader of exit codes, found in the vendor's module.
pub(crate) struct ExitReader(());

impl ExitReader {
    /// Find the reader, if this host's exits need one. The shim finds it again whenever the vendor's module
    /// is reloaded.
    pub(crate) fn attach(vendor: &Vendor) -> Result<Option<Self>> {
        match vendor.source {
            ExitSource::Vmcs => return Ok(None),
            ExitSource::EnlightenedVmcs => {
                pr_info!("this host runs under Hyper-V with an enlightened VMCS: exit reasons come from kvm_intel's own reader\n");
            }
            ExitSource::Vmcb => {}
        }
        let module = vendor.module;
        // SAFETY: Called once, by the module's init.
        to_result(unsafe { bindings::exitmeter_attach_reader(vendor.vendor) }).inspect_err(|error| {
            if *error == ENOENT {
                pr_err!("no reader of exit codes (get_exit_info) found in {module}: nothing else tells why a guest exits\n");
            } else if *error == ENOEXEC {
                pr_err!("the reader of exit codes (get_exit_info) of {module} cannot be called: IBT takes an ENDBR, and CFI the type that it is called as\n");
            } else {
                pr_err!("loads of {module} cannot be watched ({:?})\n", error);
            }
        })?;
        Ok(Some(Self(())))
    }
}

impl Drop for ExitReader {
    fn drop(&mut self) {
        // SAFETY: Attached when this was made; the tracepoints are detached before.
        unsafe { bindings::exitmeter_detach_reader() };
    }
}
