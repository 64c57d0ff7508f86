// SPDX-License-Identifier: GPL-2.0

//! Where a snapshot comes from: the module's device, the BPF programs, or a file.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
};

use exitmeter_meter::reader::{self, Snapshot};

#[cfg(feature = "bpf")]
use crate::bpf;
use crate::{
    model::Report,
    names::{Book, Running},
};

/// The device that gives snapshots.
pub const DEVICE: &str = "/dev/exitmeter";

/// Bytes that are read of a device or file at a time.
const PART: usize = 256 << 10;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device is not there.
    #[error("there is no {DEVICE}: load the module on the host first (insmod exitmeter.ko)")]
    NoDevice,
    /// The device is not there, and the kernel loads signed modules alone.
    #[error(
        "there is no {DEVICE}, and this kernel loads no module without a key that it trusts: insmod and \
         modprobe say 'Key was rejected by service', or 'Operation not permitted' under lockdown; sign \
         exitmeter.ko, enroll the key (docs/install.md, Secure Boot), and load it (modprobe exitmeter)"
    )]
    NoKey,
    /// The device may not be opened.
    #[error("no right to open {DEVICE}: run this as root or as a member of the group kvm")]
    NoRight,
    /// BPF was asked for, and does not meter.
    #[cfg(feature = "bpf")]
    #[error(transparent)]
    Bpf(#[from] bpf::Error),
    /// Neither the module nor BPF meters.
    #[cfg(feature = "bpf")]
    #[error("{module}; BPF does not meter in its place: {bpf}")]
    Neither {
        /// Why the module does not.
        module: Box<Error>,
        /// Why BPF does not.
        bpf: bpf::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// What was read is no snapshot for this tool.
    #[error("{}: {error}", path.display())]
    NoSnapshot {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: reader::Error,
    },
}

/// The meter that is asked for a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// The module; where it is not loaded, BPF.
    #[default]
    Auto,
    /// The module alone.
    Module,
    /// BPF alone.
    #[cfg(feature = "bpf")]
    Bpf,
}

impl Choice {
    /// Return where to read: a file that was named, or else the meter of this choice, which meters from now on.
    ///
    /// # Errors
    ///
    /// When BPF is to meter, and cannot.
    pub fn open(self, input: &Path) -> Result<PathBuf, Error> {
        #[cfg(feature = "bpf")]
        if input == Path::new(DEVICE) {
            let no_device = || matches!(fs::exists(DEVICE), Ok(false));
            if self == Choice::Bpf {
                bpf::open()?;
                return Ok(bpf::PINS.into());
            }
            if self == Choice::Auto && no_device() {
                bpf::open().map_err(no_bpf)?;
                return Ok(bpf::PINS.into());
            }
        }
        Ok(input.to_owned())
    }

    /// Have BPF meter with details, where this choice and the file that was named ask for that; return where to read then.
    ///
    /// # Errors
    ///
    /// When BPF is to meter, and cannot.
    pub fn with_details(self, input: &Path) -> Result<Option<PathBuf>, Error> {
        #[cfg(feature = "bpf")]
        {
            let no_device = || matches!(fs::exists(DEVICE), Ok(false));
            let by_bpf = match self {
                _ if input == Path::new(bpf::PINS) => true,
                Choice::Bpf => input == Path::new(DEVICE),
                Choice::Auto => input == Path::new(DEVICE) && no_device(),
                Choice::Module => false,
            };
            if by_bpf {
                bpf::open_with_details().map_err(|error| match self {
                    Choice::Auto => no_bpf(error),
                    _ => Error::Bpf(error),
                })?;
                return Ok(Some(bpf::PINS.into()));
            }
        }
        let _ = input;
        Ok(None)
    }
}

/// The meter that a command reads, where no file is named.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Asked {
    /// The meter to ask: the module, or where it is not loaded BPF (auto), or one of these alone.
    #[arg(
        long,
        value_enum,
        value_name = "METER",
        default_value_t,
        conflicts_with = "input"
    )]
    pub source: Choice,
}

/// Return where the meter is read that is there already: the pins of BPF in place of a module that is not loaded.
pub fn meter(path: &Path) -> PathBuf {
    #[cfg(feature = "bpf")]
    if path == Path::new(DEVICE) && matches!(fs::exists(DEVICE), Ok(false)) {
        let pins = PathBuf::from(bpf::PINS);
        // What may not be looked at is there.
        if !matches!(fs::exists(&pins), Ok(false)) {
            return pins;
        }
    }
    path.to_owned()
}

