// SPDX-License-Identifier: GPL-2.0

//! Ledgers against a model that keeps the same numbers in the plainest way.

use super::{writer::RESTARTED, *};
use proptest::prelude::*;
use std::{alloc, collections::HashMap, ops::Deref, sync::atomic::AtomicBool};

use crate::meter::{
    histogram::{bucket, Buckets},
    reasons::{self, Isa},
    registry::Member,
};

/// A ledger that frees what [`Heap`] has given it.
struct Supplied(Box<Ledger>);

/// The heap, as a supply of histograms.
struct Heap;

// SAFETY: The memory is zeroed, nobody else's, and freed by `Supplied` alone.
unsafe impl Supply for Heap {
    fn more(&self) -> Option<NonNull<MoreHistograms>> {
        // SAFETY: The layout is not empty.
        NonNull::new(unsafe { alloc::alloc_zeroed(alloc::Layout::new::<MoreHistograms>()) }.cast())
    }
}

impl Deref for Supplied {
    type Target = Ledger;

    fn deref(&self) -> &Ledger {
        &self.0
    }
}

impl Drop for Supplied {
    fn drop(&mut self) {
        // SAFETY: Nobody else has the ledger.
        if let Some(more) = unsafe { self.0.take_more() } {
            // SAFETY: `Heap` gave it, with this layout.
            unsafe { alloc::dealloc(more.as_ptr().cast(), alloc::Layout::new::<MoreHistograms>()) };
        }
    }
}

impl Supplied {
    fn exit(&self, now: u64, slot: Slot, nested: bool) {
        match nested {
            true => self.exit_of::<true>(now, slot, Heap),
            false => self.exit_of::<false>(now, slot, Heap),
        }
    }

    /// Try once to copy it whole.
    fn try_copy(&self, out: &mut LedgerCopy) -> bool {
        Copying {
            ledger: &self.0,
            // SAFETY: `Heap` gives them, and they are freed with the ledger.
            more: unsafe { More::pointed() },
            out,
            tables: None,
        }
        .try_copy()
    }
}

fn ledger() -> Supplied {
    // SAFETY: All-zero bytes are a valid ledger.
    Supplied(Box::new(unsafe { core::mem::zeroed() }))
}

fn slot(code: u32) -> Slot {
    reasons::slot(Isa::Vmx, code)
}

/// The most events of one ledger. Miri takes some tenths of a second for each.
const EVENTS: usize = if cfg!(miri) { 20 } else { 400 };

/// The registry keeps a vCPU in one allocation of 16 KiB, as long as it exits for up to 20 reasons, and
/// each row is one cache line.
#[test]
fn a_vcpu_with_20_reasons_takes_16_kib() {
    assert_eq!((size_of::<Row>(), align_of::<Row>()), (64, 64));
    assert_eq!(
        (size_of::<Histogram>() % 64, align_of::<Histogram>()),
        (0, 64)
    );
    // What an exit and an entry touch besides a row and a histogram: one line, and the reason's place.
    assert!(core::mem::offset_of!(Ledger, phase) < 64 && align_of::<Ledger>() == 64);
    assert!(size_of::<Member>() <= 16 * 1024);
    struct Nothing;
    // SAFETY: There is no memory.
    unsafe impl Supply for Nothing {
        fn more(&self) -> Option<NonNull<MoreHistograms>> {
            panic!("20 reasons take no memory besides");
        }
    }
    let ledger = ledger();
    ledger.begin(0, Phase::Guest);
    for code in 0..20 {
        ledger.exit_of::<false>(u64::from(10 * code + 10), slot(code), Nothing);
        ledger.entry(u64::from(10 * code + 15));
    }
    let mut copy = LedgerCopy::new();
    assert!(ledger.try_copy(&mut copy));
    let samples = |code| copy.histogram(slot(code)).iter().sum::<u64>();
    assert!((0..20).all(|code| samples(code) == 1));
}

