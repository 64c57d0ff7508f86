// SPDX-License-Identifier: GPL-2.0

//! The module is refused cleanly, can be loaded and unloaded under running guests, and continues to
//! meter when KVM's vendor module is reloaded.

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
use tiny_guests::{Config, Mode, Program, Registers64, TinyVm};

use super::{
    answers::ask,
    hooks::{no_btf, replace},
    no_memory_cgroups, no_userfaultfd, Case,
};
use crate::host::{
    self,
    cgroup::Cgroup,
    codes,
    hist::Exits,
    leaves::MAP_2021,
    log::Log,
    meter::{MeterSnapshot, DEVICE},
    module,
    span::Span,
    task,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::without_module("loading: invalid parameters are refused", || {
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
                // As 32 bits this is 1.
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
                ("details=2", "details=2 is refused: it is 0 or 1"),
                ("details=-1", "details=-1 is refused: it is 0 or 1"),
                (
                    "slow_us=1000000001",
                    "slow_us=1000000001 is refused: it is 0 to 1000000000",
                ),
                ("slow_us=-1", "slow_us=-1 is refused: it is 0 to 1000000000"),
            ] {
                check_refused(parameters, libc::EINVAL, words)?;
            }
            // The kernel itself refuses values that are not 64-bit numbers, before the module runs.
            for (parameters, error) in [
                ("leaf_map=x", libc::EINVAL),
                ("leaf_map=99999999999999999999", libc::ERANGE),
                ("host_scope=maybe", libc::EINVAL),
                ("leaf_cpl=kernel", libc::EINVAL),
            ] {
                check_refused(parameters, error, "")?;
            }
            ensure!(
                fs::metadata(DEVICE).is_err(),
                "a refused module leaves /dev/exitmeter behind"
            );
            check_load_and_metering()
        }),
        Case::without_module("loading: host_scope=1 logs a warning", || {
            const WORDS: &str = "host_scope=1: each guest reads the exits and times of all VMs";
            for (parameters, warned) in [
                ("host_scope=1", true),
                ("host_scope=0", false),
                // With leaf_map=0 guests read nothing of it.
                ("host_scope=1 leaf_map=0", false),
            ] {
                let mut log = Log::from_now()?;
                module::Loaded::with(parameters)?.unload()?;
                let lines: Vec<(u32, String)> = log.module_records()?;
                // Warnings have level 4, and reach a console with the default level.
                let has_warned = lines
                    .iter()
                    .any(|(level, line)| *level == 4 && line.starts_with(WORDS));
                ensure!(
                    has_warned == warned,
                    "loading ({parameters}) logs the lines {lines:?}"
                );
            }
            Ok(())
        }),
        Case::without_module("loading: a second load is refused", || {
            let loaded = module::Loaded::with("")?;
            check_refused("", libc::EEXIST, "")?;
            loaded.unload()
        }),
        Case::without_module("loading: the module meters again after a reload", || {
            check_load_and_metering()?;
            check_load_and_metering()
        }),
        Case::with_module(
            "",
            "loading: ftrace cannot be turned off under the module",
            || {
                // Linux 7 and later never allows it (EOPNOTSUPP). Earlier kernels refuse it while a hook
                // is marked permanent (EBUSY).
                let path = "/proc/sys/kernel/ftrace_enabled";
                let error = fs::write(path, "0")
                    .err()
                    .and_then(|error| error.raw_os_error());
                ensure!(
                    matches!(error, Some(libc::EBUSY | libc::EOPNOTSUPP)),
                    "turning ftrace off ends with {error:?} instead of EBUSY or EOPNOTSUPP"
                );
                let query = Registers64::cpuid(MAP_2021.reason_exits, codes::cpuid()?);
                let answers = ask(Mode::Long, &[query, query])?.1;
                ensure!(
                    answers[1].rax == 2,
                    "after that a guest with two CPUID exits reads {:x?}",
                    answers[1]
                );
                Ok(())
            },
        ),
        Case::without_module(
            "loading: the module loads and unloads under a running guest",
            load_under_guest,
        ),
        Case::with_module(
            "max_vcpus=1",
            "loading: past max_vcpus a vCPU runs on unmetered",
            past_max_vcpus,
        ),
        Case::without_module(
            "loading: a vCPU's ledger is charged to the cgroup of its VMM",
            memory_is_charged,
        )
        .skip_if(no_memory_cgroups),
        Case::without_module(
            "loading: an unmetered vCPU stays unmetered when there is room again",
            stays_unmetered,
        )
        .within(120),
        Case::with_module(
            "",
            "loading: metering continues when KVM's module is reloaded with other parameters",
            kvm_reloaded,
        )
        .within(180),
        Case::without_module(
            "loading: the module is refused without KVM's modules",
            || {
                let (vendor, paging) = (module::vendor_module()?, host::nested_paging()?);
                module::unload_vendor_module()?;
                let without_vendor = check_refused(
                    "",
                    libc::ENODEV,
                    &format!("{vendor} is not loaded: run 'modprobe {vendor}' first"),
                );
                module::remove("kvm")?;
                // The kernel cannot link the module without kvm.ko.
                let without_kvm = check_refused("", libc::ENOENT, "");
                module::load_vendor_module(paging)?;
                without_vendor?;
                without_kvm?;
                check_load_and_metering()
            },
        )
        .within(180),
        Case::without_module(
            "loading: the module is refused if tracepoints have another prototype",
            other_prototypes,
        )
        .skip_if(no_btf),
        Case::without_module(
            "loading: unloading waits for a vCPU that sleeps in the emulation of a query",
            unload_waits,
        )
        .skip_if(no_fetch_of_absent_code),
    ]
}

