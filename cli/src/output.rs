// SPDX-License-Identifier: GPL-2.0

//! Printing to the standard output for every command: flushed after each piece, coloured and fitted
//! to the terminal, and silent once the reader is gone.

use std::{
    io::{self, ErrorKind, IsTerminal, Write},
    os::fd::AsFd,
};

use clap::ValueEnum;
use serde::Serialize;

use crate::{names::words, numbers};

/// Choice of `--color`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set or TERM is dumb.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl ColorChoice {
    /// Return true if text that goes to `to` gets colours.
    fn on(self, to: &impl IsTerminal) -> bool {
        match self {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => to.is_terminal() && colors_allowed(|name| std::env::var_os(name)),
        }
    }
}

/// Properties of the place that text is printed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TextOptions {
    /// Characters per line; `None` for no limit.
    pub width: Option<usize>,
    /// Use colours.
    pub color: bool,
    /// Use ASCII only.
    pub ascii: bool,
}

impl TextOptions {
    /// Return a bar for `part` of `whole`. A full bar has `width` characters.
    pub fn bar(&self, part: u128, whole: u128, width: u32) -> String {
        match self.ascii {
            true => numbers::ascii_bar(part, whole, width),
            false => numbers::bar(part, whole, width),
        }
    }

    /// Return a text from outside the tool in a form that can be printed here.
    pub fn plain(&self, text: &str) -> String {
        match self.ascii {
            true => words::ascii(text),
            false => text.to_owned(),
        }
    }
}

/// Error of printing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The reader closed the pipe. This is not a failure: the reader has read enough.
    #[error("nobody reads the standard output any more")]
    Closed,
    /// The write failed.
    #[error("cannot write to the standard output: {0}")]
    Unwritable(io::Error),
    /// The data cannot be written as JSON.
    #[error("cannot print JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl Error {
    /// Return true if a command failed only because its reader closed the pipe.
    pub fn is_closed(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(Error::Closed))
    }
}

/// Standard output of a command.
pub struct Output {
    to: Box<dyn Write>,
    options: TextOptions,
    color: ColorChoice,
}

impl Output {
    /// Open the standard output.
    pub fn stdout(color: ColorChoice) -> Self {
        let stdout = io::stdout();
        Self {
            options: TextOptions {
                width: width(&stdout),
                color: color.on(&stdout),
                ascii: !is_utf8(),
            },
            to: Box::new(stdout),
            color,
        }
    }

    /// Return the look of text on another stream than the standard output.
    pub fn look_of(&self, other: &(impl IsTerminal + AsFd)) -> TextOptions {
        TextOptions {
            width: width(other),
            color: self.color.on(other),
            ascii: self.options.ascii,
        }
    }

    /// Return the look of text on this output.
    pub fn text_options(&self) -> TextOptions {
        self.options
    }

    /// Print text and flush it.
    ///
    /// # Errors
    ///
    /// Returns an error if the write fails or the reader is gone.
    pub fn print(&mut self, text: &str) -> Result<(), Error> {
        self.write(text.as_bytes())
    }

    /// Write bytes that are not text and flush them.
    ///
    /// # Errors
    ///
    /// See [`Self::print`].
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

    /// Print data as indented JSON.
    ///
    /// # Errors
    ///
    /// See [`Self::print`].
    pub fn json(&mut self, data: &impl Serialize) -> Result<(), Error> {
        self.print(&(serde_json::to_string_pretty(data)? + "\n"))
    }

    /// Print data as one line of JSON, for streams of many records.
    ///
    /// # Errors
    ///
    /// See [`Self::print`].
    pub fn json_line(&mut self, data: &impl Serialize) -> Result<(), Error> {
        self.print(&(serde_json::to_string(data)? + "\n"))
    }
}

/// Return true unless the environment turns colours off (see <https://no-color.org>).
fn colors_allowed(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> bool {
    let unwanted = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    !unwanted && variable("TERM").is_some_and(|value| value != "dumb")
}

/// Return true if the output can show UTF-8: the locale, found as by setlocale(3), has it, and TERM
/// is not dumb.
pub fn is_utf8() -> bool {
    utf8_supported(|name| std::env::var_os(name))
}

fn utf8_supported(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> bool {
    let names = ["LC_ALL", "LC_CTYPE", "LANG"];
    let mut set = names.into_iter().filter_map(&variable);
    let locale = set.find(|value| !value.is_empty()).unwrap_or_default();
    let locale = locale.to_string_lossy().to_ascii_lowercase();
    let is_utf8 = locale.contains("utf-8") || locale.contains("utf8");
    is_utf8 && variable("TERM").is_none_or(|value| value != "dumb")
}

/// Return the width of a line: COLUMNS if it is set, else the terminal's width if there is one.
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
    fn colors_follow_term_and_no_color() {
        let welcome = |set: &[(&str, &str)]| {
            colors_allowed(|name| {
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
    fn utf8_follows_locale_and_term() {
        let known = |set: &[(&str, &str)]| {
            utf8_supported(|name| {
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
