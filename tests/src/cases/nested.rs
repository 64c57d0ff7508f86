// SPDX-License-Identifier: GPL-2.0

//! L2 guests: the host counts their exits separately, and an L2 guest reads what its own hypervisor
//! answers.

use std::{env, fs::File, io, path::PathBuf};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter_meter::{
    detail::Kind,
    reader::{Snapshot, TableRow},
    reasons::Isa,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS},
};
use tiny_guests::{Config, L2Exit, Mode, Program, Registers64, TinyVm};

use super::{answers::ask, details::turn_on, Case};
use crate::host::{
    self, codes,
    leaves::{EXITS_64, MAP_2021},
    linux::{CpuidLine, Linux},
    log::Log,
    meter::{read_device, MeterSnapshot, DEVICE},
    span::Span,
    VMM_PORT,
};

/// Modules of the guest's kernel, which may differ from the host's.
const GUEST_MODULES: &str = "/lab/guest/modules";

/// CPUID exits of the L2 guest before it asks for [`ASKED`].
const COUNT: u32 = 300;

/// Leaves that the L2 guest asks for at its end: one of the meter's, and one next to them. Both are
/// out of range for KVM, which answers all such leaves alike.
const ASKED: [u32; 2] = [MAP_2021.reason_exits, 0x4fff_fffb];

/// OUTs of a second L2 guest to its VMM.
const OUTS: u32 = 100;

/// Bit in ECX that asks for the exits of L2 guests only.
const NESTED: u32 = 1 << 16;

/// Bit of the general protection fault in an exception bitmap.
const GP: u32 = 1 << 13;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with_module(
            "",
            "nested: exits of an L2 guest are counted separately",
            nested,
        )
        .with_linux()
        .within(600),
        Case::with_module(
            "",
            "nested: a faulting CPUID of an L2 guest leaves its registers alone (SVM)",
            faulting_svm,
        )
        .skip_if(not_svm),
        Case::with_module(
            "",
            "nested: a faulting CPUID of an L2 guest leaves its registers alone (VMX)",
            faulting_vmx,
        )
        .skip_if(not_vmx)
        .within(600),
    ]
}

/// Return a reason on VMX, where CPUID always exits to the L1 hypervisor.
fn not_svm() -> Result<Option<&'static str>> {
    Ok((host::vendor()? != Isa::Svm)
        .then_some("only on SVM can an L1 hypervisor leave CPUID to KVM"))
}

/// Return a reason on SVM. There KVM passes CPUID, faulting or not, to an L1 hypervisor that
/// intercepts it (`nested_svm_intercept()`), as Linux does.
fn not_vmx() -> Result<Option<&'static str>> {
    Ok((host::vendor()? != Isa::Vmx)
        .then_some("on SVM a Linux guest gets its L2 guest's CPUID even if it faults"))
}

/// Run an L2 guest whose hypervisor leaves CPUID to KVM, and let CPUID fault.
fn faulting_svm() -> Result<()> {
    let span = Span::begin()?;
    let mut log = Log::from_now()?;
    let query = Registers64::cpuid(MAP_2021.reason_exits, 0x72);
    let ask = |faults: bool, exceptions| {
        let mut machine = TinyVm::with_l2_guest(query, exceptions)?;
        if faults {
            machine.make_cpuid_fault()?;
        }
        machine.run()?;
        anyhow::Ok(machine.inner()?)
    };
    // Without the fault the meter answers, and the L2 guest continues to its VMMCALL.
    let answered = ask(false, GP)?;
    let expected = L2Exit {
        exit: 0x81,
        behind: 2,
        registers: Registers64 {
            rax: 1,
            ..Registers64::default()
        },
    };
    ensure!(
        answered == expected,
        "the L2 guest reads {answered:x?} from its first CPUID"
    );
    let lines = log.module_lines()?;
    ensure!(lines.len() == 1, "one query is logged by {lines:?}");

    // The fault goes to the hypervisor (exit 0x4d), or into the L2 guest, where it ends in a shutdown
    // (0x7f) because there is no handler.
    for (exceptions, exit) in [(GP, 0x4d), (0, 0x7f)] {
        let faulted = ask(true, exceptions)?;
        let expected = L2Exit {
            exit,
            behind: 0,
            registers: query,
        };
        ensure!(
            faulted == expected,
            "after the L2 guest's CPUID faulted, its hypervisor finds {faulted:x?} instead of \
             {expected:x?}"
        );
    }
    let lines = log.module_lines()?;
    ensure!(lines.is_empty(), "CPUID that faulted is logged: {lines:?}");
    span.end()?;
    Ok(())
}

