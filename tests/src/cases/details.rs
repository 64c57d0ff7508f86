// SPDX-License-Identifier: GPL-2.0

//! Details of exits, and the guest code that caused them: the rows match the kernel's own histograms
//! exactly as long as no row has to give way.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    detail::Kind,
    phase::Phase,
    reader::{Missed, Snapshot, TableRow},
    reasons::Isa,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_USER},
    tables::CODES,
};
use tiny_guests::{
    Config, Mode, Program, Registers64, Stepped, TinyVm, NOTIFY_LONG_SPIN_WAIT, REGISTERS,
};

use super::Case;
use crate::host::{
    self,
    detail_oracle::{Agreement, DetailOracle},
    event_hist::EventHist,
    linux::Linux,
    meter::{read_device, DEVICE},
    task,
    tool::NOBODY,
    END_PORT, VMM_PORT,
};

/// `_IO(0xE7, 1)`: turn details on while the file is open.
const TURN_ON_DETAILS: libc::Ioctl = 0xe701;

/// Port of the speaker that KVM emulates.
const SPEAKER: u64 = 0x61;

/// Bits in the keys of ports and of memory.
const INPUT: u64 = 1 << 32;
const MEMORY_READ: u64 = 1 << 32;
const MEMORY_WRITE: u64 = 1 << 33;
const MEMORY_FETCH: u64 = 1 << 34;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (program, mode) in [
        (Program::Cpuid, Mode::Long),
        (Program::OutUser, Mode::Long),
        (Program::OutUser, Mode::Real),
        (Program::InUser, Mode::Long),
        (Program::InKernel, Mode::Long),
        (Program::Rdmsr, Mode::Long),
        (Program::Wrmsr, Mode::Long),
        (Program::CrWrite, Mode::Long),
        (Program::Hypercall, Mode::Long),
        (Program::HltUser, Mode::Long),
        (Program::Touch, Mode::Long),
        (Program::Look, Mode::Long),
        (Program::Call, Mode::Long),
        (Program::Device, Mode::Real),
        (Program::Device, Mode::Long),
        (Program::Undefined, Mode::Long),
        (Program::Debug, Mode::Long),
    ] {
        let config = Config::new(program, mode, 200);
        cases.push(Case::with_module(
            "details=1",
            format!("details: {program:?} in {mode:?} mode, row for row"),
            move || compare(config.clone()).map(|_| ()),
        ));
    }
    cases.push(Case::with_module(
        "details=1",
        "details: 2 vCPUs that OUT to the VMM, row for row",
        || {
            let config = Config {
                vcpus: 2,
                ..Config::new(Program::OutUser, Mode::Long, 1000)
            };
            compare(config).map(|_| ())
        },
    ));
    cases.push(Case::with_module(
        "details=1",
        "details: CPUID leaves and subleaves, row for row",
        leaves,
    ));
    cases.push(Case::with_module(
        "details=1",
        "details: CPUID leaves that lose their rows and return are within their bounds",
        || {
            let entries = compare(Config::query(Mode::Long, many_leaves()))?;
            let rows = entries.iter().filter(|entry| !entry.others);
            let bounded = rows
                .filter(|entry| entry.missed != Missed::default())
                .count();
            ensure!(bounded > 0, "no row had to give way");
            Ok(())
        },
    ));
    cases.push(Case::with_module(
        "details=1",
        "details: host interrupts have rows by vector on VMX, and none on SVM",
        interrupts,
    ));
    cases.push(Case::with_module(
        "details=1",
        "details: single-step exceptions have a row on VMX, and none on SVM",
        single_steps,
    ));
    cases.push(Case::with_module(
        "details=1",
        "details: hypercalls by KVM's and by Hyper-V's convention",
        hypercalls,
    ));
    for (name, options) in [
        (
            "details: the boot of a Linux guest, each row within its bound",
            &[][..],
        ),
        (
            "details: the boot of a Linux guest with an xAPIC, each row within its bound",
            &["--", "-cpu", "host,-x2apic"],
        ),
    ] {
        cases.push(
            Case::with_module("details=1", name, || linux_boot(options))
                .with_linux()
                .within(600),
        );
    }
    cases.push(Case::with_module(
        "",
        "details: on by ioctl while the file is open, then off",
        on_and_off,
    ));
    cases.push(Case::with_module(
        "details=1",
        "details: without CAP_PERFMON code is hidden, and details cannot be turned on",
        without_perfmon,
    ));
    cases
}

