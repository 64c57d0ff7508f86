// SPDX-License-Identifier: GPL-2.0

//! Answers to guests that ask for their own exits by CPUID. The redirect in `hooks::cpuid` calls this.

use crate::{
    kvm::vcpu::Vcpu,
    log,
    meter::leaves::{
        LogLine, //
        Registers,
    },
    registry::Registry, //
};

/// Return the answer to CPUID with `leaf` in eax and `subleaf` in ecx, and log it. `at_cpl_0` is true if the
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
    let (identity, answer) = registry.answer(vcpu, query, subleaf, at_cpl_0)?;
    if !query.is_logged(subleaf) {
        return Some(answer);
    }
    log::query(
        identity,
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
