// SPDX-License-Identifier: GPL-2.0

//! Readers of KVM: of a vCPU, of an exit and of the vendor's module.
//!
//! KVM's pointers become safe values here. Nothing here uses a ledger or the registry.

pub(crate) mod exit;
pub(crate) mod vcpu;
pub(crate) mod vendor;
