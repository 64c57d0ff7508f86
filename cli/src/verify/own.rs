// SPDX-License-Identifier: GPL-2.0

//! The meter's numbers of a guest that this tool ran.

use std::collections::{BTreeMap, BTreeSet};

use exitmeter_meter::{
    phase::Phase,
    reader::{Snapshot, TableRow},
    snapshot::Reason,
};

/// Exits by reason.
pub type Exits = BTreeMap<u32, u64>;

/// Reason why a snapshot has no numbers of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The guest is not metered.
    #[error(
        "the guest's vCPU is not metered, nor are {0} others: the module's max_vcpus is reached, \
         or there is no memory"
    )]
    Unmetered(u64),
    /// The snapshot has no record of the guest.
    #[error("the module does not know the guest")]
    Unknown,
    /// Several VMs could be the guest.
    #[error("{0} VMs began at the same time, so the guest cannot be identified: run this again")]
    Several(usize),
}

/// VMs that existed before a guest.
#[derive(Clone, Debug, Default)]
pub struct Before {
    vms: BTreeSet<u64>,
    unmetered: u64,
}

impl Before {
    /// Return the VMs of a snapshot.
    pub fn new(snapshot: &Snapshot<'_>) -> Self {
        Self {
            vms: snapshot.vcpus().map(|vcpu| vcpu.vm()).collect(),
            unmetered: snapshot.unmetered(),
        }
    }
}

/// The guest's single vCPU, as the meter knows it.
#[derive(Clone, Debug, Default)]
pub struct MeteredGuest {
    /// Exits by reason, without those that are 0.
    pub exits: Exits,
    /// TSC ticks by reason and phase.
    pub cells: BTreeMap<u32, [u64; Phase::COUNT]>,
    /// Samples in the histograms, by reason.
    pub samples: Exits,
    /// TSC ticks from the vCPU's first event to its latest.
    pub life: u64,
    /// Sum of all cells, in TSC ticks.
    pub booked: u64,
    /// Exits whose code has no row.
    pub others: u64,
    /// Reason of the latest exit, which has no sample yet.
    pub latest: Option<u32>,
    /// Entries of its tables, while details are on.
    pub entries: Vec<TableRow>,
    /// True if the vCPU has tables.
    pub has_tables: bool,
}

impl MeteredGuest {
    /// Find the guest in a snapshot: the VM that did not exist before, and that thread `pid`
    /// created.
    ///
    /// In a PID namespace of its own, a process does not know its id in KVM. Then `pid` is none.
    ///
    /// # Errors
    ///
    /// Returns [`Error`] if the guest is not found.
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
        let mut guest = Self {
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
                guest.booked = guest.booked.wrapping_add(ticks);
            }
            match row.reason() {
                Reason::Code(code) => {
                    guest.cells.insert(code, cells);
                    if row.exits() != 0 {
                        guest.exits.insert(code, row.exits());
                    }
                    if let Some(histogram) = row.histogram() {
                        guest.samples.insert(code, histogram.iter().sum());
                    }
                }
                Reason::Start | Reason::Other => guest.others += row.exits(),
            }
        }
        if let Some(tables) = snapshot.tables().find(|tables| tables.vcpu == place) {
            guest.has_tables = true;
            guest.entries = tables.entries().collect();
        }
        Ok(guest)
    }

    /// Return the exits of a reason.
    pub fn exits_of(&self, code: u32) -> u64 {
        self.exits.get(&code).copied().unwrap_or(0)
    }

    /// Return the TSC ticks of a reason in a phase.
    pub fn ticks_of(&self, code: u32, phase: Phase) -> u64 {
        let cells = self.cells.get(&code);
        let ticks = cells.and_then(|cells| cells.get(phase as usize));
        ticks.copied().unwrap_or(0)
    }

    /// Return the TSC ticks of a phase.
    pub fn ticks(&self, phase: Phase) -> u64 {
        let cells = self.cells.values();
        cells
            .filter_map(|cells| cells.get(phase as usize))
            .fold(0, |sum, ticks| sum.saturating_add(*ticks))
    }

    /// Return the number of all exits.
    pub fn total(&self) -> u64 {
        self.exits.values().sum::<u64>() + self.others
    }

    /// Return what is wrong with the ledger, if anything. Each tick of the vCPU's life must stand
    /// in one cell, and each exit with an entry after it must be one sample.
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
    fn guest_is_found_as_the_new_vm_of_its_thread() {
        let snapshot = Snapshot::parse(SNAPSHOT).expect("a snapshot");
        let find = |before: &Before, pid| MeteredGuest::find(&snapshot, before, pid);
        let none = Before {
            unmetered: snapshot.unmetered(),
            ..Before::default()
        };
        // The VM in the file has two vCPUs; a guest has one.
        assert!(matches!(find(&none, Some(1234)), Err(Error::Several(2))));
        assert!(matches!(find(&none, Some(1)), Err(Error::Unknown)));
        let all = Before::new(&snapshot);
        assert!(matches!(find(&all, Some(1234)), Err(Error::Unknown)));
        // One more vCPU runs unmetered than before.
        let before = Before {
            unmetered: 0,
            ..all
        };
        assert!(matches!(find(&before, None), Err(Error::Unmetered(0))));
    }

    #[test]
    fn imbalance_of_a_ledger_is_found() {
        let mut guest = MeteredGuest {
            exits: Exits::from([(10, 5), (30, 1)]),
            samples: Exits::from([(10, 5), (30, 0)]),
            latest: Some(30),
            life: 100,
            booked: 100,
            ..MeteredGuest::default()
        };
        assert_eq!(guest.imbalance(), None);
        guest.samples.insert(10, 4);
        assert_eq!(
            guest.imbalance().as_deref(),
            Some("reason 10 has 5 exits and 4 samples")
        );
        guest.booked = 99;
        assert_eq!(
            guest.imbalance().as_deref(),
            Some("99 ticks are booked of a life of 100")
        );
    }
}
