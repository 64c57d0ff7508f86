// SPDX-License-Identifier: GPL-2.0

//! Intel host: Bochs, which emulates VMX with EPT.
//!
//! Kernel and initramfs are put into memory before the machine starts (see [`pvh`]), or the machine continues from a
//! saved state (see run/saved.rs).

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
    process::Command,
};

use super::{Boot, Console, InitialState, RUN_FOLDER};
use crate::{
    image::pvh::{self, Info},
    outcome::RunError,
    setup::in_root,
};

/// Physical address of the initramfs, above any kernel.
const INITRAMFS_ADDRESS: u64 = 0x1000_0000;

/// Instructions of the host in one of its seconds. With more, fewer timer interrupts disturb measurements, but waiting
/// takes longer.
const INSTRUCTIONS_PER_SECOND: u32 = 500_000_000;

/// Start time of every host (1 January 2026), so that two runs differ as little as possible.
const START_TIME: u64 = 1_767_225_600;

/// Path under which Bochs sees its own files.
const BOCHS_FOLDER: &str = "/lab/bochs";
/// Path under which Bochs sees a saved machine.
const SAVED_FOLDER: &str = "/lab/machine";

/// Return the command that starts Bochs.
///
/// # Errors
///
/// [`RunError::Machine`] if Bochs cannot emulate such a machine or the images do not fit into its memory, and errors of
/// writing its files.
pub fn command(boot: &Boot<'_>) -> Result<Command, RunError> {
    let machine = boot.machine;
    let Some(bochs) = &boot.prepared.bochs else {
        return impossible("the set-up was made without Bochs");
    };
    if machine.memory > 2048 {
        return impossible("an Intel host has at most 2048 MiB of memory; give a smaller --memory");
    }
    if machine.icount {
        return impossible("Bochs always counts instructions; leave out --icount");
    }
    let root = in_root(&boot.prepared.root)
        .bind(bochs, BOCHS_FOLDER)
        .bind(boot.folder, RUN_FOLDER);
    if let InitialState::Saved(saved) = boot.initial_state {
        let input = boot.folder.join("input");
        write_input(&boot.images.payload, &input).map_err(RunError::io("write", &input))?;
        let mut command = root.bind(saved, SAVED_FOLDER).command("env");
        command
            .arg(format!("BOCHS_INPUT={RUN_FOLDER}/input"))
            .arg(format!("{BOCHS_FOLDER}/bochs"))
            .args(["-q", "-r", SAVED_FOLDER]);
        return Ok(command);
    }

    let config = configure(boot)?;
    let path = boot.folder.join("bochsrc");
    fs::write(&path, config).map_err(RunError::io("write", &path))?;
    let kernel = boot.images.kernel(boot.prepared)?;
    let mut root = root
        .bind(&kernel.path, "/lab/kernel-image")
        .bind(&boot.images.base, "/lab/base");
    let mut variables = Vec::new();
    if let InitialState::Save(folder) = boot.initial_state {
        root = root.bind(folder, SAVED_FOLDER);
        variables.push(format!("BOCHS_SAVE={SAVED_FOLDER}"));
    }
    let mut command = root.command("env");
    command
        .args(variables)
        .arg(format!("{BOCHS_FOLDER}/bochs"))
        .args(["-q", "-f", &format!("{RUN_FOLDER}/bochsrc")]);
    Ok(command)
}

/// Complete a machine that was saved to `folder`, so that runs can continue from it. The only image it still needs is
/// its ROM.
///
/// # Errors
///
/// [`RunError::Io`] if its files cannot be read and written.
pub fn complete_saved(folder: &Path) -> Result<(), RunError> {
    let rom = folder.join("rom");
    fs::write(&rom, pvh::rom()).map_err(RunError::io("write", &rom))?;
    let path = folder.join("config");
    let config = fs::read_to_string(&path).map_err(RunError::io("read", &path))?;
    let config: String = config
        .lines()
        .filter(|line| !line.starts_with("optramimage"))
        .map(|line| match line.starts_with("optromimage1") {
            true => format!("{}\n", rom_line(SAVED_FOLDER)),
            false => format!("{line}\n"),
        })
        .collect();
    fs::write(&path, config).map_err(RunError::io("write", &path))
}

