// SPDX-License-Identifier: GPL-2.0

//! Where the time of the vCPUs goes, over time.

use exitmeter_meter::phase::Phase;

use super::{
    axis,
    chart::{Chart, Entry},
    palette,
    series::Series,
    svg::Picture,
};
use crate::numbers::{rough, share};

/// More steps than there are pixels for could not be seen.
const BINS: u32 = 200;

/// The chart.
pub fn draw(series: &Series, subtitle: &str) -> Picture {
    let bins = series.bins(BINS);
    let mut chart = Chart::with_marks(
        "Where the time of the vCPUs went",
        subtitle,
        260.0,
        &series.marks,
    );
    let percent = |share: f64| format!("{:.0}%", share * 100.0);
    let upright = chart.upright_axis("share of the time of all vCPUs", 1.0, percent);
    let time = chart.time_axis(series.range());
    for (place, phase) in Phase::ALL.into_iter().enumerate() {
        // Where there is no vCPU there is no share, and the area ends.
        for run in bins.split(|bin| bin.cycles.sum() == 0) {
            let edge = |bin: &super::series::Step, phases: usize| {
                let below = Phase::ALL.into_iter().take(phases);
                let below: u64 = below.map(|phase| bin.cycles.of(phase)).sum();
                let y = upright.place(below as f64 / bin.cycles.sum() as f64);
                [(time.place(bin.from), y), (time.place(bin.to), y)]
            };
            let top = run.iter().flat_map(|bin| edge(bin, place + 1));
            let bottom = run.iter().rev().flat_map(|bin| {
                let [left, right] = edge(bin, place);
                [right, left]
            });
            if !run.is_empty() {
                let paint = palette::phase(phase);
                chart.picture.area(top.chain(bottom), paint, phase.name());
            }
        }
    }
    chart.marks(&series.marks, time);
    let whole = series.sum.cycles.sum();
    let entries = Phase::ALL.into_iter().rev().map(|phase| {
        let cycles = series.sum.cycles.of(phase);
        let spent = match series.tsc_khz {
            Some(khz) => axis::time(round(cycles as f64 / (f64::from(khz) * 1000.0))),
            None => rough(cycles),
        };
        Entry {
            paint: palette::phase(phase),
            dashes: None,
            name: meaning(phase).to_owned(),
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

/// A number to three digits.
fn round(value: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    let power = 10_f64.powf(2.0 - value.log10().floor());
    (value * power).round() / power
}

/// A phase in words.
fn meaning(phase: Phase) -> &'static str {
    match phase {
        Phase::Guest => "guest: it runs",
        Phase::Kernel => "kernel: KVM",
        Phase::User => "user: the VMM",
        Phase::Blocked => "blocked: it sleeps",
        Phase::Preempted => "preempted",
    }
}
