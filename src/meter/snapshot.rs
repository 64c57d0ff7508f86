// SPDX-License-Identifier: GPL-2.0

//! Snapshot of `/dev/exitmeter`: its layout, and its encoder in the module.
//!
//! A snapshot describes itself, as KVM's binary statistics do. The header gives the offset of each
//! part and the size of its elements. One descriptor per counter gives the counter's name, its
//! unit, and its offset in a row. So a reader skips what it does not know, and uses the sizes in
//! the snapshot, not those below.
//!
//! All numbers are little endian. All offsets are in bytes; those in the header count from the
//! start of the snapshot. Every part begins at a multiple of 8. Bytes that no line below names are
//! 0, and may get a meaning in a later minor version.
//!
//! # Header
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 8 | magic: `ExitMetr` |
//! | 8 | 2 | major version, 1: the layout changes with it |
//! | 10 | 2 | minor version, 3: grows when parts, fields or counters are added |
//! | 12 | 4 | size of the header, 160 |
//! | 16 | 8 | size of the whole snapshot |
//! | 24 | 4 | flags: bit 0 the TSC is stable, bit 1 guests read host-wide numbers, bit 2 BPF kept the numbers |
//! | 28 | 4 | ISA: 1 VMX, 2 SVM |
//! | 32 | 8 | TSC when the module was loaded |
//! | 40 | 8 | TSC when the snapshot began |
//! | 48 | 4 | TSC frequency in kHz, 0 if unknown |
//! | 52 | 4 | leaf map that guests see: 0, 2021 or 2022 |
//! | 56 | 8 | number of vCPUs that run, or ran, unmetered |
//! | 64 | 8 | number of vCPUs that are gone and counted in the totals |
//! | 72 | 8 | offset of the descriptors |
//! | 80 | 4 | number of descriptors |
//! | 84 | 4 | size of a descriptor, 64 |
//! | 88 | 8 | offset of the records of vCPUs |
//! | 96 | 4 | number of records of vCPUs |
//! | 100 | 4 | size of a record's head, 112 |
//! | 104 | 8 | offset of the totals: one more record, for the vCPUs that are gone |
//! | 112 | 4 | size of a row |
//! | 116 | 4 | reserved |
//! | 120 | 8 | since 1.2: number of the meter's life, never 0: it changes when the numbers start over |
//! | 128 | 8 | since 1.3: offset of the descriptors of the tables' columns; 0 without tables |
//! | 136 | 4 | number of these descriptors |
//! | 140 | 4 | number of vCPUs without tables for lack of memory |
//! | 144 | 8 | offset of the records of tables |
//! | 152 | 4 | number of records of tables |
//! | 156 | 4 | size of the head of a record of tables, 32 |
//!
//! If bit 2 is set, a BPF program kept the numbers, not the module. Then "TSC" means the kernel's
//! monotonic clock, in nanoseconds, and the frequency is that of nanoseconds.
//!
//! "TSC" is the host's TSC, continued over sleeps of the host: the hardware's TSC starts over after
//! suspend to RAM, for example, and the snapshot's goes on.
//!
//! # Descriptor of a counter
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | unit: 1 events, 2 TSC ticks |
//! | 4 | 1 | kind: 1 a sum that only grows, 2 a histogram, 3 a maximum |
//! | 5 | 1 | for a histogram: number of buckets in each power of two, as a power of two |
//! | 6 | 1 | for a histogram: power of two of the first bucket |
//! | 7 | 1 | reserved |
//! | 8 | 4 | offset in a row |
//! | 12 | 4 | number of values, each of 8 bytes: 1 for a sum |
//! | 16 | 48 | name, UTF-8, padded with NULs |
//!
//! Counters of this version: `exits` (events), and in TSC ticks `guest`, `kernel`, `user`,
//! `blocked` and `preempted`, which together are a vCPU's life. Minor version 1 adds `kernel_max`,
//! the most ticks that one exit spent in the kernel phase up to its entry; `kernel_histogram`, the
//! distribution of these ticks over the exits; and `nested_exits`, the exits that came from a
//! nested guest, an L2 (events). Minor version 2 adds `halted` and `waiting` (TSC ticks), the two
//! phases that `blocked` sums.
//!
//! A sum that does not fit in 8 bytes stays at 2^64 - 1.
//!
//! A histogram's first bucket also counts all samples below it, and the last one all above. With 2
//! buckets per power of two and first power 6, as now, the first bucket counts samples below 96,
//! the next ones those below 128, 192, 256, 384 and so on. A row with exits may have all zeros: 36
//! reasons of a vCPU have a histogram, and later reasons have none.
//!
//! # Record of a vCPU
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | size of the record, head and rows; the next record follows |
//! | 4 | 4 | number of rows |
//! | 8 | 8 | the VM's number: all vCPUs of a VM have the same, and no other VM has it |
//! | 16 | 4 | thread that created the VM, as KVM recorded it; for most VMMs, their process |
//! | 20 | 4 | the vCPU's id in its VM |
//! | 24 | 8 | TSC at its first event |
//! | 32 | 8 | TSC at its latest transition |
//! | 40 | 4 | phase since then: 0 guest, 1 kernel, 2 user, 3 blocked, 4 preempted |
//! | 44 | 4 | kind of its latest reason, as in a row |
//! | 48 | 4 | code of its latest reason, as in a row |
//! | 52 | 4 | since 1.2: in phase 3, 0 halted, 1 waiting |
//! | 56 | 48 | KVM's name of the VM, UTF-8, padded with NULs |
//! | 104 | 8 | since 1.2: time that KVM polled before it let the vCPU sleep, in ns, by KVM's own count |
//! | 112 | | rows |
//!
//! A record describes one moment: the ticks of all its rows sum to the time from its first event to
//! its latest transition, exactly. In the record of the totals, all fields are 0 except size,
//! number of rows, polling time and the rows.
//!
//! # Row
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | kind: 0 exits with a code, 1 the time before the first exit, 2 exits whose code has no row of its own |
//! | 4 | 4 | code: VMX's basic exit reason or SVM's exit code for kind 0, else 0 |
//! | 8 | | counters, at the offsets in the descriptors |
//!
//! Empty rows are left out.
//!
//! # Tables
//!
//! Since 1.3, and only while details are on, a snapshot has tables: the exits of a vCPU by detail,
//! by the guest code that caused them, by why they went to user space, and the slow ones. There are
//! five kinds of tables: 1 details, 2 code, 3 exits to user space, 4 the slowest exits, 5 the ring
//! of the latest exits.
//!
//! The tables' columns have descriptors like those of counters, of the same size. In these, byte 7
//! is the kind of table that has the column, and the offset counts from the start of an entry. Kind
//! 4 is an upper bound: for the part of the column without `_missed` that this entry lacks and the
//! entry of the others holds. Details have `exits` (events), `kernel`, `user` (TSC ticks),
//! `exits_missed`, `kernel_missed`, `user_missed`. Code has `exits`, `kernel`, `exits_missed`,
//! `kernel_missed`. Exits to user space have `exits`, those to user space, and `user`.
//!
//! An entry of the slowest exits and of the ring is one exit, and its columns have kind 5: a value
//! of one exit. They are `sequence`, the exit's number since the vCPU's tables began; `time`, the
//! TSC at the exit (unit 3: TSC); `rip` (unit 4: address of the guest); `cpu_exit` and `cpu_entry`,
//! the host's CPU at the exit and at its entry (unit 0: a number); `kernel`, `user`, `halted`,
//! `waiting` and `preempted`, the exit's ticks by phase; `scheduled_out`, the times that the
//! scheduler took the vCPU off its CPU (events); and `user_exit`, KVM_EXIT_* if the exit went to
//! user space (unit 0). The slowest exits also have `window`: 0 the current one, 1 the one before
//! (unit 0). An unknown CPU is 2^64 - 1, and so is the `user_exit` of an exit that did not go to
//! user space.
//!
//! # Record of a vCPU's tables
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | size of the record, head and sections |
//! | 4 | 4 | vCPU: the index of its record in this snapshot, from 0 |
//! | 8 | 8 | TSC when the tables began |
//! | 16 | 4 | number of sections |
//! | 20 | 4 | flags: bit 0 the RIP cannot be read, because the guest's registers are encrypted; bit 1 the ring is frozen |
//! | 24 | 8 | TSC when the current window of the slowest exits began; 0 if there was none |
//! | 32 | | sections |
//!
//! # Section of a record
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | kind of table |
//! | 4 | 4 | size of the section, head and entries |
//! | 8 | 4 | size of an entry |
//! | 12 | 4 | number of entries |
//! | 16 | | entries |
//!
//! # Entry of a table
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | kind of the reason, as in a row |
//! | 4 | 4 | code of the reason, as in a row |
//! | 8 | 1 | for details and slow exits: kind of the key, see below |
//! | 9 | 1 | flags: bit 0 from a nested guest, bit 1 the others of the reason, bit 2 the RIP is unknown or not shown, bit 3 the exit that froze the ring |
//! | 10 | 6 | reserved |
//! | 16 | 8 | key: the detail, also for a slow exit; the RIP; or KVM_EXIT_* of kvm_run; 0 for the others |
//! | 24 | | columns, at the offsets in the descriptors |
//!
//! In tables 1 to 3 the entries of one reason are adjacent, and the entry of the others comes last.
//! The slowest exits are unordered; those of the ring are in order of time. Tables describe the
//! same moment as the vCPU's record. In a table of details or code, the exits and ticks of a
//! reason's entries, including the others, sum exactly to what its row has counted since the tables
//! began. The user ticks in the table of exits to user space do so too. An entry with all `_missed`
//! at 0 is exact.
//!
//! The length of a slow exit is its ticks in all phases but `halted`. Each window keeps the 16
//! slowest exits whose entry is in it. A window lasts at least 2^35 ticks; docs/slow.md says when
//! it ends. Rings are empty without the parameter `slow_us`. A ring that is not frozen ends with
//! the latest exit that was followed by an entry; a frozen one ends with the exit that froze it.
//!
//! # Key of a detail
//!
//! | kind | what | number | other bits |
//! | ---: | --- | --- | --- |
//! | 0 | no detail | | |
//! | 1 | port | 0 to 15 | 32 in, 33 string, 34 REP, 36 to 38 size in bytes |
//! | 2 | MSR | 0 to 31 | 32 write |
//! | 3 | guest-physical address of a device | 0 to 51 | |
//! | 4 | memory | 0 to 21 address in GiB | 32 read, 33 write, 34 fetch |
//! | 5 | vector | 0 to 7 | 8 to 10 type, as in VMX's interruption information |
//! | 6 | CPUID leaf | 0 to 31 | 32 to 53 subleaf, if the leaf has subleaves; 4194302 stands for itself and all higher ones. Of exitmeter's own leaves, only the upper four have subleaves here |
//! | 7 | hypercall | 0 to 31 | 32 set for a hypercall of Hyper-V |
//! | 8 | control register | 0 to 3 | 4 and 5 type of access, as in VMX's exit qualification |
//! | 9 | debug register | 0 to 2 | 4 read |
//! | 10 | access to the APIC | 0 to 11 offset | 12 to 15 type, as in VMX's exit qualification; on SVM 12 write |
//! | 11 | write to the virtual APIC | 0 to 11 offset | |
//! | 12 | end of an interrupt | 0 to 7 vector | |

