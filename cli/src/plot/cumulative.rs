// SPDX-License-Identifier: GPL-2.0

//! How the number of exits grows, in all and by reason.

use super::{
    axis,
    chart::{Chart, Entry},
    palette::Layer,
    rate,
    series::{Series, Step},
    svg::{Paint, Picture, INK},
};
use crate::numbers::exact;

/// More points than there are pixels for could not be seen.
const POINTS: u32 = 600;

/// The chart.
pub fn draw(series: &Series, layers: &[Layer], subtitle: &str) -> Picture {
    let bins = series.bins(POINTS);
    let mut chart = Chart::with_marks(
        "Exits since the recording began",
        subtitle,
        300.0,
        &series.marks,
    );
    let upright = chart.upright_axis("exits", series.sum.exits as f64 * 1.04, axis::label);
    let time = chart.time_axis(series.range());
    let mut curve = |exits: &dyn Fn(&Step) -> u64, paint, width, dashes, hint: &str| {
        let mut sum = 0;
        let start = (time.place(series.range().0), upright.place(0.0));
        let points = bins.iter().map(|bin| {
            sum += exits(bin);
            (time.place(bin.to), upright.place(sum as f64))
        });
        let points: Vec<_> = std::iter::once(start).chain(points).collect();
        chart.picture.curve(points, paint, width, dashes, hint);
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
    let mut entries = vec![Entry {
        paint: all,
        dashes: Some(""),
        name: "all exits".to_owned(),
        numbers: [exact(series.sum.exits), String::new()],
    }];
    // In the order in which the lines end.
    let mut others = rate::entries(series, layers, true);
    others.reverse();
    entries.extend(others);
    chart.legend(["reason", "exits", "share"], &entries);
    chart.done()
}
