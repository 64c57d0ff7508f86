// SPDX-License-Identifier: GPL-2.0

//! Sets up what tests expect of a machine and the bare host lacks.

use std::{ffi::CStr, fs, path::Path};

use anyhow::{Context as _, Result};
use system_tests::host::mount;

/// File systems to mount: type and folder.
const MOUNTS: [(&CStr, &CStr); 2] = [(c"tmpfs", c"/dev/shm"), (c"cgroup2", c"/sys/fs/cgroup")];

/// Settings: file and value.
const SETTINGS: [(&str, &str); 4] = [
    ("/sys/fs/cgroup/cgroup.subtree_control", "+memory"),
    // Lets guests force emulation of instructions. Some tests test nothing else.
    ("/sys/module/kvm/parameters/force_emulation_prefix", "1"),
    // Huge pages also mean fewer faults for the same memory.
    ("/proc/sys/vm/nr_hugepages", "48"),
    (
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "always",
    ),
];

/// Mount the file systems and apply the settings.
pub fn set_up() -> Result<()> {
    for (kind, place) in MOUNTS {
        let folder = Path::new(place.to_str()?);
        if !folder.is_dir() {
            fs::create_dir(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        mount(kind, place)?;
    }
    for (path, value) in SETTINGS {
        fs::write(path, value).with_context(|| format!("cannot set {path}"))?;
    }
    Ok(())
}
