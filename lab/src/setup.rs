// SPDX-License-Identifier: GPL-2.0

//! What has to be there before a host can boot: the Debian root, the packaged kernel, its tree, Bochs.
//!
//! Each is the result of one script of the folder scripts/, kept in `$XDG_CACHE_HOME/exitmeter` (or
//! `~/.cache/exitmeter`). [`prepare`] makes what is missing; see `engine` for how it is kept true.

mod command;
mod engine;
mod in_root;
mod namespaces;
mod progress;
mod space;
#[cfg(test)]
mod tests;

use std::env;
use std::fs;
use std::io;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use thiserror::Error;

pub use command::{command, PrepareArgs};
pub use in_root::{in_root, InRoot};
pub(crate) use space::{need_space, LARGER_DISK};

use crate::interrupt;
use crate::refused::Refused;
use engine::{Engine, Recipe, Step};
use progress::Progress;

/// The kernels that are built here, to check themselves while they run (scripts/debug-kernel.sh).
const CHECKED: [&str; 3] = ["debug", "kcsan", "cfi"];

/// The remedy where a kernel without Rust does not do.
pub(crate) const WITH_RUST: &str =
    "name one that is built with Rust, as Debian's are from 7.2 on, or do without --kernel";

/// Which of the kernels that are built here is wanted, if one is, and from the source of which packaged one: "debug" is
/// from the newest's, "7.2.12-debug" from that of 7.2.12.
fn checked(kernel: &str) -> Option<(&'static str, &str)> {
    CHECKED.into_iter().find_map(|name| {
        let version = kernel.strip_suffix(name)?;
        match version {
            "" => Some((name, "newest")),
            version => Some((name, version.strip_suffix('-')?)),
        }
    })
}

/// What a run needs, besides the Debian root.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The kernel: a version ("7.2.12"), a series ("6.12") or a release ("7.2.12+deb13-amd64"), or the newest there. Or one
    /// that is built here from its source: "debug", "kcsan", "cfi", "7.2.12-debug" and so on.
    pub kernel: Option<String>,
    /// The kernel's tree, to build modules. A kernel without Rust gets none.
    pub tree: bool,
    /// Bochs, for Intel hosts.
    pub bochs: bool,
    /// Debian's perf, for the benchmark.
    pub perf: bool,
    /// KVM's own selftests.
    pub selftests: bool,
}

/// Where it is. All of these are shared with other runs: not to be written to.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The Debian root, for [`in_root`].
    pub root: PathBuf,
    /// The hosts' kernel and its modules, packaged or built here; scripts/kernel.sh lists the files.
    pub kernel: PathBuf,
    /// The guests' kernel, always a packaged one: an ELF with a PVH entry.
    pub guest_kernel: PathBuf,
    /// The folder of its modules, with modules.dep; its name is the release.
    pub guest_modules: PathBuf,
    /// Stands for the content of both kernels and all that they were made with: for names in a cache.
    pub kernel_key: String,
    /// The kernel's name for itself (uname -r).
    pub release: String,
    /// Whether the kernel is built with Rust, which exitmeter.ko takes.
    pub rust: bool,
    /// The kernel's prepared source, if it was wanted and the kernel is built with Rust.
    pub tree: Option<PathBuf>,
    /// The folder with `bochs`, `bios` and `vgabios`, if it was wanted.
    pub bochs: Option<PathBuf>,
    /// The folder with `perf` and its libraries, if it was wanted.
    pub perf: Option<PathBuf>,
    /// The folder of KVM's selftests, if it was wanted; scripts/selftests.sh lists the files.
    pub selftests: Option<PathBuf>,
}

/// Why the set-up is not there.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The disk is too small.
    #[error(
        "{} has {free} MiB free and {what} needs {needed} MiB; free some, or {LARGER_DISK}",
        folder.display()
    )]
    Space {
        /// The cache.
        folder: PathBuf,
        /// What its disk has left, in MiB.
        free: u64,
        /// What is to be made.
        what: &'static str,
        /// What that takes at its largest, in MiB.
        needed: u64,
    },
    /// There is no place for the cache.
    #[error(
        "neither XDG_CACHE_HOME nor HOME is an absolute path; set one, the set-up is kept there"
    )]
    NoCache,
    /// Nothing can be run in the Debian root; the script's own sentence.
    #[error("{0}")]
    Namespaces(String),
    /// A signal came, or another step failed.
    #[error("the set-up was interrupted; the next run goes on where it stopped")]
    Interrupted,
    /// What is built from a kernel's source is wanted, of a kernel without Rust.
    #[error(
        "{release} is built without Rust, and the set-up fetches the source of no such kernel to build {what} from; \
         {WITH_RUST}"
    )]
    NoSource {
        /// The kernel.
        release: String,
        /// What was to be built.
        what: &'static str,
    },
    /// A script failed.
    #[error("{reason} (step {step} of the set-up)")]
    Script {
        /// The step.
        step: &'static str,
        /// The script's own last sentence.
        reason: String,
    },
    /// The system refused something.
    #[error(transparent)]
    Io(#[from] Refused),
}

