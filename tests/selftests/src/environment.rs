// SPDX-License-Identifier: GPL-2.0

//! What tests expect of a machine, and the bare host does not have.

use std::{ffi::CStr, fs, io, path::Path};

use anyhow::{Context as _, Result};

/// File systems to mount: what, and where.
const MOUNTS: [(&CStr, &CStr); 2] = [(c"tmpfs", c"/dev/shm"), (c"cgroup2", c"/sys/fs/cgroup")];

/// Settings: which, and what they become.
const SETTINGS: [(&str, &str); 4] = [
    ("/sys/fs/cgroup/cgroup.subtree_control", "+memory"),
    // Guests may ask for instructions to be emulated: some tests are about that alone.
    ("/sys/module/kvm/parameters/force_emulation_prefix", "1"),
    // Huge pages, and with them fewer faults for the same memory.
    ("/proc/sys/vm/nr_hugepages", "48"),
    (
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "always",
    ),
];

/// Makes what is missing.
pub fn complete() -> Result<()> {
    for (kind, place) in MOUNTS {
        let folder = Path::new(place.to_str()?);
        if !folder.is_dir() {
            fs::create_dir(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        // SAFETY: All strings end with a NUL; these file systems do without data.
        let mounted = unsafe {
            let (kind, place) = (kind.as_ptr(), place.as_ptr());
            libc::mount(kind, place, kind, 0, std::ptr::null())
        };
        if mounted != 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("{} cannot be mounted", folder.display()));
        }
    }
    for (path, value) in SETTINGS {
        fs::write(path, value).with_context(|| format!("{path} cannot be set"))?;
    }
    Ok(())
}
