// SPDX-License-Identifier: GPL-2.0

//! Reads the snapshot of `/dev/exitmeter` that [`crate::snapshot`] lays out.
//!
//! Only the tools use this, so the module does not compile it. It copies nothing: all that
//! it gives borrows from the snapshot's bytes. [`Snapshot::parse`] checks every offset
//! once, and what comes after it cannot fail.
//!
//! A snapshot of a later minor version reads as one of this: larger headers, records and
//! rows, counters and kinds of rows that have no name here, all are stepped over.
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
    histogram::{Buckets, BUCKETS, EMPTY, FIRST_POWER, PARTS_POWER},
    leaves::LeafMap,
    phase::Phase,
    reasons::Isa,
    snapshot::{
        Reason, BLOCKED, CPU_ENTRY, CPU_EXIT, DESCRIPTOR_SIZE, ENTRY_HEAD_SIZE, EXITS,
        EXITS_MISSED, FLAG_BPF, FLAG_CULPRIT, FLAG_FROZEN, FLAG_HOST_SCOPE, FLAG_NESTED,
        FLAG_NO_ENTRY_RIP, FLAG_NO_RIP, FLAG_OTHERS, FLAG_TSC_STABLE, HEADER_SIZE, HEAD_SIZE,
        KERNEL_HISTOGRAM, KERNEL_MAX, KERNEL_MISSED, KIND_BOUND, KIND_HISTOGRAM, KIND_MAXIMUM,
        KIND_ONE, KIND_SUM, MAGIC, MAJOR, NAME_SIZE, NESTED_EXITS, RIP, ROW_HEAD_SIZE,
        SCHEDULED_OUT, SECTION_HEAD_SIZE, SEQUENCE, TABLES_HEAD_SIZE, TABLE_RING, TABLE_SLOWEST,
        TABLE_USER, TIME, UNIT_ADDRESS, UNIT_EVENTS, UNIT_NUMBER, UNIT_TICKS, UNIT_TIME, USER_EXIT,
        USER_MISSED, WINDOW,
    },
};

/// Bytes of the header before version 1.3: less there cannot be.
const HEADER_SIZE_1_0: usize = 128;

/// Bytes of a record before its rows in version 1.0: less there cannot be.
const HEAD_SIZE_1_0: usize = 104;

/// Why bytes are not a snapshot that this reader understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// It ends before it should.
    Truncated {
        /// Bytes that there should be.
        needed: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// It does not begin as a snapshot does.
    Magic,
    /// Its layout is another one.
    Version {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// Its reasons are of an unknown ISA.
    Isa(u32),
    /// A part of it does not lie where it may.
    Damaged(&'static str),
    /// It has no counter of this name.
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

/// The bytes of `count` elements of `size` bytes at an offset, if they all are there.
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

/// A name: up to the first NUL, or to what is not UTF-8.
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

/// The reason from kind and code; `None` for a kind of a later version.
fn reason(kind: u32, code: u32) -> Option<Reason> {
    match kind {
        0 => Some(Reason::Code(code)),
        1 => Some(Reason::Start),
        2 => Some(Reason::Other),
        _ => None,
    }
}

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Events, such as exits.
    Events,
    /// Ticks of the TSC.
    Ticks,
    /// A number of its own sort.
    Number,
    /// A moment, as a TSC.
    Time,
    /// An address of the guest.
    Address,
    /// One of a later version.
    Unknown(u32),
}

/// How the numbers of a counter are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One sum that only grows.
    Sum,
    /// How many samples fell between one value and the next.
    Histogram {
        /// Into how many parts each power of two is divided, as a power of two.
        parts_power: u32,
        /// The power of two that the first bucket is of.
        first_power: u32,
    },
    /// The greatest of its samples.
    Maximum,
    /// An upper bound of what another column lacks.
    Bound,
    /// What is told of one exit.
    One,
    /// One of a later version: its number, from 0 to 255.
    Unknown(u32),
}

impl Kind {
    /// The one histogram that [`crate::histogram`] can read.
    const HISTOGRAM: Self = Kind::Histogram {
        parts_power: PARTS_POWER,
        first_power: FIRST_POWER,
    };

    /// From the kind's number in the lowest byte, and its parameters in the next two.
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
            KIND_ONE => Kind::One,
            other => Kind::Unknown(other),
        }
    }
}

