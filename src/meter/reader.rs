// SPDX-License-Identifier: GPL-2.0

//! Reader of the snapshot of `/dev/exitmeter` that [`crate::snapshot`] defines.
//!
//! Only the tools use this, so the module does not compile it. It copies nothing: all that it
//! returns borrows from the snapshot's bytes. [`Snapshot::parse`] checks every offset once, and
//! nothing after it can fail.
//!
//! A snapshot of a later minor version reads like one of this version: the reader skips larger
//! headers, records and rows, and unknown counters and kinds of rows.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bytes = std::fs::read("/dev/exitmeter")?;
//! let snapshot = exitmeter_meter::reader::Snapshot::parse(&bytes)?;
//! for vcpu in snapshot.vcpus() {
//!     let exits: u64 = vcpu.rows().map(|row| row.exits()).sum();
//!     println!("{} vCPU {}: {exits} exits", vcpu.name(), vcpu.id());
//! }
//! # Ok(())
//! # }
//! ```

use core::fmt;

use crate::{
    histogram::{Buckets, EMPTY},
    leaves::LeafMap,
    phase::Phase,
    reasons::Isa,
    snapshot::{
        Reason, BLOCKED, COUNTERS, COUNTERS_BY_MINOR, CPU_ENTRY, CPU_EXIT, DESCRIPTOR_SIZE,
        ENTRY_HEAD_SIZE, EXITS, EXITS_MISSED, FLAG_BPF, FLAG_CULPRIT, FLAG_FROZEN, FLAG_HOST_SCOPE,
        FLAG_NESTED, FLAG_NO_ENTRY_RIP, FLAG_NO_RIP, FLAG_OTHERS, FLAG_TSC_STABLE, HEADER_SIZE,
        HEAD_SIZE, KERNEL_HISTOGRAM, KERNEL_MAX, KERNEL_MISSED, KIND_BOUND, KIND_HISTOGRAM,
        KIND_MAXIMUM, KIND_PER_EXIT, KIND_SUM, MAGIC, MAJOR, NAME_SIZE, NESTED_EXITS, RIP,
        ROW_HEAD_SIZE, SCHEDULED_OUT, SECTION_HEAD_SIZE, SEQUENCE, TABLES_HEAD_SIZE, TABLE_RING,
        TABLE_SLOWEST, TABLE_USER, TIME, UNIT_ADDRESS, UNIT_EVENTS, UNIT_NUMBER, UNIT_TICKS,
        UNIT_TIME, USER_EXIT, USER_MISSED, WINDOW,
    },
};

/// Minimum size of the header, in bytes: that of versions before 1.3.
const HEADER_SIZE_1_0: usize = 128;

/// Minimum size of a record before its rows, in bytes: that of version 1.0.
const HEAD_SIZE_1_0: usize = 104;

/// Reason why bytes are not a snapshot that this reader understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The snapshot is truncated.
    Truncated {
        /// Expected number of bytes.
        needed: u64,
        /// Actual number of bytes.
        found: u64,
    },
    /// The magic bytes are missing.
    Magic,
    /// The major version is unknown.
    Version {
        /// The major version.
        major: u16,
        /// The minor version.
        minor: u16,
    },
    /// The ISA is unknown.
    Isa(u32),
    /// A part lies outside of its bounds.
    Damaged(&'static str),
    /// The counter with this name is missing.
    Counter(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Truncated { needed, found } => write!(
                f,
                "the snapshot is truncated: it has {found} bytes and should have {needed}"
            ),
            Error::Magic => write!(f, "this is not a snapshot of exitmeter"),
            Error::Version { major, minor } => write!(
                f,
                "the snapshot has version {major}.{minor}, this tool reads version {MAJOR}: \
                 use the tool that came with the module"
            ),
            Error::Isa(number) => write!(
                f,
                "the snapshot names an unknown instruction set extension, {number}"
            ),
            Error::Damaged(what) => write!(f, "the snapshot is damaged: {what}"),
            Error::Counter(name) => write!(f, "the snapshot lacks the counter '{name}'"),
        }
    }
}

impl core::error::Error for Error {}

/// Return the bytes of `count` elements of `size` bytes at an offset, if all are there.
fn part(bytes: &[u8], offset: u64, count: u32, size: u32) -> Option<&[u8]> {
    let len = usize::try_from(u64::from(count).checked_mul(u64::from(size))?).ok()?;
    bytes.get(usize::try_from(offset).ok()?..)?.get(..len)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u16::from_le_bytes(*bytes))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u64::from_le_bytes(*bytes))
}

/// Return a name, up to the first NUL or the first byte that is not UTF-8.
fn name_at(bytes: &[u8], offset: usize) -> &str {
    let name = bytes.get(offset..).unwrap_or_default();
    let name = name.get(..NAME_SIZE).unwrap_or(name);
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    match core::str::from_utf8(name) {
        Ok(name) => name,
        Err(error) => name
            .get(..error.valid_up_to())
            .and_then(|name| core::str::from_utf8(name).ok())
            .unwrap_or_default(),
    }
}

/// Return the reason with a kind and code, or `None` for a kind of a later version.
fn reason(kind: u32, code: u32) -> Option<Reason> {
    match kind {
        0 => Some(Reason::Code(code)),
        1 => Some(Reason::Start),
        2 => Some(Reason::Other),
        _ => None,
    }
}

/// Unit of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Events, such as exits.
    Events,
    /// Ticks of the TSC.
    Ticks,
    /// A plain number.
    Number,
    /// A moment, in TSC ticks.
    Time,
    /// A guest address.
    Address,
    /// A unit of a later version.
    Unknown(u32),
}

impl Unit {
    fn read(number: u32) -> Self {
        match number {
            UNIT_EVENTS => Unit::Events,
            UNIT_TICKS => Unit::Ticks,
            UNIT_NUMBER => Unit::Number,
            UNIT_TIME => Unit::Time,
            UNIT_ADDRESS => Unit::Address,
            other => Unit::Unknown(other),
        }
    }
}

