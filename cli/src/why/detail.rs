// SPDX-License-Identifier: GPL-2.0

//! Details of an exit: decoding of the key, and description in words. The bits of keys are those of
//! docs/interface.md.

use exitmeter_meter::detail::{has_subleaves, Kind, LAST_SUBLEAF};
use serde::Serialize;

use super::names::{apic, cpuid, exit, hypercall, memory, msr, port, vector};

/// Decoded detail of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Detail {
    /// An access to an I/O port.
    Port {
        /// Port.
        port: u16,
        /// True for IN or INS, false for OUT or OUTS.
        input: bool,
        /// True for INS or OUTS.
        string: bool,
        /// True with a REP prefix.
        rep: bool,
        /// Size of one access, in bytes.
        size: u8,
    },
    /// An access to an MSR.
    Msr {
        /// MSR.
        msr: u32,
        /// True for a write, false for a read.
        write: bool,
    },
    /// An access to a device's register in memory.
    Gpa {
        /// Guest-physical address.
        gpa: u64,
    },
    /// An access that the mapping of the memory does not allow.
    Memory {
        /// Guest-physical address, in GiB.
        gib: u32,
        /// True if the access read.
        read: bool,
        /// True if the access wrote.
        write: bool,
        /// True if the access fetched an instruction.
        fetch: bool,
    },
    /// An interrupt or an exception.
    Vector {
        /// Vector.
        vector: u8,
        /// Type: Intel's SDM, "Format of the VM-Exit Interruption-Information Field".
        #[serde(rename = "type")]
        class: u8,
    },
    /// A CPUID instruction.
    Cpuid {
        /// Leaf, EAX.
        leaf: u32,
        /// Subleaf, ECX; `None` for a leaf without subleaves.
        subleaf: Option<u32>,
        /// True if the subleaf may also be greater.
        or_more: bool,
    },
    /// A hypercall.
    Hypercall {
        /// Number.
        number: u32,
        /// True for Hyper-V's convention.
        hyperv: bool,
    },
    /// An access to a control register.
    Cr {
        /// Register.
        register: u8,
        /// Type: Intel's SDM, "Exit Qualification for Control-Register Accesses".
        access: u8,
    },
    /// An access to a debug register.
    Dr {
        /// Register.
        register: u8,
        /// True for a read, false for a write.
        read: bool,
    },
    /// An access to the APIC's page.
    ApicAccess {
        /// Offset in the page.
        offset: u16,
        /// Type: Intel's SDM, "Exit Qualification for APIC-Access VM Exits". AVIC has 0 for a read
        /// and 1 for a write.
        access: u8,
    },
    /// A write to the virtual APIC, reported after the write.
    ApicWrite {
        /// Offset in the page.
        offset: u16,
    },
    /// An EOI of the virtual APIC.
    Eoi {
        /// Vector that ended.
        vector: u8,
    },
    /// A kind that this tool does not know.
    Unknown {
        /// Number of the kind.
        number: u8,
        /// Key.
        key: u64,
    },
}

/// Type of the interruption information: arch/x86/include/asm/trapnr.h, `EVENT_TYPE_...`.
const EXTINT: u8 = 0;

impl Detail {
    /// Decode a key.
    pub fn new(number: u8, key: u64) -> Self {
        let bits = |first: u32, count: u32| {
            let mask = (1_u64 << count) - 1;
            (key >> first) & mask
        };
        let bit = |place| bits(place, 1) == 1;
        // These have no more bits than their types.
        let u8_at = |first, count| bits(first, count) as u8;
        let u16_at = |first, count| bits(first, count) as u16;
        let u32_at = |first, count| bits(first, count) as u32;
        match Kind::from_number(number) {
            Some(Kind::Port) => Detail::Port {
                port: u16_at(0, 16),
                input: bit(32),
                string: bit(33),
                rep: bit(34),
                size: u8_at(36, 3),
            },
            Some(Kind::Msr) => Detail::Msr {
                msr: u32_at(0, 32),
                write: bit(32),
            },
            Some(Kind::Address) => Detail::Gpa { gpa: bits(0, 52) },
            Some(Kind::Memory) => Detail::Memory {
                gib: u32_at(0, 22),
                read: bit(32),
                write: bit(33),
                fetch: bit(34),
            },
            Some(Kind::Vector) => Detail::Vector {
                vector: u8_at(0, 8),
                class: u8_at(8, 3),
            },
            Some(Kind::Cpuid) => {
                let (leaf, subleaf) = (u32_at(0, 32), u32_at(32, 23));
                Detail::Cpuid {
                    leaf,
                    subleaf: (subleaf != 0 || has_subleaves(leaf)).then_some(subleaf),
                    or_more: subleaf == LAST_SUBLEAF,
                }
            }
            Some(Kind::Hypercall) => Detail::Hypercall {
                number: u32_at(0, 32),
                hyperv: bit(32),
            },
            Some(Kind::Control) => Detail::Cr {
                register: u8_at(0, 4),
                access: u8_at(4, 2),
            },
            Some(Kind::Debug) => Detail::Dr {
                register: u8_at(0, 3),
                read: bit(4),
            },
            Some(Kind::ApicAccess) => Detail::ApicAccess {
                offset: u16_at(0, 12),
                access: u8_at(12, 4),
            },
            Some(Kind::ApicWrite) => Detail::ApicWrite {
                offset: u16_at(0, 12),
            },
            Some(Kind::Eoi) => Detail::Eoi {
                vector: u8_at(0, 8),
            },
            Some(Kind::None) | None => Detail::Unknown { number, key },
        }
    }

