// SPDX-License-Identifier: GPL-2.0

//! The module is refused cleanly, comes and goes, also under running guests, and
//! goes on metering when KVM's own module is exchanged.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    ptr,
    sync::atomic::{AtomicI32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{bail, ensure, Context as _, Result};
use clap::ValueEnum as _;
use exitmeter_meter::reasons::Isa;
use tiny_guests::{Config, Machine, Mode, Program, Quad};

use super::{
    answers::ask,
    hooks::{no_btf, replace},
    no_memory_cgroups, no_userfaultfd, Case,
};
use crate::host::{
    self, cgroup::Cgroup, hist::Exits, leaves::MAP_2021, log::Log, meter::Meter, module, span::Span,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::without_module("loading: wrong parameters are refused", || {
            for (parameters, words) in [
                (
                    "leaf_map=2023",
                    "leaf_map=2023 is refused: it is 2021, 2022, or 0",
                ),
                (
                    "leaf_map=1",
                    "leaf_map=1 is refused: it is 2021, 2022, or 0",
                ),
                (
                    "leaf_map=-1",
                    "leaf_map=-1 is refused: it is 2021, 2022, or 0",
                ),
                // As 32 bits this is 2021.
                (
                    "leaf_map=4294969317",
                    "leaf_map=4294969317 is refused: it is 2021, 2022, or 0",
                ),
                ("max_vcpus=0", "max_vcpus=0 is refused: it is 1 to 65536"),
                ("max_vcpus=-1", "max_vcpus=-1 is refused: it is 1 to 65536"),
                (
                    "max_vcpus=65537",
                    "max_vcpus=65537 is refused: it is 1 to 65536",
                ),
                // And this 1.
                (
                    "max_vcpus=4294967297",
                    "max_vcpus=4294967297 is refused: it is 1 to 65536",
                ),
                (
                    "max_vcpus=-9223372036854775808",
                    "max_vcpus=-9223372036854775808 is refused: it is 1 to 65536",
                ),
                ("copy_tries=25", "copy_tries=25 is refused: it is 0 to 24"),
                ("copy_tries=-1", "copy_tries=-1 is refused: it is 0 to 24"),
                ("leaf_cpl=1", "leaf_cpl=1 is refused: it is 3 or 0"),
                ("leaf_cpl=2", "leaf_cpl=2 is refused: it is 3 or 0"),
                ("leaf_cpl=4", "leaf_cpl=4 is refused: it is 3 or 0"),
                ("leaf_cpl=-1", "leaf_cpl=-1 is refused: it is 3 or 0"),
                // As 32 bits this is 3.
                (
                    "leaf_cpl=4294967299",
                    "leaf_cpl=4294967299 is refused: it is 3 or 0",
                ),
                ("host_scope=2", "host_scope=2 is refused: it is 0 or 1"),
                ("host_scope=300", "host_scope=300 is refused: it is 0 or 1"),
                ("log_queries=2", "log_queries=2 is refused: it is 0 or 1"),
                ("log_queries=-1", "log_queries=-1 is refused: it is 0 or 1"),
            ] {
                refused(parameters, libc::EINVAL, words)?;
            }
            // No numbers of 64 bits: these the kernel refuses by itself, before the module runs.
            for (parameters, error) in [
                ("leaf_map=x", libc::EINVAL),
                ("leaf_map=99999999999999999999", libc::ERANGE),
                ("host_scope=maybe", libc::EINVAL),
                ("leaf_cpl=kernel", libc::EINVAL),
            ] {
                refused(parameters, error, "")?;
            }
            ensure!(
                fs::metadata("/dev/exitmeter").is_err(),
                "a refused module leaves /dev/exitmeter behind"
            );
            meters_again()
        }),
        Case::without_module("loading: host_scope=1 is warned of", || {
            const WORDS: &str = "host_scope=1: each guest reads the exits and times of all VMs";
            for (parameters, warned) in [
                ("host_scope=1", true),
                ("host_scope=0", false),
                // Which guests read nothing of.
                ("host_scope=1 leaf_map=0", false),
            ] {
                let mut log = Log::from_now()?;
                module::Loaded::with(parameters)?.unload()?;
                let lines: Vec<(u32, String)> = log.module_records()?;
                // Warnings are level 4, and reach a console that is quiet by default.
                let told = lines
                    .iter()
                    .any(|(level, line)| *level == 4 && line.starts_with(WORDS));
                ensure!(
                    told == warned,
                    "({parameters}) is loaded with the lines {lines:?}"
                );
            }
            Ok(())
        }),
        Case::without_module("loading: twice at once is refused", || {
            let loaded = module::Loaded::with("")?;
            refused("", libc::EEXIST, "")?;
            loaded.unload()
        }),
        Case::without_module("loading: load, unload, load again", || {
            meters_again()?;
            meters_again()
        }),
        Case::with_module("", "loading: ftrace cannot be turned off under it", || {
            // Since Linux 7 no more (EOPNOTSUPP); before, not under a hook that is marked
            // permanent (EBUSY).
            let path = "/proc/sys/kernel/ftrace_enabled";
            let error = fs::write(path, "0")
                .err()
                .and_then(|error| error.raw_os_error());
            ensure!(
                matches!(error, Some(libc::EBUSY | libc::EOPNOTSUPP)),
                "turning ftrace off ends with {error:?} instead of EBUSY or EOPNOTSUPP"
            );
            let query = Quad::cpuid(MAP_2021.reason_exits, host::pick(10, 0x72)?);
            let answers = ask(Mode::Long, &[query, query])?.1;
            ensure!(
                answers[1].rax == 2,
                "then a guest reads {:x?} of its CPUID exits",
                answers[1]
            );
            Ok(())
        }),
        Case::without_module(
            "loading: comes and goes under a running guest",
            comes_and_goes,
        ),
        Case::with_module(
            "max_vcpus=1",
            "loading: past max_vcpus a vCPU runs on unmetered",
            past_max_vcpus,
        ),
        Case::without_module(
            "loading: a vCPU's ledger is charged to the cgroup of its VMM",
            charged,
        )
        .skip_if(no_memory_cgroups),
        Case::without_module(
            "loading: a vCPU for which there was no room is not metered in mid-life",
            not_in_mid_life,
        )
        .within(120),
        Case::with_module(
            "",
            "loading: goes on metering when KVM's module comes back with other parameters",
            exchanged,
        )
        .within(180),
        Case::without_module("loading: without KVM's modules is refused", || {
            let (vendor, paging) = (module::vendor()?, host::nested_paging()?);
            module::unload_vendor()?;
            let without_vendor = refused(
                "",
                libc::ENODEV,
                &format!("{vendor} is not loaded: run 'modprobe {vendor}' first"),
            );
            module::remove("kvm")?;
            // The kernel cannot link the module without kvm.ko.
            let without_kvm = refused("", libc::ENOENT, "");
            module::load_vendor(paging)?;
            without_vendor?;
            without_kvm?;
            meters_again()
        })
        .within(180),
        Case::without_module(
            "loading: tracepoints of another prototype are refused",
            other_prototypes,
        )
        .skip_if(no_btf),
        Case::without_module(
            "loading: unloading waits for a vCPU that sleeps in the query's emulation",
            asleep,
        )
        .skip_if(never_fetches),
    ]
}

