// SPDX-License-Identifier: GPL-2.0

//! What the cases find in the emulated host: the module, KVM, the kernel's own counters,
//! its log, and a Linux guest.

pub mod bpf;
pub mod cgroup;
pub mod faults;
pub mod hist;
pub mod keyed;
pub mod leaves;
pub mod linux;
pub mod log;
pub mod meanwhile;
pub mod meter;
pub mod module;
pub mod oracle;
pub mod span;
pub mod task;
pub mod text;

use std::{ffi::CStr, fs, io};

use anyhow::{Context as _, Result};
use exitmeter_meter::reasons::Isa;
use tiny_guests::{Config, Expected};

/// Mounts a file system that takes no data and no device.
pub fn mount(kind: &CStr, target: &CStr) -> Result<()> {
    // SAFETY: All strings end with a NUL; this file system takes no data.
    let mounted = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    match mounted {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error())
            .with_context(|| format!("{} cannot be mounted", kind.to_string_lossy())),
    }
}

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

/// Whether KVM uses the CPU's nested paging, EPT or NPT.
pub fn nested_paging() -> Result<bool> {
    let path = format!(
        "/sys/module/{}/parameters/{}",
        module::vendor()?,
        pick("ept", "npt")?
    );
    let value = fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
    Ok(value.trim() == "Y")
}

/// CPUs of this host that are online.
pub fn cpus() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get())
}

/// Function calls that other CPUs had a CPU make by an interrupt so far (CAL of /proc/interrupts).
pub fn function_calls(cpu: usize) -> Result<u64> {
    let table =
        fs::read_to_string("/proc/interrupts").context("/proc/interrupts cannot be read")?;
    let calls = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("CAL:"))
        .and_then(|counts| counts.split_whitespace().nth(cpu)?.parse().ok());
    calls.with_context(|| format!("/proc/interrupts has no count of CAL for CPU {cpu}"))
}

/// In a case's environment: how many times slower than the packaged kernel the host's is.
pub const SLOW: &str = "SLOW";

/// How many times slower than the packaged kernel the host's is. A guest has to do so much more
/// for its own work to be most of its life.
pub fn slow() -> u32 {
    let slow = std::env::var(SLOW).ok();
    slow.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// What a guest is known to cause under KVM as this host has it.
pub fn expected(config: &Config) -> Result<Expected> {
    let Config {
        program,
        mode,
        vcpus,
        ..
    } = *config;
    let expected = Expected::of(isa()?, program, mode, config.loops(), vcpus);
    Ok(match nested_paging()? {
        true => expected,
        false => expected.without_nested_paging(),
    })
}
