// SPDX-License-Identifier: GPL-2.0

//! The lines in the kernel log.

use kernel::{
    prelude::*,
    str::BStr, //
};

use crate::{
    given, hooks,
    meter::{
        leaves::{
            LeafMap,
            Leaves,
            Spoken, //
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
    module_parameters,
};

// The kernel formats through a trait of its own.
impl kernel::fmt::Display for Spoken {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

/// One line when the module is loaded.
pub(crate) fn loaded(leaves: &Leaves) {
    pr_info!(
        "version {} meters {}: kvm_exit, kvm_entry, vCPU put, load and destroy hooked; {}\n",
        env!("EXITMETER_VERSION"),
        leaves.isa.name(),
        match leaves.map {
            LeafMap::Off => "no CPUID leaf answered",
            LeafMap::Map2021 => "CPUID leaves answered by the map of 2021",
            LeafMap::Map2022 => "CPUID leaves answered by the map of 2022",
        },
    );
    let (_, tsc_stable) = hooks::clock();
    if !tsc_stable {
        pr_warn!("the TSC is marked unstable: counts hold, cycles do not\n");
    }
}

/// One line for each query of a guest, rate limited.
pub(crate) fn query(who: &Identity, spoken: &Spoken) {
    let wanted: i64 = given(module_parameters::log_queries.value());
    if wanted == 1 && hooks::log_allowed() {
        let name = who.name.split(|byte| *byte == 0).next().unwrap_or(&[]);
        pr_info!("{}: {}\n", BStr::from_bytes(name), spoken);
    }
}

/// Log a table of all that was metered, when the module is unloaded.
pub(crate) fn table(isa: Isa, totals: &Totals) {
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
