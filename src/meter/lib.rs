// SPDX-License-Identifier: GPL-2.0

//! The pure half of exitmeter, as a crate for the tools and the tests.
//!
//! The kernel module compiles the same files by `mod meter;`. A path such as
//! `crate::meter::phase::Phase` resolves in both builds. [`reader`], which only the tools need, is
//! declared here and not in the module.
//!
//! Read a snapshot, here a saved one:
//!
//! ```
//! use exitmeter_meter::{phase::Phase, reader::Snapshot, reasons, snapshot::Reason};
//!
//! let bytes = include_bytes!("tests/snapshot-1.3.bin");
//! let snapshot = Snapshot::parse(bytes)?;
//! assert_eq!(snapshot.version(), (1, 3));
//! for vcpu in snapshot.vcpus() {
//!     assert!(vcpu.balances());
//!     for row in vcpu.rows() {
//!         let name = match row.reason() {
//!             Reason::Code(code) => reasons::name(snapshot.isa(), code).unwrap_or("?"),
//!             _ => continue,
//!         };
//!         let ticks = row.cycles(Phase::Kernel);
//!         println!("{} {name}: {} exits, {ticks} ticks in KVM", vcpu.name(), row.exits());
//!     }
//! }
//! # Ok::<(), exitmeter_meter::reader::Error>(())
//! ```

#![cfg_attr(not(any(test, loom)), no_std)]

#[path = "mod.rs"]
pub mod meter;
pub use meter::*;

pub mod reader;
