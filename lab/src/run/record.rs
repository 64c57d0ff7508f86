// SPDX-License-Identifier: GPL-2.0

//! Record of a run: the files of its folder.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
};

use lab_agent::channel::Message;

use super::folder::CONSOLE;
use crate::{
    outcome::RunError,
    verdict::{self, RunEnd},
};

/// Number of a log's last lines that are shown if a run fails. As many are shown of a fault that began before them.
const TAIL: usize = 40;

/// Event of a run, reported as it happens.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The run begins this step.
    Stage(&'a str),
    /// The script wrote this to its standard output.
    Stdout(&'a [u8]),
    /// The script wrote this to its standard error.
    Stderr(&'a [u8]),
    /// The host's kernel log has this line.
    Kernel(&'a str),
}

/// Writer of a run's record.
pub struct Record {
    folder: PathBuf,
    out: PathBuf,
    console: File,
    kernel: Log,
    stdout: Log,
    stderr: Log,
    noise: Log,
    /// The script's standard output, for the caller.
    output: Vec<u8>,
    /// File of the out folder that is being received.
    file: Option<Incoming>,
}

struct Incoming {
    path: PathBuf,
    file: File,
    size: u64,
}

/// A log with its path, for errors.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    fn new(path: PathBuf) -> Result<Self, RunError> {
        let file = File::create(&path).map_err(RunError::io("write", &path))?;
        Ok(Self { path, file })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), RunError> {
        self.file
            .write_all(bytes)
            .map_err(RunError::io("write", &self.path))
    }
}

impl Record {
    /// Start a record with empty logs. The console's file, which the emulator writes, must exist.
    pub fn new(folder: &Path, out: &Path) -> Result<Self, RunError> {
        let log = |name| Log::new(folder.join(name));
        let console = folder.join(CONSOLE);
        fs::create_dir_all(out).map_err(RunError::io("make", out))?;
        Ok(Self {
            folder: folder.into(),
            out: out.into(),
            console: File::open(&console).map_err(RunError::io("read", &console))?,
            kernel: log("kernel.log")?,
            stdout: log("stdout.log")?,
            stderr: log("stderr.log")?,
            noise: log("port.log")?,
            output: Vec::new(),
            file: None,
        })
    }

    /// Write a message to the record, and report it to `listener`.
    pub fn message(
        &mut self,
        message: Message,
        listener: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), RunError> {
        match message {
            Message::Stage(text) => listener(Event::Stage(&text)),
            Message::Stdout(bytes) => {
                self.stdout.write(&bytes)?;
                listener(Event::Stdout(&bytes));
                self.output.extend(bytes);
            }
            Message::Stderr(bytes) => {
                self.stderr.write(&bytes)?;
                listener(Event::Stderr(&bytes));
            }
            Message::Kernel(bytes) => {
                let text = match verdict::KernelRecord::parse(&bytes) {
                    Some(record) => record.to_string(),
                    None => format!("{}\n", String::from_utf8_lossy(&bytes).trim_end()),
                };
                self.kernel.write(text.as_bytes())?;
                for line in text.lines() {
                    listener(Event::Kernel(line));
                }
            }
            Message::File { mode, path } => self.begin(mode, &path)?,
            Message::FileData(bytes) => {
                if let Some(incoming) = &mut self.file {
                    incoming
                        .file
                        .write_all(&bytes)
                        .map_err(RunError::io("write", &incoming.path))?;
                    incoming.size += bytes.len() as u64;
                }
            }
            Message::FileEnd(size) => {
                if let Some(incoming) = self.file.take().filter(|incoming| incoming.size != size) {
                    return Err(RunError::Machine(format!(
                        "{} came with {} bytes and not {size}",
                        incoming.path.display(),
                        incoming.size
                    )));
                }
            }
            Message::Hello
            | Message::Verdict(_)
            | Message::Failure(_)
            | Message::Run { .. }
            | Message::Started(_)
            | Message::Reboot => {}
        }
        Ok(())
    }

    fn begin(&mut self, mode: u32, path: &[u8]) -> Result<(), RunError> {
        let path = PathBuf::from(String::from_utf8_lossy(path).into_owned());
        // A host may only write to the out folder.
        if !path
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
        {
            return Err(RunError::Machine(format!(
                "the host sent a file with the path {}",
                path.display()
            )));
        }
        let path = self.out.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(RunError::io("make", parent))?;
        }
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(RunError::io("write", &path))?;
        // The user can at least read the file.
        let _ = file.set_permissions(fs::Permissions::from_mode(mode & 0o755 | 0o600));
        self.file = Some(Incoming {
            path,
            file,
            size: 0,
        });
        Ok(())
    }

    /// Write bytes of the port that are not part of a message.
    pub fn noise(&mut self, bytes: &[u8]) -> Result<(), RunError> {
        self.noise.write(bytes)
    }

    /// Return the console's output since the last call.
    pub fn console(&mut self) -> Result<Vec<u8>, RunError> {
        let mut bytes = Vec::new();
        self.console
            .read_to_end(&mut bytes)
            .map_err(RunError::io("read", &self.folder.join(CONSOLE)))?;
        Ok(bytes)
    }

    /// Return the last lines of the console, and of other logs that explain the end of the run.
    pub fn tail(&self, end: &RunEnd) -> String {
        let names: &[&str] = match end {
            // Nothing needs an explanation.
            RunEnd::Script(_) | RunEnd::Interrupted => &[],
            RunEnd::EmulatorDied | RunEnd::NoVerdict(_) => &[CONSOLE, "emulator.log", "bochs.log"],
            // The console's log level hides this fault.
            RunEnd::Fault(_) if !self.has_fault(CONSOLE) => &["kernel.log"],
            _ => &[CONSOLE],
        };
        let mut text = String::new();
        for name in names {
            let log = self.log(name);
            if !log.is_empty() {
                let _ = write!(text, "--- the end of {name}:\n{}\n", ending(&log));
            }
        }
        text
    }

    fn has_fault(&self, name: &str) -> bool {
        self.log(name)
            .lines()
            .any(|line| verdict::fault_in(line).is_some())
    }

    fn log(&self, name: &str) -> String {
        let bytes = fs::read(self.folder.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Return the script's standard output.
    pub fn into_stdout(self) -> Vec<u8> {
        self.output
    }
}

/// Return the last lines of a log, and the first lines of a fault that began before them.
fn ending(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let last = lines.len().saturating_sub(TAIL);
    let is_fault = |line: &&str| verdict::fault_in(line).is_some();
    let fault = lines[..last].iter().position(is_fault).unwrap_or(last);
    let left_out = fault + TAIL..last;
    if left_out.is_empty() {
        return lines[fault..].join("\n");
    }
    [
        &lines[fault..left_out.start],
        &["..."],
        &lines[left_out.end..],
    ]
    .concat()
    .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(folder: &Path) -> Record {
        File::create(folder.join(CONSOLE)).unwrap();
        Record::new(folder, &folder.join("out")).unwrap()
    }

    fn file(path: &str) -> Message {
        Message::File {
            mode: 0o100_755,
            path: path.into(),
        }
    }

    #[test]
    fn files_of_the_out_folder_arrive_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = record(folder.path());
        let mut take = |message| record.message(message, &mut |_| {});
        take(file("a/b")).unwrap();
        take(Message::FileData(b"one ".to_vec())).unwrap();
        take(Message::FileData(b"two".to_vec())).unwrap();
        take(Message::FileEnd(7)).unwrap();
        assert_eq!(fs::read(folder.path().join("out/a/b")).unwrap(), b"one two");
        take(file("c")).unwrap();
        assert!(take(Message::FileEnd(1)).is_err(), "a byte is missing");
    }

    #[test]
    fn the_end_of_a_log_includes_the_beginning_of_its_fault() {
        let log = |before: usize, after: usize| {
            let fault =
                "[    5.0] BUG: kernel NULL pointer dereference, address: 0000000000000008\n";
            "before\n".repeat(before) + fault + &"after\n".repeat(after)
        };
        // Without a fault, or with one among the last lines, only the last lines are shown.
        assert_eq!(ending(&"line\n".repeat(100)).lines().count(), TAIL);
        assert_eq!(ending("one\ntwo"), "one\ntwo");
        assert_eq!(ending(&log(100, 9)).lines().count(), TAIL);
        for (after, shown) in [(TAIL, TAIL + 1), (60, 61), (79, 80), (500, 2 * TAIL + 1)] {
            let text = ending(&log(100, after));
            assert_eq!(text.lines().count(), shown);
            assert!(text.starts_with("[    5.0] BUG: "), "{text}");
            assert_eq!(text.contains("..."), after > 79, "{text}");
        }
    }

    #[test]
    fn a_host_can_only_write_to_the_out_folder() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = record(folder.path());
        for path in ["../x", "/etc/x", "a/../../x", "."] {
            assert!(record.message(file(path), &mut |_| {}).is_err(), "{path}");
        }
    }

    #[test]
    fn messages_are_recorded_and_reported() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = record(folder.path());
        let mut reported = Vec::new();
        let messages = [
            Message::Stdout(b"out\n".to_vec()),
            Message::Stderr(b"err\n".to_vec()),
            Message::Kernel(b"6,1,1500000,-;kvm: ready\n".to_vec()),
        ];
        for message in messages {
            record
                .message(message, &mut |event| reported.push(format!("{event:?}")))
                .unwrap();
        }
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(read("stdout.log"), "out\n");
        assert_eq!(read("stderr.log"), "err\n");
        assert_eq!(read("kernel.log"), "[    1.500000] kvm: ready\n");
        assert_eq!(reported.len(), 3);
        assert_eq!(record.into_stdout(), b"out\n");
    }
}