use super::{
    detail,
    histogram::{Buckets, BUCKETS, FIRST_POWER, PARTS_POWER},
    leaves::LeafMap,
    ledger::{LedgerCopy, RowCopy, Totals},
    phase::Phase,
    reasons::{self, Isa, Slot},
    slow::SlowExit,
    tables::{Others, TablesCopy},
};

/// Magic bytes at the start of a snapshot.
pub const MAGIC: [u8; 8] = *b"ExitMetr";
/// Major version of the layout.
pub const MAJOR: u16 = 1;
/// Minor version of the layout.
pub const MINOR: u16 = 3;

/// Size of the header, in bytes.
pub const HEADER_SIZE: usize = 160;
/// Size of a descriptor, in bytes.
pub const DESCRIPTOR_SIZE: usize = 64;
/// Size of a record before its rows, in bytes.
pub const HEAD_SIZE: usize = 112;
/// Size of a row before its counters, in bytes.
pub const ROW_HEAD_SIZE: usize = 8;
/// Size of a name, in bytes, NULs included.
pub const NAME_SIZE: usize = 48;

/// Size of a record of tables before its sections, in bytes.
pub const TABLES_HEAD_SIZE: usize = 32;
/// Size of a section before its entries, in bytes.
pub const SECTION_HEAD_SIZE: usize = 16;
/// Size of an entry before its columns, in bytes.
pub const ENTRY_HEAD_SIZE: usize = 24;

