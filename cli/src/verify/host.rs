// SPDX-License-Identifier: GPL-2.0

//! Host under test: its requirements, and the running of guests on it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use exitmeter_meter::{
    leaves::LeafMap,
    reasons::{self, Isa},
};
use rustix::thread::{gettid, sched_getaffinity, CpuSet};
use tiny_guests::{Config, TinyVm};

use super::{
    hist,
    own::{Before, MeteredGuest},
};
use crate::{
    source::{self, Choice, DEVICE},
    stop::Stop,
    why::device::Device,
};

const KVM: &str = "/dev/kvm";

/// Reason why nothing can be verified.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The CPU has no extension for VMs.
    #[error(
        "this CPU offers neither VT-x nor SVM: turn virtualization on in the firmware's settings, or \
         nested virtualization for this VM on its host"
    )]
    NoExtension,
    /// There is no KVM.
    #[error("there is no {KVM}: load KVM first (modprobe kvm_intel, or modprobe kvm_amd)")]
    NoKvm,
    /// The user may not use KVM.
    #[error("no right to open {KVM}: run this as root or as a member of the group kvm")]
    NoRight,
    /// KVM cannot be opened.
    #[error("cannot open {KVM}: {0}")]
    Kvm(io::Error),
    /// The module meters the other vendor's KVM.
    #[error(
        "the module meters {0}, and this CPU has another extension: load it after KVM's module"
    )]
    OtherIsa(&'static str),
    /// The thread cannot run on the CPU.
    #[error("cannot run on CPU {0}: {1}; name another by --cpu")]
    Cpu(usize, io::Error),
}

/// A host with KVM and a meter.
#[derive(Debug)]
pub struct MeteredHost {
    /// Extension of the CPU's vendor.
    pub isa: Isa,
    /// True if KVM uses the CPU's nested paging.
    pub nested_paging: bool,
    /// True if the CPU runs a guest's real mode by itself.
    pub real_mode: bool,
    /// TSC frequency in kHz, if known.
    pub tsc_khz: Option<u32>,
    /// True if the kernel considers the TSC stable.
    pub tsc_stable: bool,
    /// Leaf map that guests see.
    pub leaf_map: Option<LeafMap>,
    /// True if guests read the sums of the host.
    pub host_scope: bool,
    /// Number of the meter's life.
    pub life: u64,
    /// True if details are on already.
    pub has_details: bool,
    /// CPU on which guests run.
    pub cpu: usize,
    /// Id by which KVM knows this thread, if it can be found out.
    pub pid: Option<u32>,
    /// Path to read snapshots from.
    pub path: PathBuf,
    /// True if BPF is the meter: then guests cannot read their numbers, and there are no details.
    pub by_bpf: bool,
    /// The user's request to end.
    pub stop: Stop,
}

impl MeteredHost {
    /// Find KVM and the meter, and bind this thread to a CPU: to `cpu`, or to the second of those
    /// that the thread may use, because the first handles most of a host's interrupts.
    ///
    /// # Errors
    ///
    /// Returns [`Error`], or [`source::Error`] if there is no meter.
    pub fn find(cpu: Option<usize>, meter: Choice, stop: Stop) -> anyhow::Result<Self> {
        let isa = tiny_guests::host_isa().ok_or(Error::NoExtension)?;
        open_kvm()?;
        let path = meter.open(Path::new(DEVICE))?;
        let bytes = source::read(&path)?;
        let snapshot = source::parse(&path, &bytes)?;
        if snapshot.isa() != isa {
            return Err(Error::OtherIsa(snapshot.isa().name()).into());
        }
        let cpu = bind_to_cpu(cpu)?;
        let parameter = |module, name| flag(&format!("/sys/module/{module}/parameters/{name}"));
        let (nested_paging, real_mode) = match isa {
            Isa::Vmx => (
                parameter("kvm_intel", "ept"),
                parameter("kvm_intel", "unrestricted_guest"),
            ),
            Isa::Svm => (parameter("kvm_amd", "npt"), Some(true)),
        };
        Ok(Self {
            isa,
            // Both are on by default.
            nested_paging: nested_paging.unwrap_or(true),
            real_mode: real_mode.unwrap_or(true),
            // BPF uses another clock.
            tsc_khz: snapshot.tsc_khz().filter(|_| !snapshot.by_bpf()),
            tsc_stable: snapshot.tsc_is_stable(),
            leaf_map: snapshot.leaf_map(),
            host_scope: snapshot.host_scope(),
            life: snapshot.life(),
            has_details: snapshot.has_tables(),
            cpu,
            pid: hist::is_in_host_pid_namespace().then(thread),
            by_bpf: snapshot.by_bpf(),
            path,
            stop,
        })
    }

