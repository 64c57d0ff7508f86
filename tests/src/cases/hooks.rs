// SPDX-License-Identifier: GPL-2.0

//! Other hooks on the same functions of KVM. In either order both work, or the second one is refused
//! with a reason.

use std::{fs, path::Path};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reasons::Isa;
use tiny_guests::{Config, Mode, Program, Registers64, TinyVm};

use super::{answers::ask, Case};
use crate::host::{self, bpf::Fentry, codes, hist, leaves::MAP_2021, log::Log, module, span::Span};

const TRACING: &str = "/sys/kernel/tracing";

/// KVM functions that the module hooks.
const FUNCTIONS: [&str; 5] = [
    "kvm_create_lapic",
    "kvm_emulate_cpuid",
    "kvm_arch_vcpu_load",
    "kvm_arch_vcpu_put",
    "kvm_mmu_destroy",
];

/// A foreign user of the same hooks.
trait OtherHooks {
    const NAME: &'static str;

    /// Attach to [`FUNCTIONS`].
    fn attach() -> Result<Self>
    where
        Self: Sized;

    /// Return the number of calls of kvm_arch_vcpu_load() seen so far.
    fn hits(&self) -> Result<u64>;

    /// Detach from all functions.
    fn detach(self) -> Result<()>;
}

struct FunctionTracer;

impl OtherHooks for FunctionTracer {
    const NAME: &'static str = "ftrace's function tracer";

    fn attach() -> Result<Self> {
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

    fn detach(self) -> Result<()> {
        write("current_tracer", "nop")?;
        write("set_ftrace_filter", "")?;
        write("trace", "")
    }
}

struct Kprobes;

impl OtherHooks for Kprobes {
    const NAME: &'static str = "kprobes";

    fn attach() -> Result<Self> {
        for name in FUNCTIONS {
            append("kprobe_events", &format!("p:other/{name} {name}"))?;
        }
        write("events/other/enable", "1")?;
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

    fn detach(self) -> Result<()> {
        write("events/other/enable", "0")?;
        for name in FUNCTIONS {
            append("kprobe_events", &format!("-:other/{name}"))?;
        }
        Ok(())
    }
}

struct Bpf(Vec<Fentry>);

impl OtherHooks for Bpf {
    const NAME: &'static str = "BPF's fentry";

    fn attach() -> Result<Self> {
        Fentry::attach_all("kvm", &FUNCTIONS).map(Self)
    }

    fn hits(&self) -> Result<u64> {
        let mut programs = FUNCTIONS.iter().zip(&self.0);
        let loads = programs.find(|(name, _)| **name == "kvm_arch_vcpu_load");
        loads.context("it has no program")?.1.runs()
    }

    fn detach(self) -> Result<()> {
        Ok(())
    }
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        case_beside::<FunctionTracer>(),
        case_beside::<Kprobes>(),
        case_beside::<Bpf>().skip_if(no_btf),
        Case::without_module(
            "hooks: a second redirect is refused with the function's name, and leaves nothing behind",
            second_redirect,
        ),
        Case::with_module(
            "",
            "hooks: the reader of exit codes is found before a reloaded KVM module runs",
            reader_found_in_time,
        )
        .skip_if(no_reader_needed)
        .within(120),
    ]
}

/// Return a reason on kernels without BTF, such as those built for the lab (scripts/configs).
pub(super) fn no_btf() -> Result<Option<&'static str>> {
    let types = Path::new("/sys/kernel/btf/vmlinux").exists();
    Ok((!types).then_some("this kernel has no types for BPF (DEBUG_INFO_BTF)"))
}

