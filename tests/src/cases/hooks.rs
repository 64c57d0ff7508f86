// SPDX-License-Identifier: GPL-2.0

//! Others who hook the same functions of KVM. Whoever comes first, both work, or the one
//! who comes second is refused and told why.

use std::{fs, path::Path};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reasons::Isa;
use tiny_guests::{Config, Machine, Mode, Program, Quad};

use super::{answers::ask, Case};
use crate::host::{self, bpf::Fentry, hist, leaves::MAP_2021, log::Log, module, span::Span};

const TRACING: &str = "/sys/kernel/tracing";

/// The functions that the module hooks.
const FUNCTIONS: [&str; 4] = [
    "kvm_emulate_cpuid",
    "kvm_arch_vcpu_load",
    "kvm_arch_vcpu_put",
    "kvm_mmu_destroy",
];

/// Somebody else's hooks.
trait Other {
    const NAME: &'static str;

    /// Sets them.
    fn set() -> Result<Self>
    where
        Self: Sized;

    /// How often that of kvm_arch_vcpu_load() was hit.
    fn hits(&self) -> Result<u64>;

    /// Takes them away.
    fn clear(self) -> Result<()>;
}

struct FunctionTracer;

impl Other for FunctionTracer {
    const NAME: &'static str = "ftrace's function tracer";

    fn set() -> Result<Self> {
        let functions = FUNCTIONS.map(|name| format!("{name}\n")).concat();
        write("set_ftrace_filter", &functions)?;
        write("trace", "")?;
        write("current_tracer", "function")?;
        Ok(Self)
    }

    fn hits(&self) -> Result<u64> {
        let trace = read("trace")?;
        let hits = trace
            .lines()
            .filter(|line| line.contains("kvm_arch_vcpu_load"));
        Ok(hits.count() as u64)
    }

    fn clear(self) -> Result<()> {
        write("current_tracer", "nop")?;
        write("set_ftrace_filter", "")?;
        write("trace", "")
    }
}

struct Kprobes;

impl Other for Kprobes {
    const NAME: &'static str = "kprobes";

    fn set() -> Result<Self> {
        for name in FUNCTIONS {
            append("kprobe_events", &format!("p:soak/{name} {name}"))?;
        }
        write("events/soak/enable", "1")?;
        Ok(Self)
    }

    fn hits(&self) -> Result<u64> {
        let profile = read("kprobe_profile")?;
        let line = profile
            .lines()
            .find(|line| line.contains("kvm_arch_vcpu_load"))
            .context("the profile of kprobes lacks kvm_arch_vcpu_load")?;
        let hits = line.split_whitespace().nth(1).context("it has no hits")?;
        Ok(hits.parse()?)
    }

    fn clear(self) -> Result<()> {
        write("events/soak/enable", "0")?;
        for name in FUNCTIONS {
            append("kprobe_events", &format!("-:soak/{name}"))?;
        }
        Ok(())
    }
}

struct Bpf(Vec<Fentry>);

impl Other for Bpf {
    const NAME: &'static str = "BPF's fentry";

    fn set() -> Result<Self> {
        Fentry::of_all("kvm", &FUNCTIONS).map(Self)
    }

    fn hits(&self) -> Result<u64> {
        let mut programs = FUNCTIONS.iter().zip(&self.0);
        let loads = programs.find(|(name, _)| **name == "kvm_arch_vcpu_load");
        loads.context("it has no program")?.1.runs()
    }

    fn clear(self) -> Result<()> {
        Ok(())
    }
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        beside_other::<FunctionTracer>(),
        beside_other::<Kprobes>(),
        beside_other::<Bpf>().unless(no_types),
        Case::without(
            "hooks: a second redirect is refused by name, and all is undone",
            second_redirect,
        ),
        Case::with(
            "",
            "hooks: of KVM's module that comes back, the exit codes' reader is found before it runs",
            found_in_time,
        )
        .unless(reads_by_itself)
        .within(120),
    ]
}

/// The kernels that are built for the lab (scripts/configs) do without.
pub(super) fn no_types() -> Result<Option<&'static str>> {
    let types = Path::new("/sys/kernel/btf/vmlinux").exists();
    Ok((!types).then_some("this kernel has no types for BPF (DEBUG_INFO_BTF)"))
}

fn beside_other<T: Other + 'static>() -> Case {
    Case::without(
        format!("hooks: beside {}, whoever comes first", T::NAME),
        || {
            hist::Hist::begin().map(drop)?;
            beside::<T>()
        },
    )
}

fn path(name: &str) -> String {
    format!("{TRACING}/{name}")
}

fn read(name: &str) -> Result<String> {
    fs::read_to_string(path(name)).with_context(|| format!("{} cannot be read", path(name)))
}

fn write(name: &str, text: &str) -> Result<()> {
    fs::write(path(name), text).with_context(|| format!("{} does not take '{text}'", path(name)))
}

fn append(name: &str, text: &str) -> Result<()> {
    use std::io::Write as _;
    let mut file = fs::OpenOptions::new().append(true).open(path(name))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("{} does not take '{text}'", path(name)))
}

