// SPDX-License-Identifier: GPL-2.0

//! Tables of this VM's vCPUs. A vCPU answers only for its own tables, so they are read on each CPU
//! in turn.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
};

use exitmeter_guest::{
    leaf_of, Asked, Cpuid, Description, Isa, Registers, SlowExit, TableReader, TableRow,
};
use exitmeter_meter::{
    reader::Missed,
    snapshot::{Reason, TABLE_CODE, TABLE_RING, TABLE_SLOWEST, TABLE_USER},
};
use rustix::{
    fs::{memfd_create, MemfdFlags},
    thread::{sched_getaffinity, sched_setaffinity, CpuSet},
};

use super::access::{Access, NoAnswer, Querier};
use crate::why::tables::Rows;

/// List of the online CPUs.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// A reason why no tables can be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The meter is too old to have tables.
    #[error(
        "the host's meter has version {0} of its CPUID leaves, which has no details: it takes a \
         newer module there"
    )]
    Version(u32),
    /// The host keeps no details.
    #[error(
        "details are off on the host, and no guest turns them on: it takes the module's parameter \
         details=1 there, or 'exitmeter why' that runs there meanwhile"
    )]
    Off,
    /// No vCPU has tables.
    #[error("details are on, but the host has no memory for those of this VM's vCPUs")]
    NoTables,
    /// Code is told only to the guest's kernel.
    #[error("only this guest's kernel can read code, and it was not asked")]
    NoCode,
    /// The host cannot read the guest's RIP.
    #[error("the host cannot read this guest's RIP, as its registers are encrypted")]
    NoRip,
    /// The tables are not those of the earlier reading.
    #[error(
        "the host turned details off or on while the command ran: what its exits were about is not \
         known; run it again"
    )]
    Switched,
    /// The CPUs that this process may run on are unknown.
    #[error("cannot tell on which CPUs this may run: {0}")]
    Cpus(io::Error),
    /// The command's process left no reading.
    #[error("the command began without a reading of its details")]
    Lost,
}

/// Part of a reading, in the order of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    /// State of a CPU. The records that follow belong to it.
    Cpu(u32, Description),
    /// CPU without a meter.
    Unmetered(u32),
    TableRow(TableRow),
    /// Queries that were asked, by leaf.
    Asked(Asked),
}

/// Numbers in a record, when it is passed between processes.
const NUMBERS: usize = 12;

impl Record {
    fn numbers(&self) -> [u64; NUMBERS] {
        let mut numbers = [0; NUMBERS];
        let mut next = numbers.iter_mut();
        let mut put = |number: u64| {
            if let Some(place) = next.next() {
                *place = number;
            }
        };
        match *self {
            Record::Unmetered(cpu) => {
                put(1);
                put(cpu.into());
            }
            Record::Cpu(cpu, description) => {
                let Registers { eax, ebx, ecx, edx } = description.to_registers();
                for number in [2, cpu, eax, ebx, ecx, edx] {
                    put(number.into());
                }
            }
            Record::Asked(asked) => {
                put(3);
                asked.into_iter().for_each(put);
            }
            Record::TableRow(entry) => {
                let bits = u64::from(entry.nested) | u64::from(entry.others) << 1;
                let (kind, code) = match entry.reason {
                    Reason::Code(code) => (0, code),
                    Reason::Start => (1, 0),
                    Reason::Other => (2, 0),
                };
                [
                    4,
                    entry.table.into(),
                    kind << 32 | u64::from(code),
                    bits << 8 | u64::from(entry.detail_kind),
                    entry.key,
                    entry.exits,
                    entry.kernel.unwrap_or(0),
                    entry.user.unwrap_or(0),
                    entry.missed.exits,
                    entry.missed.kernel,
                    entry.missed.user,
                ]
                .into_iter()
                .for_each(put);
            }
        }
        numbers
    }

    fn from_numbers(numbers: [u64; NUMBERS]) -> Option<Self> {
        let [tag, a, b, c, d, e, f, g, h, i, j, _] = numbers;
        // Each was made from a 32-bit number.
        let short = |number: u64| number as u32;
        Some(match tag {
            1 => Record::Unmetered(short(a)),
            2 => Record::Cpu(
                short(a),
                Description::from_registers(Registers {
                    eax: short(b),
                    ebx: short(c),
                    ecx: short(d),
                    edx: short(e),
                }),
            ),
            3 => Record::Asked([a, b, c, d, e, f]),
            4 => {
                let table = short(a);
                Record::TableRow(TableRow {
                    table,
                    reason: match b >> 32 {
                        0 => Reason::Code(short(b)),
                        1 => Reason::Start,
                        _ => Reason::Other,
                    },
                    detail_kind: c as u8,
                    nested: c >> 8 & 1 != 0,
                    others: c >> 9 & 1 != 0,
                    key: d,
                    exits: e,
                    kernel: (table != TABLE_USER).then_some(f),
                    user: (table != TABLE_CODE).then_some(g),
                    missed: Missed {
                        exits: h,
                        kernel: i,
                        user: j,
                    },
                })
            }
            _ => return None,
        })
    }
}

