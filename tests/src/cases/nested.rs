//! A guest in the guest: the host counts its exits and tells them apart, and it reads what
//! its own hypervisor answers.

use std::env;

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reasons::Isa;
use tiny_guests::{Config, Inner, Machine, Mode, Program, Quad};

use super::{answers::ask, Case};
use crate::host::{
    self,
    leaves::{EXITS_64, MAP_2021},
    linux::{Linux, Printed},
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

/// What asks for those from nested guests alone.
const NESTED: u32 = 1 << 16;

/// The bit of the general protection fault in a bitmap of exceptions.
const GP: u32 = 1 << 13;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::with(
            "",
            "nested: exits of a guest in the guest are told apart",
            nested,
        )
        .with_linux()
        .within(600),
        Case::with(
            "",
            "nested: where CPUID faults in a guest in the guest, its registers stay",
            faulting,
        )
        .unless(l1_gets_all),
    ]
}

/// KVM's `nested_vmx_l1_wants_exit()` takes each CPUID for the guest's hypervisor, so the function
/// that the meter redirects is never called for a guest of that.
fn l1_gets_all() -> Result<Option<&'static str>> {
    Ok((host::isa()? == Isa::Vmx)
        .then_some("on VMX a guest's hypervisor gets every CPUID of its own guest"))
}

/// A guest's hypervisor leaves its guest's CPUID to KVM, which has it fault.
fn faulting() -> Result<()> {
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
    let lines = log.own_lines()?;
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
    let lines = log.own_lines()?;
    ensure!(lines.is_empty(), "CPUID that faulted is logged: {lines:?}");
    span.end()?;
    Ok(())
}

fn nested() -> Result<()> {
    let span = Span::begin()?;
    let modules: &[&str] = host::pick(
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
    let this = env::current_exe().context("the path of this program is not known")?;
    let mut files = vec![format!("{}:system-tests", this.display())];
    let path = |module| format!("{GUEST_MODULES}/kernel/{module}.ko");
    files.extend(modules.iter().map(path));
    let mut options = vec!["--memory", "512"];
    for file in &files {
        options.extend(["--file", file]);
    }
    let linux = Linux::boot(&options)?;
    for module in modules {
        let name = module.rsplit('/').next().unwrap_or(module);
        linux.run(&format!("insmod /root/{name}.ko"))?;
    }
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
    let printed: Printed = line.context("cpuid prints an answer")?.parse()?;
    ensure!(
        u64::from(printed.registers.eax) == expected && printed.registers.edx == 0,
        "the outer guest reads {printed:x?} instead of {expected}"
    );
    linux.stop()?;
    span.end()?;
    Ok(())
}

/// What runs in the guest: a guest of its own. Prints what it reads of [`ASKED`].
pub fn run_in_guest(count: u32) -> Result<()> {
    Machine::new(Config::new(Program::Cpuid, Mode::Long, count))?.run()?;
    let queries = ASKED.map(|leaf| Quad::cpuid(leaf, 10));
    for answer in ask(Mode::Long, &queries)?.1 {
        println!("{answer:x?}");
    }
    Ok(())
}
