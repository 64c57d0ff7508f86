// SPDX-License-Identifier: GPL-2.0

//! The BPF meter, for hosts that cannot load the module: it is exact, beside the module and without it,
//! and leaves nothing behind.

use std::{
    collections::BTreeMap,
    fs, hint, io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    detail::Kind,
    phase::Phase,
    reader::{Missed, Snapshot},
    reasons::Isa,
    snapshot::TABLE_CODE,
};
use serde_json::Value;
use tiny_guests::{Config, Mode, Program, TinyVm};

use super::{verify::with_verdict, Case};
use crate::host::{
    self, codes,
    hist::Hist,
    linux::Linux,
    meter::{read_device, MeterSnapshot},
    module,
    span::{compare, exits_since},
    task,
    tool::{self, NOBODY},
    KVM_EXIT_IO,
};

const PINS: &str = "/sys/fs/bpf/exitmeter";
/// Rounds of attaching and detaching in a normal run; the soak does more.
const ATTACHES: u64 = 20;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::without_module(
            "bpf: counts match the kernel's histogram, in every mode and for every reason",
            exact_counts,
        )
        .within(180),
        Case::with_module(
            "",
            "bpf: beside the module the counts are equal, and the phases within 2% of the time",
            beside_module,
        )
        .skip_if(no_module)
        .within(120),
        Case::with_module(
            "details=1",
            "bpf: beside the module the rows of details, code and exits to user space are equal",
            rows_match_module,
        )
        .skip_if(no_module)
        .within(300),
        Case::without_module(
            "bpf: after a boot with details the rows of each reason sum to its exits",
            boot_with_details,
        )
        .with_linux()
        .within(300),
        Case::without_module(
            "bpf: the slowest exit is the one in which the VMM slept, and why runs without the module",
            slowest,
        )
        .within(120),
        Case::without_module(
            "bpf: counts of a Linux guest's boot match the kernel's histogram",
            boot,
        )
        .with_linux()
        .within(300),
        Case::without_module(
            "bpf: a vCPU that sleeps in HLT is halted, and one that its VMM keeps is in user space",
            phases,
        ),
        Case::without_module("bpf: exits of an L2 guest are counted separately", nested)
            .with_linux()
            .within(600),
        Case::without_module("bpf: a vCPU from before the attaching is metered", existing_vcpu),
        Case::without_module(
            "bpf: report attaches it where nothing else meters, and leaves nothing even when killed",
            report_attaches,
        ),
        Case::without_module(
            "bpf: start pins it, stop removes everything, and each refusal is one sentence",
            start_and_stop,
        ),
        Case::without_module(
            "bpf: a vCPU past --max-vcpus counts as unmetered, with its exits",
            past_max_vcpus,
        ),
        Case::without_module(
            "bpf: exitmeter verify passes, and leaves nothing behind",
            verify_passes,
        )
        .within(120),
        Case::without_module(
            "bpf: CAP_BPF and CAP_PERFMON suffice",
            two_capabilities,
        ),
        Case::without_module(
            "bpf: repeated attaching and detaching under load",
            || attach_again(ATTACHES),
        )
        .within(120),
    ]
}

/// Return a reason on kernels built without Rust, which cannot have the module.
fn no_module() -> Result<Option<&'static str>> {
    let missing = !Path::new(module::FILE).exists();
    Ok(missing.then_some("this kernel is built without Rust, and has no exitmeter.ko"))
}

/// Check that the tool failed with one sentence that holds `words`.
fn check_refused(output: &Output, words: &str) -> Result<()> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1)
            && stderr.lines().count() == 1
            && stderr.starts_with("exitmeter: ")
            && stderr.contains(words),
        "it ended with {}, and says {stderr}",
        output.status
    );
    Ok(())
}

/// The attached and pinned BPF meter; dropping this detaches it.
pub(super) struct Attached(());

