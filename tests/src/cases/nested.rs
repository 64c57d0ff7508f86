// SPDX-License-Identifier: GPL-2.0

//! A guest in the guest: the host counts its exits and tells them apart, and it reads what
//! its own hypervisor answers.

use std::{env, fs::File, io, path::PathBuf};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::{
    detail::Kind,
    reader::{Entry, Snapshot},
    reasons::Isa,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS},
};
use tiny_guests::{Config, Inner, Machine, Mode, Program, Quad};

use super::{
    answers::ask,
    details::{read, turn_on},
    Case,
};
use crate::host::{
    self,
    leaves::{EXITS_64, MAP_2021},
    linux::{CpuidLine, Linux},
    log::Log,
    meter::Meter,
    span::Span,
};

/// The modules of the guest's kernel, which need not be the host's.
const GUEST_MODULES: &str = "/lab/guest/modules";

/// How often the inner guest asks for CPUID before it asks for ours.
const COUNT: u32 = 300;

/// What the inner guest asks at last: one of our leaves, and one beside them. Both are out
/// of range for KVM, which answers all such leaves alike.
const ASKED: [u32; 2] = [MAP_2021.reason_exits, 0x4fff_fffb];

/// How often a second inner guest OUTs to its VMM, by which port.
const OUTS: u32 = 100;
const OUT_PORT: u64 = 0x3f0;

/// What asks for those from nested guests alone.
const NESTED: u32 = 1 << 16;

/// The bit of the general protection fault in a bitmap of exceptions.
const GP: u32 = 1 << 13;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "nested: exits of a guest in the guest are told apart",
            nested,
        )
        .with_linux()
        .within(600),
        Case::with_module(
            "",
            "nested: where CPUID faults in a guest in the guest, its registers stay (SVM)",
            faulting_svm,
        )
        .skip_if(not_svm),
        Case::with_module(
            "",
            "nested: where CPUID faults in a guest in the guest, its registers stay (VMX)",
            faulting_vmx,
        )
        .skip_if(not_vmx)
        .within(600),
    ]
}

/// VMX leaves a hypervisor no choice: CPUID of its guest always exits.
fn not_svm() -> Result<Option<&'static str>> {
    Ok((host::isa()? != Isa::Svm).then_some("on SVM alone can a hypervisor leave CPUID to KVM"))
}

/// On SVM KVM hands CPUID to a hypervisor that intercepts it, faults or not
/// (`nested_svm_intercept()`), as Linux's does.
fn not_vmx() -> Result<Option<&'static str>> {
    Ok((host::isa()? != Isa::Vmx)
        .then_some("on SVM a Linux guest gets CPUID of its own guest even where that faults"))
}

/// A guest's hypervisor leaves its guest's CPUID to KVM, which has it fault.
fn faulting_svm() -> Result<()> {
    let span = Span::begin()?;
    let mut log = Log::from_now()?;
    let query = Quad::cpuid(MAP_2021.reason_exits, 0x72);
    let ask = |faults: bool, exceptions| {
        let mut machine = Machine::with_inner(query, exceptions)?;
        if faults {
            machine.make_cpuid_fault()?;
        }
        machine.run()?;
        anyhow::Ok(machine.inner()?)
    };
    // Without the fault the meter answers, and the inner guest goes on to its VMMCALL.
    let answered = ask(false, GP)?;
    let expected = Inner {
        exit: 0x81,
        behind: 2,
        registers: Quad {
            rax: 1,
            ..Quad::default()
        },
    };
    ensure!(
        answered == expected,
        "of its first CPUID the inner guest reads {answered:x?}"
    );
    let lines = log.module_lines()?;
    ensure!(lines.len() == 1, "one query is logged by {lines:?}");

    // The fault goes to the hypervisor (exit 0x4d), or into the inner guest, where without a
    // handler it ends in a shutdown (0x7f).
    for (exceptions, exit) in [(GP, 0x4d), (0, 0x7f)] {
        let faulted = ask(true, exceptions)?;
        let expected = Inner {
            exit,
            behind: 0,
            registers: query,
        };
        ensure!(
            faulted == expected,
            "the inner guest's CPUID has faulted, and its hypervisor finds {faulted:x?} instead of \
             {expected:x?}"
        );
    }
    let lines = log.module_lines()?;
    ensure!(lines.is_empty(), "CPUID that faulted is logged: {lines:?}");
    span.end()?;
    Ok(())
}

