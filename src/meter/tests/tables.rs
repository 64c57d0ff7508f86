// SPDX-License-Identifier: GPL-2.0

//! Tests of the tables against exact counting: for any input, rows and others sum to all exits and
//! ticks, and each row is within its bound.
#![cfg(not(loom))]

use std::collections::HashMap;

use exitmeter_meter::{
    detail,
    ledger::{Ledger, LedgerCopy, NoSupply},
    phase::Phase,
    reasons::{self, Isa, Slot},
    slow::Leaving,
    tables::{About, Tables, TablesCopy, CODES, DETAILS, MAX_BYTES, USERS, WAYS},
};
use proptest::prelude::*;

/// Maximum number of exits in one stream. Miri takes a thousand times as long.
const EXITS: usize = if cfg!(miri) { 60 } else { 4000 };

/// Exits and ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sums {
    exits: u64,
    kernel: u64,
    user: u64,
}

impl Sums {
    fn add(&mut self, other: Sums) {
        self.exits += other.exits;
        self.kernel += other.kernel;
        self.user += other.user;
    }

    /// Subtract `other`. Panics if a sum is too small.
    fn less(self, other: Sums) -> Self {
        Self {
            exits: self.exits.checked_sub(other.exits).expect("exits"),
            kernel: self.kernel.checked_sub(other.kernel).expect("kernel ticks"),
            user: self.user.checked_sub(other.user).expect("user ticks"),
        }
    }
}

/// Distribution of keys.
#[derive(Clone, Copy, Debug)]
enum Stream {
    /// Few keys have most of the exits.
    Skewed,
    /// All keys are equally likely, and there are more keys than rows.
    Uniform,
    /// One more key than a set has rows, in turns: each evicts the next.
    Hostile,
    /// No key comes twice.
    Ever,
}

/// Random numbers from a fixed rule, so that failures can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }
}

/// Describe a vCPU that leaves its CPU, with a cause for user space.
fn leaving(phase: Phase, why: u16) -> Leaving {
    Leaving {
        phase,
        to_user: Some(why),
    }
}

/// Key of an exit, without its reason.
type Key = (Slot, bool, u64);

/// A vCPU with tables, and exact counts to compare them with.
struct Metered {
    ledger: Box<Ledger>,
    tables: Box<Tables>,
    now: u64,
    begun: bool,
    reasons: HashMap<usize, Sums>,
    details: HashMap<(usize, bool, u64), Sums>,
    codes: HashMap<(usize, bool, u64), Sums>,
    users: HashMap<(usize, u16), Sums>,
}

impl Metered {
    fn new() -> Self {
        // SAFETY: All-zero bytes are a valid ledger and valid tables.
        let (ledger, tables): (Box<Ledger>, Box<Tables>) =
            unsafe { (Box::new(core::mem::zeroed()), Box::new(core::mem::zeroed())) };
        tables.prepare();
        let metered = Self {
            ledger,
            tables,
            now: 1000,
            begun: false,
            reasons: HashMap::new(),
            details: HashMap::new(),
            codes: HashMap::new(),
            users: HashMap::new(),
        };
        metered.ledger.begin(metered.now, Phase::Kernel);
        metered.ledger.entry(metered.now + 5);
        metered
    }

    fn at(&mut self, ticks: u64) -> u64 {
        self.now += ticks;
        self.now
    }

    /// Take an exit with `kernel` kernel ticks and, unless `user` is 0, an exit to user space for a
    /// cause with `user` ticks.
    fn exit(
        &mut self,
        (slot, nested, key): Key,
        detail: bool,
        rip: u64,
        kernel: u64,
        user: u64,
        why: u16,
    ) {
        let about = About {
            slot,
            nested,
            key: detail.then_some(detail::key_of(slot, key)),
            rip: (rip != 0).then_some(rip),
        };
        self.begun = true;
        let now = self.at(50);
        self.ledger
            .exit_with::<false>(&self.tables, now, &about, NoSupply);
        if user != 0 {
            let now = self.at(kernel);
            self.ledger
                .leave_to_user_with(&self.tables, now, || Some(why), || 0);
            let now = self.at(user);
            self.ledger.resume_with(&self.tables, now);
        }
        let now = self.at(kernel);
        self.ledger.entry_with(&self.tables, now, || 0);
        let sums = Sums {
            exits: 1,
            kernel: if user == 0 { kernel } else { 2 * kernel },
            user,
        };
        self.reasons.entry(slot.index()).or_default().add(sums);
        if detail {
            self.details
                .entry((slot.index(), nested, key))
                .or_default()
                .add(sums);
        }
        if rip != 0 {
            self.codes
                .entry((slot.index(), nested, rip))
                .or_default()
                .add(sums);
        }
        if user != 0 {
            self.users.entry((slot.index(), why)).or_default().add(sums);
        }
    }

