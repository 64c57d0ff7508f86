// SPDX-License-Identifier: GPL-2.0

//! The lines in the kernel log.

use core::sync::atomic::{
    AtomicU64,
    Ordering, //
};

use kernel::{
    prelude::*,
    print::format_strings::DEBUG,
    print_macro,
    str::BStr, //
};

use crate::{
    linux::clock,
    meter::{
        bucket::Bucket,
        leaves::{
            LeafMap,
            Leaves,
            LogLine, //
        },
        ledger::Totals,
        phase::Phase,
        reasons::{
            self,
            Isa, //
        },
        snapshot::{
            Identity,
            Reason, //
        },
    },
    parameters, //
};

// The kernel formats by a trait of its own.
impl kernel::fmt::Display for LogLine {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// Rate limit of the lines about queries: 350 at once, then 8 a second.
///
/// A guest makes as many queries as it likes, and the console may be a serial one. The lines have level
/// KERN_DEBUG, which the kernel keeps for dmesg and sends to a console only if console_loglevel is above 7.
/// On such a console of 115200 baud, 11520 bytes a second, 8 lines of up to 144 bytes a second are a tenth,
/// and 350 at once take some 3 s. 350 lines are enough for the demo's two sweeps with a reboot between them:
/// 333 queries on SVM, for 82 reasons with two leaves each.
static LINES: Bucket = Bucket::new(350, 125_000_000);

/// Rate limit of the lines that count the queries left out: one in 30 s.
static LEFT_OUT_LINES: Bucket = Bucket::new(1, 30_000_000_000);

/// Number of queries left out that no line has counted yet.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Log that the module is loaded, and each warning about its parameters and the host.
pub(crate) fn loaded(leaves: &Leaves, host_scope: bool) {
    let only_cpl_0 = parameters::is_for_cpl_0_alone() && !matches!(leaves.map, LeafMap::Off);
    pr_info!(
        "version {} meters {}: kvm_exit, kvm_entry, vCPU put, load and destroy hooked; {}{}\n",
        env!("EXITMETER_VERSION"),
        leaves.isa.name(),
        match leaves.map {
            LeafMap::Off => "no CPUID leaf answered",
            LeafMap::Map2021 => "CPUID leaves answered by the map of 2021",
            LeafMap::Map2022 => "CPUID leaves answered by the map of 2022",
        },
        if only_cpl_0 { ", to CPL 0 alone" } else { "" },
    );
    if host_scope && !matches!(leaves.map, LeafMap::Off) {
        pr_warn!("host_scope=1: each guest reads the exits and times of all VMs of this host\n");
    }
    if !clock::tsc_is_stable() {
        pr_warn!("the TSC is marked unstable: counts hold, cycles do not\n");
    }
}

/// Log a query of a guest, rate limited.
pub(crate) fn query(identity: &Identity, line: &LogLine) {
    if !parameters::logs_queries() {
        return;
    }
    let now = clock::coarse_ns();
    if !LINES.take(now) {
        LEFT_OUT.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let name = identity.name.split(|byte| *byte == 0).next().unwrap_or(&[]);
    // Not `pr_debug!`, which a kernel without debug assertions leaves out.
    print_macro!(DEBUG, false, "{}: {}\n", BStr::from_bytes(name), line);
    if LEFT_OUT.load(Ordering::Relaxed) != 0 && LEFT_OUT_LINES.take(now) {
        let left_out = LEFT_OUT.swap(0, Ordering::Relaxed);
        pr_notice!("{left_out} queries of guests have no line, as they came too fast\n");
    }
}

/// Log the exits and ticks of all vCPUs by reason, when the module is unloaded.
pub(crate) fn totals(isa: Isa, totals: &Totals) {
    let [a, b, c, d, e, f] = Phase::SHOWN.map(Phase::name);
    pr_info!(
        "{:>5} {:<22} {:>12} {a:>16} {b:>16} {c:>16} {d:>16} {e:>16} {f:>16}\n",
        "code",
        "exit reason",
        "exits"
    );
    for (slot, row, _) in totals.rows() {
        let [a, b, c, d, e, f] = Phase::SHOWN.map(|phase| row.cycles(phase));
        let (code, name) = match Reason::of(isa, slot) {
            Reason::Code(code) => (code, reasons::name(isa, code).unwrap_or("not defined")),
            Reason::Start => (0, "before the first exit"),
            Reason::Other => (0, "other"),
        };
        pr_info!(
            "{:>5} {:<22} {:>12} {a:>16} {b:>16} {c:>16} {d:>16} {e:>16} {f:>16}\n",
            code as i32,
            name,
            row.exits
        );
    }
}
