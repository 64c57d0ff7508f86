// SPDX-License-Identifier: GPL-2.0

//! What exits were about by the kernel's own histograms, each count under the key that
//! docs/interface.md gives it. The tables of the meter are held against it.
//!
//! The keys are made here of what the tracepoints tell, by the manuals, and not by the meter's code.

use std::{collections::BTreeMap, fmt};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::{
    detail::Kind,
    reader::{Entry, Missed},
    reasons::Isa,
    snapshot::{Reason, TABLE_CODE, TABLE_DETAILS},
};

use super::{isa, keyed::Keyed, nested_paging};

/// What a row is of: the code of its reason, the kind of its key ([`CODE`] for code), the key.
type Key = (u32, u8, u64);

/// The kind of a key that is a RIP.
const CODE: u8 = u8::MAX;

/// `PFERR_RSVD_MASK` and others (kvm_host.h): the error code of a page fault.
const WRITE: u64 = 1 << 1;
const RESERVED: u64 = 1 << 3;
const FETCH: u64 = 1 << 4;

/// The types of kvm_mmio (trace.h) that tell of an access once: KVM_TRACE_MMIO_READ and _WRITE.
const MMIO_DONE: [u64; 2] = [1, 2];

/// The page of the APIC's registers, which is a device of no exit of its own on VMX.
const APIC: u64 = 0xfee0_0000;

/// The histograms, while they count.
#[derive(Debug)]
pub struct Oracle {
    code: Keyed,
    qualification: Keyed,
    interruption: Keyed,
    msr: Keyed,
    cpuid: Keyed,
    fault: Keyed,
    mmio: Keyed,
    fast_mmio: Keyed,
    hypercall: Keyed,
    hyperv: Keyed,
}

/// What they have counted.
#[derive(Clone, Debug, Default)]
pub struct Told(BTreeMap<Key, u64>);

/// How tables and histograms agree.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreed {
    /// Different keys that occurred.
    pub keys: usize,
    /// Rows.
    pub rows: usize,
    /// Rows that are exact.
    pub exact: usize,
    /// Exits.
    pub exits: u64,
    /// Of these, exits that no row has.
    pub others: u64,
}

impl fmt::Display for Agreed {
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

impl Oracle {
    /// Begin to count. No guest runs.
    pub fn begin() -> Result<Self> {
        Ok(Self {
            code: Keyed::begin("kvm_exit", &["exit_reason", "guest_rip"])?,
            qualification: Keyed::begin("kvm_exit", &["exit_reason", "info1"])?,
            interruption: Keyed::begin("kvm_exit", &["exit_reason", "intr_info"])?,
            msr: Keyed::begin("kvm_msr", &["ecx", "write"])?,
            cpuid: Keyed::begin("kvm_cpuid", &["function", "index"])?,
            fault: Keyed::begin("kvm_page_fault", &["fault_address", "error_code"])?,
            mmio: Keyed::begin("kvm_mmio", &["gpa", "type"])?,
            fast_mmio: Keyed::begin("kvm_fast_mmio", &["gpa"])?,
            hypercall: Keyed::begin("kvm_hypercall", &["nr"])?,
            hyperv: Keyed::begin("kvm_hv_hypercall", &["code"])?,
        })
    }