/// Check that loading fails with `errno`, and that the log holds `words`.
fn check_refused(parameters: &str, errno: i32, words: &str) -> Result<()> {
    let mut log = Log::from_now()?;
    let was_loaded = module::is_loaded("exitmeter")?;
    let error = module::try_load(parameters).err();
    if error.is_none() {
        module::unload()?;
    }
    let number = error.as_ref().and_then(io::Error::raw_os_error);
    ensure!(
        number == Some(errno),
        "loading ({parameters}) ends with {error:?} instead of {}",
        io::Error::from_raw_os_error(errno)
    );
    let lines = log.module_lines()?;
    ensure!(
        words.is_empty() || lines.iter().any(|line| line.contains(words)),
        "refusing ({parameters}) logs the lines {lines:?} instead of '{words}'"
    );
    ensure!(
        module::is_loaded("exitmeter")? == was_loaded,
        "loading ({parameters}) fails, and changes whether the module is loaded"
    );
    Ok(())
}

/// Load the module, meter a guest, and unload the module.
fn check_load_and_metering() -> Result<()> {
    let mut log = Log::from_now()?;
    let loaded = module::Loaded::with("")?;
    let mut lines = log.module_lines()?;
    let unchecked = lines.len();
    lines.retain(|line| !line.contains(UNCHECKED_LINE));
    let unchecked = unchecked - lines.len();
    ensure!(
        unchecked == usize::from(!Path::new(KVM_BTF).exists()),
        "the module says {unchecked} times that the tracepoints are not checked"
    );
    ensure!(
        matches!(&lines[..], [line] if line.starts_with("version ") && line.contains("hooked")),
        "the module says {lines:?} when it is loaded"
    );
    let mode = fs::metadata(DEVICE)?.permissions().mode() & 0o7777;
    ensure!(mode == 0o440, "/dev/exitmeter has mode {mode:o}");
    let span = Span::begin()?;
    let config = Config::new(Program::Cpuid, Mode::Long, 500);
    TinyVm::new(config.clone())?.run()?;
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

/// Start of the module's line on a kernel whose tracepoints it cannot check.
pub(super) const UNCHECKED_LINE: &str = "this kernel shows no types of kvm";

/// Path of the kernel's BTF of kvm.ko.
const KVM_BTF: &str = "/sys/kernel/btf/kvm";

/// A replacement for the kernel's BTF of kvm.ko, mounted over it until this is dropped.
struct ReplacedBtf(());

impl ReplacedBtf {
    fn new(bytes: &[u8]) -> Result<Self> {
        fs::write("/tmp/types", bytes).context("/tmp/types cannot be written")?;
        // SAFETY: The strings end with a NUL, and the kernel reads nothing else.
        let ret = unsafe {
            libc::mount(
                c"/tmp/types".as_ptr(),
                c"/sys/kernel/btf/kvm".as_ptr(),
                ptr::null(),
                libc::MS_BIND,
                ptr::null(),
            )
        };
        ensure!(ret == 0, "{KVM_BTF}: {}", io::Error::last_os_error());
        Ok(Self(()))
    }
}

impl Drop for ReplacedBtf {
    fn drop(&mut self) {
        // SAFETY: As in `new`.
        if unsafe { libc::umount(c"/sys/kernel/btf/kvm".as_ptr()) } != 0 {
            eprintln!("{KVM_BTF} stays: {}", io::Error::last_os_error());
        }
    }
}

/// Load the module with a copy of the kernel's BTF in which tracepoints are renamed.
fn other_prototypes() -> Result<()> {
    let types = fs::read(KVM_BTF).context(KVM_BTF)?;
    let renamed = |from: &str, to: &str| {
        ensure!(from.len() == to.len(), "{from} and {to} differ in length");
        let name = |name: &str| format!("\0btf_trace_{name}\0").into_bytes();
        let other = replace(&types, &name(to), &name(&"x".repeat(to.len())));
        let other = replace(&other, &name(from), &name(to));
        ensure!(other != types, "{KVM_BTF} has no {from}");
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
        let _other = ReplacedBtf::new(&renamed(as_other, tracepoint)?)?;
        check_refused("", libc::ENOEXEC, words)?;
    }
    // If a prototype cannot be compared, the module warns and loads.
    for (bytes, words) in [
        (
            renamed("kvm_exit", "xvm_exit")?,
            "kvm_exit is taken for what it was when exitmeter was written: the types of kvm in \
             /sys/kernel/btf do not hold it",
        ),
        (
            types[..types.len() / 2].to_vec(),
            "kvm_entry is taken for what it was when exitmeter was written: the types of kvm in \
             /sys/kernel/btf cannot be read",
        ),
    ] {
        let _other = ReplacedBtf::new(&bytes)?;
        let mut log = Log::from_now()?;
        module::Loaded::with("")?.unload()?;
        let lines: Vec<(u32, String)> = log.module_records()?;
        // Warnings have level 4.
        ensure!(
            lines
                .iter()
                .any(|(level, line)| *level == 4 && line.starts_with(words)),
            "the module is loaded with the lines {lines:?} instead of '{words}'"
        );
    }
    check_load_and_metering()
}

/// Load and unload the module three times while a guest runs for some 15 s.
fn load_under_guest() -> Result<()> {
    const LOOPS: u32 = 3000;
    let config = Config {
        vmm_pause: Duration::from_millis(5),
        ..Config::new(Program::OutUser, Mode::Long, LOOPS)
    };
    let mut machine = TinyVm::new(config)?;
    thread::scope(|scope| {
        let guest = scope.spawn(|| machine.run());
        for round in 1..=3 {
            let loaded = module::Loaded::with("")?;
            thread::sleep(Duration::from_millis(100));
            let meter = MeterSnapshot::read()?;
            ensure!(
                !guest.is_finished(),
                "the guest ended before the module came for the {round}. time"
            );
            // The VM existed before the module, and is metered from its next event.
            let exits = meter.only()?.numbers.exits_of(codes::io()?);
            ensure!(
                exits > 0,
                "a guest that ran before the module was loaded is not metered"
            );
            loaded.unload()?;
        }
        let seen = task::join(guest)?;
        ensure!(
            seen[0].ports == u64::from(LOOPS),
            "the guest wrote {} times to its port instead of {LOOPS}",
            seen[0].ports
        );
        Ok(())
    })
}

/// Run four vCPUs where one may be metered.
fn past_max_vcpus() -> Result<()> {
    const VCPUS: u8 = 4;
    let mut log = Log::from_now()?;
    let cpuid = codes::cpuid()?;
    let query = Registers64::cpuid(MAP_2021.reason_exits, cpuid);
    module::unload()?;
    let without = ask(Mode::Long, &[query])?.1[0];
    module::load("max_vcpus=1")?;
    let mut machine = TinyVm::new(Config {
        vcpus: VCPUS,
        ..Config::query(Mode::Long, vec![query; 100])
    })?;
    machine.run()?;
    let meter = MeterSnapshot::read()?;
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
    let count = lines
        .iter()
        .filter(|line| line.contains("a vCPU runs unmetered: max_vcpus=1 are metered already"))
        .count();
    ensure!(count == 1, "the log has {count} such lines: {lines:?}");
    drop(machine);
    // The metered vCPU went first. KVM loaded the others once more to destroy them.
    MeterSnapshot::check_counts(0, 3, 1)?;

    // There is room for the next VM.
    let (_machine, answers) = ask(Mode::Long, &[query])?;
    ensure!(answers[0].rax >= 1, "the next VM is not metered");
    ensure!(
        MeterSnapshot::read()?.own().len() == 1,
        "the next VM is not metered"
    );
    Ok(())
}

/// Run a VM of three vCPUs that starts while another vCPU takes the only room, and continues when that
/// vCPU goes.
fn stays_unmetered() -> Result<()> {
    let loaded = module::Loaded::with("max_vcpus=1")?;
    let config = |vcpus, count| Config {
        vcpus,
        vmm_pause: Duration::from_millis(5),
        ..Config::new(Program::OutUser, Mode::Long, count)
    };
    let mut first = TinyVm::new(config(1, 1))?;
    first.run()?;
    let mut late = TinyVm::new(config(3, 200))?;
    thread::scope(|scope| {
        let guest = scope.spawn(|| late.run());
        thread::sleep(Duration::from_millis(100));
        MeterSnapshot::check_counts(1, 3, 0)?;
        drop(first);
        thread::sleep(Duration::from_millis(200));
        MeterSnapshot::check_counts(0, 3, 1)?;
        ensure!(
            !guest.is_finished(),
            "the guest ended before there was room"
        );
        task::join(guest)?;
        anyhow::Ok(())
    })?;
    late.rewind()?;
    late.run()?;
    MeterSnapshot::check_counts(0, 3, 1)?;

    // The room goes to a new vCPU.
    let mut new = TinyVm::new(config(1, 1))?;
    new.run()?;
    MeterSnapshot::check_counts(1, 3, 1)?;
    drop(late);
    MeterSnapshot::check_counts(1, 3, 1)?;
    drop(new);
    MeterSnapshot::check_counts(0, 3, 2)?;
    loaded.unload()
}

/// Return a reason where KVM never fetches CPUID from a page that the guest has moved (see
/// [`TinyVm::with_absent_code`]). KVM fetches instructions only on SVM without NRIPS. The move needs
/// nested paging because otherwise KVM sees the change of the page table.
fn no_fetch_of_absent_code() -> Result<Option<&'static str>> {
    let cpus = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let fetches = host::vendor()? == Isa::Svm
        && host::nested_paging()?
        && !cpus.split_whitespace().any(|flag| flag == "nrip_save");
    if !fetches {
        return Ok(Some("KVM does not fetch a guest's CPUID from memory here"));
    }
    no_userfaultfd()
}

