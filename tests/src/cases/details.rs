//! What exits were about, and which code of the guest's caused them: row for row what the kernel's
//! own histograms count, while nothing has to give way.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    detail::{self, Kind},
    phase::Phase,
    reader::{Entry, Missed, Snapshot},
    reasons::Isa,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS, TABLE_USER},
};
use tiny_guests::{Config, Machine, Mode, Program, Quad};

use super::Case;
use crate::host::{
    self,
    keyed::{Counts, Keyed},
};

pub(super) const DEVICE: &str = "/dev/exitmeter";

/// `_IO(0xE7, 1)`: turn details on while the file is open.
const TURN_ON_DETAILS: libc::Ioctl = 0xe701;

/// The port that ends a tiny guest, and the one that its VMM answers.
const PORTS: [u64; 2] = [0xf4, 0x3f0];

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
    ] {
        let config = Config::new(program, mode, 200);
        cases.push(Case::with(
            "details=1",
            format!("details: {program:?} in {mode:?} mode, row for row"),
            move || compare(config.clone()).map(|_| ()),
        ));
    }
    cases.push(Case::with(
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
    cases.push(Case::with(
        "details=1",
        "details: leaves and subleaves of CPUID, row for row",
        leaves,
    ));
    cases.push(Case::with(
        "details=1",
        "details: more leaves of CPUID than there are rows sum to the exits",
        || compare(Config::query(Mode::Long, many_leaves())).map(|_| ()),
    ));
    cases.push(Case::with(
        "",
        "details: on by an ioctl while the file is open, then off",
        on_and_off,
    ));
    cases.push(Case::with(
        "details=1",
        "details: without CAP_PERFMON no code is told, and nothing turned on",
        rights,
    ));
    cases
}

/// Return a snapshot's bytes.
pub(super) fn read() -> Result<Vec<u8>> {
    fs::read(DEVICE).with_context(|| format!("{DEVICE} cannot be read"))
}

/// Demand that a vCPU's rows and others sum to what its reasons have; `before` is what these had
/// before the tables, by code.
fn sums(snapshot: &Snapshot<'_>, before: u64) -> Result<()> {
    for tables in snapshot.tables() {
        let vcpu = snapshot.vcpus().nth(tables.vcpu).context("its vCPU")?;
        ensure!(tables.since >= vcpu.first() && tables.since <= vcpu.last());
        for table in [TABLE_DETAILS, TABLE_CODE, TABLE_USER] {
            let mut told = [0_u64; 3];
            for entry in tables.entries().filter(|entry| entry.table == table) {
                told[0] += entry.exits;
                told[1] += entry.kernel.unwrap_or(0);
                told[2] += entry.user.unwrap_or(0);
            }
            let rows = || vcpu.rows();
            let ticks = |phase| rows().map(|row| row.cycles(phase)).sum::<u64>();
            let exits = rows().map(|row| row.exits()).sum::<u64>();
            if table != TABLE_USER {
                ensure!(
                    told[0] + before == exits,
                    "table {table} has {} exits of {exits}, {before} of them before it",
                    told[0]
                );
                ensure!(told[1] <= ticks(Phase::Kernel));
            }
            if table != TABLE_CODE {
                ensure!(told[2] <= ticks(Phase::User));
            }
            if before == 0 && table != TABLE_USER {
                // All but the time before the first exit.
                let start = rows().find(|row| row.reason() == Reason::Start);
                let start = start.map_or(0, |row| row.cycles(Phase::Kernel));
                ensure!(
                    told[1] + start == ticks(Phase::Kernel),
                    "table {table}: kernel ticks"
                );
            }
        }
    }
    Ok(())
}

/// Run a guest to its end; return its snapshot, which agrees row for row with the kernel's
/// histograms.
fn compare(config: Config) -> Result<Vec<u8>> {
    let isa = host::isa()?;
    let pio = Keyed::begin("kvm_pio", &["port", "rw"])?;
    let cpuid = Keyed::begin("kvm_cpuid", &["function", "index"])?;
    let msr = Keyed::begin("kvm_msr", &["ecx", "write"])?;
    let code = Keyed::begin("kvm_exit", &["exit_reason", "guest_rip"])?;
    let user = Keyed::begin("kvm_userspace_exit", &["reason"])?;
    let mut machine = Machine::new(config.clone())?;
    machine.run()?;
    let bytes = read()?;
    let hists = [
        pio.read()?,
        cpuid.read()?,
        msr.read()?,
        code.read()?,
        user.read()?,
    ];
    drop(machine);
    let [pio, cpuid, msr, code, user] = hists;

    let snapshot = Snapshot::parse(&bytes)?;
    ensure!(snapshot.has_tables() && snapshot.without_tables() == 0);
    ensure!(snapshot.tables().count() == usize::from(config.vcpus));
    sums(&snapshot, 0)?;
    let entries: Vec<Entry> = snapshot.tables().flat_map(|it| it.entries()).collect();
    let evicted = entries
        .iter()
        .any(|entry| entry.missed != Missed::default());

    let of = |table: u32, kind: Kind| {
        entries.iter().filter(move |entry| {
            entry.table == table && !entry.others && entry.detail_kind == kind as u8
        })
    };
    let counted = |rows: &mut dyn Iterator<Item = (Vec<u64>, u64)>| {
        let mut counts = Counts::new();
        for (key, exits) in rows {
            *counts.entry(key).or_insert(0) += exits;
        }
        counts
    };
    let ports = counted(&mut of(TABLE_DETAILS, Kind::Port).map(|entry| {
        let out = u64::from(entry.key >> 32 & 1 == 0);
        (vec![entry.key & 0xffff, out], entry.exits)
    }));
    same("ports", &ports, &pio)?;
    let leaves = counted(
        &mut of(TABLE_DETAILS, Kind::Cpuid)
            .map(|entry| (vec![entry.key & 0xffff_ffff, entry.key >> 32], entry.exits)),
    );
    let asked = counted(&mut cpuid.into_iter().map(|(key, hits)| {
        let subleaf = match detail::has_subleaves(key[0] as u32) {
            true => key[1].min(detail::LAST_SUBLEAF.into()),
            false => 0,
        };
        (vec![key[0], subleaf], hits)
    }));
    let msrs = counted(&mut of(TABLE_DETAILS, Kind::Msr).map(|entry| {
        (
            vec![entry.key & 0xffff_ffff, entry.key >> 32 & 1],
            entry.exits,
        )
    }));
    same("MSRs", &msrs, &msr)?;
    let rips = counted(&mut of(TABLE_CODE, Kind::None).map(|entry| {
        let Reason::Code(code) = entry.reason else {
            return (vec![u64::MAX], entry.exits);
        };
        (vec![code.into(), entry.key], entry.exits)
    }));
    let exits = counted(&mut code.into_iter().map(|(key, hits)| {
        // A failed entry has bit 31 set.
        let mask = if isa == Isa::Vmx { 0xffff } else { u64::MAX };
        (vec![key[0] & mask, key[1]], hits)
    }));
    if evicted {
        ensure!(leaves.values().sum::<u64>() < asked.values().sum::<u64>());
    } else {
        same("leaves", &leaves, &asked)?;
        same("code", &rips, &exits)?;
    }
    let why = counted(&mut of(TABLE_USER, Kind::None).map(|entry| (vec![entry.key], entry.exits)));
    same("exits to user space", &why, &user)?;

    // What the guest is known to do.
    let loops = u64::from(config.loops()) * u64::from(config.vcpus);
    let known = |counts: &Counts, key: &[u64]| counts.get(key).copied().unwrap_or(0);
    ensure!(
        known(&ports, &[PORTS[0], 1]) == u64::from(config.vcpus),
        "{ports:?}"
    );
    match config.program {
        Program::OutUser => ensure!(known(&ports, &[PORTS[1], 1]) == loops, "{ports:?}"),
        Program::InUser => ensure!(known(&ports, &[PORTS[1], 0]) == loops, "{ports:?}"),
        Program::Rdmsr => ensure!(known(&msrs, &[0x8b, 0]) == loops, "{msrs:?}"),
        Program::Wrmsr => ensure!(known(&msrs, &[0x8b, 1]) == loops, "{msrs:?}"),
        Program::Cpuid => ensure!(known(&leaves, &[0, 0]) == loops, "{leaves:?}"),
        Program::Hypercall => {
            let calls: u64 = of(TABLE_DETAILS, Kind::Hypercall)
                .map(|entry| entry.exits)
                .sum();
            ensure!(calls == loops, "{calls} hypercalls");
        }
        Program::CrWrite if isa == Isa::Vmx => {
            let writes = of(TABLE_DETAILS, Kind::Control).filter(|entry| entry.key == 0);
            let writes: u64 = writes.map(|entry| entry.exits).sum();
            ensure!(writes == loops, "{writes} writes of CR0");
        }
        Program::Touch if host::nested_paging()? => {
            let memory = of(TABLE_DETAILS, Kind::Memory);
            let writes =
                memory.filter(|entry| entry.key >> 33 & 1 != 0 && entry.key & 0x3f_ffff == 0);
            let writes: u64 = writes.map(|entry| entry.exits).sum();
            ensure!(writes >= loops, "{writes} writes to memory of {loops}");
        }
        _ => {}
    }
    Ok(bytes)
}

/// Demand that rows and histogram are the same, and name what is not.
fn same(what: &str, rows: &Counts, hist: &Counts) -> Result<()> {
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
    let queries = asked.map(|(leaf, subleaf)| Quad::cpuid(leaf, subleaf));
    compare(Config::query(Mode::Long, queries.to_vec())).map(|_| ())
}

/// More leaves than there are rows.
fn many_leaves() -> Vec<Quad> {
    (0..500)
        .map(|number| Quad::cpuid(0x1000_0000 + number, 0))
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

/// How many vCPUs have tables, and whether details are on.
fn tables() -> Result<(usize, bool)> {
    let bytes = read()?;
    let snapshot = Snapshot::parse(&bytes)?;
    Ok((snapshot.tables().count(), snapshot.has_tables()))
}

fn on_and_off() -> Result<()> {
    let run = |machine: &mut Machine| machine.run().map(|_| ());
    let config = || Config::new(Program::Cpuid, Mode::Long, 500);
    let mut before = Machine::new(config())?;
    run(&mut before)?;
    ensure!(tables()? == (0, false), "details are on by themselves");
    let (one, other) = (File::open(DEVICE)?, File::open(DEVICE)?);
    turn_on(&one)?;
    turn_on(&one)?;
    turn_on(&other)?;
    ensure!(
        tables()? == (0, true),
        "a vCPU that has not exited since has tables"
    );
    // One that was there before gets them as well, as it exits again.
    let mut machine = Machine::new(config())?;
    run(&mut machine)?;
    ensure!(tables()? == (1, true));
    drop(one);
    ensure!(
        tables()? == (1, true),
        "the first who closes turns details off"
    );
    let bytes = read()?;
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
        tables()? == (0, false),
        "the last who closes leaves details on"
    );
    drop(machine);
    drop(before);
    // While a guest runs, as fast as it goes.
    let mut machine = Machine::new(Config::new(Program::Cpuid, Mode::Long, 200_000))?;
    let switched = std::thread::scope(|scope| {
        let guest = scope.spawn(|| run(&mut machine));
        let mut switched = 0;
        while !guest.is_finished() {
            let file = File::open(DEVICE)?;
            turn_on(&file)?;
            for _ in 0..3 {
                let bytes = read()?;
                let snapshot = Snapshot::parse(&bytes)?;
                for tables in snapshot.tables() {
                    for entry in tables.entries() {
                        let sums = [Some(entry.exits), entry.kernel, entry.user];
                        ensure!(
                            sums.iter().flatten().all(|sum| *sum < 1 << 50),
                            "more is booked on rows than there was: {entry:x?}"
                        );
                    }
                }
            }
            switched += 1;
        }
        guest
            .join()
            .map_err(|_| anyhow::anyhow!("the guest's thread"))??;
        Ok(switched)
    })?;
    ensure!(
        switched > 3,
        "{switched} times on and off while a guest ran"
    );
    ensure!(tables()? == (0, false));
    Ok(())
}

fn rights() -> Result<()> {
    let mut machine = Machine::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    machine.run()?;
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o444))?;
    let read_as = |nobody: bool| -> Result<(Vec<u8>, io::Result<()>)> {
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                if nobody {
                    // SAFETY: The bare call changes this thread alone.
                    let changed =
                        unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
                    ensure!(changed == 0, "this thread stays root's");
                }
                let file = File::open(DEVICE)?;
                let refused = turn_on(&file);
                let mut bytes = Vec::new();
                (&file).read_to_end(&mut bytes)?;
                Ok((bytes, refused))
            });
            reader
                .join()
                .map_err(|_| anyhow::anyhow!("the reader's thread"))?
        })
    };
    let told = read_as(false);
    let untold = read_as(true);
    fs::set_permissions(DEVICE, fs::Permissions::from_mode(0o440))?;
    let ((told, turned), (untold, refused)) = (told?, untold?);
    turned?;
    let refused = refused.err().and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EPERM), "the ioctl gives {refused:?}");
    let has = |bytes: &[u8], table| -> Result<bool> {
        let snapshot = Snapshot::parse(bytes)?;
        let tables = snapshot.tables().next().context("tables")?;
        Ok(tables.has(table))
    };
    ensure!(has(&told, TABLE_CODE)? && has(&told, TABLE_DETAILS)?);
    ensure!(!has(&untold, TABLE_CODE)? && has(&untold, TABLE_DETAILS)?);
    Ok(())
}
