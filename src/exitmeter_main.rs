// SPDX-License-Identifier: GPL-2.0

//! exitmeter: meters every VM exit of every VM beside an unmodified KVM, and tells the guest
//! itself through CPUID.
//!
//! From the top down; no room calls one above it:
//!
//! - [`hooks`]: the hooks into KVM, and their callbacks.
//! - [`cpuid`], [`device`], [`log`]: answers to guests, to the host's users and in the kernel log.
//! - [`registry`]: which ledger belongs to which vCPU.
//! - [`parameters`]: the module's parameters.
//! - [`kvm`]: what is read of KVM.
//! - [`linux`]: what is taken from Linux beside the kernel's crate.
//! - [`meter`]: ledgers, leaves and snapshots, without a kernel.
//!
//! [`hooks`], [`kvm`] and [`linux`] alone name C.

#![crate_name = "exitmeter"]

mod bindings;
mod cpuid;
mod device;
mod hooks;
mod kvm;
mod linux;
mod log;
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "cargo compiles the same files as a crate, whose other users take the rest"
)]
mod meter;
mod parameters;
mod registry;

use kernel::{
    prelude::*,
    sync::Arc, //
};

use device::WantsDetails;
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
    description: "Meters every VM exit and tells the guest through CPUID",
    license: "GPL v2",
}

/// The module's state.
///
/// Dropping it undoes the fields in this order: first what lets others in, then the hooks, and `destroy`
/// last of these, so that no vCPU ends unseen while it is metered.
#[pin_data]
struct ExitMeter {
    #[pin]
    node: Node,
    details: Option<WantsDetails>,
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
                    true => Some(WantsDetails::new()?),
                    false => None,
                },
                node <- device::node(),
                summary: UnloadSummary::new(registry, parameters.host_scope),
            }? Error))
        })
    }
}

/// Logs the load when it is made, and what was metered when it is dropped.
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
            Ok(totals) => log::table(self.0.leaves().isa, &totals),
            Err(_) => pr_warn!("no memory for the table of what was metered\n"),
        }
    }
}
