// SPDX-License-Identifier: GPL-2.0

//! Initramfs of a guest.

use std::{fs::File, io, path::Path};

use crate::{cpio::Archive, settings::GUEST_INITRAMFS};

/// Write an initramfs to a new file: the part that the lab packed, the agent as the guest's first process, and the
/// entries that `add` adds.
///
/// # Errors
///
/// Errors of `add`, of the files and of the target.
pub fn write<E: From<io::Error>>(
    path: &Path,
    agent: &Path,
    add: impl FnOnce(&mut Archive<File>) -> Result<(), E>,
) -> Result<(), E> {
    let mut target = File::create(path)?;
    let size = io::copy(&mut File::open(GUEST_INITRAMFS)?, &mut target)?;
    let mut archive = Archive::new(target);
    let agent = File::open(agent)?;
    archive.file("bin/guest-init", 0o755, agent.metadata()?.len(), agent)?;
    add(&mut archive)?;
    // SeaBIOS writes its tables over the last page of the initramfs if that page is nearly full.
    archive.finish(4096, (512 + 4096 - size % 4096) % 4096)?;
    Ok(())
}
