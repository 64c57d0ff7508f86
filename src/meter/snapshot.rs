// SPDX-License-Identifier: GPL-2.0

//! The snapshot that `/dev/exitmeter` gives: its layout, and how the module writes it.
//!
//! A snapshot describes itself, as KVM's binary statistics do: the header says where its
//! parts begin and how large their elements are, and one descriptor per counter says what
//! the counter is called, what it counts and where in a row it stands. So a reader skips
//! what it does not know, and takes the steps that the snapshot names, not those below.
//!
//! All numbers are little endian. All offsets are in bytes; those in the header count from
//! the start of the snapshot. Every part begins at a multiple of 8. Bytes that no line
//! below names are 0, and may get a meaning in a later minor version.
//!
//! # Header
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 8 | magic: `ExitMetr` |
//! | 8 | 2 | major version, 1: another one is another layout |
//! | 10 | 2 | minor version, 3: grows as parts, fields and counters are added |
//! | 12 | 4 | size of the header, 160 |
//! | 16 | 8 | size of the whole snapshot |
//! | 24 | 4 | flags: bit 0 the TSC is stable, bit 1 guests read host-wide numbers, bit 2 kept by BPF |
//! | 28 | 4 | ISA: 1 VMX, 2 SVM |
//! | 32 | 8 | TSC when the module was loaded |
//! | 40 | 8 | TSC when the snapshot was begun |
//! | 48 | 4 | TSC frequency in kHz, 0 when not known |
//! | 52 | 4 | leaf map that guests see: 0, 2021 or 2022 |
//! | 56 | 8 | vCPUs that run, or ran, without being metered |
//! | 64 | 8 | vCPUs that are gone and stand in the totals |
//! | 72 | 8 | offset of the descriptors |
//! | 80 | 4 | number of descriptors |
//! | 84 | 4 | size of a descriptor, 64 |
//! | 88 | 8 | offset of the records of vCPUs |
//! | 96 | 4 | number of records of vCPUs |
//! | 100 | 4 | size of a record's head, 112 |
//! | 104 | 8 | offset of the totals: one more record, of the vCPUs that are gone |
//! | 112 | 4 | size of a row |
//! | 116 | 4 | reserved |
//! | 120 | 8 | since 1.2: the meter's life, not 0: another number once its numbers begin anew |
//! | 128 | 8 | since 1.3: offset of the descriptors of the tables' columns; 0: there are no tables |
//! | 136 | 4 | number of these descriptors |
//! | 140 | 4 | vCPUs that have no tables for want of memory |
//! | 144 | 8 | offset of the records of tables |
//! | 152 | 4 | number of records of tables |
//! | 156 | 4 | size of such a record's head, 32 |
//!
//! With bit 2 a BPF program kept the numbers, not the module. Then all that is called TSC is the kernel's monotonic clock, in
//! nanoseconds, and the frequency is that of nanoseconds.
//!
//! "TSC" is the host's, continued over sleeps of the host: where the hardware's begins anew,
//! as after suspend to RAM, the snapshot's goes on.
//!
//! # Descriptor of a counter
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | unit: 1 events, 2 TSC ticks |
//! | 4 | 1 | kind: 1 a sum that only grows, 2 a histogram, 3 a maximum |
//! | 5 | 1 | of a histogram: into how many parts each power of two is divided, as a power of two |
//! | 6 | 1 | of a histogram: the power of two that the first bucket is of |
//! | 7 | 1 | reserved |
//! | 8 | 4 | offset in a row |
//! | 12 | 4 | how many numbers of 8 bytes it has: 1 for a sum |
//! | 16 | 48 | name, UTF-8, padded with NULs |
//!
//! Of this version: `exits` (events), and in TSC ticks `guest`, `kernel`, `user`,
//! `blocked` and `preempted`, which together are a vCPU's life. Since minor version 1
//! `kernel_max`, the most ticks that one exit spent in the kernel phase up to the entry after
//! it, `kernel_histogram`, how many exits spent how many, and `nested_exits`, how many of the
//! exits came from a nested guest, an L2 (events). Since minor version 2 `halted` and `waiting`
//! (TSC ticks), the two phases that `blocked` is the sum of.
//!
//! A sum that has no room in 8 bytes stays at 2^64 - 1.
//!
//! A histogram's first bucket also takes all that lies below it, the last one all above. With
//! 2 parts and first power 6, as now, the first holds what is below 96, the next what is below
//! 128, 192, 256, 384 and so on. All zero in a row with exits: of one vCPU, 33 reasons have a
//! histogram, and a reason that comes later has none.
//!
//! # Record of a vCPU
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | size of the record, head and rows: where the next one begins |
//! | 4 | 4 | number of rows |
//! | 8 | 8 | the VM's number: one VM's vCPUs have the same, and no other VM has |
//! | 16 | 4 | thread that made the VM, by KVM's note of it; for most VMMs their process |
//! | 20 | 4 | the vCPU's id in its VM |
//! | 24 | 8 | TSC at its first event |
//! | 32 | 8 | TSC at its latest transition |
//! | 40 | 4 | phase since then: 0 guest, 1 kernel, 2 user, 3 blocked, 4 preempted |
//! | 44 | 4 | kind of its latest reason, as in a row |
//! | 48 | 4 | code of its latest reason, as in a row |
//! | 52 | 4 | since 1.2: in phase 3, 0 halted, 1 waiting |
//! | 56 | 48 | KVM's name of the VM, UTF-8, padded with NULs |
//! | 104 | 8 | since 1.2: ns that KVM polled before it let the vCPU sleep, by KVM's own count |
//! | 112 | | rows |
//!
//! A record is of one moment: the ticks of all its rows sum to the time from its first
//! event to its latest transition, exactly. In the totals all but size, number of rows, the
//! polling and the rows is 0.
//!
//! # Row
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | kind: 0 exits with a code, 1 the time before the first exit, 2 exits whose code has no row of its own |
//! | 4 | 4 | code: VMX's basic exit reason or SVM's exit code for kind 0, else 0 |
//! | 8 | | counters, where the descriptors say |
//!
//! Rows that hold nothing are left out.
//!
//! # Tables
//!
//! Since 1.3, and only while details are on: what the exits of a vCPU were about, which code of
//! the guest's caused them, why they went to user space, and which were slow. There are five kinds
//! of tables: 1 details, 2 code, 3 exits to user space, 4 the slowest exits, 5 the ring of the last
//! exits.
//!
//! Their columns have descriptors as counters have them, with the same size. In these, byte 7 is
//! the kind of table whose entries have the column, the offset is one in an entry, and kind 4 is an
//! upper bound: of what the column of the same name without `_missed` lacks in this entry, and the
//! entry of the others has. Details have `exits` (events), `kernel`, `user` (TSC ticks),
//! `exits_missed`, `kernel_missed`, `user_missed`; code has `exits`, `kernel`, `exits_missed`,
//! `kernel_missed`; exits to user space have `exits`, of those to user space, and `user`.
//!
//! An entry of the slowest exits and of the ring is one exit, and the kind of its columns is 5: what
//! is told of one exit. They are `sequence`, which exit of the vCPU's it was since its tables began;
//! `time`, the TSC at the exit (unit 3: TSC); `rip` (unit 4: address of the guest); `cpu_exit` and
//! `cpu_entry`, the host's CPU at the exit and at the entry after it (unit 0: a number);
//! `kernel`, `user`, `halted`, `waiting` and `preempted`, the exit's ticks by phase; `scheduled_out`,
//! how often the scheduler took the vCPU off its CPU (events); and `user_exit`, KVM_EXIT_* when it
//! went to user space (unit 0). The slowest have `window` as well: 0 the current one, 1 the one
//! before (unit 0). A CPU that is not known, and a `user_exit` that there was not, are 2^64 - 1.
//!
//! # Record of a vCPU's tables
//!
//! | offset | size | what |
//! | ---: | ---: | --- |
//! | 0 | 4 | size of the record, head and sections |
//! | 4 | 4 | which vCPU: the place of its record in this snapshot, from 0 |
//! | 8 | 8 | TSC when the tables began |
//! | 16 | 4 | number of sections |
//! | 20 | 4 | flags: bit 0 no RIP can be read, as the guest's registers are encrypted; bit 1 the ring is frozen |
//! | 24 | 8 | TSC when the current window of the slowest exits began; 0: there was none |
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
//! | 0 | 4 | kind of its reason, as in a row |
//! | 4 | 4 | code of its reason, as in a row |
//! | 8 | 1 | of details and slow exits: what the key is, see below |
//! | 9 | 1 | flags: bit 0 from a nested guest, bit 1 all others of the reason, bit 2 the RIP is not known or not shown, bit 3 the exit that froze the ring |
//! | 10 | 6 | reserved |
//! | 16 | 8 | key: the detail, also of a slow exit, the RIP, or KVM_EXIT_* of kvm_run; 0 for others |
//! | 24 | | columns, where the descriptors say |
//!
//! In the tables 1 to 3 the entries of one reason stand together, that of the others last. The
//! slowest exits stand in no order, those of the ring in the order of time. Tables are of the same moment
//! as the vCPU's record. In a table of details or code, the exits and ticks of a reason's entries,
//! the others' with them, sum to what its row has booked since the tables began, exactly.
//! So do the user ticks in one of exits to user space. An entry whose `_missed` are 0 is exact.
//!
//! An exit is slow by its ticks in all phases but `halted`. Of each window there are the 16 slowest
//! whose entry is in it. A window takes 2^35 ticks, and ends at the first occasion after that: see
//! docs/slow.md. Without the parameter `slow_us` rings are empty. A ring that is not frozen
//! ends with the latest exit that was followed by an entry, a frozen one with the exit that froze it.
//!
//! # Key of a detail
//!
//! | kind | what | number | other bits |
//! | ---: | --- | --- | --- |
//! | 0 | no detail | | |
//! | 1 | port | 0 to 15 | 32 in, 33 string, 34 REP, 36 to 38 size in bytes |
//! | 2 | MSR | 0 to 31 | 32 write |
//! | 3 | guest-physical address of a device | 0 to 51 | |
//! | 4 | memory | 0 to 21 which GiB | 32 read, 33 write, 34 fetch |
//! | 5 | vector | 0 to 7 | 8 to 10 type, as in VMX's interruption information |
//! | 6 | CPUID leaf | 0 to 31 | 32 to 53 subleaf where the leaf has some; 4194302: that or a higher one. Of exitmeter's own leaves only the upper four have some here |
//! | 7 | hypercall | 0 to 31 | 32 one of Hyper-V's |
//! | 8 | control register | 0 to 3 | 4 to 5 type of access, as in VMX's exit qualification |
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

