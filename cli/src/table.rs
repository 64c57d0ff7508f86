// SPDX-License-Identifier: GPL-2.0

//! Tables for a terminal: columns as wide as their widest cell, two blanks apart.

use std::fmt;

use crate::{
    numbers::{exact, rough},
    output::TextOptions,
    paint::{paint, Style},
};

/// Alignment of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// For words.
    Left,
    /// For numbers.
    Right,
}

/// One cell of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Text in which each character is one terminal column wide.
    pub text: String,
    /// Style when colours are on.
    pub style: Style,
}

impl Cell {
    /// Create a cell.
    pub fn new(text: impl Into<String>, style: Style) -> Self {
        let text = text.into();
        Self { text, style }
    }

    /// Return true if the cell is empty, zero or a dash.
    fn is_blank(&self) -> bool {
        matches!(self.text.as_str(), "" | "0" | "-" | "0.0%")
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::new(text, Style::Plain)
    }
}

/// A table with a line of titles.
#[derive(Clone, Debug)]
pub struct Table<const COLUMNS: usize> {
    sides: [Side; COLUMNS],
    titles: [Cell; COLUMNS],
    rows: Vec<[Cell; COLUMNS]>,
    shown: [bool; COLUMNS],
    dropped: Vec<String>,
    gap: usize,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// Create a table with these columns and no rows.
    pub fn new(columns: [(&str, Side); COLUMNS]) -> Self {
        Self {
            sides: columns.map(|(_, side)| side),
            titles: columns.map(|(title, _)| Cell::new(title, Style::Title)),
            rows: Vec::new(),
            shown: [true; COLUMNS],
            dropped: Vec::new(),
            gap: 2,
        }
    }

    /// Return the table that `build` makes, with numbers in full if it fits the look's width. Else
    /// round the numbers, and drop columns until it fits. `spare` names the columns that may go, by
    /// title, the first to go first. Columns that hold nothing but zeros and dashes go before all
    /// others.
    pub fn fitted(
        options: TextOptions,
        spare: &[&str],
        build: impl Fn(fn(u128) -> String) -> Self,
    ) -> Self {
        let table = build(exact);
        match options.width {
            Some(width) if table.width() > width => {
                let mut table = build(rough);
                table.fit(width, spare);
                table
            }
            _ => table,
        }
    }

    /// Add a row.
    pub fn row(&mut self, cells: [impl Into<Cell>; COLUMNS]) {
        self.rows.push(cells.map(Into::into));
    }

    /// Hide the columns with these titles.
    pub fn hide(&mut self, titles: &[&str]) {
        for (shown, title) in self.shown.iter_mut().zip(&self.titles) {
            *shown &= !titles.contains(&title.text.as_str());
        }
    }

    /// Return the titles of columns that hold numbers but were dropped for lack of width.
    pub fn dropped(&self) -> &[String] {
        &self.dropped
    }

