// SPDX-License-Identifier: GPL-2.0

//! Runs Debian's perf.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::fd::AsRawFd as _,
    process::{Child, Command, Stdio},
};

use anyhow::{bail, ensure, Context as _, Result};

use super::{ftrace, CountedExits, RunningMeter};

/// Folder of perf in the host.
pub const FOLDER: &str = "/usr/local/lib/perf";

const CONTROL: &str = "/tmp/perf.control";
const ACKNOWLEDGE: &str = "/tmp/perf.acknowledged";
const RESULT: &str = "/tmp/perf.result";
const OUTPUT: &str = "/tmp/perf.output";

/// Time limit for perf to start, in milliseconds of the host.
const START_TIMEOUT: i32 = 60_000;

/// A process of perf that runs beside the guests.
pub struct Perf {
    process: Child,
    seen: fn() -> Result<CountedExits>,
}

impl Perf {
    /// Start `perf stat -e kvm:kvm_exit` on all CPUs.
    pub fn stat() -> Result<Self> {
        let command = ["stat", "-a", "-x", ",", "-e", "kvm:kvm_exit", "-o", RESULT];
        Self::start(&command, || {
            let text = fs::read_to_string(RESULT).context("perf stat left nothing")?;
            let line = text.lines().find(|line| line.contains("kvm:kvm_exit"));
            let count = line.and_then(|line| line.split(',').next()?.parse().ok());
            Ok(CountedExits {
                exits: Some(count.with_context(|| format!("perf stat said '{text}'"))?),
                remark: None,
            })
        })
    }

    /// Start `perf kvm stat record` on all CPUs.
    pub fn kvm_stat_record() -> Result<Self> {
        let command = ["kvm", "-o", RESULT, "stat", "record", "-a"];
        Self::start(&command, || {
            let size = fs::metadata(RESULT).context("perf left no data")?.len();
            let output = fs::read_to_string(OUTPUT).unwrap_or_default();
            // "[ perf record: Captured and wrote 13.735 MB FILE (120012 samples) ]"
            let samples = output
                .split_once(" samples)")
                .and_then(|(before, _)| before.rsplit_once('(')?.1.parse::<u64>().ok())
                .with_context(|| format!("perf record said '{output}'"))?;
            Ok(CountedExits {
                // The samples are exits and entries, and a further event for each OUT.
                exits: Some(samples / 2),
                remark: Some(format!("{samples} samples in {:.1} MB", size as f64 / 1e6)),
            })
        })
    }

    fn start(arguments: &[&str], seen: fn() -> Result<CountedExits>) -> Result<Self> {
        ftrace::mount()?;
        let (mut control, mut acknowledged) = (fifo(CONTROL)?, fifo(ACKNOWLEDGE)?);
        let output = File::create(OUTPUT)?;
        let mut process = Command::new(format!("{FOLDER}/lib/ld-linux-x86-64.so.2"))
            .args(["--library-path", &format!("{FOLDER}/lib")])
            .arg(format!("{FOLDER}/perf"))
            .args(arguments)
            .arg("--control")
            .arg(format!("fifo:{CONTROL},{ACKNOWLEDGE}"))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("cannot run perf in this host")?;
        // perf answers once it counts.
        control.write_all(b"ping\n")?;
        if !wait(&acknowledged)? {
            let _ = process.kill();
            process.wait()?;
            let output = fs::read_to_string(OUTPUT).unwrap_or_default();
            bail!("perf does not answer: {}", output.trim());
        }
        let mut answer = [0; 16];
        let length = acknowledged.read(&mut answer)?;
        ensure!(
            answer[..length].starts_with(b"ack"),
            "perf does not answer with ack"
        );
        Ok(Self { process, seen })
    }
}

impl RunningMeter for Perf {
    fn stop(mut self: Box<Self>) -> Result<CountedExits> {
        // SAFETY: This signals a child that has not been waited for.
        unsafe { libc::kill(self.process.id() as libc::pid_t, libc::SIGINT) };
        self.process.wait()?;
        let seen = (self.seen)();
        for file in [CONTROL, ACKNOWLEDGE, RESULT, OUTPUT] {
            let _ = fs::remove_file(file);
        }
        seen
    }
}

/// Make a FIFO and open it for reading and writing, so that no open blocks.
fn fifo(path: &str) -> Result<File> {
    let name = CString::new(path)?;
    // SAFETY: The string ends with a NUL.
    let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
    if made != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot make {path}"));
    }
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}

/// Wait until there is something to read. Return `false` on a timeout.
fn wait(file: &File) -> Result<bool> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one entry, and its file is open.
    match unsafe { libc::poll(&mut poll, 1, START_TIMEOUT) } {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(io::Error::last_os_error()).context("poll"),
    }
}
