// SPDX-License-Identifier: GPL-2.0

//! The tool `exitmeter` on the host, and its JSON.

use std::process::{Command, Output, Stdio};

use anyhow::{ensure, Context as _, Result};
use serde_json::Value;

use super::hist::Exits;

/// User and group ID of nobody.
pub const NOBODY: u32 = 65534;

/// Return a command that runs the tool, without input.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new("exitmeter");
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Run the tool, and return its status and output.
pub fn output(arguments: &[&str]) -> Result<Output> {
    command(arguments)
        .output()
        .context("the tool exitmeter cannot be run")
}

/// Run the tool, and return its standard output. Fail unless it succeeds.
pub fn run_bytes(arguments: &[&str]) -> Result<Vec<u8>> {
    let output = output(arguments)?;
    ensure!(
        output.status.success(),
        "exitmeter {} ended with {}: {}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

/// Run the tool like [`run_bytes`], and return its standard output as text.
pub fn run(arguments: &[&str]) -> Result<String> {
    Ok(String::from_utf8(run_bytes(arguments)?)?)
}

/// Return the option value that copies the tool into a guest.
pub fn guest_file_option() -> Result<String> {
    let found = Command::new("sh")
        .args(["-c", "command -v exitmeter"])
        .output()?;
    ensure!(found.status.success(), "this host has no exitmeter");
    let path = String::from_utf8(found.stdout)?;
    Ok(format!("{}:/usr/bin/exitmeter", path.trim()))
}

/// Parse the tool's output as JSON.
pub fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("the tool prints no JSON: {text}"))
}

/// Return the exits by code of a VM, vCPU or total in the tool's JSON.
pub fn exits(ledger: &Value) -> Result<Exits> {
    let rows = ledger["reasons"].as_array().context("there are reasons")?;
    let mut exits = Exits::new();
    for row in rows {
        let count = row["exits"].as_u64().context("a number of exits")?;
        if row["kind"] == "code" && count != 0 {
            let code = row["code"].as_u64().context("a code")?;
            exits.insert(u32::try_from(code)?, count);
        }
    }
    Ok(exits)
}

/// Return the mean number of exits with `code` in the output of `stat`.
pub fn mean_exits(shown: &Value, code: u32) -> Option<u64> {
    let reasons = shown["reasons"].as_array()?;
    let reason = reasons.iter().find(|reason| reason["code"] == code)?;
    // There is one run, so the mean is a whole number.
    Some(reason["exits"]["mean"].as_f64()? as u64)
}
