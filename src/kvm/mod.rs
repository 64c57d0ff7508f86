// SPDX-License-Identifier: GPL-2.0

//! What the module reads of KVM: a vCPU, an exit, and which vendor's half of KVM is loaded.
//!
//! KVM's pointers become safe values here. Nothing here knows a ledger or the registry.

pub(crate) mod exit;
pub(crate) mod vcpu;
pub(crate) mod vendor;
