// SPDX-License-Identifier: GPL-2.0

//! Colours for readers with colour blindness, after Okabe and Ito.

use exitmeter_meter::phase::Phase;

use super::{
    series::{Key, Series},
    svg::Paint,
};

/// Colours of reasons, the most frequent first. Neighbours also differ in lightness.
const REASONS: [&str; 7] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
];

/// Dashes of lines, in the same order, so that lines differ in more than their colour.
const DASHES: [&str; 7] = ["", "8 3", "2 3", "8 3 2 3", "14 4", "5 2", "10 2"];

/// Return the colour of a phase.
pub fn phase(phase: Phase) -> Paint {
    Paint::Plain(match phase {
        Phase::Guest => "#009e73",
        Phase::Kernel => "#d55e00",
        Phase::User => "#0072b2",
        Phase::Halted => "#d8d8d8",
        Phase::Waiting => "#f0e442",
        Phase::Preempted => "#4d4d4d",
    })
}

/// A reason with a colour of its own, or all others.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Name.
    pub name: String,
    /// Colour.
    pub paint: Paint,
    /// Dashes, for a line.
    pub dashes: &'static str,
    /// Keys of its reasons.
    pub keys: Vec<Key>,
    /// Number of exits.
    pub exits: u64,
}

/// Return the layers of a series, the most frequent first. A reason has the same colour in all
/// charts of the series.
pub fn layers(series: &Series) -> Vec<Layer> {
    let frequent = series.frequent();
    // A layer thinner than a pixel gets no colour.
    let worth = |exits: u64| u128::from(exits) * 500 >= series.sum.exits.into();
    let own = frequent.iter().take(REASONS.len());
    let own = own.take_while(|(_, exits)| worth(*exits)).count();
    let (own, rest) = frequent.split_at_checked(own).unwrap_or_default();
    let mut layers: Vec<_> = own
        .iter()
        .zip(REASONS.iter().zip(DASHES))
        .map(|((label, exits), (color, dashes))| Layer {
            name: label.to_string(),
            paint: Paint::Plain(color),
            dashes,
            keys: vec![label.key()],
            exits: *exits,
        })
        .collect();
    if let Some((first, _)) = rest.first() {
        layers.push(Layer {
            name: match rest.len() {
                1 => first.to_string(),
                more => format!("{more} other reasons"),
            },
            paint: Paint::Hatch,
            dashes: "1 2",
            keys: rest.iter().map(|(label, _)| label.key()).collect(),
            exits: rest.iter().map(|(_, exits)| exits).sum(),
        });
    }
    layers
}

/// Return the colours for any sorted list, the first one first.
pub fn colors() -> impl Iterator<Item = Paint> {
    REASONS.into_iter().map(Paint::Plain)
}

/// Return the colour of a reason.
pub fn reason(layers: &[Layer], key: Key) -> Paint {
    let layer = layers.iter().find(|layer| layer.keys.contains(&key));
    layer.map_or(Paint::Hatch, |layer| layer.paint)
}

/// Text colour.
pub const INK: Paint = Paint::Plain(super::svg::INK);
/// Background colour.
pub const PAPER: Paint = Paint::Plain("#ffffff");
