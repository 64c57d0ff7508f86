// SPDX-License-Identifier: GPL-2.0

//! Shows where the time of virtual machines goes, as the kernel module exitmeter metered it.
//!
//! The rooms: [`source`] gets the bytes of a snapshot, and [`model`] makes plain data of them
//! (which is also what `--json` prints; [`spread`] is of single exits). Each command has a room
//! with what it takes on the command line and what it does: [`report`], [`why`], [`slow`],
//! [`record`], [`verify`] and [`reasons`] on the host, [`guest`] and [`stat`] in a guest. They print to [`output`], with
//! [`table`], [`numbers`] and [`paint`] for the looks; [`command`] is of commands that they run,
//! and [`signals`] of what would end them.
//! [`names`] tells VMs by the names that people gave them.
//! [`args`] says which commands there are, from which come [`man`] and [`completions`].
//!
//! Without the module, BPF programs keep the same numbers (room `bpf`, where it is compiled in).
//!
//! For Prometheus, the room `export` serves the numbers of a host, where it is compiled in.
//!
//! Over time: [`top`] shows snapshots as they come, [`record`] keeps them in a [`recording`],
//! and [`plot`] draws it.

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
pub mod table;
#[cfg(feature = "top")]
pub mod top;
pub mod verify;
pub mod why;
