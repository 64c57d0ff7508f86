// SPDX-License-Identifier: GPL-2.0

//! The tool, run as a user does, whatever the environment of the tests says of colours, width and
//! letters.

use std::process::{Command, Output};

/// Prepare a run of the tool.
pub fn exitmeter(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
    command.args(arguments);
    command.env_remove("NO_COLOR").env_remove("COLUMNS");
    command.env("LC_ALL", "C.UTF-8").env("TERM", "xterm");
    command
}

/// Return what a run has printed, which has to have succeeded in silence.
pub fn succeeded(output: Output) -> String {
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// Return the exit status of a run that has printed nothing, and what it has said.
pub fn failed(output: Output) -> (Option<i32>, String) {
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), said)
}