/// A counter that every row has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter<'a> {
    /// What it is called.
    pub name: &'a str,
    /// What it counts.
    pub unit: Unit,
    /// How to read it.
    pub kind: Kind,
    /// How many numbers it has.
    pub len: usize,
    offset: usize,
}

impl<'a> Counter<'a> {
    fn read(descriptor: &'a [u8]) -> Option<Self> {
        Some(Self {
            unit: match u32_at(descriptor, 0)? {
                UNIT_EVENTS => Unit::Events,
                UNIT_TICKS => Unit::Ticks,
                UNIT_NUMBER => Unit::Number,
                UNIT_TIME => Unit::Time,
                UNIT_ADDRESS => Unit::Address,
                other => Unit::Unknown(other),
            },
            kind: Kind::read(u32_at(descriptor, 4)?),
            offset: usize::try_from(u32_at(descriptor, 8)?).ok()?,
            len: usize::try_from(u32_at(descriptor, 12)?).ok()?,
            name: name_at(descriptor, 16),
        })
    }
}

/// The sizes of a snapshot's elements, and where its known counters stand in a row.
#[derive(Clone, Copy, Debug)]
struct Shape {
    head: usize,
    row: usize,
    exits: usize,
    /// By phase; `None` for one that the snapshot does not have, as versions before 1.2 do not
    /// have [`Phase::Waiting`].
    cycles: [Option<usize>; Phase::COUNT],
    max: Option<usize>,
    nested_exits: Option<usize>,
    histogram: Option<usize>,
}

/// What a snapshot begins with, up to its descriptors: for those who read it a record at a time.
///
/// A host with 1000 VMs of 8 vCPUs has a snapshot of 100 MB. A program that sums it up need not hold it. The records of
/// the vCPUs begin at [`Self::records`], one behind the other, and the totals at [`Self::totals`].
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Bytes of the whole snapshot.
    pub size: u64,
    /// The offset of the first record of a vCPU.
    pub records: u64,
    /// How many such records there are.
    pub count: u32,
    /// The offset of the record of the vCPUs that are gone.
    pub totals: u64,
    /// The ISA that the reasons are of.
    pub isa: Isa,
    /// As [`Snapshot::life`].
    pub life: u64,
    /// As [`Snapshot::loaded`].
    pub loaded: u64,
    /// As [`Snapshot::now`].
    pub now: u64,
    /// As [`Snapshot::tsc_khz`].
    pub tsc_khz: Option<u32>,
    /// As [`Snapshot::by_bpf`].
    pub by_bpf: bool,
    /// As [`Snapshot::unmetered`].
    pub unmetered: u64,
    /// As [`Snapshot::gone`].
    pub gone: u64,
    /// Where the tables are; `None` while details are off, and before version 1.3.
    pub tables: Option<TablesHead>,
    descriptors: u64,
    descriptor_count: u32,
    descriptor_size: u32,
    shape: Shape,
}

impl Head {
    /// The bytes that a record begins with, and that tell its size.
    pub const RECORD_SIZE: usize = 4;

    /// Read the head of the snapshot that `bytes` begin with.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::parse`]. [`Error::Truncated`] tells how many bytes it takes to read the head, when these are fewer.
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
            // Before version 1.3 other bytes may stand where these fields are.
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

    /// As [`Snapshot::has_waits`].
    pub fn has_waits(&self) -> bool {
        self.shape.waiting().is_some()
    }

