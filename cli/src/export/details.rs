// SPDX-License-Identifier: GPL-2.0

//! Counters of details by VM, kept from one scrape to the next.
//!
//! The tables of a vCPU are bounded: a new row may replace an old one, and turning details off
//! discards all rows. So the sum over the rows of a snapshot can fall, which a counter must not.
//! Each scrape therefore adds the increase since the previous one (`Rows::since`). Exits that got
//! no row count for the others of their reason.

use std::{cmp::Reverse, collections::BTreeMap};

use exitmeter_meter::reasons::Isa;

use super::sums::{Key, Sums};
use crate::{
    model::Label,
    why::{
        detail::{nested_mark, Detail},
        tables::{self, Numbers, ReasonKey, Rows},
    },
};

/// Label of exits without a label of their own.
const OTHERS: &str = "others";

/// Numbers by reason and detail, the latter in words.
pub type NumbersByDetail = BTreeMap<(Key, String), Numbers>;

/// Counters by VM, and the tables of the latest scrape.
#[derive(Debug)]
pub struct Details {
    /// Maximum number of labels per VM. A guest chooses what its exits are about, and must not fill
    /// Prometheus's memory.
    limit: usize,
    /// The meter's life number.
    life: u64,
    /// TSC of the latest snapshot.
    at: u64,
    tables: BTreeMap<(u64, u32), tables::VcpuTables>,
    vms: BTreeMap<u64, Counters>,
}

/// Counters of a VM.
#[derive(Clone, Debug)]
pub struct Counters {
    /// TSC of the snapshot in which they begin.
    pub since: u64,
    /// Values of the counters.
    pub rows: NumbersByDetail,
    labels: usize,
}

impl Details {
    /// Create empty counters with at most `limit` labels per VM.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            life: 0,
            at: 0,
            tables: BTreeMap::new(),
            vms: BTreeMap::new(),
        }
    }

    /// Add the increase since the previous snapshot. Ignore an older snapshot, which comes from a
    /// scrape that took longer.
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
        let mut added: BTreeMap<u64, NumbersByDetail> = BTreeMap::new();
        for (id @ (vm, _), vcpu) in &new {
            let old = self.tables.get(id);
            // The tables are new if details were off meanwhile.
            let old = old.filter(|old| old.since == vcpu.since);
            let since = old.map(|old| vcpu.rows.since(&old.rows));
            count(
                added.entry(*vm).or_default(),
                since.as_ref().unwrap_or(&vcpu.rows),
                head.isa,
            );
        }
        for (vm, added) in added {
            let counters = self.vms.entry(vm).or_insert_with(|| Counters {
                since: head.now,
                rows: NumbersByDetail::new(),
                labels: 0,
            });
            counters.add(added, self.limit);
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
    /// Add the increase of all vCPUs' tables.
    fn add(&mut self, added: NumbersByDetail, limit: usize) {
        let mut added: Vec<_> = added.into_iter().collect();
        // If there are too many labels, the details with the most exits get one.
        added.sort_by_key(|(_, numbers)| Reverse(numbers.exits));
        for (mut place, numbers) in added {
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

/// Add the increase of a vCPU's tables.
fn count(to: &mut NumbersByDetail, added: &Rows, isa: Isa) {
    let label_key = |reason: ReasonKey| Label::new(isa, reason.to_reason()).key();
    for (key, row) in &added.by_key {
        let mut words = Detail::new(key.detail_kind, key.key).words();
        words.push_str(nested_mark(key.nested));
        add_to(to, (label_key(key.reason), words), row.numbers);
    }
    for ((_, reason), others) in &added.others {
        add_to(to, (label_key(*reason), OTHERS.to_owned()), *others);
    }
}

fn add_to(to: &mut NumbersByDetail, place: (Key, String), numbers: Numbers) {
    let sum = to.entry(place).or_default();
    *sum = sum.saturating_add(numbers);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        export::sums,
        why::tables::tests::{entry, Entries},
    };

    /// Return a snapshot taken at `now` with one VM, whose vCPU 0 has tables with these rows.
    fn snapshot(now: u64, since: u64, entries: Entries<'_>) -> Sums {
        let saved = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../src/meter/tests/snapshot-1.3.bin"
        );
        let mut sums = Sums::read(Path::new(saved), sums::Detail::default()).expect("a snapshot");
        sums.head.now = now;
        let entries = entries.iter();
        let vcpu = tables::VcpuTables {
            since,
            at: now,
            no_rip: false,
            rows: Rows::new(entries.map(|&(key, exits, missed)| entry(key, exits, missed))),
        };
        sums.tables = BTreeMap::from([((1, 0), vcpu)]);
        sums
    }

    /// Return the exits of VM 1 by detail.
    fn exits(details: &Details) -> Vec<(&str, u64)> {
        let rows = details.vms().get(&1).map(|counters| &counters.rows);
        let rows = rows.into_iter().flatten();
        let exits = rows.map(|((_, words), numbers)| (words.as_str(), numbers.exits));
        exits.collect()
    }

    #[test]
    fn counters_survive_replaced_rows() {
        let mut details = Details::new(8);
        details.add(&mut snapshot(10, 1, &[(Some(1), 5, 0), (Some(2), 7, 0)]));
        assert_eq!(exits(&details), [("write 0x1", 5), ("write 0x2", 7)]);
        // MSR 2 had two more exits before MSR 3 replaced it.
        let now = [(Some(1), 6, 0), (Some(3), 4, 9), (None, 9, 0)];
        details.add(&mut snapshot(20, 1, &now));
        let due = [
            ("others", 2),
            ("write 0x1", 6),
            ("write 0x2", 7),
            ("write 0x3", 4),
        ];
        assert_eq!(exits(&details), due);
        // A snapshot that is older but arrives later.
        details.add(&mut snapshot(15, 1, &[(Some(1), 5, 0)]));
        assert_eq!(exits(&details), due);
        // Details are turned off and on again.
        let mut off = snapshot(30, 1, &[]);
        off.tables.clear();
        details.add(&mut off);
        assert_eq!(exits(&details), due);
        details.add(&mut snapshot(40, 31, &[(Some(1), 1, 0)]));
        assert_eq!(exits(&details).get(1), Some(&("write 0x1", 7)));
    }

    #[test]
    fn labels_of_a_guest_are_limited() {
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
    fn counters_restart_with_the_meter() {
        let mut details = Details::new(2);
        details.add(&mut snapshot(10, 1, &[(Some(1), 5, 0)]));
        let mut other = snapshot(5, 1, &[(Some(1), 2, 0)]);
        other.head.life += 1;
        details.add(&mut other);
        assert_eq!(exits(&details), [("write 0x1", 2)]);
    }
}
