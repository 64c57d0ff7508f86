// SPDX-License-Identifier: GPL-2.0

//! One run of one host: from the images to the verdict.

pub(crate) mod folder;
mod record;
mod running;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use lab_agent::settings::{Module, Settings, Task, HOME};
use thiserror::Error;

use crate::emulator::{Begin, Boot, Console};
use crate::host::{Host, Machine};
use crate::image::payload::{self, FileSpec};
use crate::image::{ImageError, Images};
use crate::module::{self, ModuleError};
use crate::programs::{self, Programs, ProgramsError, Tool};
use crate::refused::Refused;
use crate::saved;
use crate::setup::{self, Prepared, SetupError, Wanted};
use crate::verdict::{End, Limits};

pub(crate) use running::{command, Running};

/// How long a run may take when nothing else is said.
pub const LIMITS: Limits = Limits {
    time: Duration::from_secs(900),
    silence: Duration::from_secs(180),
};

/// What to run, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    /// The host.
    pub machine: Machine,
    /// Debian's kernel: a version, series or release; the newest when not given.
    pub kernel: Option<String>,
    /// The parameters of kvm-intel or kvm-amd; when not given, neither is loaded.
    pub kvm: Option<String>,
    /// How much of the tool the host gets.
    pub tool: Tool,
    /// Boot, even where a saved machine could be gone on from.
    pub fresh: bool,
    /// Whether exitmeter.ko is built and put into the host, if its kernel is built with Rust.
    pub module: bool,
    /// More files for the host.
    pub files: Vec<FileSpec>,
    /// Where the script's out folder goes; the run's own folder when not given.
    pub out: Option<PathBuf>,
    /// How long it may take.
    pub limits: Limits,
    /// A script of this machine, or a command of the host, and its arguments.
    pub script: Vec<OsString>,
}

impl Options {
    /// A script on a host as it usually is.
    pub fn new(host: Host, script: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            machine: Machine {
                host,
                model: None,
                cpus: 1,
                memory: 1024,
                icount: false,
                append: String::new(),
            },
            kernel: None,
            kvm: Some(String::new()),
            tool: Tool::ForScripts,
            fresh: false,
            module: true,
            files: Vec::new(),
            out: None,
            limits: LIMITS,
            script: script.into_iter().map(Into::into).collect(),
        }
    }

    /// The module of KVM's to load, if any.
    pub(crate) fn kvm(&self) -> Option<Module> {
        self.kvm.as_ref().map(|parameters| Module {
            name: self.machine.host.kvm().to_owned(),
            parameters: parameters.clone(),
        })
    }
}

