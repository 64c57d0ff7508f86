// SPDX-License-Identifier: GPL-2.0

//! Counts the instructions of the callbacks that run at every VM exit and entry, and
//! compares them with the bounds in tests/bench/hot-path.json.
//!
//! No time is judged by this: it is there so that a change that makes the path longer is
//! seen in review. What is counted is the longest way through a callback, without loops
//! and without what is out of line: the common path, and a few instructions more.

mod code;

use std::{cmp::Ordering, collections::BTreeMap, fs, process::ExitCode};

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use lab::{
    module,
    setup::{self, in_root, Wanted},
};

use code::Code;

/// Compares the instructions of exitmeter's hot path with their bounds.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Debian's kernel, a version or release; the newest of backports if not given
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    /// Take what is counted for the bounds
    #[arg(long)]
    record: bool,
}

/// The most instructions of each callback, by its name in src/hooks.rs; with ` details` behind it, of
/// the callback while details are on.
type Bounds = BTreeMap<String, usize>;

/// What is behind the name of a callback whose way with details is meant.
const DETAILS: &str = " details";

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let prepared = setup::prepare(&Wanted {
        kernel: arguments.kernel,
        tree: true,
        ..Wanted::default()
    })?;
    let module = module::build(&prepared)?;
    let folder = module.parent().context("the module is in a folder")?;
    let objdump = |options: &[&str]| -> Result<String> {
        let output = in_root(&prepared.root)
            .bind(folder, "/module")
            .command("objdump")
            .args(options)
            .arg("/module/exitmeter.ko")
            .output()
            .context("objdump cannot be run in the root")?;
        ensure!(
            output.status.success(),
            "objdump does not read exitmeter.ko"
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let mut code = Code::parse(&objdump(&["-dr", "--no-show-raw-insn", "-j", ".text"])?);
    code.add_branches(&objdump(&["-r", "-j", "__jump_table"])?);

    let path = setup::repository().join("tests/bench/hot-path.json");
    let text = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    let mut bounds: Bounds = serde_json::from_str(&text)?;
    let mut longer = false;
    for (name, bound) in &mut bounds {
        let count = match name.strip_suffix(DETAILS) {
            Some(name) => code.longest(name, true)?,
            None => code.longest(name, false)?,
        };
        let remark = match count.cmp(bound) {
            _ if arguments.record => "",
            Ordering::Greater => "longer than its bound",
            Ordering::Equal => "",
            Ordering::Less => "shorter now: record it by --record",
        };
        println!("{name:32} {count:4} instructions, at most {bound:4}  {remark}");
        longer |= count > *bound;
        *bound = count;
    }
    if arguments.record {
        fs::write(&path, serde_json::to_string_pretty(&bounds)? + "\n")?;
    } else if longer {
        eprintln!(
            "The hot path is longer than its bound. If that is worth it, run this with --record, and say why in the commit."
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