impl Prepared {
    /// The folder of the hosts' modules, with modules.dep; its name is the release.
    pub fn modules(&self) -> PathBuf {
        modules(&self.kernel, &self.release)
    }
}

impl SetupError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        Refused::to(action, path)
    }
}

/// The checkout that this program was built from: its scripts and sources are used where they lie.
pub fn repository() -> &'static Path {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.parent().unwrap_or(lab)
}

/// The folder of all that is made once and kept. Whatever else is cached belongs there too, in folders of its own.
///
/// # Errors
///
/// [`SetupError::NoCache`] when the environment names no place.
pub fn cache() -> Result<PathBuf, SetupError> {
    let folder = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    folder("XDG_CACHE_HOME")
        .or_else(|| folder("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("exitmeter"))
        .ok_or(SetupError::NoCache)
}

/// Makes what is missing of `wanted`, showing its progress on standard error, and says where all of it is.
///
/// # Errors
///
/// See [`SetupError`]. What is done by then is kept, and the next call goes on from there.
pub fn prepare(wanted: &Wanted) -> Result<Prepared, SetupError> {
    prepare_and(wanted, |_, _| Ok(()), |_, _| Ok(())).map(|(prepared, (), ())| prepared)
}

/// As [`prepare`]. Besides do what can be done before all is there, so that no core is idle: `with_tree` as soon as all
/// but Bochs and perf is there, and `with_bochs` as soon as all but the tree and the selftests is. Both also get a
/// function that shows a line above those of the progress.
///
/// # Errors
///
/// Those of [`prepare`], and what the two fail with.
pub fn prepare_and<T: Send, B, E: From<SetupError> + Send>(
    wanted: &Wanted,
    with_tree: impl FnOnce(&Prepared, &dyn Fn(&str)) -> Result<T, E> + Send,
    with_bochs: impl FnOnce(&Prepared, &dyn Fn(&str)) -> Result<B, E>,
) -> Result<(Prepared, T, B), E> {
    with_engine(|engine| {
        let plan = Plan::new(engine, wanted)?;
        let note = |text: &str| engine.note(text);
        let with_tree = || {
            let prepared = plan.prepared()?;
            let done = with_tree(&prepared, &note)?;
            Ok((prepared, done))
        };
        let with_bochs = || with_bochs(&plan.prepared()?, &note);
        let ((prepared, tree), bochs) = plan.make(engine, with_tree, with_bochs)?;
        Ok((prepared, tree, bochs))
    })
}

/// Calls `work` with an engine for this checkout's scripts and the user's cache.
fn with_engine<T, E: From<SetupError>>(
    work: impl FnOnce(&Engine<'_>) -> Result<T, E>,
) -> Result<T, E> {
    let scripts = repository().join("scripts");
    let cache = cache()?;
    let progress = Progress::stderr();
    let interrupts = interrupt::watch();
    namespaces::need(&scripts)?;
    work(&Engine::new(&scripts, &cache, &progress, &interrupts))
}

/// The steps of one set-up.
struct Plan {
    root: Step,
    kernel: Step,
    checked: Option<Step>,
    /// The tree, if it is wanted; [`Plan::tree`] knows whether the kernel has one.
    tree: Option<Step>,
    bochs: Option<Step>,
    perf: Option<Step>,
    selftests: Option<Step>,
}

impl Plan {
    fn new(engine: &Engine<'_>, wanted: &Wanted) -> Result<Self, SetupError> {
        let root = engine.step(&Recipe {
            name: "root",
            mib: 2400,
            settings: &[],
            on: &[],
        })?;
        let kernel = wanted.kernel.as_deref().unwrap_or("newest");
        let checked = checked(kernel);
        let kernel = engine.step(&Recipe {
            name: "kernel",
            mib: 700,
            settings: &[("KERNEL", checked.map_or(kernel, |(_, version)| version))],
            on: &[("ROOT", &root)],
        })?;
        let checked = checked
            .map(|(name, _)| {
                let config = engine.config(name)?;
                engine.step(&Recipe {
                    name: "debug-kernel",
                    mib: 6000,
                    settings: &[("FLAVOUR", name), ("CONFIG", &config)],
                    on: &[("ROOT", &root), ("KERNEL_DIR", &kernel)],
                })
            })
            .transpose()?;
        let tree = Recipe {
            name: "tree",
            mib: 2500,
            settings: &[],
            on: &[("ROOT", &root), ("KERNEL_DIR", &kernel)],
        };
        let bochs = Recipe {
            name: "bochs",
            mib: 400,
            settings: &[],
            on: &[("ROOT", &root)],
        };
        let perf = Recipe {
            name: "perf",
            mib: 200,
            settings: &[],
            on: &[("ROOT", &root)],
        };
        let selftests = Recipe {
            name: "selftests",
            mib: 300,
            settings: &[],
            on: &[("ROOT", &root), ("KERNEL_DIR", &kernel)],
        };
        Ok(Self {
            perf: wanted.perf.then(|| engine.step(&perf)).transpose()?,
            selftests: wanted
                .selftests
                .then(|| engine.step(&selftests))
                .transpose()?,
            // One that is built here comes with its tree.
            tree: (wanted.tree && checked.is_none())
                .then(|| engine.step(&tree))
                .transpose()?,
            bochs: wanted.bochs.then(|| engine.step(&bochs)).transpose()?,
            root,
            kernel,
            checked,
        })
    }

    fn steps(&self) -> Vec<&Step> {
        let optional = [
            self.checked.as_ref(),
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

    /// Return the tree, unless the kernel is known to be built without Rust. Before the kernel is there, that is not known.
    fn tree(&self) -> Option<&Step> {
        let without_rust =
            self.kernel.is_complete() && has_rust(&self.kernel).is_ok_and(|has| !has);
        self.tree.as_ref().filter(|_| !without_rust)
    }

    /// Fail if something is to be built from the source of a kernel that comes without one.
    fn need_source(&self) -> Result<(), SetupError> {
        let what = match (&self.checked, &self.selftests) {
            (Some(_), _) => "a kernel that checks itself",
            (None, Some(_)) => "KVM's selftests",
            (None, None) => return Ok(()),
        };
        if has_rust(&self.kernel)? {
            return Ok(());
        }
        let release = release(&self.kernel)?;
        Err(SetupError::NoSource { release, what })
    }

    /// Make what is missing. Do `with_tree` when all but Bochs and perf is there, and `with_bochs` when all but the tree
    /// and the selftests is.
    fn make<T: Send, B, E: From<SetupError> + Send>(
        &self,
        engine: &Engine<'_>,
        with_tree: impl FnOnce() -> Result<T, E> + Send,
        with_bochs: impl FnOnce() -> Result<B, E>,
    ) -> Result<(T, B), E> {
        engine.check_space(&self.steps())?;
        engine.make(&self.root)?;
        let chain = |steps: &[Option<&Step>]| {
            let mut steps = steps.iter().copied().flatten();
            steps.try_for_each(|step| engine.make(step))
        };
        let (made, kernels) = mpsc::channel();
        // Bochs and what leads to the tree keep two cores busy side by side.
        let (tree, bochs) = thread::scope(|scope| {
            let tree = scope.spawn(move || {
                let result = chain(&[Some(&self.kernel)])
                    .and_then(|()| self.need_source())
                    .and_then(|()| chain(&[self.checked.as_ref()]));
                // Nobody waits any more if Bochs failed.
                let _ = made.send(result.is_ok());
                result?;
                chain(&[self.tree(), self.selftests.as_ref()])?;
                Ok(with_tree())
            });
            let bochs = chain(&[self.bochs.as_ref(), self.perf.as_ref()]);
            let bochs = bochs.and_then(|()| match kernels.recv() {
                Ok(true) => Ok(with_bochs()),
                // The tree's thread tells why.
                _ => Err(SetupError::Interrupted),
            });
            let tree = tree.join();
            (tree.unwrap_or_else(|panic| resume_unwind(panic)), bochs)
        });
        match (tree, bochs) {
            // One was stopped because the other failed.
            (Err(SetupError::Interrupted), Err(error)) => Err(error.into()),
            (Err(error), _) | (_, Err(error)) => Err(error.into()),
            (Ok(tree), Ok(bochs)) => Ok((tree?, bochs?)),
        }
    }

    fn prepared(&self) -> Result<Prepared, SetupError> {
        let kernel = self.checked.as_ref().unwrap_or(&self.kernel);
        let tree = self.checked.as_ref().or(self.tree());
        let within = |step: &Option<Step>, name| step.as_ref().map(|step| step.out.join(name));
        Ok(Prepared {
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

/// What the kernel that a step gave calls itself.
fn release(kernel: &Step) -> Result<String, SetupError> {
    let path = kernel.out.join("release");
    let text = fs::read_to_string(&path).map_err(SetupError::io("read", &path))?;
    Ok(text.trim().into())
}

/// Return true if the packaged kernel that a step gave is built with Rust. Those that are built here all are.
fn has_rust(kernel: &Step) -> Result<bool, SetupError> {
    let path = kernel.out.join("config");
    let text = fs::read_to_string(&path).map_err(SetupError::io("read", &path))?;
    Ok(text.lines().any(|line| line == "CONFIG_RUST=y"))
}

/// Where a step that gives a kernel keeps its modules.
fn modules(kernel: &Path, release: &str) -> PathBuf {
    kernel.join("modules/lib/modules").join(release)
}
