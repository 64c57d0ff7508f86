// SPDX-License-Identifier: GPL-2.0

//! Engine that runs the steps of the set-up. A step is a script that fills one folder of the cache.
//!
//! The folder's name holds a hash of everything that the result depends on. So nothing is ever out of date, and changing
//! a script makes its result again. A folder only counts if it holds the marker [`COMPLETE`], which is written last. A
//! script that finds its folder half done continues with it. `make` and its like compare dates instead of contents, and
//! two of them at once would make the same result twice.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{flock, FlockOperation},
    io::Errno,
    process::{kill_process_group, test_kill_process_group, Pid, Signal},
};
use sha2::{Digest, Sha256};

use super::{
    need_space,
    progress::{Progress, ProgressLine},
    SetupError,
};
use crate::interrupt::Interrupts;

/// Name of the marker of a complete result. The marker holds the seconds that the step took.
pub const COMPLETE: &str = ".complete";

/// Scripts that every step's result depends on, in addition to its own.
const SHARED: [&str; 2] = ["common.sh", "in-root.sh"];

/// Interval at which a running step checks whether it has to stop.
const TICK: Duration = Duration::from_millis(100);

/// Time that a script has to end in order, once it was told to.
const GRACE: Duration = Duration::from_secs(5);

/// Recipe of a step.
pub struct Recipe<'a> {
    /// Name of the step. Its script is `<name>.sh`, and the result also depends on the files `patches/<name>-*`.
    pub name: &'static str,
    /// Most space that the result takes together with its downloads, in MiB. This is measured, and the key does not
    /// depend on it.
    pub mib: u64,
    /// Variables that the result depends on.
    pub settings: &'a [(&'static str, &'a str)],
    /// Steps that this one needs, each with the variable that passes the path of its result to the script.
    pub needs: &'a [(&'static str, &'a Step)],
}

/// A step whose key is known.
#[derive(Debug)]
pub struct Step {
    /// Name of the step.
    pub name: &'static str,
    /// Key of everything that the result depends on, twelve hexadecimal digits.
    pub key: String,
    /// Folder of the result.
    pub out: PathBuf,
    mib: u64,
    script: PathBuf,
    environment: Vec<(&'static str, OsString)>,
}

/// Engine that makes steps.
pub struct Engine<'a> {
    /// Folder of the scripts.
    pub scripts: &'a Path,
    /// Folder of the results.
    pub cache: &'a Path,
    /// Display of the work.
    pub progress: &'a Progress,
    /// Signals that stop the work.
    pub interrupts: &'a Interrupts,
    /// True if a step failed, so that the others stop as well.
    failed: AtomicBool,
}

impl Step {
    /// Return the seconds that the step took, or `None` if its result is incomplete.
    pub fn seconds(&self) -> Option<u64> {
        // A machine that lost its power can leave an empty marker. Then its folder may be incomplete as well.
        let text = fs::read_to_string(self.out.join(COMPLETE)).ok()?;
        text.trim().parse().ok()
    }

    /// Return true if the result is complete.
    pub fn is_complete(&self) -> bool {
        self.seconds().is_some()
    }
}

impl<'a> Engine<'a> {
    /// Create an engine for the scripts of one folder and the results of another.
    pub fn new(
        scripts: &'a Path,
        cache: &'a Path,
        progress: &'a Progress,
        interrupts: &'a Interrupts,
    ) -> Self {
        Self {
            scripts,
            cache,
            progress,
            interrupts,
            failed: AtomicBool::new(false),
        }
    }

    /// Compute the key and the folder of the step of `recipe`. Nothing is made yet.
    pub fn step(&self, recipe: &Recipe<'_>) -> Result<Step, SetupError> {
        let script = self.scripts.join(format!("{}.sh", recipe.name));
        let mut key = Key::default();
        key.file(&script)?;
        for name in SHARED {
            key.file(&self.scripts.join(name))?;
        }
        for patch in self.patches(recipe.name)? {
            key.file(&patch)?;
        }
        let mut environment = vec![];
        for &(name, value) in recipe.settings {
            key.add(name, value.as_bytes());
            environment.push((name, value.into()));
        }
        for &(name, step) in recipe.needs {
            key.add(name, step.key.as_bytes());
            environment.push((name, step.out.clone().into_os_string()));
        }
        let key = key.finish();
        Ok(Step {
            name: recipe.name,
            out: self.cache.join(format!("{}-{key}", recipe.name)),
            key,
            mib: recipe.mib,
            script,
            environment,
        })
    }

    /// Return the settings that the configuration of a debug kernel must have.
    pub fn config(&self, kernel: &str) -> Result<String, SetupError> {
        ["common", kernel]
            .map(|name| self.scripts.join(format!("configs/{name}.config")))
            .iter()
            .map(|path| fs::read_to_string(path).map_err(SetupError::io("read", path)))
            .collect()
    }