/// What a snapshot begins with.
pub const MAGIC: [u8; 8] = *b"ExitMetr";
/// The layout.
pub const MAJOR: u16 = 1;
/// What was added to it.
pub const MINOR: u16 = 3;

/// Bytes of the header.
pub const HEADER_SIZE: usize = 160;
/// Bytes of a descriptor.
pub const DESCRIPTOR_SIZE: usize = 64;
/// Bytes of a record before its rows.
pub const HEAD_SIZE: usize = 112;
/// Bytes of a row before its counters.
pub const ROW_HEAD_SIZE: usize = 8;
/// Bytes of a name, NULs included.
pub const NAME_SIZE: usize = 48;

/// Bytes of a record of tables before its sections.
pub const TABLES_HEAD_SIZE: usize = 32;
/// Bytes of a section before its entries.
pub const SECTION_HEAD_SIZE: usize = 16;
/// Bytes of an entry before its columns.
pub const ENTRY_HEAD_SIZE: usize = 24;

/// How many counters a row has: those of exits, of each phase and of the two sleeps together, and
/// three on what single exits cost and where they came from.
const COUNTERS: usize = 1 + Phase::COUNT + 1 + 3;
/// Bytes of a row. All counters but the histogram are one number.
const ROW_SIZE: usize = ROW_HEAD_SIZE + 8 * (COUNTERS - 1 + BUCKETS);

