// SPDX-License-Identifier: GPL-2.0

//! What is metered, and how it is told: pure Rust on `core` alone.
//!
//! Nothing here knows the kernel or C. Nothing here may panic on a path that the module
//! takes, as a panic there is a dead host.

mod atomic;
pub mod btf;
pub mod bucket;
pub mod detail;
pub mod histogram;
pub mod leaves;
pub mod ledger;
pub mod parts;
pub mod phase;
pub mod reasons;
// loom's atomics are not constants, and its models are of what the registry stands on.
#[cfg(not(loom))]
pub mod registry;
pub mod slow;
pub mod snapshot;
pub mod table;
pub mod tables;
