// SPDX-License-Identifier: GPL-2.0

//! Tables of vCPUs as numbers: their contents at a moment, differences between two moments, and
//! sums.
//!
//! The rows of a vCPU's table are exact since they came in, and a reason's others hold the exits
//! without a row. `missed` is an upper bound of a row's exits among the others. It follows that:
//!
//! - A sum over vCPUs adds rows and bounds by key. A vCPU without a row for a key may have it among
//!   the others of that reason: they are its bound.
//! - Nothing is missed if a reason's others have no exit.
//! - A row that is replaced and comes back has a greater `missed` than before: Space-Saving sets it
//!   to the exits and `missed` of a row that is at least as great as the one that was replaced
//!   (src/meter/tables.rs). So a row with the same `missed` in two snapshots was there all the
//!   time, and their difference is exact.

use std::collections::{BTreeMap, BTreeSet};

use exitmeter_meter::{
    reader::{Snapshot, TableRow, Tables},
    snapshot::{Reason, TABLE_CODE},
};

use crate::model::{delta, HostReport, Label, Report};

/// Numbers of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Exits.
    pub exits: u64,
    /// Kernel ticks.
    pub kernel: u128,
    /// User ticks.
    pub user: u128,
}

impl Numbers {
    /// Add other numbers, saturating.
    pub fn saturating_add(self, other: Self) -> Self {
        Self {
            exits: self.exits.saturating_add(other.exits),
            kernel: self.kernel.saturating_add(other.kernel),
            user: self.user.saturating_add(other.user),
        }
    }

    /// Subtract other numbers, saturating at 0.
    fn saturating_sub(self, other: Self) -> Self {
        Self {
            exits: self.exits.saturating_sub(other.exits),
            kernel: self.kernel.saturating_sub(other.kernel),
            user: self.user.saturating_sub(other.user),
        }
    }

    fn minimum(self, other: Self) -> Self {
        Self {
            exits: self.exits.min(other.exits),
            kernel: self.kernel.min(other.kernel),
            user: self.user.min(other.user),
        }
    }

    /// Return true if all numbers are 0.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

/// A reason that can be sorted: its kind and its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReasonKey(u32, u32);

impl ReasonKey {
    /// Convert a reason.
    pub fn new(reason: Reason) -> Self {
        match reason {
            Reason::Code(code) => Self(0, code),
            Reason::Start => Self(1, 0),
            Reason::Other => Self(2, 0),
        }
    }

    /// Convert the reason that a label names.
    pub fn labelled(label: &Label) -> Self {
        Self::new(match (label.kind, label.code) {
            (_, Some(code)) => Reason::Code(code),
            ("start", None) => Reason::Start,
            _ => Reason::Other,
        })
    }

    /// Convert the key back to the reason.
    pub fn to_reason(self) -> Reason {
        match self {
            Self(0, code) => Reason::Code(code),
            Self(1, _) => Reason::Start,
            _ => Reason::Other,
        }
    }
}

/// Key that identifies a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Kind of table.
    pub table: u32,
    /// Exit reason.
    pub reason: ReasonKey,
    /// True if the exits came from an L2 guest.
    pub nested: bool,
    /// Kind of the detail in `key`.
    pub detail_kind: u8,
    /// Encoded detail.
    pub key: u64,
}

/// A row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowNumbers {
    /// Numbers.
    pub numbers: Numbers,
    /// Upper bound of what the row lacks.
    pub missed: Numbers,
}

/// Rows, and the exits without a row by table and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Rows by their keys.
    pub by_key: BTreeMap<Key, RowNumbers>,
    /// Others, by table and reason.
    pub others: BTreeMap<(u32, ReasonKey), Numbers>,
}

impl Rows {
    /// Collect the entries of a snapshot.
    pub fn new(entries: impl IntoIterator<Item = TableRow>) -> Self {
        let mut new = Self::default();
        for entry in entries {
            let reason = ReasonKey::new(entry.reason);
            let numbers = Numbers {
                exits: entry.exits,
                kernel: entry.kernel.unwrap_or(0).into(),
                user: entry.user.unwrap_or(0).into(),
            };
            if entry.others {
                let others = new.others.entry((entry.table, reason)).or_default();
                *others = others.saturating_add(numbers);
                continue;
            }
            let key = Key {
                table: entry.table,
                reason,
                nested: entry.nested,
                detail_kind: entry.detail_kind,
                key: entry.key,
            };
            let missed = Numbers {
                exits: entry.missed.exits,
                kernel: entry.missed.kernel.into(),
                user: entry.missed.user.into(),
            };
            // Each key has one row, unless the snapshot is damaged.
            let row = new.by_key.entry(key).or_default();
            row.numbers = row.numbers.saturating_add(numbers);
            row.missed = row.missed.saturating_add(missed);
        }
        new
    }