/// Let CPUID fault in an L2 guest of a Linux guest. KVM then keeps the L2 guest's CPUID from the
/// Linux guest (`nested_vmx_l0_wants_exit()`), and injects the fault itself.
fn faulting_vmx() -> Result<()> {
    let span = Span::begin()?;
    let linux = boot_hypervisor()?;
    // With the parameter, the Linux guest's KVM intercepts the general protection fault of its guest
    // (`vmx_update_exception_bitmap()`), so the fault is pending in `exception_vmexit`; without it, in
    // `exception`.
    for parameters in ["enable_vmware_backdoor=1", ""] {
        load_kvm(&linux, parameters)?;
        let numbers = || nested_cpuids(&linux);
        let before = numbers()?;
        let mut log = Log::from_now()?;
        let printed = linux.run("/root/system-tests --faulting")?;
        let lines = log.module_lines()?;
        let after = numbers()?;

        let printed: Vec<&str> = printed.lines().collect();
        let [ours, beside, end, registers] = printed[..] else {
            bail!("the Linux guest prints {printed:#?} about its L2 guests");
        };
        ensure!(
            ours == beside,
            "without the fault the L2 guest reads {ours} from our leaf, and {beside} from the one next to it"
        );
        ensure!(
            end.contains("Shutdown"),
            "the L2 guest has no handler for the fault, and ends with {end}"
        );
        let expected = format!("{:x?}", faulting_query());
        ensure!(
            registers == expected,
            "with '{parameters}' the L2 guest's registers are {registers} instead of {expected} after \
             its CPUID faulted"
        );
        let expected = ASKED.len() as u64 + 1;
        ensure!(
            after - before == expected,
            "the L2 guests execute CPUID {expected} times, and {} such exits are nested",
            after - before
        );
        ensure!(lines.is_empty(), "CPUID that faulted is logged: {lines:?}");
        unload_kvm(&linux)?;
    }
    linux.stop()?;
    span.end()?;
    Ok(())
}