impl Attached {
    pub(super) fn with(arguments: &[&str]) -> Result<Self> {
        mount()?;
        tool::run_bytes(&[&["bpf", "start"], arguments].concat())?;
        Ok(Self(()))
    }

    fn read(&self) -> Result<MeterSnapshot> {
        MeterSnapshot::parse(&self.snapshot()?)
    }

    pub(super) fn snapshot(&self) -> Result<Vec<u8>> {
        tool::run_bytes(&["bpf", "snapshot"])
    }

    pub(super) fn stop(self) -> Result<()> {
        std::mem::forget(self);
        tool::run_bytes(&["bpf", "stop"])?;
        check_nothing_left()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = tool::output(&["bpf", "stop"]);
    }
}

/// Mount the BPF file system, which holds the pins, as systemd does on a host.
fn mount() -> Result<()> {
    if fs::read_to_string("/proc/mounts")?.contains(" /sys/fs/bpf ") {
        return Ok(());
    }
    host::mount(c"bpf", c"/sys/fs/bpf")
}

/// Count the programs at the entry of KVM's functions, by kprobe or by fentry. Only the BPF meter has
/// any here, while it is attached.
fn attached_programs() -> Result<usize> {
    let kprobes = fs::read_to_string("/sys/kernel/debug/kprobes/list")
        .context("the kernel's list of kprobes cannot be read")?;
    let by_kprobe = kprobes.lines().filter(|line| line.contains("kvm_"));
    Ok(by_kprobe.count() + fentry_programs()?)
}

/// Count the programs attached by fentry.
fn fentry_programs() -> Result<usize> {
    let hooked = fs::read_to_string("/sys/kernel/debug/tracing/enabled_functions")
        .context("the kernel's list of hooked functions cannot be read")?;
    // D marks a direct call, which only BPF's trampolines use.
    let functions = hooked
        .lines()
        .filter(|line| line.starts_with("kvm_") && line.split_whitespace().any(|flag| flag == "D"));
    Ok(functions.count())
}

/// Check that no program is attached, and that no pin is left.
fn check_nothing_left() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    // The kernel removes programs some time after their last reference is gone.
    while attached_programs()? != 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    let left = attached_programs()?;
    ensure!(left == 0, "{left} programs are attached to KVM's functions");
    let pins = fs::read_dir("/sys/fs/bpf")?.count();
    ensure!(pins == 0, "{pins} pins are left");
    Ok(())
}

fn exact_counts() -> Result<()> {
    let attached = Attached::with(&[])?;
    let functions = fentry_programs()?;
    ensure!(
        functions >= 4,
        "as root only {functions} functions are attached by fentry"
    );
    for mode in [Mode::Real, Mode::Long, Mode::User] {
        for program in <Program as clap::ValueEnum>::value_variants() {
            if matches!(program, Program::Query | Program::Spin) || !program.runs_in(mode) {
                continue;
            }
            let config = Config::new(*program, mode, 100);
            let expected = host::expected(&config)?;
            let before = attached.read()?.exits();
            let hist = Hist::begin()?;
            let mut machine = TinyVm::new(config)?;
            machine.run()?;
            drop(machine);
            let counted = exits_since(attached.read()?.exits(), &before)?;
            compare(&counted, &hist.read()?).with_context(|| format!("{program:?} in {mode:?}"))?;
            expected.check(&counted)?;
        }
    }
    let meter = attached.read()?;
    ensure!(
        meter.unmetered == 0 && meter.vcpus.is_empty() && meter.departed > 30,
        "{} unmetered, {} vCPUs, {} departed",
        meter.unmetered,
        meter.vcpus.len(),
        meter.departed
    );
    attached.stop()
}

