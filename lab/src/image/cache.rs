//! Files that are made once for all runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::ImageError;
use crate::setup;

/// The path of the cached file `name`, which depends on `parts` alone; `make` writes it when it is not there.
/// Two makers at once do the work twice, and no reader sees half a file.
pub fn file(
    name: &str,
    parts: &[&str],
    make: impl FnOnce(&Path) -> Result<(), ImageError>,
) -> Result<PathBuf, ImageError> {
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
    let folder = setup::cache()?.join("images");
    fs::create_dir_all(&folder).map_err(ImageError::io("make", &folder))?;
    let path = folder.join(format!("{name}-{key}"));
    if path.exists() {
        return Ok(path);
    }
    let part = folder.join(format!("{name}-{key}.{}.part", std::process::id()));
    make(&part)
        .and_then(|()| fs::rename(&part, &path).map_err(ImageError::io("rename", &part)))
        .inspect_err(|_| {
            let _: io::Result<()> = fs::remove_file(&part);
        })?;
    Ok(path)
}
