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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        export::sums::Detail,
        names::{Given, Line},
    };

    /// Return the labels of two VMs, numbers 1 and 2, whose VMMs were told this.
    fn of(first: Given, second: Given) -> [String; 2] {
        let saved = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../src/meter/tests/snapshot-1.3.bin"
        );
        let sums = Sums::read(Path::new(saved), Detail::default()).expect("a snapshot");
        let mut names = Book::default();
        names.look_up(&sums.running());
        let life = sums.head.life;
        for (vm, given) in [(1, first), (2, second)] {
            names.note(Line { life, vm, given });
        }
        let labels: Vec<_> = labels(&sums, &names).into_values().collect();
        labels.try_into().expect("two VMs")
    }

    fn given(name: Option<&str>, uuid: Option<&str>) -> Given {
        Given {
            name: name.map(str::to_owned),
            uuid: uuid.map(str::to_owned),
            ..Given::default()
        }
    }

    #[test]
    fn a_vm_is_called_by_what_stays() {
        let all = given(Some("web"), Some("8f"));
        assert_eq!(of(all, given(Some("db"), None)), ["8f", "db"]);
        assert_eq!(
            of(Given::default(), Given::default()),
            ["kvm-1234", "kvm-1300"]
        );
    }

    #[test]
    fn no_vm_takes_the_series_of_an_older_one() {
        let same = || given(Some("web"), None);
        assert_eq!(of(same(), same()), ["web", "web/kvm-1300/2"]);
        // Nor by the name that it would get.
        let trick = given(Some("kvm-1300"), None);
        assert_eq!(
            of(trick, Given::default()),
            ["kvm-1300", "kvm-1300/kvm-1300/2"]
        );
    }
}