/// Kind of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One sum that only grows.
    Sum,
    /// Number of samples in each range of values.
    Histogram {
        /// Number of buckets in each power of two, as a power of two.
        parts_power: u32,
        /// Power of two of the first bucket.
        first_power: u32,
    },
    /// The maximum of its samples.
    Maximum,
    /// An upper bound for what another column lacks.
    Bound,
    /// A value of one exit.
    PerExit,
    /// A kind of a later version, with its number from 0 to 255.
    Unknown(u32),
}

impl Kind {
    /// Decode the kind: its number in the lowest byte, and its parameters in the next two.
    fn read(bytes: u32) -> Self {
        let [kind, parts, first, _] = bytes.to_le_bytes();
        match kind.into() {
            KIND_SUM => Kind::Sum,
            KIND_HISTOGRAM => Kind::Histogram {
                parts_power: parts.into(),
                first_power: first.into(),
            },
            KIND_MAXIMUM => Kind::Maximum,
            KIND_BOUND => Kind::Bound,
            KIND_PER_EXIT => Kind::PerExit,
            other => Kind::Unknown(other),
        }
    }
}

/// A counter that every row has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter<'a> {
    /// Name of the counter.
    pub name: &'a str,
    /// Unit of its numbers.
    pub unit: Unit,
    /// Kind of the counter.
    pub kind: Kind,
    /// Number of its values.
    pub len: usize,
    offset: usize,
}

impl<'a> Counter<'a> {
    fn read(descriptor: &'a [u8]) -> Option<Self> {
        Some(Self {
            unit: Unit::read(u32_at(descriptor, 0)?),
            kind: Kind::read(u32_at(descriptor, 4)?),
            offset: usize::try_from(u32_at(descriptor, 8)?).ok()?,
            len: usize::try_from(u32_at(descriptor, 12)?).ok()?,
            name: name_at(descriptor, 16),
        })
    }
}

/// Sizes of a snapshot's elements, and the offsets of its known counters in a row.
#[derive(Clone, Copy, Debug)]
struct Shape {
    head: usize,
    row: usize,
    /// Offset of each of [`COUNTERS`]; `None` for a counter that the snapshot lacks.
    counters: [Option<usize>; COUNTERS.len()],
    /// Offset of each phase; `None` for a phase that the snapshot lacks, as versions before 1.2
    /// lack [`Phase::Waiting`].
    cycles: [Option<usize>; Phase::COUNT],
}

/// Head of a snapshot, up to its descriptors, for programs that read one record at a time.
///
/// A host with 1000 VMs of 8 vCPUs has a snapshot of 100 MB. A program that sums it up need not
/// hold all of it. The records of the vCPUs start at [`Self::records`], one after another, and the
/// totals at [`Self::totals`].
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Size of the whole snapshot, in bytes.
    pub size: u64,
    /// Offset of the first record of a vCPU.
    pub records: u64,
    /// Number of such records.
    pub count: u32,
    /// Offset of the record of the vCPUs that are gone.
    pub totals: u64,
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// See [`Snapshot::life`].
    pub life: u64,
    /// See [`Snapshot::loaded`].
    pub loaded: u64,
    /// See [`Snapshot::now`].
    pub now: u64,
    /// See [`Snapshot::tsc_khz`].
    pub tsc_khz: Option<u32>,
    /// See [`Snapshot::by_bpf`].
    pub by_bpf: bool,
    /// See [`Snapshot::unmetered`].
    pub unmetered: u64,
    /// See [`Snapshot::departed`].
    pub gone: u64,
    /// Offsets of the tables; `None` while details are off, and before version 1.3.
    pub tables: Option<TablesHead>,
    descriptors: u64,
    descriptor_count: u32,
    descriptor_size: u32,
    shape: Shape,
}

impl Head {
    /// Size of the start of a record that holds the record's size, in bytes.
    pub const RECORD_SIZE: usize = 4;

    /// Read the head of a snapshot at the start of `bytes`.
    ///
    /// # Errors
    ///
    /// The errors of [`Snapshot::parse`]. If `bytes` are too few for the head, [`Error::Truncated`]
    /// gives the number that it needs.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let found = bytes.len() as u64;
        let truncated = |needed| Error::Truncated { needed, found };
        let short = truncated(HEADER_SIZE_1_0 as u64);

        if !bytes.starts_with(&MAGIC) {
            return Err(if MAGIC.starts_with(bytes) {
                short
            } else {
                Error::Magic
            });
        }
        let major = u16_at(bytes, 8).ok_or(short)?;
        let minor = u16_at(bytes, 10).ok_or(short)?;
        if major != MAJOR {
            return Err(Error::Version { major, minor });
        }
        let header = bytes.get(..HEADER_SIZE_1_0).ok_or(short)?;
        let field32 = |offset| u32_at(header, offset).ok_or(short);
        let field64 = |offset| u64_at(header, offset).ok_or(short);
        let header_size = field32(12)?;
        if (header_size as usize) < HEADER_SIZE_1_0 {
            return Err(Error::Damaged("its header is too small"));
        }
        let size = field64(16)?;
        let isa = match field32(28)? {
            1 => Isa::Vmx,
            2 => Isa::Svm,
            other => return Err(Error::Isa(other)),
        };