    /// Return the name of what was accessed, if it has one.
    pub fn name(&self) -> Option<String> {
        match *self {
            Detail::Port { port, .. } => port::name(port),
            Detail::Msr { msr, .. } => msr::name(msr),
            Detail::Gpa { gpa } => memory::name(gpa),
            Detail::Vector { vector, class } if class == EXTINT => vector::host(vector.into()),
            Detail::Vector { vector, .. } => vector::exception(vector.into()).map(str::to_owned),
            Detail::Cpuid { leaf, .. } => cpuid::name(leaf).map(|name| name.into_owned()),
            Detail::Hypercall { number, hyperv } => match hyperv {
                true => hypercall::hyperv(number),
                false => hypercall::kvm_or_xen(number),
            },
            Detail::ApicAccess { offset, .. } | Detail::ApicWrite { offset } => {
                apic::name(offset.into())
            }
            Detail::Memory { .. }
            | Detail::Cr { .. }
            | Detail::Dr { .. }
            | Detail::Eoi { .. }
            | Detail::Unknown { .. } => None,
        }
    }

    /// Describe the detail: the action, the number, and the name of the number.
    pub fn words(&self) -> String {
        let name = self
            .name()
            .map_or_else(String::new, |name| format!(" {name}"));
        match *self {
            Detail::Port {
                port,
                input,
                string,
                rep,
                size,
            } => {
                let rep = if rep { "REP " } else { "" };
                let way = match (input, string) {
                    (true, false) => "IN",
                    (true, true) => "INS",
                    (false, false) => "OUT",
                    (false, true) => "OUTS",
                };
                let bytes = if size == 1 { "byte" } else { "bytes" };
                format!("{rep}{way} {port:#x}{name}, {size} {bytes}")
            }
            Detail::Msr { msr, write } => {
                format!("{} {msr:#x}{name}", if write { "write" } else { "read" })
            }
            Detail::Gpa { gpa } => format!("{gpa:#x}{name}"),
            Detail::Memory {
                gib,
                read,
                write,
                fetch,
            } => {
                let ways = [(read, "read"), (write, "write"), (fetch, "fetch")];
                let ways: Vec<_> = ways.iter().filter(|way| way.0).map(|way| way.1).collect();
                match ways.as_slice() {
                    [] => format!("access in GiB {gib}"),
                    ways => format!("{} in GiB {gib}", ways.join("+")),
                }
            }
            Detail::Vector { vector, .. } => format!("{vector:#x}{name}"),
            Detail::Cpuid {
                leaf,
                subleaf,
                or_more,
            } => {
                let more = if or_more { " or more" } else { "" };
                let subleaf = subleaf.map(|subleaf| format!(" subleaf {subleaf:#x}{more}"));
                format!("{leaf:#x}{}{name}", subleaf.unwrap_or_default())
            }
            Detail::Hypercall { number, hyperv } => match (hyperv, name.is_empty()) {
                (true, true) => format!("{number:#x} of Hyper-V"),
                (true, false) => format!("{number:#x}{name}"),
                (false, _) => format!("{number}{name}"),
            },
            Detail::Cr { register, access } => match access {
                0 => format!("write CR{register}"),
                1 => format!("read CR{register}"),
                2 => "CLTS".to_owned(),
                _ => "LMSW".to_owned(),
            },
            Detail::Dr { register, read } => {
                format!("{} DR{register}", if read { "read" } else { "write" })
            }
            Detail::ApicAccess { offset, access } => {
                let way = match access {
                    0 => "read",
                    1 => "write",
                    2 => "fetch",
                    3 => "event delivery",
                    10 => "event delivery, physical",
                    15 => "fetch or access, physical",
                    _ => "access",
                };
                format!("{way} {offset:#x}{name}")
            }
            Detail::ApicWrite { offset } => format!("write {offset:#x}{name}"),
            Detail::Eoi { vector } => format!("vector {vector:#x}"),
            Detail::Unknown { number, key } => format!("kind {number}, {key:#x}"),
        }
    }
}