/// Flag: the TSC runs at one rate, alike on all CPUs.
pub const FLAG_TSC_STABLE: u32 = 1 << 0;
/// Flag: guests read the sums of the host.
pub const FLAG_HOST_SCOPE: u32 = 1 << 1;
/// Flag: a BPF program kept the numbers, in nanoseconds.
pub const FLAG_BPF: u32 = 1 << 2;

/// The counter of exits.
pub const EXITS: &str = "exits";
/// The ticks of both sleeps, [`Phase::Halted`] and [`Phase::Waiting`].
pub const BLOCKED: &str = "blocked";
/// The most kernel ticks of one exit.
pub const KERNEL_MAX: &str = "kernel_max";
/// Exits from a nested guest.
pub const NESTED_EXITS: &str = "nested_exits";
/// Exits by kernel ticks.
pub const KERNEL_HISTOGRAM: &str = "kernel_histogram";

/// Kind of a table: details.
pub const TABLE_DETAILS: u32 = 1;
/// Kind of a table: code.
pub const TABLE_CODE: u32 = 2;
/// Kind of a table: exits to user space.
pub const TABLE_USER: u32 = 3;
/// Kind of a table: the slowest exits.
pub const TABLE_SLOWEST: u32 = 4;
/// Kind of a table: the ring of the last exits.
pub const TABLE_RING: u32 = 5;
/// Flag of a record of tables: no RIP can be read.
pub const FLAG_NO_RIP: u32 = 1 << 0;
/// Flag of a record of tables: the ring is frozen.
pub const FLAG_FROZEN: u32 = 1 << 1;
/// Flag of an entry: the exits are a nested guest's.
pub const FLAG_NESTED: u8 = 1 << 0;
/// Flag of an entry: it is that of all others of the reason.
pub const FLAG_OTHERS: u8 = 1 << 1;
/// Flag of an entry: the RIP is not known, or not shown.
pub const FLAG_NO_ENTRY_RIP: u8 = 1 << 2;
/// Flag of an entry: the exit froze the ring.
pub const FLAG_CULPRIT: u8 = 1 << 3;
/// Column: at most how many exits an entry lacks.
pub const EXITS_MISSED: &str = "exits_missed";
/// Column: at most how many kernel ticks an entry lacks.
pub const KERNEL_MISSED: &str = "kernel_missed";
/// Column: at most how many user ticks an entry lacks.
pub const USER_MISSED: &str = "user_missed";

