// SPDX-License-Identifier: GPL-2.0

//! exitmeter: meters every VM exit beside an unmodified KVM. The host reads the numbers from
//! /dev/exitmeter, a guest reads its own by CPUID.
//!
//! The rooms, from the top down; none calls one above it:
//!
//! - [`hooks`]: the hooks into KVM, and their callbacks.
//! - [`answers`], [`device`], [`log`]: answers to guests, /dev/exitmeter, and the lines in the kernel log.
//! - [`registry`]: which ledger belongs to which vCPU.
//! - [`parameters`]: the module's parameters.
//! - [`kvm`]: readers of KVM.
//! - [`linux`]: functions of Linux that the kernel's crate lacks.
//! - [`meter`]: ledgers, leaves and snapshots, without a kernel.
//!
//! Only [`hooks`], [`kvm`] and [`linux`] name C.

#![crate_name = "exitmeter"]

mod answers;
mod bindings;
mod device;
mod hooks;
mod kvm;
mod linux;
mod log;
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "cargo compiles the same files as a crate, and the tools use the rest"
)]
mod meter;
mod parameters;
mod registry;

use kernel::{
    prelude::*,
    sync::Arc, //
};

use device::DetailsRequest;
use hooks::{
    cpuid::CpuidRedirect,
    functions::Function,
    prototypes,
    sleep::Sleep,
    tracepoints::Tracepoints,
    vcpus::{
        self,
        CreationHook, //
    },
};
use kvm::vendor::{
    ExitReader,
    Vendor, //
};
use linux::{
    node::Node,
    random, //
};
use meter::{
    leaves::{
        LeafMap,
        Leaves, //
    },
    registry::Settings, //
};
use parameters::Parameters;
use registry::{
    Publication,
    Registry, //
};

#[cfg(CONFIG_PREEMPT_RT)]
compile_error!("exitmeter takes spinlocks with interrupts off, which PREEMPT_RT does not allow");

#[cfg(not(CONFIG_MODULE_UNLOAD))]
compile_error!("exitmeter finds kvm_intel and kvm_amd by the functions that unload them");

module! {
    type: ExitMeter,
    name: "exitmeter",
    authors: ["The exitmeter authors"],
    description: "Meters every VM exit; guests read their own by CPUID",
    license: "GPL v2",
}

/// The module's state.
///
/// The fields are dropped in this order: first the device node and the redirect, by which others call in,
/// then the hooks. `destroy` is the last hook, so that no metered vCPU ends unseen.
#[pin_data]
struct ExitMeter {
    #[pin]
    node: Node,
    details: Option<DetailsRequest>,
    cpuid: Option<CpuidRedirect>,
    tracepoints: Tracepoints,
    #[pin]
    put: Function,
    #[pin]
    load: Function,
    creation: CreationHook,
    #[pin]
    destroy: Function,
    sleep: Sleep,
    summary: UnloadSummary,
    publication: Publication,
    exit_reader: Option<ExitReader>,
}

impl kernel::InPlaceModule for ExitMeter {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(|| {
            let parameters = Parameters::checked()?;
            let vendor = Vendor::detect()?;
            prototypes::check()?;
            let exit_reader = ExitReader::attach(&vendor)?;
            let slow_ticks = parameters.slow_ticks();
            let isa = vendor.isa();
            let source = vendor.exit_source();
            let map = parameters.leaf_map;
            let life = random::nonzero();
            let leaves = Leaves { map, isa, life };
            let registry = Registry::new(Settings {
                leaves,
                host_scope: parameters.host_scope,
                max_vcpus: parameters.max_vcpus as usize,
                copy_tries: parameters.copy_tries,
                slow_ticks,
            })?;
            Ok(try_pin_init!(Self {
                exit_reader,
                publication: Publication::new(registry.clone()),
                sleep: Sleep::watch(),
                destroy <- vcpus::destroy(),
                creation: CreationHook::attach()?,
                load <- vcpus::load(),
                put <- vcpus::put(),
                tracepoints: Tracepoints::attach(source, slow_ticks != 0)?,
                cpuid: match map {
                    LeafMap::Off => None,
                    _ => Some(CpuidRedirect::attach()?),
                },
                details: match parameters.details {
                    true => Some(DetailsRequest::new()?),
                    false => None,
                },
                node <- device::node(),
                summary: UnloadSummary::new(registry, parameters.host_scope),
            }? Error))
        })
    }
}

/// Guard that logs the load when it is created, and the totals when it is dropped.
struct UnloadSummary(Arc<Registry>);

impl UnloadSummary {
    /// Log that everything is attached.
    fn new(registry: Arc<Registry>, host_scope: bool) -> Self {
        log::loaded(registry.leaves(), host_scope);
        Self(registry)
    }
}

impl Drop for UnloadSummary {
    fn drop(&mut self) {
        match self.0.totals() {
            Ok(totals) => log::totals(self.0.leaves().isa, &totals),
            Err(_) => pr_warn!("no memory for the table of what was metered\n"),
        }
    }
}
