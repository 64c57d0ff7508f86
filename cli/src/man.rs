// SPDX-License-Identifier: GPL-2.0

//! `exitmeter man`: the manual pages.

use std::{fs, path::PathBuf};

use anyhow::Context as _;

use crate::args;

/// Writes the manual pages, one for each command.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
make install puts them where man(1) looks for them.

Examples:
  exitmeter man /tmp && man /tmp/exitmeter-report.1")]
pub struct Args {
    /// The folder to write to; it is made when it is not there.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

impl Args {
    /// Writes the pages.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written to.
    pub fn run(self) -> anyhow::Result<()> {
        let unwritable = || format!("cannot write to {}", self.folder.display());
        fs::create_dir_all(&self.folder).with_context(unwritable)?;
        clap_mangen::generate_to(args::command(), &self.folder).with_context(unwritable)
    }
}
