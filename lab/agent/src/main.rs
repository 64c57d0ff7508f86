// SPDX-License-Identifier: GPL-2.0

//! One static program with three roles, chosen by the name it is called by: the first process of an emulated host, the
//! first process of the Linux guest in it, and the command `guest` that starts such guests.

mod child;
mod guest;
mod init;
mod modules;
mod port;

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    match Path::new(&called)
        .file_name()
        .and_then(|name| name.to_str())
    {
        Some("guest") => guest::command(),
        Some("guest-init") if rustix::process::getpid().is_init() => init::guest(),
        Some("init") if rustix::process::getpid().is_init() => init::host(),
        _ => {
            eprintln!("lab-agent: this is the first process of the lab's hosts (init), of their guests (guest-init), and their command guest; it does nothing under another name.");
            ExitCode::from(2)
        }
    }
}