/// A guest is metered, and answered.
fn meters() -> Result<()> {
    let span = Span::begin()?;
    let config = Config::new(Program::OutUser, Mode::Long, 100);
    Machine::new(config.clone())?.run()?;
    host::expected(&config)?.check(&span.end()?)?;
    let query = Quad::cpuid(MAP_2021.reason_exits, host::pick(10, 0x72)?);
    let answers = ask(Mode::Long, &[query, query])?.1;
    ensure!(
        answers[1].rax == 2,
        "a guest reads {:x?} of its two CPUID exits",
        answers[1]
    );
    Ok(())
}

/// Demand that so many functions have the module's own trampoline: those that it is alone at.
fn has_trampolines(count: usize) -> Result<()> {
    let functions = read("enabled_functions")?;
    let own = functions
        .lines()
        .filter(|line| line.contains("tramp: exitmeter_trampoline_"));
    let own: Vec<_> = own.collect();
    ensure!(
        own.len() == count,
        "not {count} functions have the module's trampoline, but {own:#?}"
    );
    Ok(())
}

fn beside<T: Other>() -> Result<()> {
    let hit = |other: &T, words: &str, before: u64| {
        let hits = other.hits()?;
        ensure!(hits >= before + 100, "{} saw {hits} calls {words}", T::NAME);
        anyhow::Ok(hits)
    };
    // The meter first.
    let loaded = module::Loaded::with("log_queries=0")?;
    has_trampolines(3)?;
    let other = T::set()?;
    // Whatever comes, nothing is left for the next case.
    let both = (|| {
        has_trampolines(0)?;
        meters()?;
        let hits = hit(&other, "beside the meter", 0)?;
        loaded.unload()?;
        // The other first.
        let loaded = module::Loaded::with("log_queries=0")?;
        meters()?;
        hit(&other, "when the meter came back", hits)?;
        anyhow::Ok(loaded)
    })();
    other.clear()?;
    let loaded = both?;
    has_trampolines(3)?;
    meters()?;
    // And the meter goes first.
    let other = T::set()?;
    let alone = (|| {
        let hits = other.hits()?;
        loaded.unload()?;
        let mut machine = Machine::new(Config::new(Program::OutUser, Mode::Long, 100))?;
        machine.run()?;
        hit(&other, "when the meter was gone", hits).map(drop)
    })();
    other.clear()?;
    alone
}

/// On VMX the module reads the VMCS by itself.
fn reads_by_itself() -> Result<Option<&'static str>> {
    let vmx = host::isa()? == Isa::Vmx;
    Ok(vmx.then_some("the module needs no reader of KVM's here"))
}

/// Finds functions by kprobes, so those are traced, beside the kernel's own event between a
/// module's links and its first instruction.
fn found_in_time() -> Result<()> {
    let paging = host::nested_paging()?;
    write("trace", "")?;
    write("set_ftrace_filter", "register_kprobe\n")?;
    write("current_tracer", "function")?;
    write("events/module/module_load/enable", "1")?;
    let traced = (|| {
        module::unload_vendor()?;
        module::load_vendor(paging)?;
        read("trace")
    })();
    write("events/module/module_load/enable", "0")?;
    write("current_tracer", "nop")?;
    write("set_ftrace_filter", "")?;
    write("trace", "")?;
    let traced = traced?;
    let place = |words: &str| traced.lines().position(|line| line.contains(words));
    let found = place("register_kprobe").context("nothing was looked for")?;
    let runs = place("module_load: kvm_amd").context("kvm_amd was not seen to load")?;
    ensure!(
        found < runs,
        "the reader is looked for when kvm_amd may run guests already: {traced}"
    );
    meters()
}

/// A module that redirects the same function: the meter itself, by another name.
fn second_redirect() -> Result<()> {
    let twin = Path::new("/tmp/exitmetes.ko");
    let bytes = fs::read(module::FILE)?;
    let renamed = replace(&bytes, b"exitmeter", b"exitmetes");
    ensure!(renamed != bytes, "the module does not hold its own name");
    fs::write(twin, renamed)?;

    let first = module::Loaded::with("log_queries=0")?;
    let mut log = Log::from_now()?;
    let error = module::try_load_file(twin, "").err();
    let number = error.as_ref().and_then(std::io::Error::raw_os_error);
    ensure!(
        number == Some(libc::EBUSY),
        "the second redirect ends with {error:?} instead of EBUSY"
    );
    let lines = log.lines()?;
    ensure!(
        lines
            .iter()
            .any(|line| line.starts_with("exitmetes: ") && line.contains("kvm:kvm_emulate_cpuid")),
        "the log does not name the function that is taken: {lines:#?}"
    );
    ensure!(
        !module::is_loaded("exitmetes")? && !Path::new("/dev/exitmetes").exists(),
        "the refused module left something behind"
    );
    meters()?;
    // Without the redirect both meter.
    module::try_load_file(twin, "leaf_map=0")?;
    let both = meters();
    module::remove("exitmetes")?;
    both?;
    meters()?;
    first.unload()?;
    // And now there is room for the other.
    module::try_load_file(twin, "")?;
    module::remove("exitmetes")
}

/// `bytes` with each `from` as `to`, which is as long.
pub(super) fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut at = 0;
    while let Some(found) = bytes[at..]
        .windows(from.len())
        .position(|window| window == from)
    {
        bytes[at + found..][..to.len()].copy_from_slice(to);
        at += found + to.len();
    }
    bytes
}
