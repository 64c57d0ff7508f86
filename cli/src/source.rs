// SPDX-License-Identifier: GPL-2.0

//! Sources of snapshots: the module's device, the BPF programs, or a file.

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
    names::{NameBook, RunningVms},
};

/// Device that gives snapshots.
pub const DEVICE: &str = "/dev/exitmeter";

/// Size of one read of a device or file, in bytes.
const READ_SIZE: usize = 256 << 10;

/// Reason why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device does not exist.
    #[error("there is no {DEVICE}: load the module on the host first (insmod exitmeter.ko)")]
    NoDevice,
    /// The device does not exist, and the kernel loads only signed modules.
    #[error(
        "there is no {DEVICE}, and this kernel loads no module without a key that it trusts: insmod and \
         modprobe say 'Key was rejected by service', or 'Operation not permitted' under lockdown; sign \
         exitmeter.ko, enroll the key (docs/install.md, Secure Boot), and load it (modprobe exitmeter)"
    )]
    NoKey,
    /// The user may not open the device.
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
        /// Reason why the module does not.
        module: Box<Error>,
        /// Reason why BPF does not.
        bpf: bpf::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        error: io::Error,
    },
    /// The file or device holds no snapshot that this tool can read.
    #[error("{}: {error}", path.display())]
    NoSnapshot {
        /// Path of the file.
        path: PathBuf,
        /// Error of the reader.
        error: reader::Error,
    },
}

/// Meter that is asked for a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// The module, or BPF where the module is not loaded.
    #[default]
    Auto,
    /// The module only.
    Module,
    /// BPF only.
    #[cfg(feature = "bpf")]
    Bpf,
}

impl Choice {
    /// Return the path to read: `input` if it names a file, or else the source of the chosen meter.
    /// Start BPF if it is to meter.
    ///
    /// # Errors
    ///
    /// Returns an error if BPF is to meter and cannot.
    pub fn open(self, input: &Path) -> Result<PathBuf, Error> {
        #[cfg(feature = "bpf")]
        if input == Path::new(DEVICE) {
            if self == Choice::Bpf {
                bpf::open()?;
                return Ok(bpf::PINS.into());
            }
            if self == Choice::Auto && device_is_missing() {
                bpf::open().map_err(bpf_error)?;
                return Ok(bpf::PINS.into());
            }
        }
        Ok(input.to_owned())
    }

    /// Start BPF with details if this choice and `input` ask for BPF, and return the path to read
    /// then.
    ///
    /// # Errors
    ///
    /// Returns an error if BPF is to meter and cannot.
    pub fn with_details(self, input: &Path) -> Result<Option<PathBuf>, Error> {
        #[cfg(feature = "bpf")]
        {
            let by_bpf = match self {
                _ if input == Path::new(bpf::PINS) => true,
                Choice::Bpf => input == Path::new(DEVICE),
                Choice::Auto => input == Path::new(DEVICE) && device_is_missing(),
                Choice::Module => false,
            };
            if by_bpf {
                bpf::open_with_details().map_err(|error| match self {
                    Choice::Auto => bpf_error(error),
                    _ => Error::Bpf(error),
                })?;
                return Ok(Some(bpf::PINS.into()));
            }
        }
        let _ = input;
        Ok(None)
    }
}

/// Meter that a command reads where no file is named.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct SourceArgs {
    /// Meter to read: the module, or BPF where the module is not loaded (auto), or only one of
    /// these.
    #[arg(
        long,
        value_enum,
        value_name = "METER",
        default_value_t,
        conflicts_with = "input"
    )]
    pub source: Choice,
}

/// Return true if there is surely no device. A device that cannot be looked at exists.
#[cfg(feature = "bpf")]
fn device_is_missing() -> bool {
    matches!(fs::exists(DEVICE), Ok(false))
}

/// Return the path of the meter that is running: the pins of BPF if the module is not loaded, else
/// `path`.
pub fn meter(path: &Path) -> PathBuf {
    #[cfg(feature = "bpf")]
    if path == Path::new(DEVICE) && device_is_missing() {
        let pins = PathBuf::from(bpf::PINS);
        // Pins that cannot be looked at exist.
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

/// Return the error for BPF that does not meter. If BPF was to stand in for the module, add why
/// the module does not meter.
#[cfg(feature = "bpf")]
fn bpf_error(bpf: bpf::Error) -> Error {
    match fs::metadata(DEVICE) {
        Ok(_) => Error::Bpf(bpf),
        Err(found) => Error::Neither {
            module: Box::new(error(Path::new(DEVICE), found)),
            bpf,
        },
    }
}

/// Return the bytes of a snapshot: a fresh one from the device or the BPF programs, or a saved one.
///
/// # Errors
///
/// Returns an error if the file cannot be read, or BPF does not meter.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    #[cfg(feature = "bpf")]
    if path == Path::new(bpf::PINS) {
        return Ok(bpf::read()?);
    }
    fs::read(path).map_err(|found| error(path, found))
}

/// Open what [`read`] reads, to read it in parts.
///
/// # Errors
///
/// See [`read`].
pub fn open(path: &Path) -> Result<Box<dyn io::Read>, Error> {
    #[cfg(feature = "bpf")]
    if path == Path::new(bpf::PINS) {
        return Ok(Box::new(io::Cursor::new(bpf::read()?)));
    }
    let file = fs::File::open(path).map_err(|found| error(path, found))?;
    Ok(Box::new(io::BufReader::with_capacity(READ_SIZE, file)))
}

/// Return the error for a file that cannot be opened or read.
pub fn error(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound if path == Path::new(DEVICE) => {
            if requires_signature(Path::new("/sys")) {
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

/// Return true if the kernel loads only modules with a signature that it trusts. `sys` is /sys.
///
/// Either the setting says so, or the kernel is locked down, as by Secure Boot
/// (`module_sig_check()`, kernel/module/signing.c). Everybody can read both files.
fn requires_signature(sys: &Path) -> bool {
    let read = |name| fs::read_to_string(sys.join(name)).unwrap_or_default();
    let lockdown = read("kernel/security/lockdown");
    read("module/module/parameters/sig_enforce").trim() == "Y"
        || ["[integrity]", "[confidentiality]"]
            .iter()
            .any(|level| lockdown.contains(level))
}

/// Parse the snapshot in the bytes of a file.
///
/// # Errors
///
/// Returns an error if the bytes are no snapshot, or one of another version.
pub fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<Snapshot<'a>, Error> {
    Snapshot::parse(bytes).map_err(|error| Error::NoSnapshot {
        path: path.to_owned(),
        error,
    })
}

/// Return the report of a snapshot: a fresh one from the device, or a saved one.
///
/// # Errors
///
/// See [`read`] and [`parse`].
pub fn report(path: &Path) -> Result<Report, Error> {
    Source::new(path).report()
}

/// Source of successive snapshots, with the names of the VMs.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    names: NameBook,
}

impl Source {
    /// Create a source from the device or a file.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            names: NameBook::of(path),
        }
    }

    /// Return the report of the current snapshot.
    ///
    /// Each call opens the device anew, so the module can be unloaded and loaded between two calls.
    ///
    /// # Errors
    ///
    /// See [`read`] and [`parse`].
    pub fn report(&mut self) -> Result<Report, Error> {
        let bytes = read(&self.path)?;
        let snapshot = parse(&self.path, &bytes)?;
        let running = RunningVms::new(&snapshot);
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
    fn signature_requirement_is_read_from_setting_and_lockdown() {
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
            assert_eq!(requires_signature(sys.path()), alone, "{name}: {text}");
        }
        assert!(!requires_signature(Path::new("/nowhere")));
    }
}
