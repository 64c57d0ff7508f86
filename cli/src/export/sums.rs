// SPDX-License-Identifier: GPL-2.0

//! The sums of one snapshot, by VM and reason.
//!
//! A snapshot of 8000 vCPUs has 100 MB. It is read a record at a time, so only the sums stay in memory.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read},
    path::Path,
};

use exitmeter_meter::{
    phase::Phase,
    reader::{self, Head, TablesHead, Vcpu as Record},
    snapshot::TABLE_DETAILS,
};

use crate::{
    model::{both, Cycles, Label, ReasonRow},
    names::Running,
    source,
    spread::Spread,
    why::tables,
};

/// The most bytes that a snapshot's head may have: today's has 1 KiB.
const LARGEST_HEAD: u64 = 64 << 10;

/// The most bytes that a record may have: one of all reasons has 110 KiB.
const LARGEST_RECORD: u32 = 1 << 20;

pub use crate::plot::series::Key;

/// Numbers by reason.
pub type Rows = BTreeMap<Key, ReasonRow>;

/// The numbers of a VM's reason: a [`ReasonRow`] that is small, as a host may have some 20,000 of them.
#[derive(Clone, Debug)]
pub struct Row {
    label: Label,
    /// VM exits.
    pub exits: u64,
    /// Of these, those from nested guests, when they are known.
    pub nested_exits: Option<u64>,
    /// TSC ticks by phase.
    pub cycles: Cycles,
    /// What single exits cost, when it was asked for.
    pub spread: Option<Box<Spread>>,
}

/// The sums of a snapshot.
#[derive(Clone, Debug)]
pub struct Sums {
    /// What the snapshot begins with.
    pub head: Head,
    /// All vCPUs, those that are gone too, with the spread of what exits cost. A phase that still runs is not in it: when its
    /// vCPU goes it is booked nowhere, and the sum must not fall.
    pub all: Rows,
    /// The phases that still run, of all vCPUs.
    pub running: Rows,
    /// Nanoseconds that KVM polled for all of them, when it is known.
    pub polled_ns: Option<u64>,
    /// The VMs that run, by their numbers.
    pub vms: BTreeMap<u64, Vm>,
    /// What exits were about, by VM and id of the vCPU, when it was asked for and details are on.
    pub tables: BTreeMap<(u64, u32), tables::Vcpu>,
    /// vCPUs that have tables.
    pub detailed: u32,
}

/// The sums of a VM.
#[derive(Clone, Debug)]
pub struct Vm {
    /// KVM's name for it.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// TSC at the first event of its oldest vCPU.
    pub first: u64,
    /// How many of its vCPUs are metered.
    pub vcpus: usize,
    /// Its numbers by reason, with the phases that still run.
    pub rows: BTreeMap<Key, Row>,
    /// Nanoseconds that KVM polled for it, when it is known.
    pub polled_ns: Option<u64>,
    /// The numbers of each vCPU by its id, when they were asked for.
    pub each: BTreeMap<u32, (u64, Cycles)>,
}

/// What of a VM is kept beyond its sums.
#[derive(Clone, Copy, Debug, Default)]
pub struct Detail {
    /// The spread of what exits cost, by VM and reason.
    pub spreads: bool,
    /// The numbers of each vCPU.
    pub vcpus: bool,
    /// What exits were about.
    pub details: bool,
}

/// A snapshot that is read a part at a time.
struct Parts<'a, F> {
    path: &'a Path,
    from: F,
    at: u64,
    record: Vec<u8>,
}

impl Sums {
    /// Read a snapshot.
    ///
    /// # Errors
    ///
    /// As [`source::read`] and [`source::parse`].
    pub fn read(path: &Path, detail: Detail) -> Result<Self, source::Error> {
        Self::of(path, source::open(path)?, detail)
    }