/// Check that the rows and others in each table of a vCPU sum to the vCPU's ledger. `before` is the
/// number of exits before the vCPU had tables.
pub(super) fn check_sums(snapshot: &Snapshot<'_>, before: u64) -> Result<()> {
    for tables in snapshot.tables() {
        let vcpu = snapshot.vcpus().nth(tables.vcpu).context("its vCPU")?;
        ensure!(tables.since >= vcpu.first() && tables.since <= vcpu.last());
        for table in [TABLE_DETAILS, TABLE_CODE, TABLE_USER] {
            let mut sums = [0_u64; 3];
            for entry in tables.entries().filter(|entry| entry.table == table) {
                sums[0] += entry.exits;
                sums[1] += entry.kernel.unwrap_or(0);
                sums[2] += entry.user.unwrap_or(0);
            }
            let rows = || vcpu.rows();
            let ticks = |phase| rows().map(|row| row.cycles(phase)).sum::<u64>();
            let exits = rows().map(|row| row.exits()).sum::<u64>();
            if table != TABLE_USER {
                ensure!(
                    sums[0] + before == exits,
                    "table {table} has {} exits of {exits}, {before} of them before it",
                    sums[0]
                );
                ensure!(sums[1] <= ticks(Phase::Kernel));
            }
            if table != TABLE_CODE {
                ensure!(sums[2] <= ticks(Phase::User));
            }
            if before == 0 && table != TABLE_USER {
                // The tables have all kernel ticks except those before the first exit.
                let start = rows().find(|row| row.reason() == Reason::Start);
                let start = start.map_or(0, |row| row.cycles(Phase::Kernel));
                ensure!(
                    sums[1] + start == ticks(Phase::Kernel),
                    "table {table}: kernel ticks"
                );
            }
        }
    }
    Ok(())
}

/// Run a guest to its end, and return its rows. Check that they match the kernel's histograms.
fn compare(config: Config) -> Result<Vec<TableRow>> {
    compare_with(config, TinyVm::new, |machine| machine.run().map(drop))
}

