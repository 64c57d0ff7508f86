// SPDX-License-Identifier: GPL-2.0

//! Which parts of the meter are built: all, but in the builds of tests/bench that show what
//! each part costs alone.
//!
//! `cargo lab build -- EXITMETER_ONLY=counts` makes such a build. It is loaded by `make bench`
//! and by nobody else: its numbers are not whole.

/// The callbacks do anything at all, rather than return at once.
pub const CALLBACKS: bool = !cfg!(exitmeter_only_hooks);

/// The callbacks read the clock, find the vCPU's ledger and write each transition's head.
/// [`COUNTS`], [`PHASES`] and [`HISTOGRAMS`] stand on this.
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