/// Return true if a path gives a fresh snapshot of this host each time.
pub fn is_live(path: &Path) -> bool {
    #[cfg(feature = "bpf")]
    if path == Path::new(bpf::PINS) {
        return true;
    }
    path.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_char_device())
}

/// Return why BPF does not meter; where it was to stand in for the module, with why that does not.
#[cfg(feature = "bpf")]
fn no_bpf(bpf: bpf::Error) -> Error {
    match fs::metadata(DEVICE) {
        Ok(_) => Error::Bpf(bpf),
        Err(found) => Error::Neither {
            module: Box::new(error(Path::new(DEVICE), found)),
            bpf,
        },
    }
}

/// The bytes of a snapshot: a fresh one from the device or of the BPF programs, or a saved one.
///
/// # Errors
///
/// When the file cannot be read, or BPF does not meter.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    #[cfg(feature = "bpf")]
    if path == Path::new(bpf::PINS) {
        return Ok(bpf::read()?);
    }
    fs::read(path).map_err(|found| error(path, found))
}

/// Open what [`read`] reads, to read it a part at a time.
///
/// # Errors
///
/// As [`read`].
pub fn open(path: &Path) -> Result<Box<dyn io::Read>, Error> {
    #[cfg(feature = "bpf")]
    if path == Path::new(bpf::PINS) {
        return Ok(Box::new(io::Cursor::new(bpf::read()?)));
    }
    let file = fs::File::open(path).map_err(|found| error(path, found))?;
    Ok(Box::new(io::BufReader::with_capacity(PART, file)))
}

/// Return why a file cannot be opened or read.
pub fn error(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound if path == Path::new(DEVICE) => {
            if signed_alone(Path::new("/sys")) {
                Error::NoKey
            } else {
                Error::NoDevice
            }
        }
        ErrorKind::PermissionDenied if path == Path::new(DEVICE) => Error::NoRight,
        _ => Error::Unreadable {
            path: path.to_owned(),
            error,
        },
    }
}

/// Return true if the kernel loads no module without a signature that it trusts. `sys` is /sys.
///
/// Either it was told so, or it is locked down, as by Secure Boot (`module_sig_check()`,
/// kernel/module/signing.c). Both files are readable for everybody.
fn signed_alone(sys: &Path) -> bool {
    let read = |name| fs::read_to_string(sys.join(name)).unwrap_or_default();
    let lockdown = read("kernel/security/lockdown");
    read("module/module/parameters/sig_enforce").trim() == "Y"
        || ["[integrity]", "[confidentiality]"]
            .iter()
            .any(|level| lockdown.contains(level))
}

/// The snapshot in the bytes of a file.
///
/// # Errors
///
/// When they hold none, or one of another version.
pub fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<Snapshot<'a>, Error> {
    Snapshot::parse(bytes).map_err(|error| Error::NoSnapshot {
        path: path.to_owned(),
        error,
    })
}

/// The data of a snapshot: of a fresh one from the device, or of a saved one.
///
/// # Errors
///
/// As [`read`] and [`parse`].
pub fn report(path: &Path) -> Result<Report, Error> {
    Source::new(path).report()
}

/// Where one snapshot after the other comes from, with the names of the VMs.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    names: Book,
}

impl Source {
    /// Make one of the device, or of a file.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            names: Book::of(path),
        }
    }

    /// The data of the snapshot that is there now.
    ///
    /// Each call opens the device anew. So between two the module can be unloaded, and loaded.
    ///
    /// # Errors
    ///
    /// As [`read`] and [`parse`].
    pub fn report(&mut self) -> Result<Report, Error> {
        let bytes = read(&self.path)?;
        let snapshot = parse(&self.path, &bytes)?;
        let running = Running::new(&snapshot);
        self.names.look_up(&running);
        self.names.forget_others(&running);
        let mut report = Report::new(&snapshot);
        self.names.name(&mut report);
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_wants_keys_is_known_by_its_setting_or_its_lockdown() {
        for (name, text, alone) in [
            ("module/module/parameters/sig_enforce", "Y\n", true),
            ("module/module/parameters/sig_enforce", "N\n", false),
            (
                "kernel/security/lockdown",
                "none [integrity] confidentiality\n",
                true,
            ),
            (
                "kernel/security/lockdown",
                "[none] integrity confidentiality\n",
                false,
            ),
        ] {
            let sys = tempfile::tempdir().expect("a folder");
            let path = sys.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(&path, text).expect("a file");
            assert_eq!(signed_alone(sys.path()), alone, "{name}: {text}");
        }
        assert!(!signed_alone(Path::new("/nowhere")));
    }
}
