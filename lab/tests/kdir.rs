// SPDX-License-Identifier: GPL-2.0

//! Tests of scripts/check-kdir.sh on build folders of every kind.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command};

use tempfile::TempDir;

const CONFIG: &str = r#"CONFIG_MODULES=y
CONFIG_RUST=y
CONFIG_RUSTC_VERSION_TEXT="rustc 1.85.1 (4eb161250 2025-03-15)"
CONFIG_BINDGEN_VERSION_TEXT="bindgen 0.71.1"
CONFIG_MODULE_UNLOAD=y
CONFIG_KVM=m
CONFIG_KVM_INTEL=m
CONFIG_KVM_AMD=m
CONFIG_KALLSYMS=y
CONFIG_TRACEPOINTS=y
CONFIG_KPROBES=y
CONFIG_DYNAMIC_FTRACE_WITH_ARGS=y
"#;

/// A kernel build folder with everything that the module needs, and the tools that it was built with.
struct BuildFolder(TempDir);

impl BuildFolder {
    fn new() -> Self {
        let folder = Self(TempDir::new().unwrap());
        folder.write("include/config/auto.conf", CONFIG);
        folder.write("include/config/kernel.release", "7.3.4+deb13-amd64\n");
        folder.write("rust/libkernel.rmeta", "rust");
        folder.tool("rustc", "rustc 1.85.1 (4eb161250 2025-03-15)");
        folder.tool("bindgen", "bindgen 0.71.1");
        folder
    }

    /// Return a build folder like [`BuildFolder::new`], of a kernel with another configuration.
    fn with(config: &str) -> Self {
        let folder = Self::new();
        folder.write("include/config/auto.conf", config);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn tool(&self, name: &str, version: &str) {
        self.write(name, &format!("#!/bin/sh\necho '{version}'\n"));
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Return the script's complaint about the folder; `None` if the folder is good.
    fn complaint(&self) -> Option<String> {
        self.complaint_with(&[])
    }

    /// Return the complaint like [`BuildFolder::complaint`], with options for the script.
    fn complaint_with(&self, options: &[&str]) -> Option<String> {
        let script = lab::setup::repository().join("scripts/check-kdir.sh");
        let output = Command::new(script)
            .args(options)
            .arg(self.0.path())
            .env("RUSTC", self.path("rustc"))
            .env("BINDGEN", self.path("bindgen"))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.success(), said.is_empty(), "{said}");
        (!output.status.success()).then_some(said)
    }
}

#[track_caller]
fn assert_complains(folder: &BuildFolder, of: &str) {
    let said = folder.complaint().expect("the folder lacks something");
    assert!(said.contains(of), "{said}");
    assert!(
        said.starts_with("exitmeter: ") && said.lines().count() == 1,
        "{said}"
    );
    assert!(said.contains("or unset KDIR"), "it names a remedy: {said}");
}

#[test]
fn a_complete_folder_is_good() {
    assert_eq!(BuildFolder::new().complaint(), None);
}

#[test]
fn a_folder_that_was_never_prepared_is_refused() {
    for name in ["include/config/auto.conf", "include/config/kernel.release"] {
        let folder = BuildFolder::new();
        fs::remove_file(folder.path(name)).unwrap();
        assert_complains(&folder, name);
    }
}

#[test]
fn every_required_setting_is_checked() {
    let vendor = ["CONFIG_KVM_INTEL", "CONFIG_KVM_AMD"];
    for line in CONFIG.lines().filter(|line| !line.contains("VERSION")) {
        let name = line.split('=').next().unwrap();
        let folder = BuildFolder::with(&CONFIG.replace(&format!("{line}\n"), ""));
        if vendor.contains(&name) {
            assert_eq!(folder.complaint(), None, "one vendor is enough");
        } else {
            assert_complains(&folder, &format!("without {name},"));
        }
    }
    let neither: String = CONFIG
        .lines()
        .filter(|line| !vendor.iter().any(|name| line.starts_with(name)))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_complains(
        &BuildFolder::with(&neither),
        "without CONFIG_KVM_INTEL and CONFIG_KVM_AMD,",
    );
}

#[test]
fn kvm_that_is_built_in_is_refused() {
    let built_in = |names: &[&str]| {
        let config = names.iter().fold(CONFIG.to_owned(), |config, name| {
            config.replace(&format!("{name}=m"), &format!("{name}=y"))
        });
        BuildFolder::with(&config)
    };
    let folder = built_in(&["CONFIG_KVM"]);
    assert_complains(&folder, "CONFIG_KVM=y, and the module hooks kvm.ko");
    let both = ["CONFIG_KVM_INTEL", "CONFIG_KVM_AMD"];
    assert_complains(&built_in(&both), "both CONFIG_KVM_INTEL and CONFIG_KVM_AMD");
    for name in both {
        let folder = built_in(&[name]);
        assert_eq!(folder.complaint(), None, "the other vendor is a module");
    }
}

#[test]
fn settings_that_break_the_module_are_refused() {
    for name in ["CONFIG_PREEMPT_RT", "CONFIG_LTO_CLANG"] {
        let folder = BuildFolder::with(&format!("{CONFIG}{name}=y\n"));
        assert_complains(&folder, &format!("built with {name},"));
    }
}

#[test]
fn headers_without_rust_metadata_are_refused() {
    let folder = BuildFolder::new();
    folder.write("rust/libkernel.rmeta", "");
    assert_complains(&folder, "rust/libkernel.rmeta");
    fs::remove_dir_all(folder.path("rust")).unwrap();
    assert_complains(&folder, "rust/libkernel.rmeta");
}

/// DKMS makes missing metadata, but not for a kernel without Rust.
#[test]
fn the_option_kernel_does_not_require_metadata() {
    let folder = BuildFolder::with(&CONFIG.replace("CONFIG_RUST=y\n", ""));
    fs::remove_dir_all(folder.path("rust")).unwrap();
    let said = folder.complaint_with(&["--kernel"]).unwrap();
    assert!(said.contains("without CONFIG_RUST,"), "{said}");
    assert!(said.contains("or do without exitmeter"), "{said}");
    let folder = BuildFolder::new();
    fs::remove_dir_all(folder.path("rust")).unwrap();
    assert_eq!(folder.complaint_with(&["--kernel"]), None);
}

#[test]
fn another_rustc_is_refused_and_both_are_named() {
    let folder = BuildFolder::new();
    folder.tool("rustc", "rustc 1.95.0 (59807616e 2026-04-14)");
    assert_complains(&folder, "rustc 1.95.0 (59807616e 2026-04-14)");
    assert_complains(&folder, "rustc 1.85.1 (4eb161250 2025-03-15)");
}

#[test]
fn missing_tools_are_named() {
    for (tool, version) in [("rustc", "rustc 1.85.1"), ("bindgen", "bindgen 0.71.1")] {
        let folder = BuildFolder::new();
        fs::remove_file(folder.path(tool)).unwrap();
        assert_complains(&folder, version);
    }
}
