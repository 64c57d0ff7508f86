// SPDX-License-Identifier: GPL-2.0

//! First process of the host and of the guest in it.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::{
        ffi::OsStringExt as _,
        fs::{symlink, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
        process::CommandExt as _,
    },
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{bail, Context as _, Result};
use lab_agent::{
    channel::{Item, Message, Receiver, Sender},
    cpio,
    settings::{self, Settings, Task},
};
use rustix::{
    fs::OFlags,
    mount::{mount, MountFlags},
    system::{reboot, RebootCommand},
    termios::{tcgetattr, tcsetattr, OptionalActions},
};

use crate::{
    child::{self, KernelLog},
    modules,
    port::Port,
};

/// The guest's line for commands, its second serial port. The first is its console.
const GUEST_LINE: &str = "/dev/ttyS1";

/// Folder of the scheduler's fair servers, with a folder for each CPU.
const FAIR_SERVERS: &str = "/sys/kernel/debug/sched/fair_server";

/// Suffixes of the releases of the slow debug kernels (scripts/configs).
const DEBUG_SUFFIXES: [&str; 2] = ["-debug", "-kcsan"];

/// Largest archive that a saved machine accepts, in bytes.
const MAX_ARCHIVE: usize = 1 << 28;

/// Run the host: mount file systems, load modules, run the script, and end the machine. Returns only if the machine
/// cannot be ended.
pub fn host() -> ExitCode {
    if let Err(error) = run_host() {
        // If the port cannot be used, only the console is left, and the lab sees a host without a verdict.
        let text = format!("{error:#}");
        eprintln!("lab: {text}");
        if let Ok(port) = Port::open() {
            let _ = Sender::new(port).send(&Message::Failure(text));
        }
    }
    end_machine(RebootCommand::PowerOff)
}

fn run_host() -> Result<()> {
    mount_all()?;
    let mut sender = Sender::new(Port::open().context("the port to the lab cannot be opened")?);
    sender.send(&Message::Hello)?;
    disable_fair_servers()?;
    let mut settings = read_settings()?;
    let mut log = KernelLog::open().context("the kernel log cannot be opened")?;
    log.drain(&mut |message| sender.send(&message))?;

    if let Some(module) = &settings.kvm {
        sender.send(&Message::Stage(format!("loading {}", module.name)))?;
        let loaded = modules::load(&module.name, &module.parameters);
        log.drain(&mut |message| sender.send(&message))?;
        loaded?;
    }
    if settings.task == Task::Save {
        (sender, log) = save_and_resume()?;
        log.drain(&mut |message| sender.send(&message))?;
        settings = read_settings()?;
    }
    let mut command = match &settings.task {
        Task::Run(words) => {
            sender.send(&Message::Stage(format!("running {}", words.join(" "))))?;
            let (program, arguments) = words.split_first().context("there is nothing to run")?;
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        Task::Shell => {
            sender.send(&Message::Stage("a shell".to_owned()))?;
            return shell();
        }
        Task::Save => bail!("a host that was saved is told to be saved again"),
    };
    environment(&mut command);
    let status = child::run(command, Some(&mut log), &mut |message| {
        sender.send(&message)
    })
    .with_context(|| format!("{:?} cannot be run", settings.task))?;
    send_folder(&mut sender, Path::new(settings::OUT), Path::new(""))?;
    log.drain(&mut |message| sender.send(&message))?;
    sender.send(&Message::Verdict(status))?;
    Ok(())
}

fn read_settings() -> Result<Settings> {
    let cannot = || format!("{} cannot be read", settings::PATH);
    let text = fs::read(settings::PATH).with_context(cannot)?;
    serde_json::from_slice(&text).with_context(cannot)
}

/// Save the machine. In each run that continues from it, unpack the archive of that run. The lab sees such a run begin
/// here, so it gets the kernel log from its start.
fn save_and_resume() -> Result<(Sender<Port>, KernelLog)> {
    let mut port = Port::open()?;
    rustix::fs::sync();
    port.save_machine();
    let mut length = [0; 8];
    port.read_exact(&mut length);
    let length = u64::from_le_bytes(length);
    // A machine that was not saved reads a length that is too large.
    let length = usize::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_ARCHIVE);
    let mut archive = vec![0; length.context("the emulator cannot save the machine")?];
    port.read_exact(&mut archive);
    let mut sender = Sender::new(port);
    sender.send(&Message::Hello)?;
    cpio::unpack(&archive, Path::new("/"))?;
    Ok((sender, KernelLog::open()?))
}

/// Set the environment and working directory that host and guest give to a command.
fn environment(command: &mut Command) {
    command
        .current_dir(settings::HOME)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/sbin")
        .env("HOME", settings::HOME)
        .env("OUT", settings::OUT)
        .env("TERM", "linux")
        .env("LANG", "C.UTF-8");
}

