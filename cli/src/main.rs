// SPDX-License-Identifier: GPL-2.0

//! The command `exitmeter`.

use std::{
    io::{ErrorKind, Write},
    process::ExitCode,
};

use clap::Parser;
use exitmeter::args::Args;

fn main() -> ExitCode {
    match Args::parse().run().and_then(print) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exitmeter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints, and is content when nobody wants to read on.
fn print(text: String) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to the standard output"))
        }
        _ => Ok(()),
    }
}
