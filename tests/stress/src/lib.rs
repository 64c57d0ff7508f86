// SPDX-License-Identifier: GPL-2.0

//! Runs the module's own code at native speed: ledger, hash table and registry in user space, with
//! threads in place of CPUs. `make stress` runs all of it, `cargo test -p stress` a short form.
//!
//! An emulator shows what the module does, but not how it behaves on CPUs that run in parallel at full
//! speed. This crate implements the registry's [`platform`] in user space. [`measure`] measures how
//! long each kind of caller waits, with 1 to 65 536 vCPUs. [`together`] runs all kinds of callers at
//! once and compares each snapshot, query and total with what the writers did.
//!
//! Both fail when the code breaks a bound that it guarantees by construction: attempts, interrupts,
//! and steps under the lock. Neither fails on time, which also depends on the machine.

pub mod cpu;
pub mod measure;
pub mod platform;
pub mod spread;
pub mod together;
pub mod writer;
