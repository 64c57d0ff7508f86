// SPDX-License-Identifier: GPL-2.0

//! `exitmeter plot`: pictures of a recording.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::ValueEnum;
use exitmeter_meter::reasons;

pub(crate) use self::series::Series;
use self::{series::Part, svg::Picture};
use crate::{
    model::delta::NEW_LIFE,
    numbers::{clock_rate, exact},
    output::Output,
    recording::read::Ending,
    source,
    why::{model::Weight, select, symbols::Symbols},
};

mod axis;
mod chart;
mod cumulative;
mod details;
mod font;
pub(crate) mod html;
mod latency;
mod palette;
mod phases;
#[cfg(feature = "png")]
mod png;
mod rate;
pub(crate) mod series;
mod slow;
pub(crate) mod svg;

/// Draw a recording as SVG, as PNG, or as a page with all charts and their numbers.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
If the meter began anew, as when the module was loaded again, the charts have a gap with a mark.

The charts of details and of slow exits need a recording with details: made by
`exitmeter record --why`, or while details were on. The leading details are those with the most
exits, or with --weight ticks those with the most kernel cycles; an exit and its cycles count at the
exit's end. A slow exit is a mark at its beginning, at the height of its duration. Each vCPU has the
16 slowest exits of each window of about 10 s.

The colours suit readers with colour blindness. A page is one file, without scripts and without
content from elsewhere; point at an area for its name.

Examples:
  exitmeter plot boot.rec -o boot.html
  exitmeter plot boot.rec -o rate.svg --kind rate --vm 1234
  exitmeter plot boot.rec -o latency.png --kind latency --from 2 --to 4.5
  exitmeter plot why.rec -o ports.svg --kind details --reason IO_INSTRUCTION
  exitmeter plot why.rec -o slow.svg --kind slow --symbols guest.kallsyms")]
pub struct Args {
    /// Recording, made by `exitmeter record`.
    #[arg(value_name = "FILE")]
    recording: PathBuf,
    /// File to draw to; its name ends in .svg, .png or .html. A dash for the standard output.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Format to write, if the file's name does not end in it.
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Chart to draw.
    #[arg(short, long, value_enum, default_value_t = Kind::All)]
    kind: Kind,
    /// Draw only this VM: a process id, kvm-PID, name, UUID, id or systemd unit.
    #[arg(long, value_name = "PID|NAME|UUID|ID")]
    vm: Option<String>,
    /// In the charts of details and slow exits, draw only this reason: its name or its number.
    #[arg(long, value_name = "REASON")]
    reason: Option<String>,
    /// Sort key of the details, and quantity in their chart: exits, or kernel cycles (ticks).
    #[arg(long, value_enum, default_value_t = Weight::Exits)]
    weight: Weight,
    /// Name the code of slow exits by the symbols in FILE: the guest's /proc/kallsyms, or its
    /// System.map.
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Start this many seconds after the recording's beginning.
    #[arg(long, value_name = "SECONDS")]
    from: Option<f64>,
    /// Stop this many seconds after the recording's beginning.
    #[arg(long, value_name = "SECONDS")]
    to: Option<f64>,
    /// Text below each title, instead of a summary of the recording.
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
}

/// Format of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Vector graphics, for any size.
    Svg,
    /// Pixels.
    Png,
    /// Page for a browser.
    Html,
}

/// Chart to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Exits per second by reason, over time.
    Rate,
    /// Share of the vCPUs' time by phase, over time.
    Phases,
    /// Number of exits since the beginning, over time.
    Cumulative,
    /// Cost of single exits, by reason.
    Latency,
    /// Leading details of exits, over time.
    Details,
    /// Slowest exits.
    Slow,
    /// All charts, one below the other.
    All,
}

