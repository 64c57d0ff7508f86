// SPDX-License-Identifier: GPL-2.0

//! Difference of two snapshots.
//!
//! A vCPU is identified by its VM's number and its id. A vCPU that started after the earlier
//! snapshot counts from its first event. The totals of vCPUs that are gone count only what these
//! did after the earlier snapshot.
//!
//! A snapshot does not book the phase that is running, however long it has run. The difference
//! settles it at both ends: it adds the ticks up to the later snapshot, and subtracts those up to
//! the earlier one. So the cycles of a vCPU add up to the interval exactly.

use std::collections::BTreeMap;

use super::{Counts, Departed, Ledger, ReasonRow, Report, Span, VcpuReport};
use crate::spread::Spread;

/// A reason why two snapshots have no difference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// They belong to different lives of the meter, or to different hosts.
    #[error("the meter began anew")]
    NewLife,
    /// The second one is older than the first one, in the same life. If the snapshots were taken
    /// one after the other, the clock began anew, and the meter with it.
    #[error("the second snapshot is older than the first one")]
    Order,
    /// A number that can only grow has fallen.
    #[error("the exits of {0} are fewer in the later snapshot: one of the two is damaged")]
    Backwards(String),
}

impl Error {
    /// Return true if the meter began anew between two consecutive snapshots.
    pub fn is_break(&self) -> bool {
        matches!(self, Error::NewLife | Error::Order)
    }
}

/// Message for a meter that began anew between two readings.
pub const NEW_LIFE: &str = "the meter began anew";

impl Report {
    /// Return the difference from an earlier snapshot of the same host.
    ///
    /// # Errors
    ///
    /// Returns an error if the snapshots belong to different lives of the meter, or are in the
    /// wrong order.
    pub fn since(&self, earlier: &Self) -> Result<Self, Error> {
        let (now, before) = (self.host.snapshot_tsc, earlier.host.snapshot_tsc);
        if (self.host.life, self.host.isa) != (earlier.host.life, earlier.host.isa) {
            return Err(Error::NewLife);
        }
        let ticks = now.checked_sub(before).ok_or(Error::Order)?;
        let interval = Span::of(ticks, self.host.tsc_khz);

        let mut olds: BTreeMap<_, _> = earlier
            .vms
            .iter()
            .flat_map(|vm| {
                vm.vcpus
                    .iter()
                    .map(move |vcpu| ((vm.vm, vcpu.vcpu), (vm, vcpu)))
            })
            .collect();
        let mut vms = Vec::new();
        for vm in &self.vms {
            let mut new = vm.clone();
            new.span = interval;
            if !earlier.vms.iter().any(|old| old.vm == vm.vm) {
                new.span.ticks = vm.span.ticks.min(ticks);
                new.span = Span::of(new.span.ticks, self.host.tsc_khz);
            }
            for vcpu in &mut new.vcpus {
                let old = olds.remove(&(vm.vm, vcpu.vcpu)).map(|(_, old)| old);
                *vcpu = vcpu
                    .since(now, old, before)
                    .ok_or_else(|| Error::Backwards(format!("{} vCPU {}", vm.name, vcpu.vcpu)))?;
                let polled = vcpu.polled_ns;
                vcpu.ledger
                    .separate_polling(self.host.isa, polled, self.host.tsc_khz);
            }
            new.sum_up();
            vms.push(new);
        }
        let gone: Vec<_> = olds.into_values().map(|(_, vcpu)| vcpu).collect();
        let mut departed = self
            .departed
            .since(&earlier.departed, &gone, before)
            .ok_or_else(|| Error::Backwards("the vCPUs that are gone".to_owned()))?;
        let polled = departed.polled_ns;
        departed
            .ledger
            .separate_polling(self.host.isa, polled, self.host.tsc_khz);
        Ok(Self {
            format: self.format,
            interval: Some(interval),
            host: self.host.clone(),
            unmetered_vcpus: self.unmetered_vcpus.saturating_sub(earlier.unmetered_vcpus),
            vms,
            departed,
        })
    }
}

impl VcpuReport {
    /// Return the time of this record, in a snapshot that began at `now`.
    fn moment(&self, now: u64) -> u64 {
        now.max(self.last_tsc)
    }

