//! What the cases find in the emulated host: the module, KVM, the kernel's own counters,
//! its log, and a Linux guest.

pub mod hist;
pub mod linux;
pub mod log;
pub mod meter;
pub mod module;
pub mod span;
pub mod task;

use anyhow::{Context as _, Result};
use exitmeter_meter::reasons::Isa;

/// Which vendor's host this is.
pub fn isa() -> Result<Isa> {
    tiny_guests::host_isa().context("this host has neither VT-x nor SVM")
}

/// The number for this host's vendor, of one for VMX and one for SVM.
pub fn pick<T>(vmx: T, svm: T) -> Result<T> {
    Ok(match isa()? {
        Isa::Vmx => vmx,
        Isa::Svm => svm,
    })
}
