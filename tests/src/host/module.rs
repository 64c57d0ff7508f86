// SPDX-License-Identifier: GPL-2.0

//! The module under test, and KVM's modules under it.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    path::Path,
    process::Command,
};

use anyhow::{ensure, Context as _, Result};

use super::pick;

/// Where the module is.
pub const FILE: &str = "/root/exitmeter.ko";

/// Loads the module with parameters, as insmod takes them.
///
/// # Errors
///
/// The kernel's own error.
pub fn try_load(parameters: &str) -> io::Result<()> {
    try_load_file(Path::new(FILE), parameters)
}

/// Loads another module from a file.
///
/// # Errors
///
/// The kernel's own error.
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

/// Loads the module.
pub fn load(parameters: &str) -> Result<()> {
    try_load(parameters).with_context(|| format!("exitmeter.ko ({parameters}) does not load"))
}

/// Unloads the module.
pub fn unload() -> Result<()> {
    remove("exitmeter")
}

/// Whether a module is loaded.
pub fn is_loaded(name: &str) -> Result<bool> {
    let modules = fs::read_to_string("/proc/modules").context("/proc/modules cannot be read")?;
    Ok(modules
        .lines()
        .any(|line| line.split(' ').next() == Some(name)))
}

/// The loaded module, unloaded when this is dropped.
#[derive(Debug)]
pub struct Loaded(());

impl Loaded {
    /// Loads the module.
    pub fn with(parameters: &str) -> Result<Self> {
        load(parameters)?;
        Ok(Self(()))
    }

    /// Unloads it.
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

/// The name of KVM's module for this host's vendor.
pub fn vendor() -> Result<&'static str> {
    pick("kvm_intel", "kvm_amd")
}

/// Loads KVM's module for this host's vendor, with or without nested paging.
pub fn load_vendor(nested_paging: bool) -> Result<()> {
    let parameter = format!("{}={}", pick("ept", "npt")?, u8::from(nested_paging));
    modprobe(&[vendor()?, &parameter])
}

/// Unloads KVM's module for this host's vendor; kvm.ko stays.
pub fn unload_vendor() -> Result<()> {
    remove(vendor()?)
}

/// Runs modprobe.
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

/// Unloads a module, and not what it depends on, as rmmod does.
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