/// A Linux guest has CPUID fault while a guest of its own runs. KVM then keeps CPUID of that one from
/// the Linux guest (`nested_vmx_l0_wants_exit()`), and has it fault itself.
fn faulting_vmx() -> Result<()> {
    let span = Span::begin()?;
    let linux = boot_hypervisor()?;
    // With the parameter the Linux guest's KVM intercepts the general protection fault of its guest
    // (`vmx_update_exception_bitmap()`), so that the fault waits in `exception_vmexit`, and without
    // in `exception`.
    for parameters in ["enable_vmware_backdoor=1", ""] {
        load_kvm(&linux, parameters)?;
        let numbers = || nested_cpuids(&linux);
        let before = numbers()?;
        let mut log = Log::from_now()?;
        let said = linux.run("/root/system-tests --faulting")?;
        let lines = log.module_lines()?;
        let after = numbers()?;

        let said: Vec<&str> = said.lines().collect();
        let [ours, beside, end, registers] = said[..] else {
            bail!("of its guests the Linux guest says {said:#?}");
        };
        ensure!(
            ours == beside,
            "without the fault the inner guest reads {ours} of our leaf, and {beside} of one beside"
        );
        ensure!(
            end.contains("Shutdown"),
            "the inner guest has no handler of the fault, and ends with {end}"
        );
        let expected = format!("{:x?}", faulting_query());
        ensure!(
            registers == expected,
            "with '{parameters}' the inner guest's CPUID has faulted, and its registers are \
             {registers} instead of {expected}"
        );
        let expected = ASKED.len() as u64 + 1;
        ensure!(
            after - before == expected,
            "the inner guests ask for CPUID {expected} times, and {} such exits are nested",
            after - before
        );
        ensure!(lines.is_empty(), "CPUID that faulted is logged: {lines:?}");
        unload_kvm(&linux)?;
    }
    linux.stop()?;
    span.end()?;
    Ok(())
}

/// Return the modules of KVM in a guest; those that `kvm` needs are first, and the vendor's is last. Debian's cloud kernel has no
/// ccp, and its kvm-amd needs none.
fn kvm_modules() -> Result<Vec<&'static str>> {
    let modules = host::pick(
        &[
            "virt/lib/irqbypass",
            "arch/x86/kvm/kvm",
            "arch/x86/kvm/kvm-intel",
        ][..],
        &[
            "virt/lib/irqbypass",
            "drivers/crypto/ccp/ccp",
            "arch/x86/kvm/kvm",
            "arch/x86/kvm/kvm-amd",
        ],
    )?;
    let is_there = |module: &&str| path_of(module).exists() || !module.ends_with("/ccp");
    Ok(modules.iter().copied().filter(is_there).collect())
}

/// Return where the host has a module for its guests.
fn path_of(module: &str) -> PathBuf {
    format!("{GUEST_MODULES}/kernel/{module}.ko").into()
}

/// Return the name of a module's file.
fn file_name(module: &str) -> &str {
    module.rsplit('/').next().unwrap_or(module)
}

/// Boot a Linux guest that holds KVM's modules and this program.
fn boot_hypervisor() -> Result<Linux> {
    let this = env::current_exe().context("the path of this program is not known")?;
    let mut files = vec![format!("{}:system-tests", this.display())];
    let path = |module| path_of(module).display().to_string();
    files.extend(kvm_modules()?.into_iter().map(path));
    let mut options = vec!["--memory", "512"];
    for file in &files {
        options.extend(["--file", file]);
    }
    Linux::boot(&options)
}

/// Load KVM in the Linux guest, `kvm` itself with `parameters`.
fn load_kvm(linux: &Linux, parameters: &str) -> Result<()> {
    for module in kvm_modules()? {
        let name = file_name(module);
        let parameters = if name == "kvm" { parameters } else { "" };
        linux.run(&format!("insmod /root/{name}.ko {parameters}"))?;
    }
    Ok(())
}

/// Unload it.
fn unload_kvm(linux: &Linux) -> Result<()> {
    for module in kvm_modules()?.iter().rev() {
        linux.run(&format!("rmmod {}", file_name(module)))?;
    }
    Ok(())
}

