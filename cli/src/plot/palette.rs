// SPDX-License-Identifier: GPL-2.0

//! Colours that people who confuse some can tell apart, after Okabe and Ito.

use exitmeter_meter::phase::Phase;

use super::{
    series::{Key, Series},
    svg::Paint,
};

/// Of reasons, the most frequent first. Neighbours differ in lightness, too.
const REASONS: [&str; 7] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
];

/// Dashes of lines in the same order, so that colours are not all that tells them apart.
const DASHES: [&str; 7] = ["", "8 3", "2 3", "8 3 2 3", "14 4", "5 2", "10 2"];

/// The colour of a phase.
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

/// What has a colour of its own: a reason, or all the rest.
#[derive(Clone, Debug)]
pub struct Layer {
    /// What it is called.
    pub name: String,
    /// How it looks.
    pub paint: Paint,
    /// How a line of it is dashed.
    pub dashes: &'static str,
    /// Its reasons.
    pub keys: Vec<Key>,
    /// All exits of them.
    pub exits: u64,
}

/// The layers of a series, the most frequent first. Whatever else is drawn of the series, a
/// reason has the colour that it has here.
pub fn layers(series: &Series) -> Vec<Layer> {
    let frequent = series.frequent();
    // What would be thinner than a pixel is not worth a colour.
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

/// The colours of what leads, whatever it is, the first one first.
pub fn colors() -> impl Iterator<Item = Paint> {
    REASONS.into_iter().map(Paint::Plain)
}

/// The colour of one reason.
pub fn reason(layers: &[Layer], key: Key) -> Paint {
    let layer = layers.iter().find(|layer| layer.keys.contains(&key));
    layer.map_or(Paint::Hatch, |layer| layer.paint)
}

/// What texts are written in.
pub const INK: Paint = Paint::Plain(super::svg::INK);
/// What lies behind all.
pub const PAPER: Paint = Paint::Plain("#ffffff");
