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

/// A kernel as it lies in memory.
#[derive(Debug)]
pub struct Kernel {
    /// Where `content` begins, in bytes from the start of memory.
    pub address: u64,
    /// Where the entry for PVH is.
    pub entry: u32,
    /// All segments, with zeros between them.
    pub content: Vec<u8>,
}

/// Lays out the kernel in `bytes`.
pub fn kernel(path: &Path, bytes: &[u8]) -> Result<Kernel, ImageError> {
    let wrong = |reason: &str| ImageError::content(path, reason);
    let elf = Elf::parse(bytes).map_err(|error| ImageError::content(path, error))?;
    let segments = || {
        elf.program_headers
            .iter()
            .filter(|header| header.p_type == PT_LOAD)
    };
    let address = segments()
        .map(|segment| segment.p_paddr)
        .min()
        .ok_or_else(|| wrong("no kernel: it has no segments"))?;
    let mut content = Vec::new();
    for segment in segments() {
        let data = bytes
            .get(segment.file_range())
            .ok_or_else(|| wrong("the file is cut off"))?;
        let start = usize::try_from(segment.p_paddr - address)
            .map_err(|_| wrong("no kernel: too large"))?;
        if content.len() < start + data.len() {
            content.resize(start + data.len(), 0);
        }
        content[start..start + data.len()].copy_from_slice(data);
    }
    let entry = elf
        .iter_note_headers(bytes)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .find(|note| note.n_type == PVH_ENTRY && note.name == "Xen")
        .and_then(|note| Some(u32::from_le_bytes(*note.desc.first_chunk()?)))
        .ok_or_else(|| wrong("the kernel has no entry for PVH; it needs CONFIG_PVH"))?;
    Ok(Kernel {
        address,
        entry,
        content,
    })
}
