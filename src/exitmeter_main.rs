// SPDX-License-Identifier: GPL-2.0

//! exitmeter: meters every VM exit of every VM beside an unmodified KVM, and tells the guest
//! itself through CPUID.
//!
//! - [`hooks`]: where KVM is hooked, and the only room that names C.
//! - [`registry`]: which ledger belongs to which vCPU.
//! - [`meter`]: what a ledger is, what a guest asks and what a snapshot says; knows no kernel.
//! - [`cpuid`], [`device`], [`log`]: what guests, the host's users and the log are told.

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
mod registry;

use kernel::{
    ffi::c_long,
    prelude::*,
    sync::Arc, //
};

use device::{
    Device,
    WantsDetails, //
};
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
    clock,
    node::Node,
    random, //
};
use meter::{
    leaves::{
        LeafMap,
        Leaves, //
    },
    ledger::TRIES,
    registry::Settings, //
};
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

/// The module's state. Dropping it undoes the fields in this order: first what lets others in,
/// then the hooks, and `destroy` last of these, so that no vCPU ends unseen while it is metered.
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
    farewell: Farewell,
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
                node <- Node::register::<Device>(c"exitmeter", 0o440),
                farewell: Farewell::new(registry, &leaves, parameters.host_scope),
            }? Error))
        })
    }
}

/// The parameters that decide what is attached.
struct Parameters {
    leaf_map: LeafMap,
    host_scope: bool,
    max_vcpus: u32,
    details: bool,
    slow_us: u32,
    copy_tries: u32,
}

impl Parameters {
    /// What the module was given, if all of it is in its range.
    fn checked() -> Result<Self> {
        let given = linux::parameters::given();
        let leaf_map = in_range(
            "leaf_map",
            given.leaf_map,
            "2021, 2022, or 0",
            LeafMap::from_number,
        )?;
        // Looked up at each query (`cpuid::for_cpl_0_alone`).
        let _: bool = in_range("leaf_cpl", given.leaf_cpl, "3 or 0", |number| {
            matches!(number, 0 | 3).then_some(number == 0)
        })?;
        let max_vcpus = in_range("max_vcpus", given.max_vcpus, "1 to 65536", |number| {
            (1..=65536).contains(&number).then_some(number)
        })?;
        let flag = |number| (number <= 1).then_some(number == 1);
        let host_scope = in_range("host_scope", given.host_scope, "0 or 1", flag)?;
        let details = in_range("details", given.details, "0 or 1", flag)?;
        let slow_us = in_range("slow_us", given.slow_us, "0 to 1000000000", |number| {
            (number <= 1_000_000_000).then_some(number)
        })?;
        // The log looks it up itself, at each query.
        let _: bool = in_range("log_queries", given.log_queries, "0 or 1", flag)?;
        let copy_tries = in_range("copy_tries", given.copy_tries, "0 to 24", |number| {
            (number <= TRIES).then_some(number)
        })?;
        Ok(Self {
            leaf_map,
            host_scope,
            max_vcpus,
            details,
            slow_us,
            copy_tries,
        })
    }

    /// Return the ticks of [`Self::slow_us`]. They need a TSC whose frequency is known.
    fn slow_ticks(&self) -> u64 {
        let khz = clock::tsc_khz();
        if khz == 0 && self.slow_us != 0 {
            pr_warn!("slow_us is not heeded: the TSC's frequency is not known\n");
        }
        u64::from(khz).wrapping_mul(self.slow_us.into()) / 1000
    }
}

/// What `meaning` makes of the value of a parameter; refused with the range where that is nothing.
fn in_range<T>(
    name: &str,
    value: c_long,
    range: &str,
    meaning: impl FnOnce(u32) -> Option<T>,
) -> Result<T> {
    let meant = u32::try_from(value).ok().and_then(meaning);
    meant.ok_or_else(|| {
        pr_err!("{name}={value} is refused: it is {range}\n");
        EINVAL
    })
}

/// Says that the module is there, and when it goes what it metered.
struct Farewell(Arc<Registry>);

impl Farewell {
    /// Everything is attached.
    fn new(registry: Arc<Registry>, leaves: &Leaves, host_scope: bool) -> Self {
        log::loaded(leaves, host_scope);
        Self(registry)
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        match self.0.totals() {
            Ok(totals) => log::table(self.0.leaves().isa, &totals),
            Err(_) => pr_warn!("no memory for the table of what was metered\n"),
        }
    }
}
