// SPDX-License-Identifier: GPL-2.0

//! Chart of the leading details over time, stacked.

use std::cmp::Reverse;

use exitmeter_meter::snapshot::TABLE_DETAILS;

use super::{
    axis,
    chart::{Chart, LegendLine, PAIR},
    palette,
    series::{runs, Series, Step},
    svg::{Paint, Picture},
};
use crate::{
    model::Label,
    numbers::{exact, rough, share},
    why::{
        model::{groups, Counts, Group, Weight},
        symbols::Symbols,
        tables::{Key, Numbers, ReasonKey, Rows},
    },
};

/// Maximum number of time steps. More would be closer than a pixel.
const BINS: u32 = 200;

/// Content of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// A row of the tables.
    Row(Key),
    /// Exits of a reason without a row. For a reason without details these are all its exits.
    Others(ReasonKey),
    /// All exits without a layer of their own.
    Rest,
}

/// A detail with a colour of its own, or the sum of all others.
#[derive(Clone, Debug)]
struct Layer {
    content: Content,
    name: String,
    /// Reason of the detail.
    below: String,
    paint: Paint,
    numbers: Numbers,
}

/// Return the details of a recording, by reason.
pub fn by_reason(series: &Series, weight: Weight) -> Vec<Group> {
    let none = Rows::default();
    let rows = series.details.as_ref().unwrap_or(&none);
    let symbols = Symbols::default();
    groups(rows, TABLE_DETAILS, series.isa, &symbols, weight)
}

/// Return the number of exits that are in no table, in steps with details: exits before a vCPU's
/// tables began, and after the last snapshot of a vCPU that went.
pub fn exits_in_no_table(series: &Series, code: Option<u32>) -> u64 {
    let steps = series.steps.iter().filter(|step| step.details.is_some());
    let exits = steps.flat_map(|step| &step.exits);
    let exits = exits.filter(|((_, exit_code), _)| code.is_none() || *exit_code == code);
    let all_exits: u64 = exits.map(|(_, exits)| exits).sum();
    let in_tables = series.details.as_ref().map(total).unwrap_or_default();
    all_exits.saturating_sub(in_tables.exits)
}

/// Return the sum over a table.
fn total(rows: &Rows) -> Numbers {
    let own = rows.by_key.values().map(|row| row.numbers);
    own.chain(rows.others.values().copied())
        .fold(Numbers::default(), Numbers::saturating_add)
}

fn weigh(numbers: Numbers, weight: Weight) -> u128 {
    match weight {
        Weight::Exits => numbers.exits.into(),
        Weight::Ticks => numbers.kernel,
    }
}

/// Return the layers, the leading one first.
fn layers(series: &Series, weight: Weight) -> Vec<Layer> {
    let groups = by_reason(series, weight);
    let numbers = |counts: Counts| Numbers {
        exits: counts.exits,
        kernel: counts.kernel.unwrap_or(0),
        user: counts.user.unwrap_or(0),
    };
    let mut all = Vec::new();
    for group in &groups {
        let label = group.label;
        for row in &group.rows {
            let below = match row.missed.exits {
                0 => label.to_string(),
                more => format!("{label}, up to {} more", rough(more)),
            };
            all.push((Content::Row(row.key), row.about(), below, row.counts));
        }
        if group.others.is_zero() {
            continue;
        }
        let (name, below) = match group.rows.is_empty() {
            true => (name_or_number(&label), "has no details"),
            false => (format!("others of {}", name_or_number(&label)), "in no row"),
        };
        let content = Content::Others(ReasonKey::labelled(&label));
        all.push((content, name, below.to_owned(), group.others));
    }
    all.sort_by_key(|(.., counts)| Reverse(weigh(numbers(*counts), weight)));
    let whole = all.iter().map(|(.., counts)| numbers(*counts));
    let whole = whole.fold(Numbers::default(), Numbers::saturating_add);
    // A layer thinner than a pixel gets no colour.
    let worth = |counts| weigh(numbers(counts), weight) * 500 >= weigh(whole, weight).max(1);
    let own = all.iter().zip(palette::colors());
    let own = own.take_while(|((.., counts), _)| worth(*counts)).count();
    let rest = all.split_off(own);
    let mut layers: Vec<_> = all
        .into_iter()
        .zip(palette::colors())
        .map(|((content, name, below, counts), paint)| Layer {
            content,
            name,
            below,
            paint,
            numbers: numbers(counts),
        })
        .collect();
    if !rest.is_empty() {
        let sum = rest.iter().map(|(.., counts)| numbers(*counts));
        layers.push(Layer {
            content: Content::Rest,
            name: match rest.len() {
                1 => "1 more".to_owned(),
                more => format!("{} more", exact(more as u64)),
            },
            below: "each with less".to_owned(),
            paint: Paint::Hatch,
            numbers: sum.fold(Numbers::default(), Numbers::saturating_add),
        });
    }
    layers
}