/// Column of slow exits: which exit of the vCPU's it was.
pub const SEQUENCE: &str = "sequence";
/// Column of slow exits: TSC at the exit.
pub const TIME: &str = "time";
/// Column of slow exits: where the guest was.
pub const RIP: &str = "rip";
/// Column of slow exits: the host's CPU at the exit.
pub const CPU_EXIT: &str = "cpu_exit";
/// Column of slow exits: the host's CPU at the entry after it.
pub const CPU_ENTRY: &str = "cpu_entry";
/// Column of slow exits: how often the scheduler took the vCPU off its CPU.
pub const SCHEDULED_OUT: &str = "scheduled_out";
/// Column of slow exits: KVM_EXIT_* when it went to user space.
pub const USER_EXIT: &str = "user_exit";
/// Column of the slowest exits: 0 of the current window, 1 of the one before.
pub const WINDOW: &str = "window";

/// The columns of the tables: kind of table, name, unit, kind.
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
    (TABLE_SLOWEST, SEQUENCE, UNIT_NUMBER, KIND_ONE),
    (TABLE_SLOWEST, TIME, UNIT_TIME, KIND_ONE),
    (TABLE_SLOWEST, RIP, UNIT_ADDRESS, KIND_ONE),
    (TABLE_SLOWEST, CPU_EXIT, UNIT_NUMBER, KIND_ONE),
    (TABLE_SLOWEST, CPU_ENTRY, UNIT_NUMBER, KIND_ONE),
    (TABLE_SLOWEST, Phase::Kernel.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_SLOWEST, Phase::User.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_SLOWEST, Phase::Halted.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_SLOWEST, Phase::Waiting.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_SLOWEST, Phase::Preempted.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_SLOWEST, SCHEDULED_OUT, UNIT_EVENTS, KIND_ONE),
    (TABLE_SLOWEST, USER_EXIT, UNIT_NUMBER, KIND_ONE),
    (TABLE_SLOWEST, WINDOW, UNIT_NUMBER, KIND_ONE),
    (TABLE_RING, SEQUENCE, UNIT_NUMBER, KIND_ONE),
    (TABLE_RING, TIME, UNIT_TIME, KIND_ONE),
    (TABLE_RING, RIP, UNIT_ADDRESS, KIND_ONE),
    (TABLE_RING, CPU_EXIT, UNIT_NUMBER, KIND_ONE),
    (TABLE_RING, CPU_ENTRY, UNIT_NUMBER, KIND_ONE),
    (TABLE_RING, Phase::Kernel.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_RING, Phase::User.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_RING, Phase::Halted.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_RING, Phase::Waiting.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_RING, Phase::Preempted.name(), UNIT_TICKS, KIND_ONE),
    (TABLE_RING, SCHEDULED_OUT, UNIT_EVENTS, KIND_ONE),
    (TABLE_RING, USER_EXIT, UNIT_NUMBER, KIND_ONE),
];

