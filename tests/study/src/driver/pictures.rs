// SPDX-License-Identifier: GPL-2.0

//! Draws the pictures with `exitmeter plot`.

use std::{path::Path, process::Command};

use anyhow::{ensure, Context as _, Result};
use lab::programs;

use super::recorded::Recorded;
use crate::plan::GuestKind;

/// Draw the pictures of each recording: its rate, and growth and cost of its boot.
pub fn draw(all: &[Recorded], folder: &Path) -> Result<()> {
    let tool = programs::program("exitmeter", "exitmeter")?;
    for recorded in all {
        let run = recorded.run;
        let source = folder.join(format!("{run}.rec"));
        let plot = |kind: &str, name: &str, what: &str, span: Option<(f64, f64)>| -> Result<()> {
            let kernel = recorded
                .about
                .get("kernel")
                .map(String::as_str)
                .unwrap_or_default();
            let title = format!("{}: {what} \u{2013} Linux {kernel}", run.title());
            let mut plot = Command::new(&tool);
            plot.arg("plot")
                .arg(&source)
                .arg("-o")
                .arg(folder.join(format!("{run}-{name}.svg")));
            plot.args(["--kind", kind, "--title", &title]);
            if let Some((from, to)) = span {
                // The margin includes a snapshot at the very end of the span.
                plot.args([
                    "--from",
                    &format!("{:.6}", (from - 1e-6).max(0.0)),
                    "--to",
                    &format!("{:.6}", to + 1e-6),
                ]);
            }
            let output = plot.output().context("cannot run exitmeter")?;
            let errors = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "cannot draw {run}: {errors}");
            Ok(())
        };
        plot("rate", "rate", "all that it did", None)?;
        if run.guest == GuestKind::Loops {
            continue;
        }
        let boot = recorded
            .stage("boot")
            .with_context(|| format!("{run} has no boot"))?;
        plot("cumulative", "boot", "its boot", Some(boot.span))?;
        plot("latency", "cost", "its boot", Some(boot.span))?;
    }
    Ok(())
}
