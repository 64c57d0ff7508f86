// SPDX-License-Identifier: GPL-2.0

//! The BPF programs, compiled in the Debian root.

use std::path::Path;

use anyhow::{ensure, Context as _, Result};
use lab::setup::{self, in_root, Prepared};

const PROGRAMS: [&str; 3] = ["count", "latency", "code"];

/// Compiles every program into `folder`.
pub fn compile(prepared: &Prepared, folder: &Path) -> Result<()> {
    for name in PROGRAMS {
        let status = in_root(&prepared.root)
            .bind(setup::repository().join("tests/bench/bpf"), "/bpf")
            .bind(folder, "/out")
            .command("clang-19")
            .args(["-target", "bpf", "-O2", "-g", "-Wall", "-Werror"])
            // clang looks there for the machine it compiles for, and BPF has no headers.
            .arg("-I/usr/include/x86_64-linux-gnu")
            .arg("-c")
            .arg(format!("/bpf/{name}.bpf.c"))
            .args(["-o", &format!("/out/{name}.bpf.o")])
            .status()
            .context("clang cannot be run in the root")?;
        ensure!(status.success(), "{name}.bpf.c does not compile");
    }
    Ok(())
}