/// Counters of a row before its histogram.
const BEFORE_HISTOGRAM: usize = 8;
/// Counters of a row after its histogram.
const AFTER_HISTOGRAM: usize = 2;
/// Counters of a row: name, unit, kind and number of values, in the order of the row.
pub const COUNTERS: [(&str, u32, u32, usize); BEFORE_HISTOGRAM + 1 + AFTER_HISTOGRAM] = [
    (EXITS, UNIT_EVENTS, KIND_SUM, 1),
    (Phase::Guest.name(), UNIT_TICKS, KIND_SUM, 1),
    (Phase::Kernel.name(), UNIT_TICKS, KIND_SUM, 1),
    (Phase::User.name(), UNIT_TICKS, KIND_SUM, 1),
    (BLOCKED, UNIT_TICKS, KIND_SUM, 1),
    (Phase::Preempted.name(), UNIT_TICKS, KIND_SUM, 1),
    (KERNEL_MAX, UNIT_TICKS, KIND_MAXIMUM, 1),
    (NESTED_EXITS, UNIT_EVENTS, KIND_SUM, 1),
    (KERNEL_HISTOGRAM, UNIT_TICKS, OUR_HISTOGRAM, BUCKETS),
    (Phase::Halted.name(), UNIT_TICKS, KIND_SUM, 1),
    (Phase::Waiting.name(), UNIT_TICKS, KIND_SUM, 1),
];
/// Number of counters in each minor version, from 0 on. A new counter comes last, with a new
/// version.
pub(crate) const COUNTERS_BY_MINOR: [usize; MINOR as usize + 1] = [6, 9, 11, 11];
const _: () = assert!(COUNTERS_BY_MINOR[MINOR as usize] == COUNTERS.len());
/// Size of a row, in bytes. Each counter but the histogram is one number.
const ROW_SIZE: usize = ROW_HEAD_SIZE + 8 * (BEFORE_HISTOGRAM + BUCKETS + AFTER_HISTOGRAM);

/// Flag: the TSC runs at the same rate on all CPUs.
pub const FLAG_TSC_STABLE: u32 = 1 << 0;
/// Flag: guests read the sums of the host.
pub const FLAG_HOST_SCOPE: u32 = 1 << 1;
/// Flag: a BPF program kept the numbers, in nanoseconds.
pub const FLAG_BPF: u32 = 1 << 2;

/// Counter of exits.
pub const EXITS: &str = "exits";
/// Counter of the ticks of both kinds of sleep, [`Phase::Halted`] and [`Phase::Waiting`].
pub const BLOCKED: &str = "blocked";
/// Counter of the most kernel ticks of one exit.
pub const KERNEL_MAX: &str = "kernel_max";
/// Counter of exits from a nested guest.
pub const NESTED_EXITS: &str = "nested_exits";
/// Histogram of exits by kernel ticks.
pub const KERNEL_HISTOGRAM: &str = "kernel_histogram";

/// Kind of a table: details.
pub const TABLE_DETAILS: u32 = 1;
/// Kind of a table: code.
pub const TABLE_CODE: u32 = 2;
/// Kind of a table: exits to user space.
pub const TABLE_USER: u32 = 3;
/// Kind of a table: the slowest exits.
pub const TABLE_SLOWEST: u32 = 4;
/// Kind of a table: the ring of the latest exits.
pub const TABLE_RING: u32 = 5;
/// Flag of a record of tables: the RIP cannot be read.
pub const FLAG_NO_RIP: u32 = 1 << 0;
/// Flag of a record of tables: the ring is frozen.
pub const FLAG_FROZEN: u32 = 1 << 1;
/// Flag of an entry: the exits come from a nested guest.
pub const FLAG_NESTED: u8 = 1 << 0;
/// Flag of an entry: it holds the others of the reason.
pub const FLAG_OTHERS: u8 = 1 << 1;
/// Flag of an entry: the RIP is unknown, or not shown.
pub const FLAG_NO_ENTRY_RIP: u8 = 1 << 2;
/// Flag of an entry: the exit froze the ring.
pub const FLAG_CULPRIT: u8 = 1 << 3;
/// Column: upper bound for the exits that an entry lacks.
pub const EXITS_MISSED: &str = "exits_missed";
/// Column: upper bound for the kernel ticks that an entry lacks.
pub const KERNEL_MISSED: &str = "kernel_missed";
/// Column: upper bound for the user ticks that an entry lacks.
pub const USER_MISSED: &str = "user_missed";

