// SPDX-License-Identifier: GPL-2.0

//! Counters of what exits were about, by VM, kept from one scrape to the next.
//!
//! A table of a vCPU is bounded: a row gives way to another one, and all rows go when details are turned off. So the sum of
//! the rows of a snapshot falls at times, which a counter must not. Here each scrape adds what came since the one before
//! (`Rows::since`), and what came in no row counts for the reason's others.

use std::{cmp::Reverse, collections::BTreeMap};

use exitmeter_meter::reasons::Isa;

use super::sums::{Key, Sums};
use crate::{
    model::Label,
    why::{
        detail::Detail,
        tables::{self, Numbers, Of, Rows},
    },
};

/// The label of what has no label of its own.
const OTHERS: &str = "others";

/// Numbers by reason, and by what the exits were about, in words.
pub type Counts = BTreeMap<(Key, String), Numbers>;

/// Counters by VM, and what the latest scrape has read.
#[derive(Debug)]
pub struct Details {
    /// The most labels of a VM. A guest chooses what its exits are about, and must not fill the memory of a Prometheus.
    limit: usize,
    /// The meter's life.
    life: u64,
    /// TSC of the latest snapshot.
    at: u64,
    tables: BTreeMap<(u64, u32), tables::Vcpu>,
    vms: BTreeMap<u64, Counters>,
}

/// The counters of a VM.
#[derive(Clone, Debug)]
pub struct Counters {
    /// TSC of the snapshot that they begin with.
    pub since: u64,
    /// Their values.
    pub rows: Counts,
    labels: usize,
}

impl Details {
    /// Begin counters with at most so many labels for each VM.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            life: 0,
            at: 0,
            tables: BTreeMap::new(),
            vms: BTreeMap::new(),
        }
    }

    /// Add what came since the snapshot before. An older snapshot, of a scrape that took longer, adds nothing.
    pub fn add(&mut self, sums: &mut Sums) {
        let head = &sums.head;
        if self.life != head.life {
            *self = Self::new(self.limit);
            self.life = head.life;
        }
        if head.now <= self.at {
            return;
        }
        self.at = head.now;
        let new = std::mem::take(&mut sums.tables);
        let mut came: BTreeMap<u64, Counts> = BTreeMap::new();
        for (id @ (vm, _), vcpu) in &new {
            let old = self.tables.get(id);
            // Where details were off meanwhile, the tables are others.
            let old = old.filter(|old| old.since == vcpu.since);
            let since = old.map(|old| vcpu.rows.since(&old.rows));
            count(
                came.entry(*vm).or_default(),
                since.as_ref().unwrap_or(&vcpu.rows),
                head.isa,
            );
        }
        for (vm, came) in came {
            let counters = self.vms.entry(vm).or_insert_with(|| Counters {
                since: head.now,
                rows: Counts::new(),
                labels: 0,
            });
            counters.add(came, self.limit);
        }
        self.tables = new;
        self.vms.retain(|vm, _| sums.vms.contains_key(vm));
    }

    /// Return the counters by VM.
    pub fn vms(&self) -> &BTreeMap<u64, Counters> {
        &self.vms
    }
}

impl Counters {
    /// Add what came to the tables of all vCPUs.
    fn add(&mut self, came: Counts, limit: usize) {
        let mut came: Vec<_> = came.into_iter().collect();
        // When there is not room for all, the leading ones get a label.
        came.sort_by_key(|(_, numbers)| Reverse(numbers.exits));
        for (mut place, numbers) in came {
            if place.1 != OTHERS && !self.rows.contains_key(&place) {
                match self.labels < limit {
                    true => self.labels += 1,
                    false => place.1 = OTHERS.to_owned(),
                }
            }
            add_to(&mut self.rows, place, numbers);
        }
    }
}

