// SPDX-License-Identifier: GPL-2.0

//! Access to the emulated host: the module, KVM, the kernel's own counters, its log, and a Linux
//! guest.

pub mod bpf;
pub mod cgroup;
pub mod codes;
pub mod detail_oracle;
pub mod event_hist;
pub mod fault_injection;
pub mod held_command;
pub mod hist;
mod kallsyms;
pub mod leaves;
pub mod linux;
pub mod log;
pub mod meter;
pub mod module;
pub mod module_code;
pub mod span;
pub mod task;
pub mod tool;

use std::{ffi::CStr, fs, io};

use anyhow::{Context as _, Result};
use exitmeter_meter::reasons::Isa;
use tiny_guests::{Config, Expected};

/// Port whose OUT ends a tiny guest (guests/src/machine.rs).
pub const END_PORT: u64 = 0xf4;

/// Port of a tiny guest that its VMM answers.
pub const VMM_PORT: u64 = 0x3f0;

/// Exit reason of KVM_RUN for an access to a port (linux/kvm.h).
pub const KVM_EXIT_IO: u64 = 2;

/// Mount a file system that needs neither a device nor mount options.
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

/// Return the vendor whose virtualization extension this host has.
pub fn vendor() -> Result<Isa> {
    tiny_guests::host_isa().context("this host has neither VT-x nor SVM")
}

/// Return `vmx` on an Intel host and `svm` on an AMD host.
pub fn by_vendor<T>(vmx: T, svm: T) -> Result<T> {
    Ok(match vendor()? {
        Isa::Vmx => vmx,
        Isa::Svm => svm,
    })
}

/// Return true if KVM uses nested paging (EPT or NPT).
pub fn nested_paging() -> Result<bool> {
    let path = format!(
        "/sys/module/{}/parameters/{}",
        module::vendor_module()?,
        by_vendor("ept", "npt")?
    );
    let value = fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
    Ok(value.trim() == "Y")
}

/// Return the number of online CPUs.
pub fn cpus() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get())
}

/// Return the host's TSC.
pub fn tsc() -> u64 {
    // SAFETY: Each CPU with VT-x or SVM has a TSC, and user space may read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Return the number of function-call interrupts that `cpu` has taken (CAL in /proc/interrupts).
pub fn function_calls(cpu: usize) -> Result<u64> {
    let table =
        fs::read_to_string("/proc/interrupts").context("/proc/interrupts cannot be read")?;
    let calls = table
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("CAL:"))
        .and_then(|counts| counts.split_whitespace().nth(cpu)?.parse().ok());
    calls.with_context(|| format!("/proc/interrupts has no count of CAL for CPU {cpu}"))
}

/// Environment variable by which a case learns the factor that [`slowdown`] returns.
pub const SLOWDOWN: &str = "EXITMETER_SLOWDOWN";

/// Return how many times slower the host's kernel is than the packaged one. A guest's work is
/// multiplied by this, so that the work remains most of the guest's life.
pub fn slowdown() -> u32 {
    let slowdown = std::env::var(SLOWDOWN).ok();
    slowdown.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Return the exits that a guest causes under KVM as this host configures it.
pub fn expected(config: &Config) -> Result<Expected> {
    let Config {
        program,
        mode,
        vcpus,
        ..
    } = *config;
    let expected = Expected::of(vendor()?, program, mode, config.loops(), vcpus);
    Ok(match nested_paging()? {
        true => expected,
        false => expected.without_nested_paging(),
    })
}
