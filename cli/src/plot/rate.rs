// SPDX-License-Identifier: GPL-2.0

//! Exits per second over time, by reason, one above the other.

use super::{
    axis,
    chart::{Chart, Entry},
    palette::Layer,
    series::{Series, Step},
    svg::Picture,
};
use crate::numbers::{exact, share};

/// More steps than there are pixels for could not be seen.
const BINS: u32 = 200;

/// The chart.
pub fn draw(series: &Series, layers: &[Layer], subtitle: &str) -> Picture {
    let bins = series.bins(BINS);
    let heights: Vec<_> = bins.iter().map(|bin| heights(bin, layers)).collect();
    let highest = heights.iter().filter_map(|heights| heights.last().copied());
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
    let upright = chart.upright_axis(&name, highest * 1.04, axis::label);
    let time = chart.time_axis(series.range());
    for (place, layer) in layers.iter().enumerate() {
        let above = |at: usize| heights.get(at).and_then(|heights| heights.get(place + 1));
        let below = |at: usize| heights.get(at).and_then(|heights| heights.get(place));
        // Each step is level; along the top from left to right, and back along the bottom.
        let corners = |at: usize, height: f64| {
            let bin = bins.get(at);
            let y = upright.place(height);
            bin.map(|bin| [(time.place(bin.from), y), (time.place(bin.to), y)])
        };
        let top = (0..bins.len())
            .filter_map(|at| corners(at, *above(at)?))
            .flatten();
        let bottom = (0..bins.len())
            .rev()
            .filter_map(|at| corners(at, *below(at)?));
        let bottom = bottom.flat_map(|[left, right]| [right, left]);
        chart
            .picture
            .area(top.chain(bottom), layer.paint, &layer.name);
    }
    chart.marks(&series.marks, time);
    chart.legend(
        ["reason", "exits", "share"],
        &entries(series, layers, false),
    );
    chart.done()
}

/// Where each layer of a step begins, and at last where the topmost ends.
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

/// The legend, in the order in which the layers lie.
pub fn entries(series: &Series, layers: &[Layer], lines: bool) -> Vec<Entry> {
    let entries = layers.iter().rev().map(|layer| Entry {
        paint: layer.paint,
        dashes: lines.then_some(layer.dashes),
        name: layer.name.clone(),
        numbers: [exact(layer.exits), share(layer.exits, series.sum.exits)],
    });
    entries.collect()
}
