// SPDX-License-Identifier: GPL-2.0

//! Tables for a terminal: columns as wide as what stands in them, two blanks apart.

use std::fmt;

/// On which side of its column a text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// As words do.
    Left,
    /// As numbers do.
    Right,
}

/// A table with a line of titles.
#[derive(Clone, Debug)]
pub struct Table<const COLUMNS: usize> {
    sides: [Side; COLUMNS],
    rows: Vec<[String; COLUMNS]>,
    shown: [bool; COLUMNS],
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// A table with these columns and no line yet.
    pub fn new(columns: [(&str, Side); COLUMNS]) -> Self {
        Self {
            sides: columns.map(|(_, side)| side),
            rows: vec![columns.map(|(title, _)| title.to_owned())],
            shown: [true; COLUMNS],
        }
    }

    /// Adds a line.
    pub fn row(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells);
    }

    /// Does not show the columns of these titles.
    pub fn leave_out(&mut self, titles: &[&str]) {
        for (shown, title) in self.shown.iter_mut().zip(self.rows.iter().flatten()) {
            *shown &= !titles.contains(&title.as_str());
        }
    }
}

/// How wide a text is: of the characters in use here each takes one column.
fn width(text: &str) -> usize {
    text.chars().count()
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = [0; COLUMNS];
        for row in &self.rows {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = width(cell).max(*widest);
            }
        }
        for row in &self.rows {
            let mut line = String::new();
            let columns = row.iter().zip(&self.sides).zip(&widths).zip(&self.shown);
            for ((cell, side), widest) in columns.filter(|(_, shown)| **shown).map(|(c, _)| c) {
                let pad = " ".repeat(widest.saturating_sub(width(cell)));
                line += &match side {
                    Side::Left => format!("{cell}{pad}  "),
                    Side::Right => format!("{pad}{cell}  "),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new([("reason", Side::Left), ("exits", Side::Right)]);
        table.row(["HLT".to_owned(), "7".to_owned()]);
        table.row(["IO_INSTRUCTION".to_owned(), "1,234,567".to_owned()]);
        table.row(["█▏".to_owned(), String::new()]);
        assert_eq!(
            table.to_string(),
            "\
reason              exits
HLT                     7
IO_INSTRUCTION  1,234,567
█▏
"
        );
        table.leave_out(&["exits", "HLT"]);
        assert_eq!(table.to_string(), "reason\nHLT\nIO_INSTRUCTION\n█▏\n");
    }
}
