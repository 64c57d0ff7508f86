// SPDX-License-Identifier: GPL-2.0

//! Models of the data that threads share without a lock. loom tries them in every order of steps
//! and of visible stores: `make soak-loom`.

#![cfg(loom)]

use exitmeter_meter::{
    hash_table::{Full, HashEntry, HashTable},
    ledger::{Ledger, LedgerCopy},
    phase::Phase,
    reasons::{self, Isa, Slot},
};
use loom::{sync::Arc, thread};

/// Run a model in all orders in which its threads are interrupted up to twice (LOOM_MAX_PREEMPTIONS
/// sets another number), and with all values that they may see.
fn try_all(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    // A copy reads some hundred words.
    builder.max_branches = 100_000;
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(model);
}

fn slot(code: u32) -> Slot {
    reasons::slot(Isa::Vmx, code)
}

/// Allocate a copy in zeroed memory, because a model's stack is small.
fn copy() -> Box<LedgerCopy> {
    // SAFETY: All-zero bytes are a valid copy.
    unsafe { Box::<LedgerCopy>::new_zeroed().assume_init() }
}

/// Transitions of the vCPU in the models, and the numbers after each.
const LIFE: [(u64, fn(&Ledger, u64)); 3] = [
    (10, |ledger, now| ledger.exit(now, slot(10))),
    (1000, |ledger, now| ledger.entry(now)),
    (1100, |ledger, now| ledger.exit_from_nested(now, slot(12))),
];

/// Return the expected numbers at the time of the latest transition: exits of reason 10, its kernel
/// and guest ticks and samples, exits of reason 12, and those of them from a nested guest.
fn due(last: u64) -> [u64; 6] {
    match last {
        0 => [0, 0, 0, 0, 0, 0],
        10 => [1, 0, 0, 0, 0, 0],
        1000 => [1, 990, 0, 1, 0, 0],
        1100 => [1, 990, 100, 1, 1, 1],
        other => panic!("there was no transition at {other}"),
    }
}

fn found(copy: &LedgerCopy) -> [u64; 6] {
    let mut found = [0; 6];
    for (at, row, histogram) in copy.rows() {
        if at == slot(10) {
            found[0] = row.exits;
            found[1] = row.cycles[Phase::Kernel as usize];
            found[2] = row.cycles[Phase::Guest as usize];
            found[3] = histogram.iter().sum();
        } else if at == slot(12) {
            found[4] = row.exits;
            found[5] = row.nested_exits;
        }
    }
    found
}

/// A reader beside the writer gets either nothing, or all numbers as of one transition.
#[test]
fn copy_shows_one_moment() {
    try_all(|| {
        let ledger = Arc::new(*wrap(Ledger::new()));
        ledger.0.begin(0, Phase::Guest);
        let writer = thread::spawn({
            let ledger = Arc::clone(&ledger);
            move || {
                for (now, transition) in LIFE {
                    transition(&ledger.0, now);
                }
            }
        });
        let mut copy = copy();
        if ledger.0.try_copy(&mut copy) {
            assert!(copy.balances());
            assert_eq!(found(&copy), due(copy.last));
        }
        writer.join().expect("it ends");
        assert!(ledger.0.try_copy(&mut copy));
        assert_eq!((copy.last, found(&copy)), (1100, due(1100)));
    });
}

/// A copy of up to two attempts, with a window of its own for each histogram, is whole too, or
/// there is no copy.
#[test]
fn copy_by_windows_shows_one_moment() {
    try_all(|| {
        let ledger = Arc::new(*wrap(Ledger::new()));
        ledger.0.begin(0, Phase::Guest);
        // A sample comes, and another histogram has one exit.
        let [(now, exit), (later, entry), _] = LIFE;
        exit(&ledger.0, now);
        let writer = thread::spawn({
            let ledger = Arc::clone(&ledger);
            move || entry(&ledger.0, later)
        });
        let mut copy = copy();
        if ledger.0.copy(2, &mut copy).is_some() {
            assert!(copy.balances());
            assert_eq!(found(&copy), due(copy.last));
        }
        writer.join().expect("it ends");
        assert_eq!(ledger.0.copy(2, &mut copy), Some(0));
        assert_eq!((copy.last, found(&copy)), (1000, due(1000)));
    });
}

