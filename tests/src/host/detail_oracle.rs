// SPDX-License-Identifier: GPL-2.0

//! The details of exits as the kernel's own histograms count them, each under the key that
//! docs/interface.md defines. The meter's tables are compared with these counts.
//!
//! The keys are computed from the tracepoints' fields by the manuals, independently of the meter's code.

use std::{collections::BTreeMap, fmt};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    detail::Kind,
    reader::{Missed, TableRow},
    reasons::Isa,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS},
};

use super::{codes, event_hist::EventHist, nested_paging, vendor};

/// Identity of a row: the code of its reason, the kind of its key ([`CODE`] for code), and the key.
type Key = (u32, u8, u64);

/// Kind of a key that is a RIP.
const CODE: u8 = u8::MAX;

/// Bits of a page fault's error code: `PFERR_RSVD_MASK` and others (kvm_host.h).
const WRITE: u64 = 1 << 1;
const RESERVED: u64 = 1 << 3;
const FETCH: u64 = 1 << 4;

/// Types of kvm_mmio (trace.h) that report each access once: KVM_TRACE_MMIO_READ and _WRITE.
const MMIO_DONE: [u64; 2] = [1, 2];

/// Page of the APIC's registers. On VMX, accesses to it are not counted as accesses to a device.
const APIC: u64 = 0xfee0_0000;

/// The running histograms.
#[derive(Debug)]
pub struct DetailOracle {
    code: EventHist,
    qualification: EventHist,
    interruption: EventHist,
    msr: EventHist,
    cpuid: EventHist,
    fault: EventHist,
    mmio: EventHist,
    fast_mmio: EventHist,
    hypercall: EventHist,
    hyperv: EventHist,
}

/// Counts of the histograms, by row.
#[derive(Clone, Debug, Default)]
pub struct DetailCounts(BTreeMap<Key, u64>);

/// Statistics of a comparison of tables and histograms.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    /// Number of distinct keys that occurred.
    pub keys: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of exact rows.
    pub exact: usize,
    /// Number of exits.
    pub exits: u64,
    /// Number of exits without a row.
    pub others: u64,
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} keys, {} rows, {} of them exact; {} of {} exits ({:.1}%) are others",
            self.keys,
            self.rows,
            self.exact,
            self.others,
            self.exits,
            100. * self.others as f64 / self.exits.max(1) as f64
        )
    }
}

impl DetailOracle {
    /// Begin to count. No guest may run.
    pub fn begin() -> Result<Self> {
        Ok(Self {
            code: EventHist::begin("kvm_exit", &["exit_reason", "guest_rip"])?,
            qualification: EventHist::begin("kvm_exit", &["exit_reason", "info1"])?,
            interruption: EventHist::begin("kvm_exit", &["exit_reason", "intr_info"])?,
            msr: EventHist::begin("kvm_msr", &["ecx", "write"])?,
            cpuid: EventHist::begin("kvm_cpuid", &["function", "index"])?,
            fault: EventHist::begin("kvm_page_fault", &["fault_address", "error_code"])?,
            mmio: EventHist::begin("kvm_mmio", &["gpa", "type"])?,
            fast_mmio: EventHist::begin("kvm_fast_mmio", &["gpa"])?,
            hypercall: EventHist::begin("kvm_hypercall", &["nr"])?,
            hyperv: EventHist::begin("kvm_hv_hypercall", &["code"])?,
        })
    }

    /// Read the counts so far. No guest may run.
    pub fn read(&self) -> Result<DetailCounts> {
        let vendor = vendor()?;
        let mut counts = DetailCounts::default();
        let reason = |number: u64| match vendor {
            // A failed entry has bit 31 set.
            Isa::Vmx => number as u32 & 0xffff,
            Isa::Svm => number as u32,
        };
        for (key, hits) in self.code.read()? {
            counts.add((reason(key[0]), CODE, key[1]), hits);
        }
        for (key, hits) in self.qualification.read()? {
            let code = reason(key[0]);
            if let Some((kind, key)) = by_qualification(vendor, code, key[1]) {
                counts.add((code, kind as u8, key), hits);
            }
        }
        if vendor == Isa::Vmx {
            for (key, hits) in self.interruption.read()? {
                let code = reason(key[0]);
                if matches!(code, 0 | 1) {
                    // Vector and type (SDM, "Format of the VM-Exit Interruption-Information Field").
                    counts.add((code, Kind::Vector as u8, key[1] & 0x7ff), hits);
                }
            }
        }
        for (key, hits) in self.msr.read()? {
            let code = match key[1] {
                0 => codes::rdmsr()?,
                _ => codes::wrmsr()?,
            };
            counts.add((code, Kind::Msr as u8, key[0] | key[1] << 32), hits);
        }
        let code = codes::cpuid()?;
        let exits: u64 = counts
            .0
            .iter()
            .filter(|((its, kind, _), _)| (*its, *kind) == (code, CODE))
            .map(|(_, hits)| hits)
            .sum();
        let mut queries = self.cpuid.read()?;
        // KVM's emulator reads the vendor by the same function (get_cpuid() in emulate.c) without an exit.
        // It asks for leaf 0 only, so the surplus is subtracted there.
        let surplus = queries.values().sum::<u64>().saturating_sub(exits);
        if let Some(hits) = queries.get_mut(&vec![0, 0]) {
            *hits = hits.saturating_sub(surplus);
        }
        for (key, hits) in queries {
            use exitmeter_meter::detail::{has_subleaves, LAST_SUBLEAF};
            let subleaf = match has_subleaves(key[0] as u32) {
                true => key[1].min(LAST_SUBLEAF.into()),
                false => 0,
            };
            counts.add((code, Kind::Cpuid as u8, key[0] | subleaf << 32), hits);
        }
        let code = codes::hypercall()?;
        for (key, hits) in self.hypercall.read()? {
            counts.add((code, Kind::Hypercall as u8, key[0] & 0xffff_ffff), hits);
        }
        for (key, hits) in self.hyperv.read()? {
            counts.add((code, Kind::Hypercall as u8, key[0] | 1 << 32), hits);
        }
        if nested_paging()? {
            self.add_memory(vendor, &mut counts)?;
        }
        Ok(counts)
    }

