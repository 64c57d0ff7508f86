// SPDX-License-Identifier: GPL-2.0

//! The tool, run as a user does. The environment's settings of colours, width and letters do not
//! matter.

use std::process::{Command, Output};

/// Prepare a run of the tool.
pub fn exitmeter(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exitmeter"));
    command.args(arguments);
    command.env_remove("NO_COLOR").env_remove("COLUMNS");
    command.env("LC_ALL", "C.UTF-8").env("TERM", "xterm");
    command
}

/// Return the output of a run, which must have succeeded without a message.
pub fn succeeded(output: Output) -> String {
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// Return the exit status and the message of a run, which must have printed nothing.
pub fn failed(output: Output) -> (Option<i32>, String) {
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), said)
}