    /// Return the exits of a reason that are in no row of a table.
    pub fn others(&self, table: u32, reason: ReasonKey) -> Numbers {
        self.others
            .get(&(table, reason))
            .copied()
            .unwrap_or_default()
    }

    /// Return the part of one table, for all reasons or for one.
    pub fn part(&self, table: u32, reason: Option<ReasonKey>) -> Self {
        let (from, to) = match reason {
            Some(reason) => (reason, reason),
            None => (ReasonKey(0, 0), ReasonKey(u32::MAX, u32::MAX)),
        };
        let first = Key {
            table,
            reason: from,
            nested: false,
            detail_kind: 0,
            key: 0,
        };
        let last = Key {
            table,
            reason: to,
            nested: true,
            detail_kind: u8::MAX,
            key: u64::MAX,
        };
        let rows = self.by_key.range(first..=last);
        let others = self.others.range((table, from)..=(table, to));
        Self {
            by_key: rows.map(|(key, row)| (*key, *row)).collect(),
            others: others.map(|(place, sum)| (*place, *sum)).collect(),
        }
    }

    /// Sum up each reason in each table, rows and others.
    fn totals(&self) -> BTreeMap<(u32, ReasonKey), Numbers> {
        let mut totals = self.others.clone();
        for (key, row) in &self.by_key {
            let total = totals.entry((key.table, key.reason)).or_default();
            *total = total.saturating_add(row.numbers);
        }
        totals
    }

    /// Return the difference from an earlier state of the same tables.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut new = Self::default();
        let mut left: BTreeMap<_, _> = self.totals();
        for (place, total) in earlier.totals() {
            let left = left.entry(place).or_default();
            *left = left.saturating_sub(total);
        }
        for (key, row) in &self.by_key {
            let row = match earlier.by_key.get(key) {
                // The row was there all the time.
                Some(old) if old.missed.exits == row.missed.exits => RowNumbers {
                    numbers: row.numbers.saturating_sub(old.numbers),
                    missed: Numbers::default(),
                },
                // The row was replaced and came back. Its numbers are of this interval. Its earlier
                // numbers are not, and cannot be missed now.
                Some(old) => RowNumbers {
                    numbers: row.numbers,
                    missed: row.missed.saturating_sub(old.numbers),
                },
                None => *row,
            };
            let left = left.entry((key.table, key.reason)).or_default();
            *left = left.saturating_sub(row.numbers);
            if !row.numbers.is_zero() {
                new.by_key.insert(*key, row);
            }
        }
        left.retain(|_, numbers| !numbers.is_zero());
        new.others = left;
        new
    }

    /// Return the upper bound of a key's exits among the others.
    fn missed(&self, key: &Key) -> Numbers {
        let others = self.others(key.table, key.reason);
        if others.exits == 0 {
            return Numbers::default();
        }
        match self.by_key.get(key) {
            Some(row) => row.missed.minimum(others),
            None => others,
        }
    }

    /// Sum up several vCPUs.
    pub fn sum<'a>(vcpus: impl Iterator<Item = &'a Self> + Clone) -> Self {
        let keys: BTreeSet<_> = vcpus.clone().flat_map(|vcpu| vcpu.by_key.keys()).collect();
        let mut sum = Self::default();
        for key in keys {
            let row = vcpus.clone().fold(RowNumbers::default(), |sum, vcpu| {
                let numbers = vcpu.by_key.get(key).map(|row| row.numbers);
                RowNumbers {
                    numbers: sum.numbers.saturating_add(numbers.unwrap_or_default()),
                    missed: sum.missed.saturating_add(vcpu.missed(key)),
                }
            });
            sum.by_key.insert(*key, row);
        }
        for (place, others) in vcpus.flat_map(|vcpu| &vcpu.others) {
            let sum = sum.others.entry(*place).or_default();
            *sum = sum.saturating_add(*others);
        }
        sum
    }
}

