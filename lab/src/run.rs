//! One run of one host: from the images to the verdict.

pub(crate) mod folder;
mod record;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ChildStdout;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use lab_agent::channel::{self, Item, Message};
use lab_agent::settings::{Module, Settings, Task, HOME};
use thiserror::Error;

use crate::emulator::{bochs, qemu, Begin, Boot, Console, Emulator};
use crate::host::{Host, Machine};
use crate::image::payload::{self, FileSpec};
use crate::image::{ImageError, Images};
use crate::interrupt;
use crate::module::{self, ModuleError};
use crate::programs::{self, Programs, ProgramsError};
use crate::saved;
use crate::setup::{self, Prepared, SetupError, Wanted};
use crate::verdict::{End, Limits, Watch};

use record::Record;

/// How often the console's file is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// How long the processes of a killed emulator may take to go.
const GONE: Duration = Duration::from_secs(5);

/// What to run, and on what.
#[derive(Clone, Debug)]
pub struct Options {
    /// The host.
    pub machine: Machine,
    /// Debian's kernel: a version or release; the newest when not given.
    pub kernel: Option<String>,
    /// The parameters of kvm-intel or kvm-amd; when not given, neither is loaded.
    pub kvm: Option<String>,
    /// Boot, even where a saved machine could be gone on from.
    pub fresh: bool,
    /// Whether exitmeter.ko is built and put into the host.
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
            fresh: false,
            module: true,
            files: Vec::new(),
            out: None,
            limits: Limits {
                time: Duration::from_secs(900),
                silence: Duration::from_secs(180),
            },
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
    /// The system refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl RunError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// Prepares what is missing, boots the host, runs the script, and tells `listener` of it while it happens.
///
/// # Errors
///
/// [`RunError`], when it comes to no run. A run that fails is an [`Outcome`].
pub fn run(options: &Options, listener: &mut dyn FnMut(Event<'_>)) -> Result<Outcome, RunError> {
    let prepared = prepare(options)?;
    let programs = programs::build()?;
    let (task, script) = task(&options.script);
    let mut files = files(options, &prepared, &programs)?;
    files.extend(script);
    let folder = folder::make(options.machine.host)?;
    let payload = folder.join("payload");

    let saved = if options.machine.host == Host::Intel && !options.fresh {
        Some(saved::machine(
            options,
            &prepared,
            &programs.agent,
            listener,
        )?)
    } else {
        None
    };
    match saved {
        // It has its agent, and KVM.
        Some(_) => payload::write(&payload, None, &files, &Settings { kvm: None, task })?,
        None => {
            let kvm = options.kvm();
            payload::write(
                &payload,
                Some(&programs.agent),
                &files,
                &Settings { kvm, task },
            )?;
        }
    }
    let boot = Boot {
        prepared: &prepared,
        machine: &options.machine,
        images: &Images::new(&prepared, &payload)?,
        folder: &folder,
        console: Console::File(CONSOLE),
        begin: saved.as_deref().map_or(Begin::Boot, Begin::Saved),
    };
    let outcome = Running::start(&boot).and_then(|host| host.watch(options, &folder, listener));
    tidy(&folder);
    outcome
}

/// What a host gets, beside its script.
pub(crate) fn files(
    options: &Options,
    prepared: &Prepared,
    programs: &Programs,
) -> Result<Vec<FileSpec>, RunError> {
    let mut files = vec![FileSpec::at(&programs.tool, "/usr/local/bin/exitmeter")];
    if options.module {
        files.push(FileSpec::new(module::build(prepared)?));
    }
    files.extend(options.files.iter().cloned());
    Ok(files)
}

/// Removes what is large in a run's folder and made of what is kept elsewhere.
pub(crate) fn tidy(folder: &Path) {
    for name in ["payload", "initramfs", "input"] {
        let _ = fs::remove_file(folder.join(name));
    }
}

/// What the run needs, made as far as it is not there.
///
/// # Errors
///
/// [`RunError::Setup`].
pub fn prepare(options: &Options) -> Result<Prepared, RunError> {
    if let Some(folder) = std::env::var_os("EXITMETER_DEV").map(PathBuf::from) {
        return Ok(Prepared {
            root: folder.join("root"),
            kernel: folder.join("kernel"),
            kernel_key: "dev".to_owned(),
            release: fs::read_to_string(folder.join("kernel/release"))
                .map_err(RunError::io("read", &folder))?
                .trim()
                .to_owned(),
            tree: Some(folder.join("tree/tree")),
            bochs: Some(folder.join("r/bochs")),
            perf: Some(folder.join("perf/perf")),
        });
    }
    Ok(setup::prepare(&Wanted {
        kernel: options.kernel.clone(),
        tree: options.module,
        bochs: options.machine.host == Host::Intel,
        ..Wanted::default()
    })?)
}

/// A host that has been started.
pub(crate) struct Running {
    emulator: Emulator,
    output: ChildStdout,
    started: Instant,
}

impl Running {
    /// Starts it, with its console in a file.
    pub(crate) fn start(boot: &Boot<'_>) -> Result<Self, RunError> {
        let console = boot.folder.join(CONSOLE);
        File::create(&console).map_err(RunError::io("write", &console))?;
        let command = command(boot)?;
        let log = boot.folder.join("emulator.log");
        let log = File::create(&log).map_err(RunError::io("write", &log))?;
        let started = Instant::now();
        let program = Path::new(command.get_program()).to_owned();
        let (emulator, output) =
            Emulator::start(command, log).map_err(RunError::io("run", &program))?;
        Ok(Self {
            emulator,
            output,
            started,
        })
    }

    /// Watches the host to its end.
    pub(crate) fn watch(
        mut self,
        options: &Options,
        folder: &Path,
        listener: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome, RunError> {
        let interrupts = interrupt::watch();
        let out = options.out.clone().unwrap_or_else(|| folder.join("out"));
        let mut record = Record::new(folder, &out)?;
        let mut watch = Watch::new(options.limits);
        let mut receiver = channel::Receiver::new();
        let port = read(self.output);
        let mut looked = Instant::now();
        let end = loop {
            let (items, gone) = match port.recv_timeout(LOOK) {
                Ok(bytes) => (receiver.receive(&bytes), false),
                Err(RecvTimeoutError::Timeout) => (Vec::new(), false),
                Err(RecvTimeoutError::Disconnected) => (receiver.finish(), true),
            };
            let now = self.started.elapsed();
            let mut decided = gone;
            for item in items {
                match item {
                    Item::Message(message) => {
                        decided |= matches!(message, Message::Verdict(_) | Message::Failure(_));
                        watch.message(now, &message);
                        record.message(message, listener)?;
                    }
                    Item::Noise(bytes) => record.noise(&bytes)?,
                    Item::Damage(text) => watch.damage(&text),
                }
            }
            if gone {
                let status = self.emulator.wait();
                watch.gone(status.is_ok_and(|status| status.success()));
            }
            if decided || looked.elapsed() >= LOOK {
                looked = Instant::now();
                watch.console(now, &record.console()?);
            }
            if interrupts.seen() {
                break End::Interrupted;
            }
            if let Some(end) = watch.end(now) {
                break end;
            }
        };
        self.emulator.kill();
        // Its output ends when the last process of its is gone.
        while port.recv_timeout(GONE).is_ok() {}
        let tail = record.tail(&end);
        Ok(Outcome {
            end,
            stdout: record.into_stdout(),
            folder: folder.into(),
            out,
            tail,
            time: self.started.elapsed(),
        })
    }
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

/// How to start the emulator.
pub(crate) fn command(boot: &Boot<'_>) -> Result<std::process::Command, RunError> {
    match boot.machine.host {
        Host::Intel => bochs::command(boot),
        Host::Amd => qemu::command(boot),
    }
}

/// Reads what the host sends; the receiver is disconnected at its end.
fn read(mut output: ChildStdout) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(length @ 1..) = output.read(&mut bytes) {
            if sender.send(bytes[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}