/// Return KVM's modules for a guest in the order of loading: the dependencies of `kvm` first, the
/// vendor module last. Debian's cloud kernel has no ccp, and its kvm-amd needs none.
fn kvm_modules() -> Result<Vec<&'static str>> {
    let modules = host::by_vendor(
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

/// Return the path of a guest's module in the host.
fn path_of(module: &str) -> PathBuf {
    format!("{GUEST_MODULES}/kernel/{module}.ko").into()
}

/// Return a module's file name without its extension.
fn file_name(module: &str) -> &str {
    module.rsplit('/').next().unwrap_or(module)
}

/// Boot a Linux guest with KVM's modules and this program in it.
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

/// Load KVM in the Linux guest; `parameters` go to the module `kvm`.
fn load_kvm(linux: &Linux, parameters: &str) -> Result<()> {
    for module in kvm_modules()? {
        let name = file_name(module);
        let parameters = if name == "kvm" { parameters } else { "" };
        linux.run(&format!("insmod /root/{name}.ko {parameters}"))?;
    }
    Ok(())
}

/// Unload KVM in the Linux guest.
fn unload_kvm(linux: &Linux) -> Result<()> {
    for module in kvm_modules()?.iter().rev() {
        linux.run(&format!("rmmod {}", file_name(module)))?;
    }
    Ok(())
}

/// Return the number of nested CPUID exits of the Linux guest's vCPU.
fn nested_cpuids(linux: &Linux) -> Result<u64> {
    let meter = MeterSnapshot::read()?;
    let pid = linux.pid()?;
    let vcpu = meter.vcpus.into_iter().find(|vcpu| vcpu.pid == pid);
    let nested = vcpu.context("the guest is metered")?.numbers.nested;
    Ok(nested.get(&codes::cpuid()?).copied().unwrap_or(0))
}

/// Run an L2 guest in a Linux guest. Then call `check` with the Linux guest and the number of the L2
/// guest's CPUID exits.
pub(super) fn with_l2_guest(check: impl FnOnce(&Linux, u64) -> Result<()>) -> Result<()> {
    let linux = boot_hypervisor()?;
    load_kvm(&linux, "")?;
    linux.run(&format!("/root/system-tests --nested {COUNT}"))?;
    check(&linux, u64::from(COUNT) + ASKED.len() as u64)?;
    linux.stop()?;
    Ok(())
}

fn nested() -> Result<()> {
    let span = Span::begin()?;
    let linux = boot_hypervisor()?;
    load_kvm(&linux, "")?;
    let pid = linux.pid()?;
    let numbers = || {
        let meter = MeterSnapshot::read()?;
        let vcpu = meter.vcpus.into_iter().find(|vcpu| vcpu.pid == pid);
        anyhow::Ok(vcpu.context("the guest is metered")?.numbers)
    };
    let before = numbers()?;
    ensure!(
        before.nested.is_empty(),
        "there are nested exits before there is an L2 guest: {:?}",
        before.nested
    );

    let printed = linux.run(&format!("/root/system-tests --nested {COUNT}"))?;
    let after = numbers()?;
    let cpuid = codes::cpuid()?;
    let nested = after.nested.get(&cpuid).copied().unwrap_or(0);
    let expected = u64::from(COUNT) + ASKED.len() as u64;
    ensure!(
        nested == expected,
        "the L2 guest executes CPUID {expected} times, and {nested} such exits are nested: {:?}",
        after.nested
    );
    let answers: Vec<&str> = printed.lines().collect();
    ensure!(
        answers.len() == ASKED.len() && answers[0] == answers[1],
        "the L2 guest's answers from our leaf and from the one next to it differ: {answers:#?}"
    );

    // The L1 guest reads the host's number.
    let printed = linux.run(&format!(
        "cpuid -1 -l {EXITS_64:#x} -s {:#x}",
        cpuid | NESTED
    ))?;
    let line = printed.lines().find(|line| line.contains("eax="));
    let printed: CpuidLine = line.context("cpuid prints an answer")?.parse()?;
    ensure!(
        u64::from(printed.registers.eax) == expected && printed.registers.edx == 0,
        "the L1 guest reads {printed:x?} instead of {expected}"
    );
    check_details(&linux)?;
    linux.stop()?;
    span.end()?;
    Ok(())
}

/// Check that the details of L2's exits and those of the Linux guest's exits are in separate rows.
fn check_details(linux: &Linux) -> Result<()> {
    /// A leaf that no other program asks for.
    const L1_LEAF: u32 = 0x10ab_cdef;
    const TIMES: u32 = 20;
    let file = File::open(DEVICE)?;
    turn_on(&file)?;
    linux.run(&format!("/root/system-tests --nested {COUNT}"))?;
    linux.run(&format!(
        "for i in $(seq {TIMES}); do cpuid -1 -l {L1_LEAF:#x} -s 0 >/dev/null || exit; done"
    ))?;
    let bytes = read_device()?;
    drop(file);
    let snapshot = Snapshot::parse(&bytes)?;
    let pid = linux.pid()?;
    let entries = snapshot.tables().filter(|tables| {
        let vcpu = snapshot.vcpus().nth(tables.vcpu);
        vcpu.is_some_and(|vcpu| vcpu.pid() == pid)
    });
    let entries: Vec<TableRow> = entries.flat_map(|tables| tables.entries()).collect();

    let [ours, beside] = ASKED.map(|leaf| u64::from(leaf) | 10 << 32);
    let out = VMM_PORT | 1 << 36;
    for (nested, kind, key, due) in [
        (true, Kind::Cpuid, 0, COUNT),
        (true, Kind::Cpuid, ours, 1),
        (true, Kind::Cpuid, beside, 1),
        (true, Kind::Cpuid, L1_LEAF.into(), 0),
        (true, Kind::Port, out, OUTS),
        (false, Kind::Cpuid, ours, 0),
        (false, Kind::Cpuid, beside, 0),
        (false, Kind::Cpuid, L1_LEAF.into(), TIMES),
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
        // A rare row may have given way because the Linux guest asks for all existing leaves.
        let is_within_bound = exits <= due && due <= exits + missed || due <= 1 && row.is_none();
        ensure!(
            is_within_bound && rows.next().is_none(),
            "{kind:?} {key:#x} (nested: {nested}) has {exits} exits and {missed} more of {due}"
        );
    }
    // The L2 guest's code is in its first 64 KiB, where Linux has none.
    let cpuid = Reason::Code(codes::cpuid()?);
    let code = entries
        .iter()
        .filter(|entry| (entry.table, entry.others, entry.reason) == (TABLE_CODE, false, cpuid));
    let (l2, l1): (Vec<&TableRow>, Vec<&TableRow>) = code.partition(|entry| entry.key < 1 << 16);
    let exits: u64 = l2.iter().map(|entry| entry.exits).sum();
    let due = u64::from(COUNT)..=u64::from(COUNT) + ASKED.len() as u64;
    ensure!(
        l2.iter().all(|entry| entry.nested) && due.contains(&exits),
        "the L2 guest's code has the rows {l2:x?}"
    );
    ensure!(
        !l1.is_empty() && l1.iter().all(|entry| !entry.nested),
        "the L1 guest's code has the rows {l1:x?}"
    );
    Ok(())
}

/// Run L2 guests, in the L1 guest. Print what the last one reads from [`ASKED`].
pub fn run_l2_guest(count: u32) -> Result<()> {
    TinyVm::new(Config::new(Program::Cpuid, Mode::Long, count))?.run()?;
    TinyVm::new(Config::new(Program::OutUser, Mode::Long, OUTS))?.run()?;
    let queries = ASKED.map(|leaf| Registers64::cpuid(leaf, 10));
    for answer in ask(Mode::Long, &queries)?.1 {
        println!("{answer:x?}");
    }
    Ok(())
}

/// Return the query of the L2 guest whose CPUID faults.
fn faulting_query() -> Registers64 {
    Registers64::cpuid(ASKED[0], 10)
}

/// Run two L2 guests at CPL 3, in the L1 guest: one whose CPUID is answered, and one whose CPUID
/// faults. Print what the first reads from [`ASKED`], and how the second ends and with which registers.
pub fn run_faulting_l2_guest() -> Result<()> {
    let queries = ASKED.map(|leaf| Registers64::cpuid(leaf, 10));
    for answer in ask(Mode::User, &queries)?.1 {
        println!("{answer:x?}");
    }
    let mut machine = TinyVm::new(Config::query(Mode::User, vec![faulting_query()]))?;
    // The setting belongs to the thread, and is in force on its CPU while it runs the guest.
    set_cpuid(false)?;
    let end = machine.run_one(0);
    set_cpuid(true)?;
    println!("{end:?}");
    println!("{:x?}", machine.registers()?);
    Ok(())
}

/// Let CPUID work or fault in this thread (arch_prctl(2), ARCH_SET_CPUID).
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
