// SPDX-License-Identifier: GPL-2.0

//! Unloading the module and loading it again with the same parameters. Dropping the value loads the
//! module if it is unloaded.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::{chown, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::{
    io::Errno,
    system::{delete_module, finit_module, init_module, uname},
};

use super::elf;
use crate::source::DEVICE;

const SYSFS: &str = "/sys/module/exitmeter";
/// From include/uapi/asm-generic/fcntl.h. With it, unloading a module in use fails at once.
const O_NONBLOCK: i32 = 0o4000;

/// Reason why the module cannot be unloaded, or was not loaded again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The module is not in sysfs.
    #[error("there is no {SYSFS}: load the module first (insmod exitmeter.ko)")]
    NotLoaded,
    /// The module does not show its parameters.
    #[error(
        "the loaded module does not show its parameters, so it could not be loaded again as it was: it \
         is older than this tool; load the module of the same version"
    )]
    NoParameters,
    /// The file of the module is not known.
    #[error(
        "no exitmeter.ko in {0}: name the file that the module was loaded from by --module FILE"
    )]
    NoFile(String),
    /// The file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        error: io::Error,
    },
    /// The file is another module than the one that is loaded.
    #[error(
        "{} is not the file that the loaded module came from (their build ids differ): name that one \
         by --module FILE",
        .0.display()
    )]
    OtherFile(PathBuf),
    /// The kernel does not show the build id of the loaded module.
    #[error(
        "cannot check which file the loaded module came from: the kernel does not show its build id"
    )]
    NoBuildId,
    /// The user may not unload it.
    #[error("no right to unload the module: run this as root")]
    NoRight,
    /// The module is in use.
    #[error(
        "the module cannot be unloaded while {DEVICE} is open: end exitmeter top, record, why or slow \
         first"
    )]
    InUse,
    /// The kernel does not unload the module.
    #[error("the module cannot be unloaded: {0}")]
    Stays(Errno),
    /// The kernel does not load the module.
    #[error(
        "the module is unloaded now, and cannot be loaded again: {error}; load it by: {command}"
    )]
    Gone {
        /// Error of the kernel.
        error: Errno,
        /// Command that loads the module.
        command: String,
    },
}

/// Code of the module.
#[derive(Debug)]
enum Image {
    /// File, not packed.
    File(File),
    /// Unpacked bytes.
    Bytes(Vec<u8>),
}

/// The module, as it was loaded.
#[derive(Debug)]
pub struct Reload {
    path: PathBuf,
    image: Image,
    /// Parameters, in insmod's form.
    parameters: String,
    mode: u32,
    owner: (u32, u32),
    loaded: bool,
    /// Number of times that the module was unloaded and loaded.
    pub times: u32,
}

/// Return the parameters of the loaded module, in insmod's form.
///
/// # Errors
///
/// Returns an error if the module does not show them.
pub fn parameters() -> Result<String, Error> {
    if !Path::new(SYSFS).exists() {
        return Err(Error::NotLoaded);
    }
    let folder = format!("{SYSFS}/parameters");
    let mut parameters = Vec::new();
    for entry in fs::read_dir(folder).map_err(|_| Error::NoParameters)? {
        let entry = entry.map_err(|_| Error::NoParameters)?;
        let value = fs::read_to_string(entry.path()).map_err(|_| Error::NoParameters)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        parameters.push(format!("{name}={}", value.trim()));
    }
    if parameters.is_empty() {
        return Err(Error::NoParameters);
    }
    parameters.sort();
    Ok(parameters.join(" "))
}

impl Reload {
    /// Collect what is needed to load the module again as it is. This changes nothing yet.
    ///
    /// # Errors
    ///
    /// Returns any [`Error`].
    pub fn prepare(file: Option<&Path>) -> Result<Self, Error> {
        let parameters = parameters()?;
        if !rustix::process::geteuid().is_root() {
            return Err(Error::NoRight);
        }
        let path = match file {
            Some(path) => path.to_owned(),
            None => installed()?,
        };
        let unreadable = |error| Error::Unreadable {
            path: path.clone(),
            error,
        };
        let bytes = fs::read(&path).map_err(unreadable)?;
        let unpacked = unpack(&path, &bytes).map_err(unreadable)?;
        let loaded = fs::read(format!("{SYSFS}/notes/.note.gnu.build-id"));
        let loaded = loaded.map_err(|_| Error::NoBuildId)?;
        let module = unpacked.as_deref().unwrap_or(&bytes);
        if elf::section(module, ".note.gnu.build-id") != Some(&loaded) {
            return Err(Error::OtherFile(path));
        }
        let image = match unpacked {
            // Load from the file, for kernels that want to know it, such as those with LoadPin.
            None => Image::File(File::open(&path).map_err(unreadable)?),
            Some(bytes) => Image::Bytes(bytes),
        };
        let device = fs::metadata(DEVICE).map_err(|error| Error::Unreadable {
            path: DEVICE.into(),
            error,
        })?;
        Ok(Self {
            path,
            image,
            parameters,
            mode: device.mode() & 0o7777,
            owner: (device.uid(), device.gid()),
            loaded: true,
            times: 0,
        })
    }

    /// Return the parameters that the module had, in insmod's form.
    pub fn parameters(&self) -> &str {
        &self.parameters
    }

    /// Unload the module.
    ///
    /// # Errors
    ///
    /// Returns any [`Error`]. The module is still loaded then.
    pub fn unload(&mut self) -> Result<(), Error> {
        match delete_module(c"exitmeter", O_NONBLOCK) {
            Ok(()) => {
                self.loaded = false;
                Ok(())
            }
            Err(Errno::AGAIN | Errno::BUSY) => Err(Error::InUse),
            Err(Errno::PERM) => Err(Error::NoRight),
            Err(error) => Err(Error::Stays(error)),
        }
    }

