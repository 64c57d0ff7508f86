// SPDX-License-Identifier: GPL-2.0

//! Options of a run.

use std::{ffi::OsString, path::PathBuf};

use lab_agent::settings::Module;

use crate::{
    host::{Host, Machine},
    image::payload::FileSpec,
    outcome::LIMITS,
    programs::Tool,
    verdict::Limits,
};

/// Options of a run: the script and the host.
#[derive(Clone, Debug)]
pub struct Options {
    /// The host.
    pub machine: Machine,
    /// Debian's kernel: a version, series or release; the newest if `None`.
    pub kernel: Option<String>,
    /// Parameters of kvm-intel or kvm-amd. If `None`, neither is loaded.
    pub kvm_parameters: Option<String>,
    /// Variant of the tool for the host.
    pub tool: Tool,
    /// True to boot the host even if a saved machine could be used.
    pub fresh: bool,
    /// True to build exitmeter.ko for the host, if its kernel is built with Rust.
    pub module: bool,
    /// More files for the host.
    pub files: Vec<FileSpec>,
    /// Target of the script's out folder; the run's own folder if `None`.
    pub out: Option<PathBuf>,
    /// Limits of the run.
    pub limits: Limits,
    /// A script of this machine, or a command of the host, and its arguments.
    pub script: Vec<OsString>,
}

impl Options {
    /// Return the options for a script on a host with defaults.
    pub fn new(host: Host, script: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            machine: Machine {
                host,
                model: None,
                cpus: 1,
                memory: 1024,
                icount: false,
                append: String::new(),
            },
            kernel: None,
            kvm_parameters: Some(String::new()),
            tool: Tool::ForScripts,
            fresh: false,
            module: true,
            files: Vec::new(),
            out: None,
            limits: LIMITS,
            script: script.into_iter().map(Into::into).collect(),
        }
    }

    /// Return KVM's module to load, if any.
    pub(crate) fn kvm_module(&self) -> Option<Module> {
        self.kvm_parameters.as_ref().map(|parameters| Module {
            name: self.machine.host.kvm_module().to_owned(),
            parameters: parameters.clone(),
        })
    }
}
