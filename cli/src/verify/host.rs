// SPDX-License-Identifier: GPL-2.0

//! The host under test: what there has to be, and a guest that runs on it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use exitmeter_meter::{
    leaves::LeafMap,
    reasons::{self, Isa},
};
use rustix::thread::{gettid, sched_getaffinity, sched_setaffinity, CpuSet};
use tiny_guests::{Config, Machine};

use super::{
    hist,
    own::{Before, Own},
    stop::Stop,
};
use crate::{
    source::{self, Choice, DEVICE},
    why::device::Device,
};

const KVM: &str = "/dev/kvm";

/// Why nothing can be verified.
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
    /// KVM may not be used.
    #[error("no right to open {KVM}: run this as root or as a member of the group kvm")]
    NoRight,
    /// KVM cannot be opened.
    #[error("cannot open {KVM}: {0}")]
    Kvm(io::Error),
    /// The module is of the other vendor's KVM.
    #[error(
        "the module meters {0}, and this CPU has another extension: load it after KVM's module"
    )]
    OtherIsa(&'static str),
    /// There is no CPU to run on.
    #[error("cannot run on CPU {0}: {1}; name another by --cpu")]
    Cpu(usize, io::Error),
}

/// A host with KVM and the module.
#[derive(Debug)]
pub struct Host {
    /// The vendor's extension.
    pub isa: Isa,
    /// KVM uses the CPU's nested paging.
    pub nested_paging: bool,
    /// The CPU runs a guest's real mode by itself.
    pub real_mode: bool,
    /// TSC frequency in kHz, when it is known.
    pub tsc_khz: Option<u32>,
    /// The kernel holds the TSC to be stable.
    pub tsc_stable: bool,
    /// The leaf map that guests see.
    pub leaf_map: Option<LeafMap>,
    /// Guests read the sums of the host.
    pub host_scope: bool,
    /// The number of the meter's life.
    pub life: u64,
    /// Details are on whoever asks.
    pub has_details: bool,
    /// The CPU on which guests run.
    pub cpu: usize,
    /// The number by which KVM knows this thread, where that can be told.
    pub pid: Option<u32>,
    /// Where snapshots are read.
    pub path: PathBuf,
    /// The meter is BPF's: it tells no guest its numbers, and no details.
    pub by_bpf: bool,
    /// The user's wish to end.
    pub stop: Stop,
}

impl Host {
    /// Find KVM and the meter, and bind this thread to a CPU: to `cpu`, or the second of those that
    /// it may use, as the first has most of a host's interrupts.
    ///
    /// # Errors
    ///
    /// [`Error`], and [`source::Error`] where the meter is not there.
    pub fn find(cpu: Option<usize>, meter: Choice, stop: Stop) -> anyhow::Result<Self> {
        let isa = tiny_guests::host_isa().ok_or(Error::NoExtension)?;
        open_kvm()?;
        let path = meter.open(Path::new(DEVICE))?;
        let bytes = source::read(&path)?;
        let snapshot = source::parse(&path, &bytes)?;
        if snapshot.isa() != isa {
            return Err(Error::OtherIsa(snapshot.isa().name()).into());
        }
        let cpu = pin(cpu)?;
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
            // On by default.
            nested_paging: nested_paging.unwrap_or(true),
            real_mode: real_mode.unwrap_or(true),
            // BPF's clock is another one.
            tsc_khz: snapshot.tsc_khz().filter(|_| !snapshot.by_bpf()),
            tsc_stable: snapshot.tsc_is_stable(),
            leaf_map: snapshot.leaf_map(),
            host_scope: snapshot.host_scope(),
            life: snapshot.life(),
            has_details: snapshot.has_tables(),
            cpu,
            pid: hist::knows_its_numbers().then(thread),
            by_bpf: snapshot.by_bpf(),
            path,
            stop,
        })
    }

    /// The code of a reason that has one on VMX and one on SVM.
    pub fn pick(&self, vmx: u32, svm: u32) -> u32 {
        match self.isa {
            Isa::Vmx => vmx,
            Isa::Svm => svm,
        }
    }

    /// The name of a reason.
    pub fn name(&self, code: u32) -> &'static str {
        reasons::name(self.isa, code).unwrap_or("?")
    }

    /// Run a guest to its end in this thread.
    ///
    /// # Errors
    ///
    /// Those of KVM, and [`Stopped`](super::stop::Stopped).
    pub fn run(&self, config: Config) -> anyhow::Result<Machine> {
        self.stop.check()?;
        let mut machine = Machine::new(config)?;
        self.run_again(&mut machine)?;
        Ok(machine)
    }

    /// Run a guest to its end that is there.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn run_again(&self, machine: &mut Machine) -> anyhow::Result<()> {
        let done = machine.run_one_until(0, &|| self.stop.is_wanted());
        self.stop.check()?;
        done?;
        Ok(())
    }

    /// Run a guest to its end, and find what the meter tells of it.
    ///
    /// # Errors
    ///
    /// As [`Self::run`], and when the meter does not know the guest.
    pub fn run_metered(
        &self,
        config: Config,
        device: Option<&Device>,
    ) -> anyhow::Result<(Machine, Own)> {
        let path = &self.path;
        let read = || match device {
            Some(device) => device.read(),
            None => source::read(path),
        };
        let before = Before::new(&source::parse(path, &read()?)?);
        let machine = self.run(config)?;
        let own = Own::find(&source::parse(path, &read()?)?, &before, self.pid)?;
        Ok((machine, own))
    }
}

/// The number of this thread.
pub fn thread() -> u32 {
    gettid().as_raw_nonzero().get().unsigned_abs()
}

fn open_kvm() -> Result<File, Error> {
    let kvm = OpenOptions::new().read(true).write(true).open(KVM);
    kvm.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::NoKvm,
        ErrorKind::PermissionDenied => Error::NoRight,
        // The device is there without its driver: a container's, or a node that udev made.
        _ if error.raw_os_error() == Some(6) || error.raw_os_error() == Some(19) => Error::NoKvm,
        _ => Error::Kvm(error),
    })
}

/// Bind this thread to a CPU; return which.
fn pin(wanted: Option<usize>) -> Result<usize, Error> {
    let cpu = match wanted {
        Some(cpu) => cpu,
        None => {
            let allowed = sched_getaffinity(None).map_err(|error| Error::Cpu(0, error.into()))?;
            let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
            let first = allowed.next().unwrap_or(0);
            allowed.next().unwrap_or(first)
        }
    };
    if cpu >= CpuSet::MAX_CPU {
        return Err(Error::Cpu(cpu, ErrorKind::InvalidInput.into()));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(|error| Error::Cpu(cpu, error.into()))?;
    Ok(cpu)
}

/// A module's parameter that is Y or N.
fn flag(path: &str) -> Option<bool> {
    let text = fs::read_to_string(path).ok()?;
    match text.trim() {
        "Y" | "1" => Some(true),
        "N" | "0" => Some(false),
        _ => None,
    }
}