/// Demands that the module is refused with an error, and says why.
fn refused(parameters: &str, errno: i32, words: &str) -> Result<()> {
    let mut log = Log::from_now()?;
    let was_loaded = module::is_loaded("exitmeter")?;
    let error = module::try_load(parameters).err();
    if error.is_none() {
        module::unload()?;
    }
    let number = error.as_ref().and_then(io::Error::raw_os_error);
    ensure!(
        number == Some(errno),
        "({parameters}) ends with {error:?} instead of {}",
        io::Error::from_raw_os_error(errno)
    );
    let lines = log.module_lines()?;
    ensure!(
        words.is_empty() || lines.iter().any(|line| line.contains(words)),
        "({parameters}) is refused with the lines {lines:?} instead of '{words}'"
    );
    ensure!(
        module::is_loaded("exitmeter")? == was_loaded,
        "({parameters}) is refused, and the module is there"
    );
    Ok(())
}

/// Loads the module, meters a guest, and unloads it.
fn meters_again() -> Result<()> {
    let mut log = Log::from_now()?;
    let loaded = module::Loaded::with("")?;
    let mut lines = log.module_lines()?;
    let unchecked = lines.len();
    lines.retain(|line| !line.contains(UNCHECKED));
    let unchecked = unchecked - lines.len();
    ensure!(
        unchecked == usize::from(!Path::new(TYPES).exists()),
        "the module says {unchecked} times that the tracepoints are not checked"
    );
    ensure!(
        matches!(&lines[..], [line] if line.starts_with("version ") && line.contains("hooked")),
        "the module says {lines:?} when it is loaded"
    );
    let mode = fs::metadata("/dev/exitmeter")?.permissions().mode() & 0o7777;
    ensure!(mode == 0o440, "/dev/exitmeter has mode {mode:o}");
    let span = Span::begin()?;
    let config = Config::new(Program::Cpuid, Mode::Long, 500);
    Machine::new(config.clone())?.run()?;
    let exits = span.end()?;
    host::expected(&config)?.check(&exits)?;
    loaded.unload()?;
    let lines = log.module_lines()?;
    let row = lines.iter().find(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(1) == Some(&"CPUID") && words.get(2) == Some(&"500")
    });
    ensure!(
        row.is_some(),
        "the table at unload has no row of 500 CPUID exits: {lines:#?}"
    );
    Ok(())
}