/// Column of slow exits: number of the exit on its vCPU.
pub const SEQUENCE: &str = "sequence";
/// Column of slow exits: TSC at the exit.
pub const TIME: &str = "time";
/// Column of slow exits: guest RIP.
pub const RIP: &str = "rip";
/// Column of slow exits: host CPU at the exit.
pub const CPU_EXIT: &str = "cpu_exit";
/// Column of slow exits: host CPU at the entry after it.
pub const CPU_ENTRY: &str = "cpu_entry";
/// Column of slow exits: times that the scheduler took the vCPU off its CPU.
pub const SCHEDULED_OUT: &str = "scheduled_out";
/// Column of slow exits: KVM_EXIT_* if the exit went to user space.
pub const USER_EXIT: &str = "user_exit";
/// Column of the slowest exits: 0 for the current window, 1 for the one before.
pub const WINDOW: &str = "window";

/// Columns of the tables: kind of table, name, unit, kind.
const COLUMNS: [(u32, &str, u32, u32); 12 + 13 + 12] = [
    (TABLE_DETAILS, EXITS, UNIT_EVENTS, KIND_SUM),
    (TABLE_DETAILS, Phase::Kernel.name(), UNIT_TICKS, KIND_SUM),
    (TABLE_DETAILS, Phase::User.name(), UNIT_TICKS, KIND_SUM),
    (TABLE_DETAILS, EXITS_MISSED, UNIT_EVENTS, KIND_BOUND),
    (TABLE_DETAILS, KERNEL_MISSED, UNIT_TICKS, KIND_BOUND),
    (TABLE_DETAILS, USER_MISSED, UNIT_TICKS, KIND_BOUND),
    (TABLE_CODE, EXITS, UNIT_EVENTS, KIND_SUM),
    (TABLE_CODE, Phase::Kernel.name(), UNIT_TICKS, KIND_SUM),
    (TABLE_CODE, EXITS_MISSED, UNIT_EVENTS, KIND_BOUND),
    (TABLE_CODE, KERNEL_MISSED, UNIT_TICKS, KIND_BOUND),
    (TABLE_USER, EXITS, UNIT_EVENTS, KIND_SUM),
    (TABLE_USER, Phase::User.name(), UNIT_TICKS, KIND_SUM),
    (TABLE_SLOWEST, SEQUENCE, UNIT_NUMBER, KIND_PER_EXIT),
    (TABLE_SLOWEST, TIME, UNIT_TIME, KIND_PER_EXIT),
    (TABLE_SLOWEST, RIP, UNIT_ADDRESS, KIND_PER_EXIT),
    (TABLE_SLOWEST, CPU_EXIT, UNIT_NUMBER, KIND_PER_EXIT),
    (TABLE_SLOWEST, CPU_ENTRY, UNIT_NUMBER, KIND_PER_EXIT),
    (
        TABLE_SLOWEST,
        Phase::Kernel.name(),
        UNIT_TICKS,
        KIND_PER_EXIT,
    ),
    (TABLE_SLOWEST, Phase::User.name(), UNIT_TICKS, KIND_PER_EXIT),
    (
        TABLE_SLOWEST,
        Phase::Halted.name(),
        UNIT_TICKS,
        KIND_PER_EXIT,
    ),
    (
        TABLE_SLOWEST,
        Phase::Waiting.name(),
        UNIT_TICKS,
        KIND_PER_EXIT,
    ),
    (
        TABLE_SLOWEST,
        Phase::Preempted.name(),
        UNIT_TICKS,
        KIND_PER_EXIT,
    ),
    (TABLE_SLOWEST, SCHEDULED_OUT, UNIT_EVENTS, KIND_PER_EXIT),
    (TABLE_SLOWEST, USER_EXIT, UNIT_NUMBER, KIND_PER_EXIT),
    (TABLE_SLOWEST, WINDOW, UNIT_NUMBER, KIND_PER_EXIT),
    (TABLE_RING, SEQUENCE, UNIT_NUMBER, KIND_PER_EXIT),
    (TABLE_RING, TIME, UNIT_TIME, KIND_PER_EXIT),
    (TABLE_RING, RIP, UNIT_ADDRESS, KIND_PER_EXIT),
    (TABLE_RING, CPU_EXIT, UNIT_NUMBER, KIND_PER_EXIT),
    (TABLE_RING, CPU_ENTRY, UNIT_NUMBER, KIND_PER_EXIT),
    (TABLE_RING, Phase::Kernel.name(), UNIT_TICKS, KIND_PER_EXIT),
    (TABLE_RING, Phase::User.name(), UNIT_TICKS, KIND_PER_EXIT),
    (TABLE_RING, Phase::Halted.name(), UNIT_TICKS, KIND_PER_EXIT),
    (TABLE_RING, Phase::Waiting.name(), UNIT_TICKS, KIND_PER_EXIT),
    (
        TABLE_RING,
        Phase::Preempted.name(),
        UNIT_TICKS,
        KIND_PER_EXIT,
    ),
    (TABLE_RING, SCHEDULED_OUT, UNIT_EVENTS, KIND_PER_EXIT),
    (TABLE_RING, USER_EXIT, UNIT_NUMBER, KIND_PER_EXIT),
];