        let (descriptors, descriptor_count) = (field64(72)?, field32(80)?);
        let descriptor_size = field32(84)?;
        let end = u64::from(descriptor_count)
            .checked_mul(descriptor_size.into())
            .and_then(|len| len.checked_add(descriptors))
            .filter(|end| *end <= size && descriptor_size as usize >= DESCRIPTOR_SIZE)
            .ok_or(Error::Damaged("its descriptors lie outside of it"))?;
        let known =
            part(bytes, descriptors, descriptor_count, descriptor_size).ok_or(truncated(end))?;
        let shape = Shape::read(
            known.chunks_exact(descriptor_size as usize),
            field32(100)?,
            field32(112)?,
        )?;
        let loaded = field64(32)?;
        Ok(Self {
            size,
            records: field64(88)?,
            count: field32(96)?,
            totals: field64(104)?,
            isa,
            life: match field64(120)? {
                0 => loaded,
                life => life,
            },
            loaded,
            now: field64(40)?,
            tsc_khz: Some(field32(48)?).filter(|khz| *khz != 0),
            by_bpf: field32(24)? & FLAG_BPF != 0,
            unmetered: field64(56)?,
            gone: field64(64)?,
            // Before version 1.3, other data may stand at these fields.
            tables: match header_size >= HEADER_SIZE as u32 {
                true => TablesHead::read(
                    bytes
                        .get(..HEADER_SIZE)
                        .ok_or(truncated(HEADER_SIZE as u64))?,
                    descriptor_size,
                ),
                false => None,
            },
            descriptors,
            descriptor_count,
            descriptor_size,
            shape,
        })
    }

    /// See [`Snapshot::separates_waits`].
    pub fn separates_waits(&self) -> bool {
        self.shape.waiting().is_some()
    }

    /// Return the size of a record, in bytes, from its first bytes.
    pub fn record_size(bytes: [u8; Self::RECORD_SIZE]) -> u32 {
        u32::from_le_bytes(bytes)
    }

    /// Return the vCPU of a whole record, or `None` if the record's parts lie outside of it.
    pub fn vcpu<'a>(&self, record: &'a [u8]) -> Option<VcpuRecord<'a>> {
        let (record, _) = self.shape.record(record)?;
        Some(VcpuRecord {
            record,
            shape: self.shape,
        })
    }

    /// Return the rows of the record at [`Self::totals`], and the value of
    /// [`Snapshot::departed_polled`].
    pub fn departed<'a>(
        &self,
        record: &'a [u8],
    ) -> Option<(impl Iterator<Item = Row<'a>>, Option<u64>)> {
        let (record, _) = self.shape.record(record)?;
        Some((self.shape.rows(record), self.shape.polled(record)))
    }
}

/// A snapshot whose parts all lie within its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    bytes: &'a [u8],
    descriptors: &'a [u8],
    descriptor_size: usize,
    records: &'a [u8],
    count: u32,
    totals: &'a [u8],
    tables: Option<TablesPart<'a>>,
    isa: Isa,
    shape: Shape,
}

impl<'a> Snapshot<'a> {
    /// Read the snapshot at the start of `bytes`; more bytes may follow.
    ///
    /// # Errors
    ///
    /// The reason why the bytes are no snapshot of this major version, or why its offsets and sizes
    /// do not fit together.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let found = bytes.len() as u64;
        let head = Head::parse(bytes).map_err(|error| match (error, u64_at(bytes, 16)) {
            // More than the head is missing.
            (Error::Truncated { .. }, Some(needed)) if found >= HEADER_SIZE_1_0 as u64 => {
                Error::Truncated { needed, found }
            }
            (error, _) => error,
        })?;
        let bytes = usize::try_from(head.size)
            .ok()
            .and_then(|size| bytes.get(..size))
            .ok_or(Error::Truncated {
                needed: head.size,
                found,
            })?;
        let descriptors = part(
            bytes,
            head.descriptors,
            head.descriptor_count,
            head.descriptor_size,
        )
        .ok_or(Error::Damaged("its descriptors lie outside of it"))?;
        let descriptor_size = head.descriptor_size as usize;
        let shape = head.shape;

