// SPDX-License-Identifier: GPL-2.0

//! Maps of the programs, and the snapshot made of them.
//!
//! The maps are mapped into this process, so a snapshot takes no system call. A ledger is the
//! module's own [`Ledger`], and the module's own code copies it: without a lock, and without
//! holding up the vCPU.

use std::{
    mem::offset_of,
    os::fd::AsFd as _,
    ptr,
    sync::atomic::{
        fence, AtomicU64,
        Ordering::{Acquire, Relaxed},
    },
    thread,
    time::Duration,
};

use aya::{maps::MapData, Pod};
use exitmeter_meter::{
    histogram::BUCKETS,
    leaves::LeafMap,
    ledger::{
        Copying, Histogram, Ledger, LedgerCopy, More, MoreHistograms, RowCopy, Totals, C_VERSION,
    },
    reasons::{Isa, Slot, SLOTS},
    snapshot::{size_for, Encoder, HostHeader, Identity, NAME_SIZE},
    tables::{Tables, TablesCopy},
};
use rustix::{
    mm::{mmap, munmap, MapFlags, ProtFlags},
    time::{clock_gettime, ClockId},
};

use super::Error;

/// Words of a ledger and the histograms behind it.
const LEDGER: usize = (size_of::<Ledger>() + size_of::<MoreHistograms>()) / 8;

/// Names of the maps that a reader needs.
pub const NAMES: [&str; 5] = ["ledgers", "owners", "departed", "meter", "tables"];

/// Version of the maps, `layout` of struct meter. It changes when older readers would misread the
/// maps, and with the ledger.
const LAYOUT: u64 = 0x4558_4954_0000 | C_VERSION;

/// Attempts to copy a vCPU's ledger. An attempt takes a microsecond, and the programs leave that
/// much time between two transitions.
const TRIES: u32 = 100_000;

/// Attempts to copy the totals while vCPUs go. Adding one vCPU to the totals takes about 50 µs.
const TOTALS_TRIES: u32 = 10_000;

/// `struct meter` of cli/bpf/ledger.h.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    layout: u64,
    isa: u64,
    attached: u64,
    life: u64,
    details: u64,
    vms: u64,
    unmetered: u64,
    lost_exits: u64,
}

// SAFETY: Any bytes are valid numbers, and there is no padding.
unsafe impl Pod for Meter {}

impl Meter {
    /// Create the state of a meter that starts now. `since_1970` becomes its life number, which
    /// tells it from other meters.
    pub fn new(isa: Isa, since_1970: Duration, details: bool) -> Self {
        Self {
            layout: LAYOUT,
            isa: isa as u64,
            attached: now(),
            life: u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX) | 1,
            details: details.into(),
            vms: 0,
            unmetered: 0,
            lost_exits: 0,
        }
    }
}

/// `struct owner` of cli/bpf/ledger.h: its size and the places of its parts, in words.
mod owner {
    pub(super) const WORDS: usize = 20;
    pub(super) const GENERATION: usize = 0;
    pub(super) const VM: usize = 3;
    /// Process in the low half, vCPU id in the high half.
    pub(super) const PID_AND_ID: usize = 4;
    pub(super) const NAME: usize = 5;
    pub(super) const POLLED: usize = 12;
}

/// `struct totals` of cli/bpf/ledger.h: its size and the places of its parts, in words.
mod totals {
    use super::{RowCopy, BUCKETS, SLOTS};

    pub(super) const BEGUN: usize = 0;
    pub(super) const DONE: usize = 1;
    pub(super) const POLLED: usize = 2;
    pub(super) const ROWS: usize = 3;
    pub(super) const HISTOGRAMS: usize = ROWS + SLOTS * RowCopy::NUMBERS;
    pub(super) const WORDS: usize = HISTOGRAMS + SLOTS * BUCKETS;
}

/// Return the programs' clock, in nanoseconds.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// A kernel array, mapped for reading.
#[derive(Debug)]
struct Mapped {
    data: MapData,
    at: *const u64,
    words: usize,
}

