// SPDX-License-Identifier: GPL-2.0

//! The tables of docs/study.md: each stands between two comments there, and all else is people's.

mod boots;
mod costs;
mod table;
mod work;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use super::recorded::{Recorded, Stage};
use crate::plan::{Guest, Paging, Run};
use lab::host::Host;

/// What makes a table.
type Make = fn(&All<'_>) -> String;

/// What the comments say, and what makes the table.
const TABLES: [(&str, Make); 11] = [
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

/// What there is to write of.
struct All<'a> {
    recorded: &'a [Recorded],
    /// The folder of the recordings.
    folder: &'a Path,
}

impl<'a> All<'a> {
    fn get(&self, host: Host, guest: Guest, paging: Paging) -> Option<&'a Recorded> {
        let run = Run {
            host,
            guest,
            paging,
        };
        self.recorded.iter().find(|recorded| recorded.run == run)
    }

    /// Those with Linux, of a host or of both.
    fn linux(&self, host: Option<Host>) -> Vec<(&'a Recorded, &'a Stage)> {
        let all = self.recorded.iter();
        all.filter(|recorded| host.is_none_or(|host| recorded.run.host == host))
            .filter_map(|recorded| Some((recorded, recorded.stage("boot")?)))
            .collect()
    }
}

/// Writes them into the document.
pub fn write(recorded: &[Recorded], path: &Path) -> Result<()> {
    let folder = path.with_extension("");
    let all = All {
        recorded,
        folder: &folder,
    };
    let name = || path.display().to_string();
    let mut text = fs::read_to_string(path).with_context(|| format!("cannot read {}", name()))?;
    for (name_of_table, make) in TABLES {
        text = replaced(&text, name_of_table, &make(&all))
            .with_context(|| format!("{} has no place for the table {name_of_table}", name()))?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", name()))
}

/// The text with another table between the comments of this name.
fn replaced(text: &str, name: &str, table: &str) -> Option<String> {
    let begin = format!("<!-- make study: {name} -->\n");
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once("<!-- end -->")?;
    Some(format!("{before}{begin}{table}<!-- end -->{after}"))
}

#[cfg(test)]
mod tests {
    use super::replaced;

    #[test]
    fn a_table_is_replaced_and_the_rest_stays() {
        let text = "A\n<!-- make study: one -->\nold\n<!-- end -->\nB\n<!-- make study: two -->\n<!-- end -->\nC\n";
        let once = replaced(text, "two", "| 2 |\n").unwrap_or_default();
        let twice = replaced(&once, "one", "").unwrap_or_default();
        let expected = "A\n<!-- make study: one -->\n<!-- end -->\nB\n<!-- make study: two -->\n| 2 |\n<!-- end -->\nC\n";
        assert_eq!(twice, expected);
        assert_eq!(replaced(text, "three", ""), None);
    }
}
