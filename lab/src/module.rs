// SPDX-License-Identifier: GPL-2.0

//! `cargo lab build` builds the kernel module in the Debian root, against the tree of a packaged kernel. `cargo lab root`
//! runs other commands with the tools of that root.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    thread,
};

use anyhow::{Context as _, Result};
use rustix::fs::{flock, FlockOperation};
use thiserror::Error;

use crate::{
    file_error::FileError,
    paths::repository,
    setup::{self, in_root, InRoot, Setup, SetupOptions, WITH_RUST},
};

/// Arguments of `cargo lab build`.
#[derive(Debug, clap::Args)]
pub struct BuildArgs {
    /// Debian's kernel to build for: a version or release, built with Rust; by default the newest of backports
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,

    /// Show kbuild's output even if the build succeeds
    #[arg(short, long)]
    verbose: bool,

    /// Arguments for make, such as W=1 or CLIPPY=1
    #[arg(last = true, value_name = "MAKE-ARG")]
    make: Vec<String>,
}

/// Arguments of `cargo lab root`.
#[derive(Debug, clap::Args)]
pub struct RootArgs {
    /// Debian's kernel whose tree to use: a version or release, built with Rust; by default the newest of backports
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,

    /// The command, by default a shell
    #[arg(last = true, value_name = "COMMAND", default_value = "bash")]
    command: Vec<OsString>,
}

/// Reason why there is no module.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// The set-up was made without the kernel's tree.
    #[error("the module needs the kernel's tree, and this set-up was made without it")]
    NoTree,
    /// The kernel cannot load it.
    #[error("{release} is built without Rust, so it takes no exitmeter.ko and has no tree here; {WITH_RUST}")]
    WithoutRust {
        /// Release of the kernel.
        release: String,
    },
    /// kbuild failed; its output has been shown.
    #[error("the module could not be built; the messages of the compiler are above")]
    Failed,
    /// kbuild warned of something; its output has been shown.
    #[error("the module was built with warnings, which count as errors; they are above")]
    Warnings,
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] FileError),
}

impl ModuleError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::on(action, path)
    }
}

/// Run `cargo lab build`: complete the set-up, build the module, and print its path.
///
/// # Errors
///
/// An error if the set-up or the build fails, or standard output is closed.
pub fn command(args: BuildArgs) -> Result<()> {
    let prepared = setup::prepare(&SetupOptions {
        kernel: args.kernel,
        tree: true,
        ..SetupOptions::default()
    })?;
    let module = build_with(&prepared, &args.make, args.verbose)?;
    writeln!(io::stdout(), "{}", module.display())?;
    Ok(())
}

/// Run `cargo lab root`: run a command in the Debian root and return its status. The command starts in /src, the
/// checkout; the kernel's tree is /tree.
///
/// # Errors
///
/// An error if the set-up fails or the command cannot be run.
pub fn root_command(args: RootArgs) -> Result<ExitCode> {
    let prepared = setup::prepare(&SetupOptions {
        kernel: args.kernel,
        tree: true,
        ..SetupOptions::default()
    })?;
    let mut words = args.command.iter();
    let program = words.next().context("there is no command")?;
    let status = build_root(&prepared)?
        .command(program)
        .args(words)
        .status()?;
    // A signal has no status of its own; shells report 128 plus its number.
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    Ok(code
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
        .into())
}

/// Return the kernel's tree, or the reason why there is none.
pub(crate) fn tree(prepared: &Setup) -> Result<&Path, ModuleError> {
    match &prepared.tree {
        Some(tree) => Ok(tree),
        None if prepared.rust => Err(ModuleError::NoTree),
        None => Err(ModuleError::WithoutRust {
            release: prepared.release.clone(),
        }),
    }
}

/// Return the root with the checkout at /src and the tree at /tree.
fn build_root(prepared: &Setup) -> Result<InRoot, ModuleError> {
    let tree = tree(prepared)?;
    Ok(in_root(&prepared.root)
        .bind(repository(), "/src")
        .bind(tree, "/tree")
        .chdir("/src"))
}

/// Build `exitmeter.ko` if it is out of date, and return its path. Concurrent builds wait for each other.
///
/// # Errors
///
/// [`ModuleError`]. The output of a build that failed or warned goes to standard error.
pub fn build(prepared: &Setup) -> Result<PathBuf, ModuleError> {
    build_with(prepared, &[], false)
}