    /// Return the size of the record that begins with these bytes, with all of them.
    pub fn record_size(bytes: [u8; Self::RECORD_SIZE]) -> u32 {
        u32::from_le_bytes(bytes)
    }

    /// Return the vCPU of a record that was read whole; `None` when the record's parts do not lie in it.
    pub fn vcpu<'a>(&self, record: &'a [u8]) -> Option<Vcpu<'a>> {
        let (record, _) = self.shape.record(record)?;
        Some(Vcpu {
            record,
            shape: self.shape,
        })
    }

    /// Return the rows of the record at [`Self::totals`], and what [`Snapshot::gone_polled`] tells.
    pub fn departed<'a>(
        &self,
        record: &'a [u8],
    ) -> Option<(impl Iterator<Item = Row<'a>>, Option<u64>)> {
        let (record, _) = self.shape.record(record)?;
        Some((self.shape.rows(record), self.shape.polled(record)))
    }
}

/// A snapshot, all of whose parts have been found inside its bytes.
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
    /// Reads the snapshot that `bytes` begin with; more may follow.
    ///
    /// # Errors
    ///
    /// Says what is wrong with bytes that are no snapshot of this major version, or whose
    /// offsets and sizes do not fit together.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let found = bytes.len() as u64;
        let head = Head::parse(bytes).map_err(|error| match (error, u64_at(bytes, 16)) {
            // It lacks more than its head.
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

    /// Its major and minor version.
    pub fn version(&self) -> (u16, u16) {
        (MAJOR, u16_at(self.bytes, 10).unwrap_or(0))
    }

    /// Its bytes, without what may follow.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Whose reasons.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// TSC when the module was loaded. Like all TSC values of a snapshot it is the host's TSC,
    /// continued over sleeps of the host.
    pub fn loaded(&self) -> u64 {
        self.u64(32)
    }

    /// The number of the meter's life: another one when the numbers have begun anew. For a
    /// snapshot that has none, as before version 1.2, the time when the module was loaded.
    pub fn life(&self) -> u64 {
        match self.u64(120) {
            0 => self.loaded(),
            life => life,
        }
    }

    /// Whether it tells sleeps of the vCPU's wish and for the host apart. When it does not, as
    /// before version 1.2, [`Phase::Halted`] has the ticks of both.
    pub fn has_waits(&self) -> bool {
        self.shape.waiting().is_some()
    }

    /// TSC when the snapshot was begun.
    pub fn now(&self) -> u64 {
        self.u64(40)
    }

    /// TSC frequency in kHz; `None` when the host does not know it.
    pub fn tsc_khz(&self) -> Option<u32> {
        Some(self.u32(48)).filter(|khz| *khz != 0)
    }

    /// Whether the TSC runs at one rate, alike on all CPUs.
    pub fn tsc_is_stable(&self) -> bool {
        self.u32(24) & FLAG_TSC_STABLE != 0
    }

    /// Whether guests read the sums of the host.
    pub fn host_scope(&self) -> bool {
        self.u32(24) & FLAG_HOST_SCOPE != 0
    }

    /// Return true if a BPF program kept the numbers, in nanoseconds.
    pub fn by_bpf(&self) -> bool {
        self.u32(24) & FLAG_BPF != 0
    }

    /// The leaves that guests see; `None` for a map of a later version.
    pub fn leaf_map(&self) -> Option<LeafMap> {
        LeafMap::from_number(self.u32(52))
    }

    /// vCPUs that run, or ran, without being metered.
    pub fn unmetered(&self) -> u64 {
        self.u64(56)
    }

    /// vCPUs that are gone and stand in [`Self::totals`].
    pub fn gone(&self) -> u64 {
        self.u64(64)
    }

    /// The counters that every row has, those without a name here too.
    pub fn counters(&self) -> impl Iterator<Item = Counter<'a>> {
        self.descriptors
            .chunks_exact(self.descriptor_size)
            .filter_map(Counter::read)
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> impl Iterator<Item = Vcpu<'a>> {
        let (shape, mut rest) = (self.shape, self.records);
        (0..self.count).map_while(move |_| {
            let (record, behind) = shape.record(rest)?;
            rest = behind;
            Some(Vcpu { record, shape })
        })
    }

    /// Nanoseconds that KVM polled before it let the vCPUs sleep that are gone, by its own count;
    /// `None` when the snapshot does not have it, as before version 1.2.
    pub fn gone_polled(&self) -> Option<u64> {
        self.shape.polled(self.totals)
    }

    /// Return true if details were on. A snapshot before version 1.3 has none.
    pub fn has_tables(&self) -> bool {
        self.tables.is_some()
    }

    /// How many vCPUs have no tables for want of memory; 0 while details are off.
    pub fn without_tables(&self) -> u32 {
        self.tables.map_or(0, |tables| tables.head.without)
    }

    /// The tables of those vCPUs that have some.
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

    /// The sums of the vCPUs that are gone.
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
        let find = |name, len| {
            let mut counters = counters.clone();
            counters.find(move |counter| counter.name == name && counter.len == len)
        };
        let offset_of = |name| match find(name, 1) {
            Some(counter) => Ok(counter.offset),
            None => Err(Error::Counter(name)),
        };
        // What version 1.0 does not have, and a later one may have in another way.
        let offset_if = |name, len, unit, kind| {
            find(name, len)
                .filter(|counter| counter.unit == unit && counter.kind == kind)
                .map(|counter| counter.offset)
        };
        let blocked = offset_of(BLOCKED)?;
        let of_12 = |phase: Phase| offset_if(phase.name(), 1, Unit::Ticks, Kind::Sum);
        let (halted, waiting) = match (of_12(Phase::Halted), of_12(Phase::Waiting)) {
            (Some(halted), Some(waiting)) => (halted, Some(waiting)),
            _ => (blocked, None),
        };
        let mut cycles = [None; Phase::COUNT];
        for (cycles, phase) in cycles.iter_mut().zip(Phase::ALL) {
            *cycles = match phase {
                Phase::Halted => Some(halted),
                Phase::Waiting => waiting,
                phase => Some(offset_of(phase.name())?),
            };
        }
        Ok(Self {
            head,
            row,
            exits: offset_of(EXITS)?,
            cycles,
            max: offset_if(KERNEL_MAX, 1, Unit::Ticks, Kind::Maximum),
            nested_exits: offset_if(NESTED_EXITS, 1, Unit::Events, Kind::Sum),
            histogram: offset_if(KERNEL_HISTOGRAM, BUCKETS, Unit::Ticks, Kind::HISTOGRAM),
        })
    }

    /// Where the ticks of waits stand in a row.
    fn waiting(&self) -> Option<usize> {
        self.cycles.get(Phase::Waiting as usize).copied().flatten()
    }

    /// What the head of a record says of KVM's polling.
    fn polled(&self, record: &[u8]) -> Option<u64> {
        u64_at(record, HEAD_SIZE_1_0).filter(|_| self.head >= HEAD_SIZE)
    }

    /// The record that bytes begin with, and what follows it.
    fn record<'a>(&self, bytes: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let (record, rest) = bytes.split_at_checked(u32_at(bytes, 0)? as usize)?;
        let rows = (u32_at(record, 4)? as usize).checked_mul(self.row)?;
        (rows <= record.len().checked_sub(self.head)?).then_some((record, rest))
    }

    /// The rows of a record.
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

