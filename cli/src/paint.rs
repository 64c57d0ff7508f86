// SPDX-License-Identifier: GPL-2.0

//! Colours: few, and from the sixteen that every terminal has in shades its user can read.

use exitmeter_meter::phase::Phase;

/// How a text looks in colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As all other text.
    Plain,
    /// What names a part.
    Strong,
    /// The title of a column.
    Title,
    /// What belongs to a phase.
    Of(Phase),
    /// What should not be.
    Warning,
}

impl Style {
    /// The parameters of the terminal's SGR sequence; none for plain text.
    const fn parameters(self) -> Option<&'static str> {
        Some(match self {
            Style::Plain => return None,
            Style::Strong => "1",
            Style::Title => "4",
            // Blue and yellow, the two that everybody can tell apart, are those seen most.
            Style::Of(Phase::Guest) => "34",
            Style::Of(Phase::Kernel) => "33",
            Style::Of(Phase::User) => "35",
            Style::Of(Phase::Blocked) => "36",
            Style::Of(Phase::Preempted) | Style::Warning => "31",
        })
    }
}

/// A text in its style, if colours are wanted.
pub fn paint(text: &str, style: Style, color: bool) -> String {
    match style.parameters().filter(|_| color && !text.is_empty()) {
        Some(parameters) => format!("\x1b[{parameters}m{text}\x1b[0m"),
        None => text.to_owned(),
    }
}
