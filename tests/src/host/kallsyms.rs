// SPDX-License-Identifier: GPL-2.0

//! The kernel's code symbols, as /proc/kallsyms lists them.

use std::fs;

use anyhow::{ensure, Context as _, Result};

/// A code symbol.
pub struct Symbol {
    /// Address of its first byte.
    pub address: u64,
    /// Name of the function.
    pub name: String,
    /// Name of the module; empty for the kernel's image.
    pub module: String,
}

/// Return all code symbols of the kernel and its modules.
pub fn symbols() -> Result<Vec<Symbol>> {
    let text = fs::read_to_string("/proc/kallsyms").context("/proc/kallsyms")?;
    let of_line = |line: &str| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        words.next().filter(|kind| matches!(*kind, "t" | "T"))?;
        let name = words.next()?.to_owned();
        let module = words.next().unwrap_or("").trim_matches(['[', ']']);
        Some(Symbol {
            address,
            name,
            module: module.to_owned(),
        })
    };
    let symbols: Vec<_> = text.lines().filter_map(of_line).collect();
    ensure!(
        symbols.iter().any(|symbol| symbol.address != 0),
        "/proc/kallsyms hides the addresses"
    );
    Ok(symbols)
}
