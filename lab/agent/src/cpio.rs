// SPDX-License-Identifier: GPL-2.0

//! Archives for the kernel's initramfs, in the format "newc".
//!
//! All entries belong to root and have no date, so that the same content gives the same bytes.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{symlink, PermissionsExt as _},
    path::Path,
};

use cpio::newc::{self, Builder, Reader};

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
/// Bits of a mode that hold the type of the file.
const TYPE: u32 = 0o170_000;

/// Writer of an archive.
#[derive(Debug)]
pub struct Archive<W> {
    target: Counted<W>,
    inode: u32,
}

/// Target that counts the bytes written to it.
#[derive(Debug)]
struct Counted<W> {
    target: W,
    written: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.target.write(bytes)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.target.flush()
    }
}

impl<W: Write> Archive<W> {
    /// Start an archive.
    pub fn new(target: W) -> Self {
        let target = Counted { target, written: 0 };
        Self { target, inode: 0 }
    }

    /// Add a folder. Its parents must have been added before.
    ///
    /// # Errors
    ///
    /// Errors of the target.
    pub fn folder(&mut self, path: &str, permissions: u32) -> io::Result<()> {
        self.entry(path, FOLDER | permissions, 0, io::empty())
    }

    /// Add a symbolic link.
    ///
    /// # Errors
    ///
    /// Errors of the target.
    pub fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        self.entry(path, LINK | 0o777, to.len() as u64, to.as_bytes())
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
        self.entry(path, FILE | permissions, size, content)
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
        newc::trailer(&mut self.target)?;
        let missing = (rest + block - self.target.written % block) % block;
        io::copy(&mut io::repeat(0).take(missing), &mut self.target)?;
        self.target.flush()?;
        Ok(self.target.target)
    }

    fn entry(&mut self, path: &str, mode: u32, size: u64, content: impl Read) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let header_size = u32::try_from(size).map_err(|_| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("{path} is too large for an initramfs"),
            )
        })?;
        self.inode += 1;
        let mut entry = Builder::new(path)
            .ino(self.inode)
            .mode(mode)
            .write(&mut self.target, header_size);
        let copied = io::copy(&mut content.take(size), &mut entry)?;
        if copied != size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{path} has {copied} bytes and not {size}"),
            ));
        }
        entry.finish()?;
        Ok(())
    }
}

/// Unpack the archive in `bytes` to `root`. As in the kernel, existing files and links are replaced, and existing
/// folders stay.
///
/// # Errors
///
/// Errors of the file system, and an archive that is cut off or of another format.
pub fn unpack(mut bytes: &[u8], root: &Path) -> io::Result<()> {
    let invalid = |text: &str| {
        let text = format!("the archive cannot be unpacked: {text}");
        io::Error::new(io::ErrorKind::InvalidData, text)
    };
    loop {
        let mut entry = Reader::new(bytes).map_err(|error| invalid(&error.to_string()))?;
        if entry.entry().is_trailer() {
            return Ok(());
        }
        let path = root.join(entry.entry().name());
        let (mode, size) = (entry.entry().mode(), u64::from(entry.entry().file_size()));
        let permissions = Permissions::from_mode(mode & 0o7777);
        let is_complete = match mode & TYPE {
            FOLDER => match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => fs::set_permissions(&path, permissions).map(|()| true)?,
            },
            LINK => {
                let mut to = String::new();
                entry.read_to_string(&mut to)?;
                let _ = fs::remove_file(&path);
                symlink(&to, &path)?;
                to.len() as u64 == size
            }
            FILE => {
                let _ = fs::remove_file(&path);
                let copied = io::copy(&mut entry, &mut File::create(&path)?)?;
                fs::set_permissions(&path, permissions)?;
                copied == size
            }
            _ => return Err(invalid("it has a file of another type")),
        };
        if !is_complete {
            return Err(invalid("it is cut off"));
        }
        bytes = entry
            .finish()
            .map_err(|error| invalid(&error.to_string()))?;
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
