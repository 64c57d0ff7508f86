// SPDX-License-Identifier: GPL-2.0

//! The cases, in the order in which they run in the host.
//!
//! A case runs in a process of its own, with the module loaded as the case wants it, and no
//! guest running. It passes by returning `Ok`.

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
pub use nested::{run_faulting_in_guest as run_faulting, run_in_guest as run_nested};

use std::{io, path::Path, time::Duration};

use anyhow::Result;
use exitmeter_meter::reasons::Isa;

use crate::host;

/// Why a case cannot be on this host, when it cannot.
pub type Impossible = fn() -> Result<Option<&'static str>>;

/// A case.
pub struct Case {
    /// What it shows; also its name on the command line.
    pub name: String,
    /// The module's parameters; `None` for a case that loads it itself, or not at all.
    pub module: Option<&'static str>,
    /// How long it may take, by the host's clock.
    pub limit: Duration,
    /// Why it cannot be on this host, when it cannot.
    pub impossible: Impossible,
    /// What it does.
    pub run: Box<dyn Fn() -> Result<()>>,
}

impl Case {
    /// A case that takes a minute at most, with the module loaded with `parameters`.
    pub fn with(
        parameters: &'static str,
        name: impl Into<String>,
        run: impl Fn() -> Result<()> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            module: Some(parameters),
            limit: Duration::from_secs(60),
            impossible: || Ok(None),
            run: Box::new(run),
        }
    }

    /// A case that takes a minute at most, and finds the module not loaded.
    pub fn without(name: impl Into<String>, run: impl Fn() -> Result<()> + 'static) -> Self {
        Self {
            module: None,
            ..Self::with("", name, run)
        }
    }

    /// The case as one that boots a Linux guest.
    pub fn with_linux(self) -> Self {
        self.unless(no_linux)
    }

    /// The case as one that hosts do not have for which `impossible` gives a reason.
    pub fn unless(self, impossible: Impossible) -> Self {
        Self { impossible, ..self }
    }

    /// The case with more time.
    pub fn within(self, seconds: u64) -> Self {
        Self {
            limit: Duration::from_secs(seconds),
            ..self
        }
    }
}

/// On QEMU's SVM no Linux guest boots without nested paging, whether metered or not.
fn no_linux() -> Result<Option<&'static str>> {
    let boots = host::isa()? == Isa::Vmx || host::nested_paging()?;
    Ok((!boots).then_some("Linux guests need npt=1 here"))
}

/// The kernels that check themselves (scripts/configs) are built without.
fn no_userfaultfd() -> Result<Option<&'static str>> {
    // SAFETY: A system call without memory; these flags are none, so it makes nothing.
    let ret = unsafe { libc::syscall(libc::SYS_userfaultfd, -1) };
    let missing = ret == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS);
    Ok(missing.then_some("this kernel has no userfaultfd (USERFAULTFD)"))
}

/// As [`no_userfaultfd`].
fn no_memory_cgroups() -> Result<Option<&'static str>> {
    // The one file of /proc that is there with memory cgroups alone (fs/proc/page.c).
    let missing = !Path::new("/proc/kpagecgroup").exists();
    Ok(missing.then_some("this kernel has no memory cgroups (MEMCG)"))
}

/// The cases that look back at all those before them: at the kernel log, and for lost memory.
pub fn look_back() -> Vec<Case> {
    log::look_back()
}

/// All cases.
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
        look_back(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The cases that demand of the host's kernel log that a line of it holds these words: that the
/// host is what it was started to be.
pub fn expected(words: &[String]) -> impl Iterator<Item = Case> + '_ {
    words.iter().map(|words| log::says(words.clone()))
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
