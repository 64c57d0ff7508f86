// SPDX-License-Identifier: GPL-2.0

//! The way from a callback to a vCPU's ledger: exit, entry, load and put.
//!
//! The fast path, for a vCPU in this CPU's cache, does not touch the registry. All functions run with
//! preemption off, for a vCPU that the caller holds.

use super::{
    cache,
    platform::Allocator,
    published, //
};
use crate::{
    kvm::{
        exit::Event,
        vcpu::Vcpu, //
    },
    linux::details,
    meter::{
        detail,
        ledger::Ledger,
        phase::Phase,
        reasons::{
            self,
            Isa,
            Slot, //
        },
        slow::Leaving,
        tables::{
            About,
            Tables, //
        },
    },
};

/// Look up the ledger of a vCPU that is not in this CPU's cache. A new vCPU becomes a member at this event.
fn looked_up<'a>(vcpu: Vcpu<'a>, now: u64, phase: Phase) -> Option<&'a Ledger> {
    published()?.ledger(vcpu, now, phase)
}

/// Look up the ledger as [`looked_up`] does, at an exit or entry.
///
/// A trust domain's vCPU is in no cache, and comes here at each of its exits and entries. It is marked as
/// unmetered when it is created, or when it is loaded next, so here its VM's type is all that has to be read.
fn looked_up_unless_of_trust_domain<'a>(
    vcpu: Vcpu<'a>,
    now: u64,
    phase: Phase,
) -> Option<&'a Ledger> {
    if vcpu.is_of_trust_domain() {
        return None;
    }
    looked_up(vcpu, now, phase)
}

/// Return the tables of a vCPU, if it has any.
#[inline(always)]
fn tables(ledger: &Ledger) -> Option<&Tables> {
    // SAFETY: All callbacks of transitions run with preemption off, so what they find is freed after
    // them.
    unsafe { ledger.tables() }
}

/// Record a VM exit at TSC `now`.
///
/// `event` creates the reader of the exit, which reads the code once the vCPU is known to be metered. `RING`
/// is true if vCPUs with details have rings of their latest exits. This function, [`entry`], [`resume`] and
/// [`leave_to_user`] each have one branch for details, after the part that both paths share.
#[inline(always)]
pub(crate) fn exit<'a, const RING: bool, E: Event>(
    vcpu: Vcpu<'a>,
    now: u64,
    isa: Isa,
    event: impl Fn(Vcpu<'a>) -> E,
) {
    let Some(ledger) = cache::find(vcpu) else {
        return exit_slow(vcpu, now, isa, event(vcpu));
    };
    let Some(slot) = event(vcpu).usual_slot(isa) else {
        let vcpu = cache::read_again(vcpu);
        return exit_unusual(vcpu, ledger, now, isa, event(vcpu));
    };
    if details::are_on() {
        let vcpu = cache::read_again(vcpu);
        return exit_with::<RING, _>((ledger, vcpu), now, isa, slot, event(vcpu));
    }
    exit_of(vcpu, ledger, now, slot);
}

/// Record an exit without details.
#[inline(always)]
fn exit_of(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, slot: Slot) {
    if vcpu.runs_nested() {
        exit_from_nested(ledger, now, slot);
    } else {
        ledger.exit_of::<false>(now, slot, Allocator);
    }
}

/// Record an exit of a nested guest.
#[inline(never)]
fn exit_from_nested(ledger: &Ledger, now: u64, slot: Slot) {
    ledger.exit_of::<true>(now, slot, Allocator);
}

/// Record an exit for which [`Event::usual_slot`] has no slot.
#[cold]
#[inline(never)]
fn exit_unusual(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, isa: Isa, event: impl Event) {
    let slot = reasons::slot(isa, event.code());
    exit_apart((ledger, vcpu), now, isa, slot, event);
}

