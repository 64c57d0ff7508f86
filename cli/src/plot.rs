// SPDX-License-Identifier: GPL-2.0

//! `exitmeter plot`: draws a recording.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::ValueEnum;

use self::{
    series::{Part, Series},
    svg::Picture,
};
use crate::{numbers::exact, output::Output, recording::read::Ending, source};

mod axis;
mod chart;
mod cumulative;
mod font;
mod html;
mod latency;
mod palette;
mod phases;
mod png;
mod rate;
mod series;
mod svg;

/// Draws a recording: as SVG, PNG, or a page with all charts and their numbers.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Colours can be told apart by those who confuse some. A page is one file, without scripts
and without anything from elsewhere; point at an area for its name.

Examples:
  exitmeter plot boot.rec -o boot.html
  exitmeter plot boot.rec -o rate.svg --kind rate --vm 1234
  exitmeter plot boot.rec -o latency.png --kind latency --from 2 --to 4.5")]
pub struct Args {
    /// The recording, made by `exitmeter record`.
    #[arg(value_name = "FILE")]
    recording: PathBuf,
    /// The file to draw to; its name ends in .svg, .png or .html. A dash for the standard
    /// output.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// What to write, when the file's name does not tell.
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// What to draw.
    #[arg(short, long, value_enum, default_value_t = Kind::All)]
    kind: Kind,
    /// Only the VM of this name, or of this process.
    #[arg(long, value_name = "PID|NAME")]
    vm: Option<String>,
    /// Only from so many seconds after the recording's beginning on.
    #[arg(long, value_name = "SECONDS")]
    from: Option<f64>,
    /// Only up to so many seconds after the recording's beginning.
    #[arg(long, value_name = "SECONDS")]
    to: Option<f64>,
    /// What stands below each title, instead of what was recorded.
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
}

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Lines and letters, for any size.
    Svg,
    /// Pixels.
    Png,
    /// A page for a browser.
    Html,
}

/// What to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Exits per second by reason, over time.
    Rate,
    /// Where the time of the vCPUs went, over time.
    Phases,
    /// How the number of exits grows.
    Cumulative,
    /// What single exits cost, by reason.
    Latency,
    /// One below the other.
    All,
}

impl Args {
    /// Draws.
    ///
    /// # Errors
    ///
    /// When the recording cannot be read, has no such part, or the picture cannot be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        let format = self.format()?;
        let bytes = source::read(&self.recording)?;
        let part = Part {
            vm: self.vm.clone(),
            from: self.from,
            to: self.to,
        };
        let series = Series::read(&self.recording, &bytes, &part)?;
        match &series.ending {
            Ending::Told(_) => {}
            Ending::Cut => self.warn("is cut off; this is what it has up to there"),
            Ending::Damaged => self.warn("is damaged; this is what it has up to there"),
        }
        let pictures = self.pictures(&series)?;
        let file = match format {
            Format::Html => {
                let title = format!("Exits in {}", name(&self.recording));
                html::page(&title, &facts(&series), &pictures, &series).into_bytes()
            }
            Format::Svg => self.one(pictures).into_bytes(),
            Format::Png => png::render(&self.one(pictures))?,
        };
        self.write(out, &file)
    }

    fn format(&self) -> anyhow::Result<Format> {
        let ending = self.output.extension().and_then(OsStr::to_str);
        let named = ending.and_then(|ending| Format::from_str(ending, true).ok());
        self.format.or(named).with_context(|| {
            let file = self.output.display();
            format!("cannot tell from the name {file} what to write: let it end in .svg, .png or .html, or say --format")
        })
    }

    fn warn(&self, text: &str) {
        eprintln!("exitmeter: {} {text}", self.recording.display());
    }

    /// The pictures that were asked for, with their titles.
    fn pictures(&self, series: &Series) -> anyhow::Result<Vec<(String, Picture)>> {
        let layers = palette::layers(series);
        let subtitle = self.title.clone().unwrap_or_else(|| self.subtitle(series));
        let wanted = |kind| self.kind == kind || self.kind == Kind::All;
        let mut pictures = Vec::new();
        let mut add = |name: &str, picture| pictures.push((name.to_owned(), picture));
        if wanted(Kind::Rate) {
            add(
                "exits per second by reason",
                rate::draw(series, &layers, &subtitle),
            );
        }
        if wanted(Kind::Phases) {
            add("phases over time", phases::draw(series, &subtitle));
        }
        if wanted(Kind::Cumulative) {
            add(
                "exits over time",
                cumulative::draw(series, &layers, &subtitle),
            );
        }
        if wanted(Kind::Latency) {
            match latency::draw(series, &layers, &subtitle) {
                Some(picture) => add("cost of exits by reason", picture),
                None if self.kind == Kind::All => {}
                None => anyhow::bail!(
                    "no exit in that part of {} has a cost that is known: draw another part, or \
                     record with a module whose snapshots have histograms (version 1.1)",
                    self.recording.display()
                ),
            }
        }
        Ok(pictures)
    }

    /// What was recorded, in a line.
    fn subtitle(&self, series: &Series) -> String {
        let mut parts = vec![name(&self.recording)];
        parts.push(match series.vms.len() {
            0 => "no VM".to_owned(),
            1..=3 => series.vms.iter().cloned().collect::<Vec<_>>().join(", "),
            many => format!("{many} VMs"),
        });
        let (from, to) = series.range();
        parts.push(format!(
            "{} exits in {:.1} s",
            exact(series.sum.exits),
            to - from
        ));
        for about in ["kernel", "cpu"] {
            parts.extend(series.about.get(about).cloned());
        }
        parts.join(" \u{2013} ")
    }

    /// All pictures in one.
    fn one(&self, pictures: Vec<(String, Picture)>) -> String {
        let (names, pictures): (Vec<_>, Vec<_>) = pictures.into_iter().unzip();
        Picture::stacked(&pictures).svg(&names.join(", "))
    }

    fn write(&self, out: &mut Output, bytes: &[u8]) -> anyhow::Result<()> {
        if self.output != Path::new("-") {
            let file = self.output.display();
            return fs::write(&self.output, bytes).with_context(|| format!("cannot write {file}"));
        }
        Ok(out.write(bytes)?)
    }
}

/// What is told of a recording on its page.
fn facts(series: &Series) -> Vec<(String, String)> {
    let (from, to) = series.range();
    let mut facts = vec![
        ("exits".to_owned(), exact(series.sum.exits)),
        (
            "time".to_owned(),
            format!(
                "{:.2} s, from {from:.2} s on, in {} snapshots",
                to - from,
                exact(series.snapshots as u64)
            ),
        ),
        (
            "VMs".to_owned(),
            series.vms.iter().cloned().collect::<Vec<_>>().join(", "),
        ),
    ];
    let khz = series
        .tsc_khz
        .map(|khz| format!("{:.3} MHz", f64::from(khz) / 1000.0));
    facts.push((
        "TSC".to_owned(),
        khz.unwrap_or("of unknown rate".to_owned()),
    ));
    let about = series.about.iter();
    facts.extend(about.map(|(name, text)| (name.clone(), text.clone())));
    facts.push((
        "end".to_owned(),
        match &series.ending {
            Ending::Told(how) => how.clone(),
            Ending::Cut => "cut off".to_owned(),
            Ending::Damaged => "damaged".to_owned(),
        },
    ));
    facts
}

/// A file's name without its folder.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
