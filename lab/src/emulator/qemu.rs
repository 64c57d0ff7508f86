// SPDX-License-Identifier: GPL-2.0

//! AMD host: QEMU's TCG, which emulates SVM with nested paging.

use std::process::Command;

use super::{Boot, Console, RUN_FOLDER};
use crate::{outcome::RunError, setup::in_root};

/// Arguments for a minimal machine. Linux has to probe and wait for every device it has.
const MACHINE_ARGUMENTS: &str = "-nodefaults -no-user-config -no-reboot -display none \
     -machine pc,usb=off,hpet=off,vmport=off \
     -chardev file,id=port,path=/dev/stdout -device isa-debugcon,iobase=0xe9,chardev=port";

/// Return the command that starts QEMU.
///
/// # Errors
///
/// [`RunError::Machine`] if QEMU cannot emulate such a machine, and errors of writing its initramfs.
pub fn command(boot: &Boot<'_>) -> Result<Command, RunError> {
    let machine = boot.machine;
    if machine.icount && machine.cpus > 1 {
        return Err(RunError::Machine(
            "a host that counts instructions has one CPU; leave out --icount or --cpus".to_owned(),
        ));
    }
    boot.images.join(&boot.folder.join("initramfs"))?;

    let root = in_root(&boot.prepared.root)
        .bind(&boot.prepared.kernel, "/lab/kernel")
        .bind(boot.folder, RUN_FOLDER);
    let mut command = root.command("qemu-system-x86_64");
    let model = machine.model.as_deref().unwrap_or(machine.host.model());
    command
        .args(MACHINE_ARGUMENTS.split_whitespace())
        .args(["-cpu", &format!("{model},+svm,+npt")])
        .args(["-smp", &machine.cpus.to_string()])
        .args(["-m", &machine.memory.to_string()])
        // The uncompressed kernel, started by its PVH entry, which saves the unpacking.
        .args(["-kernel", "/lab/kernel/vmlinux"])
        .args(["-initrd", &format!("{RUN_FOLDER}/initramfs")])
        .args(["-append", &machine.command_line()]);
    if machine.icount {
        command.args([
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0,sleep=off",
        ]);
    } else {
        // Several CPUs on a single thread hang.
        command.args(["-accel", "tcg,thread=multi"]);
    }
    match boot.console {
        Console::File(name) => command.args(["-serial", &format!("file:{RUN_FOLDER}/{name}")]),
        Console::Terminal(device) => command.args(["-serial", &device.display().to_string()]),
    };
    Ok(command)
}