/// Unit of a column: a plain number.
pub const UNIT_NUMBER: u32 = 0;
/// Unit of a counter: events.
pub const UNIT_EVENTS: u32 = 1;
/// Unit of a counter: TSC ticks.
pub const UNIT_TICKS: u32 = 2;
/// Unit of a column: a moment, in TSC ticks.
pub const UNIT_TIME: u32 = 3;
/// Unit of a column: a guest address.
pub const UNIT_ADDRESS: u32 = 4;
/// Kind of a counter: a sum that only grows.
pub const KIND_SUM: u32 = 1;
/// Kind of a counter: a histogram by powers of two.
pub const KIND_HISTOGRAM: u32 = 2;
/// Kind of a counter: the maximum of its samples.
pub const KIND_MAXIMUM: u32 = 3;

/// Kind of a histogram with the buckets of [`crate::histogram`], with its parameters.
const OUR_HISTOGRAM: u32 = KIND_HISTOGRAM | PARTS_POWER << 8 | FIRST_POWER << 16;

/// Kind of a column: an upper bound for what another column lacks.
pub const KIND_BOUND: u32 = 4;
/// Kind of a column: a value of one exit.
pub const KIND_PER_EXIT: u32 = 5;

/// Reason that exits and time of a vCPU are booked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Exits with this code, and the time after them.
    Code(u32),
    /// The time before the first exit.
    Start,
    /// Exits whose code has no row of its own.
    Other,
}

impl Reason {
    /// Return the reason that a row of a ledger counts.
    pub fn of(isa: Isa, slot: Slot) -> Self {
        match reasons::code(isa, slot) {
            Some(code) => Reason::Code(code),
            None if slot == Slot::START => Reason::Start,
            None => Reason::Other,
        }
    }

    /// Return kind and code, as a snapshot has them.
    const fn to_wire(self) -> [u32; 2] {
        match self {
            Reason::Code(code) => [0, code],
            Reason::Start => [1, 0],
            Reason::Other => [2, 0],
        }
    }
}

/// Facts about the host and the module, for the header.
#[derive(Clone, Copy, Debug)]
pub struct HostHeader {
    /// Vendor whose exit reasons the codes are.
    pub isa: Isa,
    /// Leaf map that guests see.
    pub leaf_map: LeafMap,
    /// Set if guests read the sums of the host.
    pub host_scope: bool,
    /// Set if a BPF program kept the numbers.
    pub by_bpf: bool,
    /// TSC frequency in kHz, 0 if unknown.
    pub tsc_khz: u32,
    /// Set if the TSC runs at the same rate on all CPUs.
    pub tsc_stable: bool,
    /// TSC when the module was loaded, in the snapshot's clock.
    pub loaded: u64,
    /// Current TSC, in the snapshot's clock.
    pub now: u64,
    /// Offset of the snapshot's clock from the ledgers' clock, in TSC ticks modulo 2^64. The
    /// hardware's TSC starts over when the host wakes from some sleeps, and the snapshot's clock
    /// goes on.
    pub clock_offset: u64,
    /// Number of the meter's life: never 0, and a new one when the numbers start over.
    pub life: u64,
}

/// Return the two fields of a phase in a record: the number of version 1.0, which has 3 for both
/// kinds of sleep, and the field that separates these.
const fn phase_to_wire(phase: Phase) -> [u32; 2] {
    match phase {
        Phase::Guest => [0, 0],
        Phase::Kernel => [1, 0],
        Phase::User => [2, 0],
        Phase::Halted => [3, 0],
        Phase::Waiting => [3, 1],
        Phase::Preempted => [4, 0],
    }
}

/// Owner of a ledger: a vCPU and its VM.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Number of the VM, unique while the module is loaded.
    pub vm: u64,
    /// KVM's name of the VM, padded with NULs.
    pub name: [u8; NAME_SIZE],
    /// Thread that created the VM (`kvm->userspace_pid`): for most VMMs, their process.
    pub pid: u32,
    /// The vCPU's id in its VM.
    pub vcpu: u32,
}

/// Error: the snapshot does not fit into its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferTooSmall {
    /// Size of the snapshot, in bytes.
    pub needed: usize,
}

/// Return the size of a snapshot, in bytes. `rows` counts the rows of all vCPUs and of the totals.
pub const fn size_for(vcpus: usize, rows: usize) -> usize {
    const FIXED: usize = HEADER_SIZE + COUNTERS.len() * DESCRIPTOR_SIZE + HEAD_SIZE;
    FIXED
        .saturating_add(vcpus.saturating_mul(HEAD_SIZE))
        .saturating_add(rows.saturating_mul(ROW_SIZE))
}

/// Encoder of a snapshot into a buffer: add the vCPUs one by one, then call [`Self::finish`].
///
/// Like `snprintf`, it goes on counting when the buffer is full. So an empty buffer measures the
/// size.
#[derive(Debug)]
pub struct Encoder<'a> {
    buffer: &'a mut [u8],
    at: usize,
    host: HostHeader,
    vcpus: u32,
    /// Bytes of the records of tables. They stand at the end of the buffer until [`Self::finish`].
    tables_size: usize,
    tables: u32,
    has_tables: bool,
    without_tables: u32,
}