/// Unit of a column: a number of its own sort.
pub const UNIT_NUMBER: u32 = 0;
/// Unit of a counter: events.
pub const UNIT_EVENTS: u32 = 1;
/// Unit of a counter: TSC ticks.
pub const UNIT_TICKS: u32 = 2;
/// Unit of a column: a moment, as a TSC.
pub const UNIT_TIME: u32 = 3;
/// Unit of a column: an address of the guest.
pub const UNIT_ADDRESS: u32 = 4;
/// Kind of a counter: a sum that only grows.
pub const KIND_SUM: u32 = 1;
/// Kind of a counter: a histogram by powers of two.
pub const KIND_HISTOGRAM: u32 = 2;
/// Kind of a counter: the greatest of its samples.
pub const KIND_MAXIMUM: u32 = 3;

/// Kind of a column: an upper bound of what another column lacks.
pub const KIND_BOUND: u32 = 4;
/// Kind of a column: what is told of one exit.
pub const KIND_ONE: u32 = 5;

/// What the time of a vCPU and its exits are booked on.
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
    /// What a row of a ledger stands for.
    pub fn of(isa: Isa, slot: Slot) -> Self {
        match reasons::code(isa, slot) {
            Some(code) => Reason::Code(code),
            None if slot == Slot::START => Reason::Start,
            None => Reason::Other,
        }
    }

    /// Kind and code, as they are written.
    const fn to_wire(self) -> [u32; 2] {
        match self {
            Reason::Code(code) => [0, code],
            Reason::Start => [1, 0],
            Reason::Other => [2, 0],
        }
    }
}

/// What a snapshot says of the host and the module.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Whose reasons.
    pub isa: Isa,
    /// The leaves that guests see.
    pub leaf_map: LeafMap,
    /// Whether guests read the sums of the host.
    pub host_scope: bool,
    /// Whether a BPF program kept the numbers.
    pub by_bpf: bool,
    /// TSC frequency in kHz, 0 when not known.
    pub tsc_khz: u32,
    /// Whether the TSC runs at one rate, alike on all CPUs.
    pub tsc_stable: bool,
    /// TSC when the module was loaded, by the snapshot's clock.
    pub loaded: u64,
    /// TSC now, by the snapshot's clock.
    pub now: u64,
    /// TSC ticks that the snapshot's clock is ahead of the one of the ledgers, modulo 2^64: the
    /// hardware's TSC begins anew when the host wakes from some sleeps, and the snapshot's goes on.
    pub clock_offset: u64,
    /// The number of the meter's life: not 0, and another one when the numbers begin anew.
    pub life: u64,
}

