//! The Intel host: Bochs, which emulates VMX with EPT.
//!
//! Kernel and initramfs are put into memory before the machine starts, see [`pvh`].

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Boot, Console, FOLDER};
use crate::image::pvh::{self, Info};
use crate::run::RunError;
use crate::setup::in_root;

/// Where the initramfs goes: above any kernel.
const INITRAMFS_ADDRESS: u64 = 0x1000_0000;

/// Instructions of the host in one of its seconds. The more, the fewer timer interrupts disturb what is measured; but
/// the longer takes what waits.
const SPEED: u32 = 500_000_000;

/// The time that every host starts at (1 January 2026), so that two runs differ as little as can be.
const TIME: u64 = 1_767_225_600;

/// How to start it.
///
/// # Errors
///
/// When the machine is larger than Bochs can, or the images do not fit into its memory.
pub fn command(boot: &Boot<'_>) -> Result<Command, RunError> {
    let machine = boot.machine;
    let impossible = |text: String| Err(RunError::Machine(text));
    let Some(bochs) = &boot.prepared.bochs else {
        return impossible("the set-up was made without Bochs".to_owned());
    };
    if machine.memory > 2048 {
        return impossible(
            "an Intel host has at most 2048 MiB of memory; give a smaller --memory".to_owned(),
        );
    }
    if machine.icount {
        return impossible("Bochs always counts instructions; leave out --icount".to_owned());
    }
    let kernel = boot.images.kernel(boot.prepared)?;
    let size = |path: &Path| {
        fs::metadata(path)
            .map(|facts| facts.len())
            .map_err(RunError::io("read", path))
    };
    let base = size(&boot.images.base)?;
    let initramfs = base + size(&boot.images.payload)?;
    let needed = (INITRAMFS_ADDRESS + 2 * initramfs) >> 20;
    if needed > machine.memory.into() {
        return impossible(format!(
            "the host's files need {needed} MiB of memory; give a larger --memory"
        ));
    }
    let info = Info {
        entry: kernel.entry,
        initramfs: (INITRAMFS_ADDRESS, initramfs),
        command_line: &machine.command_line(),
    };
    let Some(info) = info.bytes() else {
        return impossible(
            "the kernel's command line is too long; give a shorter --append".to_owned(),
        );
    };
    let write = |name: &str, bytes: &[u8]| {
        let path = boot.folder.join(name);
        fs::write(&path, bytes).map_err(RunError::io("write", &path))
    };
    write("rom", &pvh::rom())?;
    write("info", &info)?;

    let serial = match boot.console {
        Console::File(name) => format!("mode=file, dev={FOLDER}/{name}"),
        Console::Terminal(device) => format!("mode=term, dev={}", device.display()),
    };
    let mut config = String::new();
    let mut line = |text: String| {
        let _ = writeln!(config, "{text}");
    };
    let model = machine.model.as_deref().unwrap_or(machine.host.model());
    line("display_library: nogui".to_owned());
    line(format!(
        "cpu: model={model}, count={}, ips={SPEED}, ignore_bad_msrs=1, reset_on_triple_fault=0",
        machine.cpus
    ));
    line(format!("memory: guest={0}, host={0}", machine.memory));
    line("romimage: file=/lab/bochs/bios".to_owned());
    line("vgaromimage: file=/lab/bochs/vgabios".to_owned());
    line(format!(
        "optromimage1: file={FOLDER}/rom, address={:#x}",
        pvh::ROM_ADDRESS
    ));
    for (number, file, address) in [
        (1, format!("{FOLDER}/info"), pvh::INFO_ADDRESS),
        (2, "/lab/kernel-image".to_owned(), kernel.address),
        (3, "/lab/base".to_owned(), INITRAMFS_ADDRESS),
        (4, format!("{FOLDER}/payload"), INITRAMFS_ADDRESS + base),
    ] {
        line(format!(
            "optramimage{number}: file={file}, address={address:#x}"
        ));
    }
    line("pci: enabled=1, chipset=i440fx".to_owned());
    line("vga: extension=vbe, update_freq=1".to_owned());
    line("ata0: enabled=0".to_owned());
    line("ata1: enabled=0".to_owned());
    line(format!("clock: sync=none, time0={TIME}"));
    line(format!("com1: enabled=1, {serial}"));
    line("port_e9_hack: enabled=1".to_owned());
    line(format!("log: {FOLDER}/bochs.log"));
    // What a guest's accesses to memory of its own cause counts as an error for Bochs: 170 MB of them.
    line("panic: action=fatal".to_owned());
    line("error: action=ignore".to_owned());
    line("info: action=report".to_owned());
    line("debug: action=ignore".to_owned());
    write("bochsrc", config.as_bytes())?;

    let root = in_root(&boot.prepared.root)
        .bind(bochs, "/lab/bochs")
        .bind(&kernel.path, "/lab/kernel-image")
        .bind(&boot.images.base, "/lab/base")
        .bind(boot.folder, FOLDER);
    let mut command = root.command("/lab/bochs/bochs");
    command.args(["-q", "-f", &format!("{FOLDER}/bochsrc")]);
    Ok(command)
}