/// A copy beside the move to a restarted clock has the times of one of the two clocks.
#[test]
fn copy_beside_a_restarted_clock_shows_one_moment() {
    try_all(|| {
        let ledger = Arc::new(*wrap(Ledger::new()));
        ledger.0.begin(0, Phase::Guest);
        let [(now, exit), ..] = LIFE;
        exit(&ledger.0, now);
        // The old clock reads 1000 where the new one reads 300.
        let writer = thread::spawn({
            let ledger = Arc::clone(&ledger);
            move || ledger.0.rebase(1000, 300)
        });
        let kernel_ticks = |copy: &LedgerCopy| copy.row(slot(10)).cycles(Phase::Kernel);
        let mut copy = copy();
        if ledger.0.try_copy(&mut copy) {
            assert!(copy.balances());
            let due = if copy.last == 300 { 990 } else { 0 };
            assert_eq!(kernel_ticks(&copy), due);
        }
        writer.join().expect("it ends");
        assert!(ledger.0.try_copy(&mut copy) && copy.balances());
        assert_eq!((copy.last, kernel_ticks(&copy)), (300, 990));
    });
}

/// A ledger on the heap, for sharing.
struct Shared(Box<Ledger>);

fn wrap(ledger: Box<Ledger>) -> Box<Shared> {
    Box::new(Shared(ledger))
}

/// The numbers follow the vCPU from one thread to the next. In the kernel the vCPU's lock orders
/// these threads; here a join does.
#[test]
fn two_writers_in_turn_lose_nothing() {
    try_all(|| {
        let ledger = Arc::new(*wrap(Ledger::new()));
        ledger.0.begin(0, Phase::Guest);
        for (now, transition) in LIFE {
            let ledger = Arc::clone(&ledger);
            thread::spawn(move || transition(&ledger.0, now))
                .join()
                .expect("it ends");
        }
        let mut copy = copy();
        assert!(ledger.0.try_copy(&mut copy));
        assert_eq!(found(&copy), due(1100));
    });
}

/// Return keys with the same first place, in a table of four.
fn neighbours() -> [usize; 4] {
    let home = |key: usize| (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 3;
    let mut keys = (2..).filter(|key| home(*key) == home(2));
    [(); 4].map(|()| keys.next().expect("there is one more"))
}

fn table_of(places: &Arc<[HashEntry; 4]>) -> HashTable<'_> {
    HashTable::new(&places[..])
}

fn four_places() -> Arc<[HashEntry; 4]> {
    Arc::new([(); 4].map(|()| HashEntry::default()))
}

/// The owner of a key finds it, while keys before and behind it come and go.
#[test]
fn key_is_never_hidden_by_others() {
    try_all(|| {
        let [before, own, behind, new] = neighbours();
        let places = four_places();
        for (key, value) in [(before, 100), (own, 200), (behind, 300)] {
            table_of(&places).insert(key, value).expect("room");
        }
        let changes = thread::spawn({
            let places = Arc::clone(&places);
            move || {
                let table = table_of(&places);
                assert_eq!(table.remove(before), 100);
                assert_eq!(table.remove(behind), 300);
                table.insert(new, 400).expect("room");
            }
        });
        let table = table_of(&places);
        assert_eq!(table.get(own), 200);
        assert_eq!(table.get(own), 200);
        changes.join().expect("it ends");
        assert_eq!((table.get(own), table.get(new)), (200, 400));
    });
}

/// A missing key is not found, and neither is another key in its place, even when the table is
/// full.
#[test]
fn removed_key_is_not_found() {
    try_all(|| {
        let [first, second, third, absent] = neighbours();
        let places = four_places();
        for key in [first, second, third] {
            table_of(&places).insert(key, key * 2).expect("room");
        }
        let changes = thread::spawn({
            let places = Arc::clone(&places);
            move || {
                let table = table_of(&places);
                table.insert(1 << 40, 1).expect("the last place");
                assert_eq!(table.insert(1 << 41, 1), Err(Full));
                assert_eq!(table.remove(third), third * 2);
            }
        });
        let table = table_of(&places);
        assert_eq!(table.get(absent), 0);
        assert_eq!(table.get(first), first * 2);
        changes.join().expect("it ends");
    });
}

/// A vCPU's life on two CPUs: one thread inserts it, the next holder looks it up and removes it,
/// while another vCPU's threads do the same.
#[test]
fn lives_side_by_side() {
    try_all(|| {
        let [one, two, ..] = neighbours();
        let places = four_places();
        // The kernel module serializes changes by a lock.
        let lock = Arc::new(loom::sync::Mutex::new(()));
        let threads = [one, two].map(|key| {
            let (places, lock) = (Arc::clone(&places), Arc::clone(&lock));
            thread::spawn(move || {
                let table = table_of(&places);
                let guard = lock.lock().expect("no panic");
                table.insert(key, key + 1000).expect("room");
                drop(guard);
                assert_eq!(table.get(key), key + 1000);
                let guard = lock.lock().expect("no panic");
                assert_eq!(table.remove(key), key + 1000);
                drop(guard);
                assert_eq!(table.get(key), 0);
            })
        });
        for thread in threads {
            thread.join().expect("it ends");
        }
    });
}
