// SPDX-License-Identifier: GPL-2.0

//! Interference of a VMM with a running vCPU: stepping it, stopping it anywhere and continuing in
//! another VM, making CPUID fault.

use std::io;

use kvm_bindings::{
    kvm_guest_debug, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, Msrs,
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    config::{Error, Result, MAX_VCPUS},
    machine::{TinyVm, END_PORT},
};

/// MSR_PLATFORM_INFO, with bit 31: CPUID can be made to fault.
const PLATFORM_INFO: (u32, u64) = (0xce, 1 << 31);
/// MSR MISC_FEATURES_ENABLES, with bit 0: CPUID faults above CPL 0.
const MISC_FEATURES_ENABLES: (u32, u64) = (0x140, 1);

/// Progress of [`TinyVm::step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// The guest's program ended after this many steps.
    ToTheEnd(u32),
    /// All requested steps were made.
    AllSteps,
}

impl TinyVm {
    /// Run the first vCPU for at most `steps` instructions, with an exit to the VMM after each.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Guest`] if it ends otherwise, or [`Error::Kvm`] if KVM does not step it.
    pub fn step(&mut self, steps: u32) -> Result<Stepped> {
        let vcpu = self.first_vcpu();
        debug(vcpu, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)?;
        for step in 0..steps {
            let what = match vcpu.run() {
                Ok(VcpuExit::Debug(_)) => continue,
                Ok(VcpuExit::IoOut(END_PORT, _)) => return Ok(Stepped::ToTheEnd(step)),
                Ok(exit) => format!("{exit:?}"),
                Err(error) if error.errno() == libc::EINTR => continue,
                Err(error) => error.to_string(),
            };
            return Err(Error::Guest { vcpu: 0, what });
        }
        debug(vcpu, 0)?;
        Ok(Stepped::AllSteps)
    }

    /// Move the machine to another VM of the same process: copy the memory and the first vCPU's
    /// state, as a VMM does that restores a saved machine.
    ///
    /// # Errors
    ///
    /// See [`TinyVm::new`]. Also returns [`Error::Kvm`] if KVM does not read or write the state.
    pub fn migrate(mut self) -> Result<Self> {
        let mut other = Self::new(self.config().clone())?;
        other.memory_mut().copy_from(self.memory());
        State::of(self.first_vcpu())?.restore(other.first_vcpu())?;
        Ok(other)
    }

    /// Ask KVM for vCPUs that it cannot create, with ids that are taken or out of range. Return the
    /// number of refusals.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Settings`] if KVM creates such a vCPU.
    pub fn ask_for_impossible_vcpus(&mut self) -> Result<u64> {
        for id in [0, u64::from(u32::MAX), 1 << 20] {
            if self.vm().create_vcpu(id).is_ok() {
                return Err(Error::Settings(format!("KVM made a second vCPU {id}")));
            }
        }
        Ok(3)
    }

    /// Ask KVM for a vCPU while the process may not open another file, so that KVM creates it and
    /// destroys it again. No other thread should open files meanwhile.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Settings`] if KVM creates the vCPU, or [`Error::Kernel`] if the limit
    /// cannot be set.
    pub fn ask_for_vcpu_without_a_file(&mut self) -> Result<()> {
        let limit = |soft: Option<libc::rlim_t>| {
            let mut limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: The limit is ours to write.
            let mut ret = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
            let before = limit.rlim_cur;
            if let (0, Some(soft)) = (ret, soft) {
                limit.rlim_cur = soft;
                // SAFETY: The kernel only reads it.
                ret = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
            }
            match ret {
                0 => Ok(before),
                _ => Err(Error::Kernel(
                    "limit the number of files",
                    io::Error::last_os_error(),
                )),
            }
        };
        let before = limit(Some(0))?;
        let made = self.vm().create_vcpu(u64::from(MAX_VCPUS) + 1);
        limit(Some(before))?;
        match made {
            Err(error) if error.errno() == libc::EMFILE => Ok(()),
            other => Err(Error::Settings(format!(
                "a vCPU without a file descriptor ends with {:?}",
                other.map(drop)
            ))),
        }
    }

    /// Make CPUID fault above CPL 0, for the first vCPU.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Kvm`] if KVM does not support that.
    pub fn make_cpuid_fault(&mut self) -> Result<()> {
        set_msrs(
            self.first_vcpu(),
            &[PLATFORM_INFO, MISC_FEATURES_ENABLES],
            "make CPUID fault",
        )
    }
}

/// State that a VMM reads from a stopped vCPU, and writes to the same or to another vCPU.
pub(crate) struct State {
    sregs: kvm_sregs,
    regs: kvm_regs,
    events: kvm_vcpu_events,
}

impl State {
    /// Read the state of a vCPU.
    pub(crate) fn of(vcpu: &VcpuFd) -> Result<Self> {
        let refused = |error| Error::Kvm("read a vCPU's state", error);
        Ok(Self {
            sregs: vcpu.get_sregs().map_err(refused)?,
            regs: vcpu.get_regs().map_err(refused)?,
            events: vcpu.get_vcpu_events().map_err(refused)?,
        })
    }

    /// Write the state to a vCPU.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        let refused = |error| Error::Kvm("set a vCPU's state", error);
        vcpu.set_sregs(&self.sregs).map_err(refused)?;
        vcpu.set_regs(&self.regs).map_err(refused)?;
        vcpu.set_vcpu_events(&self.events).map_err(refused)
    }
}

/// Set MSRs of a vCPU, given by number. Fail with `what` if KVM refuses one of them.
pub(crate) fn set_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)], what: &'static str) -> Result<()> {
    let entries: Vec<_> = msrs
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    let refused = |error| Error::Kvm(what, error);
    let msrs =
        Msrs::from_entries(&entries).map_err(|_| refused(kvm_ioctls::Error::new(libc::EINVAL)))?;
    match vcpu.set_msrs(&msrs).map_err(refused)? {
        set if set == entries.len() => Ok(()),
        _ => Err(refused(kvm_ioctls::Error::new(libc::EINVAL))),
    }
}

fn debug(vcpu: &VcpuFd, control: u32) -> Result<()> {
    let settings = kvm_guest_debug {
        control,
        ..Default::default()
    };
    vcpu.set_guest_debug(&settings)
        .map_err(|error| Error::Kvm("step a vCPU", error))
}