/// Tables of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuTables {
    /// TSC when they began, or when the earlier of two snapshots was taken.
    pub since: u64,
    /// TSC of the snapshot that they come from.
    pub at: u64,
    /// True if the guest's RIP cannot be read.
    pub no_rip: bool,
    /// Rows.
    pub rows: Rows,
}

impl VcpuTables {
    /// Read the tables of a vCPU from a snapshot taken at `at`, of the kinds that `wanted` accepts.
    pub fn new(tables: &Tables<'_>, at: u64, wanted: impl Fn(u32) -> bool) -> Self {
        Self {
            since: tables.since,
            at,
            no_rip: tables.no_rip,
            rows: Rows::new(tables.entries().filter(|entry| wanted(entry.table))),
        }
    }
}

/// Return the ticks that the numbers of vCPUs cover: those since the oldest tables began, or since
/// the earlier snapshot.
pub fn ticks<'a>(vcpus: impl Iterator<Item = &'a VcpuTables> + Clone) -> u64 {
    let since = vcpus.clone().map(|vcpu| vcpu.since).min();
    let until = vcpus.map(|vcpu| vcpu.at).max();
    until
        .zip(since)
        .map_or(0, |(until, since)| until.saturating_sub(since))
}

/// All tables at a moment, or the difference between two moments.
#[derive(Clone, Debug)]
pub struct TableSet {
    /// The host.
    pub host: HostReport,
    /// True if the snapshot has tables, possibly of no vCPU.
    pub has_tables: bool,
    /// True if guest code was recorded.
    pub has_code: bool,
    /// vCPUs that have no tables for lack of memory.
    pub without_tables: u32,
    /// TSC at the earlier of two moments.
    pub earlier: Option<u64>,
    /// Names and processes of VMs, by their numbers.
    pub vms: BTreeMap<u64, (String, u32)>,
    /// Tables of the vCPUs that have some, by VM and id.
    pub vcpus: BTreeMap<(u64, u32), VcpuTables>,
}

impl TableSet {
    /// Read the tables of a snapshot.
    pub fn new(snapshot: &Snapshot<'_>) -> Self {
        let records: Vec<_> = snapshot.vcpus().collect();
        let mut has_code = false;
        let mut vcpus = BTreeMap::new();
        for tables in snapshot.tables() {
            has_code |= tables.has(TABLE_CODE);
            // The reader has checked that the record exists.
            if let Some(record) = records.get(tables.vcpu) {
                let vcpu = VcpuTables::new(&tables, snapshot.now(), |_| true);
                vcpus.insert((record.vm(), record.id()), vcpu);
            }
        }
        let vms = records.iter();
        Self {
            host: Report::new(snapshot).host,
            has_tables: snapshot.has_tables(),
            has_code,
            without_tables: snapshot.without_tables(),
            earlier: None,
            vms: vms
                .map(|record| (record.vm(), (record.name().to_owned(), record.pid())))
                .collect(),
            vcpus,
        }
    }

    /// Keep the tables of vCPUs that have gone since an earlier moment of the same life.
    pub fn keep(&mut self, earlier: Self) {
        self.has_code |= earlier.has_code;
        for (number, vm) in earlier.vms {
            let mut vcpus = earlier.vcpus.range((number, 0)..=(number, u32::MAX));
            if vcpus.next().is_some() {
                self.vms.entry(number).or_insert(vm);
            }
        }
        for (id, vcpu) in earlier.vcpus {
            self.vcpus.entry(id).or_insert(vcpu);
        }
    }

    /// Return the difference from an earlier moment.
    ///
    /// # Errors
    ///
    /// Returns an error if the two are not of one life of the meter, or not in this order.
    pub fn since(&self, earlier: &Self) -> Result<Self, delta::Error> {
        if (self.host.life, self.host.isa) != (earlier.host.life, earlier.host.isa) {
            return Err(delta::Error::NewLife);
        }
        let before = earlier.host.snapshot_tsc;
        if self.host.snapshot_tsc < before {
            return Err(delta::Error::Order);
        }
        let mut new = self.clone();
        new.earlier = Some(before);
        new.vcpus.retain(|id, vcpu| {
            let old = earlier.vcpus.get(id);
            // If details were off in between, these are new tables.
            let old = old.filter(|old| vcpu.since == old.since || vcpu.since <= before);
            if let Some(old) = old {
                vcpu.rows = vcpu.rows.since(&old.rows);
                vcpu.since = before;
            }
            // The tables of vCPUs that were gone before the earlier moment do not change.
            vcpu.at > before
        });
        let vms: BTreeSet<_> = new.vcpus.keys().map(|(vm, _)| *vm).collect();
        let runs = |vm: &u64| self.runs(*vm);
        new.vms.retain(|vm, _| vms.contains(vm) || runs(vm));
        Ok(new)
    }

