//! The programs of this workspace that go into a host.

use std::io::{self, BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::Deserialize;
use thiserror::Error;

use crate::setup::repository;

/// Why there are no programs.
#[derive(Debug, Error)]
pub enum ProgramsError {
    /// cargo cannot be run.
    #[error("cargo cannot be run: {0}")]
    Cargo(#[source] io::Error),
    /// The build failed; the output has been shown.
    #[error("the programs of the host could not be built; cargo's messages are above")]
    Failed,
}

/// What goes into every host.
#[derive(Debug)]
pub struct Programs {
    /// The agent.
    pub agent: PathBuf,
    /// The tool `exitmeter`.
    pub tool: PathBuf,
}

/// One of the lines that cargo prints for programs.
#[derive(Deserialize)]
struct Built {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Builds them as far as they are out of date.
///
/// # Errors
///
/// [`ProgramsError`].
pub fn build() -> Result<Programs, ProgramsError> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo)
        .current_dir(repository())
        .args([
            "build",
            "--quiet",
            "--profile=host",
            "--message-format=json-render-diagnostics",
        ])
        .args(["-p", "lab-agent", "-p", "exitmeter"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(ProgramsError::Cargo)?;
    let (mut agent, mut tool) = (None, None);
    for line in build
        .stdout
        .take()
        .into_iter()
        .flat_map(|out| BufReader::new(out).lines())
    {
        let line = line.map_err(ProgramsError::Cargo)?;
        if let Ok(Built {
            target: Some(target),
            executable: Some(path),
        }) = serde_json::from_str(&line)
        {
            match target.name.as_str() {
                "lab-agent" => agent = Some(path),
                "exitmeter" => tool = Some(path),
                _ => {}
            }
        }
    }
    let status = build.wait().map_err(ProgramsError::Cargo)?;
    match (agent, tool) {
        (Some(agent), Some(tool)) if status.success() => Ok(Programs { agent, tool }),
        _ => Err(ProgramsError::Failed),
    }
}
