// SPDX-License-Identifier: GPL-2.0

//! Set-up for booting hosts: the Debian root, the packaged kernel, its tree, Bochs.
//!
//! Each of these is the result of one script in scripts/, kept in `$XDG_CACHE_HOME/exitmeter` (or `~/.cache/exitmeter`).
//! [`prepare`] makes what is missing. The module `engine` explains how results are kept up to date.

mod command;
mod engine;
mod in_root;
mod namespaces;
mod progress;
mod space;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};

use thiserror::Error;

pub(crate) use self::space::need_space;
pub use self::{
    command::{command, PrepareArgs},
    in_root::{in_root, InRoot},
};
use self::{
    engine::{Engine, Recipe, Step},
    progress::Progress,
};
pub use crate::paths::{cache, repository, NoCache};
use crate::{file_error::FileError, interrupt, paths::LARGER_DISK};

/// Names of the debug kernels, which are built here and check themselves while they run (scripts/debug-kernel.sh).
const DEBUG_KERNELS: [&str; 3] = ["debug", "kcsan", "cfi"];

/// Remedy if a kernel built without Rust is not enough.
pub(crate) const WITH_RUST: &str =
    "name one that is built with Rust, as Debian's are from 7.2 on, or do without --kernel";

/// Split the name of a debug kernel into its kind and the packaged kernel from whose source it is built. For "debug" that
/// is the newest, for "7.2.12-debug" it is 7.2.12. Return `None` for other kernels.
fn debug_kernel(kernel: &str) -> Option<(&'static str, &str)> {
    DEBUG_KERNELS.into_iter().find_map(|name| {
        let version = kernel.strip_suffix(name)?;
        match version {
            "" => Some((name, "newest")),
            version => Some((name, version.strip_suffix('-')?)),
        }
    })
}

/// Parts of the set-up that a run needs, in addition to the Debian root.
#[derive(Clone, Debug, Default)]
pub struct SetupOptions {
    /// The kernel: a version ("7.2.12"), a series ("6.12") or a release ("7.2.12+deb13-amd64"); the newest if `None`. Or a
    /// debug kernel that is built here: "debug", "kcsan", "cfi", "7.2.12-debug" and so on.
    pub kernel: Option<String>,
    /// True for the kernel's tree, to build modules. A kernel built without Rust has none.
    pub tree: bool,
    /// True for Bochs, which Intel hosts need.
    pub bochs: bool,
    /// True for Debian's perf, which the benchmark needs.
    pub perf: bool,
    /// True for KVM's own selftests.
    pub selftests: bool,
}

/// Paths of a complete set-up. All of them are shared with other runs and must not be written to.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The Debian root, for [`in_root()`].
    pub root: PathBuf,
    /// Folder of the host's kernel, packaged or built here, and its modules; scripts/kernel.sh lists the files.
    pub kernel: PathBuf,
    /// The guests' kernel, always a packaged one: an ELF file with a PVH entry.
    pub guest_kernel: PathBuf,
    /// Folder of the guests' modules, with modules.dep; its name is the release.
    pub guest_modules: PathBuf,
    /// Key of the content of both kernels and of everything that they were made with, for names in a cache.
    pub kernel_key: String,
    /// Release of the kernel (uname -r).
    pub release: String,
    /// True if the kernel is built with Rust, which exitmeter.ko needs.
    pub rust: bool,
    /// The kernel's prepared source, if it was wanted and the kernel is built with Rust.
    pub tree: Option<PathBuf>,
    /// Folder with `bochs`, `bios` and `vgabios`, if it was wanted.
    pub bochs: Option<PathBuf>,
    /// Folder with `perf` and its libraries, if it was wanted.
    pub perf: Option<PathBuf>,
    /// Folder of KVM's selftests, if it was wanted; scripts/selftests.sh lists the files.
    pub selftests: Option<PathBuf>,
}

/// Reason why the set-up is incomplete.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The disk is too small.
    #[error(
        "{} has {free} MiB free and {what} needs {needed} MiB; free some, or {LARGER_DISK}",
        folder.display()
    )]
    Space {
        /// Folder of the cache.
        folder: PathBuf,
        /// Free space of its disk, in MiB.
        free: u64,
        /// Name of the work that needs space.
        what: &'static str,
        /// Most space that the work takes, in MiB.
        needed: u64,
    },
    /// The environment names no folder for the cache.
    #[error(transparent)]
    NoCache(#[from] NoCache),
    /// Nothing can be run in the Debian root, for the reason that the script gives.
    #[error("{0}")]
    Namespaces(String),
    /// A signal came, or another step failed.
    #[error("the set-up was interrupted; the next run goes on where it stopped")]
    Interrupted,
    /// Something has to be built from the source of a kernel without Rust.
    #[error(
        "{release} is built without Rust, and the set-up fetches the source of no such kernel to build {what} from; \
         {WITH_RUST}"
    )]
    NoSource {
        /// Release of the kernel.
        release: String,
        /// Name of what should be built.
        what: &'static str,
    },
    /// A script failed.
    #[error("{reason} (step {step} of the set-up)")]
    Script {
        /// Name of the step.
        step: &'static str,
        /// The script's last sentence.
        reason: String,
    },
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] FileError),
}