/// Run a shell on the console until it ends.
fn shell() -> Result<()> {
    let mut command = Command::new("/bin/sh");
    command.arg("-l");
    environment(&mut command);
    let console = File::options().read(true).write(true).open("/dev/ttyS0")?;
    command
        .stdin(console.try_clone()?)
        .stdout(console.try_clone()?)
        .stderr(console);
    // SAFETY: Makes only calls that are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
    command.spawn()?.wait()?;
    Ok(())
}

/// Run the guest: mount file systems, and run commands as they come until the VMM ends the guest.
pub fn guest() -> ExitCode {
    if let Err(error) = run_guest() {
        eprintln!("guest: {error:#}");
    }
    end_machine(RebootCommand::Restart)
}

fn run_guest() -> Result<()> {
    mount_all()?;
    let mut line = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NOCTTY.bits() as i32)
        .open(GUEST_LINE)
        .with_context(|| format!("{GUEST_LINE} cannot be opened"))?;
    let mut mode = tcgetattr(&line)?;
    mode.make_raw();
    tcsetattr(&line, OptionalActions::Flush, &mode)?;

    let mut sender = Sender::new(line.try_clone()?);
    let mut receiver = Receiver::new();
    sender.send(&Message::Hello)?;
    let mut bytes = [0; 4096];
    loop {
        let length = line.read(&mut bytes)?;
        for item in receiver.receive(&bytes[..length]) {
            match item {
                Item::Message(Message::Run { number, command }) => {
                    sender.send(&Message::Started(number))?;
                    let mut shell = Command::new("/bin/sh");
                    shell.arg("-c").arg(std::ffi::OsString::from_vec(command));
                    environment(&mut shell);
                    let status = child::run(shell, None, &mut |message| sender.send(&message))?;
                    sender.send(&Message::Verdict(status))?;
                }
                Item::Message(Message::Reboot) => return Ok(()),
                // The sender notices the missing answer.
                Item::Message(_) | Item::Noise(_) | Item::Damage(_) => {}
            }
        }
    }
}

/// Send the files of a folder and its subfolders. `path` is the folder's name for the lab.
fn send_folder(sender: &mut Sender<Port>, folder: &Path, path: &Path) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    for name in names {
        let (source, path) = (folder.join(&name), path.join(&name));
        // A file may vanish meanwhile: the script may have left something running.
        let Ok(facts) = fs::symlink_metadata(&source) else {
            continue;
        };
        if facts.is_dir() {
            send_folder(sender, &source, &path)?;
        } else if facts.is_file() {
            sender.send(&Message::File {
                mode: facts.permissions().mode(),
                path: path.into_os_string().into_encoded_bytes(),
            })?;
            let mut file = File::open(&source)?;
            let mut piece = vec![0; 1 << 15];
            let mut sent = 0;
            // Stop at the size seen before: the file may grow as fast as it is read.
            while sent < facts.size() {
                let length = file.read(&mut piece)?;
                if length == 0 {
                    break;
                }
                sender.send(&Message::FileData(piece[..length].to_vec()))?;
                sent += length as u64;
            }
            sender.send(&Message::FileEnd(sent))?;
        }
    }
    Ok(())
}

/// Mount the usual file systems.
fn mount_all() -> Result<()> {
    for (kind, target) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("devpts", "/dev/pts"),
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        // Those of /sys exist already. If one does not, mount says so.
        let _ = fs::create_dir_all(target);
        mount(kind, target, kind, MountFlags::empty(), None)
            .with_context(|| format!("{kind} cannot be mounted at {target}"))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        symlink(target, Path::new("/dev").join(name))?;
    }
    Ok(())
}

/// Turn the fair servers off on a debug kernel. Their timer's callback restarts the timer and then forwards it
/// (dl_server_timer, seen in 7.3), and hrtimer_forward warns if a second has passed in between. A debug kernel is that
/// slow on an emulator that waits for its CPU. The servers only matter with real-time tasks, and there are none here.
fn disable_fair_servers() -> Result<()> {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    if !DEBUG_SUFFIXES.iter().any(|name| release.ends_with(name)) {
        return Ok(());
    }
    let Ok(servers) = fs::read_dir(FAIR_SERVERS) else {
        // Kernels before 6.12 have none.
        return Ok(());
    };
    for server in servers {
        let runtime = server?.path().join("runtime");
        fs::write(&runtime, "0").with_context(|| format!("{} cannot be set", runtime.display()))?;
    }
    Ok(())
}

/// End the machine.
fn end_machine(command: RebootCommand) -> ExitCode {
    let _ = reboot(command);
    ExitCode::FAILURE
}
