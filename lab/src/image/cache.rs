// SPDX-License-Identifier: GPL-2.0

//! Cache of files and folders that are made once for all runs.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustix::fs::{flock, FlockOperation};
use sha2::{Digest, Sha256};

use super::ImageError;
use crate::paths;

/// Number of results of each name that are kept, the most recently used.
const KEPT: usize = 6;

/// Return the path of the cached file or folder `name`, which depends on `parts` alone. If it is missing, `make` makes
/// it. Concurrent callers make it once, and no caller sees half of it.
pub fn get<E: From<ImageError>>(
    name: &str,
    parts: &[&[u8]],
    make: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, E> {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let key: String = hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let folder = paths::cache().map_err(ImageError::NoCache)?.join("images");
    fs::create_dir_all(&folder).map_err(ImageError::io("make", &folder))?;
    let path = folder.join(format!("{name}-{key}"));

    let lock_path = folder.join(format!("{name}-{key}.lock"));
    let lock = File::create(&lock_path).map_err(ImageError::io("write", &lock_path))?;
    flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| ImageError::io("lock", &lock_path)(error.into()))?;
    if !path.exists() {
        let part = folder.join(format!("{name}-{key}.part"));
        // An interrupted caller may have left it.
        remove(&part);
        let made = make(&part).and_then(|()| {
            fs::rename(&part, &path)
                .map_err(ImageError::io("rename", &part))
                .map_err(E::from)
        });
        if let Err(error) = made {
            remove(&part);
            return Err(error);
        }
        prune(&folder, name);
    }
    // The time tells when it was last used.
    if let Ok(file) = File::open(&path) {
        let _ = file.set_modified(SystemTime::now());
    }
    Ok(path)
}

fn remove(path: &Path) {
    let _ = fs::remove_file(path);
    let _ = fs::remove_dir_all(path);
}

/// Remove all results of a name except the most recently used. Errors are ignored, since old results only take space.
fn prune(folder: &Path, name: &str) {
    let mut found: Vec<(SystemTime, PathBuf)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let file_name = entry.file_name().into_string().ok()?;
            let key = file_name.strip_prefix(name)?.strip_prefix('-')?;
            key.chars().all(|c| c.is_ascii_hexdigit()).then_some(())?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    found.sort();
    let surplus = found.len().saturating_sub(KEPT);
    for (_, path) in &found[..surplus] {
        remove(path);
    }
}
