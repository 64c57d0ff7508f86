// SPDX-License-Identifier: GPL-2.0

//! Sums over one snapshot, by VM and reason.
//!
//! A snapshot of 8000 vCPUs has 100 MB. It is read one record at a time, so only the sums stay in
//! memory.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Read},
    ops::Deref,
    path::Path,
};

use exitmeter_meter::{
    phase::Phase,
    reader::{self, Head, TablesHead, VcpuRecord as Record},
    snapshot::TABLE_DETAILS,
};

use crate::{
    model::{sum_if_known, Counts, Cycles, Label, ReasonRow},
    names::RunningVms,
    source,
    spread::Spread,
    why::tables,
};

/// Maximum size of a snapshot's head, in bytes. Today's has 1 KiB.
const LARGEST_HEAD: u64 = 64 << 10;

/// Maximum size of a record, in bytes. A record with all reasons has 110 KiB.
const LARGEST_RECORD: u32 = 1 << 20;

pub use crate::plot::series::Key;

/// Numbers by reason.
pub type Rows = BTreeMap<Key, ReasonRow>;

/// Numbers of one reason of a VM: a compact [`ReasonRow`], as a host may have some 20,000 of them.
#[derive(Clone, Debug)]
pub struct CompactRow {
    label: Label,
    counts: Counts,
    /// Distribution of the cost of single exits, if requested.
    pub spread: Option<Box<Spread>>,
}

/// Sums over a snapshot.
#[derive(Clone, Debug)]
pub struct Sums {
    /// Head of the snapshot.
    pub head: Head,
    /// Sums over all vCPUs, including those that are gone, with the distribution of exit costs.
    /// They exclude phases that still run: when the vCPU goes, such a phase is booked nowhere, and
    /// the sums must not fall.
    pub all: Rows,
    /// Time of the phases that still run, summed over all vCPUs.
    pub running: Rows,
    /// Nanoseconds that KVM polled for all vCPUs, if known.
    pub polled_ns: Option<u64>,
    /// Running VMs, by VM number.
    pub vms: BTreeMap<u64, Vm>,
    /// Details by VM number and vCPU id, if requested and on.
    pub tables: BTreeMap<(u64, u32), tables::VcpuTables>,
    /// Number of vCPUs that have tables.
    pub detailed: u32,
}

/// Sums of one VM.
#[derive(Clone, Debug)]
pub struct Vm {
    /// KVM's name for the VM.
    pub name: String,
    /// Process id of the VMM.
    pub pid: u32,
    /// TSC at the first event of its oldest vCPU.
    pub first: u64,
    /// Number of metered vCPUs.
    pub vcpus: usize,
    /// Numbers by reason, including phases that still run.
    pub rows: BTreeMap<Key, CompactRow>,
    /// Nanoseconds that KVM polled for the VM, if known.
    pub polled_ns: Option<u64>,
    /// Exits and ticks of each vCPU by its id, if requested.
    pub each: BTreeMap<u32, (u64, Cycles)>,
}

/// Choice of data to keep beyond the sums.
#[derive(Clone, Copy, Debug, Default)]
pub struct Detail {
    /// Distribution of exit costs, by VM and reason.
    pub spreads: bool,
    /// Numbers of each vCPU.
    pub vcpus: bool,
    /// Details of exits.
    pub details: bool,
}

/// A snapshot that is read one part at a time.
struct Parts<'a, F> {
    path: &'a Path,
    from: F,
    at: u64,
    record: Vec<u8>,
}

impl Sums {
    /// Read a snapshot and sum it up.
    ///
    /// # Errors
    ///
    /// See [`source::read`] and [`source::parse`].
    pub fn read(path: &Path, detail: Detail) -> Result<Self, source::Error> {
        Self::of(path, source::open(path)?, detail)
    }