/// Do the work of [`compare`] for a machine that `make` creates and `run` runs to its end.
fn compare_with(
    config: Config,
    make: impl FnOnce(Config) -> Result<TinyVm, tiny_guests::Error>,
    run: impl FnOnce(&mut TinyVm) -> Result<(), tiny_guests::Error>,
) -> Result<Vec<TableRow>> {
    let vendor = host::vendor()?;
    let oracle = DetailOracle::begin()?;
    let user = EventHist::begin("kvm_userspace_exit", &["reason"])?;
    let mut machine = make(config.clone())?;
    run(&mut machine)?;
    let bytes = read_device()?;
    let (counts, user) = (oracle.read()?, user.read()?);
    drop(machine);

    let snapshot = Snapshot::parse(&bytes)?;
    ensure!(snapshot.has_tables() && snapshot.without_tables() == 0);
    ensure!(snapshot.tables().count() == usize::from(config.vcpus));
    check_sums(&snapshot, 0)?;
    let entries: Vec<TableRow> = snapshot.tables().flat_map(|it| it.entries()).collect();
    for agreement in counts.check(&entries)? {
        println!("{agreement}");
    }
    let why = rows(&entries, TABLE_USER, Kind::None);
    let user = user.into_iter().map(|(key, hits)| (key[0], hits)).collect();
    check_equal("exits to user space", &why, &user)?;

    // The rows that the guest's program causes.
    let rows = |kind| rows(&entries, TABLE_DETAILS, kind);
    let loops = u64::from(config.loops()) * u64::from(config.vcpus);
    let nested_paging = host::nested_paging()?;
    let byte = 1 << 36;
    let known: &[(Kind, u64, u64)] = match config.program {
        Program::OutUser => &[(Kind::Port, VMM_PORT | byte, loops)],
        Program::InUser => &[(Kind::Port, VMM_PORT | INPUT | byte, loops)],
        Program::InKernel => &[(Kind::Port, SPEAKER | INPUT | byte, loops)],
        Program::Rdmsr => &[(Kind::Msr, 0x8b, loops)],
        Program::Wrmsr => &[(Kind::Msr, 0x8b | 1 << 32, loops)],
        Program::Cpuid => &[(Kind::Cpuid, 0, loops)],
        Program::CrWrite if vendor == Isa::Vmx => &[(Kind::Control, 0, loops)],
        Program::Debug => &[(Kind::Cpuid, 0, 2 * loops)],
        // A hardware exception (SDM, "Format of the VM-Exit Interruption-Information Field").
        Program::Undefined if vendor == Isa::Vmx => &[(Kind::Vector, 6 | 3 << 8, loops)],
        // The first access to each page counts as an access to absent memory.
        Program::Device if nested_paging => &[
            (Kind::Address, REGISTERS, loops - 1),
            (Kind::Address, REGISTERS + 0x10, loops),
            (Kind::Address, REGISTERS + 0x1010, loops - 1),
            (Kind::Memory, REGISTERS >> 30 | MEMORY_WRITE, 1),
            (Kind::Memory, REGISTERS >> 30 | MEMORY_READ, 1),
        ],
        _ => &[],
    };
    for (kind, key, due) in known {
        let counted = rows(*kind).get(key).copied().unwrap_or(0);
        ensure!(
            counted == *due,
            "{kind:?} {key:#x} has {counted} exits of {due}: {:x?}",
            rows(*kind)
        );
    }
    if config.program == Program::Debug && vendor == Isa::Vmx {
        // An interrupt can repeat an exit. On SVM each register has its own exit code.
        let registers = rows(Kind::Debug);
        ensure!(
            registers.keys().eq(&[7, 6 | 1 << 4])
                && registers.values().all(|exits| *exits >= loops),
            "{registers:x?}"
        );
    }
    let ends = rows(Kind::Port).get(&(END_PORT | byte)).copied();
    ensure!(ends == Some(config.vcpus.into()), "{:x?}", rows(Kind::Port));
    let access = match config.program {
        Program::Touch => MEMORY_WRITE,
        Program::Look => MEMORY_READ,
        Program::Call => MEMORY_FETCH,
        _ => 0,
    };
    if access != 0 && nested_paging {
        let pages: u64 = rows(Kind::Memory)
            .into_iter()
            .filter(|(key, _)| key & access != 0 && key & 0x3f_ffff == 0)
            .map(|(_, exits)| exits)
            .sum();
        ensure!(
            pages >= loops,
            "{pages} accesses to {loops} pages: {:x?}",
            rows(Kind::Memory)
        );
    }
    Ok(entries)
}

/// Return the exits of a table's rows with keys of `kind`, by key.
fn rows(entries: &[TableRow], table: u32, kind: Kind) -> BTreeMap<u64, u64> {
    let mut rows = BTreeMap::new();
    for entry in entries {
        if (entry.table, entry.others, entry.detail_kind) == (table, false, kind as u8) {
            *rows.entry(entry.key).or_insert(0) += entry.exits;
        }
    }
    rows
}

/// Return the exits with `code` that have no row of details.
fn others(entries: &[TableRow], code: u32) -> u64 {
    let others = entries.iter().filter(|entry| {
        (entry.table, entry.others, entry.reason) == (TABLE_DETAILS, true, Reason::Code(code))
    });
    others.map(|entry| entry.exits).sum()
}

/// Check that rows and histogram are equal, and name the keys that differ.
fn check_equal(what: &str, rows: &BTreeMap<u64, u64>, hist: &BTreeMap<u64, u64>) -> Result<()> {
    let keys = rows.keys().chain(hist.keys());
    let differences: BTreeMap<_, _> = keys
        .filter(|key| rows.get(*key) != hist.get(*key))
        .map(|key| (key, (rows.get(key), hist.get(key))))
        .collect();
    ensure!(
        differences.is_empty(),
        "{what}: rows and the kernel's histogram differ: {differences:x?}"
    );
    Ok(())
}