/// Return the name of a reason, or its number.
fn name_or_number(label: &Label) -> String {
    match (label.name, label.code) {
        (None, Some(code)) => format!("{code:#x}"),
        _ => label.to_string(),
    }
}

/// Return the lower edge of each layer of a step, per second, and at last the upper edge of the
/// topmost one.
fn heights(step: &Step, layers: &[Layer], weight: Weight) -> Vec<f64> {
    let none = Rows::default();
    let rows = step.details.as_ref().unwrap_or(&none);
    let per_second = |sum: u128| sum as f64 / step.seconds().max(1e-9);
    let mut heights = vec![0.0];
    let mut sum = 0;
    for layer in layers {
        sum += match layer.content {
            Content::Row(key) => {
                let row = rows.by_key.get(&key).map(|row| row.numbers);
                weigh(row.unwrap_or_default(), weight)
            }
            Content::Others(reason) => weigh(rows.others(TABLE_DETAILS, reason), weight),
            Content::Rest => weigh(total(rows), weight).saturating_sub(sum),
        };
        heights.push(per_second(sum));
    }
    heights
}

/// Draw the chart. Returns `None` if details were off all the time, or there was no such exit.
pub fn draw(
    series: &Series,
    weight: Weight,
    reason: Option<&str>,
    exits_in_no_table: u64,
    subtitle: &str,
) -> Option<Picture> {
    let layers = layers(series, weight);
    let whole = total(series.details.as_ref()?);
    if layers.is_empty() {
        return None;
    }
    let bins = series.bins(BINS);
    let ends = |bin: &Step| heights(bin, &layers, weight).last().copied();
    let highest = bins.iter().filter_map(ends).fold(0.0, f64::max);

    let title = match reason {
        Some(reason) => format!("What exits by {reason} were about"),
        None => "What exits were about".to_owned(),
    };
    let height = (layers.len() as f64 * PAIR + 28.0).max(300.0);
    let mut chart = Chart::with_marks(&title, subtitle, height, &series.marks);
    let mean = series.range().1 - series.range().0;
    let mean = axis::time((mean / bins.len().max(1) as f64 * 1e4).round() / 1e4);
    // Kernel cycles per second are a share of one CPU.
    let hertz = series.tsc_khz.map(|khz| f64::from(khz) * 1000.0);
    let (what, unit) = match (weight, hertz) {
        (Weight::Exits, _) => ("exits per second", 1.0),
        (Weight::Ticks, None) => ("kernel cycles per second", 1.0),
        (Weight::Ticks, Some(hertz)) => ("time in the kernel, in % of one CPU", hertz / 100.0),
    };
    let name = format!("{what}, means of {mean}");
    let vertical = chart.vertical_axis(&name, highest / unit * 1.04, axis::label);
    let time = chart.time_axis(series.range());
    for (place, layer) in layers.iter().enumerate() {
        // The area has a gap where the meter began anew, or details were off.
        let runs = runs(&bins).flat_map(|run| run.split(|bin| bin.details.is_none()));
        for run in runs.filter(|run| !run.is_empty()) {
            let corners = |bin: &Step, edge: usize| {
                let heights = heights(bin, &layers, weight);
                let y = vertical.place(heights.get(edge).copied().unwrap_or(0.0) / unit);
                [(time.place(bin.from), y), (time.place(bin.to), y)]
            };
            let top = run.iter().flat_map(|bin| corners(bin, place + 1));
            let bottom = run.iter().rev().flat_map(|bin| {
                let [left, right] = corners(bin, place);
                [right, left]
            });
            let hint = match layer.content {
                Content::Row(_) => format!("{}: {}", layer.below, layer.name),
                _ => layer.name.clone(),
            };
            chart.picture.area(top.chain(bottom), layer.paint, &hint);
        }
    }
    chart.marks(&series.marks, time);
    let entries = layers.iter().rev().map(|layer| {
        let [sum, part] = match weight {
            Weight::Exits => [
                exact(layer.numbers.exits),
                share(layer.numbers.exits, whole.exits),
            ],
            Weight::Ticks => [
                rough(layer.numbers.kernel),
                share(layer.numbers.kernel, whole.kernel),
            ],
        };
        let entry = LegendLine {
            paint: layer.paint,
            dashes: None,
            name: layer.name.clone(),
            numbers: [sum, part],
        };
        (entry, layer.below.clone())
    });
    let sum = match weight {
        Weight::Exits => "exits",
        Weight::Ticks => "kernel cycles",
    };
    let y = chart.legend_of_pairs(["detail", sum, "share"], &entries.collect::<Vec<_>>());
    if exits_in_no_table != 0 {
        let all = exits_in_no_table.saturating_add(whole.exits);
        let text = format!(
            "{} exits more, {}, are in no table",
            exact(exits_in_no_table),
            share(exits_in_no_table, all)
        );
        chart.remark(y, &text);
    }
    Some(chart.done())
}