/// The line of the module on a kernel whose tracepoints it cannot check.
pub(super) const UNCHECKED: &str = "this kernel shows no types of kvm";

/// The kernel's types of kvm.ko.
const TYPES: &str = "/sys/kernel/btf/kvm";

/// Other types of kvm.ko in the place of the kernel's, for as long as this lives.
struct OtherTypes(());

impl OtherTypes {
    fn new(bytes: &[u8]) -> Result<Self> {
        fs::write("/tmp/types", bytes).context("/tmp/types cannot be written")?;
        // SAFETY: Strings that end with a NUL, and nothing else to read.
        let ret = unsafe {
            libc::mount(
                c"/tmp/types".as_ptr(),
                c"/sys/kernel/btf/kvm".as_ptr(),
                ptr::null(),
                libc::MS_BIND,
                ptr::null(),
            )
        };
        ensure!(ret == 0, "{TYPES}: {}", io::Error::last_os_error());
        Ok(Self(()))
    }
}

impl Drop for OtherTypes {
    fn drop(&mut self) {
        // SAFETY: As in `new`.
        if unsafe { libc::umount(c"/sys/kernel/btf/kvm".as_ptr()) } != 0 {
            eprintln!("{TYPES} stays: {}", io::Error::last_os_error());
        }
    }
}

/// The kernel's own types, in which tracepoints have changed names.
fn other_prototypes() -> Result<()> {
    let types = fs::read(TYPES).context(TYPES)?;
    let named = |from: &str, to: &str| {
        ensure!(from.len() == to.len(), "{from} and {to} differ in length");
        let name = |name: &str| format!("\0btf_trace_{name}\0").into_bytes();
        let other = replace(&types, &name(to), &name(&"x".repeat(to.len())));
        let other = replace(&other, &name(from), &name(to));
        ensure!(other != types, "{TYPES} has no {from}");
        anyhow::Ok(other)
    };
    for (tracepoint, as_other, words) in [
        (
            "kvm_exit",
            "kvm_mmio",
            "this kernel's tracepoint kvm:kvm_exit calls void (void *, int, int, u64, void *), and \
             exitmeter takes void (void *, struct kvm_vcpu *, u32): they differ in the number of \
             parameters",
        ),
        (
            "kvm_entry",
            "kvm_cpuid",
            ", and exitmeter takes void (void *, struct kvm_vcpu *, bool): they differ in the \
             number of parameters",
        ),
    ] {
        let _other = OtherTypes::new(&named(as_other, tracepoint)?)?;
        refused("", libc::ENOEXEC, words)?;
    }
    // What cannot be compared is told of, and does not keep the module out.
    for (bytes, words) in [
        (
            named("kvm_exit", "xvm_exit")?,
            "kvm_exit is taken for what it was when exitmeter was written: the types of kvm in \
             /sys/kernel/btf do not hold it",
        ),
        (
            types[..types.len() / 2].to_vec(),
            "kvm_entry is taken for what it was when exitmeter was written: the types of kvm in \
             /sys/kernel/btf cannot be read",
        ),
    ] {
        let _other = OtherTypes::new(&bytes)?;
        let mut log = Log::from_now()?;
        module::Loaded::with("")?.unload()?;
        let lines: Vec<(u32, String)> = log.module_records()?;
        // Warnings are level 4.
        ensure!(
            lines
                .iter()
                .any(|(level, line)| *level == 4 && line.starts_with(words)),
            "the module is loaded with the lines {lines:?} instead of '{words}'"
        );
    }
    meters_again()
}

