// SPDX-License-Identifier: GPL-2.0

//! Environment of the measurement: kernel, CPU, KVM, module. Nothing in it names the host or its
//! VMs.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::host::MeteredHost;

/// Words of the kernel's command line that change what exits cost. Other words are private to the
/// host.
const WORDS: [&str; 16] = [
    "mitigations",
    "nosmt",
    "isolcpus",
    "nohz_full",
    "idle",
    "tsc",
    "clocksource",
    "intel_pstate",
    "amd_pstate",
    "spectre_v2",
    "retbleed",
    "pti",
    "nopti",
    "kvm",
    "kvm_intel",
    "kvm_amd",
];
/// CPU flags that describe the TSC.
const TSC_FLAGS: [&str; 7] = [
    "tsc",
    "rdtscp",
    "constant_tsc",
    "nonstop_tsc",
    "tsc_known_freq",
    "tsc_reliable",
    "tsc_deadline_timer",
];

/// Environment of the measurement.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Environment {
    /// Version of the tool.
    pub tool: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Version of the kernel: how it was built.
    pub kernel_version: String,
    /// Words of the kernel's command line that change what exits cost.
    pub command_line: Vec<String>,
    /// CPU.
    pub cpu: Cpu,
    /// TSC.
    pub tsc: Tsc,
    /// Mitigation of each of the CPU's vulnerabilities.
    pub mitigations: BTreeMap<String, String>,
    /// Parameters of KVM's modules, by module and name.
    pub kvm: BTreeMap<String, BTreeMap<String, String>>,
    /// Parameters of the module.
    pub module: BTreeMap<String, String>,
    /// `vmx` or `svm`.
    pub isa: &'static str,
    /// True if KVM uses the CPU's nested paging.
    pub nested_paging: bool,
    /// Frequency of the CPU that was measured.
    pub frequency: Frequency,
}

/// CPU, as /proc/cpuinfo describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cpu {
    /// Vendor.
    pub vendor: String,
    /// Name of the model.
    pub name: String,
    /// Family, model and stepping.
    pub model: [String; 3],
    /// Revision of the microcode.
    pub microcode: String,
    /// Number of CPUs online.
    pub online: usize,
    /// State of simultaneous multithreading: on, off, notsupported.
    pub smt: Option<String>,
    /// Signature of the hypervisor that this host is a guest of, if any. Its VMs are nested then.
    pub hypervisor: Option<String>,
}

/// TSC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tsc {
    /// Frequency in kHz, if known.
    pub khz: Option<u32>,
    /// True if the kernel considers the TSC stable.
    pub stable: bool,
    /// CPU flags that describe the TSC.
    pub flags: Vec<String>,
    /// Clock source of the kernel.
    pub clocksource: Option<String>,
}

/// Frequency of a CPU, from cpufreq.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Frequency {
    /// Current frequency, in kHz.
    pub khz: Option<u64>,
    /// Minimum and maximum, in kHz.
    pub range: Option<[u64; 2]>,
    /// Governor.
    pub governor: Option<String>,
    /// Driver.
    pub driver: Option<String>,
}

impl Frequency {
    /// Read the current frequency of a CPU.
    pub fn of(cpu: usize) -> Self {
        let folder = PathBuf::from(format!("/sys/devices/system/cpu/cpu{cpu}/cpufreq"));
        let file = |name| text(&folder.join(name));
        let number = |name| file(name)?.parse().ok();
        let range = || Some([number("cpuinfo_min_freq")?, number("cpuinfo_max_freq")?]);
        Self {
            khz: number("scaling_cur_freq"),
            range: range(),
            governor: file("scaling_governor"),
            driver: file("scaling_driver"),
        }
    }
}