/// Return how many CPUID exits of the Linux guest's vCPU are nested.
fn nested_cpuids(linux: &Linux) -> Result<u64> {
    let meter = Meter::read()?;
    let pid = linux.pid()?;
    let vcpu = meter.vcpus.into_iter().find(|vcpu| vcpu.pid == pid);
    let nested = vcpu.context("the guest is metered")?.numbers.nested;
    Ok(nested.get(&host::pick(10, 0x72)?).copied().unwrap_or(0))
}

/// Run a guest in a Linux guest. While both are there, call `meter` with how often the inner one asked for CPUID.
pub(super) fn with_inner(meter: impl FnOnce(&Linux, u64) -> Result<()>) -> Result<()> {
    let linux = boot_hypervisor()?;
    load_kvm(&linux, "")?;
    linux.run(&format!("/root/system-tests --nested {COUNT}"))?;
    meter(&linux, u64::from(COUNT) + ASKED.len() as u64)?;
    linux.stop()?;
    Ok(())
}

fn nested() -> Result<()> {
    let span = Span::begin()?;
    let linux = boot_hypervisor()?;
    load_kvm(&linux, "")?;
    let pid = linux.pid()?;
    let numbers = || {
        let meter = Meter::read()?;
        let vcpu = meter.vcpus.into_iter().find(|vcpu| vcpu.pid == pid);
        anyhow::Ok(vcpu.context("the guest is metered")?.numbers)
    };
    let before = numbers()?;
    ensure!(
        before.nested.is_empty(),
        "nested exits before there is a nested guest: {:?}",
        before.nested
    );

    let said = linux.run(&format!("/root/system-tests --nested {COUNT}"))?;
    let after = numbers()?;
    let cpuid = host::pick(10, 0x72)?;
    let nested = after.nested.get(&cpuid).copied().unwrap_or(0);
    let expected = u64::from(COUNT) + ASKED.len() as u64;
    ensure!(
        nested == expected,
        "the inner guest asks for CPUID {expected} times, and {nested} such exits are nested: {:?}",
        after.nested
    );
    let answers: Vec<&str> = said.lines().collect();
    ensure!(
        answers.len() == ASKED.len() && answers[0] == answers[1],
        "the inner guest reads something else of our leaf than of one beside it: {answers:#?}"
    );

    // The outer guest reads the host's number.
    let printed = linux.run(&format!(
        "cpuid -1 -l {EXITS_64:#x} -s {:#x}",
        cpuid | NESTED
    ))?;
    let line = printed.lines().find(|line| line.contains("eax="));
    let printed: CpuidLine = line.context("cpuid prints an answer")?.parse()?;
    ensure!(
        u64::from(printed.registers.eax) == expected && printed.registers.edx == 0,
        "the outer guest reads {printed:x?} instead of {expected}"
    );
    details(&linux)?;
    linux.stop()?;
    span.end()?;
    Ok(())
}

