// SPDX-License-Identifier: GPL-2.0

//! Access to the emulated host that the program runs in, for the system tests and for other programs that run there.

pub mod host;
