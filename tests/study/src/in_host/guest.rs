// SPDX-License-Identifier: GPL-2.0

//! Boots a Linux guest in one of the VMMs and sends it commands. The first process of all guests is the same agent.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use lab_agent::{
    channel::{Item, Message, Receiver, Sender},
    initramfs, settings,
};

use super::network;
use crate::plan::GuestKind;

/// Socket of the VMM for commands to the guest.
pub const SOCKET: &str = "/tmp/commands";
/// Log of the guest's console.
pub const CONSOLE: &str = "/out/guest.console.log";
/// The packaged kernel of the guest, for a machine with firmware.
pub const PACKAGED: &str = "/root/vmlinuz";

const VMM_LOG: &str = "/out/guest.vmm.log";
const INITRAMFS: &str = "/tmp/initramfs";
const DISK: &str = "/tmp/disk";
const DISK_SIZE: u64 = 16 << 20;

/// Command line of the guest "pc". All messages go to the serial console, as on a server.
const PC_COMMAND_LINE: &str =
    "console=ttyS0,115200 rdinit=/bin/guest-init tsc=reliable panic=-1 random.trust_cpu=on";

/// Time limit for a boot, and for an answer of the guest.
const TIMEOUT: Duration = Duration::from_secs(240);

/// A running guest. Dropping it kills its VMM.
pub struct Guest {
    vmm: Child,
    sender: Sender<UnixStream>,
    receiver: Receiver,
    line: UnixStream,
    items: std::collections::VecDeque<Item>,
}

impl Guest {
    /// Start a guest and wait until it takes commands. With `devices` it has a disk and a network.
    pub fn boot(kind: GuestKind, devices: bool) -> Result<Self> {
        pack(Path::new(INITRAMFS))?;
        File::create(DISK)?.set_len(DISK_SIZE)?;
        let _ = fs::remove_file(SOCKET);
        let log = File::create(VMM_LOG)?;
        let mut vmm = command(kind, devices)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start the VMM")?;
        let deadline = Instant::now() + TIMEOUT;
        let line = loop {
            match UnixStream::connect(SOCKET) {
                Ok(line) => break line,
                Err(_) if vmm.try_wait()?.is_none() && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                Err(_) => bail!("the VMM did not start{}", log_tails()),
            }
        };
        line.set_read_timeout(Some(TIMEOUT))?;
        let mut guest = Self {
            vmm,
            sender: Sender::new(line.try_clone()?),
            receiver: Receiver::new(),
            line,
            items: Default::default(),
        };
        guest.wait_for(&Message::Hello)?;
        Ok(guest)
    }

    /// Run a command in the guest. Fails if the command fails.
    pub fn run(&mut self, command: &str) -> Result<()> {
        self.sender.send(&Message::Run {
            number: 1,
            command: command.as_bytes().to_vec(),
        })?;
        self.wait_for(&Message::Started(1))?;
        let mut output = String::new();
        loop {
            match self.next()? {
                Item::Message(Message::Stdout(bytes) | Message::Stderr(bytes)) => {
                    output.push_str(&String::from_utf8_lossy(&bytes));
                }
                Item::Message(Message::Verdict(status)) => {
                    ensure!(status == 0, "{command} failed in the guest: {output}");
                    return Ok(());
                }
                Item::Message(Message::Hello) => {
                    bail!("the guest restarted at {command}{}", log_tails())
                }
                _ => {}
            }
        }
    }

    /// Reboot the guest, and wait until it takes commands again.
    pub fn reboot(&mut self) -> Result<()> {
        self.sender.send(&Message::Reboot)?;
        self.wait_for(&Message::Hello)
    }

    fn wait_for(&mut self, message: &Message) -> Result<()> {
        while !matches!(self.next()?, Item::Message(got) if got == *message) {}
        Ok(())
    }

