// SPDX-License-Identifier: GPL-2.0

//! The atomics of ledger and table: `core`'s, and in the models of tests/loom.rs loom's, which
//! tries every order in which threads can see them.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{
    fence, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    fence, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
