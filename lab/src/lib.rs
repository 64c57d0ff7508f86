// SPDX-License-Identifier: GPL-2.0

//! Emulated hosts: their set-up, their boot, and the verdict on their runs.

pub mod calendar;
pub mod emulator;
pub mod file_error;
pub mod host;
pub mod image;
pub mod interrupt;
pub mod module;
mod outcome;
mod paths;
pub mod programs;
pub mod run;
pub mod rust_project;
pub mod setup;
pub mod shell;
pub mod verdict;
