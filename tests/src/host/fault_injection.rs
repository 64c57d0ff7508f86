// SPDX-License-Identifier: GPL-2.0

//! Fault injection into the kernel's allocators, on kernels built with CONFIG_FAILSLAB and
//! CONFIG_FAIL_PAGE_ALLOC (the kernel's fault-injection.rst).

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result};

use super::kallsyms::symbols;

/// Attributes of the allocators that can fail: of objects, and of pages.
const ALLOCATORS: [&str; 2] = [
    "/sys/kernel/debug/failslab",
    "/sys/kernel/debug/fail_page_alloc",
];

/// Number of this thread's next allocation that fails, counted from 1; 0 once it has failed.
const NTH: &str = "/proc/thread-self/fail-nth";

/// Return true if this kernel supports fault injection.
pub fn is_supported() -> bool {
    Path::new(NTH).exists() && ALLOCATORS.iter().all(|path| Path::new(path).exists())
}

/// A range of the kernel's code, as addresses.
#[derive(Clone, Copy, Debug)]
pub struct CodeRange {
    first: u64,
    end: u64,
}

impl CodeRange {
    /// Return the code of a function of the kernel's image.
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

    /// Return the code of a module.
    pub fn of_module(name: &str) -> Result<Self> {
        const PAGE: u64 = 4096;
        let symbols = symbols()?;
        let own = symbols.iter().filter(|symbol| symbol.module == name);
        let addresses = own.map(|symbol| symbol.address);
        let first = addresses.clone().min().context("no such module")?;
        let last = addresses.max().context("no such module")?;
        Ok(Self {
            first,
            // A module's code does not share its pages.
            end: (last / PAGE + 1) * PAGE,
        })
    }
}

/// Fault injection into allocations made by some code, until this is dropped.
#[derive(Debug)]
pub struct FaultInjection(());

impl FaultInjection {
    /// Restrict failures to allocations with `code` on their stack. None fails yet.
    pub fn under(code: CodeRange) -> Result<Self> {
        let faults = Self(());
        faults.restrict_to(code)?;
        set("stacktrace-depth", "32")?;
        set("times", "-1")?;
        set("verbose", "0")?;
        // Allocations that may sleep, and those of pages of any kind and order, can fail as well.
        set("ignore-gfp-wait", "N")?;
        fs::write(format!("{}/ignore-gfp-highmem", ALLOCATORS[1]), "N")?;
        fs::write(format!("{}/min-order", ALLOCATORS[1]), "0")?;
        Ok(faults)
    }

    /// Restrict failures to allocations with `code` on their stack from now on.
    pub fn restrict_to(&self, code: CodeRange) -> Result<()> {
        set("require-start", &format!("{:#x}", code.first))?;
        set("require-end", &format!("{:#x}", code.end))
    }

    /// Let this percentage of allocations fail, in any thread.
    pub fn set_percent(&self, percent: u32) -> Result<()> {
        set("probability", &percent.to_string())
    }

    /// Repeat `action` with its first allocation failing, then its second, and so on, until it makes no
    /// more. `check` judges each result with a failure. Return the number of failures, and the last
    /// result, which saw none.
    pub fn fail_each_allocation<T>(
        &self,
        mut action: impl FnMut() -> T,
        mut check: impl FnMut(u32, T) -> Result<()>,
    ) -> Result<(u32, T)> {
        for nth in 1..10_000_u32 {
            fs::write(NTH, nth.to_string()).context(NTH)?;
            let result = action();
            let left = fs::read_to_string(NTH)?;
            fs::write(NTH, "0")?;
            if left.trim() != "0" {
                return Ok((nth - 1, result));
            }
            check(nth, result).with_context(|| format!("allocation {nth} failed"))?;
        }
        anyhow::bail!("it allocates without end")
    }
}

impl Drop for FaultInjection {
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

/// Set an attribute of both allocators.
fn set(name: &str, value: &str) -> Result<()> {
    for path in ALLOCATORS {
        let path = format!("{path}/{name}");
        fs::write(&path, value).with_context(|| format!("{path} does not take {value}"))?;
    }
    Ok(())
}
