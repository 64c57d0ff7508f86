// SPDX-License-Identifier: GPL-2.0

//! Archives for the kernel's initramfs, in the format "newc".
//!
//! All entries belong to root and have no date, so that the same content gives the same bytes.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;

/// Writer of an archive.
#[derive(Debug)]
pub struct Archive<W> {
    target: W,
    written: u64,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// Start an archive.
    pub fn new(target: W) -> Self {
        Self {
            target,
            written: 0,
            inode: 0,
        }
    }

    /// Return the size of the archive so far, in bytes.
    pub fn size(&self) -> u64 {
        self.written
    }

    /// Add a folder. Its parents must have been added before.
    ///
    /// # Errors
    ///
    /// Errors of the target.
    pub fn folder(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, 0o040_000 | permissions, 0)
    }

    /// Add a symbolic link.
    ///
    /// # Errors
    ///
    /// Errors of the target.
    pub fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        self.entry(path, 0o120_777, to.len() as u64)?;
        self.data(to.as_bytes())?;
        self.pad(4)
    }

    /// Add a file with `size` bytes of `content`.
    ///
    /// # Errors
    ///
    /// Errors of `content` and of the target; a content that is shorter than `size`; a size of 4 GiB or more.
    pub fn file(
        &mut self,
        path: &str,
        permissions: u32,
        size: u64,
        content: impl Read,
    ) -> io::Result<()> {
        self.entry(path, 0o100_000 | permissions, size)?;
        let copied = io::copy(&mut content.take(size), &mut self.target)?;
        self.written += copied;
        if copied != size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{path} has {copied} bytes and not {size}"),
            ));
        }
        self.pad(4)
    }

    /// Add a file with this content.
    ///
    /// # Errors
    ///
    /// Errors of the target.
    pub fn bytes(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.file(path, permissions, content.len() as u64, content)
    }

    /// End the archive and return the target. Zeros are added until the size is `rest` modulo `block`; both are
    /// multiples of 4.
    ///
    /// # Errors
    ///
    /// Errors of the target.
    pub fn finish(mut self, block: u64, rest: u64) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, 0)?;
        let missing = (rest + block - self.written % block) % block;
        io::copy(&mut io::repeat(0).take(missing), &mut self.target)?;
        self.target.flush()?;
        Ok(self.target)
    }

    fn entry(&mut self, path: &str, mode: u32, size: u64) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(size).map_err(|_| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("{path} is too large for an initramfs"),
            )
        })?;
        self.inode += 1;
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            // CAST: no path has 4 GiB.
            path.len() as u32 + 1,
            0,
        ];
        let mut header = b"070701".to_vec();
        for field in fields {
            header.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        header.extend_from_slice(path.as_bytes());
        header.push(0);
        self.data(&header)?;
        self.pad(4)
    }

    fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.target.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, block: u64) -> io::Result<()> {
        let missing = (block - self.written % block) % block;
        for _ in 0..missing {
            self.data(&[0])?;
        }
        Ok(())
    }
}

/// Unpack the archive in `bytes` to `root`. As in the kernel, existing files and links are replaced, and existing
/// folders stay.
///
/// # Errors
///
/// Errors of the file system, and an archive that is cut off or of another format.
pub fn unpack(bytes: &[u8], root: &Path) -> io::Result<()> {
    const HEADER: usize = 110;
    let invalid = |text: &str| {
        let text = format!("the archive cannot be unpacked: {text}");
        io::Error::new(io::ErrorKind::InvalidData, text)
    };
    let part = |start: usize, size: usize| {
        bytes
            .get(start..start + size)
            .ok_or_else(|| invalid("it is cut off"))
    };
    let mut at = 0;
    loop {
        let header = part(at, HEADER)?;
        if !header.starts_with(b"070701") {
            return Err(invalid("it is of another format"));
        }
        let field = |number: usize| {
            std::str::from_utf8(&header[6 + 8 * number..14 + 8 * number])
                .ok()
                .and_then(|text| u32::from_str_radix(text, 16).ok())
                .ok_or_else(|| invalid("a number is garbled"))
        };
        let (mode, size, name) = (field(1)?, field(6)? as usize, field(11)? as usize);
        let name_at = at + HEADER;
        let content_at = (name_at + name).next_multiple_of(4);
        at = (content_at + size).next_multiple_of(4);
        let name = part(name_at, name)?;
        let content = part(content_at, size)?;
        let name = name
            .strip_suffix(b"\0")
            .ok_or_else(|| invalid("a name has no end"))?;
        if name == b"TRAILER!!!" {
            return Ok(());
        }
        let path = root.join(OsStr::from_bytes(name));
        match mode & 0o170_000 {
            0o040_000 => match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777))?,
            },
            0o120_000 => {
                let _ = fs::remove_file(&path);
                symlink(OsStr::from_bytes(content), &path)?;
            }
            0o100_000 => {
                let _ = fs::remove_file(&path);
                fs::write(&path, content)?;
                fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777))?;
            }
            _ => return Err(invalid("it has a file of another type")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Archive<Vec<u8>> {
        let mut archive = Archive::new(Vec::new());
        archive.folder("/bin", 0o755).unwrap();
        archive.bytes("/bin/true", 0o755, b"#!/bin/sh\n").unwrap();
        archive.link("/bin/yes", "true").unwrap();
        archive
    }

    #[test]
    fn the_archive_follows_the_format() {
        let bytes = sample().finish(4, 0).unwrap();
        let file = b"070701\
            00000002000081ed000000000000000000000001000000000000000a\
            000000000000000000000000000000000000000900000000bin/true";
        // GNU cpio writes the numbers above for the same file, except for inode and date.
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(text.contains(&*String::from_utf8_lossy(file)), "{text:?}");
        assert!(bytes.starts_with(b"070701"));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn the_size_is_padded_as_requested() {
        assert_eq!(sample().finish(4096, 512).unwrap().len() % 4096, 512);
        assert_eq!(sample().finish(4096, 0).unwrap().len() % 4096, 0);
    }

    #[test]
    fn a_packed_archive_can_be_unpacked() {
        let root = tempfile::tempdir().unwrap();
        let bytes = sample().finish(4096, 0).unwrap();
        // Twice, since existing files must not get in the way.
        for _ in 0..2 {
            unpack(&bytes, root.path()).unwrap();
            let read = |name| fs::read(root.path().join(name)).unwrap();
            assert_eq!(read("bin/true"), b"#!/bin/sh\n");
            assert_eq!(read("bin/yes"), b"#!/bin/sh\n");
            let mode = fs::metadata(root.path().join("bin/true"))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o7777, 0o755);
        }
        for length in [0, 50, 110, 200, 300] {
            assert!(
                unpack(&bytes[..length], root.path()).is_err(),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn a_content_that_is_too_short_is_refused() {
        let mut archive = Archive::new(Vec::new());
        assert!(archive.file("x", 0o644, 5, &b"four"[..]).is_err());
    }
}
