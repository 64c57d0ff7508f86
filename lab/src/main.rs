// SPDX-License-Identifier: GPL-2.0

//! `cargo lab`: boots emulated hosts.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