impl Environment {
    /// Read the environment of this host.
    pub fn new(host: &MeteredHost) -> Self {
        let uname = rustix::system::uname();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let flags = field(&cpuinfo, "flags").unwrap_or_default();
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let folder = Path::new("/sys/devices/system/cpu");
        let kvm = ["kvm", "kvm_intel", "kvm_amd"]
            .into_iter()
            .filter_map(|module| {
                let parameters = files(&Path::new("/sys/module").join(module).join("parameters"));
                (!parameters.is_empty()).then(|| (module.to_owned(), parameters))
            });
        Self {
            tool: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            kernel_version: uname.version().to_string_lossy().into_owned(),
            command_line: words(&command_line),
            cpu: Cpu {
                smt: text(&folder.join("smt/control")),
                hypervisor: flags.contains(&"hypervisor").then(hypervisor),
                ..cpu(&cpuinfo)
            },
            tsc: Tsc {
                khz: host.tsc_khz,
                stable: host.tsc_stable,
                flags: TSC_FLAGS
                    .iter()
                    .filter(|flag| flags.contains(flag))
                    .map(|flag| (*flag).to_owned())
                    .collect(),
                clocksource: text(Path::new(
                    "/sys/devices/system/clocksource/clocksource0/current_clocksource",
                )),
            },
            mitigations: files(&folder.join("vulnerabilities")),
            kvm: kvm.collect(),
            module: files(Path::new("/sys/module/exitmeter/parameters")),
            isa: host.isa.name(),
            nested_paging: host.nested_paging,
            frequency: Frequency::of(host.cpu),
        }
    }

    /// Return the vulnerabilities without a mitigation.
    pub fn vulnerable(&self) -> Vec<&str> {
        let faults = self.mitigations.iter();
        faults
            .filter(|(_, state)| state.starts_with("Vulnerable"))
            .map(|(fault, _)| fault.as_str())
            .collect()
    }
}

/// Read a file of one line. Return `None` if it is missing or empty.
fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Return the readable files of a folder, with their contents.
fn files(folder: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        Some((name, text(&entry.path())?))
    });
    files.collect()
}

/// Return the value of a field of /proc/cpuinfo, for the first CPU.
fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    cpuinfo.lines().find_map(|line| {
        let (its, value) = line.split_once(':')?;
        (its.trim_end() == name).then_some(value.trim())
    })
}

fn cpu(cpuinfo: &str) -> Cpu {
    let field = |name| field(cpuinfo, name).unwrap_or("unknown").to_owned();
    Cpu {
        vendor: field("vendor_id"),
        name: field("model name"),
        model: [field("cpu family"), field("model"), field("stepping")],
        microcode: field("microcode"),
        online: cpuinfo
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count(),
        ..Cpu::default()
    }
}

/// Return the words of the kernel's command line that are in [`WORDS`].
fn words(command_line: &str) -> Vec<String> {
    let words = command_line.split_whitespace().filter(|word| {
        let name = word.split(['=', '.']).next().unwrap_or_default();
        WORDS.contains(&name)
    });
    words.map(str::to_owned).collect()
}

/// Return the signature of the hypervisor under this host, from CPUID leaf 0x40000000.
fn hypervisor() -> String {
    #[allow(unused_unsafe, reason = "safe since Rust 1.94, unsafe before")]
    // SAFETY: Each CPU of 64 bits has CPUID.
    let leaf = unsafe { core::arch::x86_64::__cpuid(0x4000_0000) };
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx]
        .map(u32::to_le_bytes)
        .concat();
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(['\0', ' ']);
    match text.is_empty() {
        true => "unknown".to_owned(),
        false => text.escape_debug().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPUINFO: &str = "\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
stepping\t: 1
microcode\t: 0xffffffff
flags\t\t: fpu tsc constant_tsc hypervisor

processor\t: 1
vendor_id\t: AuthenticAMD
";

    #[test]
    fn cpu_is_read_from_cpuinfo() {
        assert_eq!(
            cpu(CPUINFO),
            Cpu {
                vendor: "AuthenticAMD".to_owned(),
                name: "AMD EPYC 7763 64-Core Processor".to_owned(),
                model: ["25", "1", "1"].map(str::to_owned),
                microcode: "0xffffffff".to_owned(),
                online: 2,
                ..Cpu::default()
            }
        );
        assert_eq!(
            field(CPUINFO, "flags"),
            Some("fpu tsc constant_tsc hypervisor")
        );
        assert_eq!(cpu("").name, "unknown");
    }

    #[test]
    fn other_words_of_the_command_line_are_omitted() {
        assert_eq!(
            words("root=UUID=1234 secret=x mitigations=off kvm.halt_poll_ns=0 nosmt ro\n"),
            ["mitigations=off", "kvm.halt_poll_ns=0", "nosmt"]
        );
    }
}
