// SPDX-License-Identifier: GPL-2.0

//! The kernel's types (BTF): the files of `/sys/kernel/btf`.

use core::ptr::NonNull;

use kernel::prelude::*;

use crate::bindings;

/// A file of `/sys/kernel/btf`, in memory for as long as this lives.
pub(crate) struct BtfFile {
    bytes: NonNull<u8>,
    size: usize,
}

impl BtfFile {
    /// Read a file, or return `None` if there is none. Only for the module's init, which may sleep.
    pub(crate) fn read(path: &'static CStr) -> Option<Self> {
        let mut size = 0;
        // SAFETY: The path ends with a NUL, and the callers may sleep.
        let bytes = unsafe { bindings::exitmeter_read_types(path.as_char_ptr(), &mut size) };
        let bytes = NonNull::new(bytes.cast())?;
        Some(Self { bytes, size })
    }

    /// Return the file's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: The kernel has filled as many bytes, and nobody writes them.
        unsafe { core::slice::from_raw_parts(self.bytes.as_ptr(), self.size) }
    }
}

impl Drop for BtfFile {
    fn drop(&mut self) {
        // SAFETY: `read` made it, and no borrow is left.
        unsafe { bindings::exitmeter_free_types(self.bytes.as_ptr().cast()) };
    }
}
