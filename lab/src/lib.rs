// SPDX-License-Identifier: GPL-2.0

//! Emulated hosts: what sets them up, boots them and reads what they say.

pub mod calendar;
pub mod emulator;
pub mod host;
pub mod image;
pub mod interrupt;
pub mod module;
pub mod programs;
pub mod refused;
pub mod run;
mod saved;
pub mod setup;
pub mod shell;
pub mod verdict;