    /// Return the patches of a step, in order.
    fn patches(&self, name: &str) -> Result<Vec<PathBuf>, SetupError> {
        let folder = self.scripts.join("patches");
        let prefix = format!("{name}-");
        let mut found = vec![];
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            entries => entries.map_err(SetupError::io("read", &folder))?,
        };
        for entry in entries {
            let entry = entry.map_err(SetupError::io("read", &folder))?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                found.push(entry.path());
            }
        }
        found.sort();
        Ok(found)
    }

    /// Show a line that stays.
    pub fn note(&self, text: &str) {
        self.progress.note(text);
    }

    /// Fail if the disk cannot hold the results of the `steps` that are not made yet.
    pub fn check_space(&self, steps: &[&Step]) -> Result<(), SetupError> {
        let needed = needed(steps);
        if needed == 0 {
            return Ok(());
        }
        need_space(self.cache, needed, "the set-up")
    }

    /// Make the result of `step`, unless it is complete already. If another run is making it, wait for that run.
    pub fn make(&self, step: &Step) -> Result<(), SetupError> {
        if step.is_complete() {
            return Ok(());
        }
        let result = self.make_locked(step);
        if result.is_err() {
            self.failed.store(true, Ordering::SeqCst);
        }
        result
    }

    fn make_locked(&self, step: &Step) -> Result<(), SetupError> {
        fs::create_dir_all(&step.out).map_err(SetupError::io("make", &step.out))?;
        let line = self.progress.open_line(step.name);
        let mut size = FolderSize::of(&step.out);
        let lock = self.lock(step, &line, &mut size)?;
        if step.is_complete() {
            line.finish(size_of(&step.out));
            return Ok(());
        }

        let started = Instant::now();
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let mut child = Command::new("bash")
            .arg(&step.script)
            .envs(step.environment.iter().map(|(name, value)| (name, value)))
            .env("OUT", &step.out)
            .env("EXITMETER_CACHE", self.cache)
            .env("JOBS", jobs.to_string())
            // The script's input is the lock's file, which is empty. So a script that outlives this process keeps the
            // lock as long as it runs.
            .stdin(Stdio::from(
                lock.try_clone()
                    .map_err(SetupError::io("lock", &step.out))?,
            ))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // The script's processes can be ended together, and Ctrl-C reaches this process alone.
            .process_group(0)
            .spawn()
            .map_err(SetupError::io("run", &step.script))?;
        let stages = read_lines(child.stdout.take());
        let complaint = read_text(child.stderr.take());

        let status = loop {
            match stages.recv_timeout(TICK) {
                Ok(stage) => line.stage(&stage, size.now()),
                Err(RecvTimeoutError::Timeout) => line.tick(size.now()),
                Err(RecvTimeoutError::Disconnected) => {
                    thread::sleep(TICK);
                    line.tick(size.now());
                }
            }
            if self.has_to_stop() {
                stop(&mut child);
                return Err(SetupError::Interrupted);
            }
            if let Some(status) = child
                .try_wait()
                .map_err(SetupError::io("wait for", &step.script))?
            {
                break status;
            }
        };
        // Both pipes end with the last process that the script left behind. Until then its folder may change.
        for stage in stages {
            line.stage(&stage, size.now());
        }
        let complaint = complaint.join().unwrap_or_default();
        if !status.success() {
            return Err(self.failure(step, status, &complaint));
        }
        self.complete(step, started.elapsed())?;
        drop(lock);
        line.finish(size_of(&step.out));
        Ok(())
    }

    fn has_to_stop(&self) -> bool {
        self.interrupts.seen() || self.failed.load(Ordering::SeqCst)
    }

    /// Take the lock of a step. It is released by the last process that has it open.
    fn lock(
        &self,
        step: &Step,
        line: &ProgressLine<'_>,
        size: &mut FolderSize<'_>,
    ) -> Result<File, SetupError> {
        let (path, file) = self.lock_file(&step.out)?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::WOULDBLOCK) => line.stage("another run makes this; waiting", size.now()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(SetupError::io("lock", &path)(error.into())),
            }
            thread::sleep(TICK);
            line.tick(size.now());
            if self.has_to_stop() {
                return Err(SetupError::Interrupted);
            }
        }
    }

    /// Open the file that the makers of a result lock, and return it with its path. It is not in the result, since a script
    /// may empty its folder. It is never removed, since otherwise two runs could lock two files of the same name.
    pub fn lock_file(&self, out: &Path) -> Result<(PathBuf, File), SetupError> {
        let folder = self.cache.join("locks");
        fs::create_dir_all(&folder).map_err(SetupError::io("make", &folder))?;
        let path = folder.join(out.file_name().unwrap_or_default());
        let file = File::options()
            .create(true)
            .append(true)
            .read(true)
            .open(&path)
            .map_err(SetupError::io("open", &path))?;
        Ok((path, file))
    }

    /// Return the error of a script that failed, with the script's last sentence if it has one. The rest of its output
    /// is shown as lines that stay.
    fn failure(&self, step: &Step, status: ExitStatus, complaint: &str) -> SetupError {
        let (sentence, lines) = split_sentence(complaint);
        if !lines.is_empty() {
            self.progress.note(&lines.join("\n"));
        }
        SetupError::Script {
            step: step.name,
            reason: sentence.map_or_else(
                || {
                    format!(
                        "{} ended with {status}; try again, and if that does not help, remove {}",
                        step.script.display(),
                        step.out.display()
                    )
                },
                str::to_owned,
            ),
        }
    }

    /// Mark the result of a step as complete, once the disk has all of it.
    fn complete(&self, step: &Step, took: Duration) -> Result<(), SetupError> {
        let folder = File::open(&step.out).map_err(SetupError::io("open", &step.out))?;
        rustix::fs::syncfs(&folder)
            .map_err(|error| SetupError::io("write", &step.out)(error.into()))?;
        let marker = step.out.join(COMPLETE);
        // Count begun seconds, so that no step takes 0.
        let seconds = took.as_secs() + 1;
        fs::write(&marker, format!("{seconds}\n")).map_err(SetupError::io("write", &marker))
    }
}

