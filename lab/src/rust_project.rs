// SPDX-License-Identifier: GPL-2.0

//! `cargo lab rust-project` describes the kernel module to rust-analyzer, in build/rust-project.json.
//!
//! The kernel's own generator lists the kernel's crates. This file adds the module's crate, which the generator cannot
//! find below a Kbuild in another folder, and whose environment it does not know.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{bail, ensure, Context as _, Result};
use serde_json::{json, Map, Value};

use crate::{
    module,
    paths::repository,
    setup::{self, SetupOptions},
};

/// Crates that kbuild lets each module use.
const EXTERNS: [&str; 4] = ["kernel", "pin_init", "zerocopy", "zerocopy_derive"];
/// Crates of Rust's library.
const LIBRARY: [&str; 4] = ["core", "alloc", "std", "proc_macro"];

/// Arguments of `cargo lab rust-project`.
#[derive(Debug, clap::Args)]
pub struct RustProjectArgs {
    /// Debian's kernel to describe: a version or release, built with Rust; by default the newest of backports
    #[arg(long, value_name = "VERSION")]
    kernel: Option<String>,
}

/// Run `cargo lab rust-project`: build the module for its bindings, write the description, and print its path.
///
/// # Errors
///
/// An error if the set-up or the build fails, or the user's toolchain has no source of Rust's library.
pub fn command(args: RustProjectArgs) -> Result<()> {
    let toolchain = Toolchain::find()?;
    let prepared = setup::prepare(&SetupOptions {
        kernel: args.kernel,
        tree: true,
        ..SetupOptions::default()
    })?;
    let object = module::build(&prepared)?;
    let built = object.parent().context("the module is in no folder")?;
    let tree = module::tree(&prepared)?;

    // rust-analyzer runs outside of the root, so everything has the path there that it has here.
    let out = repository().join("build/rust-analyzer");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let status = setup::in_root(&prepared.root)
        .bind(repository(), repository())
        .bind(tree, tree)
        .bind(&toolchain.sysroot, &toolchain.sysroot)
        .command("make")
        .arg("--silent")
        .arg("-C")
        .arg(tree)
        .arg(assign("M", repository()))
        .arg(assign("MO", &out))
        .arg(format!("CC={}", module::compiler(&prepared)?))
        .arg(assign("rustc_sysroot", &toolchain.sysroot))
        .arg(assign("RUST_LIB_SRC", &toolchain.library()))
        .arg("rust-analyzer")
        .stdin(Stdio::null())
        .status()?;
    ensure!(status.success(), "the kernel's generator failed");

    let raw = out.join("rust-project.json");
    let text = fs::read(&raw).with_context(|| format!("cannot read {}", raw.display()))?;
    let mut project: Value = serde_json::from_slice(&text)?;
    // Without it rust-analyzer does not find the library that `sysroot` has.
    project["sysroot_src"] = json!(toolchain.library());
    let crates = project["crates"]
        .as_array_mut()
        .context("the kernel's generator lists no crates")?;
    toolchain.build_macros(crates, &out)?;
    for kernel in crates.iter_mut() {
        // Show no warnings of the kernel's own code.
        kernel["is_workspace_member"] = false.into();
    }
    let own = own_crate(crates, built)?;
    crates.push(own);
    remove_library(crates)?;

    let path = repository().join("build/rust-project.json");
    fs::write(&path, serde_json::to_vec(&project)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(io::stdout(), "{}", path.display())?;
    Ok(())
}

fn assign(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

/// Return the module's crate, whose bindings are in the folder `built`. `crates` are the kernel's.
fn own_crate(crates: &[Value], built: &Path) -> Result<Value> {
    let mut deps = Vec::new();
    for name in EXTERNS {
        let index = crates
            .iter()
            .position(|one| one["display_name"] == name)
            .with_context(|| format!("the kernel's generator lists no crate {name}"))?;
        deps.push(json!({ "crate": index, "name": name }));
    }
    let kernel = crates.iter().find(|one| one["display_name"] == "kernel");
    let mut cfg = kernel.map_or(json!([]), |kernel| kernel["cfg"].clone());
    if let Some(cfg) = cfg.as_array_mut() {
        // kbuild's, for objects of a module.
        cfg.push("MODULE".into());
    }
    let source = repository().join("src");
    let bindings = built.join("bindings");
    Ok(json!({
        "display_name": "exitmeter",
        "root_module": source.join("exitmeter_main.rs"),
        "is_workspace_member": true,
        "deps": deps,
        "cfg": cfg,
        "edition": "2021",
        // What Kbuild exports.
        "env": {
            "EXITMETER_BINDINGS": bindings.join("generated.rs"),
            "EXITMETER_VERSION": env!("CARGO_PKG_VERSION"),
            "RUST_MODFILE": "exitmeter",
        },
        "source": { "include_dirs": [source, bindings], "exclude_dirs": [] },
    }))
}

/// Remove the crates of Rust's library from the kernel's list.
///
/// rust-analyzer adds them to each crate, from `sysroot_src`. If they are listed too, it looks for the
/// methods of `[T]`, `bool` and pointers in a `core` that it does not take for the library, and finds none.
fn remove_library(crates: &mut Vec<Value>) -> Result<()> {
    let mut renumbered = Vec::new();
    let mut kept = 0;
    for one in crates.iter() {
        let library = LIBRARY.iter().any(|name| one["display_name"] == *name);
        renumbered.push((!library).then_some(kept));
        kept += usize::from(!library);
    }
    let mut numbers = renumbered.iter();
    crates.retain(|_| numbers.next().is_some_and(Option::is_some));
    for one in crates {
        let deps = one["deps"].as_array_mut().context("a crate has no deps")?;
        deps.retain_mut(|dep| {
            let old = dep["crate"]
                .as_u64()
                .and_then(|old| usize::try_from(old).ok());
            let new = old.and_then(|old| renumbered.get(old).copied().flatten());
            dep["crate"] = new.into();
            new.is_some()
        });
    }
    Ok(())
}

/// The user's Rust, which rust-analyzer belongs to.
struct Toolchain {
    sysroot: PathBuf,
    /// Second number of the version.
    minor: u32,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let sysroot = PathBuf::from(rustc_says(&["--print", "sysroot"])?);
        let version = rustc_says(&["--version"])?;
        let minor = version
            .strip_prefix("rustc 1.")
            .and_then(|rest| rest.split('.').next()?.parse().ok())
            .with_context(|| format!("{version} is no known version of rustc"))?;
        let toolchain = Self { sysroot, minor };
        ensure!(
            toolchain.library().is_dir(),
            "{} has no source of Rust's library; install it with `rustup component add rust-src rust-analyzer`",
            toolchain.sysroot.display()
        );
        Ok(toolchain)
    }

    /// Return the folder of the library's source.
    fn library(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust/library")
    }

    /// Compile the kernel's procedural macros into `out`, and name the results in `crates`.
    ///
    /// rust-analyzer loads only macros that its own toolchain compiled, and the kernel's are those of the kernel's rustc.
    fn build_macros(&self, crates: &mut [Value], out: &Path) -> Result<()> {
        // The generator lists each crate behind those that it uses.
        let names = ["proc_macro2", "quote", "syn"];
        for one in crates.iter_mut().filter(|one| {
            one["is_proc_macro"] == true || names.iter().any(|name| one["display_name"] == *name)
        }) {
            let is_macro = one["is_proc_macro"] == true;
            let name = text(one, "display_name")?;
            let file = match is_macro {
                true => out.join(format!("lib{name}.so")),
                false => out.join(format!("lib{name}.rlib")),
            };
            let mut rustc = Command::new("rustc");
            rustc
                // As kbuild does: the macros use features of the compiler.
                .env("RUSTC_BOOTSTRAP", "1")
                .envs(environment(one))
                .arg(text(one, "root_module")?)
                .args(["--crate-name", name, "--edition", text(one, "edition")?])
                .args(["--crate-type", if is_macro { "proc-macro" } else { "rlib" }])
                .args(["--cap-lints", "allow", "-L"])
                .arg(out)
                .arg("-o")
                .arg(&file);
            for dep in one["deps"].as_array().into_iter().flatten() {
                rustc.args(["--extern", text(dep, "name")?]);
            }
            for cfg in one["cfg"].as_array().into_iter().flatten() {
                rustc.args(["--cfg", cfg.as_str().unwrap_or_default()]);
            }
            // Kconfig asks this of the kernel's rustc. With another one the macros do not compile.
            if self.minor >= 88 {
                rustc.args(["--cfg", "CONFIG_RUSTC_HAS_SPAN_FILE"]);
            }
            let output = rustc
                .stdin(Stdio::null())
                .output()
                .context("cannot run rustc")?;
            if !output.status.success() {
                io::stderr().write_all(&output.stderr)?;
                bail!("rustc cannot compile the kernel's crate {name}; its messages are above");
            }
            if is_macro {
                one["proc_macro_dylib_path"] = json!(file);
            }
        }
        Ok(())
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key]
        .as_str()
        .with_context(|| format!("the kernel's generator names no {key} of a crate"))
}

fn environment(one: &Value) -> impl Iterator<Item = (&str, &str)> {
    one["env"]
        .as_object()
        .into_iter()
        .flat_map(Map::iter)
        .filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)))
}

/// Return the first line that the user's rustc prints.
fn rustc_says(arguments: &[&str]) -> Result<String> {
    let output = Command::new("rustc")
        .args(arguments)
        .output()
        .context("cannot run rustc")?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().next().context("rustc prints nothing")?;
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_of_the_library_go_and_the_others_are_renumbered() {
        let mut crates = vec![
            json!({ "display_name": "core", "deps": [] }),
            json!({ "display_name": "ffi", "deps": [{ "crate": 0, "name": "core" }] }),
            json!({ "display_name": "std", "deps": [{ "crate": 0, "name": "core" }] }),
            json!({ "display_name": "kernel", "deps": [
                { "crate": 0, "name": "core" }, { "crate": 1, "name": "ffi" }] }),
        ];
        remove_library(&mut crates).unwrap();
        assert_eq!(
            crates,
            [
                json!({ "display_name": "ffi", "deps": [] }),
                json!({ "display_name": "kernel", "deps": [{ "crate": 0, "name": "ffi" }] }),
            ]
        );
    }
}
