// SPDX-License-Identifier: GPL-2.0

//! Compiles the BPF programs in the Debian root.

use std::path::Path;

use anyhow::{ensure, Context as _, Result};
use lab::setup::{self, in_root, Setup};

const PROGRAMS: [&str; 3] = ["count", "latency", "code"];

/// Compile every program into `folder`.
pub fn compile(prepared: &Setup, folder: &Path) -> Result<()> {
    for name in PROGRAMS {
        let status = in_root(&prepared.root)
            .bind(setup::repository().join("tests/bench/bpf"), "/bpf")
            .bind(folder, "/out")
            .command("clang-19")
            .args(["-target", "bpf", "-O2", "-g", "-Wall", "-Werror"])
            // clang takes asm/ headers from the folder of its target, and there is none for BPF.
            .arg("-I/usr/include/x86_64-linux-gnu")
            .arg("-c")
            .arg(format!("/bpf/{name}.bpf.c"))
            .args(["-o", &format!("/out/{name}.bpf.o")])
            .status()
            .context("cannot run clang in the root")?;
        ensure!(status.success(), "{name}.bpf.c does not compile");
    }
    Ok(())
}