/// A guest runs, for some 15 s, while the module is loaded, unloaded and loaded again.
fn comes_and_goes() -> Result<()> {
    const LOOPS: u32 = 3000;
    let config = Config {
        pause: Duration::from_millis(5),
        ..Config::new(Program::OutUser, Mode::Long, LOOPS)
    };
    let mut machine = Machine::new(config)?;
    thread::scope(|scope| {
        let guest = scope.spawn(|| machine.run());
        for round in 1..=3 {
            let loaded = module::Loaded::with("")?;
            thread::sleep(Duration::from_millis(100));
            let meter = Meter::read()?;
            ensure!(
                !guest.is_finished(),
                "the guest ended before the module came for the {round}. time"
            );
            // The VM was there before the module, and is metered from its next event.
            let exits = meter.only()?.numbers.exits_of(host::pick(30, 0x7b)?);
            ensure!(
                exits > 0,
                "a guest that ran before the module was loaded is not metered"
            );
            loaded.unload()?;
        }
        let seen = guest.join().ok().context("the guest's thread panicked")??;
        ensure!(
            seen[0].ports == u64::from(LOOPS),
            "the guest wrote {} times to its port instead of {LOOPS}",
            seen[0].ports
        );
        Ok(())
    })
}

/// Four vCPUs where one may be metered.
fn past_max_vcpus() -> Result<()> {
    const VCPUS: u8 = 4;
    let mut log = Log::from_now()?;
    let cpuid = host::pick(10, 0x72)?;
    let query = Quad::cpuid(MAP_2021.reason_exits, cpuid);
    module::unload()?;
    let without = ask(Mode::Long, &[query])?.1[0];
    module::load("max_vcpus=1")?;
    let mut machine = Machine::new(Config {
        vcpus: VCPUS,
        ..Config::query(Mode::Long, vec![query; 100])
    })?;
    machine.run()?;
    let meter = Meter::read()?;
    ensure!(
        meter.own().len() == 1 && meter.unmetered == 3,
        "of {VCPUS} vCPUs {} are metered and {} are not",
        meter.own().len(),
        meter.unmetered
    );
    let metered: Vec<u64> = machine.answers(0).iter().map(|answer| answer.rax).collect();
    ensure!(
        metered == (1..=100).collect::<Vec<u64>>(),
        "the metered vCPU reads {metered:?}"
    );
    for vcpu in 1..VCPUS {
        ensure!(
            machine
                .answers(vcpu)
                .iter()
                .all(|answer| *answer == without),
            "vCPU {vcpu} is not metered and reads something else than KVM's {without:x?}"
        );
    }
    let lines = log.module_lines()?;
    let said = lines
        .iter()
        .filter(|line| line.contains("a vCPU runs unmetered: max_vcpus=1 are metered already"))
        .count();
    ensure!(said == 1, "the log says so {said} times: {lines:?}");
    drop(machine);
    // The first went first, and the others were loaded once more as they went.
    Meter::check_counts(0, 3, 1)?;

    // There is room again.
    let (_machine, answers) = ask(Mode::Long, &[query])?;
    ensure!(answers[0].rax >= 1, "the next VM is not metered");
    ensure!(
        Meter::read()?.own().len() == 1,
        "the next VM is not metered"
    );
    Ok(())
}