fn beside_module() -> Result<()> {
    let attached = Attached::with(&[])?;
    let before = attached.read()?.totals;
    let first = MeterSnapshot::read()?.totals;
    for program in [
        Program::Cpuid,
        Program::OutUser,
        Program::Touch,
        Program::HltKernel,
        Program::Varied,
    ] {
        let mut machine = TinyVm::new(Config::new(program, Mode::Long, 2000))?;
        machine.run()?;
    }
    let (bpf, module) = (attached.read()?, MeterSnapshot::read()?);
    ensure!(
        bpf.departed == module.departed,
        "{} vCPUs and {}",
        bpf.departed,
        module.departed
    );
    let (bpf, module) = (bpf.totals, module.totals);
    ensure!(
        exits_since(bpf.exits.clone(), &before.exits)?
            == exits_since(module.exits.clone(), &first.exits)?,
        "{:?}, and by the module {:?}",
        bpf.exits,
        module.exits
    );
    for code in bpf.exits.keys().copied() {
        let by_bpf = bpf.samples_of(code) - before.samples_of(code);
        let by_module = module.samples_of(code) - first.samples_of(code);
        ensure!(
            by_bpf == by_module,
            "reason {code} has {by_bpf} samples, and by the module {by_module}"
        );
    }
    println!("bpf: {}; module: {}", bpf.shares(), module.shares());
    for phase in Phase::ALL {
        let difference = (bpf.share(phase) - module.share(phase)).abs();
        ensure!(
            difference < 0.02,
            "{}: bpf {}; module {}",
            phase.name(),
            bpf.shares(),
            module.shares()
        );
    }
    attached.stop()
}

/// Identity of a row: table, reason, kind of detail, nested, key.
type RowKey = (u32, String, u8, bool, u64);

/// Check the sums of a snapshot's tables, and return the exits of each exact row.
fn checked_rows(bytes: &[u8]) -> Result<BTreeMap<RowKey, u64>> {
    let snapshot = Snapshot::parse(bytes)?;
    ensure!(snapshot.has_tables());
    super::details::check_sums(&snapshot, 0)?;
    Ok(exact_rows(&snapshot))
}

fn exact_rows(snapshot: &Snapshot<'_>) -> BTreeMap<RowKey, u64> {
    let entries = snapshot.tables().flat_map(|it| it.entries());
    let entries = entries.filter(|it| !it.others && it.missed == Missed::default());
    entries
        .map(|it| {
            let reason = format!("{:?}", it.reason);
            let row = (it.table, reason, it.detail_kind, it.nested, it.key);
            (row, it.exits)
        })
        .collect()
}

fn rows_match_module() -> Result<()> {
    let is_svm = host::vendor()? == Isa::Svm;
    let attached = Attached::with(&["--details"])?;
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
        (Program::Call, Mode::Long),
        (Program::Device, Mode::Long),
        (Program::Undefined, Mode::Long),
        (Program::Debug, Mode::Long),
    ] {
        compare_rows(Config::new(program, mode, 200), is_svm)
            .with_context(|| format!("{program:?} in {mode:?}"))?;
    }
    // A vCPU can be preempted before KVM has read the details of its exit.
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                hint::spin_loop();
            }
        });
        let same = compare_rows(Config::new(Program::OutUser, Mode::Long, 5000), is_svm);
        done.store(true, Relaxed);
        same.context("preempted")
    })?;
    // There are more leaves than rows. On VMX BPF has more room for them because it has no rows of
    // addresses.
    let leaves = super::details::many_leaves();
    compare_rows(Config::query(Mode::Long, leaves), is_svm).context("leaves")?;
    attached.stop()
}

