// SPDX-License-Identifier: GPL-2.0

//! The meter's numbers, as a snapshot of /dev/exitmeter holds them.

use std::{collections::BTreeMap, fs};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    ledger::HISTOGRAMS,
    phase::Phase,
    reader::{Counter, Row, Snapshot},
    snapshot::{Reason, KERNEL_HISTOGRAM},
};

use super::hist::Exits;

/// Path of the module's device.
pub const DEVICE: &str = "/dev/exitmeter";

/// Read a snapshot from the device.
pub fn read_device() -> Result<Vec<u8>> {
    fs::read(DEVICE).with_context(|| format!("{DEVICE} cannot be read"))
}

/// The ledger of one vCPU, or the totals of departed ones.
#[derive(Clone, Debug, Default)]
pub struct LedgerNumbers {
    /// Exits by code; codes without exits are absent.
    pub exits: Exits,
    /// The exits of L2 guests among these; codes without such exits are absent.
    pub nested: Exits,
    /// TSC ticks by code and phase.
    cells: BTreeMap<u32, [u64; Phase::COUNT]>,
    /// Samples in the histogram of each code.
    samples: BTreeMap<u32, u64>,
    /// TSC ticks by phase, summed over all reasons and the time before the first exit.
    pub phases: [u64; Phase::COUNT],
}

impl LedgerNumbers {
    fn read<'a>(rows: impl Iterator<Item = Row<'a>>, histogram: &Counter<'_>) -> Result<Self> {
        let mut numbers = Self::default();
        for row in rows {
            let cycles = Phase::ALL.map(|phase| row.cycles(phase));
            for (sum, cycles) in numbers.phases.iter_mut().zip(cycles) {
                *sum += cycles;
            }
            match row.reason() {
                Reason::Code(code) => {
                    numbers.cells.insert(code, cycles);
                    let samples = row.numbers(histogram).sum();
                    numbers.samples.insert(code, samples);
                    let nested = row.nested_exits().context("nested exits are counted")?;
                    if nested != 0 {
                        numbers.nested.insert(code, nested);
                    }
                    if row.exits() != 0 {
                        numbers.exits.insert(code, row.exits());
                    }
                }
                Reason::Start => ensure!(
                    row.exits() == 0,
                    "exits are booked on the time before the first"
                ),
                Reason::Other => ensure!(
                    row.exits() == 0,
                    "{} exits have a code without a row",
                    row.exits()
                ),
            }
        }
        Ok(numbers)
    }

    /// Return the exits with `code`.
    pub fn exits_of(&self, code: u32) -> u64 {
        self.exits.get(&code).copied().unwrap_or(0)
    }

    /// Return the TSC ticks of `code` in `phase`.
    pub fn cycles_of(&self, phase: Phase, code: u32) -> u64 {
        self.cells
            .get(&code)
            .map_or(0, |cells| cells[phase as usize])
    }

    /// Return the samples in the histogram of `code`.
    pub fn samples_of(&self, code: u32) -> u64 {
        self.samples.get(&code).copied().unwrap_or(0)
    }

    /// Check that each exit has one sample. The latest exit gets its sample only at the next entry,
    /// and the reasons beyond the first [`HISTOGRAMS`] of a vCPU have no samples.
    fn check_samples(&self, latest: Option<Reason>) -> Result<()> {
        let mut without = 0;
        for (code, samples) in &self.samples {
            let exits = self.exits_of(*code);
            let open = u64::from(latest == Some(Reason::Code(*code)));
            if *samples == 0 && exits > open {
                without += 1;
                continue;
            }
            ensure!(
                (*samples..=samples + open).contains(&exits),
                "reason {code} has {exits} exits and {samples} samples"
            );
        }
        let due = self.exits.len().saturating_sub(HISTOGRAMS);
        ensure!(
            without == due,
            "{without} reasons of {} have exits and no samples, instead of {due}",
            self.exits.len()
        );
        Ok(())
    }

    /// Return true if no number is less than in `before`.
    pub fn none_fell_since(&self, before: &Self) -> bool {
        let counts = |of: fn(&Self) -> &Exits| {
            of(before)
                .iter()
                .all(|(code, count)| of(self).get(code) >= Some(count))
        };
        counts(|numbers| &numbers.exits)
            && counts(|numbers| &numbers.nested)
            && counts(|numbers| &numbers.samples)
            && before.cells.iter().all(|(code, cells)| {
                self.cells
                    .get(code)
                    .is_some_and(|now| now.iter().zip(cells).all(|(now, before)| now >= before))
            })
    }

    /// Return the share of `phase` in all ticks, 0 to 1.
    pub fn share(&self, phase: Phase) -> f64 {
        self.phases[phase as usize] as f64 / self.phases.iter().sum::<u64>() as f64
    }

    /// Format the shares of all phases.
    pub fn shares(&self) -> String {
        Phase::ALL
            .map(|phase| format!("{} {:.1}%", phase.name(), 100. * self.share(phase)))
            .join(", ")
    }
}

