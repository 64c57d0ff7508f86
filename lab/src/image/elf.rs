// SPDX-License-Identifier: GPL-2.0

//! Minimal ELF reading for the images.

use std::path::Path;

use goblin::elf::{
    program_header::{PT_INTERP, PT_LOAD},
    Elf,
};

use super::ImageError;

/// Type of the note with the physical address of the PVH entry (XEN_ELFNOTE_PHYS32_ENTRY).
const PVH_ENTRY: u32 = 18;

/// Dependencies of a program.
#[derive(Debug, Default)]
pub struct Needs {
    /// Path of its loader; `None` if it is static.
    pub loader: Option<String>,
    /// Names of its libraries.
    pub libraries: Vec<String>,
}

/// Read the dependencies of the program or library in `bytes`.
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

/// Segments of a kernel and their places in memory.
#[derive(Debug)]
pub struct Kernel<'a> {
    /// Physical address of the first segment.
    pub address: u64,
    /// Physical address of the PVH entry.
    pub entry: u32,
    /// Offset from `address` and content of each segment.
    segments: Vec<(usize, &'a [u8])>,
}

impl<'a> Kernel<'a> {
    /// Parse the kernel in `bytes`.
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

    /// Return the whole kernel, with zeros between the segments.
    pub fn layout(&self) -> Vec<u8> {
        let end = |&(place, content): &(usize, &[u8])| place + content.len();
        let mut memory = vec![0; self.segments.iter().map(end).max().unwrap_or(0)];
        for &(place, content) in &self.segments {
            memory[place..place + content.len()].copy_from_slice(content);
        }
        memory
    }
}