/// The first exits for more reasons than there are rows: none is lost, and the first ones keep their
/// own.
#[test]
fn reasons_without_a_row_are_counted_as_others() {
    let ledger = ledger();
    ledger.begin(0, Phase::Guest);
    let mut now = 0;
    // Miri takes some tenths of a second for each exit.
    let rounds = if cfg!(miri) { 1 } else { 3 };
    for round in 1..=rounds {
        for code in 0..100 {
            now += 100;
            ledger.exit(now, slot(code), code % 2 == 0);
            ledger.entry(now + 50);
        }
        let mut copy = LedgerCopy::new();
        assert!(ledger.try_copy(&mut copy) && copy.balances());
        for code in 0..100 {
            let own = (code as usize) < REASONS;
            let exits = if own { round } else { 0 };
            assert_eq!(ledger.exits(slot(code)), exits, "{code}");
            assert_eq!(copy.row(slot(code)).exits, exits, "{code}");
            let sampled = copy.histogram(slot(code)).iter().sum::<u64>();
            let due = if (code as usize) < HISTOGRAMS {
                round
            } else {
                0
            };
            assert_eq!(sampled, due, "{code}");
        }
        let others = round * (100 - REASONS as u64);
        assert_eq!(ledger.exits(Slot::OTHER), others);
        assert_eq!(ledger.nested_exits(Slot::OTHER), others / 2);
        assert_eq!(ledger.total_exits(), 100 * round);
        assert_eq!(copy.slot(), Slot::OTHER);
    }
}

/// A vCPU that gets no memory for more histograms keeps all else, and those that it has.
#[test]
fn without_a_supply_the_first_20_reasons_have_histograms() {
    let ledger = ledger();
    ledger.begin(0, Phase::Guest);
    for code in 0..30 {
        ledger.0.exit(u64::from(10 * code + 10), slot(code));
        ledger.entry(u64::from(10 * code + 15));
    }
    let mut copy = LedgerCopy::new();
    assert!(ledger.try_copy(&mut copy) && copy.balances());
    for code in 0..30 {
        let samples = copy.histogram(slot(code)).iter().sum::<u64>();
        assert_eq!(samples, u64::from(code < 20), "{code}");
        assert_eq!(
            (copy.row(slot(code)).exits, copy.row(slot(code)).max),
            (1, 5)
        );
    }
}

#[test]
fn each_phase_gets_its_time() {
    let ledger = ledger();
    let (start, cpuid) = (Slot::START, slot(10));
    ledger.begin(100, Phase::Kernel);
    ledger.entry(110);
    ledger.exit(130, cpuid, false);
    ledger.leave(131, Phase::Halted);
    ledger.resume(1131);
    ledger.leave(1133, Phase::User);
    ledger.resume(1140);
    ledger.leave(1141, Phase::Preempted);
    ledger.resume(1200);
    ledger.leave(1201, Phase::Waiting);
    ledger.resume(1500);
    ledger.entry(1501);
    assert_eq!(ledger.cycles(Phase::Kernel, start), 10);
    assert_eq!(ledger.cycles(Phase::Guest, start), 20);
    assert_eq!(ledger.cycles(Phase::Kernel, cpuid), 1 + 2 + 1 + 1 + 1);
    assert_eq!(ledger.cycles(Phase::Waiting, cpuid), 299);
    assert_eq!(ledger.cycles(Phase::Halted, cpuid), 1000);
    assert_eq!(ledger.cycles(Phase::User, cpuid), 7);
    assert_eq!(ledger.cycles(Phase::Preempted, cpuid), 59);
    assert_eq!(ledger.exits(cpuid), 1);
}

/// What a ledger is to hold, in the plainest words, and by nothing of it.
struct Model {
    phase: Phase,
    /// The row of the latest exit.
    latest: usize,
    first: u64,
    last: u64,
    rows: HashMap<usize, RowCopy>,
    /// Kernel ticks of the latest exit so far, while they may become a sample.
    sample: Option<u64>,
    /// The rows that have exits, in the order of their first ones, with their histograms.
    taken: Vec<(usize, Buckets)>,
}

