// SPDX-License-Identifier: GPL-2.0

//! What a VM is called in metrics: the label `vm`.

use std::collections::{BTreeMap, BTreeSet};

use super::sums::Sums;
use crate::names::Book;

/// The label of each VM, by its number. No two are the same.
///
/// It is the VM's UUID, else its name, else KVM's name for it, so a VM that is started again goes on in the same series. All
/// but KVM's name is what the VM's owner says. Where two VMs say the same, the older one has it, and the other one gets
/// KVM's name and its number behind it.
pub fn labels(sums: &Sums, names: &Book) -> BTreeMap<u64, String> {
    let mut taken = BTreeSet::new();
    let mut labels = BTreeMap::new();
    // Numbers are given in the order in which VMs come.
    for (number, vm) in &sums.vms {
        let given = names.vm(*number);
        let said = given.uuid.as_deref().or(given.name.as_deref());
        let mut label = said.unwrap_or(&vm.name).to_owned();
        if taken.contains(&label) {
            label = format!("{label}/{}/{number}", vm.name);
        }
        // Another VM may be called as that one is now.
        while !taken.insert(label.clone()) {
            label.push('/');
        }
        labels.insert(*number, label);
    }
    labels
}
