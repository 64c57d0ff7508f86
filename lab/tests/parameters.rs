// SPDX-License-Identifier: GPL-2.0

//! Each parameter of the module is described, checked and documented, wherever a new one belongs.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

fn file(name: &str) -> String {
    fs::read_to_string(lab::setup::repository().join(name)).unwrap()
}

/// Return the part of a text between two others.
fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let (_, rest) = text.split_once(start).unwrap();
    rest.split_once(end).unwrap().0
}

#[test]
fn each_parameter_is_everywhere() {
    let (header, shim) = (file("src/shim.h"), file("src/shim.c"));
    let readme = file("README.md");
    // Without the blanks, which rustfmt puts where it likes.
    let checks: String = file("src/parameters.rs").split_whitespace().collect();
    let loading = file("tests/src/cases/loading.rs");
    let names: Vec<_> = between(&header, "struct exitmeter_parameters {\n", "};")
        .lines()
        .map(|line| line.trim().strip_prefix("long ").unwrap())
        .map(|name| name.strip_suffix(';').unwrap())
        .collect();
    assert!(names.len() >= 8, "{names:?}");
    let defaults = between(&shim, "exitmeter_given = {\n", "};");
    for name in &names {
        let default = defaults
            .lines()
            .find_map(|line| line.trim().strip_prefix(&format!(".{name} = ")))
            .map_or("0", |value| value.trim_end_matches(','));
        let described = format!(
            "module_param_named({name}, exitmeter_given.{name}, long, 0444);\nMODULE_PARM_DESC({name}, \""
        );
        let documented = format!("\n| `{name}` | {default} | ");
        for (place, text, words) in [
            ("src/shim.c", &shim, described),
            (
                "src/parameters.rs",
                &checks,
                format!("in_range(\"{name}\",given.{name},"),
            ),
            ("README.md", &readme, documented),
        ] {
            assert!(text.contains(&words), "{place} has no {words:?}");
        }
        let refused = |line: &str| {
            line.contains(&format!("\"{name}=")) && line.contains(" is refused: it is ")
        };
        assert!(
            loading.lines().any(refused),
            "tests/src/cases/loading.rs has no value of {name} that is refused"
        );
    }
    let rows = between(&readme, "\n| parameter | default | meaning |\n", "\n\n");
    assert_eq!(rows.lines().count(), 1 + names.len(), "rows of README.md");
}
