// SPDX-License-Identifier: GPL-2.0

//! Compiles the BPF programs, for the feature `bpf`.

use std::{env, ffi::OsString, path::PathBuf, process::Command};

use exitmeter_meter::ledger::C_LAYOUT;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    if env::var_os("CARGO_FEATURE_BPF").is_none() {
        return;
    }
    let clang = env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    let folder = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .unwrap_or_default();
    // The layout of the module's ledger, for ledger.h to check.
    let layout = C_LAYOUT.map(|(name, value)| format!("-D{name}={value}"));
    // Headers of user space are under the name of the machine that clang compiles on, and BPF is none.
    let status = Command::new(&clang)
        .args([
            "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror",
        ])
        .arg("-I/usr/include/x86_64-linux-gnu")
        // The folder of the checkout would be in the program otherwise.
        .arg("-fdebug-compilation-dir=.")
        .args(layout)
        .args(["-c", "bpf/ledger.bpf.c", "-o"])
        .arg(folder.join("ledger.bpf.o"))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => fail(
            &clang,
            "cannot compile bpf/ledger.bpf.c; its messages are above",
        ),
        Err(error) => fail(&clang, &format!("cannot be run ({error})")),
    }
}

fn fail(clang: &OsString, why: &str) -> ! {
    println!(
        "cargo::error={} {why}: install clang, name another one by CLANG, or build without BPF \
         (--no-default-features --features png,top)",
        clang.to_string_lossy()
    );
    std::process::exit(1);
}
