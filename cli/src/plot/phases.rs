// SPDX-License-Identifier: GPL-2.0

//! Chart of the vCPUs' time by phase, over time.

use exitmeter_meter::phase::Phase;

use super::{
    axis,
    chart::{Chart, LegendLine},
    palette,
    series::{runs, Series, Step},
    svg::Picture,
};
use crate::{
    model::Cycles,
    numbers::{rough, share},
};

/// Maximum number of time steps. More would be closer than a pixel.
const BINS: u32 = 200;

/// Draw the chart.
pub fn draw(series: &Series, subtitle: &str) -> Picture {
    let bins = series.bins(BINS);
    let mut chart = Chart::with_marks(
        "Where the time of the vCPUs went",
        subtitle,
        260.0,
        &series.marks,
    );
    let percent = |share: f64| format!("{:.0}%", share * 100.0);
    let vertical = chart.vertical_axis("share of the time of all vCPUs", 1.0, percent);
    let time = chart.time_axis(series.range());
    let all = &series.sum.cycles;
    for (place, phase) in all.phases().enumerate() {
        // The area has a gap while there is no vCPU.
        let runs = runs(&bins).flat_map(|run| run.split(|bin| bin.cycles.sum() == 0));
        for run in runs {
            let edge = |bin: &Step, phases: usize| {
                let below = all.phases().take(phases);
                let cycles = bin.cycles.merged_like(all);
                let below: u128 = below.map(|phase| cycles.of(phase)).sum();
                let y = vertical.place(below as f64 / bin.cycles.sum() as f64);
                [(time.place(bin.from), y), (time.place(bin.to), y)]
            };
            let top = run.iter().flat_map(|bin| edge(bin, place + 1));
            let bottom = run.iter().rev().flat_map(|bin| {
                let [left, right] = edge(bin, place);
                [right, left]
            });
            if !run.is_empty() {
                let paint = palette::phase(phase);
                chart
                    .picture
                    .area(top.chain(bottom), paint, all.name(phase));
            }
        }
    }
    chart.marks(&series.marks, time);
    let whole = all.sum();
    let mut phases: Vec<_> = all.phases().collect();
    phases.reverse();
    let entries = phases.into_iter().map(|phase| {
        let cycles = all.of(phase);
        let spent = match series.tsc_khz {
            Some(khz) => axis::time(axis::round(cycles as f64 / (f64::from(khz) * 1000.0))),
            None => rough(cycles),
        };
        LegendLine {
            paint: palette::phase(phase),
            dashes: None,
            name: legend_text(phase, all).to_owned(),
            numbers: [spent, share(cycles, whole)],
        }
    });
    let spent = if series.tsc_khz.is_some() {
        "time"
    } else {
        "TSC ticks"
    };
    chart.legend(["phase", spent, "share"], &entries.collect::<Vec<_>>());
    chart.done()
}

/// Return the text for a phase in the legend.
fn legend_text(phase: Phase, all: &Cycles) -> &'static str {
    match phase {
        Phase::Guest => "guest: it runs",
        Phase::Kernel => "kernel: KVM",
        Phase::User => "user: the VMM",
        Phase::Halted if !all.separates_waits => "blocked: it sleeps",
        Phase::Halted => "halted: it sleeps",
        Phase::Waiting => "waiting: for the host",
        Phase::Preempted => "preempted",
    }
}