/// A [`Cpuid`] that counts the queries to a meter, by leaf.
pub struct QueryCounter<'a> {
    cpuid: &'a mut dyn Cpuid,
    asked: Asked,
}

impl<'a> QueryCounter<'a> {
    /// Wrap `cpuid`.
    pub fn new(cpuid: &'a mut dyn Cpuid) -> Self {
        Self {
            cpuid,
            asked: Asked::default(),
        }
    }

    /// Return the number of queries, by leaf.
    pub fn asked(&self) -> Asked {
        self.asked
    }
}

impl Cpuid for QueryCounter<'_> {
    fn ask(&mut self, leaf: u32, subleaf: u32) -> Registers {
        let place = leaf.wrapping_sub(0x4fff_fff0) as usize;
        if let Some(asked) = self.asked.get_mut(place) {
            *asked = asked.wrapping_add(1);
        }
        self.cpuid.ask(leaf, subleaf)
    }
}

/// CPUs that this process may run on, each with an open way to query its meter.
#[derive(Debug)]
pub struct Cpus {
    queriers: Vec<(u32, Querier)>,
    allowed: CpuSet,
    online: usize,
}

impl Cpus {
    /// Open `access` on each CPU that this process may run on.
    ///
    /// # Errors
    ///
    /// Returns an error if this guest has no device for a CPU, or it may not be opened.
    pub fn open(access: Access) -> anyhow::Result<Self> {
        let allowed = sched_getaffinity(None).map_err(|error| Error::Cpus(error.into()))?;
        let numbers = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        let mut queriers = Vec::new();
        for cpu in numbers {
            let cpu = cpu as u32;
            queriers.push((cpu, access.open_on(cpu)?));
        }
        let online = fs::read_to_string(ONLINE).ok();
        let online = online.and_then(|text| count_cpus(&text));
        Ok(Self {
            online: online.unwrap_or(0).max(queriers.len()),
            queriers,
            allowed,
        })
    }

    /// Return the number of online CPUs, allowed or not.
    pub fn online(&self) -> usize {
        self.online
    }

    /// Run `read` on each CPU in turn, then restore the allowed CPUs. Does not allocate. Skips a
    /// CPU on which this process may not run any more.
    fn each(
        &mut self,
        mut read: impl FnMut(u32, &mut Querier) -> io::Result<()>,
    ) -> Result<(), EachError> {
        let mut done = Ok(());
        for (cpu, querier) in &mut self.queriers {
            let mut one = CpuSet::new();
            one.set(*cpu as usize);
            if sched_setaffinity(None, &one).is_err() {
                continue;
            }
            done = read(*cpu, querier).map_err(EachError::Io);
            if done.is_ok() {
                done = querier.check().map_err(EachError::NoAnswer);
            }
            if done.is_err() {
                break;
            }
        }
        let back = sched_setaffinity(None, &self.allowed);
        done.and(back.map_err(|error| EachError::Io(error.into())))
    }

    /// Read tables on each CPU, and pass each record to `take`.
    fn read(
        &mut self,
        isa: Isa,
        tables: &[u32],
        mut take: impl FnMut(&Record) -> io::Result<()>,
    ) -> Result<(), EachError> {
        self.each(|cpu, querier| {
            let mut reader = TableReader::new(querier, isa);
            let described = reader.describe();
            take(&match described {
                Some(description) => Record::Cpu(cpu, description),
                None => Record::Unmetered(cpu),
            })?;
            if described.is_some_and(|description| description.has_tables) {
                let mut taken = Ok(());
                for table in tables {
                    reader.read(*table, |entry| {
                        if taken.is_ok() {
                            taken = take(&Record::TableRow(entry));
                        }
                    });
                }
                taken?;
            }
            take(&Record::Asked(reader.asked()))
        })
    }
}

/// Error of a reading. Does not allocate.
#[derive(Debug)]
enum EachError {
    Io(io::Error),
    NoAnswer(NoAnswer),
}

