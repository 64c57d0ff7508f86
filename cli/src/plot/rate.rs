// SPDX-License-Identifier: GPL-2.0

//! Chart of exits per second over time, stacked by reason.

use super::{
    axis,
    chart::{Chart, LegendLine},
    palette::Layer,
    series::{runs, Series, Step},
    svg::Picture,
};
use crate::numbers::{exact, share};

/// Maximum number of time steps. More would be closer than a pixel.
const BINS: u32 = 200;

/// Draw the chart.
pub fn draw(series: &Series, layers: &[Layer], subtitle: &str) -> Picture {
    let bins = series.bins(BINS);
    let highest = bins
        .iter()
        .filter_map(|bin| heights(bin, layers).last().copied());
    let highest = highest.fold(0.0, f64::max);

    let mut chart = Chart::with_marks(
        "Exits per second, by reason",
        subtitle,
        300.0,
        &series.marks,
    );
    let mean = series.range().1 - series.range().0;
    let mean = axis::time((mean / bins.len().max(1) as f64 * 1e4).round() / 1e4);
    let name = format!("exits per second, means of {mean}");
    let vertical = chart.vertical_axis(&name, highest * 1.04, axis::label);
    let time = chart.time_axis(series.range());
    for (place, layer) in layers.iter().enumerate() {
        // The area has a gap where the meter began anew.
        for run in runs(&bins) {
            // Each step is flat: go along the top from left to right, and back along the bottom.
            let corners = |bin: &Step, edge: usize| {
                let heights = heights(bin, layers);
                let y = vertical.place(heights.get(edge).copied().unwrap_or(0.0));
                [(time.place(bin.from), y), (time.place(bin.to), y)]
            };
            let top = run.iter().flat_map(|bin| corners(bin, place + 1));
            let bottom = run.iter().rev().flat_map(|bin| {
                let [left, right] = corners(bin, place);
                [right, left]
            });
            chart
                .picture
                .area(top.chain(bottom), layer.paint, &layer.name);
        }
    }
    chart.marks(&series.marks, time);
    chart.legend(
        ["reason", "exits", "share"],
        &entries(series, layers, false),
    );
    chart.done()
}

/// Return the lower edge of each layer of a step, and at last the upper edge of the topmost one.
fn heights(step: &Step, layers: &[Layer]) -> Vec<f64> {
    let mut heights = vec![0.0];
    let mut sum = 0;
    for layer in layers {
        let exits = layer.keys.iter().filter_map(|key| step.exits.get(key));
        sum += exits.sum::<u64>();
        heights.push(sum as f64 / step.seconds().max(1e-9));
    }
    heights
}

/// Return the legend, in the order of the layers from top to bottom.
pub fn entries(series: &Series, layers: &[Layer], lines: bool) -> Vec<LegendLine> {
    let entries = layers.iter().rev().map(|layer| LegendLine {
        paint: layer.paint,
        dashes: lines.then_some(layer.dashes),
        name: layer.name.clone(),
        numbers: [exact(layer.exits), share(layer.exits, series.sum.exits)],
    });
    entries.collect()
}
