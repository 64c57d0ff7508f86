// SPDX-License-Identifier: GPL-2.0

//! Loading and attaching of the programs.

use std::{
    ffi::{CStr, CString},
    fs,
    io::{self, ErrorKind},
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::SystemTime,
};

use aya::maps::{Array, Stack};
use exitmeter_meter::reasons::Isa;
use rustix::thread::{capabilities, CapabilitySet};

use super::{
    layout::Layout,
    maps::{self, Maps},
    object::{Object, Sizes},
    sys::{self, Purpose},
    Error,
};

/// Default number of vCPUs metered at a time. Their ledgers take 16 MiB.
pub const VCPUS: u32 = 512;

/// Functions of KVM that the programs hook at their entry. Not every kernel needs all of them.
pub const FUNCTIONS: [&str; 5] = [DESTROY, CREATE, SCHED_OUT, PUT, LOAD];
const CREATE: &str = "kvm_mmu_create";
const DESTROY: &str = "kvm_mmu_destroy";
const SCHED_OUT: &str = "kvm_sched_out";
const PUT: &str = "kvm_arch_vcpu_put";
const LOAD: &str = "kvm_arch_vcpu_load";

/// An attached program.
#[derive(Debug)]
pub struct Link {
    name: &'static str,
    file: OwnedFd,
}

impl Link {
    /// Return the program's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Pin the link, which keeps the program attached after this process ends.
    ///
    /// # Errors
    ///
    /// Returns the error of bpf(2).
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        sys::pin(self.file.as_fd(), path)
    }
}

/// Attached programs. They stay attached while this value lives or its parts are pinned.
#[derive(Debug)]
pub struct Attached {
    maps: Maps,
    /// Links, in the order of attaching.
    links: Vec<Link>,
}

impl Attached {
    /// Load the programs and attach them. `vcpus` is the number of vCPUs metered at a time, and
    /// `details` gives each of them tables. If a step fails, nothing stays attached.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn new(vcpus: u32, details: bool) -> Result<Self, Error> {
        let mut layout = Layout::find()?;
        let sizes = Sizes::new(vcpus, cpus()?, details);
        layout.known.extend([
            ("cpu_mask", sizes.cpus - 1),
            ("ledgers_mask", sizes.ledgers_mask()),
            ("details", details.into()),
        ]);
        let mut object = Object::new(&layout, sizes)?;
        let mut unused: Stack<_, u32> = object.map("unused")?;
        // Push in reverse, so that the lowest index is taken first.
        for index in (0..sizes.vcpus).rev() {
            unused.push(index, 0).map_err(refused("unused"))?;
        }
        let mut meter: Array<_, maps::Meter> = object.map("meter")?;
        let life = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let begun = maps::Meter::new(layout.isa, life.unwrap_or_default(), details);
        meter.set(0, begun, 0).map_err(refused("meter"))?;

        let hooks = Hooks::new(&object, &layout);
        // A program that takes in a vCPU relies on the one that sees it go. So these are attached
        // first and detached last.
        let mut programs = vec![
            hooks.function(DESTROY, "on_destroy_by_fentry", "on_destroy_by_kprobe")?,
            hooks.function(CREATE, "on_create_by_fentry", "on_create_by_kprobe")?,
        ];
        if layout.hooks_sched_out {
            programs.push(hooks.function(
                SCHED_OUT,
                "on_sched_out_by_fentry",
                "on_sched_out_by_kprobe",
            )?);
        }
        if layout.tells_nested_entry {
            programs.push(hooks.tracepoint("kvm_nested_vmenter", "on_nested_entry")?);
        }
        programs.push(hooks.function(PUT, "on_put_by_fentry", "on_put_by_kprobe")?);
        programs.push(hooks.function(LOAD, "on_load_by_fentry", "on_load_by_kprobe")?);
        let entry = match details {
            true => "on_entry_detailed",
            false => "on_entry",
        };
        programs.push(hooks.tracepoint("kvm_entry", entry)?);
        let exit = match (layout.isa, details, layout.cast) {
            (Isa::Vmx, true, _) => "on_vmx_exit_detailed",
            (Isa::Vmx, false, 0) => "on_vmx_exit_by_probe",
            (Isa::Vmx, false, _) => "on_vmx_exit",
            (Isa::Svm, true, _) => "on_svm_exit_detailed",
            (Isa::Svm, false, 0) => "on_svm_exit_by_probe",
            (Isa::Svm, false, _) => "on_svm_exit",
        };
        programs.push(hooks.tracepoint("kvm_exit", exit)?);
        // Loading takes long and is done by now. Attach in quick succession, so that no entry stays
        // long without its exit.
        let links = programs.into_iter().map(Ready::attach);
        let links = links.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            maps: Maps::new(|name| object.take(name))?,
            links,
        })
    }

    /// Return the maps of the programs.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Return the maps and the links.
    pub fn into_parts(self) -> (Maps, Vec<Link>) {
        (self.maps, self.links)
    }
}

/// Return the number of possible CPUs, rounded up to a power of two.
fn cpus() -> Result<u32, Error> {
    const POSSIBLE: &str = "/sys/devices/system/cpu/possible";
    // The format is "0-3,8-11".
    let text = fs::read_to_string(POSSIBLE).map_err(refused(POSSIBLE))?;
    let last = text.trim().rsplit([',', '-']).next();
    let last: Option<u32> = last.and_then(|number| number.parse().ok());
    let cpus = last.and_then(|last| last.checked_add(1)?.checked_next_power_of_two());
    cpus.ok_or_else(|| Error::Unknown(format!("last CPU in {POSSIBLE}")))
}

/// Loader of programs for their hooks.
struct Hooks<'a> {
    object: &'a Object,
    layout: &'a Layout,
    /// Types of kvm.ko; `None` if this process may not look them up, or KVM is built into the
    /// kernel.
    types: Option<OwnedFd>,
}