fn compare_rows(config: Config, is_svm: bool) -> Result<()> {
    let may_have_more = !is_svm && config.program == Program::Query;
    let mut machine = TinyVm::new(config)?;
    machine.run()?;
    let by_bpf = checked_rows(&tool::run_bytes(&["bpf", "snapshot"])?)?;
    let mut by_module = checked_rows(&read_device()?)?;
    if !is_svm {
        // Only the VMCS holds the guest's RIP and addresses; KVM keeps no copy that BPF can read.
        let kinds = [Kind::Address as u8, Kind::Memory as u8];
        by_module.retain(|(table, _, kind, ..), _| *table != TABLE_CODE && !kinds.contains(kind));
    }
    let differences: Vec<_> = by_module
        .iter()
        .filter(|(row, exits)| by_bpf.get(row) != Some(exits))
        .collect();
    ensure!(
        differences.is_empty()
            && !by_bpf.is_empty()
            && (by_bpf.len() == by_module.len() || may_have_more && by_bpf.len() > by_module.len()),
        "the module alone has {differences:x?}; BPF has {by_bpf:x?}"
    );
    // The group kvm gets this snapshot (packaging/exitmeter-bpf@.service).
    let reduced = tool::run_bytes(&["bpf", "snapshot", "--without-code"])?;
    let reduced = exact_rows(&Snapshot::parse(&reduced)?);
    let mut without_code = by_bpf;
    without_code.retain(|(table, ..), _| *table != TABLE_CODE);
    ensure!(
        reduced == without_code,
        "without code BPF gives {reduced:x?} of {without_code:x?}"
    );
    Ok(())
}

fn boot_with_details() -> Result<()> {
    let attached = Attached::with(&["--details"])?;
    let hist = Hist::begin()?;
    let linux = Linux::boot(&[])?;
    let bytes = tool::run_bytes(&["bpf", "snapshot"])?;
    linux.stop()?;
    let rows = checked_rows(&bytes)?;
    ensure!(rows.len() > 20, "a boot has {rows:x?}");
    compare(&attached.read()?.exits(), &hist.read()?)?;
    attached.stop()
}

fn slowest() -> Result<()> {
    const SLEPT: Duration = Duration::from_millis(300);

    let mut machine = TinyVm::new(Config::new(Program::OutUser, Mode::Long, 50))?;
    let attached = Attached::with(&["--details"])?;
    machine.run()?;
    thread::sleep(SLEPT);
    machine.rewind()?;
    machine.run()?;
    let bytes = tool::run_bytes(&["bpf", "snapshot"])?;
    let snapshot = Snapshot::parse(&bytes)?;
    let exits = snapshot.tables().flat_map(|it| it.slow());
    let slowest = exits.max_by_key(|exit| exit.length()).context("none")?;
    println!("{slowest:?}");
    let user = Duration::from_nanos(slowest.ticks(Phase::User));
    // Kernels before 6.11 do not tell whether it was KVM_RUN.
    ensure!(
        user >= SLEPT && matches!(slowest.user_exit, Some(KVM_EXIT_IO) | None),
        "{slowest:?}"
    );
    attached.stop()?;
    let output = tool::output(&["why", "--json", "--", "sleep", "0.1"])?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    check_nothing_left()
}

fn boot() -> Result<()> {
    let attached = Attached::with(&[])?;
    let hist = Hist::begin()?;
    let linux = Linux::boot(&["--vcpus", "2"])?;
    let report = tool::run_bytes(&["report", "--source", "bpf", "--json"])?;
    linux.stop()?;
    let report: Value = serde_json::from_slice(&report)?;
    ensure!(report["host"]["source"] == "bpf", "{}", report["host"]);
    ensure!(
        report["vms"][0]["vcpus"].as_array().map(Vec::len) == Some(2),
        "{report}"
    );
    let counted = attached.read()?.exits();
    compare(&counted, &hist.read()?)?;
    let total: u64 = counted.values().sum();
    ensure!(total > 1000, "{total} exits are too few for a boot");
    attached.stop()
}

