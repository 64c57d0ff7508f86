// SPDX-License-Identifier: GPL-2.0

//! `make study`: how guests exit, measured on emulated hosts, for docs/study.md.
//!
//! One program with two sides. Outside, it boots a host for each run of the plan, keeps what was recorded there in
//! docs/study, draws it by `exitmeter plot`, and writes the tables of docs/study.md. Inside, it boots a guest, has it
//! work, and records /dev/exitmeter all the while; each thing that the guest does begins with a mark in the recording.

mod inside;
mod outside;
mod plan;
mod vmm;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;

use crate::plan::Run;

/// Records how guests exit on emulated hosts, and writes the tables and pictures of docs/study.md.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Only write tables and pictures anew, of the recordings that are there
    #[arg(long)]
    only_write: bool,
    /// Only runs whose names hold one of these words, such as intel-microvm
    words: Vec<String>,
    /// The side inside: make this run in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    inside: Option<Run>,
    /// The side inside: be the VMM of a Linux guest with this initramfs.
    #[arg(long, hide = true)]
    vmm: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(initramfs) = &arguments.vmm {
        return inside::vmm(initramfs);
    }
    match arguments.inside {
        Some(run) => inside::run(run),
        None => outside::run(&arguments),
    }
}
