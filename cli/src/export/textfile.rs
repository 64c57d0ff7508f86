// SPDX-License-Identifier: GPL-2.0

//! Metrics file for node_exporter's textfile collector.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{exposition::Format, Exporter};

/// Name of the file. The collector reads all files with this suffix.
const NAME: &str = "exitmeter.prom";

/// Name of the temporary file, which the collector does not read.
const NEW: &str = "exitmeter.prom.new";

/// Write the file once, or repeatedly if there is an `interval`.
///
/// # Errors
///
/// Returns an error if the file cannot be written.
pub fn write(
    exporter: &Exporter,
    folder: &Path,
    interval: Option<Duration>,
) -> anyhow::Result<ExitCode> {
    let mut due = Instant::now();
    loop {
        let (text, is_up) = exporter.scrape(Format::Text);
        replace(folder, &text)?;
        let Some(interval) = interval else {
            // The file has the failure, too. The status lets a timer's unit fail visibly.
            return Ok(if is_up {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        };
        due += interval;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// Replace the file atomically: a reader sees either the old or the new one, whole.
fn replace(folder: &Path, text: &str) -> anyhow::Result<()> {
    let (file, new) = (folder.join(NAME), folder.join(NEW));
    let written = || -> std::io::Result<()> {
        let mut to = fs::File::create(&new)?;
        to.write_all(text.as_bytes())?;
        // Without this, the file may be empty after a loss of power.
        to.sync_all()?;
        fs::rename(&new, &file)
    };
    written().with_context(|| {
        format!(
            "cannot write {}: --textfile takes the folder that node_exporter reads, such as \
             /var/lib/prometheus/node-exporter, and the right to write there",
            file.display()
        )
    })
}