/// SVM's exit codes of INTR, for which the CPU gives no vector, and of the exception of vector 0.
const SVM_INTR: u32 = 0x60;
const SVM_EXCEPTION: u32 = 0x40;

fn interrupts() -> Result<()> {
    let entries = compare(Config::new(
        Program::Spin,
        Mode::Long,
        5_000_000 * host::slowdown(),
    ))?;
    let vectors = rows(&entries, TABLE_DETAILS, Kind::Vector);
    match host::vendor()? {
        Isa::Vmx => {
            // The vectors have type 0, external interrupt, and are not those of exceptions.
            ensure!(!vectors.is_empty(), "no interrupt came");
            ensure!(
                vectors.keys().all(|key| (32..256).contains(key)),
                "{vectors:x?}"
            );
            ensure!(
                others(&entries, 1) == 0,
                "some vectors of interrupts have no row"
            );
        }
        Isa::Svm => {
            ensure!(vectors.is_empty(), "{vectors:x?}");
            ensure!(others(&entries, SVM_INTR) > 0, "no interrupt came");
        }
    }
    Ok(())
}

fn single_steps() -> Result<()> {
    const DEBUG: u32 = 1;
    let mut stepped = 0;
    let config = Config::new(Program::Cpuid, Mode::Long, 100);
    let entries = compare_with(config, TinyVm::new, |machine| {
        if let Stepped::ToTheEnd(steps) = machine.step(10_000)? {
            stepped = u64::from(steps);
        }
        Ok(())
    })?;
    ensure!(stepped > 300, "{stepped} steps to the end");
    let vectors = rows(&entries, TABLE_DETAILS, Kind::Vector);
    let key = u64::from(DEBUG) | 3 << 8;
    match host::vendor()? {
        Isa::Vmx => {
            // After an instruction that KVM emulates, CPUID here, KVM delivers the step without an exit
            // (kvm_skip_emulated_instruction()).
            let due = stepped - 100;
            let counted = vectors.get(&key).copied();
            ensure!(counted == Some(due), "{vectors:x?} of {stepped} steps");
        }
        Isa::Svm => {
            ensure!(vectors.is_empty(), "{vectors:x?}");
            let debug = others(&entries, SVM_EXCEPTION + DEBUG);
            ensure!(
                debug == stepped - 100,
                "{debug} exceptions of {stepped} steps"
            );
        }
    }
    Ok(())
}

fn hypercalls() -> Result<()> {
    let config = || Config::new(Program::Hypercall, Mode::Long, 300);
    let run = |machine: &mut TinyVm| machine.run().map(drop);
    // KVM_HC_VAPIC_POLL_IRQ.
    let kvm = compare_with(config(), TinyVm::new, run)?;
    let hyperv = compare_with(config(), TinyVm::with_hyperv, run)?;
    let call = u64::from(NOTIFY_LONG_SPIN_WAIT) | 1 << 32;
    for (entries, call) in [(kvm, 1), (hyperv, call)] {
        let calls = rows(&entries, TABLE_DETAILS, Kind::Hypercall);
        ensure!(calls == BTreeMap::from([(call, 300)]), "{calls:x?}");
    }
    Ok(())
}

