// SPDX-License-Identifier: GPL-2.0

//! CPUID leaves.
//!
//! Titles of the leaves from Linux 7.3, tools/arch/x86/kcpuid/cpuid.csv, shortened. Hypervisor
//! leaves from Documentation/virt/kvm/x86/cpuid.rst (KVM) and Microsoft's Hypervisor Top-Level
//! Functional Specification, "Feature and Interface Discovery". The meter's own leaves:
//! docs/interface.md.

use std::borrow::Cow;

use super::{find, Names};

/// Return the name of a leaf.
pub fn name(leaf: u32) -> Option<Cow<'static, str>> {
    if let Some(name) = find(NAMES, leaf) {
        return Some(name.into());
    }
    match leaf {
        0x4fff_fff0..=0x4fff_ffff => Some("exitmeter".into()),
        // Bases of hypervisor leaves, 256 leaves each (arch/x86/include/asm/cpuid/api.h,
        // `for_each_possible_cpuid_base_hypervisor()`).
        0x4000_0000..=0x4000_ffff => Some(match leaf & 0xff {
            0 => "hypervisor's vendor".into(),
            1 => "hypervisor's features or interface".into(),
            _ => "hypervisor".into(),
        }),
        _ => None,
    }
}

pub(super) const NAMES: Names = &[
    (0x0, "vendor, highest leaf"),
    (0x1, "family, model, features"),
    (0x2, "cache and TLB descriptors"),
    (0x4, "cache parameters"),
    (0x5, "MONITOR and MWAIT"),
    (0x6, "thermal and power management"),
    (0x7, "extended features"),
    (0x9, "direct cache access"),
    (0xa, "PMU"),
    (0xb, "extended topology"),
    (0xd, "XSAVE state"),
    (0xf, "resource monitoring"),
    (0x10, "resource allocation"),
    (0x12, "SGX"),
    (0x14, "processor trace"),
    (0x15, "TSC frequency"),
    (0x16, "CPU frequency"),
    (0x17, "SoC vendor"),
    (0x18, "TLB parameters"),
    (0x19, "key locker"),
    (0x1a, "hybrid CPUs"),
    (0x1b, "PCONFIG"),
    (0x1c, "last branch records"),
    (0x1d, "AMX tiles"),
    (0x1e, "TMUL"),
    (0x1f, "extended topology v2"),
    (0x20, "HRESET"),
    (0x21, "trust domain"),
    (0x23, "extended PMU"),
    (0x24, "AVX10"),
    (0x8000_0000, "highest extended leaf"),
    (0x8000_0001, "extended features"),
    (0x8000_0002, "brand string 1"),
    (0x8000_0003, "brand string 2"),
    (0x8000_0004, "brand string 3"),
    (0x8000_0005, "L1 cache and TLB"),
    (0x8000_0006, "L2 and L3 cache"),
    (0x8000_0007, "power management, RAS"),
    (0x8000_0008, "address sizes"),
    (0x8000_000a, "SVM"),
    (0x8000_0019, "TLB of 1 GiB pages"),
    (0x8000_001a, "instruction optimizations"),
    (0x8000_001b, "instruction-based sampling"),
    (0x8000_001c, "lightweight profiling"),
    (0x8000_001d, "cache parameters"),
    (0x8000_001e, "CPU topology"),
    (0x8000_001f, "memory encryption"),
    (0x8000_0020, "platform QoS"),
    (0x8000_0021, "extended features 2"),
    (0x8000_0022, "extended PMU"),
    (0x8000_0023, "multi-key memory encryption"),
    (0x8000_0026, "extended CPU topology"),
];
