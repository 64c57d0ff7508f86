// SPDX-License-Identifier: GPL-2.0

//! Whether the disk can hold what is about to be made.

use std::fs;
use std::path::Path;

use super::SetupError;

/// What helps against a cache that does not fit, after what else does.
pub(crate) const LARGER_DISK: &str = "point XDG_CACHE_HOME to a larger disk";

/// Fails when the disk of `folder`, which is made if it is not there, has less than `mib` left for `what`.
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