    /// Load the module again as it was.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Gone`], which says how to load the module.
    pub fn load(&mut self) -> Result<(), Error> {
        if self.loaded {
            return Ok(());
        }
        let parameters = CString::new(self.parameters.as_str()).unwrap_or_default();
        let done = match &self.image {
            Image::File(file) => finit_module(file, &parameters, 0),
            Image::Bytes(bytes) => init_module(bytes, &parameters),
        };
        match done {
            // Another process has loaded it in the meantime.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                let command = format!("insmod {} {}", self.path.display(), self.parameters);
                return Err(Error::Gone { error, command });
            }
        }
        self.loaded = true;
        self.times += 1;
        // A udev rule usually sets these. Without one, the device would belong to root only.
        let device = fs::metadata(DEVICE);
        if device.is_ok_and(|found| {
            (found.mode() & 0o7777, (found.uid(), found.gid())) != (self.mode, self.owner)
        }) {
            let (user, group) = self.owner;
            let given = chown(DEVICE, Some(user), Some(group))
                .and_then(|()| fs::set_permissions(DEVICE, fs::Permissions::from_mode(self.mode)));
            if let Err(error) = given {
                eprintln!("exitmeter: {DEVICE} has lost its owner and mode: {error}");
            }
        }
        Ok(())
    }
}

impl Drop for Reload {
    fn drop(&mut self) {
        if let Err(error) = self.load() {
            eprintln!("exitmeter: {error}");
        }
    }
}

/// Return the file of the installed module, from the list of depmod(8).
fn installed() -> Result<PathBuf, Error> {
    let folder = format!("/lib/modules/{}", uname().release().to_string_lossy());
    let list = fs::read_to_string(format!("{folder}/modules.dep")).unwrap_or_default();
    match find_in_list(&list) {
        Some(file) => Ok(Path::new(&folder).join(file)),
        None => Err(Error::NoFile(folder)),
    }
}

/// Return the module's file in a list of depmod(8).
fn find_in_list(list: &str) -> Option<&str> {
    let mut files = list.lines().filter_map(|line| line.split(':').next());
    files.find(|file| {
        let name = file.rsplit('/').next().unwrap_or_default();
        ["", ".gz", ".xz", ".zst"]
            .iter()
            .any(|suffix| name.strip_suffix(suffix) == Some("exitmeter.ko"))
    })
}

/// Unpack a compressed module, by the program that compressed it.
fn unpack(path: &Path, bytes: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let program = match bytes {
        [0x1f, 0x8b, ..] => "gzip",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => return Ok(None),
    };
    let output = Command::new(program)
        .args(["-d", "-c", "--"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            io::Error::new(error.kind(), format!("{program} cannot be run: {error}"))
        })?;
    match output.status.success() {
        true => Ok(Some(output.stdout)),
        false => Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("{program} cannot unpack it"),
        )),
    }
}

/// A process that holds a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Name of the process in the kernel.
    pub name: String,
}

/// Find the other processes that hold VMs: they have a file `anon_inode:kvm-vm` open
/// (`kvm_dev_ioctl_create_vm()`, virt/kvm/kvm_main.c).
pub fn holders() -> Vec<Holder> {
    let mut holders = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let files = fs::read_dir(entry.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let mut links = files.filter_map(|file| fs::read_link(file.path()).ok());
        let holds = links.any(|link| link == Path::new("anon_inode:kvm-vm"));
        if holds && pid != std::process::id() {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            // A process chooses its own name.
            let name = name.trim_end().escape_debug().to_string();
            holders.push(Holder { pid, name });
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_is_found_in_modules_dep() {
        let list = "kernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko.xz\n\
                    updates/dkms/exitmeter.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz\n";
        assert_eq!(find_in_list(list), Some("updates/dkms/exitmeter.ko.xz"));
        assert_eq!(
            find_in_list("updates/exitmeter.ko:\n"),
            Some("updates/exitmeter.ko")
        );
        assert_eq!(
            find_in_list("updates/not-exitmeter.ko:\nexitmeter.ko.old:\n"),
            None
        );
    }

    #[test]
    fn compressed_module_is_unpacked() {
        let module = b"\x7fELF, or what stands for it";
        let folder = tempfile::TempDir::new().unwrap();
        let plain = folder.path().join("exitmeter.ko");
        fs::write(&plain, module).unwrap();
        assert_eq!(unpack(&plain, module).unwrap(), None);
        for (program, suffix) in [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")] {
            let packed = Command::new(program)
                .args(["-c", "--"])
                .arg(&plain)
                .output();
            let Ok(packed) = packed else {
                // Skip this format: the program to compress it is missing here.
                assert_ne!(program, "gzip", "Debian's base has gzip");
                continue;
            };
            let path = folder.path().join(format!("exitmeter.ko.{suffix}"));
            fs::write(&path, &packed.stdout).unwrap();
            let unpacked = unpack(&path, &packed.stdout).unwrap();
            assert_eq!(unpacked.as_deref(), Some(&module[..]), "{program}");
            // A truncated file is an error that names the program.
            let part = &packed.stdout[..packed.stdout.len() - 9];
            fs::write(&path, part).unwrap();
            let error = unpack(&path, part).unwrap_err().to_string();
            assert_eq!(error, format!("{program} cannot unpack it"));
        }
    }
}
