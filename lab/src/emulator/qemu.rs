//! The AMD host: QEMU's TCG, which emulates SVM with nested paging.

use std::process::Command;

use super::{Boot, Console, FOLDER};
use crate::setup::in_root;

/// How to start it.
pub fn command(boot: &Boot<'_>) -> Command {
    let machine = boot.machine;
    let root = in_root(&boot.prepared.root)
        .bind(&boot.prepared.kernel, "/lab/kernel")
        .bind(boot.folder, FOLDER);
    let mut command = root.command("qemu-system-x86_64");
    let model = machine.model.as_deref().unwrap_or(machine.host.model());
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args([
            "-machine",
            "pc,usb=off,hpet=off,vmport=off",
            "-accel",
            "tcg,thread=multi",
        ])
        .args(["-cpu", &format!("{model},+svm,+npt")])
        .args(["-smp", &machine.cpus.to_string()])
        .args(["-m", &machine.memory.to_string()])
        // The extracted kernel, by its entry for PVH: that saves the unpacking, a third of the boot.
        .args(["-kernel", "/lab/kernel/vmlinux"])
        .args(["-initrd", &format!("{FOLDER}/initramfs")])
        .args(["-append", &machine.command_line()])
        .args(["-chardev", "file,id=port,path=/dev/stdout"])
        .args(["-device", "isa-debugcon,iobase=0xe9,chardev=port"]);
    match boot.console {
        Console::File(name) => command.args(["-serial", &format!("file:{FOLDER}/{name}")]),
        Console::Terminal(device) => command.args(["-serial", &device.display().to_string()]),
    };
    command
}