    /// Read what they have counted so far. No guest runs.
    pub fn read(&self) -> Result<Told> {
        let isa = isa()?;
        let mut told = Told::default();
        let reason = |number: u64| match isa {
            // A failed entry has bit 31 set.
            Isa::Vmx => number as u32 & 0xffff,
            Isa::Svm => number as u32,
        };
        for (key, hits) in self.code.read()? {
            told.add((reason(key[0]), CODE, key[1]), hits);
        }
        for (key, hits) in self.qualification.read()? {
            let code = reason(key[0]);
            if let Some((kind, key)) = by_qualification(isa, code, key[1]) {
                told.add((code, kind as u8, key), hits);
            }
        }
        if isa == Isa::Vmx {
            for (key, hits) in self.interruption.read()? {
                let code = reason(key[0]);
                if matches!(code, 0 | 1) {
                    // Vector and type (SDM, "Format of the VM-Exit Interruption-Information Field").
                    told.add((code, Kind::Vector as u8, key[1] & 0x7ff), hits);
                }
            }
        }
        for (key, hits) in self.msr.read()? {
            let code = match (isa, key[1]) {
                (Isa::Vmx, 0) => 31,
                (Isa::Vmx, _) => 32,
                (Isa::Svm, _) => 0x7c,
            };
            told.add((code, Kind::Msr as u8, key[0] | key[1] << 32), hits);
        }
        let code = if isa == Isa::Vmx { 10 } else { 0x72 };
        let exits: u64 = told
            .0
            .iter()
            .filter(|((its, kind, _), _)| (*its, *kind) == (code, CODE))
            .map(|(_, hits)| hits)
            .sum();
        let mut asked = self.cpuid.read()?;
        // KVM's emulator asks for the vendor by the same function (get_cpuid() in emulate.c), without
        // an exit: leaf 0, and no other.
        let more = asked.values().sum::<u64>().saturating_sub(exits);
        if let Some(hits) = asked.get_mut(&vec![0, 0]) {
            *hits = hits.saturating_sub(more);
        }
        for (key, hits) in asked {
            use exitmeter_meter::detail::{has_subleaves, LAST_SUBLEAF};
            let subleaf = match has_subleaves(key[0] as u32) {
                true => key[1].min(LAST_SUBLEAF.into()),
                false => 0,
            };
            told.add((code, Kind::Cpuid as u8, key[0] | subleaf << 32), hits);
        }
        let code = if isa == Isa::Vmx { 18 } else { 0x81 };
        for (key, hits) in self.hypercall.read()? {
            told.add((code, Kind::Hypercall as u8, key[0] & 0xffff_ffff), hits);
        }
        for (key, hits) in self.hyperv.read()? {
            told.add((code, Kind::Hypercall as u8, key[0] | 1 << 32), hits);
        }
        if nested_paging()? {
            self.addresses(isa, &mut told)?;
        }
        Ok(told)
    }

    /// Add accesses to memory and to devices in it.
    fn addresses(&self, isa: Isa, told: &mut Told) -> Result<()> {
        let mut devices = BTreeMap::<u64, i64>::new();
        for (key, hits) in self.fast_mmio.read()? {
            *devices.entry(key[0]).or_default() += hits as i64;
        }
        if isa == Isa::Svm {
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
                told.add((0x400, Kind::Memory as u8, key), hits);
            }
        } else {
            // kvm_exit has no guest-physical address. Each access to a device is one of kvm_mmio; the
            // first one of a page is an EPT violation, and all others are misconfigurations.
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
                told.add((48, Kind::Memory as u8, key), hits);
            }
        }
        let code = if isa == Isa::Vmx { 49 } else { 0x400 };
        for (address, hits) in devices {
            let hits = u64::try_from(hits);
            let hits =
                hits.with_context(|| format!("more faults than accesses at {address:#x}"))?;
            told.add((code, Kind::Address as u8, address), hits);
        }
        Ok(())
    }
}

/// Return the detail that an exit qualification, or EXITINFO1, tells alone.
fn by_qualification(isa: Isa, code: u32, told: u64) -> Option<(Kind, u64)> {
    let bit = |from: u32, to: u32| (told >> from & 1) << to;
    Some(match (isa, code) {
        // SDM, "Exit Qualification for I/O Instructions".
        (Isa::Vmx, 30) => {
            let how = bit(3, 32) | bit(4, 33) | bit(5, 34);
            (
                Kind::Port,
                told >> 16 & 0xffff | how | ((told & 7) + 1) << 36,
            )
        }
        // APM volume 2, "IOIO Intercepts".
        (Isa::Svm, 0x7b) => {
            let how = bit(0, 32) | bit(2, 33) | bit(3, 34);
            (
                Kind::Port,
                told >> 16 & 0xffff | how | (told >> 4 & 7) << 36,
            )
        }
        // SDM, tables of exit qualifications.
        (Isa::Vmx, 28) => (Kind::Control, told & 0x3f),
        (Isa::Vmx, 29) => (Kind::Debug, told & 0x17),
        (Isa::Vmx, 44) => (Kind::ApicAccess, told & 0xffff),
        (Isa::Vmx, 45) => (Kind::Eoi, told & 0xff),
        (Isa::Vmx, 56) => (Kind::ApicWrite, told & 0xfff),
        // APM volume 2, "AVIC_NOACCEL".
        (Isa::Svm, 0x402) => (Kind::ApicAccess, told & 0xff0 | bit(32, 12)),
        _ => return None,
    })
}

