// SPDX-License-Identifier: GPL-2.0

//! Access to an emulated host from inside, for the system tests and for other programs that run there.

pub mod host;