    fn copy(&self) -> (Box<LedgerCopy>, Box<TablesCopy>) {
        let (mut ledger, mut tables) = (Box::new(LedgerCopy::new()), Box::new(TablesCopy::new()));
        assert!(self
            .ledger
            .try_copy_with(&mut ledger, &mut Some((&self.tables, &mut tables))));
        assert!(ledger.balances());
        (ledger, tables)
    }

    /// Compare the tables with the exact counts.
    fn check(&self) {
        let (ledger, tables) = self.copy();
        assert_eq!(tables.has_begun(), self.begun);
        if !self.begun {
            return;
        }
        let total: u64 = self.reasons.values().map(|sums| sums.exits).sum();
        for (place, all) in &self.reasons {
            let slot = Slot::from_index(*place).expect("below SLOTS");
            let mut rows = Sums::default();
            for row in tables
                .details()
                .iter()
                .filter(|row| row.slot() == Some(slot))
            {
                let exact = self.details[&(*place, row.is_nested(), row.detail())];
                let has = Sums {
                    exits: row.exits,
                    kernel: row.kernel,
                    user: row.user,
                };
                let missed = exact.less(has);
                assert!(missed.exits <= row.missed_exits);
                assert!(missed.kernel <= row.missed_kernel);
                assert!(missed.user <= row.missed_user);
                rows.add(has);
            }
            let others = tables.other_details(&ledger, slot);
            let left = all.less(rows);
            assert_eq!(
                (others.exits, others.kernel, others.user),
                (left.exits, left.kernel, left.user)
            );

            let mut rows = Sums::default();
            for row in tables.codes().iter().filter(|row| row.slot() == Some(slot)) {
                let exact = Sums {
                    user: 0,
                    ..self.codes[&(*place, row.is_nested(), row.rip)]
                };
                let has = Sums {
                    exits: row.exits,
                    kernel: row.kernel,
                    user: 0,
                };
                let missed = exact.less(has);
                assert!(missed.exits <= row.missed_exits);
                assert!(missed.kernel <= row.missed_kernel);
                rows.add(has);
            }
            let others = tables.other_codes(&ledger, slot);
            let left = all.less(rows);
            assert_eq!(
                (others.exits, others.kernel, others.user),
                (left.exits, left.kernel, 0)
            );

            let (mut rows, mut users) = (Sums::default(), Sums::default());
            for row in tables.users().iter().filter(|row| row.slot() == Some(slot)) {
                let exact = self.users[&(*place, row.why())];
                assert_eq!((row.exits, row.ticks), (exact.exits, exact.user));
                rows.add(exact);
            }
            for (_, sums) in self.users.iter().filter(|((it, _), _)| it == place) {
                users.add(*sums);
            }
            let (others, left) = (tables.other_users(&ledger, slot), users.less(rows));
            assert_eq!((others.exits, others.user), (left.exits, left.user));
        }
        // A key with more exits than a set can give to all its rows has a row.
        for ((place, nested, detail), exact) in &self.details {
            let has_row = tables.details().iter().any(|row| {
                let slot = row.slot().map(Slot::index);
                (slot, row.is_nested(), row.detail()) == (Some(*place), *nested, *detail)
            });
            assert!(has_row || exact.exits <= total / WAYS as u64);
        }
        if self.details.len() <= WAYS {
            assert!(tables.details().iter().all(|row| row.missed_exits == 0));
        }
    }
}

/// Return details of one set, by the hash of `Tables`.
fn details_of_one_set(slot: Slot, count: usize) -> Vec<u64> {
    let set = |detail| (detail::key_of(slot, detail) as u32).wrapping_mul(0x61c8_8647) >> 26;
    (0..)
        .filter(|detail| set(*detail) == set(0))
        .take(count)
        .collect()
}