fn phases() -> Result<()> {
    let attached = Attached::with(&[])?;
    let mut machine = TinyVm::new(Config::new(Program::HltKernel, Mode::Long, 200))?;
    machine.run()?;
    let numbers = attached.read()?.only()?.numbers.clone();
    println!("sleeps: {}", numbers.shares());
    ensure!(
        numbers.share(Phase::Halted) > 0.5 && numbers.share(Phase::Preempted) < 0.2,
        "{}",
        numbers.shares()
    );
    drop(machine);

    let mut machine = TinyVm::new(Config::new(Program::OutUser, Mode::Long, 2000))?;
    let before = attached.read()?.only()?.numbers.phases[Phase::User as usize];
    let begun = Instant::now();
    machine.run()?;
    // This is longer than any pause in another phase.
    thread::sleep(Duration::from_millis(500));
    // Run again, so that the time since the first run is booked.
    machine.rewind()?;
    machine.run()?;
    let took = begun.elapsed();
    let after = attached.read()?.only()?.numbers.clone();
    let user = Duration::from_nanos(after.phases[Phase::User as usize] - before);
    println!(
        "works: {} ms of {} in user space",
        user.as_millis(),
        took.as_millis()
    );
    ensure!(
        user > Duration::from_millis(500) && user <= took,
        "{} ms of {} are in user space: {}",
        user.as_millis(),
        took.as_millis(),
        after.shares()
    );
    attached.stop()
}

fn nested() -> Result<()> {
    let attached = Attached::with(&[])?;
    let hist = Hist::begin()?;
    super::nested::with_l2_guest(|linux, asked| {
        let pid = linux.pid()?;
        let meter = attached.read()?;
        let vcpu = meter.vcpus.iter().find(|vcpu| vcpu.pid == pid);
        let nested = &vcpu.context("the guest is metered")?.numbers.nested;
        let cpuid = codes::cpuid()?;
        ensure!(
            nested.get(&cpuid) == Some(&asked),
            "the L2 guest executes CPUID {asked} times, and the nested exits are {nested:?}"
        );
        Ok(())
    })?;
    let counted = attached.read()?;
    compare(&counted.exits(), &hist.read()?)?;
    ensure!(!counted.totals.nested.is_empty());
    attached.stop()
}

fn existing_vcpu() -> Result<()> {
    let mut machine = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 500))?;
    let attached = Attached::with(&[])?;
    let hist = Hist::begin()?;
    machine.run()?;
    let (meter, seen) = (attached.read()?, hist.read()?);
    let vcpu = meter.only()?;
    ensure!(
        vcpu.numbers.exits == seen && vcpu.numbers.exits.values().sum::<u64>() > 500,
        "{:?}, and by the kernel {seen:?}",
        vcpu.numbers.exits
    );
    drop(machine);
    let after = attached.read()?;
    ensure!(
        after.vcpus.is_empty() && after.departed == 1 && after.totals.exits == seen,
        "{after:?}"
    );
    attached.stop()
}

