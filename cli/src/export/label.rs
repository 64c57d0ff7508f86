// SPDX-License-Identifier: GPL-2.0

//! The label `vm` of metrics.

use std::collections::{BTreeMap, BTreeSet};

use super::sums::Sums;
use crate::names::NameBook;

/// Return a unique label for each VM, by VM number.
///
/// The label is the VM's UUID, else its name, else KVM's name for it, so a restarted VM continues
/// its series. All but KVM's name is chosen by the VM's owner. If two VMs claim the same label, the
/// older one gets it, and the other one's label gets KVM's name and its number appended.
pub fn labels(sums: &Sums, names: &NameBook) -> BTreeMap<u64, String> {
    let mut taken = BTreeSet::new();
    let mut labels = BTreeMap::new();
    // Numbers grow in the order in which VMs start.
    for (number, vm) in &sums.vms {
        let given = names.vm(*number);
        let chosen = given.uuid.as_deref().or(given.name.as_deref());
        let mut label = chosen.unwrap_or(&vm.name).to_owned();
        if taken.contains(&label) {
            label = format!("{label}/{}/{number}", vm.name);
        }
        // Another VM may already have this label, too.
        while !taken.insert(label.clone()) {
            label.push('/');
        }
        labels.insert(*number, label);
    }
    labels
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        export::sums::Detail,
        names::{NameLine, VmNames},
    };

    /// Return the labels of two VMs, numbers 1 and 2, with these names.
    fn labels_of(first: VmNames, second: VmNames) -> [String; 2] {
        let saved = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../src/meter/tests/snapshot-1.3.bin"
        );
        let sums = Sums::read(Path::new(saved), Detail::default()).expect("a snapshot");
        let mut names = NameBook::default();
        names.look_up(&sums.running());
        let life = sums.head.life;
        for (vm, given) in [(1, first), (2, second)] {
            names.add(NameLine { life, vm, given });
        }
        let labels: Vec<_> = labels(&sums, &names).into_values().collect();
        labels.try_into().expect("two VMs")
    }

    fn given(name: Option<&str>, uuid: Option<&str>) -> VmNames {
        VmNames {
            name: name.map(str::to_owned),
            uuid: uuid.map(str::to_owned),
            ..VmNames::default()
        }
    }

    #[test]
    fn labels_prefer_uuid_then_name_then_kvm_name() {
        let all = given(Some("web"), Some("8f"));
        assert_eq!(labels_of(all, given(Some("db"), None)), ["8f", "db"]);
        assert_eq!(
            labels_of(VmNames::default(), VmNames::default()),
            ["kvm-1234", "kvm-1300"]
        );
    }

    #[test]
    fn older_vm_keeps_a_contested_label() {
        let same = || given(Some("web"), None);
        assert_eq!(labels_of(same(), same()), ["web", "web/kvm-1300/2"]);
        // A VM cannot claim the fallback name of another one either.
        let trick = given(Some("kvm-1300"), None);
        assert_eq!(
            labels_of(trick, VmNames::default()),
            ["kvm-1300", "kvm-1300/kvm-1300/2"]
        );
    }
}
