// SPDX-License-Identifier: GPL-2.0

//! Shows where the time of virtual machines goes, as the kernel module exitmeter metered it.
//!
//! The rooms: [`source`] gets the bytes of a snapshot, [`model`] makes plain data of them
//! (which is also what `--json` prints; [`spread`] is of single exits), [`report`], [`guest`] and [`reasons`] make text
//! of the data, with [`table`] and [`numbers`] for the looks. [`args`] is the command line.

pub mod args;
pub mod guest;
pub mod model;
pub mod numbers;
pub mod reasons;
pub mod report;
pub mod source;
pub mod spread;
pub mod table;