/// Slow path of [`exit`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn exit_slow(vcpu: Vcpu<'_>, now: u64, isa: Isa, event: impl Event) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Guest) {
        let slot = reasons::slot(isa, event.code());
        exit_apart((ledger, vcpu), now, isa, slot, event);
    }
}

/// Record an exit with details.
#[inline(always)]
fn exit_with<const RING: bool, E: Event>(
    (ledger, vcpu): (&Ledger, Vcpu<'_>),
    now: u64,
    isa: Isa,
    slot: Slot,
    event: E,
) {
    let Some(tables) = tables(ledger) else {
        return exit_without(ledger, vcpu, now, slot);
    };
    // Rare exits leave here, so that usual ones do not pay for them.
    if vcpu.runs_nested() {
        return exit_apart((ledger, vcpu), now, isa, slot, event);
    }
    let Ok(key) = detail::plain(isa, slot, &event) else {
        return exit_composed((ledger, vcpu), now, isa, slot, event);
    };
    let rip = event.likely_rip();
    let about = About {
        slot,
        nested: false,
        key,
        rip: Some(rip),
    };
    let Err(key) = ledger.exit_like_before::<RING>(tables, now, &about) else {
        return;
    };
    match E::HIDES_RIP {
        true if detail::is_leaf(isa, slot) => {
            exit_composed((ledger, vcpu), now, isa, slot, event);
        }
        // `exit_apart` finds out whether the RIP is known.
        true => exit_apart((ledger, vcpu), now, isa, slot, event),
        false => ledger.exit_otherwise(tables, now, &about, key, Allocator),
    }
}

/// Record an exit of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn exit_without(ledger: &Ledger, vcpu: Vcpu<'_>, now: u64, slot: Slot) {
    exit_of(vcpu, ledger, now, slot);
}

/// Record an exit by a hypercall, or by CPUID: on VMX of a leaf that may have subleaves, on SVM an exit that
/// is unlike the latest ones, as every exit of a leaf with subleaves is.
#[inline(never)]
fn exit_composed(
    (ledger, vcpu): (&Ledger, Vcpu<'_>),
    now: u64,
    isa: Isa,
    slot: Slot,
    event: impl Event,
) {
    if !detail::is_leaf(isa, slot) {
        return exit_apart((ledger, vcpu), now, isa, slot, event);
    }
    let Some(tables) = tables(ledger) else {
        return exit_without(ledger, vcpu, now, slot);
    };
    let about = About {
        slot,
        nested: false,
        key: Some(detail::leaf(isa, slot, &event)),
        rip: event.rip(),
    };
    match tables.has_ring() {
        true => ledger.exit_with::<true>(tables, now, &about, Allocator),
        false => ledger.exit_with::<false>(tables, now, &about, Allocator),
    }
}

/// Record an exit of an L2 guest, one by a hypercall, one whose RIP the host may not know, one that is
/// unlike the latest ones, or one of a vCPU that is not in this CPU's cache.
#[inline(never)]
fn exit_apart(
    (ledger, vcpu): (&Ledger, Vcpu<'_>),
    now: u64,
    isa: Isa,
    slot: Slot,
    event: impl Event,
) {
    let Some(tables) = tables(ledger) else {
        return exit_without(ledger, vcpu, now, slot);
    };
    let about = About {
        slot,
        nested: vcpu.runs_nested(),
        key: detail::key(isa, slot, &event),
        rip: event.rip(),
    };
    ledger.exit_otherwise(tables, now, &about, about.whole_key(), Allocator);
}

/// Record a VM entry at TSC `now`.
#[inline(always)]
pub(crate) fn entry(vcpu: Vcpu<'_>, now: u64) {
    let Some(ledger) = cache::find(vcpu) else {
        return entry_slow(vcpu, now);
    };
    if details::are_on() {
        return match tables(ledger) {
            Some(tables) => ledger.entry_with(tables, now, || vcpu.cpu_loaded()),
            None => entry_without(ledger, now),
        };
    }
    ledger.entry(now);
}

/// Record an entry of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn entry_without(ledger: &Ledger, now: u64) {
    ledger.entry(now);
}

/// Slow path of [`entry`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn entry_slow(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up_unless_of_trust_domain(vcpu, now, Phase::Kernel) {
        match tables(ledger) {
            Some(tables) => ledger.entry_with(tables, now, || vcpu.cpu_loaded()),
            None => ledger.entry(now),
        }
    }
}

