// SPDX-License-Identifier: GPL-2.0

//! Tests of packaging/ that need no package: the version, the module's source, and the reasons why DKMS cannot build.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, process::Command};

use tempfile::TempDir;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn file(name: &str) -> String {
    fs::read_to_string(lab::setup::repository().join(name)).unwrap()
}

/// Return the module's source as DKMS gets it.
fn source() -> TempDir {
    let folder = TempDir::new().unwrap();
    let script = lab::setup::repository().join("packaging/module-source.sh");
    let status = Command::new(script).arg(folder.path()).status().unwrap();
    assert!(status.success());
    folder
}

#[test]
fn every_package_has_the_version_of_the_workspace() {
    for (name, line) in [
        ("CHANGELOG.md", format!("\n## [{VERSION}] - ")),
        ("packaging/PKGBUILD", format!("\npkgver={VERSION}\n")),
        (
            "packaging/exitmeter.spec",
            format!("\nVersion:        {VERSION}\n"),
        ),
    ] {
        assert!(file(name).contains(&line), "{name} has no line {line:?}");
    }
    assert!(file("packaging/debian/changelog").starts_with(&format!("exitmeter ({VERSION}) ")));
    let conf = fs::read_to_string(source().path().join("dkms.conf")).unwrap();
    assert!(
        conf.contains(&format!("\nPACKAGE_VERSION=\"{VERSION}\"\n")),
        "{conf}"
    );
}

/// AUTOINSTALL would fail for a kernel that cannot have the module, and so would the installation of that kernel.
#[test]
fn dkms_does_not_install_the_module_by_itself() {
    let conf = file("packaging/dkms/dkms.conf");
    assert!(!conf.lines().any(|line| line.starts_with("AUTOINSTALL")));
}

/// Each object of Kbuild has its source, and each `mod` of src/meter its file.
#[test]
fn the_source_is_complete() {
    let folder = source();
    for name in ["Kbuild", "bindings/kvm.h", "src/hooks/mod.rs"] {
        assert!(folder.path().join(name).is_file(), "{name}");
    }
    let kbuild = file("Kbuild");
    let objects = kbuild
        .lines()
        .find_map(|line| line.strip_prefix("exitmeter-y := "))
        .unwrap();
    for object in objects.split(' ') {
        let stem = object.strip_suffix(".o").unwrap();
        let has = |ending| folder.path().join(format!("{stem}.{ending}")).is_file();
        assert!(["c", "rs", "S"].into_iter().any(has), "{object}");
    }
    let modules = file("src/meter/mod.rs");
    let names: Vec<_> = modules
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod "))
        .filter_map(|rest| rest.strip_suffix(';'))
        .collect();
    assert!(names.len() > 5, "{names:?}");
    for name in names {
        let path = folder.path().join(format!("src/meter/{name}.rs"));
        assert!(path.is_file(), "{}", path.display());
    }
}

#[test]
fn the_build_for_a_kernel_without_rust_fails_with_one_sentence() {
    let folder = source();
    let kernel = TempDir::new().unwrap();
    let config = kernel.path().join("include/config");
    fs::create_dir_all(&config).unwrap();
    fs::write(
        config.join("auto.conf"),
        "CONFIG_MODULES=y\nCONFIG_MODULE_UNLOAD=y\nCONFIG_KVM=m\n",
    )
    .unwrap();
    fs::write(config.join("kernel.release"), "6.12.117+deb13-amd64\n").unwrap();
    let output = Command::new(folder.path().join("dkms/build.sh"))
        .arg("6.12.117+deb13-amd64")
        .arg(kernel.path())
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let reason = said.lines().last().unwrap();
    assert!(
        reason.starts_with("exitmeter: ") && reason.contains("without CONFIG_RUST,"),
        "{said}"
    );
    assert!(!reason.contains('\''), "{reason}");
}

/// A reason passes through a shell's quotes (the kernel's Makefiles, dkms.conf), so it must not have any.
#[test]
fn no_reason_has_an_apostrophe() {
    for name in ["scripts/check-kdir.sh", "packaging/dkms/build.sh"] {
        let text = file(name);
        let reasons = text.lines().map(str::trim).filter(|line| {
            ["die \"", "needs", "refuses"]
                .iter()
                .any(|start| line.starts_with(start) || line.contains("|| die \""))
        });
        for line in reasons {
            assert!(!line.contains('\''), "{name}: {line}");
        }
    }
}