impl<'a> Hooks<'a> {
    fn new(object: &'a Object, layout: &'a Layout) -> Self {
        let types = match layout.kvm_is_module {
            true => sys::types_of("kvm"),
            false => None,
        };
        Self {
            object,
            layout,
            types,
        }
    }

    /// Load a program for a tracepoint of KVM.
    fn tracepoint(&self, tracepoint: &'static str, name: &'static str) -> Result<Ready<'a>, Error> {
        let program = self.object.load(name, &Purpose::Plain)?;
        Ok(Ready {
            name,
            program,
            at: At::Tracepoint(tracepoint),
        })
    }

    /// Load a program for the entry of a function of KVM. Prefer fentry, which costs a third of a
    /// kprobe.
    fn function(
        &self,
        function: &'static str,
        by_fentry: &'static str,
        by_kprobe: &'static str,
    ) -> Result<Ready<'a>, Error> {
        if let Some(program) = self.fentry(function, by_fentry) {
            let fallback = Fallback {
                object: self.object,
                name: by_kprobe,
                function,
            };
            return Ok(Ready {
                name: by_fentry,
                program,
                at: At::Fentry(fallback),
            });
        }
        kprobe(self.object, function, by_kprobe)
    }

    /// Load a program for fentry; `None` if this process or this function cannot use it.
    fn fentry(&self, function: &str, name: &'static str) -> Option<OwnedFd> {
        if self.layout.kvm_is_module && self.types.is_none() {
            return None;
        }
        let mut ids = self.layout.functions.iter();
        let (_, id) = ids.find(|(name, _)| *name == function)?;
        let target = sys::Target {
            types: self.types.as_ref().map(|types| types.as_fd()),
            id: *id,
        };
        self.object.load(name, &Purpose::Fentry(&target)).ok()
    }
}

/// Load a program for a kprobe.
fn kprobe<'a>(
    object: &'a Object,
    function: &'static str,
    name: &'static str,
) -> Result<Ready<'a>, Error> {
    Ok(Ready {
        name,
        program: object.load(name, &Purpose::Plain)?,
        at: At::Kprobe(object, function),
    })
}

/// Attach a program through BPF_TRACE_KPROBE_MULTI, which needs no perf event; `None` if that
/// fails.
fn kprobe_multi(object: &Object, function: &CStr, name: &'static str) -> Option<OwnedFd> {
    let program = object.load(name, &Purpose::KprobeMulti).ok()?;
    sys::kprobe_multi(function, program.as_fd()).ok()
}

/// A loaded program that is not attached yet.
struct Ready<'a> {
    name: &'static str,
    program: OwnedFd,
    at: At<'a>,
}

/// Hook that a program is to be attached to.
enum At<'a> {
    Tracepoint(&'static str),
    Kprobe(&'a Object, &'static str),
    Fentry(Fallback<'a>),
}

/// Kprobe to use if fentry fails.
struct Fallback<'a> {
    object: &'a Object,
    name: &'static str,
    function: &'static str,
}

impl Ready<'_> {
    fn attach(self) -> Result<Link, Error> {
        let Self { name, program, at } = self;
        let file = match at {
            At::Tracepoint(tracepoint) => {
                let tracepoint = CString::new(tracepoint).map_err(refused(name))?;
                sys::attach(Some(&tracepoint), program.as_fd()).map_err(refused(name))?
            }
            At::Kprobe(object, function) => {
                let function = CString::new(function).map_err(refused(name))?;
                let linked = sys::kprobe(&function)
                    .and_then(|kprobe| sys::link(kprobe.as_fd(), program.as_fd()));
                match linked {
                    Ok(file) => file,
                    // kernel.perf_event_paranoid may forbid the kprobe. It does not apply to
                    // kprobe_multi.
                    Err(error) => kprobe_multi(object, &function, name)
                        .ok_or(error)
                        .map_err(refused_kprobe(name))?,
                }
            }
            At::Fentry(fallback) => match sys::attach(None, program.as_fd()) {
                Ok(file) => file,
                // Another user of the function may exclude fentry, as some live patches do.
                Err(_) => {
                    let Fallback {
                        object,
                        name,
                        function,
                    } = fallback;
                    return kprobe(object, function, name)?.attach();
                }
            },
        };
        Ok(Link { name, file })
    }
}

/// Return the error for a kprobe that the kernel refuses.
fn refused_kprobe(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| {
        let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid");
        let paranoid = paranoid.ok().and_then(|text| text.trim().parse().ok());
        let denied = error.kind() == ErrorKind::PermissionDenied;
        match paranoid {
            Some(paranoid) if denied && paranoid > 2 && has_perfmon() => Error::Paranoid(paranoid),
            _ => refused(what)(error),
        }
    }
}

/// Return the error for a program, map or file that the kernel refuses. Known causes have errors of
/// their own.
pub fn refused<E: std::error::Error + 'static>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| {
        let mut causes = Vec::new();
        let (mut denied, mut invalid) = (false, false);
        let mut next: Option<&dyn std::error::Error> = Some(&error);
        while let Some(cause) = next {
            if let Some(found) = cause.downcast_ref::<io::Error>() {
                denied |= found.kind() == ErrorKind::PermissionDenied;
                invalid |= found.kind() == ErrorKind::InvalidInput;
            }
            causes.push(cause.to_string());
            next = cause.source();
        }
        let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
        match denied {
            // If the helper that reads the kernel is missing altogether, the call fails with
            // EINVAL.
            _ if lockdown.contains("[confidentiality]") && (denied || invalid) => Error::LockedDown,
            true => Error::NoRight,
            false => Error::Refused {
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
