// SPDX-License-Identifier: GPL-2.0

//! Minimal ELF reading: a section of a module's file, by its name.

use std::ops::Range;

/// Return the bytes of a section of a 64-bit little-endian ELF file, or `None` if there is none or
/// the file is damaged.
pub fn section<'a>(file: &'a [u8], name: &str) -> Option<&'a [u8]> {
    file.starts_with(b"\x7fELF\x02\x01").then_some(())?;
    // Structures: Elf64_Ehdr and Elf64_Shdr of elf(5).
    let table = number(file, 0x28, 8)?;
    let (size, count, names) = (
        number(file, 0x3a, 2)?,
        number(file, 0x3c, 2)?,
        number(file, 0x3e, 2)?,
    );
    let header = |index: usize| file.get(table.checked_add(index.checked_mul(size)?)?..);
    let body = |header: &[u8]| -> Option<Range<usize>> {
        let start = number(header, 0x18, 8)?;
        Some(start..start.checked_add(number(header, 0x20, 8)?)?)
    };
    let names = file.get(body(header(names)?)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let its = names.get(number(header, 0, 4)?..)?;
        let its = its.split(|byte| *byte == 0).next()?;
        (its == name.as_bytes()).then(|| file.get(body(header)?))?
    })
}

/// Return the little-endian number of `size` bytes at offset `at`.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    let number = bytes
        .iter()
        .rev()
        .fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    usize::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Create a file with two sections: the names, and one called `.note`.
    fn file() -> Vec<u8> {
        let mut file = vec![0; 0x40];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[0x28] = 0x40;
        file[0x3a] = 64;
        file[0x3c] = 2;
        for (name, at, len) in [(0, 0xc0, 7), (1, 0xc7, 3)] {
            let mut header = vec![0; 64];
            header[0] = name;
            header[0x18] = at;
            header[0x20] = len;
            file.extend(header);
        }
        file.extend(b"\0.note\0abc");
        file
    }

    #[test]
    fn section_is_found_by_name() {
        let file = file();
        assert_eq!(section(&file, ".note"), Some(&b"abc"[..]));
        assert_eq!(section(&file, ".not"), None);
    }

    #[test]
    fn damaged_file_does_not_panic() {
        let whole = file();
        for len in 0..whole.len() {
            let _ = section(&whole[..len], ".note");
        }
        for at in 0..whole.len() {
            let mut file = whole.clone();
            file[at] = 0xff;
            let _ = section(&file, ".note");
        }
    }
}