impl From<EachError> for anyhow::Error {
    fn from(error: EachError) -> Self {
        match error {
            EachError::Io(error) => error.into(),
            EachError::NoAnswer(no_answer) => no_answer.into(),
        }
    }
}

/// Return the number of CPUs in a list such as `0-3,5`.
fn count_cpus(list: &str) -> Option<usize> {
    let mut count = 0_usize;
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

/// Tables of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cpu {
    description: Description,
    rows: Rows,
}

/// Tables of the vCPUs that were read.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    cpus: BTreeMap<u32, Cpu>,
    unmetered: usize,
    /// Queries that the reader asked, by leaf.
    asked: Asked,
    online: usize,
}

impl Reading {
    /// Read the tables.
    ///
    /// # Errors
    ///
    /// Returns an error if they cannot be queried.
    pub fn now(cpus: &mut Cpus, isa: Isa, tables: &[u32]) -> anyhow::Result<Self> {
        let mut records = Vec::new();
        cpus.read(isa, tables, |record| {
            records.push(*record);
            Ok(())
        })?;
        Ok(Self::of(cpus.online, records))
    }

    fn of(online: usize, records: impl IntoIterator<Item = Record>) -> Self {
        let mut new = Self {
            online,
            ..Self::default()
        };
        let mut entries: BTreeMap<u32, Vec<TableRow>> = BTreeMap::new();
        let mut at = None;
        for record in records {
            match record {
                Record::Unmetered(_) => new.unmetered += 1,
                Record::Cpu(cpu, description) => {
                    at = Some(cpu);
                    let rows = Rows::default();
                    new.cpus.insert(cpu, Cpu { description, rows });
                }
                Record::TableRow(entry) => {
                    if let Some(cpu) = at {
                        entries.entry(cpu).or_default().push(entry);
                    }
                }
                Record::Asked(asked) => new.add_asked(asked),
            }
        }
        for (number, entries) in entries {
            if let Some(cpu) = new.cpus.get_mut(&number) {
                cpu.rows = Rows::new(entries);
            }
        }
        new
    }

    /// Add queries that were asked besides. They are in the rows of a later reading.
    pub fn add_asked(&mut self, asked: Asked) {
        for (sum, asked) in self.asked.iter_mut().zip(asked) {
            *sum = sum.saturating_add(asked);
        }
    }

    fn described(&self) -> impl Iterator<Item = &Description> {
        self.cpus.values().map(|cpu| &cpu.description)
    }

    /// Check that there are tables.
    ///
    /// # Errors
    ///
    /// Returns an error if details are off, or the host has no memory for them.
    pub fn check(&self) -> Result<(), Error> {
        if !self.described().any(|description| description.is_on) {
            return Err(Error::Off);
        }
        match self.vcpus() {
            0 => Err(Error::NoTables),
            _ => Ok(()),
        }
    }

    /// Check that code can be shown.
    ///
    /// # Errors
    ///
    /// Returns an error if the meter does not tell it.
    pub fn check_code(&self) -> Result<(), Error> {
        if !self.described().any(|description| description.tells_code) {
            return Err(Error::NoCode);
        }
        match self.described().all(|description| description.lacks_rip) {
            true => Err(Error::NoRip),
            false => Ok(()),
        }
    }

    /// Return the number of vCPUs whose tables were read.
    pub fn vcpus(&self) -> usize {
        let with_tables = self
            .described()
            .filter(|description| description.has_tables);
        with_tables.count()
    }

    /// Return the number of vCPUs that were not read, because this process may not run on them.
    pub fn unread(&self) -> usize {
        let read = self.cpus.len() + self.unmetered;
        self.online.saturating_sub(read)
    }

    /// Return the number of vCPUs that were read but have no tables.
    pub fn without_tables(&self) -> usize {
        (self.cpus.len() + self.unmetered).saturating_sub(self.vcpus())
    }

    /// Return the age of the oldest tables, in ticks.
    pub fn age(&self) -> u64 {
        self.described()
            .map(|description| description.age)
            .max()
            .unwrap_or(0)
    }

    /// Return the number of queries.
    pub fn queries(&self) -> u64 {
        self.asked.iter().sum()
    }

    /// Return the sums over all vCPUs.
    pub fn rows(&self) -> Rows {
        Rows::sum(self.cpus.values().map(|cpu| &cpu.rows))
    }

