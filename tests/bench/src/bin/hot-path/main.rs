// SPDX-License-Identifier: GPL-2.0

//! Counts the instructions of the callbacks that run at every VM exit and entry, and
//! compares them with the bounds in tests/bench/hot-path.json.
//!
//! The count is no measure of time. It makes a change that lengthens the path visible in review.
//! It is the length of the longest path through a callback, without loops and without code out
//! of line: the common path and a few instructions more.

mod code;

use std::{cmp::Ordering, collections::BTreeMap, fs, process::ExitCode};

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use lab::{
    module,
    setup::{self, in_root, SetupOptions},
};

use self::code::Code;

/// Compare the instructions of exitmeter's hot path with their bounds
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Version or release of Debian's kernel [default: the newest of backports]
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
    /// Record the counts as the new bounds
    #[arg(long)]
    record: bool,
}

/// Upper bound of the instructions of each callback, by its name in src/hooks. A name that ends in
/// ` details` stands for the callback while details are on.
type Bounds = BTreeMap<String, usize>;

/// Suffix of a callback's name: its path while details are on.
const DETAILS: &str = " details";

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let prepared = setup::prepare(&SetupOptions {
        kernel: arguments.kernel,
        tree: true,
        ..SetupOptions::default()
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
            .context("cannot run objdump in the root")?;
        ensure!(output.status.success(), "objdump cannot read exitmeter.ko");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let mut code = Code::parse(&objdump(&["-dr", "--no-show-raw-insn", "-j", ".text"])?);
    code.add_branches(&objdump(&["-r", "-j", "__jump_table"])?);

    let path = setup::repository().join("tests/bench/hot-path.json");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
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
            Ordering::Less => "shorter now: record it with --record",
        };
        println!("{name:32} {count:4} instructions, at most {bound:4}  {remark}");
        longer |= count > *bound;
        *bound = count;
    }
    if arguments.record {
        fs::write(&path, serde_json::to_string_pretty(&bounds)? + "\n")?;
    } else if longer {
        eprintln!(
            "The hot path is longer than its bound. If that is worth it, run this with --record and give the reason in the commit."
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
