// SPDX-License-Identifier: GPL-2.0

//! The cases, in the order in which they run in the host.
//!
//! A case runs in a process of its own, with the module loaded as the case wants it, and no guest
//! running. It passes by returning `Ok`.

mod access;
mod answers;
mod bpf;
mod details;
mod exits;
mod export;
mod hooks;
mod linux;
mod loading;
mod log;
mod nested;
mod own;
mod packaged;
mod phases;
mod scope;
mod slow;
mod tool;
mod verify;
mod why;

pub use bpf::attach_again;
pub use nested::{run_faulting_l2_guest, run_l2_guest};

use std::{fs, io, path::Path, time::Duration};

use anyhow::Result;
use exitmeter_meter::reasons::Isa;

use crate::host;

/// Function that returns the reason to skip a case on this host, or `None` to run it.
pub type SkipReason = fn() -> Result<Option<&'static str>>;

/// A case.
pub struct Case {
    /// Name: a statement that the case shows. Words of it select the case on the command line.
    pub name: String,
    /// Module parameters; `None` for a case that starts without the module.
    pub module: Option<&'static str>,
    /// Time limit, by the host's clock.
    pub limit: Duration,
    /// Reason to skip the case on this host, if there is one.
    pub skip_reason: SkipReason,
    /// Body of the case.
    pub run: Box<dyn Fn() -> Result<()>>,
}

impl Case {
    /// Create a case that starts with the module loaded with `parameters`. Its time limit is a minute.
    pub fn with_module(
        parameters: &'static str,
        name: impl Into<String>,
        run: impl Fn() -> Result<()> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            module: Some(parameters),
            limit: Duration::from_secs(60),
            skip_reason: || Ok(None),
            run: Box::new(run),
        }
    }

    /// Create a case that starts with the module unloaded. Its time limit is a minute.
    pub fn without_module(name: impl Into<String>, run: impl Fn() -> Result<()> + 'static) -> Self {
        Self {
            module: None,
            ..Self::with_module("", name, run)
        }
    }

    /// Mark the case as one that boots a Linux guest, and skip it where none boots.
    pub fn with_linux(self) -> Self {
        self.skip_if(no_linux)
    }

    /// Skip the case on hosts for which `skip_reason` returns a reason.
    pub fn skip_if(self, skip_reason: SkipReason) -> Self {
        Self {
            skip_reason,
            ..self
        }
    }

    /// Set the time limit.
    pub fn within(self, seconds: u64) -> Self {
        Self {
            limit: Duration::from_secs(seconds),
            ..self
        }
    }
}

/// Return a reason on QEMU's SVM without nested paging: no Linux guest boots there, metered or not.
fn no_linux() -> Result<Option<&'static str>> {
    let boots = host::vendor()? == Isa::Vmx || host::nested_paging()?;
    Ok((!boots).then_some("Linux guests need npt=1 here"))
}

/// Return a reason on kernels without userfaultfd, such as the debug kernels (scripts/configs).
fn no_userfaultfd() -> Result<Option<&'static str>> {
    // SAFETY: The system call takes no addresses. The flags are invalid, so it creates nothing.
    let ret = unsafe { libc::syscall(libc::SYS_userfaultfd, -1) };
    let missing = ret == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS);
    Ok(missing.then_some("this kernel has no userfaultfd (USERFAULTFD)"))
}

/// Return a reason on kernels without cgroups, such as the debug kernels (scripts/configs).
fn no_cgroups() -> Result<Option<&'static str>> {
    let missing = !fs::read_to_string("/proc/filesystems")?.contains("cgroup2");
    Ok(missing.then_some("this kernel has no cgroups (CGROUPS)"))
}

/// Return a reason on kernels without memory cgroups, such as the debug kernels (scripts/configs).
fn no_memory_cgroups() -> Result<Option<&'static str>> {
    // The only file in /proc that depends on memory cgroups (fs/proc/page.c).
    let missing = !Path::new("/proc/kpagecgroup").exists();
    Ok(missing.then_some("this kernel has no memory cgroups (MEMCG)"))
}

/// Return the cases that judge all earlier ones: by the kernel log and by leaked memory.
pub fn final_cases() -> Vec<Case> {
    log::final_cases()
}

/// Return all cases.
pub fn all() -> Vec<Case> {
    [
        exits::cases(),
        answers::cases(),
        access::cases(),
        phases::cases(),
        details::cases(),
        slow::cases(),
        own::cases(),
        why::cases(),
        tool::cases(),
        verify::cases(),
        bpf::cases(),
        export::cases(),
        scope::cases(),
        linux::cases(),
        nested::cases(),
        loading::cases(),
        hooks::cases(),
        log::cases(),
        packaged::cases(),
        packaged::last(),
        final_cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Return a case for each of `words` that checks that a line of the kernel log holds them. They show
/// that the host is configured as intended.
pub fn expected_log_lines(words: &[String]) -> impl Iterator<Item = Case> + '_ {
    words.iter().map(|words| log::kernel_says(words.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_a_line() {
        let mut names: Vec<_> = all().into_iter().map(|case| case.name).collect();
        let count = names.len();
        assert!(names.iter().all(|name| !name.contains(['\n', '#'])));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