    /// Add the accesses to memory and to memory-mapped devices.
    fn add_memory(&self, vendor: Isa, counts: &mut DetailCounts) -> Result<()> {
        let mut devices = BTreeMap::<u64, i64>::new();
        for (key, hits) in self.fast_mmio.read()? {
            *devices.entry(key[0]).or_default() += hits as i64;
        }
        if vendor == Isa::Svm {
            for (key, hits) in self.fault.read()? {
                let (address, error) = (key[0], key[1]);
                if error & RESERVED != 0 {
                    *devices.entry(address).or_default() += hits as i64;
                    continue;
                }
                let (write, fetch) = (error & WRITE != 0, error & FETCH != 0);
                let read = !write && !fetch;
                let access = u64::from(read) | u64::from(write) << 1 | u64::from(fetch) << 2;
                let key = address >> 30 | access << 32;
                counts.add((0x400, Kind::Memory as u8, key), hits);
            }
        } else {
            // kvm_exit has no guest-physical address. kvm_mmio reports each access to a device. The first
            // access to a page is an EPT violation, and all others are misconfigurations.
            for (key, hits) in self.mmio.read()? {
                if MMIO_DONE.contains(&key[1]) && key[0] >> 12 != APIC >> 12 {
                    *devices.entry(key[0]).or_default() += hits as i64;
                }
            }
            for (key, hits) in self.fault.read()? {
                let (address, qualification) = (key[0], key[1]);
                if let Some(accesses) = devices.get_mut(&address) {
                    *accesses -= hits as i64;
                }
                // Read, write, fetch (SDM, "Exit Qualification for EPT Violations").
                let key = address >> 30 | (qualification & 7) << 32;
                counts.add((48, Kind::Memory as u8, key), hits);
            }
        }
        let code = if vendor == Isa::Vmx { 49 } else { 0x400 };
        for (address, hits) in devices {
            let hits = u64::try_from(hits);
            let hits =
                hits.with_context(|| format!("more faults than accesses at {address:#x}"))?;
            counts.add((code, Kind::Address as u8, address), hits);
        }
        Ok(())
    }
}

/// Return the detail that the exit qualification, or EXITINFO1, gives by itself.
fn by_qualification(vendor: Isa, code: u32, qualification: u64) -> Option<(Kind, u64)> {
    let bit = |from: u32, to: u32| (qualification >> from & 1) << to;
    Some(match (vendor, code) {
        // SDM, "Exit Qualification for I/O Instructions".
        (Isa::Vmx, 30) => {
            let how = bit(3, 32) | bit(4, 33) | bit(5, 34);
            (
                Kind::Port,
                qualification >> 16 & 0xffff | how | ((qualification & 7) + 1) << 36,
            )
        }
        // APM volume 2, "IOIO Intercepts".
        (Isa::Svm, 0x7b) => {
            let how = bit(0, 32) | bit(2, 33) | bit(3, 34);
            (
                Kind::Port,
                qualification >> 16 & 0xffff | how | (qualification >> 4 & 7) << 36,
            )
        }
        // SDM, tables of exit qualifications.
        (Isa::Vmx, 28) => (Kind::Control, qualification & 0x3f),
        (Isa::Vmx, 29) => (Kind::Debug, qualification & 0x17),
        (Isa::Vmx, 44) => (Kind::ApicAccess, qualification & 0xffff),
        (Isa::Vmx, 45) => (Kind::Eoi, qualification & 0xff),
        (Isa::Vmx, 56) => (Kind::ApicWrite, qualification & 0xfff),
        // APM volume 2, "AVIC_NOACCEL".
        (Isa::Svm, 0x402) => (Kind::ApicAccess, qualification & 0xff0 | bit(32, 12)),
        _ => return None,
    })
}

impl DetailCounts {
    fn add(&mut self, key: Key, hits: u64) {
        if hits != 0 {
            *self.0.entry(key).or_insert(0) += hits;
        }
    }

