// SPDX-License-Identifier: GPL-2.0

//! The host's command `guest`: boots real Linux guests under KVM and runs commands in them.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt as _, net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use clap::{Args, Parser, Subcommand};
use lab_agent::{
    channel::{Item, Message, Receiver, Sender},
    initramfs,
    settings::{self, GUEST_COMMAND_LINE},
};
use rustix::{
    event::{poll, PollFd, PollFlags, Timespec},
    fs::{flock, FlockOperation},
    process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal},
};

/// VMM of the guest: QEMU's smallest machine, with KVM's in-kernel interrupt controllers and two serial ports.
const VMM: &str = "/usr/bin/qemu-system-x86_64-microvm";

/// Status of a command that could not be run, as with `env` and `timeout`.
const FAILED: u8 = 125;

/// Boot Linux guests under KVM, and run commands in them.
#[derive(Debug, Parser)]
#[command(name = "guest")]
struct Guest {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start a guest, and wait until it accepts commands.
    Boot(Boot),
    /// Run a command in a guest; its output and status become those of this command (125: it could not be run).
    ///
    /// One word is a line for the guest's shell. Several words are a command and its arguments, passed on unchanged.
    Run {
        #[command(flatten)]
        guest: GuestArgs,
        /// A line for the guest's shell, or a command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Restart a guest, and wait until it accepts commands again.
    Reboot(GuestArgs),
    /// End a guest's VMM, and wait until it is gone.
    Stop(GuestArgs),
    /// Print the process ID of a guest's VMM; KVM names the VM kvm-PID.
    Pid(GuestArgs),
}

#[derive(Args, Debug)]
struct GuestArgs {
    /// Name of the guest.
    #[arg(long, default_value = "guest", value_parser = parse_name)]
    name: String,
    /// Longest time to wait, in seconds of the host.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
}

#[derive(Args, Debug)]
struct Boot {
    #[command(flatten)]
    guest: GuestArgs,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u32,
    /// Text to append to the guest kernel's command line.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    append: String,
    /// A file for the guest, in /root or at DEST.
    #[arg(long = "file", value_name = "SRC[:DEST]")]
    files: Vec<String>,
    /// More arguments for the VMM, such as `-cpu host,-x2apic`.
    #[arg(last = true)]
    vmm: Vec<String>,
}

/// Parse the name of a guest, which becomes part of file names.
fn parse_name(text: &str) -> Result<String, String> {
    if !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
    {
        Ok(text.to_owned())
    } else {
        Err("a guest's name has letters, digits, - and _ only".to_owned())
    }
}

/// Run the command `guest`.
pub fn command() -> ExitCode {
    let done = match Guest::parse().verb {
        Verb::Boot(options) => boot(&options),
        Verb::Run { guest, command } => run(&guest, &line(&command)),
        Verb::Reboot(guest) => reboot(&guest),
        Verb::Stop(guest) => stop(&guest),
        Verb::Pid(guest) => GuestFiles::of(&guest).pid().map(|pid| {
            println!("{}", pid.as_raw_nonzero());
            0
        }),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("guest: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

/// Make a line for a shell. One word is the line itself; the words of a command are quoted for the shell.
fn line(words: &[String]) -> String {
    if let [line] = words {
        return line.clone();
    }
    let quoted = words.iter().map(|word| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "%+,-./:=@_".contains(c);
        match !word.is_empty() && word.chars().all(is_plain) {
            true => word.clone(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// Paths of a guest's files.
struct GuestFiles {
    name: String,
    folder: PathBuf,
    console: PathBuf,
    vmm_log: PathBuf,
}

impl GuestFiles {
    fn of(guest: &GuestArgs) -> Self {
        let name = &guest.name;
        let out = std::env::var_os("OUT").map_or_else(|| settings::OUT.into(), PathBuf::from);
        Self {
            name: name.clone(),
            folder: Path::new("/run/guests").join(name),
            console: out.join(format!("{name}.console.log")),
            vmm_log: out.join(format!("{name}.vmm.log")),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("commands")
    }

    /// Return the VMM's process, as long as it lives.
    fn pid(&self) -> Result<Pid> {
        let alive = || {
            let pid = fs::read_to_string(self.folder.join("pid"))
                .ok()?
                .parse()
                .ok()
                .and_then(Pid::from_raw)?;
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
            // A zombie counts as gone.
            let state = stat.rsplit_once(')')?.1.trim_start().chars().next()?;
            (state != 'Z' && state != 'X').then_some(pid)
        };
        alive().with_context(|| {
            format!(
                "there is no guest {}; start one with: guest boot --name {}",
                self.name, self.name
            )
        })
    }

    /// Return the last lines of the guest's logs, to explain why its VMM ended or why it does not answer.
    fn log_tails(&self) -> String {
        let mut text = String::new();
        for path in [&self.vmm_log, &self.console] {
            let tail = tail(path);
            if !tail.trim().is_empty() {
                let _ = write!(
                    text,
                    "\n--- the end of {}:\n{}",
                    path.display(),
                    tail.trim_end()
                );
            }
        }
        text
    }
}

/// Return the end of a log.
fn tail(path: &Path) -> String {
    const LONGEST: u64 = 2000;
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(LONGEST)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

fn boot(options: &Boot) -> Result<u8> {
    let started = Instant::now();
    let files = GuestFiles::of(&options.guest);
    ensure!(
        files.pid().is_err(),
        "the guest {} runs already; end it with: guest stop --name {}",
        files.name,
        files.name
    );
    ensure!(
        Path::new("/dev/kvm").exists(),
        "the host has no /dev/kvm; load kvm_intel or kvm_amd"
    );
    if files.folder.exists() {
        fs::remove_dir_all(&files.folder)?;
    }
    fs::create_dir_all(&files.folder)?;
    let initramfs = files.folder.join("initramfs");
    pack(&initramfs, &options.files).context("the guest's initramfs cannot be written")?;

    let mut command = Command::new(VMM);
    command
        .args([
            "-M",
            "microvm,rtc=on,pit=off,pic=off",
            "-accel",
            "kvm",
            "-cpu",
            "host",
        ])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args([
            "-m",
            &options.memory.to_string(),
            "-smp",
            &options.vcpus.to_string(),
        ])
        .args(["-kernel", settings::GUEST_KERNEL, "-initrd"])
        .arg(&initramfs)
        .args([
            "-append",
            &format!("{GUEST_COMMAND_LINE} {}", options.append),
        ])
        .args([
            "-chardev",
            &format!("file,id=console,path={}", files.console.display()),
        ])
        .args(["-serial", "chardev:console"])
        .args([
            "-chardev",
            &format!(
                "socket,id=commands,path={},server=on,wait=off",
                files.socket().display()
            ),
        ])
        .args(["-device", "isa-serial,chardev=commands,index=1"]);
    if options.vcpus > 1 {
        // SeaBIOS counts vCPUs in a way that needs all of them to run at the same time.
        command.args(["-bios", "qboot.rom"]);
    }
    let log = File::create(&files.vmm_log)?;
    command
        .args(&options.vmm)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: Makes only a call that is allowed between fork and exec. With it the guest outlives the shell that
    // started it.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let mut vmm = command
        .spawn()
        .with_context(|| format!("{VMM} cannot be started"))?;
    fs::write(files.folder.join("pid"), vmm.id().to_string())?;

    let deadline = started + Duration::from_secs(options.guest.timeout);
    let line = loop {
        match UnixStream::connect(files.socket()) {
            Ok(line) => break line,
            Err(_) if vmm.try_wait()?.is_none() && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(_) => bail!("the VMM did not start{}", files.log_tails()),
        }
    };
    let mut line = Connection::new(line, deadline, None)?;
    line.wait_for(&Message::Hello, &files)?;
    eprintln!(
        "guest: {} is up after {:.1} s",
        files.name,
        started.elapsed().as_secs_f64()
    );
    Ok(0)
}

/// Write the guest's initramfs, with this program as the first process and with `files`.
fn pack(path: &Path, files: &[String]) -> Result<()> {
    initramfs::write(path, Path::new("/proc/self/exe"), |archive| {
        for spec in files {
            let (source, place) = spec.split_once(':').unwrap_or((spec, ""));
            let name = Path::new(source).file_name().unwrap_or_default();
            let place = Path::new(settings::HOME).join(if place.is_empty() {
                Path::new(name)
            } else {
                Path::new(place)
            });
            let place = place.to_str().context("a file's name is not UTF-8")?;
            let file = File::open(source).with_context(|| format!("{source} cannot be read"))?;
            let facts = file.metadata()?;
            for (at, _) in place.match_indices('/').skip(1) {
                archive.folder(&place[..at], 0o755)?;
            }
            archive.file(place, facts.mode() & 0o777, facts.len(), file)?;
        }
        Ok(())
    })
}

fn run(guest: &GuestArgs, command: &str) -> Result<u8> {
    let files = GuestFiles::of(guest);
    let mut line = Connection::to(&files, guest)?;
    let number = std::process::id().into();
    line.send(&Message::Run {
        number,
        command: command.as_bytes().to_vec(),
    })?;
    // Skip what an interrupted `guest run` left on the line.
    line.wait_for(&Message::Started(number), &files)?;
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    loop {
        match line.next(&files)? {
            Item::Message(Message::Stdout(bytes)) => {
                stdout.write_all(&bytes)?;
                stdout.flush()?;
            }
            Item::Message(Message::Stderr(bytes)) => stderr.write_all(&bytes)?,
            Item::Message(Message::Verdict(status)) => {
                return Ok(u8::try_from(status).unwrap_or(u8::MAX));
            }
            Item::Message(Message::Hello) => bail!("the guest restarted{}", files.log_tails()),
            Item::Damage(text) => bail!("the line to the guest is damaged: {text}"),
            Item::Message(_) | Item::Noise(_) => {}
        }
    }
}

fn reboot(guest: &GuestArgs) -> Result<u8> {
    let started = Instant::now();
    let files = GuestFiles::of(guest);
    let mut line = Connection::to(&files, guest)?;
    line.send(&Message::Reboot)?;
    line.wait_for(&Message::Hello, &files)?;
    eprintln!(
        "guest: {} is up again after {:.1} s",
        files.name,
        started.elapsed().as_secs_f64()
    );
    Ok(0)
}

fn stop(guest: &GuestArgs) -> Result<u8> {
    let files = GuestFiles::of(guest);
    let pid = files.pid()?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_send_signal(&pidfd, Signal::TERM)?;
    if !wait_for(&pidfd, Instant::now() + Duration::from_secs(10))? {
        pidfd_send_signal(&pidfd, Signal::KILL)?;
        ensure!(
            wait_for(&pidfd, Instant::now() + Duration::from_secs(guest.timeout))?,
            "the VMM of guest {} does not end",
            files.name
        );
    }
    fs::remove_dir_all(&files.folder)?;
    Ok(0)
}

/// Wait until there is something to read or the source ends. Return false if the deadline came first.
fn wait_for(source: &impl AsFd, deadline: Instant) -> Result<bool> {
    let mut sources = [PollFd::new(source, PollFlags::IN)];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut sources, Some(&Timespec::try_from(left)?)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Line to a guest, for one user at a time.
struct Connection {
    sender: Sender<UnixStream>,
    receiver: Receiver,
    stream: UnixStream,
    items: VecDeque<Item>,
    deadline: Instant,
    /// Lock on the line, held as long as this lives. `None` while the guest boots, when nobody else knows it.
    _lock: Option<File>,
}

impl Connection {
    fn new(stream: UnixStream, deadline: Instant, lock: Option<File>) -> Result<Self> {
        Ok(Self {
            sender: Sender::new(stream.try_clone()?),
            receiver: Receiver::new(),
            stream,
            items: VecDeque::new(),
            deadline,
            _lock: lock,
        })
    }

    fn to(files: &GuestFiles, guest: &GuestArgs) -> Result<Self> {
        files.pid()?;
        let lock = File::create(files.folder.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let stream = UnixStream::connect(files.socket())
            .with_context(|| format!("the VMM of guest {} does not answer", files.name))?;
        let deadline = Instant::now() + Duration::from_secs(guest.timeout);
        Self::new(stream, deadline, Some(lock))
    }

    fn send(&mut self, message: &Message) -> Result<()> {
        self.sender
            .send(message)
            .context("the guest cannot be spoken to")
    }

    /// Wait for the next item.
    fn next(&mut self, files: &GuestFiles) -> Result<Item> {
        loop {
            if let Some(item) = self.items.pop_front() {
                return Ok(item);
            }
            if !wait_for(&self.stream, self.deadline)? {
                bail!(
                    "the guest {} did not answer in time{}",
                    files.name,
                    files.log_tails()
                );
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes)? {
                0 => bail!("the VMM of guest {} ended{}", files.name, files.log_tails()),
                length => self.items.extend(self.receiver.receive(&bytes[..length])),
            }
        }
    }

    /// Skip everything up to and including `message`.
    fn wait_for(&mut self, message: &Message, files: &GuestFiles) -> Result<()> {
        while !matches!(self.next(files)?, Item::Message(got) if got == *message) {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    use super::*;

    /// Return the words that a shell reads from a line, each followed by a NUL.
    fn words(line: &str) -> Vec<u8> {
        let output = Command::new("sh").args(["-c", line]).output();
        output.expect("there is a shell").stdout
    }

    #[test]
    fn several_words_reach_the_guest_unchanged() {
        let hostile = [
            "printf", r"%s\0", "a b", "", "it's", "$HOME", "\"`id`\"", "*", "x\ny", "-n", "a=b",
        ];
        let line = line(&hostile.map(str::to_owned));
        let expected: String = hostile
            .iter()
            .skip(2)
            .map(|word| format!("{word}\0"))
            .collect();
        assert_eq!(words(&line), expected.as_bytes());
    }

    #[test]
    fn signals_do_not_postpone_a_deadline() {
        extern "C" fn ignore(_: libc::c_int) {}
        // SAFETY: The handler does nothing. It stays, and no other test uses the signal.
        unsafe { libc::signal(libc::SIGUSR1, ignore as *const () as libc::sighandler_t) };
        // SAFETY: Has no preconditions.
        let waiting = unsafe { libc::pthread_self() };
        let (silent, _other_end) = UnixStream::pair().unwrap();
        let (wait, signals) = (Duration::from_millis(100), Duration::from_secs(2));
        let waits = AtomicBool::new(true);
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                while waits.load(SeqCst) && start.elapsed() < signals {
                    // SAFETY: The scope's thread lives until this one has ended.
                    unsafe { libc::pthread_kill(waiting, libc::SIGUSR1) };
                    thread::sleep(Duration::from_millis(20));
                }
            });
            assert!(!wait_for(&silent, start + wait).unwrap());
            waits.store(false, SeqCst);
        });
        assert!((wait..signals).contains(&start.elapsed()));
    }

    #[test]
    fn one_word_is_a_line_for_the_shell() {
        let one = line(&["printf %s $((1 + 1)) | cat".to_owned()]);
        assert_eq!(words(&one), b"2");
    }
}
