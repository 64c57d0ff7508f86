// SPDX-License-Identifier: GPL-2.0

//! The guest's code as a profile for other tools.
//!
//! The stacks have three frames: the VM, the exit reason, and the symbol, or the address if there
//! is no symbol. Exits without a row have a frame `[others]`.

use std::collections::BTreeMap;

use serde_json::{json, Value};

use super::{
    detail::nested_in_brackets,
    model::{Group, Weight, Why},
};

/// Schema that speedscope's files name (npm's package speedscope, file-format-schema.json).
const SCHEMA: &str = "https://www.speedscope.app/file-format-schema.json";

/// Sum up a VM's code by reason and frame. The result is sorted, so that equal numbers give equal
/// files.
fn stacks(code: &[Group], weight: Weight) -> BTreeMap<(String, String), u128> {
    let mut stacks: BTreeMap<_, u128> = BTreeMap::new();
    for group in code {
        let rows = group.rows.iter().map(|row| {
            let frame = row.subject.frame() + nested_in_brackets(row.nested);
            (frame, row.counts)
        });
        let others = ("[others]".to_owned(), group.others);
        for (frame, counts) in rows.chain([others]) {
            let weight = counts.weigh(weight);
            if weight != 0 {
                let sum = stacks.entry((group.label.to_string(), frame)).or_default();
                *sum = sum.saturating_add(weight);
            }
        }
    }
    stacks
}

/// Format collapsed stacks for flamegraph.pl and inferno-flamegraph.
pub fn collapsed(why: &Why, weight: Weight) -> String {
    let vms = why.vms.iter();
    vms.map(|vm| collapsed_of(&vm.label(), &vm.code, weight))
        .collect()
}

/// Format the collapsed stacks of one VM.
pub fn collapsed_of(name: &str, code: &[Group], weight: Weight) -> String {
    let mut text = String::new();
    for ((reason, frame), weight) in stacks(code, weight) {
        let frames = [name, &reason, &frame].map(escape_frame);
        text += &format!("{} {weight}\n", frames.join(";"));
    }
    text
}

/// Return a frame without characters that would end it.
fn escape_frame(frame: &str) -> String {
    frame.replace(|at: char| at == ';' || at.is_control(), "_")
}

/// Build a file for speedscope, with one profile for each VM.
pub fn speedscope(why: &Why, weight: Weight) -> Value {
    let mut frames: BTreeMap<String, usize> = BTreeMap::new();
    let mut names = Vec::new();
    let mut frame = |name: String| {
        *frames.entry(name.clone()).or_insert_with(|| {
            names.push(json!({ "name": name }));
            names.len() - 1
        })
    };
    let unit = match weight {
        Weight::Exits => "exits",
        Weight::Ticks => "kernel ticks",
    };
    let mut profiles = Vec::new();
    for vm in &why.vms {
        let (mut samples, mut weights, mut end) = (Vec::new(), Vec::new(), 0_u128);
        for ((reason, code), weight) in stacks(&vm.code, weight) {
            samples.push([frame(vm.label()), frame(reason), frame(code)]);
            weights.push(weight);
            end = end.saturating_add(weight);
        }
        if samples.is_empty() {
            continue;
        }
        profiles.push(json!({
            "type": "sampled",
            "name": format!("{}: {unit}", vm.label()),
            "unit": "none",
            "startValue": 0,
            "endValue": end,
            "samples": samples,
            "weights": weights,
        }));
    }
    json!({
        "$schema": SCHEMA,
        "name": "exitmeter why",
        "exporter": concat!("exitmeter@", env!("CARGO_PKG_VERSION")),
        "activeProfileIndex": 0,
        "shared": { "frames": names },
        "profiles": profiles,
    })
}
