// SPDX-License-Identifier: GPL-2.0

//! Shows where the time of virtual machines goes, as metered by the kernel module exitmeter.
//!
//! - Data: [`source`] reads snapshots. [`model`] turns them into plain data, which is also what
//!   `--json` prints; [`spread`] adds the distribution of single exits. [`names`] finds the names
//!   that people gave their VMs.
//! - Commands, each with its options: [`report`], [`why`], [`slow`], [`record`], [`verify`] and
//!   [`reasons`] on the host, [`guest`] and [`stat`] in a guest. [`args`] lists them, and [`man`]
//!   and [`completions`] describe them.
//! - Over time: [`top`] shows snapshots live, [`record`] stores them in a [`recording`], and
//!   [`plot`] draws a recording.
//! - Output: [`output`] prints, with [`table`], [`numbers`] and [`paint`] for the layout.
//! - Processes: [`command`] runs child commands, [`signals`] catches what would end the tool, and
//!   [`stop`] records it until the tool can end in order.
//! - Optional: `bpf` keeps the same numbers without the module, and `export` serves the numbers of
//!   a host to Prometheus.

pub mod args;
#[cfg(feature = "bpf")]
pub mod bpf;
pub mod command;
pub mod completions;
#[cfg(feature = "export")]
pub mod export;
pub mod guest;
pub mod man;
pub mod model;
pub mod names;
pub mod numbers;
pub mod output;
pub mod paint;
pub mod plot;
pub mod reasons;
pub mod record;
pub mod recording;
pub mod report;
pub mod signals;
pub mod slow;
pub mod source;
pub mod spread;
pub mod stat;
pub mod stop;
pub mod table;
#[cfg(feature = "top")]
pub mod top;
pub mod verify;
pub mod why;