/// Boot a Linux guest, stop it, and compare its rows with the kernel's histograms.
fn linux_boot(options: &[&str]) -> Result<()> {
    let oracle = DetailOracle::begin()?;
    let user = EventHist::begin("kvm_userspace_exit", &["reason"])?;
    let linux = Linux::boot(options)?;
    let stopped = task::StoppedProcess::new(linux.pid()?)?;
    let bytes = read_device()?;
    let (counts, user) = (oracle.read()?, user.read()?);
    drop(stopped);
    linux.stop()?;

    let snapshot = Snapshot::parse(&bytes)?;
    ensure!(snapshot.has_tables() && snapshot.without_tables() == 0);
    ensure!(snapshot.tables().count() == 1);
    check_sums(&snapshot, 0)?;
    let entries: Vec<TableRow> = snapshot.tables().flat_map(|it| it.entries()).collect();
    let [details, code] = counts.check(&entries)?;
    println!("details: {details}");
    println!("code: {code}");
    let has_rows = |agreement: Agreement| agreement.rows > 0 && agreement.exact > 0;
    ensure!(has_rows(details) && has_rows(code));
    // There is more code than there are rows, so rows have to give way.
    ensure!(
        code.keys > CODES && code.exact < code.rows && code.others > 0,
        "the boot has too little code: {code}"
    );
    // Each reason with details has some. Without nested paging, memory and devices have none.
    for (code, kind) in host::by_vendor(
        &[
            (30, Kind::Port),
            (32, Kind::Msr),
            (10, Kind::Cpuid),
            (1, Kind::Vector),
            (28, Kind::Control),
            (29, Kind::Debug),
            (48, Kind::Memory),
            (49, Kind::Address),
        ][..],
        &[
            (0x7b, Kind::Port),
            (0x7c, Kind::Msr),
            (0x72, Kind::Cpuid),
            (0x400, Kind::Memory),
            (0x400, Kind::Address),
        ],
    )? {
        let nested_paging = host::nested_paging()?;
        let is_paging = matches!(kind, Kind::Memory | Kind::Address);
        let counted = counts.by_key(*code, *kind);
        ensure!(
            counted.is_empty() == (is_paging && !nested_paging),
            "reason {code} has the {kind:?} details {counted:x?}"
        );
        println!("{kind:?} of reason {code:#x}: {} keys", counted.len());
    }
    if !options.is_empty() && host::nested_paging()? {
        // Without APICv KVM does not map the APIC's page, and emulates each access
        // (kvm_mmu_faultin_pfn()). On VMX the access counts for the memory of its GiB, on SVM for a
        // device.
        let (code, kind) = host::by_vendor((48, Kind::Memory), (0x400, Kind::Address))?;
        let is_apic = |key: u64| match kind {
            Kind::Memory => key & 0x3f_ffff == 3,
            _ => key >> 12 == 0xfee00,
        };
        let counted = counts.by_key(code, kind).into_iter();
        let accesses: u64 = counted
            .filter(|(key, _)| is_apic(*key))
            .map(|(_, hits)| hits)
            .sum();
        ensure!(accesses > 50, "{accesses} accesses to the APIC");
        println!("{accesses} accesses to the APIC");
    }
    let why = rows(&entries, TABLE_USER, Kind::None);
    let mut user: BTreeMap<_, _> = user.into_iter().map(|(key, hits)| (key[0], hits)).collect();
    // QEMU's first KVM_RUN may return at once for a signal, as KVM_EXIT_UNKNOWN. The vCPU has not
    // exited yet, so no reason has a row for it.
    ensure!(user.remove(&0).is_none_or(|hits| hits == 1), "{user:?}");
    check_equal("exits to user space", &why, &user)
}

fn leaves() -> Result<()> {
    let asked = [
        (0, 0),
        (1, 5),
        (7, 0),
        (7, 1),
        (0xd, 0),
        (0xd, 1),
        (0xd, 1),
        (0x8000_0000, 3),
        (0x4fff_fffc, 10),
        (0x4fff_fffc, 0x72),
        (0xd, 0xffff_ffff),
    ];
    let queries = asked.map(|(leaf, subleaf)| Registers64::cpuid(leaf, subleaf));
    compare(Config::query(Mode::Long, queries.to_vec())).map(|_| ())
}

/// Return queries of more leaves than the rows have room for, each twice. Some leaves lose their row
/// and return.
pub(super) fn many_leaves() -> Vec<Registers64> {
    const LEAVES: u32 = 255;
    (0..2 * LEAVES)
        .map(|number| Registers64::cpuid(0x1000_0000 + number % LEAVES, 0))
        .collect()
}

