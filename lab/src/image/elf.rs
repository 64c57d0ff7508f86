// SPDX-License-Identifier: GPL-2.0

//! What the images want to know of ELF files.

use std::path::Path;

use goblin::elf::program_header::{PT_INTERP, PT_LOAD};
use goblin::elf::Elf;

use super::ImageError;

/// Type of the note with the physical address of the entry for PVH (XEN_ELFNOTE_PHYS32_ENTRY).
const PVH_ENTRY: u32 = 18;

/// What a program needs to run.
#[derive(Debug, Default)]
pub struct Needs {
    /// The path of its loader; none when it is static.
    pub loader: Option<String>,
    /// The names of its libraries.
    pub libraries: Vec<String>,
}

/// Reads what the program or library in `bytes` needs.
pub fn needs(path: &Path, bytes: &[u8]) -> Result<Needs, ImageError> {
    let elf = Elf::parse(bytes).map_err(|error| ImageError::content(path, error))?;
    Ok(Needs {
        loader: elf
            .program_headers
            .iter()
            .any(|header| header.p_type == PT_INTERP)
            .then(|| elf.interpreter.map(str::to_owned))
            .flatten(),
        libraries: elf.libraries.iter().map(|&name| name.to_owned()).collect(),
    })
}

/// A kernel's segments, where they belong in memory.
#[derive(Debug)]
pub struct Kernel<'a> {
    /// Where the first begins, in bytes from the start of memory.
    pub address: u64,
    /// Where the entry for PVH is.
    pub entry: u32,
    /// Each segment's place behind `address`, and its content.
    segments: Vec<(usize, &'a [u8])>,
}

impl<'a> Kernel<'a> {
    /// Reads the kernel in `bytes`.
    pub fn parse(path: &Path, bytes: &'a [u8]) -> Result<Self, ImageError> {
        let wrong = |reason: &str| ImageError::content(path, reason);
        let elf = Elf::parse(bytes).map_err(|error| ImageError::content(path, error))?;
        let headers = || {
            elf.program_headers
                .iter()
                .filter(|header| header.p_type == PT_LOAD)
        };
        let address = headers()
            .map(|header| header.p_paddr)
            .min()
            .ok_or_else(|| wrong("it is no kernel: it has no segments"))?;
        let mut segments = Vec::new();
        for header in headers() {
            let content = bytes
                .get(header.file_range())
                .ok_or_else(|| wrong("it is cut off"))?;
            let place = usize::try_from(header.p_paddr - address)
                .map_err(|_| wrong("it is no kernel: it is too large"))?;
            segments.push((place, content));
        }
        let entry = elf
            .iter_note_headers(bytes)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .find(|note| note.n_type == PVH_ENTRY && note.name == "Xen")
            .and_then(|note| Some(u32::from_le_bytes(*note.desc.first_chunk()?)))
            .ok_or_else(|| wrong("the kernel has no entry for PVH; it needs CONFIG_PVH"))?;
        Ok(Self {
            address,
            entry,
            segments,
        })
    }

    /// All of it, with zeros between the segments.
    pub fn layout(&self) -> Vec<u8> {
        let end = |&(place, content): &(usize, &[u8])| place + content.len();
        let mut memory = vec![0; self.segments.iter().map(end).max().unwrap_or(0)];
        for &(place, content) in &self.segments {
            memory[place..place + content.len()].copy_from_slice(content);
        }
        memory
    }
}
