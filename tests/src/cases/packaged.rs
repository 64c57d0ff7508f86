// SPDX-License-Identifier: GPL-2.0

//! Properties that users of the packages rely on: one version everywhere, and a refusal that the tool
//! explains.

use std::{fs, path::Path};

use anyhow::{ensure, Context as _, Result};

use super::Case;
use crate::host::{log::Log, module, tool};

/// Parameter file: Y if the kernel loads only signed modules. It can be turned on, but not off again
/// (`module_sig_check()` and sig_enforce, kernel/module/signing.c).
const SIGNED_ALONE: &str = "/sys/module/module/parameters/sig_enforce";

pub(super) fn cases() -> Vec<Case> {
    vec![Case::without_module(
        "packaged: the tool, the module and its line in the log have the same version",
        version,
    )]
}

/// Return the case after which the module can no longer be loaded.
pub(super) fn last() -> Vec<Case> {
    vec![Case {
        skip_reason: || {
            Ok((!Path::new(SIGNED_ALONE).exists())
                .then_some("the kernel was built without signatures of modules"))
        },
        ..Case::without_module(
            "packaged: a kernel that requires signatures refuses the module, and the tool says why",
            refused_unsigned,
        )
    }]
}

fn version() -> Result<()> {
    let printed = tool::run(&["--version"])?;
    let version = printed
        .strip_prefix("exitmeter ")
        .context("the tool prints another name")?
        .trim();
    let mut log = Log::from_now()?;
    let loaded = module::Loaded::with("")?;
    let module_version = fs::read_to_string("/sys/module/exitmeter/version")?;
    let lines = log.module_lines()?;
    loaded.unload()?;
    ensure!(
        module_version.trim() == version,
        "the tool is {version}, and the module {module_version}"
    );
    ensure!(
        lines
            .iter()
            .any(|line| line.starts_with(&format!("version {version} "))),
        "the tool is {version}, and the log says {lines:?}"
    );
    Ok(())
}

fn refused_unsigned() -> Result<()> {
    let output = tool::output(&["report", "--source", "module"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && stderr.contains("load the module on the host first"),
        "without a module the tool says {stderr}"
    );
    fs::write(SIGNED_ALONE, "Y")?;
    let refused = module::try_load("")
        .err()
        .and_then(|error| error.raw_os_error());
    ensure!(
        refused == Some(libc::EKEYREJECTED),
        "an unsigned module is refused with {refused:?}"
    );
    let output = tool::output(&["report", "--source", "module"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1)
            && stderr.contains("Key was rejected by service")
            && stderr.contains("docs/install.md"),
        "the tool says {stderr}"
    );
    Ok(())
}
