// SPDX-License-Identifier: GPL-2.0

//! Control groups: one that counts this process's memory, and the freezer.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};

const ROOT: &str = "/sys/fs/cgroup";

/// Mount the cgroup v2 hierarchy, unless it is mounted.
fn mount() -> Result<()> {
    if fs::metadata(format!("{ROOT}/cgroup.controllers")).is_err() {
        fs::create_dir_all(ROOT)?;
        let mounted = Command::new("mount")
            .args(["-t", "cgroup2", "cgroup2", ROOT])
            .status()?;
        ensure!(mounted.success(), "cgroup2 cannot be mounted at {ROOT}");
    }
    Ok(())
}

/// A process that is frozen; dropping this lets it continue.
#[derive(Debug)]
pub struct FrozenProcess {
    pid: u32,
}

impl FrozenProcess {
    /// Freeze a process.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn new(pid: u32) -> Result<Self> {
        mount()?;
        let frozen = Self { pid };
        fs::create_dir(frozen.path())?;
        fs::write(frozen.path().join("cgroup.procs"), pid.to_string())?;
        fs::write(frozen.path().join("cgroup.freeze"), "1")?;
        let end = Instant::now() + Duration::from_secs(10);
        while !fs::read_to_string(frozen.path().join("cgroup.events"))?.contains("frozen 1") {
            ensure!(Instant::now() < end, "process {pid} does not freeze");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(frozen)
    }

    /// Let the process continue.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error. The process may then still be frozen.
    pub fn thaw(self) -> Result<()> {
        let thawed = self.release();
        std::mem::forget(self);
        thawed
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("{ROOT}/frozen-{}", self.pid))
    }

    fn release(&self) -> Result<()> {
        let release = || {
            fs::write(self.path().join("cgroup.freeze"), "0")?;
            fs::write(format!("{ROOT}/cgroup.procs"), self.pid.to_string())?;
            fs::remove_dir(self.path())
        };
        release().with_context(|| format!("process {} does not leave its cgroup", self.pid))
    }
}

impl Drop for FrozenProcess {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            eprintln!("{error:#}");
        }
    }
}

/// A cgroup. It outlives this value because its process is still in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Create a cgroup and move this process into it.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error, for example when it has no memory controller.
    pub fn of_this_process() -> Result<Self> {
        mount()?;
        fs::write(format!("{ROOT}/cgroup.subtree_control"), "+memory")
            .context("this kernel has no memory controller")?;
        let pid = std::process::id();
        let path = PathBuf::from(format!("{ROOT}/exitmeter-{pid}"));
        fs::create_dir(&path)?;
        fs::write(path.join("cgroup.procs"), pid.to_string())?;
        Ok(Self { path })
    }

    /// Return the kernel memory that is charged to the cgroup, in bytes.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn kernel_memory(&self) -> Result<u64> {
        let stat = fs::read_to_string(self.path.join("memory.stat"))?;
        let kernel = stat.lines().find_map(|line| line.strip_prefix("kernel "));
        kernel
            .and_then(|bytes| bytes.parse().ok())
            .context("memory.stat has no line for the kernel")
    }
}
