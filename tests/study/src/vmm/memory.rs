// SPDX-License-Identifier: GPL-2.0

//! The guest's memory.

use std::{io, ptr, slice};

use anyhow::{Context as _, Result};

/// Memory of a guest, zeroed.
pub struct Memory {
    start: *mut u8,
    size: usize,
}

impl Memory {
    /// So many bytes.
    pub fn new(size: usize) -> Result<Self> {
        // SAFETY: A new mapping, which touches nothing that is there.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("no memory for the guest");
        }
        Ok(Self {
            start: start.cast(),
            size,
        })
    }

    /// Where it is in this process.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Writes to it, before the guest runs.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let at = usize::try_from(at)?;
        let end = at.checked_add(bytes.len());
        end.filter(|end| *end <= self.size)
            .context("the guest's files need more memory than it has")?;
        // SAFETY: Within the mapping, as was looked; no guest and no other reference is there yet.
        unsafe { slice::from_raw_parts_mut(self.start.add(at), bytes.len()) }
            .copy_from_slice(bytes);
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: Mapped by `new`, of that size, and the VM is gone.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}
