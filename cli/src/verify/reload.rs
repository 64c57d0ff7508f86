// SPDX-License-Identifier: GPL-2.0

//! The module goes and comes back, with the parameters that it had. When this is dropped it is loaded
//! as it was.

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
/// From include/uapi/asm-generic/fcntl.h: a module that is in use stays, at once.
const O_NONBLOCK: i32 = 0o4000;

/// Why the module cannot go, or has not come back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has no place in sysfs.
    #[error("there is no {SYSFS}: load the module first (insmod exitmeter.ko)")]
    NotLoaded,
    /// It does not tell its parameters.
    #[error(
        "the module that is loaded does not tell its parameters, so it could not be loaded again as it \
         was: it is older than this tool; load the one that belongs to it"
    )]
    NoParameters,
    /// It is not known where it came from.
    #[error(
        "no exitmeter.ko in {0}: name the file that the module was loaded from by --module FILE"
    )]
    NoFile(String),
    /// The file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The file is another module than the one that is loaded.
    #[error(
        "{} is not the file that the loaded module came from (their build ids differ): name that one \
         by --module FILE",
        .0.display()
    )]
    OtherFile(PathBuf),
    /// The kernel does not tell what is loaded.
    #[error(
        "cannot tell which file the loaded module came from: the kernel tells no build id of it"
    )]
    NoBuildId,
    /// No right.
    #[error("no right to unload the module: run this as root")]
    NoRight,
    /// It is in use.
    #[error(
        "the module cannot go, as something has {DEVICE} open: end exitmeter top, record, why or slow \
         first"
    )]
    InUse,
    /// The kernel does not unload it.
    #[error("the module cannot be unloaded: {0}")]
    Stays(Errno),
    /// The kernel does not load it.
    #[error(
        "the module is unloaded now, and cannot be loaded again: {error}; load it by: {command}"
    )]
    Gone {
        /// What the kernel says.
        error: Errno,
        /// How to load it.
        command: String,
    },
}

/// Where the module's code is.
#[derive(Debug)]
enum Image {
    /// As it is in the file.
    File(File),
    /// Unpacked.
    Bytes(Vec<u8>),
}

/// The module, as it was loaded.
#[derive(Debug)]
pub struct Reload {
    path: PathBuf,
    image: Image,
    /// As insmod takes them.
    parameters: String,
    mode: u32,
    owner: (u32, u32),
    loaded: bool,
    /// How often it has gone and come back.
    pub times: u32,
}

/// Return the parameters of the loaded module, as insmod takes them.
///
/// # Errors
///
/// When it does not tell them.
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
    /// Find what has to be known to load the module again as it is. Nothing is done yet.
    ///
    /// # Errors
    ///
    /// [`Error`].
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
            // Where the kernel wants to know the file it comes from, as LoadPin does.
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

    /// The parameters that it had, as insmod takes them.
    pub fn parameters(&self) -> &str {
        &self.parameters
    }

    /// Unload the module.
    ///
    /// # Errors
    ///
    /// [`Error`]: then it is still loaded.
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
    /// [`Error::Gone`], which says how to load it.
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
            // Somebody else was faster.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                let command = format!("insmod {} {}", self.path.display(), self.parameters);
                return Err(Error::Gone { error, command });
            }
        }
        self.loaded = true;
        self.times += 1;
        // A udev rule gives it the same; without one it would be root's alone.
        let device = fs::metadata(DEVICE);
        if device
            .is_ok_and(|it| (it.mode() & 0o7777, (it.uid(), it.gid())) != (self.mode, self.owner))
        {
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

/// Return the file of the installed module: from the list that depmod(8) makes.
fn installed() -> Result<PathBuf, Error> {
    let folder = format!("/lib/modules/{}", uname().release().to_string_lossy());
    let list = fs::read_to_string(format!("{folder}/modules.dep")).unwrap_or_default();
    match in_list(&list) {
        Some(file) => Ok(Path::new(&folder).join(file)),
        None => Err(Error::NoFile(folder)),
    }
}

/// Return the module's file in a list of depmod's.
fn in_list(list: &str) -> Option<&str> {
    let mut files = list.lines().filter_map(|line| line.split(':').next());
    files.find(|file| {
        let name = file.rsplit('/').next().unwrap_or_default();
        ["", ".gz", ".xz", ".zst"]
            .iter()
            .any(|suffix| name.strip_suffix(suffix) == Some("exitmeter.ko"))
    })
}

/// Unpack a module that is packed, by the program that packed it.
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
    /// Its number.
    pub pid: u32,
    /// The kernel's name of it.
    pub name: String,
}

/// Find the processes that hold VMs, but for this one: they have a file `anon_inode:kvm-vm`
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
            // A process calls itself as it likes.
            let name = name.trim_end().escape_debug().to_string();
            holders.push(Holder { pid, name });
        }
    }
    holders
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn the_module_is_found_where_depmod_has_it() {
        let list = "kernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko.xz\n\
                    updates/dkms/exitmeter.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz\n";
        assert_eq!(in_list(list), Some("updates/dkms/exitmeter.ko.xz"));
        assert_eq!(
            in_list("updates/exitmeter.ko:\n"),
            Some("updates/exitmeter.ko")
        );
        assert_eq!(
            in_list("updates/not-exitmeter.ko:\nexitmeter.ko.old:\n"),
            None
        );
    }

    #[test]
    fn a_packed_module_is_unpacked_by_the_program_that_packed_it() {
        let module = b"\x7fELF, or what stands for it";
        let folder = env::temp_dir().join(format!("exitmeter-packed-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let plain = folder.join("exitmeter.ko");
        fs::write(&plain, module).unwrap();
        assert_eq!(unpack(&plain, module).unwrap(), None);
        for (program, suffix) in [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")] {
            let packed = Command::new(program)
                .args(["-c", "--"])
                .arg(&plain)
                .output();
            let Ok(packed) = packed else {
                // Without the program nothing can be packed with it here.
                assert_ne!(program, "gzip", "Debian's base has gzip");
                continue;
            };
            let path = folder.join(format!("exitmeter.ko.{suffix}"));
            fs::write(&path, &packed.stdout).unwrap();
            let unpacked = unpack(&path, &packed.stdout).unwrap();
            assert_eq!(unpacked.as_deref(), Some(&module[..]), "{program}");
            // Cut off, it is an error that names the program.
            let part = &packed.stdout[..packed.stdout.len() - 9];
            fs::write(&path, part).unwrap();
            let error = unpack(&path, part).unwrap_err().to_string();
            assert_eq!(error, format!("{program} cannot unpack it"));
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
