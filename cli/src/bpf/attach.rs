// SPDX-License-Identifier: GPL-2.0

//! Loads the programs and attaches them.

use std::{
    fs,
    io::{self, ErrorKind},
    time::SystemTime,
};

use aya::{
    maps::{Array, Map, Stack},
    programs::{links::FdLink, KProbe, Program, ProgramError, RawTracePoint},
    Ebpf, EbpfLoader,
};
use rustix::thread::{capabilities, CapabilitySet};

use super::{
    layout::Layout,
    maps::{self, Maps},
    Error,
};

/// The programs, compiled by cli/build.rs.
static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ledger.bpf.o"));

/// How many vCPUs are metered at a time, when nothing else is said: 16 MiB.
pub const VCPUS: u32 = 512;

/// The least room for vCPUs that are marked as not metered.
const MARKS: u32 = 4096;

/// Programs that are attached, for as long as this lives or its parts are pinned.
#[derive(Debug)]
pub struct Attached {
    maps: Maps,
    /// By program, in the order in which they were attached.
    links: Vec<(&'static str, FdLink)>,
}

impl Attached {
    /// Load the programs and attach them, for so many vCPUs at a time. Of a step that fails nothing stays.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn new(vcpus: u32) -> Result<Self, Error> {
        let layout = Layout::find()?;
        let mut ebpf = load(&layout, vcpus)?;
        let mut unused = Stack::try_from(map(&mut ebpf, "unused")?).map_err(refused("unused"))?;
        // The lowest are taken first.
        for index in (0..vcpus).rev() {
            unused.push(index, 0).map_err(refused("unused"))?;
        }
        let mut meter = Array::<_, maps::Meter>::try_from(map(&mut ebpf, "meter")?)
            .map_err(refused("meter"))?;
        let life = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let begun = maps::Meter::new(layout.isa, life.unwrap_or_default());
        meter.set(0, begun, 0).map_err(refused("meter"))?;

        // Who takes a vCPU in has to see it go. So that one is the first to come, and the last to leave.
        let mut links = vec![probe(&mut ebpf, "on_destroy", "kvm_mmu_destroy")?];
        if layout.hooks_sched_out {
            links.push(probe(&mut ebpf, "on_sched_out", "kvm_sched_out")?);
        }
        if layout.tells_nested_entry {
            links.push(tracepoint(
                &mut ebpf,
                "on_nested_entry",
                "kvm_nested_vmenter",
            )?);
        }
        links.push(probe(&mut ebpf, "on_put", "kvm_arch_vcpu_put")?);
        links.push(probe(&mut ebpf, "on_load", "kvm_arch_vcpu_load")?);
        links.push(tracepoint(&mut ebpf, "on_entry", "kvm_entry")?);
        links.push(tracepoint(&mut ebpf, "on_exit", "kvm_exit")?);
        let data = |name| match ebpf.take_map(name) {
            Some(Map::Array(data)) => Ok(data),
            _ => Err(Error::Unknown(format!("map {name}"))),
        };
        Ok(Self {
            maps: Maps::new(data)?,
            links,
        })
    }

    /// The maps that they keep.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The maps, and the links by their programs.
    pub fn into_parts(self) -> (Maps, Vec<(&'static str, FdLink)>) {
        (self.maps, self.links)
    }
}

/// Load the programs, and make the maps.
fn load(layout: &Layout, vcpus: u32) -> Result<Ebpf, Error> {
    let cpus = aya::util::nr_cpus().map_err(|(what, error)| Error::Refused {
        program: what.to_owned(),
        error: error.to_string(),
    })?;
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
    let mut loader = EbpfLoader::new();
    for (name, value) in &layout.constants {
        loader.set_global(name, value, true);
    }
    loader.set_global("cpus", &cpus, true);
    let known = vcpus.saturating_mul(2).max(MARKS);
    for (name, entries) in [
        ("heres", cpus),
        ("ledgers", vcpus),
        ("owners", vcpus),
        ("unused", vcpus),
        ("vcpus", known),
        ("vms", vcpus),
    ] {
        loader.set_max_entries(name, entries);
    }
    loader.load(PROGRAMS).map_err(refused("ledger.bpf.o"))
}

/// The map of a name.
fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map, Error> {
    ebpf.map_mut(name)
        .ok_or_else(|| Error::Unknown(format!("map {name}")))
}

/// The program of a name, which is of the kind that is asked for.
fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, Error>
where
    &'a mut P: TryFrom<&'a mut Program>,
{
    let program = ebpf.program_mut(name).and_then(|it| it.try_into().ok());
    program.ok_or_else(|| Error::Unknown(format!("program {name}")))
}

/// Attach a program to where a function of the kernel begins.
fn probe(
    ebpf: &mut Ebpf,
    name: &'static str,
    function: &str,
) -> Result<(&'static str, FdLink), Error> {
    let attach = |program: &mut KProbe| {
        program.load()?;
        let link = program.attach(function, 0)?;
        program.take_link(link)
    };
    let link = attach(program(ebpf, name)?).map_err(refused(name))?;
    let link = FdLink::try_from(link).map_err(refused(name))?;
    Ok((name, link))
}

/// Attach a program to a tracepoint of KVM's.
fn tracepoint(
    ebpf: &mut Ebpf,
    name: &'static str,
    tracepoint: &str,
) -> Result<(&'static str, FdLink), Error> {
    let attach = |program: &mut RawTracePoint| {
        program.load()?;
        let link = program.attach(tracepoint)?;
        program.take_link(link)
    };
    let link = attach(program(ebpf, name)?).map_err(refused(name))?;
    Ok((name, link.into()))
}

/// Return why the kernel does not take a program or a map, in our words where there are some.
fn refused<E: std::error::Error + 'static>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| {
        let mut causes = Vec::new();
        let mut denied = false;
        let mut next: Option<&dyn std::error::Error> = Some(&error);
        while let Some(cause) = next {
            if let Some(found) = cause.downcast_ref::<io::Error>() {
                denied |= found.kind() == ErrorKind::PermissionDenied;
            }
            if let Some(ProgramError::LoadError { verifier_log, .. }) = cause.downcast_ref() {
                // The verifier's last lines say what it does not like.
                let log = verifier_log.to_string();
                let lines: Vec<&str> = log.lines().collect();
                let from = lines.len().saturating_sub(12);
                causes.push(lines[from..].join("; "));
            } else {
                causes.push(cause.to_string());
            }
            next = cause.source();
        }
        let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid");
        let paranoid = paranoid.ok().and_then(|text| text.trim().parse().ok());
        let by_perf = causes.iter().any(|cause| cause.contains("perf_event_open"));
        let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
        match denied {
            // Where the helper that reads the kernel is not even there.
            _ if lockdown.contains("[confidentiality]") => Error::LockedDown,
            true if by_perf && paranoid > Some(2) && has_perfmon() => {
                Error::Paranoid(paranoid.unwrap_or_default())
            }
            // The verifier's own refusals of a program come as EACCES, with a log.
            true if !causes.iter().any(|cause| cause.contains("; ")) => Error::NoRight,
            _ => Error::Refused {
                program: what.to_owned(),
                error: causes.join(": "),
            },
        }
    }
}

/// Return true if this process has CAP_PERFMON.
fn has_perfmon() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::PERFMON))
}