    /// Read a snapshot from somewhere else; `path` is what an error names.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn of(path: &Path, from: impl Read, detail: Detail) -> Result<Self, source::Error> {
        let mut parts = Parts {
            path,
            from,
            at: 0,
            record: Vec::new(),
        };
        let head = parts.head()?;
        let mut sums = Self {
            head,
            all: Rows::new(),
            running: Rows::new(),
            polled_ns: Some(0),
            vms: BTreeMap::new(),
            tables: BTreeMap::new(),
            detailed: head.tables.map_or(0, |tables| tables.count),
        };
        let mut vcpus = Vec::new();
        parts.skip_to(head.records)?;
        for _ in 0..head.count {
            parts.next_record()?;
            let record = head.vcpu(&parts.record);
            let record = record.ok_or_else(|| parts.outside())?;
            sums.add(&record, detail);
            if detail.details {
                vcpus.push((record.vm(), record.id()));
            }
        }
        parts.skip_to(head.totals)?;
        parts.next_record()?;
        let (rows, polled) = head
            .departed(&parts.record)
            .ok_or_else(|| parts.outside())?;
        for row in rows {
            let row = ReasonRow::new(head.isa, head.has_waits(), &row);
            add_row(&mut sums.all, row);
        }
        sums.polled_ns = both(sums.polled_ns, polled);
        if let Some(tables) = head.tables.filter(|_| detail.details) {
            sums.read_tables(&mut parts, &tables, &vcpus)?;
        }
        Ok(sums)
    }

    /// Read what exits were about. `vcpus` are those of the snapshot, in its order, by VM and id.
    fn read_tables(
        &mut self,
        parts: &mut Parts<'_, impl Read>,
        head: &TablesHead,
        vcpus: &[(u64, u32)],
    ) -> Result<(), source::Error> {
        parts.skip_to(head.descriptors)?;
        let shape = head.shape(parts.next_bytes(head.descriptors_size)?);
        let shape = shape.map_err(|error| parts.wrong(error))?;
        parts.skip_to(head.records)?;
        for _ in 0..head.count {
            parts.next_record()?;
            let tables = shape.tables(&parts.record, self.head.count);
            let tables = tables.map_err(|error| parts.wrong(error))?;
            let vcpu = tables::Vcpu::new(&tables, self.head.now, |table| table == TABLE_DETAILS);
            // The reader has checked that it is there.
            if let Some(id) = vcpus.get(tables.vcpu) {
                self.tables.insert(*id, vcpu);
            }
        }
        Ok(())
    }

    /// Return the VMs, as far as it takes to look up their names.
    pub fn running(&self) -> Running {
        let vms = self.vms.iter();
        Running {
            life: self.head.life,
            now: self.head.now,
            tsc_khz: self.head.tsc_khz,
            vms: vms.map(|(vm, of)| (*vm, (of.pid, of.first))).collect(),
        }
    }

    /// Return all vCPUs, with the phases that still run.
    pub fn up_to_now(&self) -> Rows {
        let mut all = self.all.clone();
        for row in self.running.values() {
            add_row(&mut all, *row);
        }
        all
    }

    /// Return the metered vCPUs that run.
    pub fn vcpus(&self) -> usize {
        self.vms.values().map(|vm| vm.vcpus).sum()
    }

    fn add(&mut self, record: &Record<'_>, detail: Detail) {
        let (isa, has_waits) = (self.head.isa, self.head.has_waits());
        let vm = self.vms.entry(record.vm()).or_insert_with(|| Vm {
            name: record.name().to_owned(),
            pid: record.pid(),
            first: record.first(),
            vcpus: 0,
            rows: BTreeMap::new(),
            polled_ns: Some(0),
            each: BTreeMap::new(),
        });
        vm.first = vm.first.min(record.first());
        vm.vcpus += 1;
        vm.polled_ns = both(vm.polled_ns, record.polled());
        self.polled_ns = both(self.polled_ns, record.polled());
        let mut own = (0_u64, Cycles::by_phase(has_waits, |_| 0));
        let mut add = |all: &mut Rows, row: ReasonRow| {
            own.0 = own.0.saturating_add(row.exits);
            own.1 += row.cycles;
            add_row(all, row);
            vm.rows
                .entry(row.label.key())
                .or_insert_with(|| Row::new(&row, detail))
                .add(&row);
        };
        for row in record.rows() {
            add(&mut self.all, ReasonRow::new(isa, has_waits, &row));
        }
        // The phase that runs is booked when it ends. A vCPU that sleeps for a minute would have it all in one scrape.
        if let (Some(phase), Some(reason)) = (record.phase(), record.latest()) {
            let running = u128::from(self.head.now.saturating_sub(record.last()));
            let row = ReasonRow {
                label: Label::new(isa, reason),
                exits: 0,
                nested_exits: Some(0),
                cycles: Cycles::by_phase(has_waits, |other| match other == phase {
                    true => running,
                    false => 0,
                }),
                polled: None,
                spread: None,
            };
            add(&mut self.running, row);
        }
        if detail.vcpus {
            vm.each.insert(record.id(), own);
        }
    }
}

impl Vm {
    /// Return its rows as those of a report.
    pub fn whole(&self) -> Rows {
        let rows = self.rows.iter();
        rows.map(|(key, row)| (*key, row.whole())).collect()
    }

    /// Return its ticks by phase.
    pub fn cycles(&self) -> Cycles {
        self.rows.values().map(|row| row.cycles).sum()
    }
}

impl Row {
    /// Make one without numbers.
    fn new(row: &ReasonRow, detail: Detail) -> Self {
        Self {
            label: row.label,
            exits: 0,
            nested_exits: Some(0),
            cycles: Cycles::default(),
            spread: (detail.spreads && row.spread.is_some()).then(Box::default),
        }
    }

