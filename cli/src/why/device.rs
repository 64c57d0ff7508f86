// SPDX-License-Identifier: GPL-2.0

//! The device with its details on.

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

/// Turns details on while the file is open: docs/interface.md.
const DETAILS: Opcode = opcode::none(0xe7, 1);

/// Asks for rings of the last exits that are not frozen.
const THAW: Opcode = opcode::none(0xe7, 2);

/// Bytes that are read at once.
const CHUNK: usize = 1 << 18;

/// Why there are no details.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no device, or no right to it.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// It is no device of the meter, or of an older module.
    #[error(
        "{} cannot tell details: the module that is loaded is older than this tool, \
         or this is no device of its",
        .0.display()
    )]
    Older(PathBuf),
    /// There is no right to it.
    #[error(
        "no right to turn details on: run this as root, or with CAP_PERFMON; \
         with the module's parameter details=1 they are always on"
    )]
    NoRight,
    /// BPF has no rings.
    #[error("BPF keeps no rings of the last exits: that takes the module")]
    NoRing,
    /// The module says no.
    #[error("cannot turn details on: {0}")]
    Refused(Errno),
}

/// A meter with details on for as long as this lives: the module by an open device, or where that is not loaded BPF.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    /// `None`: BPF.
    file: Option<File>,
}

impl Device {
    /// Open a device and turn its details on. In place of the module's, where there is none, have BPF meter.
    ///
    /// # Errors
    ///
    /// When there is no such device, or no right to it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_by(source::Choice::Auto, path)
    }

    /// As [`Device::open`], with the meter that was chosen.
    ///
    /// # Errors
    ///
    /// As for [`Device::open`].
    pub fn open_by(choice: source::Choice, path: &Path) -> Result<Self, Error> {
        if let Some(path) = choice.with_details(path)? {
            return Ok(Self { path, file: None });
        }
        let file = File::open(path).map_err(|error| source::error(path, error))?;
        // SAFETY: The request has no argument. Nobody else has its type, 0xE7
        // (Documentation/userspace-api/ioctl/ioctl-number.rst): others give ENOTTY.
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
    /// When it cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, source::Error> {
        match &self.file {
            Some(file) => take(file).map_err(|error| source::error(&self.path, error)),
            None => source::read(&self.path),
        }
    }

    /// Ask for rings of the last exits that are not frozen.
    ///
    /// # Errors
    ///
    /// When the module does not do that.
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

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Take a snapshot. At offset 0 the device takes a fresh one, and at others it goes on in the same. It cannot seek.
fn take(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let end = bytes.len();
        bytes.resize(end + CHUNK, 0);
        let room = bytes.get_mut(end..).unwrap_or_default();
        let read = file.read_at(room, end as u64)?;
        bytes.truncate(end + read);
        if read == 0 {
            return Ok(bytes);
        }
    }
}