/// Return the configuration of a machine that boots, and write the images that belong to this run alone.
fn configure(boot: &Boot<'_>) -> Result<String, RunError> {
    let machine = boot.machine;
    let kernel = boot.images.kernel(boot.prepared)?;
    let size = |path: &Path| {
        fs::metadata(path)
            .map(|facts| facts.len())
            .map_err(RunError::io("read", path))
    };
    let base = size(&boot.images.base)?;
    let initramfs = base + size(&boot.images.payload)?;
    // The initramfs takes memory twice: as it is loaded, and unpacked.
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
        return impossible("the kernel's command line is too long; give a shorter --append");
    };
    for (name, bytes) in [("rom", pvh::rom()), ("info", info)] {
        let path = boot.folder.join(name);
        fs::write(&path, bytes).map_err(RunError::io("write", &path))?;
    }

    let model = machine.model.as_deref().unwrap_or(machine.host.model());
    let serial = match boot.console {
        Console::File(name) => format!("mode=file, dev={RUN_FOLDER}/{name}"),
        Console::Terminal(device) => format!("mode=term, dev={}", device.display()),
    };
    let ram = |number: u32, file: &str, address: u64| {
        format!("optramimage{number}: file={file}, address={address:#x}")
    };
    let lines = [
        format!(
            "cpu: model={model}, count={}, ips={INSTRUCTIONS_PER_SECOND}, ignore_bad_msrs=1, reset_on_triple_fault=0",
            machine.cpus
        ),
        format!("memory: guest={0}, host={0}", machine.memory),
        format!("romimage: file={BOCHS_FOLDER}/bios"),
        format!("vgaromimage: file={BOCHS_FOLDER}/vgabios"),
        rom_line(RUN_FOLDER),
        ram(1, &format!("{RUN_FOLDER}/info"), pvh::INFO_ADDRESS),
        ram(2, "/lab/kernel-image", kernel.address),
        ram(3, "/lab/base", INITRAMFS_ADDRESS),
        ram(4, &format!("{RUN_FOLDER}/payload"), INITRAMFS_ADDRESS + base),
        format!("clock: sync=none, time0={START_TIME}"),
        format!("com1: enabled=1, {serial}"),
        "port_e9_hack: enabled=1".to_owned(),
        "pci: enabled=1, chipset=i440fx".to_owned(),
        "display_library: nogui".to_owned(),
        "vga: extension=vbe, update_freq=1".to_owned(),
        "ata0: enabled=0".to_owned(),
        "ata1: enabled=0".to_owned(),
        format!("log: {RUN_FOLDER}/bochs.log"),
        "panic: action=fatal".to_owned(),
        // Bochs reports each guest access that KVM has to emulate as an error: 170 MB of them.
        "error: action=ignore".to_owned(),
        "info: action=report".to_owned(),
        "debug: action=ignore".to_owned(),
    ];
    Ok(lines.join("\n") + "\n")
}

fn rom_line(folder: &str) -> String {
    format!(
        "optromimage1: file={folder}/rom, address={:#x}",
        pvh::ROM_ADDRESS
    )
}

/// Write the input of a machine that continues from a saved state: the length of the payload, and the payload.
fn write_input(payload: &Path, input: &Path) -> io::Result<()> {
    let mut source = File::open(payload)?;
    let mut target = File::create(input)?;
    target.write_all(&source.metadata()?.len().to_le_bytes())?;
    io::copy(&mut source, &mut target)?;
    Ok(())
}

fn impossible<T>(text: impl Into<String>) -> Result<T, RunError> {
    Err(RunError::Machine(text.into()))
}