    /// Read a snapshot from `from`. Errors name `path`.
    ///
    /// # Errors
    ///
    /// See [`Self::read`].
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
            let row = ReasonRow::new(head.isa, head.separates_waits(), &row);
            add_row(&mut sums.all, row);
        }
        sums.polled_ns = sum_if_known(sums.polled_ns, polled);
        if let Some(tables) = head.tables.filter(|_| detail.details) {
            sums.read_tables(&mut parts, &tables, &vcpus)?;
        }
        Ok(sums)
    }

    /// Read the details. `vcpus` lists the snapshot's vCPUs in its order, by VM and id.
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
            let vcpu =
                tables::VcpuTables::new(&tables, self.head.now, |table| table == TABLE_DETAILS);
            // The reader has checked that the vCPU exists.
            if let Some(id) = vcpus.get(tables.vcpu) {
                self.tables.insert(*id, vcpu);
            }
        }
        Ok(())
    }

    /// Return the running VMs, with what the search for their names needs.
    pub fn running(&self) -> RunningVms {
        let vms = self.vms.iter();
        RunningVms {
            life: self.head.life,
            now: self.head.now,
            tsc_khz: self.head.tsc_khz,
            vms: vms.map(|(vm, of)| (*vm, (of.pid, of.first))).collect(),
        }
    }

    /// Return the sums over all vCPUs, including phases that still run.
    pub fn up_to_now(&self) -> Rows {
        let mut all = self.all.clone();
        for row in self.running.values() {
            add_row(&mut all, *row);
        }
        all
    }

    /// Return the number of metered vCPUs.
    pub fn vcpus(&self) -> usize {
        self.vms.values().map(|vm| vm.vcpus).sum()
    }

    fn add(&mut self, record: &Record<'_>, detail: Detail) {
        let (isa, separates_waits) = (self.head.isa, self.head.separates_waits());
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
        vm.polled_ns = sum_if_known(vm.polled_ns, record.polled());
        self.polled_ns = sum_if_known(self.polled_ns, record.polled());
        let mut own = (0_u64, Cycles::by_phase(separates_waits, |_| 0));
        let mut add = |all: &mut Rows, row: ReasonRow| {
            own.0 = own.0.saturating_add(row.exits);
            own.1 += row.cycles;
            add_row(all, row);
            vm.rows
                .entry(row.label.key())
                .or_insert_with(|| CompactRow::new(&row, detail))
                .add(&row);
        };
        for row in record.rows() {
            add(&mut self.all, ReasonRow::new(isa, separates_waits, &row));
        }
        // A phase is booked when it ends. Without this part, a vCPU that sleeps for a minute would
        // add the whole minute to one scrape.
        if let (Some(phase), Some(reason)) = (record.phase(), record.latest()) {
            let running = u128::from(self.head.now.saturating_sub(record.last()));
            let mut counts = Counts::default();
            counts.cycles.separates_waits = separates_waits;
            let row = ReasonRow {
                label: Label::new(isa, reason),
                counts: counts.of_phase(phase, running),
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
    /// Return the rows in the form of a report.
    pub fn report_rows(&self) -> Rows {
        let rows = self.rows.iter();
        rows.map(|(key, row)| (*key, row.report_row())).collect()
    }

    /// Return the ticks by phase.
    pub fn cycles(&self) -> Cycles {
        self.rows.values().map(|row| row.cycles).sum()
    }
}

impl Deref for CompactRow {
    type Target = Counts;

    fn deref(&self) -> &Counts {
        &self.counts
    }
}

impl CompactRow {
    /// Create a row without numbers.
    fn new(row: &ReasonRow, detail: Detail) -> Self {
        Self {
            label: row.label,
            counts: Counts::default(),
            spread: (detail.spreads && row.spread.is_some()).then(Box::default),
        }
    }

    fn add(&mut self, row: &ReasonRow) {
        self.counts += row.counts;
        if let (Some(sum), Some(spread)) = (&mut self.spread, row.spread) {
            **sum += spread;
        }
    }

    /// Return the row in the form of a report.
    pub fn report_row(&self) -> ReasonRow {
        ReasonRow {
            label: self.label,
            counts: self.counts,
            spread: self.spread.as_deref().copied(),
        }
    }
}

/// Return the sum over all reasons, by phase.
pub fn cycles(rows: &Rows) -> Cycles {
    rows.values().map(|row| row.cycles).sum()
}

/// Return the names of the phases and their ticks.
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

    /// Skip to an offset.
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

    /// Read the next record.
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

    /// Read the next `size` bytes.
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

    /// Return the error for a record that could not be read.
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
