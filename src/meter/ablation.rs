// SPDX-License-Identifier: GPL-2.0

//! Constants that leave out parts of the meter, for the builds of tests/bench that measure the cost
//! of each part. All other builds have every part.
//!
//! `cargo lab build -- EXITMETER_ONLY=counts` makes such a build. Only `make bench` loads it: its
//! numbers are incomplete.

/// Callbacks do their work. If false, they return at once.
pub const CALLBACKS: bool = !cfg!(exitmeter_only_hooks);

/// Callbacks read the clock, find the vCPU's ledger and write the head of each transition.
/// [`COUNTS`], [`PHASES`] and [`HISTOGRAMS`] build on this.
const ONLY_TRANSITIONS: bool = cfg!(exitmeter_only_transitions);
const ONLY_COUNTS: bool = cfg!(exitmeter_only_counts);
const ONLY_PHASES: bool = cfg!(exitmeter_only_phases);
const ONLY_HISTOGRAMS: bool = cfg!(exitmeter_only_histograms);

/// Exits are counted, by reason.
pub const COUNTS: bool = !(ONLY_TRANSITIONS || ONLY_PHASES || ONLY_HISTOGRAMS);

/// Ticks are booked, by phase and reason.
pub const PHASES: bool = !(ONLY_TRANSITIONS || ONLY_COUNTS || ONLY_HISTOGRAMS);

/// Each exit's kernel ticks become a sample of its reason's histogram.
pub const HISTOGRAMS: bool = !(ONLY_TRANSITIONS || ONLY_COUNTS || ONLY_PHASES);
