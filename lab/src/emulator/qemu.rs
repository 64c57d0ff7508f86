// SPDX-License-Identifier: GPL-2.0

//! The AMD host: QEMU's TCG, which emulates SVM with nested paging.

use std::process::Command;

use super::{Boot, Console, FOLDER};
use crate::run::RunError;
use crate::setup::in_root;

/// A machine with as little as Linux can do with: what is there has to be found and waited for.
const MACHINE: &str = "-nodefaults -no-user-config -no-reboot -display none \
     -machine pc,usb=off,hpet=off,vmport=off \
     -chardev file,id=port,path=/dev/stdout -device isa-debugcon,iobase=0xe9,chardev=port";

/// How to start it.
///
/// # Errors
///
/// When the machine cannot be, or its initramfs cannot be written.
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
        .bind(boot.folder, FOLDER);
    let mut command = root.command("qemu-system-x86_64");
    let model = machine.model.as_deref().unwrap_or(machine.host.model());
    command
        .args(MACHINE.split_whitespace())
        .args(["-cpu", &format!("{model},+svm,+npt")])
        .args(["-smp", &machine.cpus.to_string()])
        .args(["-m", &machine.memory.to_string()])
        // The kernel as it lies in memory, by its entry for PVH: that saves the unpacking.
        .args(["-kernel", "/lab/kernel/vmlinux"])
        .args(["-initrd", &format!("{FOLDER}/initramfs")])
        .args(["-append", &machine.command_line()]);
    if machine.icount {
        command.args([
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=0,sleep=off",
        ]);
    } else {
        // Several CPUs on one thread hang.
        command.args(["-accel", "tcg,thread=multi"]);
    }
    match boot.console {
        Console::File(name) => command.args(["-serial", &format!("file:{FOLDER}/{name}")]),
        Console::Terminal(device) => command.args(["-serial", &device.display().to_string()]),
    };
    Ok(command)
}