/// An entry of a table.
struct Entry<const COLUMNS: usize> {
    detail: detail::Kind,
    flags: u8,
    key: u64,
    columns: [u64; COLUMNS],
}

impl<'a> Encoder<'a> {
    /// Begin a snapshot.
    pub fn new(buffer: &'a mut [u8], host: HostHeader) -> Self {
        let mut encoder = Self {
            buffer,
            at: HEADER_SIZE,
            host,
            vcpus: 0,
            tables_size: 0,
            tables: 0,
            has_tables: false,
            without_tables: 0,
        };
        let mut place = 0_u32;
        for (name, unit, kind, count) in COUNTERS {
            let offset = (ROW_HEAD_SIZE as u32).wrapping_add(place.wrapping_mul(8));
            encoder.descriptor(name, unit, kind, offset, count as u32);
            place = place.wrapping_add(count as u32);
        }
        encoder
    }

    /// Add a vCPU.
    pub fn vcpu(&mut self, identity: &Identity, ledger: &LedgerCopy) {
        let latest = Reason::of(self.host.isa, ledger.slot());
        let times =
            [ledger.first, ledger.last].map(|time| time.wrapping_add(self.host.clock_offset));
        self.record(
            identity,
            times,
            phase_to_wire(ledger.phase()),
            latest.to_wire(),
            ledger.polled,
            ledger.rows(),
        );
        self.vcpus = self.vcpus.wrapping_add(1);
    }

    /// Add the tables of the vCPU that was added last, if they have begun. `ledger` is a copy of
    /// the same moment. Leaves out the table of code unless `show_code` is set.
    pub fn tables(&mut self, ledger: &LedgerCopy, tables: &TablesCopy, show_code: bool) {
        if !tables.has_begun() {
            return;
        }
        let front = self.at;
        // Their size is known only after they are written, so they are written twice: first to
        // nowhere.
        self.at = usize::MAX / 2;
        self.sections(ledger, tables, show_code, 0);
        let size = self.at.saturating_sub(usize::MAX / 2);
        self.tables_size = self.tables_size.saturating_add(size);
        let end = self.buffer.len();
        self.at = end.checked_sub(self.tables_size).unwrap_or(usize::MAX / 2);
        self.sections(ledger, tables, show_code, size);
        self.at = front;
        self.has_tables = true;
        self.tables = self.tables.wrapping_add(1);
    }

    /// Record that details are on, and the number of vCPUs without tables for lack of memory.
    pub fn set_details_on(&mut self, without: u32) {
        self.has_tables = true;
        self.without_tables = without;
    }

    /// Write a record of tables of `size` bytes.
    fn sections(&mut self, ledger: &LedgerCopy, tables: &TablesCopy, show_code: bool, size: usize) {
        let sections = if show_code { 5 } else { 4 };
        let slow = tables.slow();
        let flag = |flag, set| if set { flag } else { 0 };
        let flags = flag(FLAG_NO_RIP, tables.lacks_rip()) | flag(FLAG_FROZEN, slow.is_frozen());
        let clock_offset = self.host.clock_offset;
        self.u32(size as u32);
        self.u32(self.vcpus.wrapping_sub(1));
        self.u64(tables.since.wrapping_add(self.host.clock_offset));
        self.u32(sections);
        self.u32(flags);
        self.u64(
            slow.window_begun()
                .map_or(0, |begun| begun.wrapping_add(clock_offset)),
        );

        let isa = self.host.isa;
        let nested = |is_nested| if is_nested { FLAG_NESTED } else { 0 };
        self.section(TABLE_DETAILS, ledger, |slot, entries| {
            for row in tables
                .details()
                .iter()
                .filter(|row| row.slot() == Some(slot))
            {
                let code = reasons::code(isa, slot).unwrap_or(u32::MAX);
                let (detail, key) = detail::to_wire(isa, code, row.detail());
                entries.entry(
                    isa,
                    slot,
                    Entry {
                        detail,
                        flags: nested(row.is_nested()),
                        key,
                        columns: [
                            row.exits,
                            row.kernel,
                            row.user,
                            row.missed_exits,
                            row.missed_kernel,
                            row.missed_user,
                        ],
                    },
                );
            }
            let Others {
                exits,
                kernel,
                user,
            } = tables.other_details(ledger, slot);
            entries.others(isa, slot, [exits, kernel, user, 0, 0, 0]);
        });
        if show_code {
            self.section(TABLE_CODE, ledger, |slot, entries| {
                for row in tables.codes().iter().filter(|row| row.slot() == Some(slot)) {
                    entries.entry(
                        isa,
                        slot,
                        Entry {
                            detail: detail::Kind::None,
                            flags: nested(row.is_nested()),
                            key: row.rip,
                            columns: [row.exits, row.kernel, row.missed_exits, row.missed_kernel],
                        },
                    );
                }
                let Others { exits, kernel, .. } = tables.other_codes(ledger, slot);
                entries.others(isa, slot, [exits, kernel, 0, 0]);
            });
        }
        self.section(TABLE_USER, ledger, |slot, entries| {
            for row in tables.users().iter().filter(|row| row.slot() == Some(slot)) {
                entries.entry(
                    isa,
                    slot,
                    Entry {
                        detail: detail::Kind::None,
                        flags: 0,
                        key: row.why().into(),
                        columns: [row.exits, row.ticks],
                    },
                );
            }
            let Others { exits, user, .. } = tables.other_users(ledger, slot);
            entries.others(isa, slot, [exits, user]);
        });
        let shows_rip = show_code && !tables.lacks_rip();
        self.section_of(TABLE_SLOWEST, |entries| {
            for (window, is_current) in [(0, true), (1, false)] {
                for exit in slow.slowest(is_current) {
                    let columns = columns_of(&exit, shows_rip, clock_offset);
                    let [a, b, c, d, e, f, g, h, i, j, k, l] = columns;
                    let columns = [a, b, c, d, e, f, g, h, i, j, k, l, window];
                    entries.slow(isa, &exit, shows_rip, 0, columns);
                }
            }
        });
        self.section_of(TABLE_RING, |entries| {
            for exit in slow.ring(ledger.last, ledger.phase() == Phase::Guest) {
                let froze = flag_of(FLAG_CULPRIT, slow.culprit() == Some(exit.sequence));
                let columns = columns_of(&exit, shows_rip, clock_offset);
                entries.slow(isa, &exit, shows_rip, froze, columns);
            }
        });
    }

