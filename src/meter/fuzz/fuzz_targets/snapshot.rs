// SPDX-License-Identifier: GPL-2.0

//! Fuzz the reader: it must refuse any bytes or read them to the end, and never panic.

#![no_main]

use exitmeter_meter::{
    phase::Phase,
    reader::Snapshot,
    snapshot::{TABLE_CODE, TABLE_DETAILS, TABLE_RING, TABLE_SLOWEST, TABLE_USER},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(snapshot) = Snapshot::parse(bytes) else {
        return;
    };
    let _ = (snapshot.version(), snapshot.isa(), snapshot.tsc_khz());
    let _ = (snapshot.leaf_map(), snapshot.unmetered(), snapshot.departed());
    let _ = (snapshot.life(), snapshot.separates_waits(), snapshot.departed_polled());
    let vcpus = snapshot.vcpus().flat_map(|vcpu| {
        let _ = (vcpu.vm(), vcpu.name(), vcpu.pid(), vcpu.id());
        let _ = (vcpu.first(), vcpu.last(), vcpu.phase(), vcpu.latest());
        let _ = (vcpu.balances(), vcpu.polled());
        vcpu.rows()
    });
    let _ = (snapshot.has_tables(), snapshot.without_tables());
    for tables in snapshot.tables() {
        let _ = (tables.vcpu, tables.since, tables.no_rip);
        let known = [TABLE_DETAILS, TABLE_CODE, TABLE_USER];
        let _ = known.map(|table| tables.has(table));
        for entry in tables.entries() {
            assert!(known.contains(&entry.table));
            let _ = (entry.exits, entry.kernel, entry.user, entry.missed);
        }
        let _ = (tables.is_frozen, tables.window_begun);
        for exit in tables.slow() {
            assert!([TABLE_SLOWEST, TABLE_RING].contains(&exit.table));
            let _ = (exit.length(), exit.time, exit.rip, exit.cpus);
            let _ = Phase::ALL.map(|phase| exit.ticks(phase));
        }
    }
    for row in vcpus.chain(snapshot.totals()) {
        let _ = (row.reason(), row.exits(), row.nested_exits(), row.max());
        let _ = Phase::ALL.map(|phase| row.cycles(phase));
        let _ = row.histogram();
        for counter in snapshot.counters() {
            let _ = row.numbers(&counter).fold(0, u64::wrapping_add);
        }
    }
});
