// SPDX-License-Identifier: GPL-2.0

//! Each source file names its licence in its first lines, as the kernel's files do.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Folders without source files of this project, and with formats that have no comments (packaging/debian/source).
const SKIPPED: [&str; 5] = ["target", "build", ".git", "node_modules", "source"];

/// Endings of source files. Other files are documents, or data that tests and users read.
const ENDINGS: [&str; 20] = [
    "rs", "c", "h", "S", "s", "sh", "toml", "yml", "yaml", "rules", "conf", "config", "service",
    "socket", "spec", "preinst", "postinst", "prerm", "postrm", "html",
];

/// Names of source files without such an ending.
const NAMES: [&str; 8] = [
    "Makefile",
    "Kbuild",
    "PKGBUILD",
    "run",
    "rules",
    "parameters",
    "kernel-hook",
    "kernel-preinst-hook",
];

/// Add the source files of a folder to `found`.
fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_symlink() || SKIPPED.contains(&name) {
            continue;
        }
        if path.is_dir() {
            collect(&path, found);
        } else if NAMES.contains(&name)
            || name
                .rsplit_once('.')
                .is_some_and(|(_, ending)| ENDINGS.contains(&ending))
        {
            found.push(path);
        }
    }
}

#[test]
fn each_source_file_names_its_licence() {
    let mut files = Vec::new();
    collect(lab::setup::repository(), &mut files);
    assert!(
        files.len() > 450,
        "only {} source files were found",
        files.len()
    );
    let without: Vec<_> = files
        .iter()
        .filter(|file| {
            let text = fs::read_to_string(file).unwrap();
            !text
                .lines()
                .take(2)
                .any(|line| line.contains("SPDX-License-Identifier: GPL-2.0"))
        })
        .collect();
    assert!(without.is_empty(), "no licence in {without:#?}");
}