impl Setup {
    /// Return the folder of the host's modules, with modules.dep. Its name is the release.
    pub fn modules(&self) -> PathBuf {
        modules(&self.kernel, &self.release)
    }
}

impl SetupError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::on(action, path)
    }
}

/// Make the missing parts of `wanted`, with progress on standard error, and return the paths of all parts.
///
/// # Errors
///
/// [`SetupError`]. Finished work is kept, and the next call continues from there.
pub fn prepare(wanted: &SetupOptions) -> Result<Setup, SetupError> {
    prepare_with(wanted, |_, _| Ok(()), |_, _| Ok(())).map(|(prepared, (), ())| prepared)
}

/// Do the work of [`prepare`], and call two functions before all of it is done, so that no core is idle. `after_tree` is
/// called as soon as everything but Bochs and perf is there, and `after_bochs` as soon as everything but the tree and the
/// selftests is. Both also get a function that shows a line above the progress.
///
/// # Errors
///
/// Errors of [`prepare`] and of the two functions.
pub fn prepare_with<T: Send, B, E: From<SetupError> + Send>(
    wanted: &SetupOptions,
    after_tree: impl FnOnce(&Setup, &dyn Fn(&str)) -> Result<T, E> + Send,
    after_bochs: impl FnOnce(&Setup, &dyn Fn(&str)) -> Result<B, E>,
) -> Result<(Setup, T, B), E> {
    with_engine(|engine| {
        let plan = Plan::new(engine, wanted)?;
        let note = |text: &str| engine.note(text);
        let after_tree = || {
            let prepared = plan.prepared()?;
            let done = after_tree(&prepared, &note)?;
            Ok((prepared, done))
        };
        let after_bochs = || after_bochs(&plan.prepared()?, &note);
        let ((prepared, tree), bochs) = plan.make(engine, after_tree, after_bochs)?;
        Ok((prepared, tree, bochs))
    })
}