impl Args {
    /// Draw the charts.
    ///
    /// # Errors
    ///
    /// Returns an error if the recording cannot be read, lacks such a part, or the picture cannot
    /// be written.
    pub fn run(self, out: &mut Output) -> anyhow::Result<()> {
        let format = self.format()?;
        let bytes = source::read(&self.recording)?;
        let part = Part {
            vm: self.vm.clone(),
            from: self.from,
            to: self.to,
            reason: self.reason.clone(),
            symbols: Symbols::read_optional(self.symbols.as_deref())?,
        };
        let series = Series::read(&self.recording, &bytes, &part)?;
        if self.symbols.is_some() && series.vms.len() > 1 {
            return Err(select::Error::Symbols(series.vms.len()).into());
        }
        match &series.ending {
            Ending::Complete(_) => {}
            Ending::Cut => self.warn("is cut off; this is what it has up to there"),
            Ending::Damaged => self.warn("is damaged; this is what it has up to there"),
        }
        if !series.breaks.is_empty() {
            let times = series.breaks.iter().map(|time| format!("{time:.2} s"));
            let times = times.collect::<Vec<_>>().join(", ");
            self.warn(&format!("has a gap: {NEW_LIFE} at {times}"));
        }
        let pictures = self.pictures(&series, &part)?;
        let file = match format {
            Format::Html => {
                let title = format!("Exits in {}", name(&self.recording));
                let facts = facts(&series);
                html::page(&title, &facts, &pictures, &series, self.weight).into_bytes()
            }
            Format::Svg => self.one(pictures).into_bytes(),
            #[cfg(feature = "png")]
            Format::Png => png::render(&self.one(pictures))?,
            #[cfg(not(feature = "png"))]
            Format::Png => anyhow::bail!(
                "this exitmeter was built without PNG (cargo build --features png has it); write .svg or .html"
            ),
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

    /// Draw the requested pictures, and return them with their titles.
    fn pictures(&self, series: &Series, part: &Part) -> anyhow::Result<Vec<(String, Picture)>> {
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
        let tables = series.details.is_some();
        if !tables && matches!(self.kind, Kind::Details | Kind::Slow) {
            anyhow::bail!(
                "{} has no details: they were off while it was recorded; \
                 'exitmeter record --why' turns them on",
                self.recording.display()
            );
        }
        let code = part.code(series.isa)?;
        let reason = code.and_then(|code| reasons::name(series.isa, code));
        let reason = reason.or(self.reason.as_deref());
        let nothing = |what: &str| {
            let of = reason.map_or_else(String::new, |reason| format!(" by {reason}"));
            anyhow::anyhow!(
                "there is no {what}{of} in that part of {}: draw another part, or another reason",
                self.recording.display()
            )
        };
        if wanted(Kind::Details) && tables {
            let exits_in_no_table = details::exits_in_no_table(series, code);
            match details::draw(series, self.weight, reason, exits_in_no_table, &subtitle) {
                Some(picture) => add("what exits were about", picture),
                None if self.kind == Kind::All => {}
                None => return Err(nothing("exit")),
            }
        }
        if wanted(Kind::Slow) && tables {
            match slow::draw(series, &layers, reason, &subtitle) {
                Some(picture) => add("the slowest exits", picture),
                None if self.kind == Kind::All => {}
                None => return Err(nothing("slow exit")),
            }
        }
        Ok(pictures)
    }

    /// Return a summary of the recording in one line.
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

    /// Return all pictures in one SVG.
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

/// Draw the current activity, each picture as SVG.
#[cfg(feature = "export")]
pub(crate) fn live(series: &Series) -> Vec<String> {
    let layers = palette::layers(series);
    let subtitle = "the latest at the right";
    let mut pictures = vec![
        phases::draw(series, subtitle).svg("phases over time"),
        rate::draw(series, &layers, subtitle).svg("exits per second by reason"),
    ];
    let latency = latency::draw(series, &layers, subtitle);
    pictures.extend(latency.map(|picture| picture.svg("cost of exits by reason")));
    pictures
}

/// Return the facts about a recording for its page.
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
    facts.push(("TSC".to_owned(), clock_rate(series.tsc_khz)));
    if series.details.is_none() {
        let none =
            "none: they were off while it was recorded; 'exitmeter record --why' turns them on";
        facts.push(("details".to_owned(), none.to_owned()));
    }
    if !series.breaks.is_empty() {
        let times = series.breaks.iter().map(|time| format!("at {time:.2} s"));
        facts.push((
            NEW_LIFE.to_owned(),
            times.collect::<Vec<_>>().join(", ") + "; what happened up to there is not known",
        ));
    }
    let about = series.about.iter();
    facts.extend(about.map(|(name, text)| (name.clone(), text.clone())));
    facts.push((
        "end".to_owned(),
        match &series.ending {
            Ending::Complete(how) => how.clone(),
            Ending::Cut => "cut off".to_owned(),
            Ending::Damaged => "damaged".to_owned(),
        },
    ));
    facts
}

/// Return the name of a file without its folder.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

#[cfg(all(test, feature = "png"))]
mod tests;