/// Record that the vCPU is loaded on a CPU at TSC `now`.
#[inline(always)]
pub(crate) fn resume(vcpu: Vcpu<'_>, now: u64) {
    let Some(ledger) = cache::find(vcpu) else {
        return resume_slow(vcpu, now);
    };
    if details::are_on() {
        return match tables(ledger) {
            Some(tables) => ledger.resume_with(tables, now),
            None => resume_without(ledger, now),
        };
    }
    ledger.resume(now);
}

/// Record the load of a vCPU that has no tables.
#[cold]
#[inline(never)]
fn resume_without(ledger: &Ledger, now: u64) {
    ledger.resume(now);
}

/// Slow path of [`resume`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn resume_slow(vcpu: Vcpu<'_>, now: u64) {
    if let Some(ledger) = looked_up(vcpu, now, Phase::Kernel) {
        match tables(ledger) {
            Some(tables) => ledger.resume_with(tables, now),
            None => ledger.resume(now),
        }
    }
}

/// Record that the vCPU leaves its CPU for user space at TSC `now`.
///
/// The scheduler's lock may be held, so this allocates nothing: an unknown vCPU stays unknown until its next
/// event.
#[inline(always)]
pub(crate) fn leave_to_user(vcpu: Vcpu<'_>, now: u64) {
    let Some(ledger) = cache::find(vcpu) else {
        return leave_slow(vcpu, now, Phase::User);
    };
    if details::are_on() {
        return match tables(ledger) {
            Some(tables) => {
                ledger.leave_to_user_with(tables, now, || vcpu.user_exit(), || vcpu.cpu_loaded())
            }
            None => leave_without(ledger, now, Phase::User),
        };
    }
    ledger.leave(now, Phase::User);
}

/// Record that the scheduler takes the vCPU off its CPU at TSC `now`, for `phase`. The scheduler's lock is
/// held, as in [`leave_to_user`].
#[inline(always)]
pub(crate) fn leave(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    match cache::find(vcpu) {
        Some(ledger) => leave_from(vcpu, ledger, now, phase),
        None => leave_slow(vcpu, now, phase),
    }
}

/// Describe how a vCPU leaves its CPU for a phase.
#[inline(always)]
fn leaving(vcpu: Vcpu<'_>, phase: Phase) -> Leaving {
    Leaving {
        phase,
        to_user: match phase {
            Phase::User => vcpu.user_exit(),
            _ => None,
        },
    }
}

/// Record that a vCPU leaves its CPU, with details if it has tables.
#[inline(always)]
fn leave_from(vcpu: Vcpu<'_>, ledger: &Ledger, now: u64, phase: Phase) {
    match tables(ledger) {
        Some(tables) => {
            let leaving = leaving(vcpu, phase);
            ledger.leave_with(tables, now, leaving, || vcpu.cpu_loaded());
        }
        None => ledger.leave(now, phase),
    }
}

/// Record that a vCPU without tables leaves its CPU.
#[cold]
#[inline(never)]
fn leave_without(ledger: &Ledger, now: u64, phase: Phase) {
    ledger.leave(now, phase);
}

/// Slow path of [`leave`] and [`leave_to_user`]: the vCPU is not in this CPU's cache.
#[cold]
#[inline(never)]
fn leave_slow(vcpu: Vcpu<'_>, now: u64, phase: Phase) {
    let Some(registry) = published() else {
        return;
    };
    if let Some(member) = registry.vcpus.metered(vcpu.key()) {
        leave_from(vcpu, member.ledger(), now, phase);
    }
}
