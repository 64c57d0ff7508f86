// SPDX-License-Identifier: GPL-2.0

//! Loads a kernel for its PVH entry (Xen's "x86/HVM direct boot ABI").

use std::{fs, path::Path};

use anyhow::{bail, Context as _, Result};

use super::memory::Memory;

/// Guest address of the start info, `struct hvm_start_info`.
pub const START_INFO: u64 = 0x6000;

const MODULE_LIST: u64 = START_INFO + 0x100;
const MEMORY_MAP: u64 = START_INFO + 0x200;
const COMMAND_LINE: u64 = START_INFO + 0x400;
const MAGIC: u32 = 0x336e_c578;

/// End of the usable memory below 1 MiB.
const LOW_END: u64 = 0x9_fc00;
/// Start of the usable memory above 1 MiB.
const HIGH_START: u64 = 0x10_0000;

/// Type of the ELF note with the PVH entry: XEN_ELFNOTE_PHYS32_ENTRY.
const ENTRY_NOTE: u32 = 18;

/// Load kernel and initramfs, and return the kernel's PVH entry.
pub fn load(memory: &Memory, kernel: &Path, initramfs: &Path, command_line: &str) -> Result<u64> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let elf = read(kernel)?;
    let entry = load_segments(&elf, memory)
        .with_context(|| format!("{} is no kernel with an entry for PVH", kernel.display()))?;
    let initramfs = read(initramfs)?;
    // The initramfs is at the top of the memory, aligned to a page.
    let at = (super::MEMORY as u64 - initramfs.len() as u64) & !0xfff;
    memory.write(at, &initramfs)?;

    let words =
        |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let mut info = words(&[
        u64::from(MAGIC) | 1 << 32,
        1 << 32,
        MODULE_LIST,
        COMMAND_LINE,
        0,
        MEMORY_MAP,
        2,
    ]);
    info.resize(64, 0);
    memory.write(START_INFO, &info)?;
    memory.write(MODULE_LIST, &words(&[at, initramfs.len() as u64, 0, 0]))?;
    let (size, usable) = (super::MEMORY as u64, 1);
    memory.write(
        MEMORY_MAP,
        &words(&[0, LOW_END, usable, HIGH_START, size - HIGH_START, usable]),
    )?;
    memory.write(COMMAND_LINE, command_line.as_bytes())?;
    Ok(entry)
}

/// Load the segments of a 64-bit ELF file, and return the entry from its note.
fn load_segments(elf: &[u8], memory: &Memory) -> Result<u64> {
    let u16_at = |at: usize| {
        elf.get(at..)?
            .first_chunk()
            .map(|bytes| u16::from_le_bytes(*bytes))
    };
    let u32_at = |at: usize| {
        elf.get(at..)?
            .first_chunk()
            .map(|bytes| u32::from_le_bytes(*bytes))
    };
    let u64_at = |at: usize| {
        let bytes = elf.get(at..)?.first_chunk()?;
        usize::try_from(u64::from_le_bytes(*bytes)).ok()
    };
    let head = || Some((u64_at(0x20)?, usize::from(u16_at(0x36)?), u16_at(0x38)?));
    let (first, size, count) = head()
        .filter(|_| elf.starts_with(b"\x7fELF\x02"))
        .context("no ELF file")?;
    let mut entry = None;
    for segment in 0..usize::from(count) {
        let at = first + segment * size;
        let fields = || {
            Some((
                u32_at(at)?,
                u64_at(at + 8)?,
                u64_at(at + 0x18)?,
                u64_at(at + 0x20)?,
            ))
        };
        let (kind, offset, address, length) = fields().context("a segment is cut off")?;
        let bytes = offset
            .checked_add(length)
            .and_then(|end| elf.get(offset..end));
        let bytes = bytes.context("a segment is cut off")?;
        match kind {
            1 => memory.write(address as u64, bytes)?,
            4 => entry = entry.or(find_entry(bytes)),
            _ => {}
        }
    }
    match entry {
        Some(entry) => Ok(entry),
        None => bail!("no note with a PVH entry"),
    }
}

/// Find the PVH entry in ELF notes.
fn find_entry(mut notes: &[u8]) -> Option<u64> {
    loop {
        let word = |at: usize| {
            let bytes = notes.get(at..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let name = usize::try_from(word(0)?).ok()?;
        let length = usize::try_from(word(4)?).ok()?;
        let content = 12 + name.next_multiple_of(4);
        if word(8)? == ENTRY_NOTE && notes.get(12..)?.starts_with(b"Xen\0") {
            return word(content).map(u64::from);
        }
        notes = notes.get(content + length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::find_entry;

    #[test]
    fn the_entry_is_found_among_other_notes() {
        let note_of = |name: &[u8], kind: u32, content: &[u8]| {
            let mut bytes = Vec::new();
            for word in [name.len() as u32, content.len() as u32, kind] {
                bytes.extend(word.to_le_bytes());
            }
            for part in [name, content] {
                bytes.extend(part);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            bytes
        };
        let others = [note_of(b"GNU\0", 18, b"12345"), note_of(b"Xen\0", 3, b"")].concat();
        assert_eq!(find_entry(&others), None);
        let entry = note_of(b"Xen\0", 18, &0x0100_0230_u64.to_le_bytes());
        assert_eq!(find_entry(&[others, entry].concat()), Some(0x0100_0230));
        assert_eq!(find_entry(&[1, 0]), None);
    }
}
