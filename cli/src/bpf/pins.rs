// SPDX-License-Identifier: GPL-2.0

//! Pins of the programs: a folder of the BPF file system that keeps them after the process that
//! attached them ends.

use std::{
    cmp::Reverse,
    ffi::OsString,
    fs::{self, File},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use aya::maps::MapData;
use rustix::fs::{flock, FlockOperation};

use super::{attach::Attached, maps::Maps, Error};

/// Lock the parent folder of the pins, so that two starts or stops wait for each other.
///
/// # Errors
///
/// Returns [`Error::Pins`] or [`Error::NoRight`].
pub fn lock(pins: &Path) -> Result<File, Error> {
    let folder = pins.parent().unwrap_or(pins);
    let file = File::open(folder).map_err(unreadable(folder))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|error| failed(folder)(error.into()))?;
    Ok(file)
}

/// Return the error for a file or folder that could not be used.
fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |error| Error::Pins {
        path: path.display().to_string(),
        error,
    }
}

/// Return the error for a file or folder that could not be opened.
fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |error| match error.kind() {
        ErrorKind::PermissionDenied => Error::NoRight,
        _ => failed(path)(error),
    }
}

/// Return the folder that holds the pins until all of them are made. Names on that file system
/// cannot contain a dot.
fn unfinished(pins: &Path) -> PathBuf {
    let mut name = pins.as_os_str().to_owned();
    name.push("-new");
    name.into()
}

/// Open the pinned maps; `None` if nothing is pinned.
///
/// # Errors
///
/// Returns [`Error::PinsUnreadable`], [`Error::OtherVersion`] or [`Error::Pins`].
pub fn open(pins: &Path) -> Result<Option<Maps>, Error> {
    match fs::metadata(pins) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Err(Error::PinsUnreadable)
        }
        Err(error) => return Err(failed(pins)(error)),
    }
    // Open for writing: the kernel maps no array that was opened read-only (`bpf_map_mmap()`,
    // kernel/bpf/syscall.c).
    let map = |name| {
        let path = pins.join(name);
        // Another version may lack a map.
        match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::OtherVersion),
            _ => MapData::from_pin(path).map_err(|_| Error::PinsUnreadable),
        }
    };
    Maps::new(map).map(Some)
}

/// Pin the programs and their maps. If a step fails, nothing stays pinned.
///
/// # Errors
///
/// Returns [`Error::Pins`] or [`Error::Refused`].
pub fn keep(pins: &Path, attached: Attached) -> Result<(), Error> {
    let folder = unfinished(pins);
    // Remove the leftovers of a start that was killed.
    remove_folder(&folder)?;
    fs::create_dir(&folder).map_err(failed(&folder))?;
    let done =
        fill(&folder, attached).and_then(|()| fs::rename(&folder, pins).map_err(failed(pins)));
    if done.is_err() {
        // The first failure is reported; removing the rest is best effort.
        let _ = remove_folder(&folder);
    }
    done
}

fn fill(folder: &Path, attached: Attached) -> Result<(), Error> {
    let refused = |name: &str, error: String| Error::Refused {
        program: name.to_owned(),
        error,
    };
    let (maps, links) = attached.into_parts();
    for (name, map) in maps.named() {
        map.pin(folder.join(name))
            .map_err(|error| refused(name, error.to_string()))?;
    }
    for (place, link) in links.iter().enumerate() {
        // The number keeps the order for `remove`.
        link.pin(&folder.join(format!("{place}_{}", link.name())))
            .map_err(|error| refused(link.name(), error.to_string()))?;
    }
    Ok(())
}

/// Unpin the programs, which detaches them, and their maps.
///
/// # Errors
///
/// Returns [`Error::NotStarted`], [`Error::NoRight`] or [`Error::Pins`].
pub fn remove(pins: &Path) -> Result<(), Error> {
    let left = remove_folder(&unfinished(pins))?;
    match remove_folder(pins)? || left {
        true => Ok(()),
        false => Err(Error::NotStarted),
    }
}

/// Remove a folder of pins, the last program first. Returns false if the folder does not exist.
fn remove_folder(folder: &Path) -> Result<bool, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(unreadable(folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(failed(folder))?.file_name());
    }
    // Remove programs before maps, in the reverse order of attaching.
    let place = |name: &OsString| {
        let name = name.to_string_lossy().into_owned();
        let place = name
            .split('_')
            .next()
            .and_then(|number| number.parse::<u32>().ok());
        Reverse(place.map_or(0, |place| place + 1))
    };
    names.sort_by_key(place);
    for name in names {
        let path = folder.join(name);
        fs::remove_file(&path).map_err(failed(&path))?;
    }
    fs::remove_dir(folder).map_err(failed(folder))?;
    Ok(true)
}