    /// Write a section. `write` adds the entries of each reason.
    fn section<const COLUMNS: usize>(
        &mut self,
        table: u32,
        ledger: &LedgerCopy,
        mut write: impl FnMut(Slot, &mut Entries<'_, 'a, COLUMNS>),
    ) {
        self.section_of(table, |entries| {
            for (slot, _, _) in ledger.rows() {
                write(slot, entries);
            }
        });
    }

    /// Write a section. `write` adds the entries.
    fn section_of<const COLUMNS: usize>(
        &mut self,
        table: u32,
        write: impl FnOnce(&mut Entries<'_, 'a, COLUMNS>),
    ) {
        let start = self.at;
        // Reserve the head; it is filled in below.
        self.u64(0);
        self.u64(0);
        let mut entries = Entries {
            encoder: self,
            count: 0,
        };
        write(&mut entries);
        let count = entries.count;
        let end = core::mem::replace(&mut self.at, start);
        self.u32(table);
        self.u32(end.wrapping_sub(start) as u32);
        self.u32(const { (ENTRY_HEAD_SIZE + 8 * COLUMNS) as u32 });
        self.u32(count);
        self.at = end;
    }

    /// Add the totals of the vCPUs that are gone and the number of unmetered vCPUs. Return the
    /// snapshot's size in bytes.
    ///
    /// # Errors
    ///
    /// [`BufferTooSmall`] if it did not fit. The buffer's contents are then useless.
    pub fn finish(mut self, gone: &Totals, unmetered: u64) -> Result<usize, BufferTooSmall> {
        const NOBODY: Identity = Identity {
            vm: 0,
            name: [0; NAME_SIZE],
            pid: 0,
            vcpu: 0,
        };
        let totals_at = self.at;
        self.record(&NOBODY, [0; 2], [0; 2], [0; 2], gone.polled, gone.rows());
        let columns_at = self.at;
        if self.has_tables {
            self.columns();
        }
        let tables_at = self.at;
        let size = tables_at.saturating_add(self.tables_size);
        if size <= self.buffer.len() {
            let from = self.buffer.len().saturating_sub(self.tables_size);
            self.buffer.copy_within(from.., tables_at);
        }
        self.at = 0;
        self.header(size, totals_at, gone.vcpus, unmetered);
        if self.has_tables {
            self.u64(columns_at as u64);
            self.u32(COLUMNS.len() as u32);
            self.u32(self.without_tables);
            self.u64(tables_at as u64);
            self.u32(self.tables);
            self.u32(TABLES_HEAD_SIZE as u32);
        } else {
            self.bytes(&[0; 32]);
        }
        if size <= self.buffer.len() {
            Ok(size)
        } else {
            Err(BufferTooSmall { needed: size })
        }
    }

    /// Write the descriptors of the tables' columns.
    fn columns(&mut self) {
        let mut before = (0, 0);
        for (table, name, unit, kind) in COLUMNS {
            if before.0 != table {
                before = (table, ENTRY_HEAD_SIZE as u32);
            }
            self.descriptor(name, unit, kind | table << 24, before.1, 1);
            before.1 = before.1.wrapping_add(8);
        }
    }

    fn header(&mut self, size: usize, totals_at: usize, gone: u64, unmetered: u64) {
        const RECORDS_AT: usize = HEADER_SIZE + COUNTERS.len() * DESCRIPTOR_SIZE;
        let host = self.host;
        let flag = |flag, set| if set { flag } else { 0 };
        self.bytes(&MAGIC);
        self.bytes(&MAJOR.to_le_bytes());
        self.bytes(&MINOR.to_le_bytes());
        self.u32(HEADER_SIZE as u32);
        self.u64(size as u64);
        let flags = flag(FLAG_TSC_STABLE, host.tsc_stable) | flag(FLAG_HOST_SCOPE, host.host_scope);
        self.u32(flags | flag(FLAG_BPF, host.by_bpf));
        self.u32(host.isa as u32);
        self.u64(host.loaded);
        self.u64(host.now);
        self.u32(host.tsc_khz);
        self.u32(host.leaf_map as u32);
        self.u64(unmetered);
        self.u64(gone);
        self.u64(HEADER_SIZE as u64);
        self.u32(COUNTERS.len() as u32);
        self.u32(DESCRIPTOR_SIZE as u32);
        self.u64(RECORDS_AT as u64);
        self.u32(self.vcpus);
        self.u32(HEAD_SIZE as u32);
        self.u64(totals_at as u64);
        self.u32(ROW_SIZE as u32);
        self.u32(0);
        self.u64(host.life);
    }