impl Model {
    fn begin(now: u64, phase: Phase) -> Self {
        Self {
            phase,
            latest: Slot::START.index(),
            first: now,
            last: now,
            rows: HashMap::new(),
            sample: (phase == Phase::Guest).then_some(0),
            taken: Vec::new(),
        }
    }

    /// Return the row that counts exits of a slot.
    fn row_for(&mut self, slot: usize) -> usize {
        let other = Slot::OTHER.index();
        let has = |slot| self.taken.iter().any(|(its, _)| *its == slot);
        if has(slot) {
            return slot;
        }
        // Row 0 is that of the start, and one is kept for the others.
        let room = ROWS - 1 - usize::from(!has(other));
        let row = if self.taken.len() < room { slot } else { other };
        if !has(row) {
            self.taken.push((row, [0; BUCKETS]));
        }
        row
    }

    fn row(&mut self) -> &mut RowCopy {
        self.rows.entry(self.latest).or_default()
    }

    /// Books the time since the latest transition, on the latest exit; how long it was. A
    /// clock that stands or goes back counts as one tick.
    fn spend(&mut self, now: u64, phase: Phase) -> u64 {
        let now = now.max(self.last + 1);
        let ticks = now - self.last;
        self.last = now;
        self.row().cycles[phase as usize] += ticks;
        ticks
    }

    /// Record an exit. The vCPU was in the guest before it, whatever the phase was.
    fn exit(&mut self, now: u64, slot: usize, nested: bool) {
        self.spend(now, Phase::Guest);
        let slot = self.row_for(slot);
        (self.phase, self.latest) = (Phase::Kernel, slot);
        let row = self.row();
        row.exits += 1;
        row.nested_exits += u64::from(nested);
    }

    /// Whoever enters was in the kernel.
    fn entry(&mut self, now: u64) {
        let ticks = self.spend(now, Phase::Kernel);
        self.phase = Phase::Guest;
        if let Some(before) = self.sample.replace(0) {
            let (latest, sample) = (self.latest, before + ticks);
            let row = self.row();
            row.max = row.max.max(sample);
            for (slot, histogram) in self.taken.iter_mut().take(HISTOGRAMS) {
                histogram[bucket(sample)] += u64::from(*slot == latest);
            }
        }
    }

    fn leave(&mut self, now: u64, phase: Phase) {
        let left = self.phase;
        let ticks = self.spend(now, left);
        self.phase = phase;
        self.sample = match left {
            Phase::Guest => None,
            Phase::Kernel => self.sample.map(|before| before + ticks),
            _ => self.sample,
        };
    }

    fn resume(&mut self, now: u64) {
        self.spend(now, self.phase);
        self.phase = Phase::Kernel;
    }

    /// Record a sleep of the host, in the vCPU's current phase.
    fn sleep(&mut self, until: u64) {
        let ticks = until - self.last;
        self.last = until;
        let phase = self.phase;
        self.row().cycles[phase as usize] += ticks;
        if phase == Phase::Kernel {
            self.sample = self.sample.map(|before| before + ticks);
        }
    }

    /// Have an event happen to the model at `now`, and to the ledger by its clock.
    fn tell(&mut self, ledger: &Supplied, (now, clock): (u64, u64), event: &Event) {
        let (event, _, slot, phase, nested) = *event;
        let phase = Phase::from_number(phase).expect("a phase");
        match event {
            0 => {
                let at = Slot::from_index(slot).expect("below SLOTS");
                ledger.exit(clock, at, nested);
                self.exit(now, slot, nested);
            }
            1 => {
                ledger.entry(clock);
                self.entry(now);
            }
            2 => {
                ledger.leave(clock, phase);
                self.leave(now, phase);
            }
            _ => {
                ledger.resume(clock);
                self.resume(now);
            }
        }
    }

