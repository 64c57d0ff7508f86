// SPDX-License-Identifier: GPL-2.0

//! The standard output, as every command prints to it: piece by piece, with colours where they
//! can be seen, as wide as the terminal is, and quiet when nobody reads on.

use std::{
    io::{self, ErrorKind, IsTerminal, Write},
    os::fd::AsFd,
};

use clap::ValueEnum;
use serde::Serialize;

use crate::{names::words, numbers};

/// When to print in colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// On a terminal, unless NO_COLOR is set or TERM is dumb.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// In no case.
    Never,
}

impl When {
    /// Whether it is now, where text goes to.
    fn on(self, to: &impl IsTerminal) -> bool {
        match self {
            When::Always => true,
            When::Never => false,
            When::Auto => to.is_terminal() && colors_are_welcome(|name| std::env::var_os(name)),
        }
    }
}

/// How text is to look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// How many characters a line may have; `None` when that does not matter.
    pub width: Option<usize>,
    /// Whether to use colours.
    pub color: bool,
    /// Whether to use ASCII alone.
    pub ascii: bool,
}

impl Look {
    /// Return a bar for a part of a whole that would fill so many characters.
    pub fn bar(&self, part: u128, whole: u128, width: u32) -> String {
        match self.ascii {
            true => numbers::ascii_bar(part, whole, width),
            false => numbers::bar(part, whole, width),
        }
    }

    /// Return a text that others wrote as it is to be shown.
    pub fn plain(&self, text: &str) -> String {
        match self.ascii {
            true => words::ascii(text),
            false => text.to_owned(),
        }
    }
}

/// Why nothing more can be printed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The reader has gone. Not a failure: whoever reads has read enough.
    #[error("nobody reads the standard output any more")]
    Closed,
    /// It cannot be written.
    #[error("cannot write to the standard output: {0}")]
    Unwritable(io::Error),
    /// Data has no form as JSON.
    #[error("cannot print JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl Error {
    /// Whether a command failed with nothing but that its reader has gone.
    pub fn is_closed(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(Error::Closed))
    }
}

/// Where a command prints to.
pub struct Output {
    to: Box<dyn Write>,
    look: Look,
    color: When,
}

impl Output {
    /// The standard output.
    pub fn stdout(color: When) -> Self {
        let stdout = io::stdout();
        Self {
            look: Look {
                width: width(&stdout),
                color: color.on(&stdout),
                ascii: !is_utf8(),
            },
            to: Box::new(stdout),
            color,
        }
    }

    /// How text is to look on another one than the standard output.
    pub fn look_of(&self, other: &(impl IsTerminal + AsFd)) -> Look {
        Look {
            width: width(other),
            color: self.color.on(other),
            ascii: self.look.ascii,
        }
    }

    /// How text is to look there.
    pub fn look(&self) -> Look {
        self.look
    }

    /// Prints text, which is seen at once.
    ///
    /// # Errors
    ///
    /// When it cannot be written, or nobody reads it.
    pub fn print(&mut self, text: &str) -> Result<(), Error> {
        self.write(text.as_bytes())
    }

    /// Writes what is not text.
    ///
    /// # Errors
    ///
    /// As [`Self::print`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = self.to.write_all(bytes);
        written.and_then(|()| self.to.flush()).map_err(|error| {
            if error.kind() == ErrorKind::BrokenPipe {
                Error::Closed
            } else {
                Error::Unwritable(error)
            }
        })
    }

    /// Prints data as JSON for people and programs, over many lines.
    ///
    /// # Errors
    ///
    /// As [`Self::print`].
    pub fn json(&mut self, data: &impl Serialize) -> Result<(), Error> {
        self.print(&(serde_json::to_string_pretty(data)? + "\n"))
    }

    /// Prints data as JSON on one line, as one of many.
    ///
    /// # Errors
    ///
    /// As [`Self::print`].
    pub fn json_line(&mut self, data: &impl Serialize) -> Result<(), Error> {
        self.print(&(serde_json::to_string(data)? + "\n"))
    }
}

/// Whether the environment has nothing against colours (see https://no-color.org).
fn colors_are_welcome(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> bool {
    let unwanted = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    !unwanted && variable("TERM").is_some_and(|value| value != "dumb")
}

/// Whether what reads the output knows UTF-8: by the locale, as setlocale(3) finds it, and unless TERM
/// says that it is dumb.
pub fn is_utf8() -> bool {
    utf8_is_known(|name| std::env::var_os(name))
}

fn utf8_is_known(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> bool {
    let names = ["LC_ALL", "LC_CTYPE", "LANG"];
    let mut set = names.into_iter().filter_map(&variable);
    let locale = set.find(|value| !value.is_empty()).unwrap_or_default();
    let locale = locale.to_string_lossy().to_ascii_lowercase();
    let is_utf8 = locale.contains("utf-8") || locale.contains("utf8");
    is_utf8 && variable("TERM").is_none_or(|value| value != "dumb")
}

/// How wide lines may be: COLUMNS if it is set, else the terminal's width if there is one.
fn width(to: &impl AsFd) -> Option<usize> {
    let columns = std::env::var("COLUMNS").ok();
    let columns = columns.and_then(|text| text.parse().ok());
    columns.filter(|columns| *columns > 0).or_else(|| {
        let (width, _) = terminal_size::terminal_size_of(to)?;
        Some(width.0.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colors_need_a_terminal_that_has_them_and_a_user_who_wants_them() {
        let welcome = |set: &[(&str, &str)]| {
            colors_are_welcome(|name| {
                let found = set.iter().find(|(variable, _)| *variable == name);
                found.map(|(_, value)| value.into())
            })
        };
        assert!(welcome(&[("TERM", "xterm")]));
        assert!(welcome(&[("TERM", "xterm"), ("NO_COLOR", "")]));
        assert!(!welcome(&[("TERM", "xterm"), ("NO_COLOR", "1")]));
        assert!(!welcome(&[("TERM", "dumb")]));
        assert!(!welcome(&[]));
    }

    #[test]
    fn utf8_needs_a_locale_that_has_it_and_a_terminal_that_is_not_dumb() {
        let known = |set: &[(&str, &str)]| {
            utf8_is_known(|name| {
                let found = set.iter().find(|(variable, _)| *variable == name);
                found.map(|(_, value)| value.into())
            })
        };
        assert!(known(&[("LANG", "C.UTF-8")]));
        assert!(known(&[("LANG", "C"), ("LC_CTYPE", "de_DE.utf8")]));
        assert!(known(&[
            ("LC_ALL", ""),
            ("LANG", "en_US.UTF-8"),
            ("TERM", "xterm")
        ]));
        assert!(!known(&[("LC_ALL", "C"), ("LANG", "en_US.UTF-8")]));
        assert!(!known(&[("LC_ALL", "de_DE.ISO-8859-1")]));
        assert!(!known(&[("LANG", "en_US.UTF-8"), ("TERM", "dumb")]));
        assert!(!known(&[]));
    }
}
