// SPDX-License-Identifier: GPL-2.0

//! A table in Markdown.

use exitmeter::{
    model::{Ledger, ReasonRow},
    numbers::exact,
};

/// A table that is being filled: titles, the first of which belongs to words and the others to numbers.
pub struct Table {
    text: String,
}

impl Table {
    /// One without rows. A title that begins with `<` is of a column of words.
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

    /// Adds a row.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.text.push('|');
        for cell in cells {
            self.text += &format!(" {} |", cell.as_ref());
        }
        self.text.push('\n');
    }

    /// The table.
    pub fn text(self) -> String {
        self.text
    }
}

/// A count; nothing for none.
pub fn count(number: u64) -> String {
    match number {
        0 => String::new(),
        number => exact(number),
    }
}

/// A share in percent.
pub fn percent<N: Into<u128>>(part: N, whole: N) -> String {
    let (part, whole): (u128, u128) = (part.into(), whole.into());
    match whole {
        0 => String::new(),
        _ => format!("{:.0}%", part as f64 * 100.0 / whole as f64),
    }
}

/// The mean of a row's exits in cycles of the kernel.
pub fn mean(row: &ReasonRow) -> f64 {
    row.cycles.kernel as f64 / row.exits as f64
}

/// The reasons that exits have, the most frequent first.
pub fn frequent(ledger: &Ledger) -> Vec<ReasonRow> {
    let mut rows: Vec<_> = ledger
        .reasons
        .iter()
        .copied()
        .filter(|row| row.exits > 0)
        .collect();
    rows.sort_by_key(|row| (std::cmp::Reverse(row.exits), row.label.key()));
    rows
}

/// The reasons that lead, with their shares of all exits.
pub fn leading(ledger: &Ledger, most: usize) -> String {
    let rows = frequent(ledger);
    let words = rows.iter().take(most);
    let words = words.map(|row| format!("{} {}", row.label, percent(row.exits, ledger.exits)));
    words.collect::<Vec<_>>().join(", ")
}
