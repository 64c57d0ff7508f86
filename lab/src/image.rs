// SPDX-License-Identifier: GPL-2.0

//! What a host boots: its kernel, and an initramfs in two parts.
//!
//! The first part is the same for all runs with one kernel and root: programs, KVM's modules, the guest's kernel. It
//! is made once and cached. The second is of one run: the agent, the script, the files. The emulators put both into
//! memory one behind the other, and the kernel unpacks them as one.

mod base;
pub(crate) mod cache;
mod elf;
pub mod payload;
pub mod pvh;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::refused::Refused;
use crate::setup::{Prepared, SetupError};

/// What cannot be made into an image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The cache has no place.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The system refused something.
    #[error(transparent)]
    Io(#[from] Refused),
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl ImageError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        Refused::to(action, path)
    }

    fn content(path: &Path, reason: impl ToString) -> Self {
        Self::Content {
            path: path.into(),
            reason: reason.to_string(),
        }
    }
}

/// A kernel as it lies in memory.
#[derive(Debug)]
pub struct Kernel {
    /// The file with all of it.
    pub path: PathBuf,
    /// Where it begins, in bytes from the start of memory.
    pub address: u64,
    /// Where its entry for PVH is.
    pub entry: u32,
}

/// The images of one run.
#[derive(Debug)]
pub struct Images {
    /// The first part of the initramfs, shared with other runs.
    pub base: PathBuf,
    /// The second part, in the run's folder.
    pub payload: PathBuf,
}

impl Images {
    /// Makes the part that is the same for all, if it is not there, and puts `payload` beside it.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn new(prepared: &Prepared, payload: &Path) -> Result<Self, ImageError> {
        Ok(Self {
            base: base::make(prepared)?,
            payload: payload.into(),
        })
    }

    /// The host's kernel as it lies in memory, made if it is not there.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn kernel(&self, prepared: &Prepared) -> Result<Kernel, ImageError> {
        let source = prepared.kernel.join("vmlinux");
        let bytes = fs::read(&source).map_err(ImageError::io("read", &source))?;
        let kernel = elf::Kernel::parse(&source, &bytes)?;
        let path = cache::get(
            "kernel",
            &[
                include_bytes!("image/elf.rs"),
                prepared.kernel_key.as_bytes(),
            ],
            |target| fs::write(target, kernel.layout()).map_err(ImageError::io("write", target)),
        )?;
        Ok(Kernel {
            path,
            address: kernel.address,
            entry: kernel.entry,
        })
    }

    /// Writes both parts of the initramfs to one file.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn join(&self, target: &Path) -> Result<(), ImageError> {
        let mut file = File::create(target).map_err(ImageError::io("write", target))?;
        for part in [&self.base, &self.payload] {
            let mut source = File::open(part).map_err(ImageError::io("read", part))?;
            io::copy(&mut source, &mut file).map_err(ImageError::io("write", target))?;
        }
        Ok(())
    }
}
