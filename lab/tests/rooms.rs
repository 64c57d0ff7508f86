// SPDX-License-Identifier: GPL-2.0

//! The rooms of the kernel half, in the order of ARCHITECTURE.md: none uses a room above it, and three name C.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The rooms, from the top down. Those of one line do not use each other. All may use `meter`.
const ROOMS: [&[&str]; 9] = [
    &["exitmeter_main"],
    &["hooks"],
    &["answers", "device"],
    &["log"],
    &["registry"],
    &["parameters"],
    &["kvm"],
    &["linux"],
    &["bindings"],
];

/// The rooms that name C.
const NAME_C: [&str; 3] = ["hooks", "kvm", "linux"];

/// Return the Rust files of a room.
fn files(room: &str) -> Vec<PathBuf> {
    let source = lab::setup::repository().join("src");
    let file = source.join(format!("{room}.rs"));
    if file.is_file() {
        return vec![file];
    }
    let entries = fs::read_dir(source.join(room)).unwrap();
    let files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    let is_source = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "rs");
    assert!(files.iter().all(is_source), "{files:?}");
    files
}

/// Return the rooms that a file uses: each `crate::room`, and each name in the outer braces of
/// `use crate::{...}`.
fn used(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n");
    let mut names = Vec::new();
    for (_, rest) in code
        .match_indices("crate::")
        .map(|(at, it)| code.split_at(at + it.len()))
    {
        let Some(list) = rest.strip_prefix('{') else {
            let end = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_');
            names.push(rest[..end.unwrap()].to_owned());
            continue;
        };
        let (mut depth, mut outer) = (0, String::new());
        for letter in list.chars() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                _ if depth == 0 => outer.push(letter),
                _ => {}
            }
        }
        let first = |path: &str| {
            path.trim()
                .split("::")
                .next()
                .unwrap_or_default()
                .to_owned()
        };
        names.extend(outer.split(',').map(first).filter(|name| !name.is_empty()));
    }
    names
}

#[test]
fn no_room_uses_one_above_it() {
    for (level, rooms) in ROOMS.iter().enumerate() {
        // The crate root names its modules without `crate::`, and may use all.
        for room in rooms.iter().filter(|_| level > 0) {
            for path in files(room) {
                for name in used(&path) {
                    let below = ROOMS[level + 1..]
                        .iter()
                        .any(|rooms| rooms.contains(&&*name));
                    let may = below || name == *room || name == "meter";
                    assert!(may, "{} uses {name}", path.display());
                    let names_c = name == "bindings";
                    let may = !names_c || NAME_C.contains(room);
                    assert!(may, "{} names C", path.display());
                }
            }
        }
    }
}

#[test]
fn each_module_of_the_crate_is_a_room() {
    let root = fs::read_to_string(lab::setup::repository().join("src/exitmeter_main.rs")).unwrap();
    let modules = root
        .lines()
        .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
    let unknown: Vec<_> = modules
        .filter(|name| *name != "meter" && !ROOMS.concat().contains(name))
        .collect();
    assert!(
        unknown.is_empty(),
        "{unknown:?} have no place among the rooms"
    );
}