// SAFETY: The mapping lives as long as this value, and all reads are atomic.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Map an array, and return it with the number of its records. A record has `words` words.
    /// Records are the map's entries, or parts of its only entry.
    fn new(data: MapData, words: usize) -> Result<(Self, usize), Error> {
        let info = data.info().map_err(|_| Error::OtherVersion)?;
        let size = info.value_size() as usize * info.max_entries() as usize;
        let entries = size / (8 * words);
        if entries == 0 {
            return Err(Error::OtherVersion);
        }
        let words = words * entries;
        // SAFETY: The kernel chooses an unused address.
        let at = unsafe {
            mmap(
                ptr::null_mut(),
                8 * words,
                ProtFlags::READ,
                MapFlags::SHARED,
                data.fd().as_fd(),
                0,
            )
        };
        let at = at.map_err(|error| Error::Refused {
            program: "map".to_owned(),
            error: error.to_string(),
        })?;
        let at = at.cast_const().cast();
        Ok((Self { data, at, words }, entries))
    }

    /// Return a word; 0 past the end.
    fn word(&self, place: usize) -> u64 {
        self.words().get(place).map_or(0, |word| word.load(Relaxed))
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: This many words are mapped, and pages are aligned. Others write them, which is
        // allowed for atomics.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.words) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: It was mapped with this size, and no reference to it is left.
        let _ = unsafe { munmap(self.at.cast_mut().cast(), 8 * self.words) };
    }
}

/// Maps that a snapshot is made from.
#[derive(Debug)]
pub struct Maps {
    ledgers: Mapped,
    owners: Mapped,
    departed: Mapped,
    meter: Mapped,
    /// Tables, one for each ledger if details are on.
    tables: Mapped,
    room: usize,
}

/// Copy of a vCPU's numbers.
struct Copied {
    index: usize,
    generation: u64,
    identity: Identity,
    ledger: Box<LedgerCopy>,
    tables: Option<Box<TablesCopy>>,
}

