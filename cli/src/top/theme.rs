// SPDX-License-Identifier: GPL-2.0

//! How things look, with colours and without.

use exitmeter_meter::phase::Phase;
use ratatui::style::{Color, Modifier, Style};

/// The looks.
#[derive(Clone, Copy, Debug)]
pub struct Theme {
    color: bool,
}

impl Theme {
    /// With colours or without.
    pub fn new(color: bool) -> Self {
        Self { color }
    }

    fn with(self, color: Color) -> Style {
        if self.color {
            Style::new().fg(color)
        } else {
            Style::new()
        }
    }

    /// Of titles of columns.
    pub fn title(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// Of what is said beside.
    pub fn quiet(self) -> Style {
        self.with(Color::DarkGray)
    }

    /// Of the line that is selected.
    pub fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// Of keys.
    pub fn key(self) -> Style {
        self.with(Color::Cyan).add_modifier(Modifier::BOLD)
    }

    /// Of what is to be seen.
    pub fn notice(self) -> Style {
        self.with(Color::Yellow).add_modifier(Modifier::BOLD)
    }

    /// Of bars.
    pub fn bars(self) -> Style {
        self.with(Color::Blue)
    }

    /// Of a phase.
    pub fn phase(self, phase: Phase) -> Style {
        self.with(match phase {
            Phase::Guest => Color::Green,
            Phase::Kernel => Color::LightRed,
            Phase::User => Color::Blue,
            Phase::Blocked => Color::Gray,
            Phase::Preempted => Color::DarkGray,
        })
    }
}

/// What a phase is drawn with, so that colours are not all that tells them apart.
pub fn texture(phase: Phase) -> char {
    match phase {
        Phase::Guest => '█',
        Phase::Kernel => '▓',
        Phase::User => '▒',
        Phase::Blocked => '·',
        Phase::Preempted => '░',
    }
}
