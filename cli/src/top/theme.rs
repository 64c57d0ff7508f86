// SPDX-License-Identifier: GPL-2.0

//! Colours and textures of the screen.

use exitmeter_meter::phase::Phase;
use ratatui::style::{Color, Modifier, Style};

/// Styles, with or without colours.
#[derive(Clone, Copy, Debug)]
pub struct Theme {
    color: bool,
}

impl Theme {
    /// Create the styles.
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

    /// Style of column titles.
    pub fn title(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    /// Style of secondary text.
    pub fn quiet(self) -> Style {
        self.with(Color::DarkGray)
    }

    /// Style of the selected line.
    pub fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// Style of keys.
    pub fn key(self) -> Style {
        self.with(Color::Cyan).add_modifier(Modifier::BOLD)
    }

    /// Style of notices.
    pub fn notice(self) -> Style {
        self.with(Color::Yellow).add_modifier(Modifier::BOLD)
    }

    /// Style of bars.
    pub fn bars(self) -> Style {
        self.with(Color::Blue)
    }

    /// Style of a phase.
    pub fn phase(self, phase: Phase) -> Style {
        self.with(match phase {
            Phase::Guest => Color::Green,
            Phase::Kernel => Color::LightRed,
            Phase::User => Color::Blue,
            Phase::Halted => Color::Gray,
            Phase::Waiting => Color::Yellow,
            Phase::Preempted => Color::DarkGray,
        })
    }
}

/// Return the character that draws a phase, so that phases differ without colours, too.
pub fn texture(phase: Phase) -> char {
    match phase {
        Phase::Guest => '█',
        Phase::Kernel => '▓',
        Phase::User => '▒',
        Phase::Halted => '·',
        Phase::Waiting => '~',
        Phase::Preempted => '░',
    }
}