/// A vCPU's record.
#[derive(Clone, Copy, Debug)]
pub struct Vcpu<'a> {
    record: &'a [u8],
    shape: Shape,
}

impl<'a> Vcpu<'a> {
    fn u32(&self, offset: usize) -> u32 {
        u32_at(self.record, offset).unwrap_or(0)
    }

    fn u64(&self, offset: usize) -> u64 {
        u64_at(self.record, offset).unwrap_or(0)
    }

    /// The VM's number, unique while the module is loaded.
    pub fn vm(&self) -> u64 {
        self.u64(8)
    }

    /// KVM's name of the VM, such as `kvm-1234`.
    pub fn name(&self) -> &'a str {
        name_at(self.record, 56)
    }

    /// The thread that made the VM (`kvm->userspace_pid`): for most VMMs their process.
    pub fn pid(&self) -> u32 {
        self.u32(16)
    }

    /// The vCPU's id in its VM.
    pub fn id(&self) -> u32 {
        self.u32(20)
    }

    /// TSC at its first event.
    pub fn first(&self) -> u64 {
        self.u64(24)
    }

    /// TSC at its latest transition.
    pub fn last(&self) -> u64 {
        self.u64(32)
    }

    /// The phase it has been in since then; `None` for one of a later version.
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

    /// Nanoseconds that KVM polled before it let the vCPU sleep, since the meter has known it, by
    /// KVM's own count; `None` when the snapshot does not have it, as before version 1.2.
    pub fn polled(&self) -> Option<u64> {
        self.shape.polled(self.record)
    }

    /// The reason of its latest exit; `None` for a kind of a later version.
    pub fn latest(&self) -> Option<Reason> {
        reason(self.u32(44), self.u32(48))
    }

    /// The rows that hold something.
    pub fn rows(&self) -> impl Iterator<Item = Row<'a>> {
        self.shape.rows(self.record)
    }

    /// Whether the ticks of all rows sum to the time from first event to latest
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

