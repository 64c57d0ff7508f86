// SPDX-License-Identifier: GPL-2.0

//! The module's machine code in the kernel's memory. It shows whether static branches are on or off.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use anyhow::{Context as _, Result};

use super::kallsyms::symbols;

/// The kernel's memory as an ELF file (proc_kcore(5)).
const KCORE: &str = "/proc/kcore";

/// Sizes of the 64-bit ELF header and program header, in bytes, and the type of a loaded segment
/// (elf(5)).
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u64 = 1;

/// A copy of the module's code; `None` on a kernel without /proc/kcore, such as the lab's debug kernels.
#[derive(Debug)]
pub struct ModuleCode(Option<Vec<u8>>);

impl ModuleCode {
    /// Copy the current code. Print a remark on a kernel without /proc/kcore.
    pub fn read() -> Result<Self> {
        if !Path::new(KCORE).exists() {
            println!("this kernel has no {KCORE}, so code is not compared");
            return Ok(Self(None));
        }
        read_code().map(Some).map(Self)
    }

    /// Return false if the code is known to have changed.
    pub fn is_unchanged(&self) -> Result<bool> {
        self.compare(|before, now| before == now)
    }

    /// Return false if the code is known to be unchanged.
    pub fn has_changed(&self) -> Result<bool> {
        self.compare(|before, now| before != now)
    }

    fn compare(&self, holds: impl Fn(&[u8], &[u8]) -> bool) -> Result<bool> {
        Ok(match &self.0 {
            Some(before) => holds(before, &read_code()?),
            None => true,
        })
    }
}

/// Read the module's code from its first function to its last.
fn read_code() -> Result<Vec<u8>> {
    let symbols = symbols()?;
    let own = symbols.iter().filter(|symbol| symbol.module == "exitmeter");
    let addresses = own.map(|symbol| symbol.address);
    let (first, last) = addresses.fold((u64::MAX, 0), |(first, last), address| {
        (first.min(address), last.max(address))
    });
    let length = last.checked_sub(first).context("the module has no code")?;

    let file = File::open(KCORE).with_context(|| format!("{KCORE} cannot be read"))?;
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    let table = number(&header, 32, 8).context("a header")?;
    let count = number(&header, 56, 2).context("a header")?;
    for place in 0..count {
        let mut header = [0; PROGRAM_HEADER];
        file.read_exact_at(&mut header, table + place * PROGRAM_HEADER as u64)?;
        let field = |at| number(&header, at, 8).unwrap_or(0);
        let (offset, address, size) = (field(8), field(16), field(32));
        let start = first.checked_sub(address).filter(|start| *start < size);
        let kind = number(&header, 0, 4);
        if let (Some(PT_LOAD), Some(start)) = (kind, start) {
            let mut code = vec![0; usize::try_from(length)?];
            file.read_exact_at(&mut code, offset + start)?;
            return Ok(code);
        }
    }
    anyhow::bail!("{KCORE} does not have the module")
}

/// Return the little-endian number of `size` bytes at offset `at`.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + size)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)),
    )
}
