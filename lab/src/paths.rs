// SPDX-License-Identifier: GPL-2.0

//! Folders that the whole crate uses: the checkout and the cache.

use std::{
    env,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Remedy for a cache that does not fit on its disk, named behind "free some".
pub(crate) const LARGER_DISK: &str = "point XDG_CACHE_HOME to a larger disk";

/// The environment names no folder for the cache.
#[derive(Debug, Error)]
#[error("neither XDG_CACHE_HOME nor HOME is an absolute path; set one, the set-up is kept there")]
pub struct NoCache;

/// Return the checkout that this program was built from. Its scripts and sources are used in place.
pub fn repository() -> &'static Path {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR"));
    lab.parent().unwrap_or(lab)
}

/// Return the folder of everything that is made once and kept. Each user of the cache has a folder of its own in it.
///
/// # Errors
///
/// [`NoCache`] if the environment names no folder.
pub fn cache() -> Result<PathBuf, NoCache> {
    let folder = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    folder("XDG_CACHE_HOME")
        .or_else(|| folder("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("exitmeter"))
        .ok_or(NoCache)
}
