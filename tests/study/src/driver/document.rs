// SPDX-License-Identifier: GPL-2.0

//! Writes the tables of docs/study.md. Each is between two comments there; all other text is written by hand.

mod boots;
mod costs;
mod table;
mod work;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use lab::host::Host;

use super::recorded::{Recorded, Stage};
use crate::plan::{GuestKind, Paging, Run};

/// A function that formats a table.
type Format = fn(&Study<'_>) -> String;

/// Tables: the name in the comments, and the function that formats the table.
const TABLES: [(&str, Format); 11] = [
    ("runs", boots::runs),
    ("boots", boots::boots),
    ("growth", boots::growth),
    ("reasons-intel", |all| boots::reasons(all, Host::Intel)),
    ("reasons-amd", |all| boots::reasons(all, Host::Amd)),
    ("extremes", costs::extremes),
    ("costs", costs::costs),
    ("work-intel", |all| work::work(all, Host::Intel)),
    ("work-amd", |all| work::work(all, Host::Amd)),
    ("paging", costs::paging),
    ("loops", work::loops),
];

/// All recordings of the study.
struct Study<'a> {
    recorded: &'a [Recorded],
    /// Folder of the recordings.
    folder: &'a Path,
}

impl<'a> Study<'a> {
    fn get(&self, host: Host, guest: GuestKind, paging: Paging) -> Option<&'a Recorded> {
        let run = Run {
            host,
            guest,
            paging,
        };
        self.recorded.iter().find(|recorded| recorded.run == run)
    }

    /// Return the runs with Linux and their boots, on one host or on both.
    fn linux(&self, host: Option<Host>) -> Vec<(&'a Recorded, &'a Stage)> {
        let all = self.recorded.iter();
        all.filter(|recorded| host.is_none_or(|host| recorded.run.host == host))
            .filter_map(|recorded| Some((recorded, recorded.stage("boot")?)))
            .collect()
    }
}

/// Write the tables into the document.
pub fn write(recorded: &[Recorded], path: &Path) -> Result<()> {
    let folder = path.with_extension("");
    let all = Study {
        recorded,
        folder: &folder,
    };
    let name = || path.display().to_string();
    let mut text = fs::read_to_string(path).with_context(|| format!("cannot read {}", name()))?;
    for (name_of_table, format) in TABLES {
        text = replace_table(&text, name_of_table, &format(&all))
            .with_context(|| format!("{} has no place for the table {name_of_table}", name()))?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", name()))
}

/// Replace the table between the comments with `name`. Return `None` if they are missing.
fn replace_table(text: &str, name: &str, table: &str) -> Option<String> {
    let begin = format!("<!-- make study: {name} -->\n");
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once("<!-- end -->")?;
    Some(format!("{before}{begin}{table}<!-- end -->{after}"))
}

#[cfg(test)]
mod tests {
    use super::replace_table;

    #[test]
    fn a_table_is_replaced_and_the_rest_stays() {
        let text = "A\n<!-- make study: one -->\nold\n<!-- end -->\nB\n<!-- make study: two -->\n<!-- end -->\nC\n";
        let once = replace_table(text, "two", "| 2 |\n").unwrap_or_default();
        let twice = replace_table(&once, "one", "").unwrap_or_default();
        let expected = "A\n<!-- make study: one -->\n<!-- end -->\nB\n<!-- make study: two -->\n| 2 |\n<!-- end -->\nC\n";
        assert_eq!(twice, expected);
        assert_eq!(replace_table(text, "three", ""), None);
    }
}
