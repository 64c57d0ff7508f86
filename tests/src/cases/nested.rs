//! A guest in the guest: the host counts its exits and tells them apart, and it reads what
//! its own hypervisor answers.

use std::env;

use anyhow::{ensure, Context as _, Result};
use tiny_guests::{Config, Machine, Mode, Program, Quad};

use super::{answers::ask, Case};
use crate::host::{
    self,
    leaves::{EXITS_64, MAP_2021},
    linux::{Linux, Printed},
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

pub(super) fn cases() -> Vec<Case> {
    vec![Case::with(
        "",
        "nested: exits of a guest in the guest are told apart",
        nested,
    )
    .with_linux()
    .within(600)]
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
