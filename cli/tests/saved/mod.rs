// SPDX-License-Identifier: GPL-2.0

//! Texts that the tool is expected to print, as files of this folder.

use std::{env, fs, path::Path};

/// Compare a text with the file `name`. With EXITMETER_SAVE in the environment, save the text there
/// instead, to be read in the diff.
#[track_caller]
pub fn compare(text: &str, name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(name);
    if env::var_os("EXITMETER_SAVE").is_some() {
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    assert_eq!(text, expected, "{name}");
}
