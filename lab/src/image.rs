// SPDX-License-Identifier: GPL-2.0

//! Images that a host boots: its kernel, and an initramfs in two parts.
//!
//! The first part is the same for all runs with one kernel and root: programs, KVM's modules, the guest's kernel. It
//! is made once and cached. The second part belongs to one run: the agent, the script, the files. The emulators load
//! the parts into memory one behind the other, and the kernel unpacks them as one.

mod base;
pub(crate) mod cache;
mod elf;
pub mod payload;
pub mod pvh;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::{file_error::FileError, paths::NoCache, setup::Setup};

/// Reason why an image cannot be made.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The environment names no folder for the cache.
    #[error(transparent)]
    NoCache(#[from] NoCache),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] FileError),
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Its fault.
        reason: String,
    },
}

impl ImageError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        FileError::on(action, path)
    }

    fn content(path: &Path, reason: impl ToString) -> Self {
        Self::Content {
            path: path.into(),
            reason: reason.to_string(),
        }
    }
}

/// A kernel laid out as in memory.
#[derive(Debug)]
pub struct Kernel {
    /// File with the whole kernel.
    pub path: PathBuf,
    /// Physical address of its first byte.
    pub address: u64,
    /// Physical address of its PVH entry.
    pub entry: u32,
}

/// Images of one run.
#[derive(Debug)]
pub struct Images {
    /// First part of the initramfs, shared with other runs.
    pub base: PathBuf,
    /// Second part of the initramfs, in the run's folder.
    pub payload: PathBuf,
}

impl Images {
    /// Return the images of a run with this payload. The shared part is made if it is missing.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn new(prepared: &Setup, payload: &Path) -> Result<Self, ImageError> {
        Ok(Self {
            base: base::make(prepared)?,
            payload: payload.into(),
        })
    }

    /// Return the host's kernel, laid out as in memory. Its file is made if it is missing.
    ///
    /// # Errors
    ///
    /// [`ImageError`].
    pub fn kernel(&self, prepared: &Setup) -> Result<Kernel, ImageError> {
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

    /// Write both parts of the initramfs to one file.
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
