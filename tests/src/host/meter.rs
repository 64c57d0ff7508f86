// SPDX-License-Identifier: GPL-2.0

//! What the host reads of the meter: the snapshot of /dev/exitmeter.

use std::{collections::BTreeMap, fs};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    phase::Phase,
    reader::{Counter, Row, Snapshot},
    snapshot::{Reason, KERNEL_HISTOGRAM},
};

use super::hist::Exits;

/// The device that the module makes.
pub const DEVICE: &str = "/dev/exitmeter";

/// The numbers of one vCPU, or the sums of those that are gone.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// Exits by reason, those that are 0 left out.
    pub exits: Exits,
    /// Of those, the exits from a guest in the guest; those that are 0 left out.
    pub nested: Exits,
    /// TSC ticks of a reason, by phase.
    cells: BTreeMap<u32, [u64; Phase::COUNT]>,
    /// Samples in the histogram of a reason.
    samples: BTreeMap<u32, u64>,
    /// TSC ticks by phase, over all reasons and the time before the first exit.
    pub phases: [u64; Phase::COUNT],
}

impl Numbers {
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

    /// Exits with a code.
    pub fn exits_of(&self, code: u32) -> u64 {
        self.exits.get(&code).copied().unwrap_or(0)
    }

    /// TSC ticks of a code in a phase.
    pub fn cycles_of(&self, phase: Phase, code: u32) -> u64 {
        self.cells
            .get(&code)
            .map_or(0, |cells| cells[phase as usize])
    }

    /// Demands one sample for each exit; the latest one gets its own when the guest is
    /// entered again.
    fn check_samples(&self, latest: Option<Reason>) -> Result<()> {
        for (code, samples) in &self.samples {
            let exits = self.exits_of(*code);
            let open = u64::from(latest == Some(Reason::Code(*code)));
            ensure!(
                (*samples..=samples + open).contains(&exits),
                "reason {code} has {exits} exits and {samples} samples"
            );
        }
        Ok(())
    }

    /// Whether none of the numbers is less than it was before.
    pub fn is_not_behind(&self, before: &Self) -> bool {
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

    /// The share of a phase in all ticks, 0 to 1.
    pub fn share(&self, phase: Phase) -> f64 {
        self.phases[phase as usize] as f64 / self.phases.iter().sum::<u64>() as f64
    }

    /// The shares of all phases, in words.
    pub fn shares(&self) -> String {
        Phase::ALL
            .map(|phase| format!("{} {:.1}%", phase.name(), 100. * self.share(phase)))
            .join(", ")
    }
}

/// A vCPU that lives.
#[derive(Clone, Debug)]
pub struct Vcpu {
    /// The VM's number.
    pub vm: u64,
    /// KVM's name of the VM.
    pub name: String,
    /// The thread that made the VM (`kvm->userspace_pid`): for most VMMs their process.
    pub pid: u32,
    /// The vCPU's id.
    pub id: u32,
    /// Its life in TSC ticks: first event to latest.
    pub life: u64,
    /// The phase it is in.
    pub phase: Option<Phase>,
    /// Its numbers.
    pub numbers: Numbers,
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Meter {
    /// The vCPUs that live.
    pub vcpus: Vec<Vcpu>,
    /// How many are gone.
    pub gone: u64,
    /// How many ran unmetered.
    pub unmetered: u64,
    /// The number of the meter's life.
    pub life: u64,
    /// The sums of those that are gone.
    pub totals: Numbers,
}

impl Meter {
    /// Reads the device. Each vCPU that lives is checked: it balances, and each exit has
    /// its sample in the histogram.
    pub fn read() -> Result<Self> {
        let bytes = fs::read(DEVICE).with_context(|| format!("{DEVICE} cannot be read"))?;
        Self::parse(&bytes)
    }

    /// Reads a snapshot, with the same checks.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let snapshot = Snapshot::parse(bytes)?;
        let histogram = &histogram(&snapshot)?;
        let vcpus = snapshot.vcpus().map(|vcpu| {
            let numbers = Numbers::read(vcpu.rows(), histogram)?;
            let life = vcpu.last().wrapping_sub(vcpu.first());
            let cells: u64 = numbers.phases.iter().sum();
            ensure!(
                life == cells && vcpu.balances(),
                "vCPU {} of {} lived {life} ticks and its cells hold {cells}",
                vcpu.id(),
                vcpu.name()
            );
            numbers.check_samples(vcpu.latest())?;
            Ok(Vcpu {
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
            gone: snapshot.gone(),
            unmetered: snapshot.unmetered(),
            life: snapshot.life(),
            totals: Numbers::read(snapshot.totals(), histogram)?,
        })
    }

    /// Demands that so many vCPUs are metered, so many ran unmetered, and so many metered ones are
    /// gone.
    pub fn demand(metered: usize, unmetered: u64, gone: u64) -> Result<()> {
        let meter = Self::read()?;
        let found = (meter.vcpus.len(), meter.unmetered, meter.gone);
        let due = (metered, unmetered, gone);
        ensure!(
            found == due,
            "(metered, unmetered, gone) is {found:?} instead of {due:?}"
        );
        Ok(())
    }

    /// The vCPUs of this process, in the order of VM and id.
    pub fn own(&self) -> Vec<&Vcpu> {
        let mut own: Vec<_> = self
            .vcpus
            .iter()
            .filter(|vcpu| vcpu.pid == std::process::id())
            .collect();
        own.sort_by_key(|vcpu| (vcpu.vm, vcpu.id));
        own
    }

    /// The one vCPU of this process.
    pub fn only(&self) -> Result<&Vcpu> {
        match self.own()[..] {
            [vcpu] => Ok(vcpu),
            ref own => anyhow::bail!("this process has {} metered vCPUs instead of 1", own.len()),
        }
    }

    /// Exits by reason of all vCPUs, those that live and those that are gone.
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