        let from = |offset| usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
        let outside = Error::Damaged("a record lies outside of it");
        let records = from(head.records).ok_or(outside)?;
        let count = head.count;
        let mut rest = records;
        for _ in 0..count {
            rest = shape.record(rest).ok_or(outside)?.1;
        }
        let totals = from(head.totals)
            .and_then(|bytes| shape.record(bytes))
            .ok_or(outside)?
            .0;
        let tables = match head.tables {
            Some(tables) => Some(TablesPart::read(bytes, tables, count)?),
            None => None,
        };
        Ok(Self {
            bytes,
            descriptors,
            descriptor_size,
            records,
            count,
            totals,
            tables,
            isa: head.isa,
            shape,
        })
    }

    fn u32(&self, offset: usize) -> u32 {
        u32_at(self.bytes, offset).unwrap_or(0)
    }

    fn u64(&self, offset: usize) -> u64 {
        u64_at(self.bytes, offset).unwrap_or(0)
    }

    /// Return the major and minor version.
    pub fn version(&self) -> (u16, u16) {
        (MAJOR, u16_at(self.bytes, 10).unwrap_or(0))
    }

    /// Return the bytes of the snapshot alone.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Return the vendor whose exit reasons the codes are.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Return the TSC when the module was loaded. Like all TSC values of a snapshot, it is the
    /// host's TSC, continued over sleeps of the host.
    pub fn loaded(&self) -> u64 {
        self.u64(32)
    }

    /// Return the number of the meter's life, which changes when the numbers start over. Versions
    /// before 1.2 have none, so this returns the time when the module was loaded.
    pub fn life(&self) -> u64 {
        match self.u64(120) {
            0 => self.loaded(),
            life => life,
        }
    }

    /// Return true if the snapshot separates the vCPU's own sleep from waits for the host. If not,
    /// as before version 1.2, [`Phase::Halted`] has the ticks of both.
    pub fn separates_waits(&self) -> bool {
        self.shape.waiting().is_some()
    }

    /// Return the TSC when the snapshot began.
    pub fn now(&self) -> u64 {
        self.u64(40)
    }

    /// Return the TSC frequency in kHz, or `None` if the host does not know it.
    pub fn tsc_khz(&self) -> Option<u32> {
        Some(self.u32(48)).filter(|khz| *khz != 0)
    }

    /// Return true if the TSC runs at the same rate on all CPUs.
    pub fn tsc_is_stable(&self) -> bool {
        self.u32(24) & FLAG_TSC_STABLE != 0
    }

    /// Return true if guests read the sums of the host.
    pub fn host_scope(&self) -> bool {
        self.u32(24) & FLAG_HOST_SCOPE != 0
    }

    /// Return true if a BPF program kept the numbers, in nanoseconds.
    pub fn by_bpf(&self) -> bool {
        self.u32(24) & FLAG_BPF != 0
    }

    /// Return the leaf map that guests see, or `None` for a map of a later version.
    pub fn leaf_map(&self) -> Option<LeafMap> {
        LeafMap::from_number(self.u32(52))
    }

    /// Return the number of vCPUs that run, or ran, unmetered.
    pub fn unmetered(&self) -> u64 {
        self.u64(56)
    }

    /// Return the number of vCPUs that are gone and counted in [`Self::totals`].
    pub fn departed(&self) -> u64 {
        self.u64(64)
    }

    /// Return the counters of every row, including those without a name here.
    pub fn counters(&self) -> impl Iterator<Item = Counter<'a>> {
        self.descriptors
            .chunks_exact(self.descriptor_size)
            .filter_map(Counter::read)
    }

    /// Return the vCPUs.
    pub fn vcpus(&self) -> impl Iterator<Item = VcpuRecord<'a>> {
        let (shape, mut rest) = (self.shape, self.records);
        (0..self.count).map_while(move |_| {
            let (record, behind) = shape.record(rest)?;
            rest = behind;
            Some(VcpuRecord { record, shape })
        })
    }

    /// Return the time that KVM polled before it let the vCPUs sleep that are gone, in ns, by KVM's
    /// own count, or `None` if the snapshot lacks it, as before version 1.2.
    pub fn departed_polled(&self) -> Option<u64> {
        self.shape.polled(self.totals)
    }

    /// Return true if details were on. Versions before 1.3 have no details.
    pub fn has_tables(&self) -> bool {
        self.tables.is_some()
    }

    /// Return the number of vCPUs without tables for lack of memory; 0 while details are off.
    pub fn without_tables(&self) -> u32 {
        self.tables.map_or(0, |tables| tables.head.without)
    }

    /// Return the tables of the vCPUs that have some.
    pub fn tables(&self) -> impl Iterator<Item = Tables<'a>> {
        let part = self.tables;
        let mut rest = part.map_or(&[][..], |part| part.records);
        (0..part.map_or(0, |part| part.head.count)).map_while(move |_| {
            let shape = part?.shape;
            let (record, behind) = shape.record(rest)?;
            rest = behind;
            shape.read_record(record)
        })
    }

    /// Return the sums of the vCPUs that are gone.
    pub fn totals(&self) -> impl Iterator<Item = Row<'a>> {
        self.shape.rows(self.totals)
    }
}

impl Shape {
    fn read<'a>(
        descriptors: impl Iterator<Item = &'a [u8]> + Clone,
        head: u32,
        row: u32,
    ) -> Result<Self, Error> {
        let (head, row) = (head as usize, row as usize);
        if head < HEAD_SIZE_1_0 || row < ROW_HEAD_SIZE {
            return Err(Error::Damaged("its records or rows are too small"));
        }
        let counters = descriptors.filter_map(Counter::read);
        for counter in counters.clone() {
            let end = counter.len.checked_mul(8);
            let end = end.and_then(|len| len.checked_add(counter.offset));
            if end.is_none_or(|end| end > row) {
                return Err(Error::Damaged("a counter lies outside of its row"));
            }
        }
        let mut shape = Self {
            head,
            row,
            counters: [None; COUNTERS.len()],
            cycles: [None; Phase::COUNT],
        };
        let [of_1_0, ..] = COUNTERS_BY_MINOR;
        let offsets = shape.counters.iter_mut().zip(COUNTERS);
        for (place, (offset, (name, unit, kind, len))) in offsets.enumerate() {
            let mut counters = counters.clone();
            let found = counters.find(|counter| counter.name == name && counter.len == len);
            let is_ours = |counter: &Counter<'_>| {
                (counter.unit, counter.kind) == (Unit::read(unit), Kind::read(kind))
            };
            let found = match place < of_1_0 {
                true => Some(found.ok_or(Error::Counter(name))?),
                // An earlier version lacks it, and a later one may define it otherwise.
                false => found.filter(is_ours),
            };
            *offset = found.map(|counter| counter.offset);
        }
        let sleeps = [Phase::Halted, Phase::Waiting].map(|phase| shape.offset(phase.name()));
        let separates_waits = sleeps.iter().all(Option::is_some);
        shape.cycles = Phase::ALL.map(|phase| match phase {
            Phase::Halted if !separates_waits => shape.offset(BLOCKED),
            Phase::Waiting if !separates_waits => None,
            phase => shape.offset(phase.name()),
        });
        Ok(shape)
    }

    /// Return the offset of a counter in a row, by its name in [`COUNTERS`].
    fn offset(&self, name: &str) -> Option<usize> {
        let place = COUNTERS.iter().position(|(its, ..)| *its == name)?;
        self.counters.get(place).copied().flatten()
    }

    /// Return the offset of the waiting ticks in a row.
    fn waiting(&self) -> Option<usize> {
        self.cycles.get(Phase::Waiting as usize).copied().flatten()
    }

    /// Return the time that KVM polled, from the head of a record.
    fn polled(&self, record: &[u8]) -> Option<u64> {
        u64_at(record, HEAD_SIZE_1_0).filter(|_| self.head >= HEAD_SIZE)
    }

    /// Split `bytes` into their first record and the rest.
    fn record<'a>(&self, bytes: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let (record, rest) = bytes.split_at_checked(u32_at(bytes, 0)? as usize)?;
        let rows = (u32_at(record, 4)? as usize).checked_mul(self.row)?;
        (rows <= record.len().checked_sub(self.head)?).then_some((record, rest))
    }

    /// Return the rows of a record.
    fn rows<'a>(self, record: &'a [u8]) -> impl Iterator<Item = Row<'a>> {
        let count = u32_at(record, 4).unwrap_or(0) as usize;
        record
            .get(self.head..)
            .unwrap_or_default()
            .chunks_exact(self.row)
            .take(count)
            .filter_map(move |bytes| {
                let reason = reason(u32_at(bytes, 0)?, u32_at(bytes, 4)?)?;
                Some(Row {
                    bytes,
                    reason,
                    shape: self,
                })
            })
    }
}

