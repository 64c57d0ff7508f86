// SPDX-License-Identifier: GPL-2.0

//! `exitmeter man`: the manual pages.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap_mangen::Man;

/// Write the manual pages, one for each command.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
make install installs them where man(1) looks.

Examples:
  exitmeter man /tmp && man /tmp/exitmeter-report.1")]
pub struct Args {
    /// Folder to write to. It is created if it does not exist.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

impl Args {
    /// Write the manual pages of `command` and its subcommands.
    ///
    /// # Errors
    ///
    /// Returns an error if the folder cannot be written to.
    pub fn run(self, command: clap::Command) -> anyhow::Result<()> {
        let mut command = command.disable_help_subcommand(true);
        // Give each subcommand its full name.
        command.build();
        fs::create_dir_all(&self.folder)
            .and_then(|()| pages(&command, &self.folder))
            .with_context(|| format!("cannot write to {}", self.folder.display()))
    }
}

/// Write the pages of a command and of its subcommands.
fn pages(command: &clap::Command, folder: &Path) -> io::Result<()> {
    for below in command.get_subcommands() {
        pages(below, folder)?;
    }
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let help = command.get_after_help().map(ToString::to_string);
    sections(&help.unwrap_or_default(), &mut page)?;
    if command.get_version().is_some() {
        man.render_version_section(&mut page)?;
    }
    fs::write(folder.join(man.get_filename()), page)
}

/// Write the end of a command's help as sections of the page. A blank line separates the parts of
/// the help, and some parts begin with a title.
fn sections(help: &str, page: &mut impl Write) -> io::Result<()> {
    let mut notes = false;
    for part in help.split("\n\n").filter(|part| !part.is_empty()) {
        let titled = ["Exit status:\n", "Examples:\n"]
            .into_iter()
            .find_map(|title| Some((title, part.strip_prefix(title)?)));
        match titled {
            // Examples and exit statuses are copied line by line.
            Some((title, lines)) => {
                let title = title.trim_end_matches(":\n").to_uppercase();
                write!(page, ".SH \"{title}\"\n.nf\n")?;
                for line in lines.lines() {
                    writeln!(page, "{}", escape(line.strip_prefix("  ").unwrap_or(line)))?;
                }
                writeln!(page, ".fi")?;
            }
            None => {
                writeln!(page, "{}", if notes { ".PP" } else { ".SH NOTES" })?;
                notes = true;
                for line in part.lines() {
                    writeln!(page, "{}", escape(line))?;
                }
            }
        }
    }
    Ok(())
}

/// Escape a line for roff.
fn escape(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    match line.starts_with(['.', '\'']) {
        true => format!("\\&{line}"),
        false => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_parts_become_sections() {
        let mut page = Vec::new();
        let help =
            "A note.\n\n.Another-one\n\nExit status:\n  0  fine\n     so\n\nExamples:\n  a \\ b";
        sections(help, &mut page).expect("memory");
        assert_eq!(
            String::from_utf8(page).expect("text"),
            ".SH NOTES\nA note.\n.PP\n\\&.Another\\-one\n.SH \"EXIT STATUS\"\n.nf\n0  fine\n   so\n.fi\n\
             .SH \"EXAMPLES\"\n.nf\na \\e b\n.fi\n"
        );
    }
}