/// The numbers that are booked on one reason.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    bytes: &'a [u8],
    reason: Reason,
    shape: Shape,
}

impl<'a> Row<'a> {
    /// What they are booked on.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// VM exits.
    pub fn exits(&self) -> u64 {
        u64_at(self.bytes, self.shape.exits).unwrap_or(0)
    }

    /// Of the exits, those from a nested guest, an L2; `None` when the snapshot does not have
    /// them, as one of version 1.0.
    pub fn nested_exits(&self) -> Option<u64> {
        u64_at(self.bytes, self.shape.nested_exits?)
    }

    /// TSC ticks spent in a phase. When the snapshot does not tell the two sleeps apart
    /// ([`Snapshot::has_waits`]), all of them are [`Phase::Halted`].
    pub fn cycles(&self, phase: Phase) -> u64 {
        let offset = self.shape.cycles.get(phase as usize).copied().flatten();
        offset
            .and_then(|offset| u64_at(self.bytes, offset))
            .unwrap_or(0)
    }

    /// The most ticks that one exit spent in the kernel phase, up to the entry after it;
    /// `None` when the snapshot does not have it, as one of version 1.0.
    pub fn max(&self) -> Option<u64> {
        u64_at(self.bytes, self.shape.max?)
    }

    /// How many exits spent how many ticks in the kernel phase, up to the entry after them;
    /// `None` when the snapshot does not have it, or has it with other buckets.
    pub fn histogram(&self) -> Option<Buckets> {
        let samples = self.bytes.get(self.shape.histogram?..)?.chunks_exact(8);
        let mut buckets = EMPTY;
        for (to, from) in buckets.iter_mut().zip(samples) {
            *to = u64_at(from, 0)?;
        }
        Some(buckets)
    }