/// Record of a vCPU.
#[derive(Clone, Copy, Debug)]
pub struct VcpuRecord<'a> {
    record: &'a [u8],
    shape: Shape,
}

impl<'a> VcpuRecord<'a> {
    fn u32(&self, offset: usize) -> u32 {
        u32_at(self.record, offset).unwrap_or(0)
    }

    fn u64(&self, offset: usize) -> u64 {
        u64_at(self.record, offset).unwrap_or(0)
    }

    /// Return the number of the VM, unique while the module is loaded.
    pub fn vm(&self) -> u64 {
        self.u64(8)
    }

    /// Return KVM's name of the VM, such as `kvm-1234`.
    pub fn name(&self) -> &'a str {
        name_at(self.record, 56)
    }

    /// Return the thread that created the VM (`kvm->userspace_pid`): for most VMMs, their process.
    pub fn pid(&self) -> u32 {
        self.u32(16)
    }

    /// Return the vCPU's id in its VM.
    pub fn id(&self) -> u32 {
        self.u32(20)
    }

    /// Return the TSC at its first event.
    pub fn first(&self) -> u64 {
        self.u64(24)
    }

    /// Return the TSC at its latest transition.
    pub fn last(&self) -> u64 {
        self.u64(32)
    }

    /// Return the phase since then, or `None` for a phase of a later version.
    pub fn phase(&self) -> Option<Phase> {
        match (self.u32(40), self.u32(52)) {
            (0, _) => Some(Phase::Guest),
            (1, _) => Some(Phase::Kernel),
            (2, _) => Some(Phase::User),
            (3, 0) => Some(Phase::Halted),
            (3, 1) => Some(Phase::Waiting),
            (4, _) => Some(Phase::Preempted),
            _ => None,
        }
    }

    /// Return the time that KVM polled before it let the vCPU sleep, in ns, since the meter first
    /// saw the vCPU, by KVM's own count, or `None` if the snapshot lacks it, as before version 1.2.
    pub fn polled(&self) -> Option<u64> {
        self.shape.polled(self.record)
    }

    /// Return the reason of its latest exit, or `None` for a kind of a later version.
    pub fn latest(&self) -> Option<Reason> {
        reason(self.u32(44), self.u32(48))
    }

    /// Return the rows that are not empty.
    pub fn rows(&self) -> impl Iterator<Item = Row<'a>> {
        self.shape.rows(self.record)
    }

    /// Return true if the ticks of all rows sum to the time from the first event to the latest
    /// transition.
    pub fn balances(&self) -> bool {
        let mut sum = 0_u64;
        for row in self.rows() {
            for phase in Phase::ALL {
                sum = sum.wrapping_add(row.cycles(phase));
            }
        }
        sum == self.last().wrapping_sub(self.first())
    }
}

/// Numbers of one reason.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    bytes: &'a [u8],
    reason: Reason,
    shape: Shape,
}

impl<'a> Row<'a> {
    /// Return the reason that the numbers are booked on.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Return the number of VM exits.
    pub fn exits(&self) -> u64 {
        self.number(EXITS).unwrap_or(0)
    }

    /// Return a counter of one value by its name, such as [`NESTED_EXITS`], or `None` if the
    /// snapshot lacks it.
    pub fn number(&self, name: &str) -> Option<u64> {
        u64_at(self.bytes, self.shape.offset(name)?)
    }

    /// Return the number of exits from a nested guest, an L2, or `None` if the snapshot lacks it,
    /// as version 1.0 does.
    pub fn nested_exits(&self) -> Option<u64> {
        self.number(NESTED_EXITS)
    }

    /// Return the TSC ticks spent in a phase. If the snapshot does not separate the two kinds of
    /// sleep ([`Snapshot::separates_waits`]), all of them count as [`Phase::Halted`].
    pub fn cycles(&self, phase: Phase) -> u64 {
        let offset = self.shape.cycles.get(phase as usize).copied().flatten();
        offset
            .and_then(|offset| u64_at(self.bytes, offset))
            .unwrap_or(0)
    }

    /// Return the most ticks that one exit spent in the kernel phase up to its entry, or `None` if
    /// the snapshot lacks it, as version 1.0 does.
    pub fn max(&self) -> Option<u64> {
        self.number(KERNEL_MAX)
    }

    /// Return the histogram of the ticks that exits spent in the kernel phase up to their entry, or
    /// `None` if the snapshot lacks it or has other buckets.
    pub fn histogram(&self) -> Option<Buckets> {
        let offset = self.shape.offset(KERNEL_HISTOGRAM)?;
        let samples = self.bytes.get(offset..)?.chunks_exact(8);
        let mut buckets = EMPTY;
        for (to, from) in buckets.iter_mut().zip(samples) {
            *to = u64_at(from, 0)?;
        }
        Some(buckets)
    }