    /// Return the increase since an earlier reading, without the queries of that reading. The
    /// queries of this reading are in no row yet.
    ///
    /// # Errors
    ///
    /// Returns an error if the tables are not those of the earlier reading.
    pub fn since(&self, earlier: &Self, isa: Isa) -> Result<Self, Error> {
        let mut new = self.clone();
        new.cpus.clear();
        for (number, cpu) in &self.cpus {
            // The start of a CPU that came online meanwhile is unknown.
            let Some(old) = earlier.cpus.get(number) else {
                continue;
            };
            if old.description.switches != cpu.description.switches {
                return Err(Error::Switched);
            }
            let rows = match old.description.has_tables {
                true => cpu.rows.since(&old.rows),
                false => cpu.rows.clone(),
            };
            let description = cpu.description;
            new.cpus.insert(*number, Cpu { description, rows });
        }
        // For the sums it does not matter which vCPU asked.
        let mut own = earlier.asked;
        for cpu in new.cpus.values_mut() {
            subtract_own(&mut cpu.rows, isa, &mut own);
        }
        Ok(new)
    }
}

/// Subtract the tool's own queries from the rows, as far as the rows have them. The rest stays in
/// `own`.
fn subtract_own(rows: &mut Rows, isa: Isa, own: &mut Asked) {
    rows.by_key.retain(|key, row| {
        let leaf = leaf_of(isa, key.reason.to_reason(), key.detail_kind, key.key);
        let Some(own) = leaf.and_then(|leaf| own.get_mut(leaf)) else {
            return true;
        };
        let taken = row.numbers.exits.min(*own);
        *own -= taken;
        let left = row.numbers.exits - taken;
        let part = row.numbers.kernel.saturating_mul(left.into());
        row.numbers.kernel = part.checked_div(row.numbers.exits.into()).unwrap_or(0);
        row.numbers.exits = left;
        left != 0
    });
}

/// File in memory to which a process writes its reading before it becomes a command. Writing does
/// not allocate.
#[derive(Debug)]
pub struct ReadingFile(File);

impl ReadingFile {
    /// Create the file.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no memory.
    pub fn new() -> io::Result<Self> {
        let file = memfd_create(c"exitmeter", MemfdFlags::CLOEXEC)?;
        Ok(Self(file.into()))
    }

    /// Duplicate the handle, for another process.
    ///
    /// # Errors
    ///
    /// Returns an error if no file descriptor is left.
    pub fn share(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Read tables and write them to the file.
    ///
    /// # Errors
    ///
    /// Returns an error if the tables cannot be read, or there is no memory.
    pub fn read(&mut self, cpus: &mut Cpus, isa: Isa, tables: &[u32]) -> io::Result<()> {
        let mut file = &self.0;
        let read = cpus.read(isa, tables, |record| write(&mut file, record));
        read.map_err(|error| match error {
            EachError::Io(error) => error,
            EachError::NoAnswer(no_answer) => io::Error::other(no_answer),
        })
    }

    /// Write the number of queries that were asked besides, by leaf.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no memory.
    pub fn asked(&mut self, asked: Asked) -> io::Result<()> {
        write(&mut &self.0, &Record::Asked(asked))
    }

    /// Return the reading in the file.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be read.
    pub fn take(mut self, cpus: &Cpus) -> anyhow::Result<Reading> {
        let mut bytes = Vec::new();
        self.0.rewind()?;
        self.0.read_to_end(&mut bytes)?;
        let records = bytes.chunks(8 * NUMBERS).map(|bytes| {
            let mut numbers = [0; NUMBERS];
            for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
                let mut word = [0; 8];
                word.copy_from_slice(bytes);
                *number = u64::from_ne_bytes(word);
            }
            Record::from_numbers(numbers).ok_or(Error::Lost)
        });
        let records: Vec<_> = records.collect::<Result<_, _>>()?;
        if records.is_empty() {
            return Err(Error::Lost.into());
        }
        Ok(Reading::of(cpus.online, records))
    }
}

