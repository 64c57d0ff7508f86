// SPDX-License-Identifier: GPL-2.0

//! Snapshots of invented hosts.

use std::{fs, path::Path};

use exitmeter_meter::{
    leaves::LeafMap,
    ledger::{Ledger, LedgerCopy, Totals},
    phase::Phase,
    reasons::{self, Isa},
    snapshot::{BufferTooSmall, Encoder, HostHeader, Identity},
};

/// TSC ticks in a second.
pub const SECOND: u64 = 2_400_000_000;

/// A VM of such a host.
#[derive(Clone, Debug)]
pub struct Vm<'a> {
    pub number: u64,
    pub name: String,
    pub vcpus: u32,
    /// Ledger of each of its vCPUs.
    pub lived: &'a LedgerCopy,
}

/// Return a ledger with all phases and 20 reasons, as of a Linux guest. A round has an exit of each
/// reason, and takes some 3.4 million ticks.
pub fn lived(rounds: u64) -> LedgerCopy {
    // SAFETY: All-zero bytes are a valid ledger.
    let ledger: Box<Ledger> = Box::new(unsafe { core::mem::zeroed() });
    let mut now = 2_000_000;
    ledger.begin(now, Phase::User);
    ledger.resume(now + 1000);
    ledger.entry(now + 2000);
    for round in 0..rounds {
        for code in 0..20_u32 {
            now += 40_000;
            ledger.exit(now, reasons::slot(Isa::Vmx, code + 28));
            let kernel = 900 + 700 * u64::from(code) + 13 * (round % 200);
            let out = match code {
                2 => Some((Phase::User, 90_000)),
                5 => Some((Phase::Halted, 2_000_000)),
                7 => Some((Phase::Preempted, 300_000)),
                _ => None,
            };
            if let Some((phase, ticks)) = out {
                ledger.leave(now + 100, phase);
                ledger.resume(now + ticks);
                now += ticks;
            }
            now += kernel;
            ledger.entry(now);
        }
    }
    let mut copy = LedgerCopy::new();
    assert!(ledger.try_copy(&mut copy));
    copy
}

/// Write the snapshot of a host at a tick over the file.
pub fn write(path: &Path, now: u64, vms: &[Vm<'_>]) {
    let host = HostHeader {
        isa: Isa::Vmx,
        leaf_map: LeafMap::Map2021,
        host_scope: false,
        by_bpf: false,
        tsc_khz: (SECOND / 1000) as u32,
        tsc_stable: true,
        loaded: 1_000_000,
        now,
        clock_offset: 0,
        life: 7,
    };
    let encode = |buffer: &mut [u8]| {
        let mut encoder = Encoder::new(buffer, host);
        for vm in vms {
            let mut name = [0; 48];
            name[..vm.name.len()].copy_from_slice(vm.name.as_bytes());
            for vcpu in 0..vm.vcpus {
                let identity = Identity {
                    vm: vm.number,
                    name,
                    pid: 100_000 + vm.number as u32,
                    vcpu,
                };
                encoder.vcpu(&identity, vm.lived);
            }
        }
        encoder.finish(&Totals::new(), 0)
    };
    let BufferTooSmall { needed } = encode(&mut []).unwrap_err();
    let mut bytes = vec![0; needed];
    encode(&mut bytes).unwrap();
    // Replace the file atomically, for a concurrent reader.
    let new = path.with_extension("new");
    fs::write(&new, bytes).unwrap();
    fs::rename(new, path).unwrap();
}