/// What the exits of the guest in the guest were about stands in rows of its own, and what those of
/// the Linux guest were about in others.
fn details(linux: &Linux) -> Result<()> {
    /// A leaf that no program asks for by itself.
    const OUTER: u32 = 0x10ab_cdef;
    const TIMES: u32 = 20;
    let file = File::open(super::details::DEVICE)?;
    turn_on(&file)?;
    linux.run(&format!("/root/system-tests --nested {COUNT}"))?;
    linux.run(&format!(
        "for i in $(seq {TIMES}); do cpuid -1 -l {OUTER:#x} -s 0 >/dev/null || exit; done"
    ))?;
    let bytes = read()?;
    drop(file);
    let snapshot = Snapshot::parse(&bytes)?;
    let pid = linux.pid()?;
    let entries = snapshot.tables().filter(|tables| {
        let vcpu = snapshot.vcpus().nth(tables.vcpu);
        vcpu.is_some_and(|vcpu| vcpu.pid() == pid)
    });
    let entries: Vec<Entry> = entries.flat_map(|tables| tables.entries()).collect();

    let [ours, beside] = ASKED.map(|leaf| u64::from(leaf) | 10 << 32);
    let out = OUT_PORT | 1 << 36;
    for (nested, kind, key, due) in [
        (true, Kind::Cpuid, 0, COUNT),
        (true, Kind::Cpuid, ours, 1),
        (true, Kind::Cpuid, beside, 1),
        (true, Kind::Cpuid, OUTER.into(), 0),
        (true, Kind::Port, out, OUTS),
        (false, Kind::Cpuid, ours, 0),
        (false, Kind::Cpuid, beside, 0),
        (false, Kind::Cpuid, OUTER.into(), TIMES),
        (false, Kind::Port, out, 0),
    ] {
        let due = u64::from(due);
        let mut rows = entries.iter().filter(|entry| {
            entry.table == TABLE_DETAILS
                && !entry.others
                && (entry.nested, entry.detail_kind, entry.key) == (nested, kind as u8, key)
        });
        let row = rows.next();
        let (exits, missed) = row.map_or((0, 0), |row| (row.exits, row.missed.exits));
        println!("{kind:?} {key:#x}, nested {nested}: {exits}, bound {missed}");
        // What is rare may have given way: the Linux guest asks for all leaves that there are.
        let is_whole = exits <= due && due <= exits + missed || due <= 1 && row.is_none();
        ensure!(
            is_whole && rows.next().is_none(),
            "{kind:?} {key:#x} (nested: {nested}) has {exits} exits and {missed} more of {due}"
        );
    }
    // The inner guest's code is in its first 64 KiB, where Linux has none.
    let cpuid = Reason::Code(host::pick(10, 0x72)?);
    let code = entries
        .iter()
        .filter(|entry| (entry.table, entry.others, entry.reason) == (TABLE_CODE, false, cpuid));
    let (inner, outer): (Vec<&Entry>, Vec<&Entry>) = code.partition(|entry| entry.key < 1 << 16);
    let exits: u64 = inner.iter().map(|entry| entry.exits).sum();
    let due = u64::from(COUNT)..=u64::from(COUNT) + ASKED.len() as u64;
    ensure!(
        inner.iter().all(|entry| entry.nested) && due.contains(&exits),
        "the inner guest's code is told as {inner:x?}"
    );
    ensure!(
        !outer.is_empty() && outer.iter().all(|entry| !entry.nested),
        "the outer guest's code is told as {outer:x?}"
    );
    Ok(())
}

/// What runs in the guest: a guest of its own. Prints what it reads of [`ASKED`].
pub fn run_in_guest(count: u32) -> Result<()> {
    Machine::new(Config::new(Program::Cpuid, Mode::Long, count))?.run()?;
    Machine::new(Config::new(Program::OutUser, Mode::Long, OUTS))?.run()?;
    let queries = ASKED.map(|leaf| Quad::cpuid(leaf, 10));
    for answer in ask(Mode::Long, &queries)?.1 {
        println!("{answer:x?}");
    }
    Ok(())
}

/// What the inner guest asks when its CPUID faults.
fn faulting_query() -> Quad {
    Quad::cpuid(ASKED[0], 10)
}

/// Run two guests in the guest, at CPL 3: one whose CPUID is answered, and one whose CPUID faults.
/// Prints what the first reads of [`ASKED`], how the second ends, and its registers then.
pub fn run_faulting_in_guest() -> Result<()> {
    let queries = ASKED.map(|leaf| Quad::cpuid(leaf, 10));
    for answer in ask(Mode::User, &queries)?.1 {
        println!("{answer:x?}");
    }
    let mut machine = Machine::new(Config::query(Mode::User, vec![faulting_query()]))?;
    // The CPU is the thread's own when it enters the guest, with what it has of this.
    set_cpuid(false)?;
    let end = machine.run_one(0);
    set_cpuid(true)?;
    println!("{end:?}");
    println!("{:x?}", machine.registers()?);
    Ok(())
}

/// Let CPUID of this thread work, or fault (arch_prctl(2), ARCH_SET_CPUID).
fn set_cpuid(works: bool) -> Result<()> {
    const ARCH_SET_CPUID: libc::c_int = 0x1012;
    // SAFETY: No addresses.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_SET_CPUID,
            libc::c_ulong::from(works),
        )
    };
    if ret == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error()).context("this kernel cannot have CPUID fault")
}
