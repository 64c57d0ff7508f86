// SPDX-License-Identifier: GPL-2.0

//! Formats tables in Markdown.

use exitmeter::{
    model::{Ledger, ReasonRow},
    numbers::exact,
};

/// A Markdown table under construction.
pub struct MarkdownTable {
    text: String,
}

impl MarkdownTable {
    /// Create a table without rows. The first column, and those whose titles begin with `<`, are aligned left, for words; the
    /// others are aligned right, for numbers.
    pub fn new<S: AsRef<str>>(titles: impl IntoIterator<Item = S>) -> Self {
        let (mut names, mut lines) = (String::from("|"), String::from("|"));
        for (place, title) in titles.into_iter().enumerate() {
            let title = title.as_ref();
            let words = title.strip_prefix('<');
            names += &format!(" {} |", words.unwrap_or(title));
            lines += if place == 0 || words.is_some() {
                " --- |"
            } else {
                " ---: |"
            };
        }
        Self {
            text: format!("{names}\n{lines}\n"),
        }
    }

    /// Add a row.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.text.push('|');
        for cell in cells {
            self.text += &format!(" {} |", cell.as_ref());
        }
        self.text.push('\n');
    }

    /// Return the text of the table.
    pub fn text(self) -> String {
        self.text
    }
}

/// Format a count; 0 is blank.
pub fn count(number: u64) -> String {
    match number {
        0 => String::new(),
        number => exact(number),
    }
}

/// Format a share in percent.
pub fn percent<N: Into<u128>>(part: N, whole: N) -> String {
    let (part, whole): (u128, u128) = (part.into(), whole.into());
    match whole {
        0 => String::new(),
        _ => format!("{:.0}%", part as f64 * 100.0 / whole as f64),
    }
}

/// Return the mean of the kernel cycles of a reason's exits.
pub fn mean_kernel_cycles(row: &ReasonRow) -> f64 {
    row.cycles.kernel as f64 / row.exits as f64
}

/// Return the reasons that have exits, most frequent first.
pub fn by_frequency(ledger: &Ledger) -> Vec<ReasonRow> {
    let mut rows: Vec<_> = ledger
        .reasons
        .iter()
        .copied()
        .filter(|row| row.exits > 0)
        .collect();
    rows.sort_by_key(|row| (std::cmp::Reverse(row.exits), row.label.key()));
    rows
}

/// Format the `most` most frequent reasons, with their shares of all exits.
pub fn most_frequent(ledger: &Ledger, most: usize) -> String {
    let rows = by_frequency(ledger);
    let words = rows.iter().take(most);
    let words = words.map(|row| format!("{} {}", row.label, percent(row.exits, ledger.exits)));
    words.collect::<Vec<_>>().join(", ")
}
