// SPDX-License-Identifier: GPL-2.0

//! Shows where the time of virtual machines goes, as the kernel module exitmeter metered it.
//!
//! The rooms: [`source`] gets the bytes of a snapshot, and [`model`] makes plain data of them
//! (which is also what `--json` prints; [`spread`] is of single exits). Each command has a room
//! with what it takes on the command line and what it does: [`report`], [`guest`] and
//! [`reasons`]. They print to [`output`], with [`table`] and [`numbers`] for the looks.
//! [`args`] says which commands there are.

pub mod args;
pub mod guest;
pub mod model;
pub mod numbers;
pub mod output;
pub mod paint;
pub mod reasons;
pub mod record;
pub mod recording;
pub mod report;
pub mod source;
pub mod spread;
pub mod table;
