// SPDX-License-Identifier: GPL-2.0

//! Allocates the guest's memory.

use std::{io, ptr, slice};

use anyhow::{Context as _, Result};

/// Memory of a guest.
pub struct Memory {
    start: *mut u8,
    size: usize,
}

impl Memory {
    /// Allocate `size` bytes of zeroed memory.
    pub fn new(size: usize) -> Result<Self> {
        // SAFETY: This creates a new mapping and changes no existing one.
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

    /// Return the address in this process.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Write to the memory, before the guest runs.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let at = usize::try_from(at)?;
        let end = at.checked_add(bytes.len());
        end.filter(|end| *end <= self.size)
            .context("the guest's files need more memory than it has")?;
        // SAFETY: The range is within the mapping, as checked above. There is no guest and no other reference yet.
        unsafe { slice::from_raw_parts_mut(self.start.add(at), bytes.len()) }
            .copy_from_slice(bytes);
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping with that size, and the VM is gone.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}
