// SPDX-License-Identifier: GPL-2.0

//! Time limit and arguments of each test. Arguments lower the defaults that are too much for an emulated host.

use std::time::Duration;

use anyhow::Result;
use system_tests::host::by_vendor;

/// Default time limits on the Intel and the AMD host, in seconds of the host's clock. The clock of the Intel host is as
/// much slower than ours as its CPU is.
pub const LIMITS: [u64; 2] = [20, 60];

/// Arguments and time limit of a test.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Arguments of the test.
    pub arguments: &'static [&'static str],
    /// Time limit, by the host's clock.
    pub limit: Duration,
}

/// Tests that need less memory, fewer rounds or more time: name, arguments, and time limits as in [`LIMITS`].
pub const SPECIAL: &[(&str, &[&str], [u64; 2])] = &[
    (
        "access_tracking_perf_test",
        &["-b", "4M", "-v", "1"],
        LIMITS,
    ),
    ("demand_paging_test", &["-b", "16M"], LIMITS),
    ("dirty_log_perf_test", &["-b", "16M", "-i", "2"], LIMITS),
    ("dirty_log_test", &["-i", "6"], LIMITS),
    ("hardware_disable_test", &[], [40, 180]),
    ("irqfd_test", &[], [40, 240]),
    ("kvm_page_table_test", &["-b", "16M"], LIMITS),
    (
        "memslot_modification_stress_test",
        &["-b", "16M", "-i", "3"],
        LIMITS,
    ),
    ("memslot_perf_test", &["-l", "1", "-s", "32"], [40, 180]),
    ("mmu_stress_test", &["-m", "1", "-s", "1"], [40, 180]),
    ("set_memory_region_test", &[], [40, 180]),
    ("x86/dirty_log_page_splitting_test", &["-b", "16M"], LIMITS),
    ("x86/hyperv_tlb_flush", &[], [40, 120]),
];

/// Return the arguments and the time limit of a test on this host.
pub fn allowance_of(name: &str) -> Result<Allowance> {
    let special = SPECIAL.iter().find(|(special, ..)| *special == name);
    let (arguments, [intel, amd]) = special.map_or((&[][..], LIMITS), |(_, arguments, limits)| {
        (arguments, *limits)
    });
    Ok(Allowance {
        arguments,
        limit: Duration::from_secs(by_vendor(intel, amd)?),
    })
}
