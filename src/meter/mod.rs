// SPDX-License-Identifier: GPL-2.0

//! The meter itself and its interfaces: pure Rust on `core` alone.
//!
//! Nothing here depends on the kernel or on C. Nothing here may panic on a path that the module
//! takes, because a panic there kills the host.

pub mod ablation;
mod atomic;
pub mod btf;
pub mod bucket;
mod clamp;
pub mod detail;
pub mod hash_table;
pub mod histogram;
pub mod leaves;
pub mod ledger;
pub mod phase;
pub mod reasons;
// loom's atomics are not constants. Its models cover what the registry is built on.
#[cfg(not(loom))]
pub mod registry;
pub mod slow;
pub mod snapshot;
pub mod tables;
