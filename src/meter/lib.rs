// SPDX-License-Identifier: GPL-2.0

//! The pure half of exitmeter, as a crate for the tools and the tests.
//!
//! The kernel module compiles the same files by `mod meter;`. Both ways a path such as
//! `crate::meter::phase::Phase` resolves. What only the tools need, [`reader`] and
//! [`handlers`], is declared here and not there.

#![cfg_attr(not(any(test, loom)), no_std)]

#[path = "mod.rs"]
pub mod meter;
pub use meter::*;

pub mod handlers;
pub mod reader;
