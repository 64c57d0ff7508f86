// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail by order, on a kernel that can have them fail (CONFIG_FAILSLAB,
//! CONFIG_FAIL_PAGE_ALLOC; the kernel's fault-injection.rst).

use std::{fs, io, path::Path};

use anyhow::{ensure, Context as _, Result};

/// The allocators that can fail: of objects, and of pages.
const ALLOCATORS: [&str; 2] = [
    "/sys/kernel/debug/failslab",
    "/sys/kernel/debug/fail_page_alloc",
];

/// Which allocation of this thread from now on fails; 0 after it has.
const NTH: &str = "/proc/thread-self/fail-nth";

/// Whether this kernel can.
pub fn are_possible() -> bool {
    Path::new(NTH).exists() && ALLOCATORS.iter().all(|path| Path::new(path).exists())
}

/// A part of the kernel's code.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    first: u64,
    end: u64,
}

impl Code {
    /// A function of the kernel's image.
    pub fn of_function(name: &str) -> Result<Self> {
        let symbols = symbols()?;
        let own = symbols.iter().find(|symbol| symbol.name == name);
        let first = own.with_context(|| format!("no function {name}"))?.address;
        let others = symbols.iter().map(|symbol| symbol.address);
        let end = others.filter(|address| *address > first).min();
        Ok(Self {
            first,
            end: end.context("the kernel has no end")?,
        })
    }

    /// The code of a module.
    pub fn of_module(name: &str) -> Result<Self> {
        const PAGE: u64 = 4096;
        let symbols = symbols()?;
        let own = symbols.iter().filter(|symbol| symbol.module == name);
        let addresses = own.map(|symbol| symbol.address);
        let first = addresses.clone().min().context("no such module")?;
        let last = addresses.max().context("no such module")?;
        Ok(Self {
            first,
            // Code has pages of its own.
            end: (last / PAGE + 1) * PAGE,
        })
    }
}

/// A symbol of code.
struct Symbol {
    address: u64,
    name: String,
    /// Without a module, that of the kernel's image.
    module: String,
}

fn symbols() -> Result<Vec<Symbol>> {
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

/// The allocations under some code can fail, until this is dropped.
#[derive(Debug)]
pub struct Faults(());

impl Faults {
    /// Has those alone fail that have this code on their stack, and as yet none.
    pub fn under(code: Code) -> Result<Self> {
        let faults = Self(());
        faults.only_under(code)?;
        set("stacktrace-depth", "32")?;
        set("times", "-1")?;
        set("verbose", "0")?;
        // Also those that may wait, for pages of any kind and number.
        set("ignore-gfp-wait", "N")?;
        fs::write(format!("{}/ignore-gfp-highmem", ALLOCATORS[1]), "N")?;
        fs::write(format!("{}/min-order", ALLOCATORS[1]), "0")?;
        Ok(faults)
    }

    /// Other code from now on.
    pub fn only_under(&self, code: Code) -> Result<()> {
        set("require-start", &format!("{:#x}", code.first))?;
        set("require-end", &format!("{:#x}", code.end))
    }

    /// Has so many of a hundred fail, of any thread.
    pub fn percent(&self, percent: u32) -> Result<()> {
        set("probability", &percent.to_string())
    }

    /// Does the same again and again, each time with the next allocation failing, until it meets
    /// none that does. `refused` judges what came of a failing one; how many there were, and the
    /// last result, which no failure touched.
    pub fn one_after_the_other<T>(
        &self,
        mut what: impl FnMut() -> T,
        mut judge: impl FnMut(u32, T) -> Result<()>,
    ) -> Result<(u32, T)> {
        for nth in 1..10_000_u32 {
            fs::write(NTH, nth.to_string()).context(NTH)?;
            let result = what();
            let left = fs::read_to_string(NTH)?;
            fs::write(NTH, "0")?;
            if left.trim() != "0" {
                return Ok((nth - 1, result));
            }
            judge(nth, result).with_context(|| format!("allocation {nth} failed"))?;
        }
        anyhow::bail!("it allocates without end")
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        let reset = || -> io::Result<()> {
            for path in ALLOCATORS {
                fs::write(format!("{path}/probability"), "0")?;
                fs::write(format!("{path}/require-start"), "0")?;
                fs::write(format!("{path}/require-end"), u64::MAX.to_string())?;
            }
            Ok(())
        };
        if let Err(error) = reset() {
            eprintln!("allocations go on failing: {error}");
        }
    }
}

/// Sets an attribute of both allocators.
fn set(name: &str, value: &str) -> Result<()> {
    for path in ALLOCATORS {
        let path = format!("{path}/{name}");
        fs::write(&path, value).with_context(|| format!("{path} does not take {value}"))?;
    }
    Ok(())
}
