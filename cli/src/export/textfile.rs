// SPDX-License-Identifier: GPL-2.0

//! Writes the metrics to a file, for node_exporter's textfile collector.

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

/// The file's name. The collector reads all that end so.
const NAME: &str = "exitmeter.prom";

/// The file that is written first. The collector does not read it.
const NEW: &str = "exitmeter.prom.new";

/// Write the file once, or again and again.
///
/// # Errors
///
/// When it cannot be written.
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
            // The file says so as well. A timer's unit that fails is seen.
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

/// Put the file in the place of the one before, at once: a reader finds one of the two, whole.
fn replace(folder: &Path, text: &str) -> anyhow::Result<()> {
    let (file, new) = (folder.join(NAME), folder.join(NEW));
    let written = || -> std::io::Result<()> {
        let mut to = fs::File::create(&new)?;
        to.write_all(text.as_bytes())?;
        // Else a file without its bytes may be there after a loss of power.
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