    fn add(&mut self, row: &ReasonRow) {
        self.exits = self.exits.saturating_add(row.exits);
        self.nested_exits = both(self.nested_exits, row.nested_exits);
        self.cycles += row.cycles;
        if let (Some(sum), Some(spread)) = (&mut self.spread, row.spread) {
            **sum += spread;
        }
    }

    /// Return the same as a row of a report.
    pub fn whole(&self) -> ReasonRow {
        ReasonRow {
            label: self.label,
            exits: self.exits,
            nested_exits: self.nested_exits,
            cycles: self.cycles,
            polled: None,
            spread: self.spread.as_deref().copied(),
        }
    }
}

/// Return the ticks of all reasons by phase.
pub fn cycles(rows: &Rows) -> Cycles {
    rows.values().map(|row| row.cycles).sum()
}

/// Return the sum of numbers by phase.
pub fn ticks(cycles: &Cycles) -> impl Iterator<Item = (&'static str, u128)> + '_ {
    let name = |phase: Phase| cycles.name(phase);
    cycles
        .phases()
        .map(move |phase| (name(phase), cycles.of(phase)))
}

fn add_row(rows: &mut Rows, row: ReasonRow) {
    rows.entry(row.label.key())
        .and_modify(|sum| *sum += row)
        .or_insert(row);
}

impl<F: Read> Parts<'_, F> {
    /// Read the head.
    fn head(&mut self) -> Result<Head, source::Error> {
        let mut bytes = Vec::new();
        loop {
            match Head::parse(&bytes) {
                Err(reader::Error::Truncated { needed, found })
                    if needed > found && needed <= LARGEST_HEAD =>
                {
                    // Both are below the limit.
                    let (old, new) = (found as usize, needed as usize);
                    bytes.resize(new, 0);
                    let mut filled = old;
                    while filled < new {
                        let part = bytes.get_mut(filled..).unwrap_or_default();
                        match self.from.read(part) {
                            Ok(0) => {
                                bytes.truncate(filled);
                                let error = Head::parse(&bytes).err();
                                return Err(self.wrong(error.unwrap_or(reader::Error::Magic)));
                            }
                            Ok(count) => filled += count,
                            Err(error) if error.kind() == ErrorKind::Interrupted => {}
                            Err(error) => return Err(source::error(self.path, error)),
                        }
                    }
                    self.at = needed;
                }
                Err(error) => return Err(self.wrong(error)),
                Ok(head) => return Ok(head),
            }
        }
    }

    /// Go on at an offset.
    fn skip_to(&mut self, offset: u64) -> Result<(), source::Error> {
        let skip = offset.checked_sub(self.at).ok_or_else(|| self.outside())?;
        let mut skipped = self.from.by_ref().take(skip);
        let skipped = io::copy(&mut skipped, &mut io::sink());
        match skipped {
            Ok(count) if count == skip => {
                self.at = offset;
                Ok(())
            }
            Ok(_) => Err(self.outside()),
            Err(error) => Err(source::error(self.path, error)),
        }
    }

    /// Read the record that comes next.
    fn next_record(&mut self) -> Result<(), source::Error> {
        let mut begin = [0; Head::RECORD_SIZE];
        let read = self.from.read_exact(&mut begin);
        read.map_err(|error| self.cut(error))?;
        let size = Head::record_size(begin);
        if size > LARGEST_RECORD || (size as usize) < begin.len() {
            return Err(self.outside());
        }
        self.record.clear();
        self.record.extend_from_slice(&begin);
        self.record.resize(size as usize, 0);
        let rest = self.record.get_mut(begin.len()..).unwrap_or_default();
        let read = self.from.read_exact(rest);
        read.map_err(|error| self.cut(error))?;
        self.at += u64::from(size);
        Ok(())
    }

    /// Read so many bytes.
    fn next_bytes(&mut self, size: u64) -> Result<&[u8], source::Error> {
        let size = u32::try_from(size).ok();
        let size = size.filter(|size| *size <= LARGEST_RECORD);
        let size = size.ok_or_else(|| self.outside())?;
        self.record.clear();
        self.record.resize(size as usize, 0);
        let read = self.from.read_exact(&mut self.record);
        read.map_err(|error| self.cut(error))?;
        self.at += u64::from(size);
        Ok(&self.record)
    }

    /// Return why a record could not be read.
    fn cut(&self, error: io::Error) -> source::Error {
        match error.kind() {
            ErrorKind::UnexpectedEof => self.outside(),
            _ => source::error(self.path, error),
        }
    }

    fn outside(&self) -> source::Error {
        self.wrong(reader::Error::Damaged("a record lies outside of it"))
    }

    fn wrong(&self, error: reader::Error) -> source::Error {
        source::Error::NoSnapshot {
            path: self.path.to_owned(),
            error,
        }
    }
}