fn write(to: &mut &File, record: &Record) -> io::Result<()> {
    let mut bytes = [0; 8 * NUMBERS];
    for (place, number) in bytes.chunks_exact_mut(8).zip(record.numbers()) {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    to.write_all(&bytes)
}

/// Read the slow exits of each vCPU: the slowest ones, and the frozen ring.
///
/// # Errors
///
/// Returns an error if they cannot be queried.
pub fn slow(cpus: &mut Cpus, isa: Isa) -> anyhow::Result<(Reading, BTreeMap<u32, SlowCpu>)> {
    let mut records = Vec::new();
    let mut slow = BTreeMap::new();
    cpus.each(|cpu, querier| {
        let mut reader = TableReader::new(querier, isa);
        let Some(description) = reader.describe() else {
            records.push(Record::Unmetered(cpu));
            return Ok(());
        };
        records.push(Record::Cpu(cpu, description));
        let mut exits = SlowCpu::default();
        reader.read_slow(TABLE_SLOWEST, |exit| exits.slowest.push(exit));
        reader.read_slow(TABLE_RING, |exit| exits.ring.push(exit));
        records.push(Record::Asked(reader.asked()));
        slow.insert(cpu, exits);
        Ok(())
    })?;
    Ok((Reading::of(cpus.online, records), slow))
}

/// Slow exits of one vCPU.
#[derive(Clone, Debug, Default)]
pub struct SlowCpu {
    /// Slowest exits of the current window and of the one before.
    pub slowest: Vec<SlowExit>,
    /// Exits of the ring, if it is frozen.
    pub ring: Vec<SlowExit>,
}

#[cfg(test)]
mod tests {
    use exitmeter_meter::snapshot::TABLE_DETAILS;

    use super::*;

    fn cpuid(leaf: u64, exits: u64) -> TableRow {
        TableRow {
            table: TABLE_DETAILS,
            reason: Reason::Code(0x72),
            detail_kind: 6,
            nested: false,
            others: false,
            key: leaf,
            exits,
            kernel: Some(exits * 10),
            user: Some(0),
            missed: Missed::default(),
        }
    }

    fn reading(switches: u32, entries: &[TableRow], asked: Asked) -> Reading {
        let description = Description {
            is_on: true,
            has_tables: true,
            switches,
            ..Description::default()
        };
        let records = [Record::Cpu(3, description)]
            .into_iter()
            .chain(entries.iter().copied().map(Record::TableRow))
            .chain([Record::Asked(asked)]);
        Reading::of(4, records)
    }

    #[test]
    fn records_survive_the_round_trip() {
        let other = TableRow {
            table: TABLE_USER,
            reason: Reason::Other,
            others: true,
            nested: true,
            kernel: None,
            user: Some(u64::MAX),
            missed: Missed {
                exits: 1,
                kernel: 2,
                user: 3,
            },
            ..cpuid(5, 6)
        };
        let description = Description {
            is_on: true,
            lacks_rip: true,
            switches: 77,
            age: 1 << 40,
            ..Description::default()
        };
        for record in [
            Record::Unmetered(9),
            Record::Cpu(1023, description),
            Record::TableRow(cpuid(u64::MAX, 3)),
            Record::TableRow(other),
            Record::Asked([1, 2, 3, 4, 5, u64::MAX]),
        ] {
            assert_eq!(Record::from_numbers(record.numbers()), Some(record));
        }
        assert_eq!(Record::from_numbers([0; NUMBERS]), None);
    }

    #[test]
    fn own_queries_are_subtracted() {
        // The tool asked leaf 0x4FFFFFF5 30 times after its row was read, and 0x4FFFFFF2 8 times.
        let before = reading(1, &[cpuid(0, 7)], [0, 0, 8, 0, 0, 30]);
        let after = reading(
            1,
            &[
                cpuid(0, 12),
                cpuid(0x4fff_fff5, 30),
                cpuid(0x4fff_fff2, 9),
                cpuid(0x4fff_fff6, 2),
            ],
            [0; 6],
        );
        let rows = after
            .since(&before, Isa::Svm)
            .expect("the same tables")
            .rows();
        let numbers: Vec<_> = rows
            .by_key
            .iter()
            .map(|(key, row)| (key.key, row.numbers.exits, row.numbers.kernel))
            .collect();
        assert_eq!(
            numbers,
            [(0, 5, 50), (0x4fff_fff2, 1, 10), (0x4fff_fff6, 2, 20)]
        );
        assert_eq!(
            (after.vcpus(), after.unread(), after.without_tables()),
            (1, 3, 0)
        );
    }

    #[test]
    fn switched_tables_are_refused() {
        let one = reading(1, &[], [0; 6]);
        let other = reading(3, &[], [0; 6]);
        assert!(matches!(other.since(&one, Isa::Svm), Err(Error::Switched)));
        assert!(one.check().is_ok() && matches!(Reading::default().check(), Err(Error::Off)));
    }

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(count_cpus("0-3,5\n"), Some(5));
        assert_eq!(count_cpus("0"), Some(1));
        assert_eq!(count_cpus(""), None);
        assert_eq!(count_cpus("3-1"), None);
    }
}
