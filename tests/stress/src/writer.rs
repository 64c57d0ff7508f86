// SPDX-License-Identifier: GPL-2.0

//! Does what the module's hooks do on a CPU, without a guest: load a vCPU, exit, enter, put it.

use std::sync::atomic::Ordering::Relaxed;

use exitmeter_meter::{
    leaves::{LeafMap, Leaves},
    ledger::TRIES,
    phase::Phase,
    reasons::{slot, Isa},
    registry::{Member, Newcomer, Owner, Refused, Registry, Settings},
    snapshot::{HostHeader, NAME_SIZE},
};

use crate::{
    cpu::{ticks, Random, SimCpu, SimVcpu, NOWHERE},
    platform::Native,
};

/// The registry of the stress.
pub type Meter = Registry<Native>;

/// Minimum and maximum of the TSC ticks between transitions: a guest that does nothing but exit.
pub const GAP: (u64, u64) = (300, 1500);

/// Return the settings of the registry.
pub fn settings(max_vcpus: usize, host_scope: bool) -> Settings {
    Settings {
        leaves: Leaves {
            map: LeafMap::Map2021,
            isa: Isa::Vmx,
            life: 1,
        },
        host_scope,
        max_vcpus,
        copy_tries: TRIES,
        slow_ticks: 0,
    }
}

/// Return the head of a snapshot.
pub fn host(meter: &Meter) -> HostHeader {
    HostHeader {
        isa: Isa::Vmx,
        leaf_map: LeafMap::Map2021,
        host_scope: false,
        by_bpf: false,
        tsc_khz: 0,
        tsc_stable: true,
        loaded: meter.loaded(),
        now: ticks(),
        clock_offset: 0,
        life: 1,
    }
}

/// Return the key of a VM. It looks like an address of the kernel.
pub fn vm_key(vm: usize) -> usize {
    0xffff_c900_0000_0000 + vm * 0xb000
}

/// Return the description of a vCPU that the registry does not know yet.
pub fn newcomer(vcpu: &SimVcpu, vm: usize, id: u32) -> Newcomer {
    let mut name = [0; NAME_SIZE];
    for (to, from) in name.iter_mut().zip(format!("vm-{vm}").bytes()) {
        *to = from;
    }
    Newcomer {
        owner: Some(Owner {
            vm: vm_key(vm),
            name,
            pid: vm as u32,
            vcpu: id,
        }),
        is_new: true,
        polled: vcpu.polled.load(Relaxed),
    }
}

/// Load a vCPU on a CPU, and return its member unless it is unmetered.
pub fn load<'a>(
    meter: &'a Meter,
    (number, cpu): (u32, &SimCpu),
    vcpu: &SimVcpu,
    newcomer: impl FnOnce() -> Newcomer,
) -> Result<Option<&'a Member>, Refused> {
    vcpu.cpu.store(number, Relaxed);
    let key = vcpu.key();
    let member = match meter.metered(key) {
        Some(member) => {
            member.ledger().resume(ticks());
            Some(member)
        }
        None => meter.at_event(key, ticks(), Phase::Kernel, newcomer)?,
    };
    if let Some(member) = member {
        cpu.cache(key, member);
    }
    Ok(member)
}

/// Look up the member of the vCPU that runs on a CPU, as a hook does.
#[inline(always)]
pub fn running<'a>(meter: &'a Meter, cpu: &'a SimCpu, key: usize) -> Option<&'a Member> {
    cpu.cached(key).or_else(|| meter.metered(key))
}

/// Record an entry of a vCPU.
#[inline(always)]
pub fn entry(meter: &Meter, cpu: &SimCpu, key: usize) {
    if let Some(member) = running(meter, cpu, key) {
        member.ledger().entry(ticks());
    }
}

/// Record an exit of a vCPU with an exit reason.
#[inline(always)]
pub fn exit(meter: &Meter, cpu: &SimCpu, key: usize, code: u32, nested: bool) {
    if let Some(member) = running(meter, cpu, key) {
        let at = slot(Isa::Vmx, code);
        let (ledger, memory) = (member.ledger(), meter.platform());
        match nested {
            false => ledger.exit_of::<false>(ticks(), at, memory),
            true => ledger.exit_of::<true>(ticks(), at, memory),
        }
    }
}

/// Put a vCPU, which begins `phase`.
pub fn put(meter: &Meter, cpu: &SimCpu, vcpu: &SimVcpu, phase: Phase) {
    if let Some(member) = running(meter, cpu, vcpu.key()) {
        member.ledger().leave(ticks(), phase);
    }
    vcpu.cpu.store(NOWHERE, Relaxed);
}

/// Spin until the next transition.
#[inline(always)]
pub fn spend(random: &mut Random) {
    spend_between(random, GAP);
}

/// Spin for a random number of TSC ticks between two bounds.
#[inline(always)]
pub fn spend_between(random: &mut Random, (least, most): (u64, u64)) {
    let until = ticks() + least + random.below(most - least + 1);
    while ticks() < until {
        core::hint::spin_loop();
    }
}
