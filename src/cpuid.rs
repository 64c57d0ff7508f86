// SPDX-License-Identifier: GPL-2.0

//! Answers a guest that asks for its own exits by CPUID.

use crate::{
    kvm::vcpu::Vcpu,
    linux::parameters,
    log,
    meter::leaves::{
        Registers,
        Spoken, //
    },
    registry::Registry, //
};

/// Return true if only the guest's kernel is answered, by the parameter `leaf_cpl`.
pub(crate) fn for_cpl_0_alone() -> bool {
    parameters::given().leaf_cpl == 0
}

/// The answer to CPUID with `leaf` in eax and `subleaf` in ecx, and its line in the log.
/// `at_cpl_0` says whether the guest's kernel asks. `None` leaves what KVM itself answered: for a leaf that is not ours, and for a vCPU that
/// is not metered, whose sums would be wrong.
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
    if !query.is_spoken(subleaf) {
        return Some(answer);
    }
    log::query(
        who,
        &Spoken {
            leaf,
            query,
            subleaf,
            answer,
            isa: leaves.isa,
        },
    );
    Some(answer)
}
