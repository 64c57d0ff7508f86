// SPDX-License-Identifier: GPL-2.0

//! Chart of the number of exits over time, in all and by reason.

use super::{
    axis,
    chart::{Chart, LegendLine},
    palette::Layer,
    rate,
    series::{runs, Series, Step},
    svg::{Paint, Picture, INK},
};
use crate::numbers::exact;

/// Maximum number of points of a curve. More would be closer than a pixel.
const POINTS: u32 = 600;

/// Draw the chart.
pub fn draw(series: &Series, layers: &[Layer], subtitle: &str) -> Picture {
    let bins = series.bins(POINTS);
    let mut chart = Chart::with_marks(
        "Exits since the recording began",
        subtitle,
        300.0,
        &series.marks,
    );
    let vertical = chart.vertical_axis("exits", series.sum.exits as f64 * 1.04, axis::label);
    let time = chart.time_axis(series.range());
    let mut curve = |exits: &dyn Fn(&Step) -> u64, paint, width, dashes, hint: &str| {
        let mut sum = 0_u64;
        // The exits at a new beginning of the meter are unknown, so the curve has a gap there.
        for run in runs(&bins) {
            let from = run.first().map_or(0.0, |bin| bin.from);
            let start = (time.place(from), vertical.place(sum as f64));
            let points = run.iter().map(|bin| {
                sum = sum.saturating_add(exits(bin));
                (time.place(bin.to), vertical.place(sum as f64))
            });
            let points: Vec<_> = std::iter::once(start).chain(points).collect();
            chart.picture.curve(points, paint, width, dashes, hint);
        }
    };
    for layer in layers.iter().rev() {
        let exits = |step: &Step| {
            let exits = layer.keys.iter().filter_map(|key| step.exits.get(key));
            exits.sum()
        };
        curve(&exits, layer.paint, 2.0, layer.dashes, &layer.name);
    }
    let all = Paint::Plain(INK);
    curve(&|step| step.exits.values().sum(), all, 2.2, "", "all exits");

    chart.marks(&series.marks, time);
    let mut entries = vec![LegendLine {
        paint: all,
        dashes: Some(""),
        name: "all exits".to_owned(),
        numbers: [exact(series.sum.exits), String::new()],
    }];
    // In the order of the lines' ends.
    let mut others = rate::entries(series, layers, true);
    others.reverse();
    entries.extend(others);
    chart.legend(["reason", "exits", "share"], &entries);
    chart.done()
}
