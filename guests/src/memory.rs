// SPDX-License-Identifier: GPL-2.0

//! Memory of a VM.

use std::{io, ptr::NonNull, slice};

/// Zeroed memory, all of it allocated, and in small pages, so that KVM maps exactly one page of 4
/// KiB for each fault of the guest.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: The memory belongs to this value alone, as that of a Vec does.
unsafe impl Send for Memory {}
// SAFETY: As above. A guest writes to it while it runs; the VMM uses volatile reads then.
unsafe impl Sync for Memory {}

impl Memory {
    /// Allocate `len` bytes, a multiple of the page size.
    ///
    /// # Errors
    ///
    /// Returns the error of mmap(2) or madvise(2).
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        // SAFETY: A new private mapping touches nothing that exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let start = match NonNull::new(address.cast::<u8>()) {
            Some(start) if address != libc::MAP_FAILED => start,
            _ => return Err(io::Error::last_os_error()),
        };
        let memory = Self { start, len };
        // SAFETY: The mapping is ours.
        if unsafe { libc::madvise(address, len, libc::MADV_NOHUGEPAGE) } != 0 {
            let error = io::Error::last_os_error();
            // A kernel without huge pages needs no such advice.
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
        // Write to every page: a page that is only reserved would be mapped read-only to the guest
        // first, and would fault twice.
        // SAFETY: The mapping is `len` bytes, and nothing else refers to it yet.
        unsafe { slice::from_raw_parts_mut(start.as_ptr(), len) }
            .chunks_mut(4096)
            .for_each(|page| page[0] = 0);
        Ok(memory)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Return the address in this process.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    fn place(&self, at: u64, len: usize) -> *mut u8 {
        let at = at as usize;
        assert!(at <= self.len && len <= self.len - at, "inside the memory");
        // SAFETY: The check above ensures that the place is inside the mapping.
        unsafe { self.start.as_ptr().add(at) }
    }

    /// Copy bytes to a guest's address.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        let to = self.place(at, bytes.len());
        // SAFETY: `place` is inside the mapping, which nothing else in this process uses.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Read bytes from a guest's address, while the guest is stopped.
    pub(crate) fn read(&self, at: u64, bytes: &mut [u8]) {
        let from = self.place(at, bytes.len());
        // SAFETY: `place` is inside the mapping, which nothing else in this process uses.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copy all bytes of another memory of the same size, whose guest is stopped.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        assert_eq!(self.len, other.len, "memories of one size");
        // SAFETY: Both mappings have this length, and they are distinct.
        unsafe { self.start.copy_from_nonoverlapping(other.start, self.len) };
    }

    /// Write a number to a guest's address.
    pub(crate) fn write_u64(&mut self, at: u64, number: u64) {
        self.write(at, &number.to_le_bytes());
    }

    /// Read a number from a guest's address, a multiple of 8.
    pub(crate) fn read_u64(&self, at: u64) -> u64 {
        assert!(at % 8 == 0, "aligned");
        // SAFETY: The place is inside the mapping, and aligned as the mapping is.
        unsafe { self.place(at, 8).cast::<u64>().read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: Mapped in `new`, and not used any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
