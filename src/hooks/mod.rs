// SPDX-License-Identifier: GPL-2.0

//! The hooks into KVM: what is attached, and the callbacks.
//!
//! A callback turns C's pointers into safe values and calls one safe function below. A hook detaches when it
//! is dropped. Only the crate root calls this room.

pub(crate) mod cpuid;
pub(crate) mod functions;
mod places;
pub(crate) mod prototypes;
pub(crate) mod sleep;
pub(crate) mod tracepoints;
pub(crate) mod vcpus;
