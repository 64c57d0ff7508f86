// SPDX-License-Identifier: GPL-2.0

//! Tiny KVM guests, each a loop around one instruction that exits, and the VMM that runs
//! them.
//!
//! What a guest does is known to the instruction, so how often it exits, and why, is known
//! too: [`Expected`] says it, for both vendors. Whatever counts exits can be held against
//! it.
//!
//! A VM's every vCPU has a window of 64 KiB of its own, with code, stack, tables and
//! queries, so that vCPUs share no page and faults can be counted too.

mod absent;
mod catalogue;
mod code;
mod config;
mod hyperv;
mod inner;
mod machine;
mod meddle;
mod memory;
mod window;

pub use absent::Absent;
pub use catalogue::{Differs, Expected, Mode, Program};
pub use config::{Config, Error, Quad, MAX_LONG_VCPUS, MAX_PAGES, MAX_QUERIES, MAX_VCPUS};
pub use hyperv::NOTIFY_LONG_SPIN_WAIT;
pub use inner::Inner;
pub use machine::{host_isa, pin, with_apic_id, Machine, Seen};
pub use meddle::Stepped;
pub use window::{REGISTERS, UNANSWERED};