    /// Return false if all tables of a VM are from an earlier moment. A VM without tables runs.
    pub fn runs(&self, vm: u64) -> bool {
        let mut vcpus = self.vcpus.range((vm, 0)..=(vm, u32::MAX)).peekable();
        let now = self.host.snapshot_tsc;
        vcpus.peek().is_none() || vcpus.any(|(_, vcpu)| vcpu.at == now)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use exitmeter_meter::{
        reader::Missed,
        snapshot::{TABLE_DETAILS, TABLE_USER},
    };

    use super::*;

    /// Create an entry for a written MSR, with `exits` exits of 10 ticks and the bound `missed`.
    /// Without a key, create the entry of the others.
    pub fn entry(key: Option<u64>, exits: u64, missed: u64) -> TableRow {
        TableRow {
            table: TABLE_DETAILS,
            reason: Reason::Code(32),
            detail_kind: 2,
            nested: false,
            others: key.is_none(),
            key: key.map_or(0, |msr| msr | 1 << 32),
            exits,
            kernel: Some(exits * 10),
            user: Some(0),
            missed: Missed {
                exits: missed,
                kernel: missed * 10,
                user: 0,
            },
        }
    }

    /// Arguments of [`entry`].
    pub type Entries<'a> = &'a [(Option<u64>, u64, u64)];

    fn rows(entries: Entries<'_>) -> Rows {
        Rows::new(
            entries
                .iter()
                .map(|&(key, exits, missed)| entry(key, exits, missed)),
        )
    }

    /// Return exits and bounds by MSR, and the others.
    fn exits_and_bounds(rows: &Rows) -> (Vec<(u64, u64, u64)>, u64) {
        let by_msr = rows.by_key.iter().map(|(key, row)| {
            let (numbers, missed) = (row.numbers, row.missed);
            assert_eq!(numbers.kernel, u128::from(numbers.exits) * 10);
            (key.key & 0xffff_ffff, numbers.exits, missed.exits)
        });
        let others = rows.others.values().map(|others| others.exits).sum();
        (by_msr.collect(), others)
    }

    #[test]
    fn sums_add_rows_and_bounds() {
        let one = rows(&[(Some(1), 100, 0), (Some(2), 50, 9), (None, 20, 0)]);
        let other = rows(&[(Some(1), 7, 0), (None, 3, 0)]);
        let third = rows(&[(Some(1), 1, 0)]);
        let sum = Rows::sum([&one, &other, &third].into_iter());
        // The second vCPU may have had up to three exits for MSR 2; the third had none.
        assert_eq!(exits_and_bounds(&sum), (vec![(1, 108, 0), (2, 50, 12)], 23));
    }

    #[test]
    fn bound_is_limited_by_the_others() {
        let tight = rows(&[(Some(1), 100, 60), (None, 20, 0)]);
        assert_eq!(
            exits_and_bounds(&Rows::sum([&tight].into_iter())).0,
            [(1, 100, 20)]
        );
        // All that the row's set lost was of other reasons.
        let exact = rows(&[(Some(1), 100, 60)]);
        assert_eq!(
            exits_and_bounds(&Rows::sum([&exact].into_iter())).0,
            [(1, 100, 0)]
        );
    }

    #[test]
    fn row_that_stayed_has_an_exact_difference() {
        let before = rows(&[(Some(1), 100, 30), (None, 40, 0)]);
        let after = rows(&[(Some(1), 150, 30), (Some(2), 4, 0), (None, 40, 0)]);
        assert_eq!(
            exits_and_bounds(&after.since(&before)),
            (vec![(1, 50, 0), (2, 4, 0)], 0)
        );
    }

    #[test]
    fn row_that_came_back_has_a_bound() {
        // MSR 1 had 10 exits, was replaced, and came back for 25 more. It may have had some in
        // between.
        let before = rows(&[(Some(1), 10, 0), (Some(2), 5, 0)]);
        let after = rows(&[(Some(1), 25, 12), (Some(3), 6, 5), (None, 19, 0)]);
        let between = after.since(&before);
        // 50 exits in all minus 15 before are 35, and 31 of these are in rows.
        assert_eq!(exits_and_bounds(&between), (vec![(1, 25, 2), (3, 6, 5)], 4));
        // Fewer exits than before are not an error, and do not become negative.
        let after = rows(&[(Some(1), 3, 12), (None, 30, 0)]);
        assert_eq!(
            exits_and_bounds(&after.since(&before)),
            (vec![(1, 3, 2)], 15)
        );
    }

    #[test]
    fn part_selects_one_table_and_reason() {
        let mut other = entry(Some(1), 5, 0);
        other.reason = Reason::Code(31);
        let mut others = entry(None, 3, 0);
        others.reason = Reason::Code(31);
        let mut user = entry(Some(u64::MAX), 7, 0);
        user.table = TABLE_USER;
        let rows = Rows::new([entry(Some(9), 4, 0), entry(None, 2, 0), other, others, user]);
        let exits = |part: Rows| {
            let rows: u64 = part.by_key.values().map(|row| row.numbers.exits).sum();
            (rows, part.others.values().map(|sum| sum.exits).sum::<u64>())
        };
        let of = |code| Some(ReasonKey::new(Reason::Code(code)));
        assert_eq!(exits(rows.part(TABLE_DETAILS, of(32))), (4, 2));
        assert_eq!(exits(rows.part(TABLE_DETAILS, of(31))), (5, 3));
        assert_eq!(exits(rows.part(TABLE_DETAILS, None)), (9, 5));
        assert_eq!(exits(rows.part(TABLE_USER, None)), (7, 0));
        assert_eq!(exits(rows.part(TABLE_DETAILS, of(30))), (0, 0));
    }

    #[test]
    fn keys_differ_by_table_reason_and_nesting() {
        let mut other = entry(Some(1), 5, 0);
        other.reason = Reason::Code(31);
        let mut nested = entry(Some(1), 6, 0);
        nested.nested = true;
        let mut user = entry(Some(1), 7, 0);
        user.table = TABLE_USER;
        let rows = Rows::new([entry(Some(1), 4, 0), other, nested, user]);
        assert_eq!(rows.by_key.len(), 4);
    }

    /// Space-Saving as in the module: one set of two rows.
    #[derive(Clone, Default)]
    struct Set {
        rows: Vec<(u64, u64, u64)>,
        lost: u64,
    }

    impl Set {
        fn exit(&mut self, key: u64) {
            if let Some(row) = self.rows.iter_mut().find(|row| row.0 == key) {
                row.1 += 1;
            } else if self.rows.len() < 2 {
                self.rows.push((key, 1, 0));
            } else if let Some(row) = self.rows.iter_mut().min_by_key(|row| row.1 + row.2) {
                self.lost += row.1;
                *row = (key, 1, row.1 + row.2);
            }
        }

        fn rows(&self) -> Rows {
            let rows = self
                .rows
                .iter()
                .map(|&(key, exits, missed)| entry(Some(key), exits, missed));
            let others = (self.lost != 0).then(|| entry(None, self.lost, 0));
            Rows::new(rows.chain(others))
        }
    }

    proptest::proptest! {
        /// Compare sums and differences of the module's tables with exact counts.
        #[test]
        fn every_row_is_within_its_bound(
            before in proptest::collection::vec((0_usize..2, 0_u64..6), 0..60),
            after in proptest::collection::vec((0_usize..2, 0_u64..6), 0..60),
        ) {
            let mut vcpus = [Set::default(), Set::default()];
            for (vcpu, key) in before {
                vcpus[vcpu].exit(key);
            }
            let earlier = vcpus.clone();
            let mut exact = BTreeMap::<u64, u64>::new();
            for &(vcpu, key) in &after {
                vcpus[vcpu].exit(key);
                *exact.entry(key).or_default() += 1;
            }
            let between: Vec<_> = vcpus
                .iter()
                .zip(&earlier)
                .map(|(now, earlier)| now.rows().since(&earlier.rows()))
                .collect();
            let sum = Rows::sum(between.iter());
            let (rows, others) = exits_and_bounds(&sum);
            let in_rows: u64 = rows.iter().map(|row| row.1).sum();
            assert_eq!(in_rows + others, after.len() as u64);
            for (key, exits, missed) in rows {
                let exact = exact.get(&key).copied().unwrap_or(0);
                assert!(exits <= exact && exact <= exits + missed, "{key}: {exact}, {exits}+{missed}");
            }
        }
    }
}
