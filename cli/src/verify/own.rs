// SPDX-License-Identifier: GPL-2.0

//! What the meter tells of a guest of this tool's.

use std::collections::{BTreeMap, BTreeSet};

use exitmeter_meter::{
    phase::Phase,
    reader::{Entry, Snapshot},
    snapshot::Reason,
};

/// Exits by reason.
pub type Exits = BTreeMap<u32, u64>;

/// Why the meter tells nothing of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not metered.
    #[error(
        "the guest's vCPU is not metered, as {0} others are not: the module's max_vcpus is reached, \
         or there is no memory"
    )]
    Unmetered(u64),
    /// It is not there.
    #[error("the module does not know the guest")]
    Unknown,
    /// There are several that could be it.
    #[error("{0} VMs began at once, and none can be told to be the guest")]
    Several(usize),
}

/// The VMs that were there before a guest.
#[derive(Clone, Debug, Default)]
pub struct Before {
    vms: BTreeSet<u64>,
    unmetered: u64,
}

impl Before {
    /// Those of a snapshot.
    pub fn new(snapshot: &Snapshot<'_>) -> Self {
        Self {
            vms: snapshot.vcpus().map(|vcpu| vcpu.vm()).collect(),
            unmetered: snapshot.unmetered(),
        }
    }
}

/// The numbers of the guest's one vCPU.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Exits by reason, those that are 0 left out.
    pub exits: Exits,
    /// TSC ticks by reason and phase.
    pub cells: BTreeMap<u32, [u64; Phase::COUNT]>,
    /// Samples in the histograms, by reason.
    pub samples: Exits,
    /// From its first event to its latest.
    pub life: u64,
    /// The sum of all cells.
    pub booked: u64,
    /// Exits whose code has no row.
    pub others: u64,
    /// The reason of its latest exit, which has no sample yet.
    pub latest: Option<u32>,
    /// What its tables hold, while details are on.
    pub entries: Vec<Entry>,
    /// It has tables.
    pub has_tables: bool,
}

impl Own {
    /// Find the guest in a snapshot: the VM that was not there before, and that thread `pid` made.
    ///
    /// In a PID namespace of its own a process does not know the number by which KVM knows it: then
    /// `pid` is none.
    ///
    /// # Errors
    ///
    /// [`Error`] when it is not there.
    pub fn find(snapshot: &Snapshot<'_>, before: &Before, pid: Option<u32>) -> Result<Self, Error> {
        let mut new = snapshot.vcpus().enumerate().filter(|(_, vcpu)| {
            !before.vms.contains(&vcpu.vm()) && pid.is_none_or(|pid| vcpu.pid() == pid)
        });
        let Some((place, vcpu)) = new.next() else {
            return Err(
                match snapshot.unmetered().saturating_sub(before.unmetered) {
                    0 => Error::Unknown,
                    _ => Error::Unmetered(snapshot.unmetered() - 1),
                },
            );
        };
        let rest = new.count();
        if rest != 0 {
            return Err(Error::Several(rest + 1));
        }
        let mut own = Self {
            life: vcpu.last().wrapping_sub(vcpu.first()),
            latest: match vcpu.latest() {
                Some(Reason::Code(code)) => Some(code),
                _ => None,
            },
            ..Self::default()
        };
        for row in vcpu.rows() {
            let cells = Phase::ALL.map(|phase| row.cycles(phase));
            for ticks in cells {
                own.booked = own.booked.wrapping_add(ticks);
            }
            match row.reason() {
                Reason::Code(code) => {
                    own.cells.insert(code, cells);
                    if row.exits() != 0 {
                        own.exits.insert(code, row.exits());
                    }
                    if let Some(histogram) = row.histogram() {
                        own.samples.insert(code, histogram.iter().sum());
                    }
                }
                Reason::Start | Reason::Other => own.others += row.exits(),
            }
        }
        if let Some(tables) = snapshot.tables().find(|tables| tables.vcpu == place) {
            own.has_tables = true;
            own.entries = tables.entries().collect();
        }
        Ok(own)
    }

    /// Exits of a reason.
    pub fn exits_of(&self, code: u32) -> u64 {
        self.exits.get(&code).copied().unwrap_or(0)
    }

    /// TSC ticks of a reason in a phase.
    pub fn ticks_of(&self, code: u32, phase: Phase) -> u64 {
        let cells = self.cells.get(&code);
        let ticks = cells.and_then(|cells| cells.get(phase as usize));
        ticks.copied().unwrap_or(0)
    }

    /// TSC ticks of a phase.
    pub fn ticks(&self, phase: Phase) -> u64 {
        let cells = self.cells.values();
        cells
            .filter_map(|cells| cells.get(phase as usize))
            .fold(0, |sum, ticks| sum.saturating_add(*ticks))
    }

    /// Exits in all.
    pub fn total(&self) -> u64 {
        self.exits.values().sum::<u64>() + self.others
    }

    /// Return what is wrong with the ledger: each tick of the vCPU's life stands in one cell, and
    /// each exit that an entry has followed is one sample.
    pub fn imbalance(&self) -> Option<String> {
        if self.booked != self.life {
            let (booked, life) = (self.booked, self.life);
            return Some(format!("{booked} ticks are booked of a life of {life}"));
        }
        self.samples.iter().find_map(|(code, samples)| {
            let exits = self.exits_of(*code);
            let open = u64::from(self.latest == Some(*code));
            let right = (*samples..=samples + open).contains(&exits);
            (!right).then(|| format!("reason {code} has {exits} exits and {samples} samples"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOT: &[u8] = include_bytes!("../../../src/meter/tests/snapshot-1.2.bin");

    #[test]
    fn a_guest_is_the_new_vm_of_its_thread() {
        let snapshot = Snapshot::parse(SNAPSHOT).expect("a snapshot");
        let find = |before: &Before, pid| Own::find(&snapshot, before, pid);
        let none = Before {
            unmetered: snapshot.unmetered(),
            ..Before::default()
        };
        // The VM there has two vCPUs; a guest has one.
        assert!(matches!(find(&none, Some(1234)), Err(Error::Several(2))));
        assert!(matches!(find(&none, Some(1)), Err(Error::Unknown)));
        let all = Before::new(&snapshot);
        assert!(matches!(find(&all, Some(1234)), Err(Error::Unknown)));
        // One more runs unmetered than before.
        let before = Before {
            unmetered: 0,
            ..all
        };
        assert!(matches!(find(&before, None), Err(Error::Unmetered(0))));
    }

    #[test]
    fn a_ledger_balances_to_the_tick() {
        let mut own = Own {
            exits: Exits::from([(10, 5), (30, 1)]),
            samples: Exits::from([(10, 5), (30, 0)]),
            latest: Some(30),
            life: 100,
            booked: 100,
            ..Own::default()
        };
        assert_eq!(own.imbalance(), None);
        own.samples.insert(10, 4);
        assert_eq!(
            own.imbalance().as_deref(),
            Some("reason 10 has 5 exits and 4 samples")
        );
        own.booked = 99;
        assert_eq!(
            own.imbalance().as_deref(),
            Some("99 ticks are booked of a life of 100")
        );
    }
}