    /// The numbers of any counter of the same snapshot.
    pub fn numbers(&self, counter: &Counter<'_>) -> impl Iterator<Item = u64> + 'a {
        let numbers = self.bytes.get(counter.offset..).unwrap_or_default();
        numbers
            .chunks_exact(8)
            .take(counter.len)
            .filter_map(|number| u64_at(number, 0))
    }
}

/// Where the columns of one kind of table stand in its entries.
#[derive(Clone, Copy, Debug, Default)]
struct Columns {
    exits: Option<usize>,
    kernel: Option<usize>,
    user: Option<usize>,
    exits_missed: Option<usize>,
    kernel_missed: Option<usize>,
    user_missed: Option<usize>,
}

/// The kinds of tables that have a name here, but for those of single exits.
const TABLES: usize = TABLE_USER as usize;

/// Where the columns of single exits stand in an entry: in the order of [`SLOW_COLUMNS`].
type SlowColumns = [Option<usize>; SLOW_COLUMNS.len()];

/// The columns of single exits.
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

/// Return the place of a table of single exits among those.
fn slow_table(table: u32) -> Option<usize> {
    match table {
        TABLE_SLOWEST => Some(0),
        TABLE_RING => Some(1),
        _ => None,
    }
}

/// Where a snapshot has its tables, for those who read it a record at a time.
///
/// The descriptors of their columns come first, then one record for each vCPU that has tables.
#[derive(Clone, Copy, Debug)]
pub struct TablesHead {
    /// The offset of the descriptors.
    pub descriptors: u64,
    /// Bytes of all descriptors.
    pub descriptors_size: u64,
    /// The offset of the first record.
    pub records: u64,
    /// How many records there are.
    pub count: u32,
    /// How many vCPUs have no tables for want of memory.
    pub without: u32,
    descriptor_size: u32,
    head_size: u32,
}

impl TablesHead {
    /// Read it from the header of a snapshot; return `None` when there are no tables.
    fn read(header: &[u8], descriptor_size: u32) -> Option<Self> {
        let descriptors = u64_at(header, 128).filter(|offset| *offset != 0)?;
        let count = u32_at(header, 136)?;
        Some(Self {
            descriptors,
            // Two numbers of 32 bits each.
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
    /// When the snapshot is damaged.
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
            let slow = slow_table(table as u32).and_then(|which| shape.slow.get_mut(which));
            for (to, column) in slow.into_iter().flatten().zip(SLOW_COLUMNS) {
                let is_it = (counter.name, counter.unit) == column;
                if is_it && counter.kind == Kind::One && counter.len == 1 {
                    *to = Some(counter.offset);
                }
            }
        }
        Ok(shape)
    }
}

const OUTSIDE_TABLES: Error = Error::Damaged("a record of tables lies outside of it");

/// Where the columns of tables stand in their entries.
#[derive(Clone, Copy, Debug)]
pub struct TablesShape {
    head_size: usize,
    /// By kind of table, from 1.
    columns: [Columns; TABLES],
    /// Of the slowest exits, and of the ring.
    slow: [SlowColumns; 2],
}

/// The tables of a snapshot.
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
    /// Return the tables of a record that was read whole, in a snapshot of so many vCPUs.
    ///
    /// # Errors
    ///
    /// When the record is damaged.
    pub fn tables<'a>(&self, record: &'a [u8], vcpus: u32) -> Result<Tables<'a>, Error> {
        let (record, _) = self.record(record).ok_or(OUTSIDE_TABLES)?;
        self.check(record, vcpus)?;
        self.read_record(record).ok_or(OUTSIDE_TABLES)
    }

    /// Check that all parts of a record lie in it, and that its vCPU is one of the snapshot's.
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

    /// Read what a record begins with.
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

    /// The record that bytes begin with, and what follows it.
    fn record<'a>(&self, bytes: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let size = u32_at(bytes, 0)? as usize;
        if size < self.head_size {
            return None;
        }
        bytes.split_at_checked(size)
    }

    /// The section that bytes begin with, and what follows it.
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
            .and_then(|which| self.slow.get(which))
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
    /// Take a column, if it is one that has a name here.
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

    /// Return true if all of them lie within an entry of a size.
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

/// Return true if all columns lie within an entry of a size.
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
    /// `None` for a kind of table of a later version, or of single exits.
    columns: Option<Columns>,
    /// `None` for all but tables of single exits.
    slow: Option<SlowColumns>,
}