    /// Demand that the ledger holds what the model does, with a clock that is `offset` behind.
    fn demand(&self, ledger: &Supplied, offset: u64) -> Result<(), TestCaseError> {
        let mut copy = LedgerCopy::new();
        prop_assert!(ledger.try_copy(&mut copy));
        prop_assert!(copy.balances());
        let times = [copy.first, copy.last].map(|time| time.wrapping_add(offset));
        prop_assert_eq!(times, [self.first, self.last]);
        prop_assert_eq!(
            (copy.phase(), copy.slot().index()),
            (self.phase, self.latest)
        );
        let mut totals = Totals::new();
        totals.fold(&copy);
        totals.fold(&copy);
        let copied: HashMap<_, _> = copy
            .rows()
            .map(|(slot, row, _)| (slot.index(), *row))
            .collect();
        let mut sums = RowCopy::default();
        for slot in Slot::all() {
            let due = self.rows.get(&slot.index()).copied().unwrap_or_default();
            prop_assert_eq!(copied.get(&slot.index()).copied().unwrap_or_default(), due);
            let histogram = self.taken.iter().find(|(row, _)| *row == slot.index());
            prop_assert_eq!(
                copy.histogram(slot),
                histogram.map_or(&[0; BUCKETS], |(_, it)| it)
            );
            // What a guest's query reads, without a copy.
            prop_assert_eq!(
                (ledger.exits(slot), ledger.nested_exits(slot)),
                (due.exits, due.nested_exits)
            );
            prop_assert_eq!(
                Phase::ALL.map(|phase| ledger.cycles(phase, slot)),
                due.cycles
            );
            let twice = RowCopy {
                exits: 2 * due.exits,
                nested_exits: 2 * due.nested_exits,
                cycles: due.cycles.map(|ticks| 2 * ticks),
                max: due.max,
            };
            prop_assert_eq!(totals.row(slot), twice);
            sums.exits += due.exits;
            for (sum, ticks) in sums.cycles.iter_mut().zip(due.cycles) {
                *sum += ticks;
            }
        }
        prop_assert_eq!(ledger.total_exits(), sums.exits);
        prop_assert_eq!(
            Phase::ALL.map(|phase| ledger.total_cycles(phase)),
            sums.cycles
        );
        Ok(())
    }
}

/// Its kind, the step of the clock to it, its row, its phase, and whether it is of a nested guest.
type Event = (u8, i16, usize, u32, bool);

fn event() -> impl Strategy<Value = Event> {
    (
        0_u8..4,
        any::<i16>(),
        0..Slot::START.index(),
        2_u32..6,
        any::<bool>(),
    )
}

proptest! {
    #[test]
    fn transitions_in_any_order_lose_and_invent_nothing(
        begins_in in 0_u32..6,
        events in proptest::collection::vec(event(), 0..EVENTS)
    ) {
        let ledger = ledger();
        let mut now = 1_u64 << 40;
        let begins_in = Phase::from_number(begins_in).expect("a phase");
        ledger.begin(now, begins_in);
        let mut model = Model::begin(now, begins_in);
        for event in events {
            // A step back now and then: clocks that part.
            now = now.wrapping_add_signed(i64::from(event.1) + 8000);
            model.tell(&ledger, (now, now), &event);
        }
        model.demand(&ledger, 0)?;
    }
}