/// Return the end of a detail's words that marks exits of an L2 guest, or nothing.
pub fn nested_mark(nested: bool) -> &'static str {
    match nested {
        true => ", nested",
        false => "",
    }
}

/// Return the mark of exits of an L2 guest behind a name, such as a symbol, or nothing.
pub fn nested_in_brackets(nested: bool) -> &'static str {
    match nested {
        true => " (nested)",
        false => "",
    }
}

/// Describe the reason of an exit to user space.
pub fn user_exit(key: u64) -> String {
    let name = u32::try_from(key).ok().and_then(exit::name);
    name.map_or_else(|| format!("KVM_EXIT {key}"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(number: u8, key: u64) -> String {
        Detail::new(number, key).words()
    }

    #[test]
    fn keys_are_described() {
        let cases = [
            (1, 0x3f8 | 1 << 36, "OUT 0x3f8 COM1 data, 1 byte"),
            (
                1,
                0x1f0 | 0b111 << 32 | 2 << 36,
                "REP INS 0x1f0 IDE 1 data, 2 bytes",
            ),
            (1, 0xcf8 | 4 << 36, "OUT 0xcf8 PCI config address, 4 bytes"),
            (
                1,
                0xb008 | 1 << 32 | 4 << 36,
                "IN 0xb008 ACPI PM timer, 4 bytes",
            ),
            (1, 0x1234 | 1 << 33 | 4 << 36, "OUTS 0x1234, 4 bytes"),
            (2, 0x6e0 | 1 << 32, "write 0x6e0 IA32_TSC_DEADLINE"),
            (2, 0x1b, "read 0x1b IA32_APICBASE"),
            (2, 0xdead_beef, "read 0xdeadbeef"),
            (3, 0xfee0_00b0, "0xfee000b0 APIC EOI"),
            (3, 0xfeb0_0000, "0xfeb00000"),
            (4, 3 | 1 << 33, "write in GiB 3"),
            (4, 5 << 32, "read+fetch in GiB 0"),
            (4, 1, "access in GiB 1"),
            (5, 0xec, "0xec local timer (LOC)"),
            (5, 0x24, "0x24 a device"),
            (5, 14 | 3 << 8, "0xe #PF page fault"),
            (5, 2 | 2 << 8, "0x2 NMI"),
            (6, 0xd | 1 << 32, "0xd subleaf 0x1 XSAVE state"),
            (6, 0x7, "0x7 subleaf 0x0 extended features"),
            (6, 0x1, "0x1 family, model, features"),
            (
                6,
                0x4fff_fffd | 30 << 32,
                "0x4ffffffd subleaf 0x1e exitmeter",
            ),
            (
                6,
                0x4fff_fffd | u64::from(LAST_SUBLEAF) << 32,
                "0x4ffffffd subleaf 0x3ffffe or more exitmeter",
            ),
            (7, 10, "10 KVM_HC_SEND_IPI (Xen: update_descriptor)"),
            (7, 29, "29 Xen's sched_op"),
            (7, 99, "99"),
            (7, 0x5c | 1 << 32, "0x5c HVCALL_POST_MESSAGE"),
            (7, 0x7fff | 1 << 32, "0x7fff of Hyper-V"),
            (8, 0x13, "read CR3"),
            (8, 0x4, "write CR4"),
            (8, 0x20, "CLTS"),
            (8, 0x30, "LMSW"),
            (9, 0x17, "read DR7"),
            (10, 0x1300, "write 0x300 ICR"),
            (10, 0x20, "read 0x20 ID"),
            (11, 0x320, "write 0x320 LVT timer"),
            (12, 0x31, "vector 0x31"),
            (77, 5, "kind 77, 0x5"),
        ];
        for (number, key, expected) in cases {
            assert_eq!(words(number, key), expected);
        }
        assert_eq!(user_exit(2), "KVM_EXIT_IO");
        assert_eq!(user_exit(u64::MAX), "KVM_EXIT 18446744073709551615");
    }

    proptest::proptest! {
        /// A guest, or a damaged file, can have any key.
        #[test]
        fn any_key_is_described_in_one_line(number: u8, key: u64) {
            let words = words(number, key);
            assert!(!words.is_empty() && !words.contains(['\n', ';']), "{words}");
        }
    }
}
