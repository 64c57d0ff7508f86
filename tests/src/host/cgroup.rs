//! A memory cgroup of this process's own.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{ensure, Context as _, Result};

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup. It stays when this goes, as its process is in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Make a cgroup, and move this process into it.
    ///
    /// # Errors
    ///
    /// Those of the kernel, as when it has no memory controller.
    pub fn of_this_process() -> Result<Self> {
        let controllers = format!("{ROOT}/cgroup.controllers");
        if fs::metadata(&controllers).is_err() {
            fs::create_dir_all(ROOT)?;
            let mounted = Command::new("mount")
                .args(["-t", "cgroup2", "cgroup2", ROOT])
                .status()?;
            ensure!(mounted.success(), "cgroup2 cannot be mounted at {ROOT}");
        }
        fs::write(format!("{ROOT}/cgroup.subtree_control"), "+memory")
            .context("this kernel has no memory controller")?;
        let pid = std::process::id();
        let path = PathBuf::from(format!("{ROOT}/exitmeter-{pid}"));
        fs::create_dir(&path)?;
        fs::write(path.join("cgroup.procs"), pid.to_string())?;
        Ok(Self { path })
    }

    /// Return the kernel's memory that is charged to the cgroup, in bytes.
    ///
    /// # Errors
    ///
    /// Those of the kernel.
    pub fn kernel_memory(&self) -> Result<u64> {
        let stat = fs::read_to_string(self.path.join("memory.stat"))?;
        let kernel = stat.lines().find_map(|line| line.strip_prefix("kernel "));
        kernel
            .and_then(|bytes| bytes.parse().ok())
            .context("memory.stat has no line for the kernel")
    }
}