/// Return how a record names a phase: the number that version 1.0 knows, in which both sleeps
/// are 3, and what tells these apart.
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

/// Whose a ledger is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The VM's number: unique while the module is loaded.
    pub vm: u64,
    /// KVM's name of the VM, padded with NULs.
    pub name: [u8; NAME_SIZE],
    /// The thread that made the VM (`kvm->userspace_pid`): for most VMMs their process.
    pub pid: u32,
    /// The vCPU's id in its VM.
    pub vcpu: u32,
}

/// The snapshot does not fit into its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Bytes that it takes.
    pub needed: usize,
}

/// Bytes of a snapshot of so many vCPUs that have so many rows together, the totals' rows
/// with them.
pub const fn size_for(vcpus: usize, rows: usize) -> usize {
    const FIXED: usize = HEADER_SIZE + COUNTERS * DESCRIPTOR_SIZE + HEAD_SIZE;
    FIXED
        .saturating_add(vcpus.saturating_mul(HEAD_SIZE))
        .saturating_add(rows.saturating_mul(ROW_SIZE))
}

/// Writes a snapshot into a buffer: first the vCPUs one by one, then [`Self::finish`].
///
/// As `snprintf` does, it goes on counting when the buffer is full. An empty buffer thus
/// measures what is needed.
#[derive(Debug)]
pub struct Encoder<'a> {
    buffer: &'a mut [u8],
    at: usize,
    host: Host,
    vcpus: u32,
    /// Bytes of the records of tables, which stand at the end of the buffer until
    /// [`Self::finish`].
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
    /// Begins a snapshot.
    pub fn new(buffer: &'a mut [u8], host: Host) -> Self {
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
        let histogram = KIND_HISTOGRAM | PARTS_POWER << 8 | FIRST_POWER << 16;
        // In the order of the row's numbers: what is new comes last.
        let counters: [(&str, u32, u32, usize); COUNTERS] = [
            (EXITS, UNIT_EVENTS, KIND_SUM, 1),
            (Phase::Guest.name(), UNIT_TICKS, KIND_SUM, 1),
            (Phase::Kernel.name(), UNIT_TICKS, KIND_SUM, 1),
            (Phase::User.name(), UNIT_TICKS, KIND_SUM, 1),
            (BLOCKED, UNIT_TICKS, KIND_SUM, 1),
            (Phase::Preempted.name(), UNIT_TICKS, KIND_SUM, 1),
            (KERNEL_MAX, UNIT_TICKS, KIND_MAXIMUM, 1),
            (NESTED_EXITS, UNIT_EVENTS, KIND_SUM, 1),
            (KERNEL_HISTOGRAM, UNIT_TICKS, histogram, BUCKETS),
            (Phase::Halted.name(), UNIT_TICKS, KIND_SUM, 1),
            (Phase::Waiting.name(), UNIT_TICKS, KIND_SUM, 1),
        ];
        let mut place = 0_u32;
        for (name, unit, kind, count) in counters {
            let offset = (ROW_HEAD_SIZE as u32).wrapping_add(place.wrapping_mul(8));
            encoder.descriptor(name, unit, kind, offset, count as u32);
            place = place.wrapping_add(count as u32);
        }
        encoder
    }

    /// Adds a vCPU.
    pub fn vcpu(&mut self, whose: &Identity, ledger: &LedgerCopy) {
        let latest = Reason::of(self.host.isa, ledger.slot());
        let times =
            [ledger.first, ledger.last].map(|time| time.wrapping_add(self.host.clock_offset));
        self.record(
            whose,
            times,
            phase_to_wire(ledger.phase()),
            latest.to_wire(),
            ledger.polled,
            ledger.rows(),
        );
        self.vcpus = self.vcpus.wrapping_add(1);
    }

    /// Add the tables of the vCPU that was added last, if they have begun; `ledger` is of the same
    /// moment. Without `show_code` that table is left out.
    pub fn tables(&mut self, ledger: &LedgerCopy, tables: &TablesCopy, show_code: bool) {
        if !tables.has_begun() {
            return;
        }
        let front = self.at;
        // How large they are is not known before they are written, so they are written twice: first
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

    /// Tell that details are on, and how many vCPUs have no tables for want of memory.
    pub fn told_tables(&mut self, without: u32) {
        self.has_tables = true;
        self.without_tables = without;
    }

    /// Write a record of tables, which has `size` bytes.
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

    /// Write a section, to which `write` adds the entries of each reason.
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

    /// Write a section, to which `write` adds the entries.
    fn section_of<const COLUMNS: usize>(
        &mut self,
        table: u32,
        write: impl FnOnce(&mut Entries<'_, 'a, COLUMNS>),
    ) {
        let start = self.at;
        // The numbers, once they are known.
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

    /// Adds the totals of the vCPUs that are gone and how many were not metered; the
    /// snapshot's size in bytes.
    ///
    /// # Errors
    ///
    /// [`Full`] when it did not fit; the buffer then holds nothing of use.
    pub fn finish(mut self, gone: &Totals, unmetered: u64) -> Result<usize, Full> {
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
            Err(Full { needed: size })
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
        const RECORDS_AT: usize = HEADER_SIZE + COUNTERS * DESCRIPTOR_SIZE;
        let host = self.host;
        let flag = |flag, set| if set { flag } else { 0 };
        self.bytes(&MAGIC);
        self.bytes(&MAJOR.to_le_bytes());
        self.bytes(&MINOR.to_le_bytes());
        self.u32(HEADER_SIZE as u32);
        self.u64(size as u64);
        let told = flag(FLAG_TSC_STABLE, host.tsc_stable) | flag(FLAG_HOST_SCOPE, host.host_scope);
        self.u32(told | flag(FLAG_BPF, host.by_bpf));
        self.u32(host.isa as u32);
        self.u64(host.loaded);
        self.u64(host.now);
        self.u32(host.tsc_khz);
        self.u32(host.leaf_map as u32);
        self.u64(unmetered);
        self.u64(gone);
        self.u64(HEADER_SIZE as u64);
        self.u32(COUNTERS as u32);
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
        whose: &Identity,
        [first, last]: [u64; 2],
        [phase, sleep]: [u32; 2],
        [kind, code]: [u32; 2],
        polled: u64,
        rows: impl Iterator<Item = (Slot, &'r RowCopy, &'r Buckets)>,
    ) {
        let start = self.at;
        // Size and number of rows, once they are known.
        self.u64(0);
        self.u64(whose.vm);
        self.u32(whose.pid);
        self.u32(whose.vcpu);
        self.u64(first);
        self.u64(last);
        self.u32(phase);
        self.u32(kind);
        self.u32(code);
        self.u32(sleep);
        self.bytes(&whose.name);
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
        let [halted, waiting] = [Phase::Halted, Phase::Waiting].map(|phase| row.cycles(phase));
        self.u64(row.exits);
        self.u64(row.cycles(Phase::Guest));
        self.u64(row.cycles(Phase::Kernel));
        self.u64(row.cycles(Phase::User));
        self.u64(halted.saturating_add(waiting));
        self.u64(row.cycles(Phase::Preempted));
        self.u64(row.max);
        self.u64(row.nested_exits);
        for samples in histogram {
            self.u64(*samples);
        }
        self.u64(halted);
        self.u64(waiting);
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

/// Return a flag that is set, or none.
const fn flag_of(flag: u8, is_set: bool) -> u8 {
    if is_set {
        flag
    } else {
        0
    }
}

/// Return the columns that the slowest exits and the ring have.
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

/// The entries of a section, as they are written.
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

    /// Write the entry of one exit.
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

    /// Write the entry of the others of a reason, unless nothing is left for it.
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