impl Told {
    fn add(&mut self, key: Key, hits: u64) {
        if hits != 0 {
            *self.0.entry(key).or_insert(0) += hits;
        }
    }

    /// Demand that all rows of details, and of code, are within their bounds of what was counted, and
    /// that rows and others are all of it. Both are read while no guest runs, and the tables are as
    /// old as the histograms. Return how they agree: of details, of code.
    pub fn demand(&self, entries: &[Entry]) -> Result<[Agreed; 2]> {
        let mut agreed = [Agreed::default(); 2];
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
            let of = &mut agreed[usize::from(is_code)];
            if entry.others {
                *others.entry((is_code, code)).or_default() += entry.exits;
                continue;
            }
            of.rows += 1;
            of.exact += usize::from(entry.missed == Missed::default());
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
                    "{key:x?} has {exits} to {missed} more, of {counted}"
                ));
            }
        }
        ensure!(
            wrong.is_empty(),
            "rows (reason, kind, key) are not within their bounds: {wrong:#?}"
        );

        // By reason: what is in no row is among the others, and nothing else.
        let mut left = BTreeMap::<(bool, u32), u64>::new();
        for (key @ (code, kind, _), hits) in &self.0 {
            let is_code = *kind == CODE;
            let of = &mut agreed[usize::from(is_code)];
            let row = rows.get(key).map_or(0, |row| row.0);
            of.keys += 1;
            of.exits += hits;
            of.others += hits - row;
            *left.entry((is_code, *code)).or_default() += hits - row;
        }
        for ((is_code, code), left) in left {
            let others = others.get(&(is_code, code)).copied().unwrap_or(0);
            ensure!(
                left == others,
                "of reason {code:#x} {left} exits have no row, and {others} are others \
                 (of code: {is_code})"
            );
        }
        Ok(agreed)
    }

    /// Return how many exits with a code had details of a kind, by key.
    pub fn of(&self, code: u32, kind: Kind) -> BTreeMap<u64, u64> {
        let all = self.0.iter();
        let of = all.filter(|((its, its_kind, _), _)| (*its, *its_kind) == (code, kind as u8));
        of.map(|((_, _, key), hits)| (*key, *hits)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(table: u32, key: u64, exits: u64, missed: u64) -> Entry {
        Entry {
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
    fn a_row_past_its_bound_and_others_that_do_not_sum_are_refused() -> Result<()> {
        let mut told = Told::default();
        told.add((30, Kind::Port as u8, 1), 10);
        told.add((30, Kind::Port as u8, 2), 5);
        let others = |exits| Entry {
            others: true,
            ..row(TABLE_DETAILS, 0, exits, 0)
        };
        let [details, _] = told.demand(&[row(TABLE_DETAILS, 1, 8, 2), others(7)])?;
        assert_eq!((details.keys, details.rows, details.exact), (2, 1, 0));
        assert_eq!((details.exits, details.others), (15, 7));
        for entries in [
            // Too few for an exact row; too few for its bound; too many.
            [row(TABLE_DETAILS, 1, 8, 0), others(7)],
            [row(TABLE_DETAILS, 1, 7, 2), others(8)],
            [row(TABLE_DETAILS, 1, 11, 0), others(4)],
            // A key that did not occur.
            [row(TABLE_DETAILS, 3, 1, 0), others(14)],
            // Others that are not what is left.
            [row(TABLE_DETAILS, 1, 8, 2), others(6)],
        ] {
            assert!(told.demand(&entries).is_err(), "{entries:?}");
        }
        Ok(())
    }

    #[test]
    fn what_the_cpu_tells_becomes_a_key() {
        // OUT of one byte to 0x3f8; REP INSW from 0x60, on either.
        let port = |isa, code, told| by_qualification(isa, code, told);
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