/// A VM of three vCPUs comes when the one that may be metered is there, and runs when that goes.
fn not_in_mid_life() -> Result<()> {
    let loaded = module::Loaded::with("max_vcpus=1")?;
    let config = |vcpus, count| Config {
        vcpus,
        pause: Duration::from_millis(5),
        ..Config::new(Program::OutUser, Mode::Long, count)
    };
    let mut first = Machine::new(config(1, 1))?;
    first.run()?;
    let mut late = Machine::new(config(3, 200))?;
    thread::scope(|scope| {
        let guest = scope.spawn(|| late.run());
        thread::sleep(Duration::from_millis(100));
        Meter::check_counts(1, 3, 0)?;
        drop(first);
        thread::sleep(Duration::from_millis(200));
        Meter::check_counts(0, 3, 1)?;
        ensure!(
            !guest.is_finished(),
            "the guest ended before there was room"
        );
        guest.join().ok().context("the guest's thread panicked")??;
        anyhow::Ok(())
    })?;
    late.rewind()?;
    late.run()?;
    Meter::check_counts(0, 3, 1)?;

    // The room is for who comes new.
    let mut new = Machine::new(config(1, 1))?;
    new.run()?;
    Meter::check_counts(1, 3, 1)?;
    drop(late);
    Meter::check_counts(1, 3, 1)?;
    drop(new);
    Meter::check_counts(0, 3, 2)?;
    loaded.unload()
}

/// KVM fetches the instruction itself on SVM without NRIPS alone, and the guest's trick takes
/// nested paging: without, KVM sees it change its page table.
fn never_fetches() -> Result<Option<&'static str>> {
    let cpus = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let fetches = host::isa()? == Isa::Svm
        && host::nested_paging()?
        && !cpus.split_whitespace().any(|flag| flag == "nrip_save");
    if !fetches {
        return Ok(Some("KVM does not fetch a guest's CPUID from memory here"));
    }
    no_userfaultfd()
}