proptest! {
    /// The ledger equals one whose clock has gone on. If it finds a restart by itself, it cannot know
    /// how long the host slept.
    #[test]
    fn restarted_clock_loses_and_invents_nothing(
        begins_in in 0_u32..6,
        events in proptest::collection::vec(
            (event(), 0_u8..8, 0_u64..1 << 48, 0_u64..1 << 40),
            0..EVENTS,
        )
    ) {
        let ledger = ledger();
        let (mut now, mut offset) = (1_u64 << 40, 0_u64);
        let begins_in = Phase::from_number(begins_in).expect("a phase");
        ledger.begin(now, begins_in);
        let mut model = Model::begin(now, begins_in);
        for (event, anew, clock, slept) in events {
            let last = model.last.wrapping_sub(offset);
            match anew {
                // The host says so.
                0 => {
                    now = now.max(model.last) + slept;
                    ledger.rebase(now.wrapping_sub(offset), clock);
                    model.sleep(now);
                    offset = now.wrapping_sub(clock);
                    model.demand(&ledger, offset)?;
                }
                // The ledger finds it.
                1 if last >= RESTARTED => {
                    let clock = clock % (last + 2 - RESTARTED);
                    now = model.last + 1;
                    model.sleep(now);
                    offset = now.wrapping_sub(clock);
                }
                _ => now = now.wrapping_add_signed(i64::from(event.1) + 8000),
            }
            let clock = now.wrapping_sub(offset);
            // Before its zero there is no clock.
            if clock < 1 << 63 {
                model.tell(&ledger, (now, clock), &event);
            }
        }
        model.demand(&ledger, offset)?;
    }
}

/// The host sleeps for an hour, and the vCPU's next transition comes 7 ticks after the clock restarted.
#[test]
fn sleep_of_the_host_is_booked_on_the_phase() {
    const HOUR: u64 = 3600 * 3_000_000_000;
    let hlt = Slot::from_index(12).expect("below SLOTS");
    for phase in Phase::ALL {
        let ledger = ledger();
        ledger.begin(1 << 50, Phase::Guest);
        ledger.exit((1 << 50) + 10, hlt, false);
        match phase {
            Phase::Kernel => {}
            Phase::Guest => ledger.entry((1 << 50) + 11),
            _ => ledger.leave((1 << 50) + 11, phase),
        }
        let before = ledger.cycles(phase, hlt);
        let last = ledger.last.load(Relaxed);
        ledger.rebase(last + HOUR, 3);
        assert_eq!(ledger.cycles(phase, hlt), before + HOUR, "{phase:?}");
        // It began before the clock's zero.
        assert!(ledger.first.load(Relaxed) > 1 << 63);
        match phase {
            Phase::Guest => ledger.exit(10, hlt, false),
            Phase::Kernel => ledger.entry(10),
            _ => ledger.resume(10),
        }
        let row = if phase == Phase::Guest { 2 } else { 1 };
        assert_eq!(ledger.cycles(phase, hlt), before + HOUR + 7, "{phase:?}");
        assert_eq!(ledger.exits(hlt), row);
        let mut copy = LedgerCopy::new();
        assert!(ledger.try_copy(&mut copy) && copy.balances());
        assert_eq!(copy.last, 10);
    }
}

#[test]
fn large_step_back_of_the_clock_is_a_restart() {
    const LAST: u64 = 1 << 50;
    for (back, last) in [
        (1, LAST + 1),
        (RESTARTED - 2, LAST + 1),
        (RESTARTED - 1, LAST - (RESTARTED - 1) + 1),
        (LAST, 1),
    ] {
        let ledger = ledger();
        ledger.begin(LAST, Phase::Kernel);
        ledger.entry(LAST - back);
        assert_eq!(ledger.last.load(Relaxed), last, "{back} ticks back");
        // The ledger follows the clock, so ticks after it are exact.
        ledger.exit(last + 1000, Slot::OTHER, false);
        assert_eq!(ledger.cycles(Phase::Guest, Slot::START), 1000);
        let mut copy = LedgerCopy::new();
        assert!(ledger.try_copy(&mut copy) && copy.balances());
    }
}