    /// Return the numbers of a counter of the same snapshot.
    pub fn numbers(&self, counter: &Counter<'_>) -> impl Iterator<Item = u64> + 'a {
        let numbers = self.bytes.get(counter.offset..).unwrap_or_default();
        numbers
            .chunks_exact(8)
            .take(counter.len)
            .filter_map(|number| u64_at(number, 0))
    }
}

/// Offsets of the columns of one kind of table in its entries.
#[derive(Clone, Copy, Debug, Default)]
struct Columns {
    exits: Option<usize>,
    kernel: Option<usize>,
    user: Option<usize>,
    exits_missed: Option<usize>,
    kernel_missed: Option<usize>,
    user_missed: Option<usize>,
}

/// Number of the kinds of tables known here, without those of single exits.
const TABLES: usize = TABLE_USER as usize;

/// Offsets of the columns of single exits in an entry, in the order of [`SLOW_COLUMNS`].
type SlowColumns = [Option<usize>; SLOW_COLUMNS.len()];

/// Columns of single exits.
const SLOW_COLUMNS: [(&str, Unit); 13] = [
    (SEQUENCE, Unit::Number),
    (TIME, Unit::Time),
    (RIP, Unit::Address),
    (CPU_EXIT, Unit::Number),
    (CPU_ENTRY, Unit::Number),
    (SCHEDULED_OUT, Unit::Events),
    (USER_EXIT, Unit::Number),
    (WINDOW, Unit::Number),
    (Phase::Kernel.name(), Unit::Ticks),
    (Phase::User.name(), Unit::Ticks),
    (Phase::Halted.name(), Unit::Ticks),
    (Phase::Waiting.name(), Unit::Ticks),
    (Phase::Preempted.name(), Unit::Ticks),
];

/// Return the index of a table of single exits among such tables.
fn slow_table(table: u32) -> Option<usize> {
    match table {
        TABLE_SLOWEST => Some(0),
        TABLE_RING => Some(1),
        _ => None,
    }
}

/// Offsets of a snapshot's tables, for programs that read one record at a time.
///
/// The descriptors of the columns come first, then one record for each vCPU that has tables.
#[derive(Clone, Copy, Debug)]
pub struct TablesHead {
    /// Offset of the descriptors.
    pub descriptors: u64,
    /// Size of all descriptors, in bytes.
    pub descriptors_size: u64,
    /// Offset of the first record.
    pub records: u64,
    /// Number of records.
    pub count: u32,
    /// Number of vCPUs without tables for lack of memory.
    pub without: u32,
    descriptor_size: u32,
    head_size: u32,
}

impl TablesHead {
    /// Read the offsets from a snapshot's header, or return `None` if there are no tables.
    fn read(header: &[u8], descriptor_size: u32) -> Option<Self> {
        let descriptors = u64_at(header, 128).filter(|offset| *offset != 0)?;
        let count = u32_at(header, 136)?;
        Some(Self {
            descriptors,
            // The factors have 32 bits each.
            descriptors_size: u64::from(count).saturating_mul(descriptor_size.into()),
            records: u64_at(header, 144)?,
            count: u32_at(header, 152)?,
            without: u32_at(header, 140)?,
            descriptor_size,
            head_size: u32_at(header, 156)?,
        })
    }

    /// Read the descriptors of the columns.
    ///
    /// # Errors
    ///
    /// An error if the snapshot is damaged.
    pub fn shape(&self, descriptors: &[u8]) -> Result<TablesShape, Error> {
        let mut shape = TablesShape {
            head_size: self.head_size as usize,
            columns: [Columns::default(); TABLES],
            slow: [SlowColumns::default(); 2],
        };
        if shape.head_size < TABLES_HEAD_SIZE {
            return Err(OUTSIDE_TABLES);
        }
        for descriptor in descriptors.chunks_exact(self.descriptor_size as usize) {
            let table = descriptor.get(7).map_or(0, |table| usize::from(*table));
            let Some(counter) = Counter::read(descriptor) else {
                continue;
            };
            if let Some(columns) = shape.columns.get_mut(table.wrapping_sub(1)) {
                columns.take(&counter);
            }
            let slow = slow_table(table as u32).and_then(|index| shape.slow.get_mut(index));
            for (to, column) in slow.into_iter().flatten().zip(SLOW_COLUMNS) {
                let is_it = (counter.name, counter.unit) == column;
                if is_it && counter.kind == Kind::PerExit && counter.len == 1 {
                    *to = Some(counter.offset);
                }
            }
        }
        Ok(shape)
    }
}

const OUTSIDE_TABLES: Error = Error::Damaged("a record of tables lies outside of it");

/// Offsets of the columns of tables in their entries.
#[derive(Clone, Copy, Debug)]
pub struct TablesShape {
    head_size: usize,
    /// By kind of table, from kind 1 on.
    columns: [Columns; TABLES],
    /// For the slowest exits, and for the ring.
    slow: [SlowColumns; 2],
}

/// Tables of a snapshot.
#[derive(Clone, Copy, Debug)]
struct TablesPart<'a> {
    head: TablesHead,
    records: &'a [u8],
    shape: TablesShape,
}

impl<'a> TablesPart<'a> {
    fn read(bytes: &'a [u8], head: TablesHead, vcpus: u32) -> Result<Self, Error> {
        let from = |offset| usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
        let size = usize::try_from(head.descriptors_size).ok();
        let descriptors = from(head.descriptors).and_then(|bytes| bytes.get(..size?));
        let shape = head.shape(descriptors.ok_or(Error::Damaged(
            "the descriptors of its tables lie outside of it",
        ))?)?;
        let records = from(head.records).ok_or(OUTSIDE_TABLES)?;
        let mut rest = records;
        for _ in 0..head.count {
            let (record, behind) = shape.record(rest).ok_or(OUTSIDE_TABLES)?;
            rest = behind;
            shape.check(record, vcpus)?;
        }
        Ok(Self {
            head,
            records,
            shape,
        })
    }
}