    /// Return the ledger including the phase that runs at the snapshot.
    fn settled(&self, now: u64) -> Ledger {
        let mut rows = self.ledger.reasons.clone();
        if let (Some(phase), Some(label)) = (self.phase, self.latest) {
            let running = u128::from(self.moment(now).saturating_sub(self.last_tsc));
            rows.push(ReasonRow {
                label,
                counts: self.ledger.of_phase(phase, running),
                spread: self
                    .ledger
                    .reasons
                    .iter()
                    .any(|row| row.spread.is_some())
                    .then(Spread::default),
            });
        }
        Ledger::of(rows)
    }

    /// Return the difference from an earlier snapshot, if the vCPU was in it.
    fn since(&self, now: u64, old: Option<&Self>, before: u64) -> Option<Self> {
        let settled = self.settled(now);
        Some(Self {
            first_tsc: old.map_or(self.first_tsc, |old| old.moment(before)),
            last_tsc: self.moment(now),
            polled_ns: match old {
                Some(old) => grown(self.polled_ns, old.polled_ns),
                None => self.polled_ns,
            },
            ledger: match old {
                Some(old) => settled.since(&old.settled(before))?,
                None => settled,
            },
            ..self.clone()
        })
    }
}

impl Departed {
    /// Return the difference of the totals. `were_there` lists the vCPUs that were running in the
    /// earlier snapshot; their numbers from then are subtracted.
    fn since(&self, earlier: &Self, were_there: &[&VcpuReport], before: u64) -> Option<Self> {
        let rows = were_there
            .iter()
            .fold(earlier.ledger.reasons.clone(), |mut rows, vcpu| {
                rows.extend(vcpu.settled(before).reasons);
                rows
            });
        let polled = were_there.iter().map(|vcpu| vcpu.polled_ns);
        let polled = polled.fold(earlier.polled_ns, |sum, polled| {
            Some(sum?.saturating_add(polled?))
        });
        Some(Self {
            vcpus_gone: self.vcpus_gone.checked_sub(earlier.vcpus_gone)?,
            polled_ns: grown(self.polled_ns, polled),
            ledger: self.ledger.since(&Ledger::of(rows))?,
        })
    }
}

/// Return the growth of a number, if known. KVM's polling count is no clock and not read at the
/// same moment as the other numbers, so it may seem to fall.
fn grown(new: Option<u64>, old: Option<u64>) -> Option<u64> {
    Some(new?.saturating_sub(old?))
}

impl Ledger {
    /// Return the difference from an earlier ledger, or `None` if `earlier` is not an older state
    /// of this one.
    pub fn since(&self, earlier: &Self) -> Option<Self> {
        let known = earlier.reasons.iter().all(|row| {
            // A row with only a running phase may have vanished.
            row.exits == 0 || self.row(&row.label).is_some()
        });
        let rows = self
            .reasons
            .iter()
            .map(|row| match earlier.row(&row.label) {
                Some(old) => row.since(old),
                None => Some(ReasonRow {
                    counts: Counts {
                        polled: None,
                        ..row.counts
                    },
                    ..*row
                }),
            });
        let rows: Vec<_> = rows.collect::<Option<_>>()?;
        let mut ledger = Self::of(rows.into_iter().filter(ReasonRow::has_moved));
        ledger.counts.cycles.separates_waits =
            self.cycles.separates_waits && earlier.cycles.separates_waits;
        known.then_some(ledger)
    }
}

impl ReasonRow {
    /// Return true if the row, a difference, has exits or cycles.
    pub fn has_moved(&self) -> bool {
        self.exits != 0 || self.cycles.sum() != 0
    }

    /// Return the difference from an earlier row of the same reason, or `None` if `earlier` is not
    /// an older state of this one.
    pub fn since(&self, earlier: &Self) -> Option<Self> {
        let spread = match (&self.spread, &earlier.spread) {
            (Some(new), Some(old)) => Some(new.since(old)?),
            (new, _) => *new,
        };
        Some(Self {
            label: self.label,
            counts: self.counts.since(&earlier.counts)?,
            spread,
        })
    }
}
