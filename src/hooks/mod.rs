// SPDX-License-Identifier: GPL-2.0

//! The hooks into KVM: what is attached, and the callbacks.
//!
//! A callback turns C's pointers into safe values and calls one safe function below. What is attached
//! undoes itself when it is dropped. The crate root alone calls this room.

pub(crate) mod cpuid;
pub(crate) mod functions;
mod places;
pub(crate) mod prototypes;
pub(crate) mod sleep;
pub(crate) mod tracepoints;
pub(crate) mod vcpus;