fn report_attaches() -> Result<()> {
    mount()?;
    let output = tool::output(&["report", "--json"])?;
    ensure!(
        output.status.success()
            && String::from_utf8_lossy(&output.stderr).contains("counting begins now"),
        "it says {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["host"]["source"] == "bpf", "{}", report["host"]);
    check_nothing_left()?;
    check_killed_report()?;
    if no_module()?.is_some() {
        return Ok(());
    }
    // The tool prefers the module, and takes BPF on request.
    let loaded = module::Loaded::with("")?;
    for (source, due) in [("auto", "module"), ("module", "module"), ("bpf", "bpf")] {
        let report = tool::run_bytes(&["report", "--json", "--source", source])?;
        let report: Value = serde_json::from_slice(&report)?;
        ensure!(
            report["host"]["source"] == due,
            "{source}: {}",
            report["host"]
        );
    }
    loaded.unload()?;
    check_nothing_left()
}

/// Check that killing `exitmeter report` detaches its programs.
fn check_killed_report() -> Result<()> {
    let mut child = tool::command(&["report", "--interval", "0.2", "--json"])
        .stdout(Stdio::null())
        .spawn()?;
    let attached = wait_for_programs(&mut child);
    child.kill()?;
    child.wait()?;
    attached?;
    check_nothing_left()
}

fn wait_for_programs(child: &mut Child) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while attached_programs()? < 3 {
        ensure!(Instant::now() < deadline, "it attaches nothing");
        ensure!(child.try_wait()?.is_none(), "it has ended");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn start_and_stop() -> Result<()> {
    mount()?;
    check_refused(&tool::output(&["bpf", "status"])?, "exitmeter bpf start")?;
    check_refused(&tool::output(&["bpf", "stop"])?, "no BPF meter is attached")?;
    // The most vCPUs that the verifier accepts.
    Attached::with(&["--max-vcpus", "8192"])?.stop()?;
    check_refused(
        &tool::output(&["bpf", "snapshot"])?,
        "no BPF meter is attached",
    )?;
    check_refused(
        &tool::output(&["report", "--source", "module"])?,
        "insmod exitmeter.ko",
    )?;
    let nobody = tool::command(&["bpf", "start"])
        .uid(NOBODY)
        .gid(NOBODY)
        .output()?;
    check_refused(&nobody, "CAP_BPF and CAP_PERFMON")?;
    check_nothing_left()?;

    // Ten ledgers are the most that fit into 256 KiB.
    let attached = Attached::with(&["--max-vcpus", "10"])?;
    check_refused(&tool::output(&["bpf", "start"])?, "meters already")?;
    let nobody = tool::command(&["report", "--source", "bpf"])
        .uid(NOBODY)
        .gid(NOBODY)
        .output()?;
    check_refused(&nobody, "no right")?;
    let status = tool::run(&["bpf", "status"])?;
    ensure!(
        status.contains("0 vCPUs are metered, of 10 at most"),
        "{status}"
    );
    // Without the module, a command reads the pinned meter and attaches nothing itself.
    let before = attached_programs()?;
    let output = tool::output(&["report", "--json"])?;
    ensure!(
        output.status.success() && output.stderr.is_empty() && attached_programs()? == before,
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    attached.stop()?;
    // Of two concurrent starts, one succeeds.
    let start = || tool::command(&["bpf", "start"]).spawn();
    let mut both = [start()?, start()?];
    let mut started = 0;
    for child in &mut both {
        started += u32::from(child.wait()?.success());
    }
    let status = tool::output(&["bpf", "status"])?.status;
    Attached(()).stop()?;
    ensure!(started == 1 && status.success(), "{started} of two started");
    // Pins of a start that was killed halfway do not prevent the next one.
    fs::create_dir("/sys/fs/bpf/exitmeter-new")?;
    Attached::with(&[])?.stop()?;
    ensure!(!Path::new(PINS).exists());
    Ok(())
}

fn past_max_vcpus() -> Result<()> {
    let attached = Attached::with(&["--max-vcpus", "1"])?;
    let mut first = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    first.run()?;
    let mut second = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 300))?;
    second.run()?;
    let meter = attached.read()?;
    ensure!(
        (meter.unmetered, meter.vcpus.len()) == (1, 1),
        "{} unmetered, {} metered",
        meter.unmetered,
        meter.vcpus.len()
    );
    let status = tool::run(&["bpf", "status"])?;
    let exits = status
        .split("with ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .and_then(|number| number.parse::<u64>().ok());
    ensure!(
        exits.is_some_and(|exits| (300..1000).contains(&exits)),
        "{status}"
    );
    // A departed vCPU makes room for another.
    drop((first, second));
    let mut third = TinyVm::new(Config::new(Program::Cpuid, Mode::Long, 100))?;
    third.run()?;
    let meter = attached.read()?;
    ensure!((meter.unmetered, meter.vcpus.len(), meter.departed) == (1, 1, 1));
    drop(third);
    attached.stop()
}

/// Attach and detach the meter `times` times while VMs come, run and go.
///
/// # Errors
///
/// Returns an error if a snapshot is wrong or anything is left behind.
pub fn attach_again(times: u64) -> Result<()> {
    mount()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<u64> {
            let mut machines = 0;
            while !done.load(Relaxed) {
                let mut machine = TinyVm::new(Config::new(Program::OutUser, Mode::Long, 1000))?;
                machine.run()?;
                machines += 1;
            }
            Ok(machines)
        });
        let attaching = (0..times).try_for_each(|time| {
            let details = ["--details"];
            let attached = Attached::with(if time % 2 == 0 { &[] } else { &details })?;
            // `MeterSnapshot::parse` checks each live vCPU.
            attached.read()?;
            attached.stop()
        });
        done.store(true, Relaxed);
        let machines = task::join(load)?;
        println!("attached {times} times, while {machines} VMs ran");
        attaching
    })?;
    check_nothing_left()
}