impl Maps {
    /// Map the arrays that `data` returns by name.
    ///
    /// # Errors
    ///
    /// Returns [`Error::OtherVersion`] if the maps have another layout, or an error of `data`.
    pub fn new(
        mut data: impl FnMut(&'static str) -> Result<MapData, Error>,
    ) -> Result<Self, Error> {
        let [ledgers, owners, departed, meter, tables] = NAMES;
        let (ledgers, room) = Mapped::new(data(ledgers)?, LEDGER)?;
        let (owners, vcpus) = Mapped::new(data(owners)?, owner::WORDS)?;
        let (departed, _) = Mapped::new(data(departed)?, totals::WORDS)?;
        let (meter, _) = Mapped::new(data(meter)?, size_of::<Meter>() / 8)?;
        let (tables, _) = Mapped::new(data(tables)?, size_of::<Tables>() / 8)?;
        // The room behind the last ledger is unused.
        if meter.word(offset_of!(Meter, layout) / 8) != LAYOUT || vcpus > room {
            return Err(Error::OtherVersion);
        }
        Ok(Self {
            ledgers,
            owners,
            departed,
            meter,
            tables,
            room: vcpus,
        })
    }

    /// Return the maps with their names, for pinning.
    pub fn named(&self) -> [(&'static str, &MapData); 5] {
        let [ledgers, owners, departed, meter, tables] = NAMES;
        [
            (ledgers, &self.ledgers.data),
            (owners, &self.owners.data),
            (departed, &self.departed.data),
            (meter, &self.meter.data),
            (tables, &self.tables.data),
        ]
    }

    /// Return the time since the programs were attached.
    pub fn age(&self) -> Duration {
        Duration::from_nanos(now().saturating_sub(self.meter_word(offset_of!(Meter, attached))))
    }

    /// Return the number of vCPUs that can be metered at a time.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Return the number of vCPUs metered now.
    pub fn vcpus(&self) -> usize {
        let metered = |index: &usize| self.generation(*index) & 1 != 0;
        (0..self.room).filter(metered).count()
    }

    /// Return the number of vCPUs that run or ran unmetered, and the number of their exits.
    pub fn lost(&self) -> (u64, u64) {
        (
            self.meter_word(offset_of!(Meter, unmetered)),
            self.meter_word(offset_of!(Meter, lost_exits)),
        )
    }

    /// Return true if the vCPUs have tables.
    pub fn has_details(&self) -> bool {
        self.meter_word(offset_of!(Meter, details)) != 0
    }

    /// Return a number of struct [`Meter`] by its offset, in bytes.
    fn meter_word(&self, offset: usize) -> u64 {
        self.meter.word(offset / 8)
    }

    fn generation(&self, index: usize) -> u64 {
        self.owners.word(index * owner::WORDS + owner::GENERATION)
    }

    /// Return a ledger, and the histograms behind it.
    fn ledger(&self, index: usize) -> Option<(&Ledger, &[Histogram])> {
        let words = self.ledgers.words().get(index * LEDGER..)?;
        let (ledger, more) = words.get(..LEDGER)?.split_at(size_of::<Ledger>() / 8);
        // SAFETY: The slices have this many bytes, at multiples of 64 because the map begins with a page. A ledger and
        // histograms consist of atomics, for which any bytes are valid. A copy follows no pointer of the ledger without
        // the module's tables, and with histograms that are behind the ledger.
        unsafe {
            let count = size_of_val(more) / size_of::<Histogram>();
            Some((
                &*ledger.as_ptr().cast(),
                std::slice::from_raw_parts(more.as_ptr().cast(), count),
            ))
        }
    }

    fn tables(&self, index: usize) -> Option<&Tables> {
        let words = size_of::<Tables>() / 8;
        let first = self.tables.words().get(index * words..)?;
        if first.len() < words || !self.has_details() {
            return None;
        }
        // SAFETY: The slice has this many bytes, at a multiple of 64. Tables consist of atomics,
        // for which any bytes are valid; the copy does not follow the places where rows begin.
        Some(unsafe { &*first.as_ptr().cast() })
    }

    fn identity(&self, index: usize) -> Identity {
        let word = |place| self.owners.word(index * owner::WORDS + place);
        let mut name = [0; NAME_SIZE];
        for (place, bytes) in name.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(owner::NAME + place).to_le_bytes());
        }
        let both = word(owner::PID_AND_ID);
        Identity {
            vm: word(owner::VM),
            name,
            pid: both as u32,
            vcpu: (both >> 32) as u32,
        }
    }

    /// Copy the vCPU that owns ledger `index`. Returns `None` if no vCPU owns it, or if the owner
    /// goes meanwhile.
    fn copy(&self, index: usize) -> Result<Option<Copied>, Error> {
        let generation = self.generation(index);
        // ORDERING: The vCPU's numbers are read after this fence, and before the next look at the
        // generation.
        fence(Acquire);
        let Some((ledger, more)) = self.ledger(index).filter(|_| generation & 1 != 0) else {
            return Ok(None);
        };
        let mut copied = Copied {
            index,
            generation,
            identity: self.identity(index),
            ledger: Box::default(),
            tables: self.has_details().then(Box::default),
        };
        let unchanged = || {
            fence(Acquire);
            self.generation(index) == generation
        };
        let mut copying = Copying {
            ledger,
            more: More::behind(more),
            out: &mut copied.ledger,
            tables: self.tables(index).zip(copied.tables.as_deref_mut()),
        };
        let mut tries = 0;
        while copying.copy(64).is_none() {
            if !unchanged() {
                return Ok(None);
            }
            tries += 64;
            if tries > TRIES {
                return Err(Error::NeverStable);
            }
            thread::yield_now();
        }
        copied.ledger.polled = self.owners.word(index * owner::WORDS + owner::POLLED);
        Ok(unchanged().then_some(copied))
    }