/// What a run tells while it goes on.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// What is about to happen.
    Stage(&'a str),
    /// A piece of the script's standard output.
    Stdout(&'a [u8]),
    /// A piece of the script's standard error.
    Stderr(&'a [u8]),
    /// A line of the host's kernel log.
    Kernel(&'a str),
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// The script's standard output.
    pub stdout: Vec<u8>,
    /// Everything that was saved: console.log, kernel.log, stdout.log, stderr.log, emulator.log.
    pub folder: PathBuf,
    /// What the script left in its out folder.
    pub out: PathBuf,
    /// The last lines of the console, and of the kernel log when the fault is there; empty after a verdict.
    pub tail: String,
    /// From the start of the emulator to the end.
    pub time: Duration,
}

/// Why a run could not even start.
#[derive(Debug, Error)]
pub enum RunError {
    /// The set-up is not there.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The module could not be built.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The host's programs could not be built.
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    /// The images could not be made.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The machine cannot be emulated.
    #[error("{0}")]
    Machine(String),
    /// The host did not come as far as to be saved. [`run`] gives the outcome instead.
    #[error("{}", .0.end)]
    Boot(Box<Outcome>),
    /// The system refused something.
    #[error(transparent)]
    Io(#[from] Refused),
}

impl RunError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        Refused::to(action, path)
    }
}

/// Prepares what is missing, boots the host, runs the script, and tells `listener` of it while it happens.
///
/// # Errors
///
/// [`RunError`], when it comes to no run. A run that fails is an [`Outcome`].
pub fn run(options: &Options, listener: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, RunError> {
    // Side by side: much of the set-up waits for the network, or keeps one CPU busy.
    let ready = thread::scope(|scope| {
        let programs = scope.spawn(|| programs::build(options.tool));
        prepare(options, |prepared, note| {
            let programs = programs.join();
            let programs = programs.unwrap_or_else(|panic| resume_unwind(panic))?;
            let folder = folder::make(options.machine.host)?;
            let mut saved = None;
            if options.machine.host == Host::Intel && !options.fresh {
                let machine = saved::machine(options, prepared, &programs.agent, &folder, note)?;
                saved = Some(machine);
            }
            Ok((programs, folder, saved))
        })
    });
    let (prepared, module, (programs, folder, saved)) = match ready {
        Err(RunError::Boot(outcome)) => return Ok(*outcome),
        ready => ready?,
    };
    let (task, script) = task(&options.script);
    let mut files = files(options, module, &programs);
    files.extend(script);
    let payload = folder.join("payload");
    let (agent, kvm, begin) = match &saved {
        // It has its agent, and KVM.
        Some(saved) => (None, None, Begin::Saved(saved)),
        None => (Some(&*programs.agent), options.kvm(), Begin::Boot),
    };
    payload::write(&payload, agent, &files, &Settings { kvm, task })?;
    let boot = Boot {
        prepared: &prepared,
        machine: &options.machine,
        images: &Images::new(&prepared, &payload)?,
        folder: &folder,
        console: Console::File(CONSOLE),
        begin,
    };
    let outcome = Running::start(&boot).and_then(|host| host.watch(options, &folder, listener));
    tidy(&folder);
    outcome
}

/// What a host gets, beside its script.
pub(crate) fn files(
    options: &Options,
    module: Option<PathBuf>,
    programs: &Programs,
) -> Vec<FileSpec> {
    let mut files = vec![FileSpec::at(&programs.tool, "/usr/local/bin/exitmeter")];
    files.extend(module.map(FileSpec::new));
    files.extend(options.files.iter().cloned());
    files
}

/// Removes what is large in a run's folder and made of what is kept elsewhere.
pub(crate) fn tidy(folder: &Path) {
    for name in ["payload", "initramfs", "input"] {
        let _ = fs::remove_file(folder.join(name));
    }
}

/// Make what the run needs, as far as it is not there, and the module, if it wants one and the kernel is built with Rust.
/// Besides do `start` as soon as the host itself can be started.
///
/// # Errors
///
/// [`RunError::Setup`], [`RunError::Module`], and those of `start`.
pub fn prepare<T>(
    options: &Options,
    start: impl FnOnce(&Prepared, &dyn Fn(&str)) -> Result<T, RunError>,
) -> Result<(Prepared, Option<PathBuf>, T), RunError> {
    let wanted = Wanted {
        kernel: options.kernel.clone(),
        tree: options.module,
        bochs: options.machine.host == Host::Intel,
        ..Wanted::default()
    };
    let module = |prepared: &Prepared, note: &dyn Fn(&str)| {
        if options.module && !prepared.rust {
            let release = &prepared.release;
            note(&format!(
                "The host has no exitmeter.ko, as its kernel {release} is built without Rust."
            ));
            return Ok(None);
        }
        let module = options.module.then(|| module::build(prepared));
        Ok(module.transpose()?)
    };
    setup::prepare_and(&wanted, module, start)
}

/// The name of the console's file in the run's folder.
pub(crate) const CONSOLE: &str = "console.log";

/// What the script is to the host.
enum Script {
    /// A file of this machine.
    File(PathBuf),
    /// A command of the host, or several for its shell.
    Command,
}

fn task(script: &[OsString]) -> (Task, Option<FileSpec>) {
    let mut words: Vec<String> = script
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let first = words.first().cloned().unwrap_or_default();
    let path = Path::new(&first);
    let script = if path.is_file() {
        Script::File(path.into())
    } else {
        Script::Command
    };
    match script {
        Script::File(path) => {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let target = format!("{HOME}/{name}");
            words[0].clone_from(&target);
            // Whatever its permissions and its first line are, it is a shell script.
            words.insert(0, "/bin/sh".to_owned());
            (Task::Run(words), Some(FileSpec::at(path, target)))
        }
        Script::Command
            if words.len() == 1
                && first.contains(|c: char| c.is_whitespace() || ";|&<>$`".contains(c)) =>
        {
            (
                Task::Run(vec!["/bin/sh".to_owned(), "-c".to_owned(), first]),
                None,
            )
        }
        Script::Command => (Task::Run(words), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(script: &[&str]) -> (Vec<String>, Option<FileSpec>) {
        let script: Vec<OsString> = script.iter().map(Into::into).collect();
        match task(&script) {
            (Task::Run(words), file) => (words, file),
            (other, _) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_of_this_machine_is_a_script() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let (words, spec) = words(&[file, "a b"]);
        assert_eq!(words, ["/bin/sh", "/root/Cargo.toml", "a b"]);
        assert_eq!(spec, Some(FileSpec::at(file, "/root/Cargo.toml")));
    }

    #[test]
    fn anything_else_is_a_command_of_the_host() {
        assert_eq!(
            words(&["cat", "a b"]),
            (vec!["cat".into(), "a b".into()], None)
        );
        assert_eq!(words(&["true"]), (vec!["true".into()], None));
    }

    #[test]
    fn several_commands_in_one_word_are_for_its_shell() {
        let (words, file) = words(&["cat /proc/cpuinfo | wc -l"]);
        assert_eq!(words, ["/bin/sh", "-c", "cat /proc/cpuinfo | wc -l"]);
        assert_eq!(file, None);
    }
}
