// SPDX-License-Identifier: GPL-2.0

//! A fleet of hosts that play recordings, and a Prometheus that scrapes them.
//!
//! [`recording`] reads a recording, [`hosts`] serves it as hosts through the exporter's own code, [`prometheus`] runs Debian's
//! Prometheus on them, and [`tiers`] runs several. [`boards`] is the source of Grafana's boards. The recordings come from emulated
//! hosts (docs/study).

pub mod boards;
pub mod hosts;
pub mod prometheus;
pub mod recording;
pub mod tiers;
