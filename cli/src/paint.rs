// SPDX-License-Identifier: GPL-2.0

//! Terminal colours. Only the sixteen base colours are used: every terminal lets its user choose
//! readable shades for them.

use exitmeter_meter::phase::Phase;

/// Style of a text when colours are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Body text.
    Plain,
    /// The name of a section.
    Strong,
    /// A column title.
    Title,
    /// A number or word that belongs to this phase.
    Phase(Phase),
    /// A problem that the user should notice.
    Warning,
}

impl Style {
    /// Return the parameters of the terminal's SGR sequence, or `None` for plain text.
    const fn parameters(self) -> Option<&'static str> {
        Some(match self {
            Style::Plain => return None,
            Style::Strong => "1",
            Style::Title => "4",
            // The most frequent phases get blue and yellow, which everybody can tell apart.
            Style::Phase(Phase::Guest) => "34",
            Style::Phase(Phase::Kernel) => "33",
            Style::Phase(Phase::User) => "35",
            Style::Phase(Phase::Halted) => "36",
            Style::Phase(Phase::Waiting) => "32",
            Style::Phase(Phase::Preempted) | Style::Warning => "31",
        })
    }
}

/// Return `text` in its style if `color` is set, else as it is.
pub fn paint(text: &str, style: Style, color: bool) -> String {
    match style.parameters().filter(|_| color && !text.is_empty()) {
        Some(parameters) => format!("\x1b[{parameters}m{text}\x1b[0m"),
        None => text.to_owned(),
    }
}
