// SPDX-License-Identifier: GPL-2.0

//! The pure half of exitmeter, as a crate for the tools and the tests.
//!
//! The kernel module compiles the same files by `mod meter;`. A path such as
//! `crate::meter::phase::Phase` resolves in both builds. [`reader`] and [`handlers`], which only
//! the tools need, are declared here and not in the module.

#![cfg_attr(not(any(test, loom)), no_std)]

#[path = "mod.rs"]
pub mod meter;
pub use meter::*;

pub mod handlers;
pub mod reader;