fn case_beside<T: OtherHooks + 'static>() -> Case {
    Case::without_module(
        format!("hooks: {} works beside the meter, in either order", T::NAME),
        || {
            hist::Hist::begin().map(drop)?;
            works_beside::<T>()
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

/// Check that a guest is metered and its queries are answered.
fn check_metering() -> Result<()> {
    let span = Span::begin()?;
    let config = Config::new(Program::OutUser, Mode::Long, 100);
    TinyVm::new(config.clone())?.run()?;
    host::expected(&config)?.check(&span.end()?)?;
    let query = Registers64::cpuid(MAP_2021.reason_exits, codes::cpuid()?);
    let answers = ask(Mode::Long, &[query, query])?.1;
    ensure!(
        answers[1].rax == 2,
        "a guest with two CPUID exits reads {:x?}",
        answers[1]
    );
    Ok(())
}

/// Check that `count` functions have the module's own trampoline: those that only the module hooks.
fn check_trampolines(count: usize) -> Result<()> {
    let functions = read("enabled_functions")?;
    let own = functions
        .lines()
        .filter(|line| line.contains("tramp: exitmeter_trampoline_"));
    let own: Vec<_> = own.collect();
    ensure!(
        own.len() == count,
        "{own:#?} have the module's trampoline instead of {count} functions"
    );
    Ok(())
}

fn works_beside<T: OtherHooks>() -> Result<()> {
    let check_hits = |other: &T, words: &str, before: u64| {
        let hits = other.hits()?;
        ensure!(hits >= before + 100, "{} saw {hits} calls {words}", T::NAME);
        anyhow::Ok(hits)
    };
    // First the meter, then the other.
    let loaded = module::Loaded::with("log_queries=0")?;
    check_trampolines(3)?;
    let other = T::attach()?;
    // On failure, too, detach before the next case.
    let both = (|| {
        check_trampolines(0)?;
        check_metering()?;
        let hits = check_hits(&other, "beside the meter", 0)?;
        loaded.unload()?;
        // First the other, then the meter.
        let loaded = module::Loaded::with("log_queries=0")?;
        check_metering()?;
        check_hits(&other, "when the meter came back", hits)?;
        anyhow::Ok(loaded)
    })();
    other.detach()?;
    let loaded = both?;
    check_trampolines(3)?;
    check_metering()?;
    // The meter goes first.
    let other = T::attach()?;
    let alone = (|| {
        let hits = other.hits()?;
        loaded.unload()?;
        let mut machine = TinyVm::new(Config::new(Program::OutUser, Mode::Long, 100))?;
        machine.run()?;
        check_hits(&other, "when the meter was gone", hits).map(drop)
    })();
    other.detach()?;
    alone
}

/// Return a reason on VMX, where the module reads the VMCS itself.
fn no_reader_needed() -> Result<Option<&'static str>> {
    let vmx = host::vendor()? == Isa::Vmx;
    Ok(vmx.then_some("the module needs no reader of KVM's here"))
}

/// Check by a trace that the module looks up the reader before kvm_amd runs. The module looks up
/// functions by registering kprobes. The kernel's event module_load comes after a module is linked and
/// before its first instruction.
fn reader_found_in_time() -> Result<()> {
    let paging = host::nested_paging()?;
    write("trace", "")?;
    write("set_ftrace_filter", "register_kprobe\n")?;
    write("current_tracer", "function")?;
    write("events/module/module_load/enable", "1")?;
    let traced = (|| {
        module::unload_vendor_module()?;
        module::load_vendor_module(paging)?;
        read("trace")
    })();
    write("events/module/module_load/enable", "0")?;
    write("current_tracer", "nop")?;
    write("set_ftrace_filter", "")?;
    write("trace", "")?;
    let traced = traced?;
    let place = |words: &str| traced.lines().position(|line| line.contains(words));
    let found = place("register_kprobe").context("no function was looked up")?;
    let runs = place("module_load: kvm_amd").context("kvm_amd was not seen to load")?;
    ensure!(
        found < runs,
        "the reader is looked up when kvm_amd may already run guests: {traced}"
    );
    check_metering()
}

/// Load a second module that redirects the same function: a copy of the meter by another name.
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
    check_metering()?;
    // Without redirecting CPUID the second module meters, too.
    module::try_load_file(twin, "leaf_map=0")?;
    let both = check_metering();
    module::remove("exitmetes")?;
    both?;
    check_metering()?;
    first.unload()?;
    // With the first module gone, the second one can redirect.
    module::try_load_file(twin, "")?;
    module::remove("exitmetes")
}

/// Return `bytes` with each `from` replaced by `to`, which has the same length.
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
