// SPDX-License-Identifier: GPL-2.0

//! What a run leaves behind: the files of its folder.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use lab_agent::channel::Message;

use super::{Event, RunError, CONSOLE};
use crate::verdict::{self, End};

/// How many lines of a log are shown when a run fails, and of a fault that began before them.
const TAIL: usize = 40;

/// Writes down what a host says.
pub struct Record {
    folder: PathBuf,
    out: PathBuf,
    console: File,
    kernel: Log,
    stdout: Log,
    stderr: Log,
    noise: Log,
    /// The script's standard output, for the one who called for the run.
    said: Vec<u8>,
    /// The file of the out folder that is being received.
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
    /// Starts with empty logs; the console's file is the emulator's and has to be there.
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
            said: Vec::new(),
            file: None,
        })
    }

    /// Writes down a message, and tells of it.
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
                self.said.extend(bytes);
            }
            Message::Stderr(bytes) => {
                self.stderr.write(&bytes)?;
                listener(Event::Stderr(&bytes));
            }
            Message::Kernel(bytes) => {
                let text = match verdict::Record::parse(&bytes) {
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
        // A host does not write where it likes.
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
        // Ours to read at least.
        let _ = file.set_permissions(fs::Permissions::from_mode(mode & 0o755 | 0o600));
        self.file = Some(Incoming {
            path,
            file,
            size: 0,
        });
        Ok(())
    }

    /// Writes down bytes that came over the port and are no message.
    pub fn noise(&mut self, bytes: &[u8]) -> Result<(), RunError> {
        self.noise.write(bytes)
    }

    /// What the console said since the last time.
    pub fn console(&mut self) -> Result<Vec<u8>, RunError> {
        let mut bytes = Vec::new();
        self.console
            .read_to_end(&mut bytes)
            .map_err(RunError::io("read", &self.folder.join(CONSOLE)))?;
        Ok(bytes)
    }

    /// The last lines of the console, and of what else tells of the end of a run.
    pub fn tail(&self, end: &End) -> String {
        let names: &[&str] = match end {
            // It said all it could.
            End::Script(_) | End::Interrupted => &[],
            End::EmulatorDied | End::NoVerdict(_) => &[CONSOLE, "emulator.log", "bochs.log"],
            // A fault that is not bad enough for the console.
            End::Fault(_) if !self.tells_of_fault(CONSOLE) => &["kernel.log"],
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

    fn tells_of_fault(&self, name: &str) -> bool {
        self.log(name)
            .lines()
            .any(|line| verdict::fault_in(line).is_some())
    }

    fn log(&self, name: &str) -> String {
        let bytes = fs::read(self.folder.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The script's standard output.
    pub fn into_stdout(self) -> Vec<u8> {
        self.said
    }
}

/// The last lines of a log; with the first of its fault, which says what happened, where there is one before them.
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
    fn files_of_the_out_folder_come_whole() {
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
    fn the_end_of_a_log_has_the_beginning_of_its_fault() {
        let log = |before: usize, after: usize| {
            let fault =
                "[    5.0] BUG: kernel NULL pointer dereference, address: 0000000000000008\n";
            "before\n".repeat(before) + fault + &"after\n".repeat(after)
        };
        // Without one, or when it is among the last lines, these are all.
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
    fn a_host_writes_nowhere_but_to_the_out_folder() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = record(folder.path());
        for path in ["../x", "/etc/x", "a/../../x", "."] {
            assert!(record.message(file(path), &mut |_| {}).is_err(), "{path}");
        }
    }

    #[test]
    fn what_is_said_is_written_down_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = record(folder.path());
        let mut told = Vec::new();
        let messages = [
            Message::Stdout(b"out\n".to_vec()),
            Message::Stderr(b"err\n".to_vec()),
            Message::Kernel(b"6,1,1500000,-;kvm: ready\n".to_vec()),
        ];
        for message in messages {
            record
                .message(message, &mut |event| told.push(format!("{event:?}")))
                .unwrap();
        }
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(read("stdout.log"), "out\n");
        assert_eq!(read("stderr.log"), "err\n");
        assert_eq!(read("kernel.log"), "[    1.500000] kvm: ready\n");
        assert_eq!(told.len(), 3);
        assert_eq!(record.into_stdout(), b"out\n");
    }
}