/// Read the kernel's stack of a thread that is about to sleep: there is none of one that runs.
fn stack_of_sleeping(thread_id: i32) -> Result<String> {
    let path = format!("/proc/self/task/{thread_id}/stack");
    for _ in 0..500 {
        let stack = fs::read_to_string(&path).with_context(|| path.clone())?;
        if !stack.is_empty() {
            return Ok(stack);
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("a thread that waits for a page does not sleep")
}

/// This process, as a VMM in a cgroup of its own, makes vCPUs without the module and with it.
fn charged() -> Result<()> {
    const VMS: u64 = 3;
    const EACH: u8 = 15;
    /// What the module keeps for a vCPU, in bytes.
    const LEDGER: u64 = 32 * 1024;
    let group = Cgroup::of_this_process()?;
    let kernel_memory_of_vcpus = || -> Result<u64> {
        let before = group.kernel_memory()?;
        let machines = (0..VMS)
            .map(|_| {
                Machine::new(Config {
                    vcpus: EACH,
                    ..Config::new(Program::Cpuid, Mode::Long, 1)
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let after = group.kernel_memory()?;
        drop(machines);
        Ok(after.saturating_sub(before))
    };
    // What is allocated once for all is there after the first time.
    kernel_memory_of_vcpus()?;
    let without = kernel_memory_of_vcpus()?;
    let loaded = module::Loaded::with("")?;
    let with = kernel_memory_of_vcpus()?;
    loaded.unload()?;
    let due = VMS * u64::from(EACH) * LEDGER;
    println!("{without} bytes without the module, {with} with it, {due} are the ledgers'");
    let more = with.saturating_sub(without);
    // Some of it may be in pages that were charged before.
    ensure!(
        (due * 9 / 10..due * 2).contains(&more),
        "{more} bytes more are charged with the module, where the ledgers take {due}"
    );
    Ok(())
}

/// A vCPU sleeps in KVM's own `kvm_emulate_cpuid()`, which the module called, while that goes.
fn asleep() -> Result<()> {
    let cpuid = host::pick(10, 0x72)?;
    let mut log = Log::from_now()?;
    let loaded = module::Loaded::with("")?;
    let (mut machine, absent) =
        Machine::with_absent_code(Quad::cpuid(MAP_2021.reason_exits, cpuid))?;
    let thread_id = AtomicI32::new(0);
    let (stack, finished_early) = thread::scope(|scope| {
        let guest = scope.spawn(|| {
            machine.run_with(|_| {
                // SAFETY: No requirements.
                thread_id.store(unsafe { libc::gettid() }, Ordering::Relaxed);
                Ok(())
            })
        });
        let unloading = (|| {
            absent.wait_until_wanted(Duration::from_secs(10))?;
            let stack = stack_of_sleeping(thread_id.load(Ordering::Relaxed))?;
            let unload = scope.spawn(|| loaded.unload());
            thread::sleep(Duration::from_secs(4));
            anyhow::Ok((stack, unload.is_finished(), unload))
        })();
        // Whatever came, nobody is left asleep.
        absent.provide()?;
        guest.join().ok().context("the guest's thread panicked")??;
        let (stack, finished_early, unload) = unloading?;
        unload.join().ok().context("unloading panicked")??;
        anyhow::Ok((stack, finished_early))
    })?;
    ensure!(
        [
            "handle_userfault",
            "kvm_skip_emulated_instruction",
            "[exitmeter]"
        ]
        .iter()
        .all(|words| stack.contains(words)),
        "the vCPU slept elsewhere: {stack}"
    );
    ensure!(
        !finished_early,
        "the module went while a vCPU slept in it: {stack}"
    );
    let answer = machine.registers()?;
    ensure!(
        answer
            == Quad {
                rax: 1,
                ..Quad::default()
            },
        "the vCPU reads {answer:x?} of its only CPUID exit"
    );
    let lines = log.module_lines()?;
    let waits = "unloading waits: 1 vCPU sleeps in kvm_emulate_cpuid()";
    ensure!(
        lines.iter().filter(|line| line.contains(waits)).count() == 1,
        "the log does not say once that unloading waits: {lines:#?}"
    );
    meters_again()
}

/// KVM's vendor module is taken out and put back under the meter, without nested paging
/// where it had it and the other way round.
fn exchanged() -> Result<()> {
    let paging = host::nested_paging()?;
    let before = meter_all()?;
    module::unload_vendor()?;
    ensure!(
        module::is_loaded("exitmeter")?,
        "the meter went with {}",
        module::vendor()?
    );
    module::load_vendor(!paging)?;
    let other = (|| {
        ensure!(host::nested_paging()? != paging, "KVM came back as it was");
        meter_all()
    })();
    module::unload_vendor()?;
    module::load_vendor(paging)?;
    let other = other?;
    let after = meter_all()?;

    let fault = host::pick(48, 0x400)?;
    ensure!(
        before.contains_key(&fault) == paging
            && other.contains_key(&fault) != paging
            && after.contains_key(&fault) == paging,
        "nested paging was {paging}, {}, {paging}, and the exits: {before:?}, {other:?}, {after:?}",
        !paging
    );
    Ok(())
}

/// Meters each guest in 64-bit mode, where the CPU runs it itself even without nested
/// paging; the exits of all.
fn meter_all() -> Result<Exits> {
    const LOOPS: u32 = 100;
    let span = Span::begin()?;
    for program in Program::value_variants() {
        if *program != Program::Query {
            let machine = Machine::new(Config::new(*program, Mode::Long, LOOPS));
            machine?.run().with_context(|| format!("{program:?}"))?;
        }
    }
    let exits = span.end()?;
    let cpuid = exits.get(&host::pick(10, 0x72)?).copied();
    // Each loop of `Cpuid` has one, and of `Debug` two.
    let expected = 3 * u64::from(LOOPS);
    ensure!(
        cpuid == Some(expected),
        "{cpuid:?} CPUID exits instead of {expected}"
    );
    Ok(exits)
}