/// Make `command` run as nobody with only CAP_PERFMON and CAP_BPF.
fn with_two_capabilities(command: &mut Command) {
    /// Numbers of the capabilities (include/uapi/linux/capability.h).
    const PERFMON_AND_BPF: [u32; 2] = [38, 39];
    const VERSION_3: u32 = 0x2008_0522;

    let demand = |ret: libc::c_long| match ret {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: The closure makes only system calls between fork and exec, and they read only the stack.
    unsafe {
        command.pre_exec(move || {
            demand(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into())?;
            demand(libc::setresgid(NOBODY, NOBODY, NOBODY).into())?;
            demand(libc::setresuid(NOBODY, NOBODY, NOBODY).into())?;
            let header = [VERSION_3, 0];
            let high = PERFMON_AND_BPF
                .iter()
                .fold(0, |all, it| all | 1 << (it - 32));
            // Effective, permitted and inheritable: the low halves, then the high ones.
            let sets: [u32; 6] = [0, 0, 0, high, high, high];
            demand(libc::syscall(
                libc::SYS_capset,
                &raw const header,
                &raw const sets,
            ))?;
            for capability in PERFMON_AND_BPF {
                let raise = libc::PR_CAP_AMBIENT_RAISE;
                demand(libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0).into())?;
            }
            Ok(())
        });
    }
}

fn two_capabilities() -> Result<()> {
    const PARANOID: &str = "/proc/sys/kernel/perf_event_paranoid";
    let report = || -> Result<Output> {
        let mut command = tool::command(&["report", "--json", "--source", "bpf"]);
        with_two_capabilities(&mut command);
        Ok(command.output()?)
    };
    let before = fs::read_to_string(PARANOID)?;
    fs::write(PARANOID, "2")?;
    let output = report();
    // Debian's kernels have the level 3 and start with it. Perf events then need CAP_SYS_ADMIN.
    fs::write(PARANOID, "3")?;
    let paranoid = report();
    fs::write(PARANOID, before.trim())?;
    let output = output?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["host"]["source"] == "bpf", "{report}");
    let paranoid = paranoid?;
    // Before Linux 6.2, kprobes on functions of modules need perf events.
    match fs::read_to_string("/proc/sys/kernel/osrelease")?.starts_with("6.1.") {
        true => check_refused(&paranoid, "kernel.perf_event_paranoid=2")?,
        false => ensure!(
            paranoid.status.success(),
            "{}",
            String::from_utf8_lossy(&paranoid.stderr)
        ),
    }
    check_nothing_left()
}

fn verify_passes() -> Result<()> {
    mount()?;
    let few = ["--source", "bpf", "--json", "--runs", "2", "--exits", "200"];
    let found = tool::run_bytes(&[&["verify"], &few[..]].concat())?;
    let found: Value = serde_json::from_slice(&found)?;
    let (passed, not_made) = (
        with_verdict(&found, "passed"),
        with_verdict(&found, "not_made"),
    );
    let by_kernel = passed
        .iter()
        .filter(|check| check.contains("as the kernel's histogram"));
    ensure!(
        by_kernel.count() == 21 && passed.len() == 22 && not_made.len() == 3,
        "{found}"
    );
    ensure!(
        not_made.iter().all(|check| check.contains("BPF")),
        "{not_made:?}"
    );
    check_nothing_left()
}
