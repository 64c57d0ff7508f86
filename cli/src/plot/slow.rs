// SPDX-License-Identifier: GPL-2.0

//! Chart of the slowest exits: a mark at the time of each, at the height of its duration.

use super::{
    axis,
    chart::{Chart, LegendLine, LEFT, LINE, PAIR, RIGHT, SMALL, TOP},
    font,
    palette::{self, Layer},
    series::{Series, SlowExit},
    svg::{Anchor, Picture, INK},
};
use crate::numbers::{exact, rough};

/// Number of exits that the chart describes in words.
const NAMED: usize = 5;
/// Radius of a mark, in pixels.
const RADIUS: f64 = 3.0;

/// Draw the chart. Returns `None` if there is no slow exit.
pub fn draw(
    series: &Series,
    layers: &[Layer],
    reason: Option<&str>,
    subtitle: &str,
) -> Option<Picture> {
    let unit = Unit::new(series);
    let most = unit.convert(series.slow.first()?.exit.took);
    let least = unit.convert(series.slow.last()?.exit.took);
    let colors: Vec<_> = layers
        .iter()
        .filter_map(|layer| {
            let its = |slow: &&SlowExit| layer.keys.contains(&slow.exit.label.key());
            let longest = series.slow.iter().find(its)?;
            Some(LegendLine {
                paint: layer.paint,
                dashes: None,
                name: layer.name.clone(),
                numbers: [
                    exact(series.slow.iter().filter(its).count() as u64),
                    unit.time(longest.exit.took),
                ],
            })
        })
        .collect();
    let named = series.slow.iter().take(NAMED);
    let named: Vec<_> = named.map(|slow| describe(slow, &unit)).collect();

    let title = match reason {
        Some(reason) => format!("The slowest exits by {reason}"),
        None => "The slowest exits".to_owned(),
    };
    let list = TOP + 14.0 + colors.len() as f64 * LINE;
    let height = list - TOP + LINE + 4.0 + named.len() as f64 * PAIR;
    let height = height.max(300.0);
    let mut chart = Chart::with_marks(&title, subtitle, height, &series.marks);
    let vertical = chart.vertical_logarithmic_axis(
        unit.name(),
        // Leave room for the numbers beside the marks.
        ((least / 1.5).max(1.0), most * 1.8),
        |value| unit.label(value),
    );
    let time = chart.time_axis(series.range());
    let place = |slow: &SlowExit| {
        (
            time.place(slow.at),
            vertical.place(unit.convert(slow.exit.took)),
        )
    };
    // The longest are drawn last, above the others.
    for slow in series.slow.iter().rev() {
        let paint = palette::reason(layers, slow.exit.label.key());
        let hint = hint(slow, &unit);
        chart
            .picture
            .disc(place(slow), RADIUS, paint.stroke(), &hint);
    }
    let mut taken: Vec<(f64, f64)> = Vec::new();
    for (number, slow) in series.slow.iter().take(NAMED).enumerate() {
        let text = (number + 1).to_string();
        if let Some(at) = beside(place(slow), &taken) {
            chart.picture.text(at, Anchor::Middle, SMALL, INK, &text);
            taken.push(at);
        }
    }
    chart.marks(&series.marks, time);
    chart.legend(["reason", "exits", "longest"], &colors);
    chart.list(list, "the longest", &named);
    Some(chart.done())
}

/// Return a place beside a mark for its number, where it covers no other number.
fn beside((x, y): (f64, f64), taken: &[(f64, f64)]) -> Option<(f64, f64)> {
    let (wide, high) = (font::width("0", SMALL) + 3.0, SMALL + 2.0);
    let middle = SMALL / 3.0;
    let side = RADIUS + 6.0;
    let places = [
        (side, middle),
        (-side, middle),
        (0.0, -RADIUS - 4.0),
        (0.0, RADIUS + SMALL),
        (side + wide, middle),
        (-side - wide, middle),
        (0.0, -RADIUS - 4.0 - high),
    ];
    let places = places.map(|(right, down)| (x + right, y + down));
    places.into_iter().find(|(x, y)| {
        let inside = (LEFT + wide / 2.0..RIGHT - wide / 2.0).contains(x);
        inside
            && taken
                .iter()
                .all(|(other, at)| (x - other).abs() >= wide || (y - at).abs() >= high)
    })
}

/// Return the description of a slow exit, and its duration and origin.
fn describe(slow: &SlowExit, unit: &Unit) -> (String, String) {
    let exit = &slow.exit;
    let mut below = format!("{} at {:.3} s", unit.time(exit.took), slow.at);
    if let Some(place) = exit.place() {
        below += &format!(", {place}");
    }
    (exit.about(), below)
}

/// Return all facts of a slow exit, in one line.
fn hint(slow: &SlowExit, unit: &Unit) -> String {
    let exit = &slow.exit;
    let split = [
        ("kernel", exit.kernel),
        ("user", exit.user),
        ("waiting", exit.waiting),
        ("preempted", exit.preempted),
        ("halted beside", exit.halted),
    ];
    let split = split.iter().filter(|(_, ticks)| *ticks != 0);
    let split = split.map(|(name, ticks)| format!("{name} {}", unit.time(*ticks)));
    let mut hint = format!(
        "{}: {} ({}), at {:.6} s, {} vCPU {}",
        exit.about(),
        unit.time(exit.took),
        split.collect::<Vec<_>>().join(", "),
        slow.at,
        slow.vm,
        exit.vcpu,
    );
    if let Some(place) = exit.place() {
        hint += &format!(", {place}");
    }
    match (exit.cpu_exit, exit.cpu_entry) {
        (Some(from), Some(to)) if from != to => hint += &format!(", CPU {from} to {to}"),
        (Some(cpu), _) => hint += &format!(", CPU {cpu}"),
        _ => {}
    }
    if exit.scheduled_out != 0 {
        hint += &format!(", off its CPU {} times", exact(exit.scheduled_out));
    }
    if let Some(why) = exit.to_user() {
        hint += &format!(", {why}");
    }
    hint
}

/// Unit of the vertical axis: nanoseconds, or ticks if the TSC's frequency is unknown.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    khz: Option<u32>,
}

impl Unit {
    /// Return the unit for a recording.
    pub fn new(series: &Series) -> Self {
        let khz = series.tsc_khz;
        Self { khz }
    }

    /// Convert ticks to this unit.
    fn convert(self, ticks: u64) -> f64 {
        let ticks = ticks as f64;
        self.khz
            .map_or(ticks, |khz| ticks * 1e6 / f64::from(khz))
            .max(1.0)
    }

    fn name(self) -> &'static str {
        match self.khz {
            Some(_) => "how long one exit took: kernel, user, waiting and preempted",
            None => "TSC ticks that one exit took: kernel, user, waiting and preempted",
        }
    }

    /// Format a value for the axis.
    fn label(self, value: f64) -> String {
        match self.khz {
            Some(_) => axis::time(value / 1e9),
            None => axis::label(value),
        }
    }

    /// Format ticks.
    pub fn time(self, ticks: u64) -> String {
        match self.khz {
            Some(_) => axis::time(axis::round(self.convert(ticks) / 1e9)),
            None => rough(ticks),
        }
    }
}
