// SPDX-License-Identifier: GPL-2.0

//! Loading and unloading of the module under test, and of KVM's modules.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    path::Path,
    process::Command,
};

use anyhow::{ensure, Context as _, Result};

use super::by_vendor;

/// Path of the module in the host.
pub const FILE: &str = "/root/exitmeter.ko";

/// Load the module with parameters in insmod's syntax.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn try_load(parameters: &str) -> io::Result<()> {
    try_load_file(Path::new(FILE), parameters)
}

/// Load a module from a file, with parameters in insmod's syntax.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn try_load_file(file: &Path, parameters: &str) -> io::Result<()> {
    let file = File::open(file)?;
    let parameters = CString::new(parameters)?;
    // SAFETY: An open file and a string that ends with a NUL, which the kernel only reads.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    if ret == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Load the module.
pub fn load(parameters: &str) -> Result<()> {
    try_load(parameters).with_context(|| format!("exitmeter.ko ({parameters}) does not load"))
}

/// Unload the module.
pub fn unload() -> Result<()> {
    remove("exitmeter")
}

/// Return true if the module `name` is loaded.
pub fn is_loaded(name: &str) -> Result<bool> {
    let modules = fs::read_to_string("/proc/modules").context("/proc/modules cannot be read")?;
    Ok(modules
        .lines()
        .any(|line| line.split(' ').next() == Some(name)))
}

/// The loaded module; dropping this unloads it.
#[derive(Debug)]
pub struct Loaded(());

impl Loaded {
    /// Load the module.
    pub fn with(parameters: &str) -> Result<Self> {
        load(parameters)?;
        Ok(Self(()))
    }

    /// Unload the module.
    pub fn unload(self) -> Result<()> {
        std::mem::forget(self);
        unload()
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Err(error) = unload() {
            eprintln!("{error:#}");
        }
    }
}

/// Return the name of KVM's vendor module on this host.
pub fn vendor_module() -> Result<&'static str> {
    by_vendor("kvm_intel", "kvm_amd")
}

/// Load KVM's vendor module, with or without nested paging.
pub fn load_vendor_module(nested_paging: bool) -> Result<()> {
    let parameter = format!("{}={}", by_vendor("ept", "npt")?, u8::from(nested_paging));
    modprobe(&[vendor_module()?, &parameter])
}

/// Unload KVM's vendor module; kvm.ko stays.
pub fn unload_vendor_module() -> Result<()> {
    remove(vendor_module()?)
}

/// Run modprobe.
pub fn modprobe(arguments: &[&str]) -> Result<()> {
    let output = Command::new("modprobe")
        .args(arguments)
        .output()
        .context("modprobe cannot be run")?;
    ensure!(
        output.status.success(),
        "modprobe {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Unload a module but not its dependencies, as rmmod does.
pub fn remove(name: &str) -> Result<()> {
    let text = CString::new(name)?;
    // SAFETY: A string that ends with a NUL, which the kernel only reads.
    let ret = unsafe { libc::syscall(libc::SYS_delete_module, text.as_ptr(), libc::O_NONBLOCK) };
    if ret == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error()).with_context(|| format!("{name} does not unload"))
    }
}