    /// Drop columns and narrow the gaps until the table is at most `allowed` wide, or nothing is
    /// left to drop.
    fn fit(&mut self, allowed: usize, spare: &[&str]) {
        if self.width() <= allowed {
            return;
        }
        self.gap = 1;
        let is_blank = |title: &&&str| {
            let column = self.titles.iter().position(|cell| cell.text == **title);
            column.is_some_and(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                cells.clone().count() > 0 && cells.clone().all(Cell::is_blank)
            })
        };
        let first: Vec<&str> = spare.iter().filter(is_blank).copied().collect();
        for title in first.iter().chain(spare) {
            if self.width() <= allowed {
                break;
            }
            self.hide(&[title]);
            if !first.contains(title) {
                self.dropped.push((*title).to_owned());
            }
        }
        self.gap = 2;
        if self.width() > allowed {
            self.gap = 1;
        }
    }

    /// Return the width of each column.
    fn widths(&self) -> [usize; COLUMNS] {
        let mut widths = [0; COLUMNS];
        for row in self.lines() {
            for (widest, cell) in widths.iter_mut().zip(row) {
                *widest = width(&cell.text).max(*widest);
            }
        }
        widths
    }

    /// Return the width of the table.
    fn width(&self) -> usize {
        let columns = self.widths().into_iter().zip(self.shown);
        let shown = columns.filter(|(_, shown)| *shown);
        shown
            .map(|(width, _)| width + self.gap)
            .sum::<usize>()
            .saturating_sub(self.gap)
    }

    /// Return the line of titles, then the rows.
    fn lines(&self) -> impl Iterator<Item = &[Cell; COLUMNS]> {
        std::iter::once(&self.titles).chain(&self.rows)
    }

    /// Format the table, with colours or without.
    pub fn text(&self, color: bool) -> String {
        let mut text = String::new();
        let widths = self.widths();
        for row in self.lines() {
            let columns = row.iter().zip(&self.sides).zip(widths).zip(self.shown);
            // Blanks that are printed only if a text follows.
            let mut ahead = 0;
            for (((cell, side), widest), _) in columns.filter(|(_, shown)| *shown) {
                let pad = widest.saturating_sub(width(&cell.text));
                let (before, after) = match side {
                    Side::Left => (0, pad),
                    Side::Right => (pad, 0),
                };
                ahead += before;
                if !cell.text.is_empty() {
                    text += &" ".repeat(std::mem::take(&mut ahead));
                    text += &paint(&cell.text, cell.style, color);
                }
                ahead += after + self.gap;
            }
            text.push('\n');
        }
        text
    }
}

/// Return the width of a text. Each character in use here is one terminal column wide.
fn width(text: &str) -> usize {
    text.chars().count()
}

/// Formats the table without colours.
impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table<3> {
        let mut table = Table::new([
            ("reason", Side::Left),
            ("exits", Side::Right),
            ("user", Side::Right),
        ]);
        table.row(["HLT", "7", "0"].map(str::to_owned));
        table.row(["IO_INSTRUCTION", "1,234,567", "0"].map(str::to_owned));
        table.row(["█▏", "", ""].map(str::to_owned));
        table
    }

    #[test]
    fn columns_line_up() {
        let mut table = table();
        assert_eq!(
            table.to_string(),
            "\
reason              exits  user
HLT                     7     0
IO_INSTRUCTION  1,234,567     0
█▏
"
        );
        table.hide(&["exits", "user", "HLT"]);
        assert_eq!(table.to_string(), "reason\nHLT\nIO_INSTRUCTION\n█▏\n");
    }

    #[test]
    fn empty_columns_are_dropped_first() {
        let fit = |width| {
            let mut table = table();
            table.fit(width, &["exits", "user"]);
            assert!(table
                .to_string()
                .lines()
                .all(|line| line.chars().count() <= width));
            assert_eq!(table.dropped().len(), usize::from(width < 24));
            table.to_string().lines().next().map(str::to_owned)
        };
        assert_eq!(fit(31).as_deref(), Some("reason              exits  user"));
        assert_eq!(fit(29).as_deref(), Some("reason             exits user"));
        assert_eq!(fit(28).as_deref(), Some("reason              exits"));
        assert_eq!(fit(24).as_deref(), Some("reason             exits"));
        assert_eq!(fit(23).as_deref(), Some("reason"));
    }

    #[test]
    fn narrow_tables_round_numbers() {
        let titles = |width| {
            let options = TextOptions {
                width,
                color: false,
                ascii: false,
            };
            let table = Table::fitted(options, &[], |number| {
                let mut table = Table::new([("exits", Side::Right)]);
                table.row([number(1_234_567)]);
                table
            });
            table.to_string()
        };
        assert_eq!(titles(None), "    exits\n1,234,567\n");
        assert_eq!(titles(Some(9)), "    exits\n1,234,567\n");
        assert_eq!(titles(Some(8)), "exits\n1.23M\n");
    }

    #[test]
    fn colors_do_not_change_the_text() {
        let mut plain = String::new();
        let mut escape = false;
        for character in table().text(true).chars() {
            match (escape, character) {
                (false, '\x1b') => escape = true,
                (true, 'm') => escape = false,
                (true, _) => {}
                (false, other) => plain.push(other),
            }
        }
        assert_eq!(plain, table().to_string());
        assert_ne!(table().text(true), plain);
    }
}