    fn next(&mut self) -> Result<Item> {
        loop {
            if let Some(item) = self.items.pop_front() {
                return Ok(item);
            }
            let mut bytes = [0; 4096];
            match self.line.read(&mut bytes) {
                Ok(0) => bail!("the VMM ended{}", log_tails()),
                Ok(length) => self.items.extend(self.receiver.receive(&bytes[..length])),
                Err(error) => bail!("the guest said nothing: {error}{}", log_tails()),
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// Return the command that starts the VMM.
fn command(kind: GuestKind, devices: bool) -> Command {
    let console = format!("file,id=console,path={CONSOLE}");
    let commands = format!("socket,id=commands,path={SOCKET},server=on,wait=off");
    let disk = format!("file={DISK},if=none,format=raw,id=disk");
    let net = format!("tap,id=net,ifname={},script=no,downscript=no", network::TAP);
    let mut vmm = Command::new(match kind {
        GuestKind::Microvm | GuestKind::Smp | GuestKind::Cloud => {
            "/usr/bin/qemu-system-x86_64-microvm"
        }
        GuestKind::Pc => "/usr/bin/qemu-system-x86_64",
        GuestKind::Tiny | GuestKind::Loops => "/usr/local/bin/study",
    });
    match kind {
        GuestKind::Microvm | GuestKind::Smp | GuestKind::Cloud => {
            vmm.args(["-M", "microvm,rtc=on,pit=off,pic=off", "-nodefaults"])
                .args(["-kernel", settings::GUEST_KERNEL])
                .args(["-append", settings::GUEST_COMMAND_LINE])
                .args(["-serial", "chardev:console"])
                .args(["-device", "isa-serial,chardev=commands,index=1"]);
            if kind == GuestKind::Smp {
                // SeaBIOS counts vCPUs in a way that needs them to run at the same time.
                vmm.args(["-smp", "2", "-bios", "qboot.rom"]);
            }
        }
        GuestKind::Pc => {
            vmm.args(["-M", "q35", "-kernel", PACKAGED, "-append", PC_COMMAND_LINE])
                .args(["-serial", "chardev:console", "-serial", "chardev:commands"]);
        }
        GuestKind::Tiny | GuestKind::Loops => {
            vmm.args(["--vmm", INITRAMFS]);
            return vmm;
        }
    }
    vmm.args(["-accel", "kvm", "-cpu", "host", "-m", "256"])
        .args(["-no-user-config", "-display", "none", "-initrd", INITRAMFS])
        .args(["-chardev", &console, "-chardev", &commands]);
    if devices {
        let bus = if kind == GuestKind::Pc {
            "pci"
        } else {
            "device"
        };
        vmm.args(["-drive", &disk, "-netdev", &net])
            .args(["-device", &format!("virtio-blk-{bus},drive=disk")])
            .args(["-device", &format!("virtio-net-{bus},netdev=net")]);
    } else if kind == GuestKind::Pc {
        vmm.args(["-nic", "none"]);
    }
    vmm
}

/// Write the guest's initramfs. It has the host's agent as its first process, the work and the drivers.
fn pack(path: &Path) -> Result<()> {
    initramfs::write(path, Path::new("/init"), |archive| {
        let mut add = |name: &str, source: &Path| -> Result<()> {
            let file =
                File::open(source).with_context(|| format!("cannot open {}", source.display()))?;
            let size = file.metadata()?.len();
            Ok(archive.file(name, 0o755, size, file)?)
        };
        add("root/work", Path::new("/usr/local/bin/work"))?;
        let mut modules: Vec<_> = fs::read_dir("/root/modules")?
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<_>>()?;
        modules.sort();
        for module in modules {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            add(&format!("root/{name}"), &module)?;
        }
        Ok(())
    })
}

/// Return the ends of the logs of VMM and guest.
fn log_tails() -> String {
    [VMM_LOG, CONSOLE]
        .into_iter()
        .fold(String::new(), |text, path| {
            let output = fs::read(path).unwrap_or_default();
            let output =
                String::from_utf8_lossy(&output[output.len().saturating_sub(2000)..]).into_owned();
            format!("{text}\n--- the end of {path}:\n{}", output.trim_end())
        })
}
