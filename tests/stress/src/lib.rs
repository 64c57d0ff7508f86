// SPDX-License-Identifier: GPL-2.0

//! The module's own code at native speed: ledger, table and registry in user space, with real
//! threads in place of CPUs. `make stress` runs all of it, `cargo test -p stress` a short form.
//!
//! An emulator shows what the module does, not what CPUs do that run side by side at full speed.
//! This crate gives the registry a [`platform`] of user space. [`measure`] tells how long each kind
//! of caller waits, from 1 to 65 536 vCPUs; [`together`] runs all of them at once and holds each
//! snapshot, query and total against what the writers did.
//!
//! Both fail on what the code guarantees by construction: attempts, interrupts, and steps under
//! the lock. Neither fails on time, which is the machine's as well.

pub mod cpu;
pub mod measure;
pub mod platform;
pub mod spread;
pub mod together;
pub mod writer;