/// Build `exitmeter.ko` like [`build`], with arguments for make. Each set of arguments has its own build folder.
/// `verbose` shows kbuild's output even if the build succeeds.
///
/// # Errors
///
/// The same as for [`build`].
pub fn build_with(
    prepared: &Setup,
    make: &[String],
    verbose: bool,
) -> Result<PathBuf, ModuleError> {
    let build_root = build_root(prepared)?;
    let name = folder_name(&prepared.release, make);
    let out = repository().join("build").join(&name);
    fs::create_dir_all(&out).map_err(ModuleError::io("make", &out))?;
    // Held to the end: two kbuilds in one folder break each other.
    let lock_path = out.with_file_name(format!("{name}.lock"));
    let lock = File::create(&lock_path).map_err(ModuleError::io("open", &lock_path))?;
    flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| ModuleError::io("lock", &lock_path)(error.into()))?;

    let log_path = out.join("make.log");
    let log = File::create(&log_path).map_err(ModuleError::io("write", &log_path))?;
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let status = build_root
        .command("make")
        .args(["-C", "/tree", "M=/src"])
        .arg(format!("CC={}", compiler(prepared)?))
        .arg(format!("MO=/src/build/{name}"))
        .arg(format!("-j{jobs}"))
        .args(make)
        .arg("modules")
        .stdin(Stdio::null())
        // Both go to one file, so that messages keep their order.
        .stdout(
            log.try_clone()
                .map_err(ModuleError::io("write", &log_path))?,
        )
        .stderr(log)
        .status()
        .map_err(ModuleError::io("run make in", &prepared.root))?;
    let text = fs::read(&log_path).map_err(ModuleError::io("read", &log_path))?;
    let text = String::from_utf8_lossy(&text);
    let warned = has_warning(&text);
    if verbose || warned || !status.success() {
        eprint!("{text}");
    }
    if !status.success() {
        return Err(ModuleError::Failed);
    }
    if warned {
        // Remove the objects: they would be up to date, and the next build would not warn again.
        fs::remove_dir_all(&out).map_err(ModuleError::io("remove", &out))?;
        return Err(ModuleError::Warnings);
    }
    Ok(out.join("exitmeter.ko"))
}

/// Return the name of the kernel's compiler in the root. Modules have to be built with the same compiler.
///
/// # Errors
///
/// [`ModuleError`] if there is no tree with the kernel's configuration.
pub fn compiler(prepared: &Setup) -> Result<&'static str, ModuleError> {
    let config = tree(prepared)?.join(".config");
    let text = fs::read_to_string(&config).map_err(ModuleError::io("read", &config))?;
    let clang = text.lines().any(|line| line == "CONFIG_CC_IS_CLANG=y");
    Ok(if clang { "clang-19" } else { "gcc-14" })
}

/// Return the name of a build's folder in build/. Arguments change the objects, so each set of arguments has its own
/// folder, and no build has to rebuild the objects of another.
fn folder_name(release: &str, make: &[String]) -> String {
    let mut name = String::from(release);
    for argument in make {
        name.push(',');
        name.push_str(&argument.replace('/', "_"));
    }
    name
}

/// Return true if any tool that kbuild runs (gcc, rustc, clippy, objtool, modpost) warned of something.
fn has_warning(text: &str) -> bool {
    text.lines()
        .any(|line| line.to_ascii_lowercase().contains("warning"))
}

#[cfg(test)]
mod tests {
    use super::{folder_name, has_warning};

    #[test]
    fn each_set_of_arguments_has_its_own_folder() {
        let arguments = ["W=1", "KCFLAGS=-I/x"].map(String::from);
        assert_eq!(folder_name("7.3.4", &[]), "7.3.4");
        assert_eq!(folder_name("7.3.4", &arguments), "7.3.4,W=1,KCFLAGS=-I_x");
    }

    #[test]
    fn warnings_of_every_tool_count() {
        for line in [
            "src/shim.c:12:9: warning: unused variable 'x' [-Wunused-variable]",
            "warning: unused import: `kernel::prelude`",
            "WARNING: modpost: missing MODULE_DESCRIPTION() in exitmeter.o",
            "exitmeter.o: warning: objtool: f+0x1: unreachable instruction",
        ] {
            assert!(
                has_warning(&format!("  CC [M]  src/shim.o\n{line}\n")),
                "{line}"
            );
        }
    }

    #[test]
    fn a_build_without_warnings_passes() {
        assert!(!has_warning(
            "make: Entering directory '/tree'\n  RUSTC [M] src/exitmeter_main.o\n  MODPOST Module.symvers\n"
        ));
    }
}