impl TablesShape {
    /// Return the tables of a whole record, in a snapshot of `vcpus` vCPUs.
    ///
    /// # Errors
    ///
    /// An error if the record is damaged.
    pub fn tables<'a>(&self, record: &'a [u8], vcpus: u32) -> Result<Tables<'a>, Error> {
        let (record, _) = self.record(record).ok_or(OUTSIDE_TABLES)?;
        self.check(record, vcpus)?;
        self.read_record(record).ok_or(OUTSIDE_TABLES)
    }

    /// Check that all parts of a record lie within it, and that its vCPU is in the snapshot.
    fn check(&self, record: &[u8], vcpus: u32) -> Result<(), Error> {
        if u32_at(record, 4).is_none_or(|vcpu| vcpu >= vcpus) {
            return Err(Error::Damaged(
                "its tables are of a vCPU that it does not have",
            ));
        }
        let mut sections = record.get(self.head_size..).ok_or(OUTSIDE_TABLES)?;
        for _ in 0..u32_at(record, 16).unwrap_or(0) {
            sections = self.section(sections).ok_or(OUTSIDE_TABLES)?.1;
        }
        Ok(())
    }

    /// Read the head of a record.
    fn read_record<'a>(self, record: &'a [u8]) -> Option<Tables<'a>> {
        let flags = u32_at(record, 20)?;
        Some(Tables {
            vcpu: u32_at(record, 4)? as usize,
            since: u64_at(record, 8)?,
            no_rip: flags & FLAG_NO_RIP != 0,
            is_frozen: flags & FLAG_FROZEN != 0,
            window_begun: u64_at(record, 24).filter(|begun| *begun != 0),
            record,
            shape: self,
        })
    }

    /// Split `bytes` into their first record and the rest.
    fn record<'a>(&self, bytes: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let size = u32_at(bytes, 0)? as usize;
        if size < self.head_size {
            return None;
        }
        bytes.split_at_checked(size)
    }

    /// Split `bytes` into their first section and the rest.
    fn section<'a>(&self, bytes: &'a [u8]) -> Option<(Section<'a>, &'a [u8])> {
        let (section, rest) = bytes.split_at_checked(u32_at(bytes, 4)? as usize)?;
        let size = u32_at(section, 8)?;
        if (size as usize) < ENTRY_HEAD_SIZE {
            return None;
        }
        let table = u32_at(section, 0)?;
        let entries = part(
            section,
            SECTION_HEAD_SIZE as u64,
            u32_at(section, 12)?,
            size,
        )?;
        let columns = self.columns.get((table as usize).wrapping_sub(1)).copied();
        let slow = slow_table(table)
            .and_then(|index| self.slow.get(index))
            .copied();
        if columns.is_some_and(|columns| !columns.fit(size as usize))
            || !all_fit(slow.into_iter().flatten(), size as usize)
        {
            return None;
        }
        let section = Section {
            table,
            entries,
            size: size as usize,
            columns,
            slow,
        };
        Some((section, rest))
    }
}

impl Columns {
    /// Store a column's offset, if its name is known here.
    fn take(&mut self, column: &Counter<'_>) {
        let (to, unit, kind) = match column.name {
            EXITS => (&mut self.exits, Unit::Events, Kind::Sum),
            "kernel" => (&mut self.kernel, Unit::Ticks, Kind::Sum),
            "user" => (&mut self.user, Unit::Ticks, Kind::Sum),
            EXITS_MISSED => (&mut self.exits_missed, Unit::Events, Kind::Bound),
            KERNEL_MISSED => (&mut self.kernel_missed, Unit::Ticks, Kind::Bound),
            USER_MISSED => (&mut self.user_missed, Unit::Ticks, Kind::Bound),
            _ => return,
        };
        if (column.unit, column.kind, column.len) == (unit, kind, 1) {
            *to = Some(column.offset);
        }
    }

    /// Return true if all columns lie within an entry of `size` bytes.
    fn fit(&self, size: usize) -> bool {
        let all = [
            self.exits,
            self.kernel,
            self.user,
            self.exits_missed,
            self.kernel_missed,
            self.user_missed,
        ];
        all_fit(all.into_iter(), size)
    }
}

/// Return true if all columns lie within an entry of `size` bytes.
fn all_fit(offsets: impl Iterator<Item = Option<usize>>, size: usize) -> bool {
    offsets
        .flatten()
        .all(|offset| offset.checked_add(8).is_some_and(|end| end <= size))
}

/// One table of a vCPU.
#[derive(Clone, Copy, Debug)]
struct Section<'a> {
    table: u32,
    entries: &'a [u8],
    size: usize,
    /// Offsets of the columns; `None` for a table of single exits, or a kind of a later version.
    columns: Option<Columns>,
    /// Offsets of the columns of single exits; `None` for all other tables.
    slow: Option<SlowColumns>,
}

/// The tables of a vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Index of the vCPU, in the order of [`Snapshot::vcpus`].
    pub vcpu: usize,
    /// TSC when the tables began.
    pub since: u64,
    /// Set if the guest's RIP cannot be read, because its registers are encrypted.
    pub no_rip: bool,
    /// Set if the ring is frozen.
    pub is_frozen: bool,
    /// TSC when the current window of the slowest exits began, if there is one.
    pub window_begun: Option<u64>,
    record: &'a [u8],
    shape: TablesShape,
}

/// Upper bounds for what an entry lacks and the others hold; all 0 for an exact entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Missed {
    /// Exits.
    pub exits: u64,
    /// Kernel ticks.
    pub kernel: u64,
    /// User ticks.
    pub user: u64,
}

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRow {
    /// Kind of table, such as [`TABLE_DETAILS`](crate::snapshot::TABLE_DETAILS).
    pub table: u32,
    /// Reason that its ticks and exits are booked on.
    pub reason: Reason,
    /// For details: kind of the key, a number of [`detail::Kind`](crate::detail::Kind).
    pub detail_kind: u8,
    /// Set if the exits came from a nested guest, an L2.
    pub nested: bool,
    /// Set if this is the entry of the reason's others, which has no key.
    pub others: bool,
    /// The detail, the RIP, or KVM_EXIT_* of kvm_run.
    pub key: u64,
    /// Exits; in a table of exits to user space, only those.
    pub exits: u64,
    /// Kernel ticks, if the table has them.
    pub kernel: Option<u64>,
    /// User ticks, if the table has them.
    pub user: Option<u64>,
    /// Upper bounds for exits and ticks of the same key among the others.
    pub missed: Missed,
}