/// Wait until a thread sleeps, and return its kernel stack. A running thread has none to read.
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

/// Create vCPUs in a cgroup of this process's own, without the module and with it, and compare the
/// charged memory.
fn memory_is_charged() -> Result<()> {
    const VMS: u64 = 3;
    const EACH: u8 = 15;
    /// Memory that the module keeps for a vCPU, in bytes.
    const LEDGER: u64 = 16 * 1024;
    let group = Cgroup::of_this_process()?;
    let kernel_memory_of_vcpus = || -> Result<u64> {
        let before = group.kernel_memory()?;
        let machines = (0..VMS)
            .map(|_| {
                TinyVm::new(Config {
                    vcpus: EACH,
                    ..Config::new(Program::Cpuid, Mode::Long, 1)
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let after = group.kernel_memory()?;
        drop(machines);
        Ok(after.saturating_sub(before))
    };
    // The first round makes the allocations that stay.
    kernel_memory_of_vcpus()?;
    let without = kernel_memory_of_vcpus()?;
    let loaded = module::Loaded::with("")?;
    let with = kernel_memory_of_vcpus()?;
    loaded.unload()?;
    let due = VMS * u64::from(EACH) * LEDGER;
    println!("{without} bytes without the module, {with} with it, {due} are the ledgers'");
    let more = with.saturating_sub(without);
    // Part of it may be in pages that were charged before.
    ensure!(
        (due * 9 / 10..due * 5 / 4).contains(&more),
        "{more} bytes more are charged with the module, where the ledgers take {due}"
    );
    Ok(())
}

/// Unload the module while a vCPU sleeps in KVM's own `kvm_emulate_cpuid()`, called by the module.
fn unload_waits() -> Result<()> {
    let cpuid = codes::cpuid()?;
    let mut log = Log::from_now()?;
    let loaded = module::Loaded::with("")?;
    let (mut machine, absent) =
        TinyVm::with_absent_code(Registers64::cpuid(MAP_2021.reason_exits, cpuid))?;
    let thread_id = AtomicI32::new(0);
    let (stack, finished_early) = thread::scope(|scope| {
        let guest = scope.spawn(|| {
            machine.run_with(|_| {
                // SAFETY: gettid() has no requirements.
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
        // On failure, too, wake the vCPU.
        absent.provide()?;
        task::join(guest)?;
        let (stack, finished_early, unload) = unloading?;
        task::join(unload)?;
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
            == Registers64 {
                rax: 1,
                ..Registers64::default()
            },
        "the vCPU with one CPUID exit reads {answer:x?}"
    );
    let lines = log.module_lines()?;
    let waits = "unloading waits: 1 vCPU sleeps in kvm_emulate_cpuid()";
    ensure!(
        lines.iter().filter(|line| line.contains(waits)).count() == 1,
        "the log does not say once that unloading waits: {lines:#?}"
    );
    check_load_and_metering()
}

/// Reload KVM's vendor module under the meter with the opposite setting of nested paging, and back.
fn kvm_reloaded() -> Result<()> {
    let paging = host::nested_paging()?;
    let before = meter_all_programs()?;
    module::unload_vendor_module()?;
    ensure!(
        module::is_loaded("exitmeter")?,
        "the meter went with {}",
        module::vendor_module()?
    );
    module::load_vendor_module(!paging)?;
    let other = (|| {
        ensure!(host::nested_paging()? != paging, "KVM came back as it was");
        meter_all_programs()
    })();
    module::unload_vendor_module()?;
    module::load_vendor_module(paging)?;
    let other = other?;
    let after = meter_all_programs()?;

    let fault = codes::nested_page_fault()?;
    ensure!(
        before.contains_key(&fault) == paging
            && other.contains_key(&fault) != paging
            && after.contains_key(&fault) == paging,
        "nested paging was {paging}, {}, {paging}, and the exits: {before:?}, {other:?}, {after:?}",
        !paging
    );
    Ok(())
}

/// Meter each guest program in 64-bit mode, which the CPU executes itself even without nested paging.
/// Return the exits of all.
fn meter_all_programs() -> Result<Exits> {
    const LOOPS: u32 = 100;
    let code = codes::cpuid()?;
    let mut expected = 0;
    let span = Span::begin()?;
    for program in Program::value_variants() {
        if *program != Program::Query {
            let config = Config::new(*program, Mode::Long, LOOPS);
            expected += host::expected(&config)?.exact().get(&code).unwrap_or(&0);
            let machine = TinyVm::new(config);
            machine?.run().with_context(|| format!("{program:?}"))?;
        }
    }
    let exits = span.end()?;
    let cpuid = exits.get(&code).copied();
    ensure!(
        expected != 0 && cpuid == Some(expected),
        "{cpuid:?} CPUID exits instead of {expected}"
    );
    Ok(exits)
}