/// Turn details on while a file is open.
pub(super) fn turn_on(file: &File) -> io::Result<()> {
    // SAFETY: The ioctl takes no argument.
    match unsafe { libc::ioctl(file.as_raw_fd(), TURN_ON_DETAILS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Return the number of vCPUs with tables, and true if details are on.
pub(super) fn details_state() -> Result<(usize, bool)> {
    let bytes = read_device()?;
    let snapshot = Snapshot::parse(&bytes)?;
    Ok((snapshot.tables().count(), snapshot.has_tables()))
}

fn on_and_off() -> Result<()> {
    let run = |machine: &mut TinyVm| machine.run().map(|_| ());
    let config = || Config::new(Program::Cpuid, Mode::Long, 500);
    let mut before = TinyVm::new(config())?;
    run(&mut before)?;
    ensure!(
        details_state()? == (0, false),
        "details are on by themselves"
    );
    let (one, other) = (File::open(DEVICE)?, File::open(DEVICE)?);
    turn_on(&one)?;
    turn_on(&one)?;
    turn_on(&other)?;
    ensure!(
        details_state()? == (0, true),
        "a vCPU that has not exited since has tables"
    );
    // Only a vCPU that exits while details are on gets tables.
    let mut machine = TinyVm::new(config())?;
    run(&mut machine)?;
    ensure!(details_state()? == (1, true));
    drop(one);
    ensure!(
        details_state()? == (1, true),
        "closing the first file turns details off"
    );
    let bytes = read_device()?;
    let snapshot = Snapshot::parse(&bytes)?;
    let exits: u64 = snapshot
        .tables()
        .flat_map(|it| it.entries())
        .filter(|entry| entry.table == TABLE_DETAILS && entry.detail_kind == Kind::Cpuid as u8)
        .map(|entry| entry.exits)
        .sum();
    ensure!(exits == 500, "{exits} exits of CPUID");
    drop(other);
    ensure!(
        details_state()? == (0, false),
        "closing the last file leaves details on"
    );
    drop(machine);
    drop(before);
    // Turn details on and off as fast as possible while a guest runs.
    let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 200_000))?;
    let switched = std::thread::scope(|scope| {
        let guest = scope.spawn(|| run(&mut machine));
        let mut switched = 0;
        while !guest.is_finished() {
            let file = File::open(DEVICE)?;
            turn_on(&file)?;
            for _ in 0..3 {
                let bytes = read_device()?;
                let snapshot = Snapshot::parse(&bytes)?;
                for tables in snapshot.tables() {
                    for entry in tables.entries() {
                        let sums = [Some(entry.exits), entry.kernel, entry.user];
                        ensure!(
                            sums.iter().flatten().all(|sum| *sum < 1 << 50),
                            "a row holds an impossible number: {entry:x?}"
                        );
                    }
                }
            }
            switched += 1;
        }
        task::join(guest)?;
        Ok(switched)
    })?;
    ensure!(
        switched > 3,
        "{switched} times on and off while a guest ran"
    );
    ensure!(details_state()? == (0, false));
    Ok(())
}

fn without_perfmon() -> Result<()> {
    let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    machine.run()?;
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o444))?;
    let read_as = |nobody: bool| -> Result<(Vec<u8>, io::Result<()>)> {
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                if nobody {
                    // SAFETY: The raw system call changes this thread only.
                    let changed =
                        unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
                    ensure!(changed == 0, "this thread stays root's");
                }
                let file = File::open(DEVICE)?;
                let refused = turn_on(&file);
                let mut bytes = Vec::new();
                (&file).read_to_end(&mut bytes)?;
                Ok((bytes, refused))
            });
            task::join(reader)
        })
    };
    let as_root = read_as(false);
    let as_nobody = read_as(true);
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o440))?;
    let ((as_root, turned), (as_nobody, refused)) = (as_root?, as_nobody?);
    turned?;
    let refused = refused.err().and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EPERM), "the ioctl gives {refused:?}");
    let has = |bytes: &[u8], table| -> Result<bool> {
        let snapshot = Snapshot::parse(bytes)?;
        let tables = snapshot.tables().next().context("tables")?;
        Ok(tables.has(table))
    };
    ensure!(has(&as_root, TABLE_CODE)? && has(&as_root, TABLE_DETAILS)?);
    ensure!(!has(&as_nobody, TABLE_CODE)? && has(&as_nobody, TABLE_DETAILS)?);
    Ok(())
}
