// SPDX-License-Identifier: GPL-2.0

//! What tests find in an emulated host, for the system tests and for others that run there.

pub mod host;
