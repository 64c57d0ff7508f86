// SPDX-License-Identifier: GPL-2.0

//! The command `exitmeter`.

use std::process::ExitCode;

use clap::Parser;
use exitmeter::{args::Args, output};

fn main() -> ExitCode {
    match Args::parse().run() {
        Ok(status) => status,
        Err(error) if output::Error::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exitmeter: {error:#}");
            ExitCode::FAILURE
        }
    }
}
