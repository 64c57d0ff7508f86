// SPDX-License-Identifier: GPL-2.0

//! What the lab tells the agent, by a file of the initramfs.

use serde::{Deserialize, Serialize};

/// Where the settings stand in the host.
pub const PATH: &str = "/lab/settings.json";

/// The folder that goes back to the lab when the script has ended; `$OUT` of the script.
pub const OUT: &str = "/out";

/// The script's folder and home.
pub const HOME: &str = "/root";

/// The guest's kernel, an ELF file with an entry for PVH.
pub const GUEST_KERNEL: &str = "/lab/guest/vmlinux";

/// The guest's initramfs without the agent, which is put behind it when the guest starts.
pub const GUEST_INITRAMFS: &str = "/lab/guest/initramfs";

/// The command line of the guest's kernel in QEMU's microvm.
pub const GUEST_COMMAND_LINE: &str =
    "console=ttyS0,115200 rdinit=/bin/guest-init quiet mitigations=off tsc=reliable nokaslr \
     reboot=t panic=-1 random.trust_cpu=on";

/// Where the port is that takes frames to the lab, one byte at a time.
pub const PORT: u16 = 0xe9;

/// Where the port is by which a machine has itself saved (by a byte written), and by which one that goes on from
/// there reads what it is to do: 8 bytes with the length, little-endian, of the archive that follows, to be unpacked
/// over the initramfs.
pub const CONTROL_PORT: u16 = 0xe8;

/// What a host is started for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Settings {
    /// KVM's module to load first, if any: kvm-intel or kvm-amd.
    pub kvm: Option<Module>,
    /// What to do then.
    pub task: Task,
}

/// A kernel module and its parameters.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Module {
    /// As in modules.dep, without its folder and `.ko`.
    pub name: String,
    /// As for insmod.
    pub parameters: String,
}

/// What the host is for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Task {
    /// Run this program with these arguments, send what it says and leaves, and its status.
    Run(Vec<String>),
    /// Give a shell on the console.
    Shell,
    /// Be saved; then do what the settings say that come by [`CONTROL_PORT`].
    Save,
}
