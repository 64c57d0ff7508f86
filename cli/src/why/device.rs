// SPDX-License-Identifier: GPL-2.0

//! The device, with its details turned on.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    ioctl::{ioctl, opcode, NoArg, Opcode},
};

use crate::source;

/// Request that turns details on while the file is open: docs/interface.md.
const DETAILS: Opcode = opcode::none(0xe7, 1);

/// Request that unfreezes the rings of the last exits.
const THAW: Opcode = opcode::none(0xe7, 2);

/// Size of one read, in bytes.
const READ_SIZE: usize = 1 << 18;

/// Reason why there are no details.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device does not exist, or the user may not open it.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The file is not a device of the meter, or one of an older module.
    #[error(
        "{} has no details: the module that is loaded is older than this tool, \
         or this is not its device",
        .0.display()
    )]
    Older(PathBuf),
    /// The user may not turn details on.
    #[error(
        "no right to turn details on: run this as root, or with CAP_PERFMON; \
         with the module's parameter details=1 they are always on"
    )]
    NoRight,
    /// BPF has no rings.
    #[error("BPF keeps no rings of the last exits: that takes the module")]
    NoRing,
    /// The module refuses the request.
    #[error("cannot turn details on: {0}")]
    Refused(Errno),
}

/// A meter with details on while this value lives: the module, by an open device, or BPF if the
/// module is not loaded.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    /// Open device, or `None` for BPF.
    file: Option<File>,
}

impl Device {
    /// Open a device and turn its details on. If the module is not loaded, start BPF with details.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such device, or the user has no right to it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_by(source::Choice::Auto, path)
    }

    /// Open the chosen meter like [`Device::open`].
    ///
    /// # Errors
    ///
    /// See [`Device::open`].
    pub fn open_by(choice: source::Choice, path: &Path) -> Result<Self, Error> {
        if let Some(path) = choice.with_details(path)? {
            return Ok(Self { path, file: None });
        }
        let file = File::open(path).map_err(|error| source::error(path, error))?;
        // SAFETY: The request has no argument. Its type, 0xE7, has no other user
        // (Documentation/userspace-api/ioctl/ioctl-number.rst): other devices return ENOTTY.
        let turned_on = unsafe { ioctl(&file, NoArg::<DETAILS>::new()) };
        turned_on.map_err(|error| match error {
            Errno::NOTTY | Errno::INVAL => Error::Older(path.to_owned()),
            Errno::PERM => Error::NoRight,
            other => Error::Refused(other),
        })?;
        let path = path.to_owned();
        let file = Some(file);
        Ok(Self { path, file })
    }

    /// Take a fresh snapshot.
    ///
    /// # Errors
    ///
    /// Returns an error if it cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, source::Error> {
        match &self.file {
            Some(file) => take(file).map_err(|error| source::error(&self.path, error)),
            None => source::read(&self.path),
        }
    }

    /// Unfreeze the rings of the last exits.
    ///
    /// # Errors
    ///
    /// Returns an error if the module does not support that.
    pub fn thaw(&self) -> Result<(), Error> {
        let Some(file) = &self.file else {
            return Err(Error::NoRing);
        };
        // SAFETY: As for `DETAILS`.
        let thawed = unsafe { ioctl(file, NoArg::<THAW>::new()) };
        thawed.map_err(|error| match error {
            Errno::NOTTY | Errno::INVAL => Error::Older(self.path.clone()),
            Errno::PERM => Error::NoRight,
            other => Error::Refused(other),
        })
    }

    /// Return the path to read snapshots from.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Take a snapshot. At offset 0 the device takes a fresh one; at other offsets it continues with
/// the same one. The device cannot seek.
fn take(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let end = bytes.len();
        bytes.resize(end + READ_SIZE, 0);
        let room = bytes.get_mut(end..).unwrap_or_default();
        let read = file.read_at(room, end as u64)?;
        bytes.truncate(end + read);
        if read == 0 {
            return Ok(bytes);
        }
    }
}
