// SPDX-License-Identifier: GPL-2.0

//! Writes the files of Grafana's boards from fleet::boards.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use fleet::boards::{BOARDS, FOLDER};

fn main() -> Result<()> {
    for board in BOARDS {
        let file = Path::new(FOLDER).join(format!("{}.json", board.name));
        fs::write(&file, board.text())
            .with_context(|| format!("cannot write {}", file.display()))?;
        println!("{}", file.display());
    }
    Ok(())
}
