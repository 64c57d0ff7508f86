// SPDX-License-Identifier: GPL-2.0

//! A fleet of hosts that are played from recordings, and Prometheus that scrapes them.
//!
//! [`tape`] has a recording's snapshots, [`hosts`] serves them as hosts by the exporter's own code, and [`prometheus`] runs Debian's
//! Prometheus on them, [`tiers`] several. [`boards`] is the source of Grafana's. The recordings are of real emulated hosts (docs/study).

pub mod boards;
pub mod hosts;
pub mod prometheus;
pub mod tape;
pub mod tiers;
