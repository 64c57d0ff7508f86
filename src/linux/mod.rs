// SPDX-License-Identifier: GPL-2.0

//! Safe functions of Linux that the kernel's crate lacks, most of them by `shim.c`.
//!
//! Nothing here knows KVM, a ledger or the registry.

pub(crate) mod btf;
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