    /// Check that the count of each row of details and of code is within its bound, and that rows and
    /// others sum to all exits. Both must be read while no guest runs, and the tables must be as old as
    /// the histograms. Return the statistics for details and for code.
    pub fn check(&self, entries: &[TableRow]) -> Result<[Agreement; 2]> {
        let mut agreements = [Agreement::default(); 2];
        let mut rows = BTreeMap::<Key, (u64, u64)>::new();
        let mut others = BTreeMap::<(bool, u32), u64>::new();
        for entry in entries {
            let Reason::Code(code) = entry.reason else {
                continue;
            };
            let is_code = match entry.table {
                TABLE_DETAILS => false,
                TABLE_CODE => true,
                _ => continue,
            };
            let agreement = &mut agreements[usize::from(is_code)];
            if entry.others {
                *others.entry((is_code, code)).or_default() += entry.exits;
                continue;
            }
            agreement.rows += 1;
            agreement.exact += usize::from(entry.missed == Missed::default());
            let kind = if is_code { CODE } else { entry.detail_kind };
            let row = rows.entry((code, kind, entry.key)).or_default();
            row.0 += entry.exits;
            row.1 += entry.missed.exits;
        }

        let mut wrong = Vec::new();
        for (key, (exits, missed)) in &rows {
            let counted = self.0.get(key).copied().unwrap_or(0);
            if counted < *exits || counted > exits + missed {
                wrong.push(format!(
                    "{key:x?} has {exits}, at most {missed} more, and {counted} were counted"
                ));
            }
        }
        ensure!(
            wrong.is_empty(),
            "rows (reason, kind, key) are not within their bounds: {wrong:#?}"
        );

        // For each reason, the others are exactly the exits without a row.
        let mut without_row = BTreeMap::<(bool, u32), u64>::new();
        for (key @ (code, kind, _), hits) in &self.0 {
            let is_code = *kind == CODE;
            let agreement = &mut agreements[usize::from(is_code)];
            let row = rows.get(key).map_or(0, |row| row.0);
            agreement.keys += 1;
            agreement.exits += hits;
            agreement.others += hits - row;
            *without_row.entry((is_code, *code)).or_default() += hits - row;
        }
        for ((is_code, code), left) in without_row {
            let others = others.get(&(is_code, code)).copied().unwrap_or(0);
            ensure!(
                left == others,
                "reason {code:#x} has {left} exits without a row, and {others} others \
                 (table of code: {is_code})"
            );
        }
        Ok(agreements)
    }

    /// Return the exits with `code` and details of `kind`, by key.
    pub fn by_key(&self, code: u32, kind: Kind) -> BTreeMap<u64, u64> {
        let all = self.0.iter();
        let found = all.filter(|((its, its_kind, _), _)| (*its, *its_kind) == (code, kind as u8));
        found.map(|((_, _, key), hits)| (*key, *hits)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(table: u32, key: u64, exits: u64, missed: u64) -> TableRow {
        TableRow {
            table,
            reason: Reason::Code(30),
            detail_kind: Kind::Port as u8,
            nested: false,
            others: false,
            key,
            exits,
            kernel: None,
            user: None,
            missed: Missed {
                exits: missed,
                ..Missed::default()
            },
        }
    }

    #[test]
    fn check_refuses_rows_out_of_bounds_and_wrong_others() -> Result<()> {
        let mut counts = DetailCounts::default();
        counts.add((30, Kind::Port as u8, 1), 10);
        counts.add((30, Kind::Port as u8, 2), 5);
        let others = |exits| TableRow {
            others: true,
            ..row(TABLE_DETAILS, 0, exits, 0)
        };
        let [details, _] = counts.check(&[row(TABLE_DETAILS, 1, 8, 2), others(7)])?;
        assert_eq!((details.keys, details.rows, details.exact), (2, 1, 0));
        assert_eq!((details.exits, details.others), (15, 7));
        for entries in [
            // Too few for an exact row; too few for its bound; too many.
            [row(TABLE_DETAILS, 1, 8, 0), others(7)],
            [row(TABLE_DETAILS, 1, 7, 2), others(8)],
            [row(TABLE_DETAILS, 1, 11, 0), others(4)],
            // A key that did not occur.
            [row(TABLE_DETAILS, 3, 1, 0), others(14)],
            // Others that differ from the exits without a row.
            [row(TABLE_DETAILS, 1, 8, 2), others(6)],
        ] {
            assert!(counts.check(&entries).is_err(), "{entries:?}");
        }
        Ok(())
    }

    #[test]
    fn qualification_becomes_a_key() {
        // OUT of one byte to 0x3f8 on VMX; REP INSW from 0x60 on both.
        let port = by_qualification;
        assert_eq!(
            port(Isa::Vmx, 30, 0x3f8_0000),
            Some((Kind::Port, 0x3f8 | 1 << 36))
        );
        let ins = Some((Kind::Port, 0x60 | 7 << 32 | 2 << 36));
        assert_eq!(port(Isa::Vmx, 30, 0x60_0039), ins);
        assert_eq!(port(Isa::Svm, 0x7b, 0x60_002d), ins);
        assert_eq!(by_qualification(Isa::Svm, 30, 0), None);
    }
}
