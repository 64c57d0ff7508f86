//! Point 6: others who hook the same functions of KVM. Whoever comes first, both work, or the one
//! who comes second is refused and told why.

use std::{fs, path::Path};

use anyhow::{ensure, Context as _, Result};
use tiny_guests::{Config, Machine, Mode, Program, Quad};

use super::{answers::ask, Case};
use crate::host::{self, hist, leaves::MAP_2021, log::Log, module, span::Span};

const TRACING: &str = "/sys/kernel/tracing";

/// The functions that the module hooks.
const FUNCTIONS: [&str; 4] = [
    "kvm_emulate_cpuid",
    "kvm_arch_vcpu_load",
    "kvm_arch_vcpu_put",
    "kvm_mmu_destroy",
];

/// Somebody else's hooks.
struct Other {
    name: &'static str,
    set: fn() -> Result<()>,
    /// How often they were hit.
    hits: fn() -> Result<u64>,
    clear: fn() -> Result<()>,
}

pub(super) fn cases() -> Vec<Case> {
    let tracer = Other {
        name: "ftrace's function tracer",
        set: || {
            let functions = FUNCTIONS.map(|name| format!("{name}\n")).concat();
            write("set_ftrace_filter", &functions)?;
            write("trace", "")?;
            write("current_tracer", "function")
        },
        hits: || {
            let trace = read("trace")?;
            Ok(trace
                .lines()
                .filter(|line| line.contains("kvm_arch_vcpu_load"))
                .count() as u64)
        },
        clear: || {
            write("current_tracer", "nop")?;
            write("set_ftrace_filter", "")?;
            write("trace", "")
        },
    };
    let kprobes = Other {
        name: "kprobes",
        set: || {
            for name in FUNCTIONS {
                append("kprobe_events", &format!("p:soak/{name} {name}"))?;
            }
            write("events/soak/enable", "1")
        },
        hits: || {
            let profile = read("kprobe_profile")?;
            let line = profile
                .lines()
                .find(|line| line.contains("kvm_arch_vcpu_load"))
                .context("the profile of kprobes lacks kvm_arch_vcpu_load")?;
            let hits = line.split_whitespace().nth(1).context("it has no hits")?;
            Ok(hits.parse()?)
        },
        clear: || {
            write("events/soak/enable", "0")?;
            for name in FUNCTIONS {
                append("kprobe_events", &format!("-:soak/{name}"))?;
            }
            Ok(())
        },
    };
    let mut cases = Vec::new();
    for other in [tracer, kprobes] {
        cases.push(Case::without(
            format!("hooks: beside {}, whoever comes first", other.name),
            move || {
                hist::Hist::begin().map(drop)?;
                let result = beside(&other);
                // Whatever happened, nothing is left for the next case.
                let cleared = (other.clear)();
                result.and(cleared)
            },
        ));
    }
    cases.push(Case::without(
        "hooks: a second redirect is refused by name, and all is undone",
        second_redirect,
    ));
    cases
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

fn beside(other: &Other) -> Result<()> {
    let hit = |words: &str, before: u64| {
        let hits = (other.hits)()?;
        ensure!(
            hits >= before + 100,
            "{} saw {hits} calls {words}",
            other.name
        );
        anyhow::Ok(hits)
    };
    // The meter first.
    let loaded = module::Loaded::with("log_queries=0")?;
    (other.set)()?;
    meters()?;
    let hits = hit("beside the meter", 0)?;
    loaded.unload()?;
    // The other first.
    let loaded = module::Loaded::with("log_queries=0")?;
    meters()?;
    hit("when the meter came back", hits)?;
    (other.clear)()?;
    meters()?;
    // And the meter goes first.
    (other.set)()?;
    let hits = (other.hits)()?;
    loaded.unload()?;
    let mut machine = Machine::new(Config::new(Program::OutUser, Mode::Long, 100))?;
    machine.run()?;
    hit("when the meter was gone", hits)?;
    Ok(())
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
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
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