/// Call `work` with an engine for this checkout's scripts and the user's cache.
fn with_engine<T, E: From<SetupError>>(
    work: impl FnOnce(&Engine<'_>) -> Result<T, E>,
) -> Result<T, E> {
    let scripts = repository().join("scripts");
    let cache = cache().map_err(SetupError::from)?;
    let progress = Progress::stderr();
    let interrupts = interrupt::defer();
    namespaces::need(&scripts)?;
    work(&Engine::new(&scripts, &cache, &progress, &interrupts))
}

/// Steps of one set-up.
struct Plan {
    root: Step,
    kernel: Step,
    debug: Option<Step>,
    /// The tree, if it is wanted. Use [`Plan::tree`] instead, which leaves it out if the kernel has none.
    tree: Option<Step>,
    bochs: Option<Step>,
    perf: Option<Step>,
    selftests: Option<Step>,
}

impl Plan {
    fn new(engine: &Engine<'_>, wanted: &SetupOptions) -> Result<Self, SetupError> {
        let root = engine.step(&Recipe {
            name: "root",
            mib: 2400,
            settings: &[],
            needs: &[],
        })?;
        let kernel = wanted.kernel.as_deref().unwrap_or("newest");
        let debug = debug_kernel(kernel);
        let kernel = engine.step(&Recipe {
            name: "kernel",
            mib: 700,
            settings: &[("KERNEL", debug.map_or(kernel, |(_, version)| version))],
            needs: &[("ROOT", &root)],
        })?;
        let debug = debug
            .map(|(name, _)| {
                let config = engine.config(name)?;
                engine.step(&Recipe {
                    name: "debug-kernel",
                    mib: 6000,
                    settings: &[("FLAVOUR", name), ("CONFIG", &config)],
                    needs: &[("ROOT", &root), ("KERNEL_DIR", &kernel)],
                })
            })
            .transpose()?;
        let tree = Recipe {
            name: "tree",
            mib: 2500,
            settings: &[],
            needs: &[("ROOT", &root), ("KERNEL_DIR", &kernel)],
        };
        let bochs = Recipe {
            name: "bochs",
            mib: 400,
            settings: &[],
            needs: &[("ROOT", &root)],
        };
        let perf = Recipe {
            name: "perf",
            mib: 200,
            settings: &[],
            needs: &[("ROOT", &root)],
        };
        let selftests = Recipe {
            name: "selftests",
            mib: 300,
            settings: &[],
            needs: &[("ROOT", &root), ("KERNEL_DIR", &kernel)],
        };
        Ok(Self {
            perf: wanted.perf.then(|| engine.step(&perf)).transpose()?,
            selftests: wanted
                .selftests
                .then(|| engine.step(&selftests))
                .transpose()?,
            // A debug kernel comes with its tree.
            tree: (wanted.tree && debug.is_none())
                .then(|| engine.step(&tree))
                .transpose()?,
            bochs: wanted.bochs.then(|| engine.step(&bochs)).transpose()?,
            root,
            kernel,
            debug,
        })
    }

    fn steps(&self) -> Vec<&Step> {
        let optional = [
            self.debug.as_ref(),
            self.tree(),
            self.bochs.as_ref(),
            self.perf.as_ref(),
            self.selftests.as_ref(),
        ];
        [&self.root, &self.kernel]
            .into_iter()
            .chain(optional.into_iter().flatten())
            .collect()
    }

    /// Return the tree, unless the kernel is known to be built without Rust. That is only known once the kernel is there.
    fn tree(&self) -> Option<&Step> {
        let without_rust =
            self.kernel.is_complete() && has_rust(&self.kernel).is_ok_and(|has| !has);
        self.tree.as_ref().filter(|_| !without_rust)
    }

    /// Fail if something has to be built from the source of a kernel that comes without one.
    fn need_source(&self) -> Result<(), SetupError> {
        let what = match (&self.debug, &self.selftests) {
            (Some(_), _) => "a debug kernel",
            (None, Some(_)) => "KVM's selftests",
            (None, None) => return Ok(()),
        };
        if has_rust(&self.kernel)? {
            return Ok(());
        }
        let release = release(&self.kernel)?;
        Err(SetupError::NoSource { release, what })
    }

    /// Make the missing steps. Call `after_tree` when everything but Bochs and perf is there, and `after_bochs` when
    /// everything but the tree and the selftests is.
    fn make<T: Send, B, E: From<SetupError> + Send>(
        &self,
        engine: &Engine<'_>,
        after_tree: impl FnOnce() -> Result<T, E> + Send,
        after_bochs: impl FnOnce() -> Result<B, E>,
    ) -> Result<(T, B), E> {
        engine.check_space(&self.steps())?;
        engine.make(&self.root)?;
        let chain = |steps: &[Option<&Step>]| {
            let mut steps = steps.iter().copied().flatten();
            steps.try_for_each(|step| engine.make(step))
        };
        let (made, kernels) = mpsc::channel();
        // One thread makes Bochs, the other the tree and the steps before it. Together they keep two cores busy.
        let (tree, bochs) = thread::scope(|scope| {
            let tree = scope.spawn(move || {
                let result = chain(&[Some(&self.kernel)])
                    .and_then(|()| self.need_source())
                    .and_then(|()| chain(&[self.debug.as_ref()]));
                // If Bochs failed, nobody waits for this any more.
                let _ = made.send(result.is_ok());
                result?;
                chain(&[self.tree(), self.selftests.as_ref()])?;
                Ok(after_tree())
            });
            let bochs = chain(&[self.bochs.as_ref(), self.perf.as_ref()]);
            let bochs = bochs.and_then(|()| match kernels.recv() {
                Ok(true) => Ok(after_bochs()),
                // The tree's thread returns the reason.
                _ => Err(SetupError::Interrupted),
            });
            let tree = tree.join();
            (tree.unwrap_or_else(|panic| resume_unwind(panic)), bochs)
        });
        match (tree, bochs) {
            // This thread was stopped because the other failed.
            (Err(SetupError::Interrupted), Err(error)) => Err(error.into()),
            (Err(error), _) | (_, Err(error)) => Err(error.into()),
            (Ok(tree), Ok(bochs)) => Ok((tree?, bochs?)),
        }
    }

    fn prepared(&self) -> Result<Setup, SetupError> {
        let kernel = self.debug.as_ref().unwrap_or(&self.kernel);
        let tree = self.debug.as_ref().or(self.tree());
        let within = |step: &Option<Step>, name| step.as_ref().map(|step| step.out.join(name));
        Ok(Setup {
            guest_kernel: self.kernel.out.join("vmlinux"),
            guest_modules: modules(&self.kernel.out, &release(&self.kernel)?),
            release: release(kernel)?,
            rust: has_rust(&self.kernel)?,
            root: self.root.out.clone(),
            kernel: kernel.out.clone(),
            kernel_key: kernel.key.clone(),
            tree: tree.map(|step| step.out.join("tree")),
            bochs: self.bochs.as_ref().map(|step| step.out.clone()),
            perf: within(&self.perf, "perf"),
            selftests: within(&self.selftests, "kvm"),
        })
    }
}

/// Return the release of the kernel that a step made.
fn release(kernel: &Step) -> Result<String, SetupError> {
    let path = kernel.out.join("release");
    let text = fs::read_to_string(&path).map_err(SetupError::io("read", &path))?;
    Ok(text.trim().into())
}

/// Return true if the packaged kernel that a step fetched is built with Rust. All debug kernels are.
fn has_rust(kernel: &Step) -> Result<bool, SetupError> {
    let path = kernel.out.join("config");
    let text = fs::read_to_string(&path).map_err(SetupError::io("read", &path))?;
    Ok(text.lines().any(|line| line == "CONFIG_RUST=y"))
}

/// Return the module directory of the kernel that a step made.
fn modules(kernel: &Path, release: &str) -> PathBuf {
    kernel.join("modules/lib/modules").join(release)
}
