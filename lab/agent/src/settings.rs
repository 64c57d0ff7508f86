// SPDX-License-Identifier: GPL-2.0

//! Settings that the lab passes to the agent in a file of the initramfs.

use serde::{Deserialize, Serialize};

/// Path of the settings in the host.
pub const PATH: &str = "/lab/settings.json";

/// Folder that is sent to the lab when the script has ended; `$OUT` of the script.
pub const OUT: &str = "/out";

/// The script's working directory and home.
pub const HOME: &str = "/root";

/// Path of the guest's kernel, an ELF file with a PVH entry.
pub const GUEST_KERNEL: &str = "/lab/guest/vmlinux";

/// Path of the guest's initramfs without the agent, which is appended when the guest starts.
pub const GUEST_INITRAMFS: &str = "/lab/guest/initramfs";

/// Command line of the guest's kernel in QEMU's microvm.
pub const GUEST_COMMAND_LINE: &str =
    "console=ttyS0,115200 rdinit=/bin/guest-init quiet mitigations=off tsc=reliable nokaslr \
     reboot=t panic=-1 random.trust_cpu=on";

/// I/O port that takes frames to the lab, one byte at a time.
pub const PORT: u16 = 0xe9;

/// I/O port for saved machines. Writing a byte saves the machine. A machine that continues from the saved state reads
/// its orders here: 8 bytes with the length, little-endian, and an archive of that length, which it unpacks over the
/// initramfs.
pub const CONTROL_PORT: u16 = 0xe8;

/// Settings of a host.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Settings {
    /// KVM's module to load first, if any: kvm-intel or kvm-amd.
    pub kvm: Option<Module>,
    /// Task to do then.
    pub task: Task,
}

/// A kernel module and its parameters.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Module {
    /// Name as in modules.dep, without folder and `.ko`.
    pub name: String,
    /// Parameters as for insmod.
    pub parameters: String,
}

/// Task of a host.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Task {
    /// Run this program with these arguments, and send its output, its files and its status.
    Run(Vec<String>),
    /// Start a shell on the console.
    Shell,
    /// Be saved, and then follow the settings that come by [`CONTROL_PORT`].
    Save,
}