/// One exit of the slowest or of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowExit {
    /// [`TABLE_SLOWEST`] or [`TABLE_RING`].
    pub table: u32,
    /// Exit reason.
    pub reason: Reason,
    /// Kind of the detail: a number of [`detail::Kind`](crate::detail::Kind).
    pub detail_kind: u8,
    /// The detail.
    pub detail: u64,
    /// Set if the exit came from a nested guest, an L2.
    pub nested: bool,
    /// Set if the ring froze for this exit.
    pub is_culprit: bool,
    /// For the slowest exits: set if it belongs to the window before the current one.
    pub is_previous: bool,
    /// Number of the exit on its vCPU.
    pub sequence: u64,
    /// TSC at the exit.
    pub time: u64,
    /// Guest RIP, if it is known and shown.
    pub rip: Option<u64>,
    /// Host CPU at the exit and at the entry after it, where known.
    pub cpus: [Option<u64>; 2],
    /// Times that the scheduler took the vCPU off its CPU.
    pub scheduled_out: u64,
    /// KVM_EXIT_* if the exit went to user space.
    pub user_exit: Option<u64>,
    ticks: [u64; Phase::COUNT],
}

impl SlowExit {
    /// Return its ticks in a phase, up to the entry after it; 0 in the guest phase.
    pub fn ticks(&self, phase: Phase) -> u64 {
        self.ticks.get(phase as usize).copied().unwrap_or(0)
    }

    /// Return its length in ticks: all ticks but those of the guest's own sleep.
    pub fn length(&self) -> u64 {
        Phase::ALL
            .into_iter()
            .filter(|phase| *phase != Phase::Halted)
            .fold(0, |sum, phase| sum.saturating_add(self.ticks(phase)))
    }

    fn read(table: u32, bytes: &[u8], columns: &SlowColumns) -> Option<Self> {
        let number = |name| {
            let place = SLOW_COLUMNS.iter().position(|(its, _)| *its == name)?;
            u64_at(bytes, columns.get(place).copied().flatten()?)
        };
        let known = |name| number(name).filter(|number| *number != u64::MAX);
        let flags = *bytes.get(9)?;
        let mut ticks = [0; Phase::COUNT];
        for (phase, to) in Phase::ALL.into_iter().zip(&mut ticks) {
            *to = number(phase.name()).unwrap_or(0);
        }
        Some(Self {
            table,
            reason: reason(u32_at(bytes, 0)?, u32_at(bytes, 4)?)?,
            detail_kind: *bytes.get(8)?,
            detail: u64_at(bytes, 16)?,
            nested: flags & FLAG_NESTED != 0,
            is_culprit: flags & FLAG_CULPRIT != 0,
            is_previous: number(WINDOW) == Some(1),
            sequence: number(SEQUENCE).unwrap_or(0),
            time: number(TIME).unwrap_or(0),
            rip: number(RIP).filter(|_| flags & FLAG_NO_ENTRY_RIP == 0),
            cpus: [known(CPU_EXIT), known(CPU_ENTRY)],
            scheduled_out: number(SCHEDULED_OUT).unwrap_or(0),
            user_exit: known(USER_EXIT),
            ticks,
        })
    }
}

impl<'a> Tables<'a> {
    /// Return the slowest exits, unordered, then those of the ring in order of time. Skips reasons
    /// of a later version.
    pub fn slow(&self) -> impl Iterator<Item = SlowExit> + 'a {
        self.sections().flat_map(|section| {
            let entries = section.entries.chunks_exact(section.size);
            entries.filter_map(move |bytes| {
                SlowExit::read(section.table, bytes, section.slow.as_ref()?)
            })
        })
    }

    fn sections(&self) -> impl Iterator<Item = Section<'a>> {
        let shape = self.shape;
        let mut rest = self.record.get(shape.head_size..).unwrap_or_default();
        (0..u32_at(self.record, 16).unwrap_or(0)).map_while(move |_| {
            let (section, behind) = shape.section(rest)?;
            rest = behind;
            Some(section)
        })
    }

    /// Return true if the record has slow exits.
    pub fn has_slow(&self) -> bool {
        self.has(TABLE_SLOWEST)
    }

    /// Return true if the record has a kind of table. The table of code is absent for readers
    /// without permission.
    pub fn has(&self, table: u32) -> bool {
        self.sections().any(|section| section.table == table)
    }

    /// Return the entries of all tables, one table after another. Entries of one reason are
    /// adjacent, with its others last. Skips tables and reasons of a later version.
    pub fn entries(&self) -> impl Iterator<Item = TableRow> + 'a {
        self.sections().flat_map(|section| {
            let columns = section.columns;
            let entries = section.entries.chunks_exact(section.size);
            entries.filter_map(move |bytes| {
                let columns = columns?;
                let number = |offset: Option<usize>| u64_at(bytes, offset?);
                let flags = *bytes.get(9)?;
                Some(TableRow {
                    table: section.table,
                    reason: reason(u32_at(bytes, 0)?, u32_at(bytes, 4)?)?,
                    detail_kind: *bytes.get(8)?,
                    nested: flags & FLAG_NESTED != 0,
                    others: flags & FLAG_OTHERS != 0,
                    key: u64_at(bytes, 16)?,
                    exits: number(columns.exits).unwrap_or(0),
                    kernel: number(columns.kernel),
                    user: number(columns.user),
                    missed: Missed {
                        exits: number(columns.exits_missed).unwrap_or(0),
                        kernel: number(columns.kernel_missed).unwrap_or(0),
                        user: number(columns.user_missed).unwrap_or(0),
                    },
                })
            })
        })
    }
}
