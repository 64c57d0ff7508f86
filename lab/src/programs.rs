// SPDX-License-Identifier: GPL-2.0

//! Building of the workspace's programs that go into a host.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
};

use serde::Deserialize;
use thiserror::Error;

use crate::paths::repository;

/// Reason why there are no programs.
#[derive(Debug, Error)]
pub enum ProgramsError {
    /// cargo cannot be run.
    #[error("cargo cannot be run")]
    Cargo(#[source] io::Error),
    /// The build failed; the output has been shown.
    #[error("the programs of the host could not be built; cargo's messages are above")]
    Failed,
}

/// Programs of every host.
#[derive(Debug)]
pub struct Programs {
    /// Path of the agent.
    pub agent: PathBuf,
    /// Path of the tool `exitmeter`.
    pub tool: PathBuf,
}

/// One of the lines of JSON that cargo prints.
#[derive(Deserialize)]
struct Built {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Variant of the tool for a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Without pictures in pixels, `exitmeter top` and the BPF meter. It compiles in half the time.
    ForScripts,
    /// `ForScripts` plus the BPF meter, which clang compiles.
    WithBpf,
    /// `ForScripts` plus `exitmeter top`.
    WithTop,
}

/// Build the programs that are out of date.
///
/// # Errors
///
/// [`ProgramsError`].
pub fn build(tool: Tool) -> Result<Programs, ProgramsError> {
    let mut what = vec![
        "-p",
        "lab-agent",
        "-p",
        "exitmeter",
        "--no-default-features",
    ];
    match tool {
        Tool::ForScripts => {}
        Tool::WithBpf => what.extend(["--features", "exitmeter/bpf,exitmeter/export"]),
        Tool::WithTop => what.extend(["--features", "exitmeter/top"]),
    }
    let mut built = cargo_build(&what)?;
    match (built.remove("lab-agent"), built.remove("exitmeter")) {
        (Some(agent), Some(tool)) => Ok(Programs { agent, tool }),
        _ => Err(ProgramsError::Failed),
    }
}

/// Build one program of this workspace if it is out of date, and return its path.
///
/// # Errors
///
/// [`ProgramsError`].
pub fn program(package: &str, name: &str) -> Result<PathBuf, ProgramsError> {
    let mut built = cargo_build(&["-p", package, "--bin", name])?;
    built.remove(name).ok_or(ProgramsError::Failed)
}

/// Run `cargo build` with these arguments and the profile of programs for hosts. Return the path of each program by
/// its name.
fn cargo_build(what: &[&str]) -> Result<HashMap<String, PathBuf>, ProgramsError> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // The first time, the Debian root is made meanwhile, and more work waits for the root.
    let mut build = Command::new("nice")
        .arg("--adjustment=5")
        .arg(cargo)
        .current_dir(repository())
        .args([
            "build",
            "--quiet",
            "--profile=host",
            "--message-format=json-render-diagnostics",
        ])
        .args(what)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(ProgramsError::Cargo)?;
    let mut programs = HashMap::new();
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
            programs.insert(target.name, path);
        }
    }
    match build.wait().map_err(ProgramsError::Cargo)?.success() {
        true => Ok(programs),
        false => Err(ProgramsError::Failed),
    }
}