/// Add what came to the tables of a vCPU.
fn count(to: &mut Counts, came: &Rows, isa: Isa) {
    let reason = |of: Of| Label::new(isa, of.reason()).key();
    for (key, row) in &came.rows {
        let mut words = Detail::new(key.detail_kind, key.key).words();
        if key.nested {
            words.push_str(", nested");
        }
        add_to(to, (reason(key.of), words), row.numbers);
    }
    for ((_, of), others) in &came.others {
        add_to(to, (reason(*of), OTHERS.to_owned()), *others);
    }
}

fn add_to(to: &mut Counts, place: (Key, String), numbers: Numbers) {
    let sum = to.entry(place).or_default();
    *sum = sum.plus(numbers);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        export::sums,
        why::tables::tests::{entry, Entries},
    };

    /// Take a snapshot of one VM, at a moment, whose vCPU 0 has tables with these rows.
    fn snapshot(now: u64, since: u64, entries: Entries<'_>) -> Sums {
        let saved = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../src/meter/tests/snapshot-1.3.bin"
        );
        let mut sums = Sums::read(Path::new(saved), sums::Detail::default()).expect("a snapshot");
        sums.head.now = now;
        let entries = entries.iter();
        let vcpu = tables::Vcpu {
            since,
            at: now,
            no_rip: false,
            rows: Rows::new(entries.map(|&(key, exits, missed)| entry(key, exits, missed))),
        };
        sums.tables = BTreeMap::from([((1, 0), vcpu)]);
        sums
    }

    /// Return the exits of VM 1 by what they were about.
    fn exits(details: &Details) -> Vec<(&str, u64)> {
        let rows = details.vms().get(&1).map(|counters| &counters.rows);
        let rows = rows.into_iter().flatten();
        let exits = rows.map(|((_, words), numbers)| (words.as_str(), numbers.exits));
        exits.collect()
    }

    #[test]
    fn no_counter_falls_and_no_exit_is_lost_when_a_row_gives_way() {
        let mut details = Details::new(8);
        details.add(&mut snapshot(10, 1, &[(Some(1), 5, 0), (Some(2), 7, 0)]));
        assert_eq!(exits(&details), [("write 0x1", 5), ("write 0x2", 7)]);
        // MSR 2 had two exits more, and gave way to MSR 3.
        let now = [(Some(1), 6, 0), (Some(3), 4, 9), (None, 9, 0)];
        details.add(&mut snapshot(20, 1, &now));
        let due = [
            ("others", 2),
            ("write 0x1", 6),
            ("write 0x2", 7),
            ("write 0x3", 4),
        ];
        assert_eq!(exits(&details), due);
        // A snapshot that was taken before, and comes after.
        details.add(&mut snapshot(15, 1, &[(Some(1), 5, 0)]));
        assert_eq!(exits(&details), due);
        // Details are off, and on again.
        let mut off = snapshot(30, 1, &[]);
        off.tables.clear();
        details.add(&mut off);
        assert_eq!(exits(&details), due);
        details.add(&mut snapshot(40, 31, &[(Some(1), 1, 0)]));
        assert_eq!(exits(&details).get(1), Some(&("write 0x1", 7)));
    }

    #[test]
    fn a_guest_gets_no_more_labels_than_there_may_be() {
        let mut details = Details::new(2);
        let many = [
            (Some(1), 5, 0),
            (Some(2), 7, 0),
            (Some(3), 6, 0),
            (None, 1, 0),
        ];
        details.add(&mut snapshot(10, 1, &many));
        assert_eq!(
            exits(&details),
            [("others", 6), ("write 0x2", 7), ("write 0x3", 6)]
        );
    }

    #[test]
    fn another_life_of_the_meter_begins_anew() {
        let mut details = Details::new(2);
        details.add(&mut snapshot(10, 1, &[(Some(1), 5, 0)]));
        let mut other = snapshot(5, 1, &[(Some(1), 2, 0)]);
        other.head.life += 1;
        details.add(&mut other);
        assert_eq!(exits(&details), [("write 0x1", 2)]);
    }
}
