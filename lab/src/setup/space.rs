// SPDX-License-Identifier: GPL-2.0

//! Check that the disk has enough free space.

use std::{fs, path::Path};

use super::SetupError;

/// Fail if the disk of `folder` has less than `mib` MiB free for `what`. The folder is made if it is missing.
///
/// # Errors
///
/// [`SetupError::Space`].
pub(crate) fn need_space(folder: &Path, mib: u64, what: &'static str) -> Result<(), SetupError> {
    fs::create_dir_all(folder).map_err(SetupError::io("make", folder))?;
    let disk = rustix::fs::statvfs(folder)
        .map_err(|error| SetupError::io("ask for the free space of", folder)(error.into()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize) >> 20;
    if free < mib {
        return Err(SetupError::Space {
            folder: folder.into(),
            free,
            what,
            needed: mib,
        });
    }
    Ok(())
}