/// The tables of a vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Which vCPU, in the order of [`Snapshot::vcpus`].
    pub vcpu: usize,
    /// TSC when the tables began.
    pub since: u64,
    /// The guest's RIP cannot be read: its registers are encrypted.
    pub no_rip: bool,
    /// The ring of the last exits is frozen.
    pub is_frozen: bool,
    /// TSC when the current window of the slowest exits began, where there is one.
    pub window_begun: Option<u64>,
    record: &'a [u8],
    shape: TablesShape,
}

/// How much of a column stands among the others at most; 0 throughout for an exact entry.
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
pub struct Entry {
    /// Kind of table, such as [`TABLE_DETAILS`](crate::snapshot::TABLE_DETAILS).
    pub table: u32,
    /// What its ticks and exits are booked on.
    pub reason: Reason,
    /// What the key is, of details: a number of [`detail::Kind`](crate::detail::Kind).
    pub detail_kind: u8,
    /// The exits came from a nested guest, an L2.
    pub nested: bool,
    /// It is what the reason's other entries leave: it has no key.
    pub others: bool,
    /// The detail, the RIP, or KVM_EXIT_* of kvm_run.
    pub key: u64,
    /// Exits; in a table of exits to user space, those alone.
    pub exits: u64,
    /// Kernel ticks, where the table has them.
    pub kernel: Option<u64>,
    /// User ticks, where the table has them.
    pub user: Option<u64>,
    /// At most how much of the same key stands among the others.
    pub missed: Missed,
}

/// One exit, of the slowest or of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowExit {
    /// [`TABLE_SLOWEST`] or [`TABLE_RING`].
    pub table: u32,
    /// Its reason.
    pub reason: Reason,
    /// What the detail is: a number of [`detail::Kind`](crate::detail::Kind).
    pub detail_kind: u8,
    /// What it was about.
    pub detail: u64,
    /// It came from a nested guest, an L2.
    pub nested: bool,
    /// The ring is frozen for it.
    pub is_culprit: bool,
    /// Of the slowest: it is one of the window before the current one.
    pub is_previous: bool,
    /// Which exit of the vCPU's it was.
    pub sequence: u64,
    /// TSC at the exit.
    pub time: u64,
    /// Where the guest was, where that is known and shown.
    pub rip: Option<u64>,
    /// The host's CPU at the exit and at the entry after it, where they are known.
    pub cpus: [Option<u64>; 2],
    /// How often the scheduler took the vCPU off its CPU.
    pub scheduled_out: u64,
    /// KVM_EXIT_* when it went to user space.
    pub user_exit: Option<u64>,
    ticks: [u64; Phase::COUNT],
}

impl SlowExit {
    /// Its ticks in a phase, up to the entry after it; 0 in the guest's.
    pub fn ticks(&self, phase: Phase) -> u64 {
        self.ticks.get(phase as usize).copied().unwrap_or(0)
    }

    /// The ticks that make it slow: all but those of the guest's own sleep.
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
    /// The slowest exits, in no order, then those of the ring in the order of time. Reasons of a
    /// later version are stepped over.
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

    /// Return true if it tells of slow exits.
    pub fn has_slow(&self) -> bool {
        self.has(TABLE_SLOWEST)
    }

    /// Return true if it has a kind of table: of code, none is given to those who may not have it.
    pub fn has(&self, table: u32) -> bool {
        self.sections().any(|section| section.table == table)
    }

    /// The entries of all tables, one table after the other. Those of one reason stand together, that
    /// of its others last. Tables and reasons of a later version are stepped over.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + 'a {
        self.sections().flat_map(|section| {
            let columns = section.columns;
            let entries = section.entries.chunks_exact(section.size);
            entries.filter_map(move |bytes| {
                let columns = columns?;
                let number = |offset: Option<usize>| u64_at(bytes, offset?);
                let flags = *bytes.get(9)?;
                Some(Entry {
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
