// SPDX-License-Identifier: GPL-2.0

//! Check that this process may run commands in a Debian root.

use std::{path::Path, process::Command};

use super::{engine, SetupError};

/// Fail unless this process may make the namespaces that scripts/in-root.sh needs. That script runs under other commands,
/// whose errors would hide its own, so the set-up checks first.
///
/// # Errors
///
/// [`SetupError::Namespaces`].
pub fn need(scripts: &Path) -> Result<(), SetupError> {
    let output = Command::new("bash")
        .args(["-euc", r#". "$0/common.sh"; need_namespaces"#])
        .arg(scripts)
        .output()
        .map_err(SetupError::io("run", Path::new("bash")))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let (sentence, rest) = engine::split_sentence(&complaint);
    Err(SetupError::Namespaces(
        sentence.map_or_else(|| rest.join("\n"), str::to_owned),
    ))
}