/// The record of a live vCPU.
#[derive(Clone, Debug)]
pub struct MeteredVcpu {
    /// Number of the VM.
    pub vm: u64,
    /// KVM's name for the VM.
    pub name: String,
    /// Thread that created the VM (`kvm->userspace_pid`); for most VMMs, their process ID.
    pub pid: u32,
    /// ID of the vCPU in its VM.
    pub id: u32,
    /// TSC ticks from the first event to the latest.
    pub life: u64,
    /// Current phase.
    pub phase: Option<Phase>,
    /// Ledger of the vCPU.
    pub numbers: LedgerNumbers,
}

/// A parsed snapshot.
#[derive(Clone, Debug)]
pub struct MeterSnapshot {
    /// Live vCPUs.
    pub vcpus: Vec<MeteredVcpu>,
    /// Number of departed vCPUs.
    pub departed: u64,
    /// Number of vCPUs that ran unmetered.
    pub unmetered: u64,
    /// Number of the meter's life.
    pub life: u64,
    /// Totals of the departed vCPUs.
    pub totals: LedgerNumbers,
}

impl MeterSnapshot {
    /// Read the device. For each live vCPU, check that its ledger balances and that each exit has its
    /// sample in the histogram.
    pub fn read() -> Result<Self> {
        Self::parse(&read_device()?)
    }

    /// Parse a snapshot, with the checks of [`MeterSnapshot::read`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let snapshot = Snapshot::parse(bytes)?;
        let histogram = &histogram(&snapshot)?;
        let vcpus = snapshot.vcpus().map(|vcpu| {
            let numbers = LedgerNumbers::read(vcpu.rows(), histogram)?;
            let life = vcpu.last().wrapping_sub(vcpu.first());
            let cells: u64 = numbers.phases.iter().sum();
            ensure!(
                life == cells && vcpu.balances(),
                "vCPU {} of {} lived {life} ticks and its cells hold {cells}",
                vcpu.id(),
                vcpu.name()
            );
            numbers.check_samples(vcpu.latest())?;
            Ok(MeteredVcpu {
                vm: vcpu.vm(),
                name: vcpu.name().to_owned(),
                pid: vcpu.pid(),
                id: vcpu.id(),
                life,
                phase: vcpu.phase(),
                numbers,
            })
        });
        Ok(Self {
            vcpus: vcpus.collect::<Result<_>>()?,
            departed: snapshot.departed(),
            unmetered: snapshot.unmetered(),
            life: snapshot.life(),
            totals: LedgerNumbers::read(snapshot.totals(), histogram)?,
        })
    }

    /// Check the numbers of metered, unmetered and departed vCPUs.
    pub fn check_counts(metered: usize, unmetered: u64, departed: u64) -> Result<()> {
        let meter = Self::read()?;
        let found = (meter.vcpus.len(), meter.unmetered, meter.departed);
        let due = (metered, unmetered, departed);
        ensure!(
            found == due,
            "(metered, unmetered, departed) is {found:?} instead of {due:?}"
        );
        Ok(())
    }

    /// Return the vCPUs of this process, ordered by VM and ID.
    pub fn own(&self) -> Vec<&MeteredVcpu> {
        let mut own: Vec<_> = self
            .vcpus
            .iter()
            .filter(|vcpu| vcpu.pid == std::process::id())
            .collect();
        own.sort_by_key(|vcpu| (vcpu.vm, vcpu.id));
        own
    }

    /// Return the only vCPU of this process, or an error if it has none or more.
    pub fn only(&self) -> Result<&MeteredVcpu> {
        match self.own()[..] {
            [vcpu] => Ok(vcpu),
            ref own => anyhow::bail!("this process has {} metered vCPUs instead of 1", own.len()),
        }
    }

    /// Return the exits by code of all vCPUs, live and departed.
    pub fn exits(&self) -> Exits {
        let mut exits = self.totals.exits.clone();
        for vcpu in &self.vcpus {
            for (reason, count) in &vcpu.numbers.exits {
                *exits.entry(*reason).or_insert(0) += count;
            }
        }
        exits
    }
}

fn histogram<'a>(snapshot: &Snapshot<'a>) -> Result<Counter<'a>> {
    snapshot
        .counters()
        .find(|counter| counter.name == KERNEL_HISTOGRAM)
        .context("the snapshot has no histogram")
}