    /// Copy the totals, and remove from `vcpus` those that have gone: the totals include them.
    fn totals(&self, vcpus: &mut Vec<Copied>) -> Result<Box<Totals>, Error> {
        for _ in 0..TOTALS_TRIES {
            let done = self.departed.word(totals::DONE);
            if self.departed.word(totals::BEGUN) != done {
                thread::yield_now();
                continue;
            }
            fence(Acquire);
            let mut copy = Box::new(Totals::new());
            copy.vcpus = done;
            copy.polled = self.departed.word(totals::POLLED);
            for slot in Slot::all() {
                let first = totals::ROWS + slot.index() * RowCopy::NUMBERS;
                let numbers = std::array::from_fn(|place| self.departed.word(first + place));
                let numbers = RowCopy::from_numbers(numbers);
                if numbers != RowCopy::default() {
                    let first = totals::HISTOGRAMS + slot.index() * BUCKETS;
                    let mut histogram = [0; BUCKETS];
                    for (bucket, samples) in histogram.iter_mut().enumerate() {
                        *samples = self.departed.word(first + bucket);
                    }
                    copy.add_row(slot, &numbers, &histogram);
                }
            }
            let departed = |vcpu: &Copied| self.generation(vcpu.index) != vcpu.generation;
            let is_gone: Vec<bool> = vcpus.iter().map(departed).collect();
            fence(Acquire);
            if self.departed.word(totals::BEGUN) == done {
                let mut is_gone = is_gone.into_iter();
                vcpus.retain(|_| !is_gone.next().unwrap_or(false));
                return Ok(copy);
            }
        }
        Err(Error::NeverStable)
    }

    /// Make a snapshot in the format of /dev/exitmeter (see docs/interface.md). Without
    /// `show_code`, it leaves out the addresses of guest code.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NeverStable`], or [`Error::OtherVersion`] if the maps name no ISA.
    pub fn snapshot(&self, show_code: bool) -> Result<Vec<u8>, Error> {
        let host = HostHeader {
            isa: match self.meter_word(offset_of!(Meter, isa)) {
                1 => Isa::Vmx,
                2 => Isa::Svm,
                _ => return Err(Error::OtherVersion),
            },
            leaf_map: LeafMap::Off,
            host_scope: false,
            by_bpf: true,
            // A tick is a nanosecond.
            tsc_khz: 1_000_000,
            tsc_stable: true,
            loaded: self.meter_word(offset_of!(Meter, attached)),
            now: now(),
            clock_offset: 0,
            life: self.meter_word(offset_of!(Meter, life)),
        };
        let mut vcpus = Vec::new();
        for index in 0..self.room {
            vcpus.extend(self.copy(index)?);
        }
        let departed = self.totals(&mut vcpus)?;
        vcpus.sort_by_key(|vcpu| (vcpu.identity.vm, vcpu.identity.vcpu));
        let rows = |vcpu: &Copied| vcpu.ledger.rows().count();
        let rows = vcpus.iter().map(rows).sum::<usize>() + departed.rows().count();
        let mut buffer = vec![0; size_for(vcpus.len(), rows)];
        loop {
            let mut encoder = Encoder::new(&mut buffer, host);
            for vcpu in &vcpus {
                encoder.vcpu(&vcpu.identity, &vcpu.ledger);
                if let Some(tables) = &vcpu.tables {
                    encoder.tables(&vcpu.ledger, tables, show_code);
                }
            }
            if self.has_details() {
                encoder.set_details_on(0);
            }
            match encoder.finish(&departed, self.meter_word(offset_of!(Meter, unmetered))) {
                Ok(size) => {
                    buffer.truncate(size);
                    return Ok(buffer);
                }
                // The size of tables is known only after they are written.
                Err(full) => buffer.resize(full.needed, 0),
            }
        }
    }
}
