// SPDX-License-Identifier: GPL-2.0

//! Chart of the cost of single exits, by reason: distributions and quantiles.

use super::{
    axis::{self, Scale},
    chart::{Chart, SMALL, TOP},
    font,
    palette::{self, Layer},
    series::Series,
    svg::{Anchor, Picture, GREY, GRID, INK},
};
use crate::{
    model::ReasonRow,
    numbers::{exact, mean, rough},
    spread::Spread,
};

/// Maximum number of reasons.
const ROWS: usize = 14;
/// Height of a row, in pixels.
const ROW: f64 = 40.0;
/// Height of the distribution in a row.
const HILL: f64 = 20.0;
/// Left edge of the data, in pixels.
const LEFT: f64 = 220.0;
/// Right edge of the data.
const RIGHT: f64 = 790.0;
/// Titles and right edges of the columns of numbers.
const COLUMNS: [(&str, f64); 4] = [
    ("exits", 866.0),
    ("median", 918.0),
    ("p95", 970.0),
    ("max", 1024.0),
];

/// Draw the chart. Returns `None` if the recording has no cost of single exits.
pub fn draw(series: &Series, layers: &[Layer], subtitle: &str) -> Option<Picture> {
    let mut rows: Vec<_> = series
        .sum
        .reasons
        .iter()
        .filter_map(|row| {
            Some((
                row,
                row.spread.as_ref().filter(|spread| spread.count() != 0)?,
            ))
        })
        .collect();
    let left_out = rows.len().saturating_sub(ROWS);
    rows.truncate(ROWS);
    let least = rows
        .iter()
        .flat_map(|(_, spread)| spread.samples().first().copied());
    let least = least.map(|(low, _)| low).min()?.max(64) as f64;
    let most = rows.iter().map(|(_, spread)| spread.max).max()? as f64;

    let height = rows.len() as f64 * ROW + 8.0;
    let mut chart = Chart::new("What single exits cost, by reason", subtitle, height);
    // Leave some room on either side.
    let range = (least / 1.2, most * 1.3);
    let scale = Scale::logarithmic(range, (LEFT, RIGHT));
    for decade in axis::decades(range.0, range.1) {
        for times in 1..10_u8 {
            let value = decade * f64::from(times);
            if value < range.0 || value > range.1 {
                continue;
            }
            let x = scale.place(value);
            if axis::labelled_multiples(range).contains(&times) {
                chart.tick_below(x, &axis::label(value), "#cfcfcf");
            } else {
                chart
                    .picture
                    .line((x, TOP), (x, TOP + height), "#f2f2f2", 1.0);
            }
        }
    }
    let middle = ((LEFT + RIGHT) / 2.0, TOP + height + 38.0);
    let name = "TSC cycles in the kernel from an exit to the next entry, without sleep, preemption and user space";
    chart
        .picture
        .text(middle, Anchor::Middle, SMALL, GREY, name);
    times_above(&mut chart, series, range, scale);
    chart.picture.text(
        (14.0, TOP - 14.0),
        Anchor::Start,
        SMALL,
        GREY,
        "most kernel cycles first",
    );
    for (title, end) in COLUMNS {
        chart
            .picture
            .text((end, TOP - 14.0), Anchor::End, SMALL, GREY, title);
    }
    for (place, (row, spread)) in rows.iter().enumerate() {
        let top = TOP + 4.0 + place as f64 * ROW;
        if place > 0 {
            chart.picture.line((14.0, top), (1024.0, top), GRID, 1.0);
        }
        reason(&mut chart, row, spread, layers, scale, top);
    }
    let mut picture = chart.done();
    let key = "hill: all exits; box: p25, median, p75; whiskers: p5, p95; dot: max";
    let note = match left_out {
        0 => key.to_owned(),
        1 => format!("{key}; 1 reason with fewer cycles is left out"),
        _ => format!("{key}; {left_out} reasons with fewer cycles are left out"),
    };
    let at = (1024.0, 30.0);
    picture.text(at, Anchor::End, SMALL, GREY, &note);
    Some(picture)
}