/// The CPU that measures the sleep may be behind the vCPU's.
#[test]
fn a_sleep_that_ends_before_the_latest_transition_takes_no_time() {
    let ledger = ledger();
    ledger.begin(1000, Phase::Halted);
    ledger.rebase(900, 5);
    assert_eq!(ledger.total_cycles(Phase::Halted), 0);
    ledger.resume(25);
    assert_eq!(ledger.total_cycles(Phase::Halted), 20);
    let mut copy = LedgerCopy::new();
    assert!(ledger.try_copy(&mut copy) && copy.balances());
}

proptest! {
    /// Each exit that is followed by an entry is one sample, of the kernel ticks between
    /// them, whatever sleep, preemption and user space come between.
    #[test]
    fn an_exit_is_one_sample_of_its_kernel_ticks(
        exits in proptest::collection::vec(
            (
                0..REASONS,
                any::<bool>(),
                proptest::collection::vec((1_u64..1 << 20, 1_u64..1 << 30), 1..4),
            ),
            0..EVENTS / 2,
        )
    ) {
        let ledger = ledger();
        let mut now = 1000_u64;
        let mut expected = std::collections::BTreeMap::<usize, Vec<u64>>::new();
        ledger.begin(now, Phase::Kernel);
        ledger.entry(now);
        for (place, nested, parts) in exits {
            now += 50;
            let slot = Slot::from_index(place).expect("below SLOTS");
            ledger.exit(now, slot, nested);
            for (number, (kernel, away)) in parts.iter().enumerate() {
                if number > 0 {
                    ledger.leave(now, Phase::User);
                    now += away;
                    ledger.resume(now);
                }
                now += kernel;
            }
            ledger.entry(now);
            let sample = parts.iter().map(|(kernel, _)| kernel).sum();
            expected.entry(place).or_default().push(sample);
        }
        let mut copy = LedgerCopy::new();
        prop_assert!(ledger.try_copy(&mut copy));
        let mut with_histogram = 0;
        for (slot, row, histogram) in copy.rows() {
            let Some(samples) = expected.get(&slot.index()) else {
                prop_assert_eq!(slot, Slot::START);
                continue;
            };
            prop_assert_eq!(row.cycles[Phase::Kernel as usize], samples.iter().sum::<u64>());
            prop_assert_eq!(Some(&row.max), samples.iter().max());
            if *histogram != [0; BUCKETS] {
                with_histogram += 1;
                let mut buckets = [0; BUCKETS];
                for sample in samples {
                    buckets[bucket(*sample)] += 1;
                }
                prop_assert_eq!(histogram, &buckets);
            }
        }
        prop_assert_eq!(with_histogram, expected.len().min(HISTOGRAMS));
    }
}

#[test]
fn a_reader_beside_a_writer_sees_a_balance() {
    // Miri takes seconds for each exit, as the reader runs in turns with the writer.
    const END: u64 = if cfg!(miri) { 60 } else { 3_000_000 };
    let (ledger, done) = (ledger(), AtomicBool::new(false));
    ledger.begin(0, Phase::Guest);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for now in (0..END).step_by(3) {
                let slot = Slot::from_index(now as usize % 50).expect("below SLOTS");
                // The rows of even places have only exits from nested guests.
                ledger.exit(now, slot, slot.index() % 2 == 0);
                ledger.entry(now + 2);
            }
            done.store(true, Ordering::Release);
        });
        let nested_as_expected = |copy: &LedgerCopy| {
            copy.rows().all(|(slot, row, _)| {
                row.nested_exits == if slot.index() % 2 == 0 { row.exits } else { 0 }
            })
        };
        let (mut copy, mut copies) = (LedgerCopy::new(), 0);
        while !done.load(Ordering::Acquire) {
            if ledger.try_copy(&mut copy) {
                assert!(copy.balances() && nested_as_expected(&copy));
                copies += 1;
            }
        }
        while !ledger.try_copy(&mut copy) {}
        assert!(copy.balances() && nested_as_expected(&copy) && copies < usize::MAX);
        assert_eq!(copy.last, END - 1);
    });
}
