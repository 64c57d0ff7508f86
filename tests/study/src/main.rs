// SPDX-License-Identifier: GPL-2.0

//! `make study`: measures how guests exit on emulated hosts, for docs/study.md.
//!
//! This program has two sides. `driver` boots a host for each run of the plan, keeps the recordings in docs/study, draws
//! them with `exitmeter plot`, and writes the tables of docs/study.md. `in_host` boots a guest, lets it work, and records
//! /dev/exitmeter all the while. Each stage of the guest begins with a mark in the recording.

mod driver;
mod in_host;
mod plan;
mod vmm;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;

use crate::plan::Run;

/// Record how guests exit on emulated hosts, and write the tables and pictures of docs/study.md
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Record nothing; write tables and pictures from the existing recordings
    #[arg(long)]
    only_write: bool,
    /// Make only runs whose names contain one of these words, such as intel-microvm
    words: Vec<String>,
    /// Make this run in this host, which must be an emulated one.
    #[arg(long, hide = true)]
    in_host: Option<Run>,
    /// Run the VMM of a Linux guest with this initramfs.
    #[arg(long, hide = true)]
    vmm: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(initramfs) = &arguments.vmm {
        return in_host::vmm(initramfs);
    }
    match arguments.in_host {
        Some(run) => in_host::run(run),
        None => driver::run(&arguments),
    }
}
