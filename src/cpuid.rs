// SPDX-License-Identifier: GPL-2.0

//! The answers to guests that ask for their own exits by CPUID.

use crate::{
    kvm::vcpu::Vcpu,
    log,
    meter::leaves::{
        LogLine, //
        Registers,
    },
    registry::Registry, //
};

/// Return the answer to CPUID with `leaf` in eax and `subleaf` in ecx, and log it. `at_cpl_0` says that the
/// guest's kernel asks.
///
/// `None` leaves KVM's own answer: for a leaf that is not ours, and for an unmetered vCPU, whose sums would
/// be wrong.
pub(crate) fn answer(
    registry: &Registry,
    vcpu: Vcpu<'_>,
    leaf: u32,
    subleaf: u32,
    at_cpl_0: bool,
) -> Option<Registers> {
    let leaves = registry.leaves();
    let query = leaves.classify(leaf)?;
    let (who, answer) = registry.answer(vcpu, query, subleaf, at_cpl_0)?;
    if !query.is_logged(subleaf) {
        return Some(answer);
    }
    log::query(
        who,
        &LogLine {
            leaf,
            query,
            subleaf,
            answer,
            isa: leaves.isa,
        },
    );
    Some(answer)
}