fn slots() -> [Slot; 3] {
    [32, 30, 10].map(|code| reasons::slot(Isa::Vmx, code))
}

#[test]
fn tables_take_at_most_48_kib() {
    assert!(size_of::<Tables>() <= MAX_BYTES && MAX_BYTES == 48 * 1024);
    const { assert!(DETAILS >= 256 && CODES >= 256 && USERS >= 32) };
}

#[test]
fn one_key_too_many_evicts_and_all_other_rows_are_exact() {
    let slot = slots()[0];
    let keys = details_of_one_set(slot, WAYS + 1);
    let mut metered = Metered::new();
    for round in 1..=10 {
        for key in keys.iter().take(WAYS) {
            metered.exit((slot, false, *key), true, 7, 100, 0, 0);
        }
        let (ledger, tables) = metered.copy();
        assert!(tables
            .details()
            .iter()
            .all(|row| row.exits == round && row.missed_exits == 0));
        assert!(tables.other_details(&ledger, slot).is_empty());
    }
    metered.exit((slot, false, keys[WAYS]), true, 7, 300, 0, 0);
    metered.check();
    let (ledger, tables) = metered.copy();
    let new = tables
        .details()
        .iter()
        .find(|row| row.detail() == keys[WAYS])
        .expect("a row");
    assert_eq!((new.exits, new.kernel), (1, 300));
    assert_eq!((new.missed_exits, new.missed_kernel), (10, 1000));
    let others = tables.other_details(&ledger, slot);
    assert_eq!((others.exits, others.kernel), (10, 1000));
    assert_eq!(tables.codes().len(), 1);
    assert_eq!(
        (tables.codes()[0].exits, tables.codes()[0].kernel),
        (41, 4300)
    );
}

#[test]
fn exits_before_the_tables_do_not_count() {
    let mut metered = Metered::new();
    let slot = slots()[2];
    let now = metered.at(50);
    metered.ledger.exit(now, slot);
    let now = metered.at(1_000_000);
    metered.ledger.entry(now);
    metered.exit((slot, false, 1), false, 0, 70, 9, 2);
    metered.check();
    metered.exit((slot, false, 1), true, 7, 70, 9, 2);
    metered.check();
    let (ledger, tables) = metered.copy();
    assert_eq!(ledger.row(slot).exits, 3);
    assert_eq!(tables.details().len(), 1);
    // The first exit with tables has no detail, and counts for them.
    let others = tables.other_details(&ledger, slot);
    assert_eq!((others.exits, others.kernel, others.user), (1, 140, 9));
    assert_eq!(tables.since, now + 50);
    assert!(tables.lacks_rip());
}

/// Restart the clock while a vCPU is in the kernel or in user space: nothing changes.
#[test]
fn tables_continue_when_the_clock_restarts() {
    for phase in [Phase::Kernel, Phase::User] {
        let mut metered = Metered::new();
        // SAFETY: They outlive the ledger's use.
        unsafe { metered.ledger.set_tables(&raw mut *metered.tables) };
        let slot = slots()[1];
        let about = About {
            slot,
            nested: false,
            key: Some(detail::key_of(slot, 5)),
            rip: Some(9),
        };
        let begun = metered.at(100);
        metered
            .ledger
            .exit_with::<false>(&metered.tables, begun, &about, NoSupply);
        let now = metered.at(10);
        if phase == Phase::User {
            metered
                .ledger
                .leave_with(&metered.tables, now, leaving(phase, 2), || 0);
        }
        metered.ledger.rebase(now + 1000, 7);
        if phase == Phase::User {
            metered.ledger.resume_with(&metered.tables, 27);
        }
        metered.ledger.entry_with(&metered.tables, 30, || 0);
        let (ledger, tables) = metered.copy();
        let row = tables.details()[0];
        let (kernel, user) = match phase {
            Phase::User => (10 + 3, 1000 + 20),
            _ => (10 + 1000 + 23, 0),
        };
        assert_eq!((row.kernel, row.user), (kernel, user));
        assert_eq!(
            tables.users().iter().map(|row| row.ticks).sum::<u64>(),
            user
        );
        assert!(tables.other_details(&ledger, slot).is_empty());
        assert!(tables.other_users(&ledger, slot).is_empty());
        assert_eq!(ledger.last.wrapping_sub(tables.since), 10 + 1000 + 23);
    }
}