    /// Return the code of a reason that has one on VMX and one on SVM.
    pub fn by_vendor(&self, vmx: u32, svm: u32) -> u32 {
        match self.isa {
            Isa::Vmx => vmx,
            Isa::Svm => svm,
        }
    }

    /// Return the name of a reason.
    pub fn name(&self, code: u32) -> &'static str {
        reasons::name(self.isa, code).unwrap_or("?")
    }

    /// Run a guest to its end in this thread.
    ///
    /// # Errors
    ///
    /// Returns an error of KVM, or [`Stopped`](crate::stop::Stopped).
    pub fn run(&self, config: Config) -> anyhow::Result<TinyVm> {
        self.stop.check()?;
        let mut machine = TinyVm::new(config)?;
        self.run_again(&mut machine)?;
        Ok(machine)
    }

    /// Run an existing guest to its end.
    ///
    /// # Errors
    ///
    /// See [`Self::run`].
    pub fn run_again(&self, machine: &mut TinyVm) -> anyhow::Result<()> {
        let done = machine.run_one_until(0, &|| self.stop.is_wanted());
        self.stop.check()?;
        done?;
        Ok(())
    }

    /// Run a guest to its end, and find its numbers in a snapshot.
    ///
    /// # Errors
    ///
    /// See [`Self::run`]. Also returns an error if the meter does not know the guest.
    pub fn run_metered(
        &self,
        config: Config,
        device: Option<&Device>,
    ) -> anyhow::Result<(TinyVm, MeteredGuest)> {
        let path = &self.path;
        let read = || match device {
            Some(device) => device.read(),
            None => source::read(path),
        };
        let before = Before::new(&source::parse(path, &read()?)?);
        let machine = self.run(config)?;
        let guest = MeteredGuest::find(&source::parse(path, &read()?)?, &before, self.pid)?;
        Ok((machine, guest))
    }
}

/// Return the id of this thread.
pub fn thread() -> u32 {
    gettid().as_raw_nonzero().get().unsigned_abs()
}

fn open_kvm() -> Result<File, Error> {
    let kvm = OpenOptions::new().read(true).write(true).open(KVM);
    kvm.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::NoKvm,
        ErrorKind::PermissionDenied => Error::NoRight,
        // The device exists without its driver: in a container, or as a node that udev made.
        _ if error.raw_os_error() == Some(6) || error.raw_os_error() == Some(19) => Error::NoKvm,
        _ => Error::Kvm(error),
    })
}

/// Bind this thread to a CPU, and return the CPU.
fn bind_to_cpu(wanted: Option<usize>) -> Result<usize, Error> {
    let cpu = match wanted {
        Some(cpu) => cpu,
        None => {
            let allowed = sched_getaffinity(None).map_err(|error| Error::Cpu(0, error.into()))?;
            let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
            let first = allowed.next().unwrap_or(0);
            allowed.next().unwrap_or(first)
        }
    };
    tiny_guests::pin(cpu).map_err(|error| Error::Cpu(cpu, error))?;
    Ok(cpu)
}

/// Read a module's parameter that is Y or N.
fn flag(path: &str) -> Option<bool> {
    let text = fs::read_to_string(path).ok()?;
    match text.trim() {
        "Y" | "1" => Some(true),
        "N" | "0" => Some(false),
        _ => None,
    }
}