/// Return the disk space that the `steps` still need, in MiB.
pub fn needed(steps: &[&Step]) -> u64 {
    steps
        .iter()
        .filter(|step| !step.is_complete())
        .map(|step| step.mib.saturating_sub(size_of(&step.out) >> 20))
        .sum()
}

/// Split the last sentence of a script, in the form of an error's text, from its other lines.
pub fn split_sentence(complaint: &str) -> (Option<&str>, Vec<&str>) {
    let mut lines: Vec<&str> = complaint.lines().collect();
    let at = lines
        .iter()
        .rposition(|line| line.starts_with("exitmeter: "));
    let sentence = at.map(|at| {
        let line = lines.remove(at);
        line.trim_start_matches("exitmeter: ").trim_end_matches('.')
    });
    (sentence, lines)
}

/// Return the size of a folder on the disk, in bytes. Unreadable folders count as empty.
pub fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?, entry)))
        .map(|(metadata, entry)| {
            let within = if metadata.is_dir() {
                size_of(&entry.path())
            } else {
                0
            };
            metadata.blocks() * 512 + within
        })
        .sum()
}

/// Size of a growing folder, measured without spending much time on it.
struct FolderSize<'a> {
    folder: &'a Path,
    bytes: u64,
    next: Instant,
}

impl<'a> FolderSize<'a> {
    fn of(folder: &'a Path) -> Self {
        Self {
            folder,
            bytes: 0,
            next: Instant::now(),
        }
    }

    /// Return the size in bytes, at most some seconds old.
    fn now(&mut self) -> u64 {
        let start = Instant::now();
        if start >= self.next {
            self.bytes = size_of(self.folder);
            let cost = start.elapsed();
            // Spend at most a fiftieth of one core.
            self.next = start + (cost * 50).max(Duration::from_secs(1));
        }
        self.bytes
    }
}

#[derive(Default)]
struct Key(Sha256);

impl Key {
    /// Add a named input. Lengths are hashed as well, so that no two different inputs give the same bytes.
    fn add(&mut self, name: &str, content: &[u8]) {
        for part in [name.as_bytes(), content] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
    }

    fn file(&mut self, path: &Path) -> Result<(), SetupError> {
        let content = fs::read(path).map_err(SetupError::io("read", path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        self.add(&name, &content);
        Ok(())
    }

    fn finish(self) -> String {
        self.0.finalize()[..6]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Read the lines of a pipe in a thread. The channel closes with the pipe.
fn read_lines(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let lines = pipe
            .map(BufReader::new)
            .into_iter()
            .flat_map(BufRead::lines);
        for line in lines.map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Read all text of a pipe in a thread, until the pipe closes.
fn read_text(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = vec![];
        if let Some(mut pipe) = pipe {
            // On an error, keep the text before it.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// End a script and all its children. They have time to end in order, so that they can remove their files elsewhere.
fn stop(child: &mut Child) {
    let group = Pid::from_child(child);
    let asked = Instant::now();
    // A signal can only fail if no process is left.
    let _ = kill_process_group(group, Signal::TERM);
    while test_kill_process_group(group).is_ok() {
        if asked.elapsed() > GRACE {
            let _ = kill_process_group(group, Signal::KILL);
            break;
        }
        // A dead child stays in the group until its status is read.
        let _ = child.try_wait();
        thread::sleep(TICK);
    }
    let _ = child.wait();
}