/// If tables come or go during an exit, its sample still has all of its kernel ticks.
#[test]
fn sample_is_whole_when_tables_come_or_go() {
    for comes in [false, true] {
        let mut metered = Metered::new();
        let slot = slots()[0];
        // The window is full, so the tables that go let short exits pass.
        for _ in 0..if comes { 0 } else { 40 } {
            metered.exit((slot, false, 1), true, 7, 5_000, 0, 0);
        }
        let about = About {
            slot,
            nested: false,
            key: Some(detail::key_of(slot, 1)),
            rip: Some(7),
        };
        let (ledger, tables) = (&metered.ledger, &metered.tables);
        let now = metered.now;
        match comes {
            true => {
                ledger.exit(now + 10, slot);
                ledger.leave(now + 4_010, Phase::Halted);
                ledger.resume_with(tables, now + 5_010);
                ledger.entry_with(tables, now + 9_010, || 0);
            }
            false => {
                ledger.exit_with::<false>(tables, now + 10, &about, NoSupply);
                ledger.leave_with(tables, now + 4_010, leaving(Phase::Halted, 0), || 0);
                ledger.resume(now + 5_010);
                ledger.entry(now + 9_010);
            }
        }
        let (ledger, _) = metered.copy();
        assert_eq!(ledger.row(slot).max, 8_000, "comes: {comes}");
    }
}

/// An exit of the first reason at address 0 has all bytes 0, as a free row has.
#[test]
fn exit_with_all_zero_keys_has_a_row() {
    let mut metered = Metered::new();
    let slot = reasons::slot(Isa::Svm, 0);
    let about = About {
        slot,
        nested: false,
        key: None,
        rip: Some(0),
    };
    for _ in 0..3 {
        let now = metered.at(50);
        metered
            .ledger
            .exit_with::<false>(&metered.tables, now, &about, NoSupply);
        let now = metered.at(20);
        metered.ledger.entry_with(&metered.tables, now, || 0);
    }
    let (ledger, tables) = metered.copy();
    assert_eq!(ledger.row(slot).exits, 3);
    let row = tables.codes()[0];
    assert_eq!((row.slot(), row.rip, row.exits), (Some(slot), 0, 3));
    assert!(tables.other_codes(&ledger, slot).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 3 } else { 128 },
        ..ProptestConfig::default()
    })]

    /// For any input, rows and others sum to all exits and ticks of each reason.
    #[test]
    fn rows_and_others_sum_to_all_exits(
        stream in prop_oneof![
            Just(Stream::Skewed), Just(Stream::Uniform), Just(Stream::Hostile), Just(Stream::Ever)
        ],
        seed in 1_u64..,
        exits in 0..EXITS,
        without in 0_u64..3,
    ) {
        let mut random = Random(seed);
        let mut metered = Metered::new();
        let colliding = slots().map(|slot| details_of_one_set(slot, WAYS + 1));
        for number in 0..exits {
            let place = match stream {
                Stream::Hostile => number / 50 % 3,
                _ => random.below(3) as usize,
            };
            let slot = slots()[place];
            let key = match stream {
                Stream::Skewed => {
                    let bits = random.below(11);
                    random.below(1 << bits)
                }
                Stream::Uniform => random.below(4 * DETAILS as u64),
                Stream::Hostile => colliding[place][number % (WAYS + 1)],
                Stream::Ever => number as u64,
            };
            // The first few exits have neither, so that the tables begin midway.
            let late = number as u64 >= 4 * without;
            let detail = late && random.below(16) != 0;
            let rip = match late && random.below(16) != 0 {
                true => 1 + key.wrapping_mul(0x1_0001) + (random.below(2) << 63),
                false => 0,
            };
            let nested = random.below(8) == 0;
            let (kernel, user) = (1 + random.below(5000), match random.below(4) {
                0 => 1 + random.below(90_000),
                _ => 0,
            });
            let why = random.below(20) as u16;
            metered.exit((slot, nested, key), detail, rip, kernel, user, why);
            if number % 512 == 0 {
                metered.check();
            }
        }
        metered.check();
    }
}
