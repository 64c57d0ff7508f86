// SPDX-License-Identifier: GPL-2.0

//! What each test gets: its time, and arguments where its defaults ask more than an emulated host gives.

use std::time::Duration;

use anyhow::Result;
use system_tests::host::pick;

/// The seconds that a test gets when nothing else is said of it, on the Intel and the AMD host. Both by the host's
/// clock: that of the Intel host is slower than ours by as much as its CPU is.
pub const LIMITS: [u64; 2] = [20, 60];

/// What a test gets.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// Its arguments.
    pub arguments: &'static [&'static str],
    /// Its time by the host's clock.
    pub limit: Duration,
}

/// The tests that get something of their own: less memory and fewer rounds, or more time. Each with its arguments, and
/// its seconds as in [`LIMITS`].
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

/// What the test of a name gets on this host.
pub fn of(name: &str) -> Result<Allowance> {
    let special = SPECIAL.iter().find(|(special, ..)| *special == name);
    let (arguments, [intel, amd]) = special.map_or((&[][..], LIMITS), |(_, arguments, limits)| {
        (arguments, *limits)
    });
    Ok(Allowance {
        arguments,
        limit: Duration::from_secs(pick(intel, amd)?),
    })
}