    fn descriptor(&mut self, name: &str, unit: u32, kind: u32, offset: u32, count: u32) {
        self.u32(unit);
        self.u32(kind);
        self.u32(offset);
        self.u32(count);
        let mut padded = [0; NAME_SIZE];
        for (to, from) in padded.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        self.bytes(&padded);
    }

    fn record<'r>(
        &mut self,
        identity: &Identity,
        [first, last]: [u64; 2],
        [phase, sleep]: [u32; 2],
        [kind, code]: [u32; 2],
        polled: u64,
        rows: impl Iterator<Item = (Slot, &'r RowCopy, &'r Buckets)>,
    ) {
        let start = self.at;
        // Reserve size and number of rows; they are filled in below.
        self.u64(0);
        self.u64(identity.vm);
        self.u32(identity.pid);
        self.u32(identity.vcpu);
        self.u64(first);
        self.u64(last);
        self.u32(phase);
        self.u32(kind);
        self.u32(code);
        self.u32(sleep);
        self.bytes(&identity.name);
        self.u64(polled);
        let mut count = 0_u32;
        for (slot, row, histogram) in rows {
            self.row(slot, row, histogram);
            count = count.wrapping_add(1);
        }
        let end = core::mem::replace(&mut self.at, start);
        self.u32(end.wrapping_sub(start) as u32);
        self.u32(count);
        self.at = end;
    }

    fn row(&mut self, slot: Slot, row: &RowCopy, histogram: &Buckets) {
        let [kind, code] = Reason::of(self.host.isa, slot).to_wire();
        self.u32(kind);
        self.u32(code);
        let RowCopy {
            exits,
            nested_exits,
            cycles: _,
            max,
        } = *row;
        let [halted, waiting] = [Phase::Halted, Phase::Waiting].map(|phase| row.cycles(phase));
        // In the order of `COUNTERS`.
        let before: [u64; BEFORE_HISTOGRAM] = [
            exits,
            row.cycles(Phase::Guest),
            row.cycles(Phase::Kernel),
            row.cycles(Phase::User),
            halted.saturating_add(waiting),
            row.cycles(Phase::Preempted),
            max,
            nested_exits,
        ];
        let after: [u64; AFTER_HISTOGRAM] = [halted, waiting];
        for numbers in [&before[..], histogram, &after] {
            for number in numbers {
                self.u64(*number);
            }
        }
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    fn bytes<const N: usize>(&mut self, bytes: &[u8; N]) {
        let room = self.buffer.get_mut(self.at..);
        if let Some(room) = room.and_then(|room| room.first_chunk_mut()) {
            *room = *bytes;
        }
        self.at = self.at.saturating_add(N);
    }
}

/// Return `flag` if `is_set`, else 0.
const fn flag_of(flag: u8, is_set: bool) -> u8 {
    if is_set {
        flag
    } else {
        0
    }
}

/// Return the columns that the slowest exits and the ring share.
fn columns_of(exit: &SlowExit, shows_rip: bool, clock_offset: u64) -> [u64; 12] {
    let [at_exit, at_entry] = exit.cpus().map(|cpu| cpu.map_or(u64::MAX, u64::from));
    [
        exit.sequence,
        exit.exited.wrapping_add(clock_offset),
        if shows_rip { exit.rip } else { 0 },
        at_exit,
        at_entry,
        exit.ticks(Phase::Kernel),
        exit.ticks(Phase::User),
        exit.ticks(Phase::Halted),
        exit.ticks(Phase::Waiting),
        exit.ticks(Phase::Preempted),
        exit.outs.into(),
        exit.user_exit().map_or(u64::MAX, u64::from),
    ]
}

/// Entries of a section under construction.
struct Entries<'e, 'a, const COLUMNS: usize> {
    encoder: &'e mut Encoder<'a>,
    count: u32,
}

impl<const COLUMNS: usize> Entries<'_, '_, COLUMNS> {
    fn entry(&mut self, isa: Isa, slot: Slot, entry: Entry<COLUMNS>) {
        let [kind, code] = Reason::of(isa, slot).to_wire();
        self.encoder.u32(kind);
        self.encoder.u32(code);
        self.encoder.bytes(&[entry.detail as u8, entry.flags]);
        self.encoder.bytes(&[0; 6]);
        self.encoder.u64(entry.key);
        for column in entry.columns {
            self.encoder.u64(column);
        }
        self.count = self.count.wrapping_add(1);
    }

    /// Write the entry of a slow exit.
    fn slow(
        &mut self,
        isa: Isa,
        exit: &SlowExit,
        shows_rip: bool,
        flags: u8,
        columns: [u64; COLUMNS],
    ) {
        let slot = exit.slot().unwrap_or(Slot::OTHER);
        let code = reasons::code(isa, slot).unwrap_or(u32::MAX);
        let (detail, key) = match exit.detail() {
            Some(key) => detail::to_wire(isa, code, key),
            None => (detail::Kind::None, 0),
        };
        let flags =
            flags | flag_of(FLAG_NESTED, exit.is_nested()) | flag_of(FLAG_NO_ENTRY_RIP, !shows_rip);
        let entry = Entry {
            detail,
            flags,
            key,
            columns,
        };
        self.entry(isa, slot, entry);
    }

    /// Write the entry of a reason's others, unless it is empty.
    fn others(&mut self, isa: Isa, slot: Slot, columns: [u64; COLUMNS]) {
        if columns == [0; COLUMNS] {
            return;
        }
        let entry = Entry {
            detail: detail::Kind::None,
            flags: FLAG_OTHERS,
            key: 0,
            columns,
        };
        self.entry(isa, slot, entry);
    }
}
