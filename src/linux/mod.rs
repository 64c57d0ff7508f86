// SPDX-License-Identifier: GPL-2.0

//! Safe functions for what Linux offers and the kernel's crate does not, most of them by `shim.c`.
//!
//! Nothing here knows KVM, a ledger or the registry.

pub(crate) mod cache;
pub(crate) mod clock;
pub(crate) mod details;
pub(crate) mod interrupt;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod parameters;
pub(crate) mod random;
pub(crate) mod symbols;
pub(crate) mod task;
pub(crate) mod types;