/// Draw the axis in units of time, if the TSC's frequency is known.
fn times_above(chart: &mut Chart, series: &Series, range: (f64, f64), scale: Scale) {
    let Some(khz) = series.tsc_khz else { return };
    let per_second = f64::from(khz) * 1000.0;
    for power in -9..=3 {
        for times in axis::labelled_multiples(range) {
            let seconds = 10_f64.powi(power) * f64::from(*times);
            let cycles = seconds * per_second;
            if (range.0..=range.1).contains(&cycles) {
                let x = scale.place(cycles);
                chart.picture.line((x, TOP - 5.0), (x, TOP), GREY, 1.0);
                let at = (x, TOP - 9.0);
                chart
                    .picture
                    .text(at, Anchor::Middle, SMALL, GREY, &axis::time(seconds));
            }
        }
    }
}

/// Draw the row of a reason.
fn reason(
    chart: &mut Chart,
    row: &ReasonRow,
    spread: &Spread,
    layers: &[Layer],
    scale: Scale,
    top: f64,
) {
    let name = row.label.to_string();
    let paint = palette::reason(layers, row.label.key());
    let quantile = |percent| spread.quantile(percent).unwrap_or(0);
    let [p5, p25, p50, p75, p95] = [5, 25, 50, 75, 95].map(quantile);
    let hint = format!(
        "{name}: {} exits, mean {}, p5 {}, p25 {}, median {}, p75 {}, p95 {}, max {} cycles",
        exact(row.exits),
        mean(row.cycles.kernel, row.exits),
        exact(p5),
        exact(p25),
        exact(p50),
        exact(p75),
        exact(p95),
        exact(spread.max),
    );
    let picture = &mut chart.picture;
    let shown = font::fit(&name, SMALL, LEFT - 30.0);
    picture.text(
        (LEFT - 10.0, top + HILL + 6.0),
        Anchor::End,
        SMALL,
        INK,
        &shown,
    );

    let samples = spread.samples();
    let highest = samples.iter().map(|(_, count)| *count).max().unwrap_or(1) as f64;
    let floor = top + HILL + 2.0;
    for (low, count) in &samples {
        // Buckets begin at 2^n and 1.5 * 2^n.
        let high = if low.is_power_of_two() {
            low + low / 2
        } else {
            low / 3 * 4
        };
        let low = (*low).max(64);
        let (from, to) = (scale.place(low as f64), scale.place(high.max(96) as f64));
        // Any count above 0 is visible.
        let height = (*count as f64 / highest * HILL).max(1.0);
        picture.rectangle((from, floor - height), (to - from, height), paint, &hint);
    }
    let y = floor + 8.0;
    let place = |ticks: u64| scale.place(ticks as f64);
    picture.line((place(p5), y), (place(p95), y), INK, 1.2);
    for end in [p5, p95] {
        picture.line((place(end), y - 3.0), (place(end), y + 3.0), INK, 1.2);
    }
    let (from, to) = (place(p25), place(p75));
    let width = (to - from).max(3.0);
    picture.rectangle(
        (from - 1.0, y - 4.0),
        (width + 2.0, 8.0),
        palette::INK,
        &hint,
    );
    picture.rectangle((from, y - 3.0), (width, 6.0), palette::PAPER, &hint);
    picture.rectangle((place(p50) - 1.0, y - 4.0), (2.5, 8.0), palette::INK, &hint);
    picture.disc((place(spread.max), y), 2.4, INK, &hint);

    let numbers = [exact(row.exits), rough(p50), rough(p95), rough(spread.max)];
    for (number, (_, end)) in numbers.iter().zip(COLUMNS) {
        picture.text((end, top + HILL + 6.0), Anchor::End, SMALL, INK, number);
    }
}
