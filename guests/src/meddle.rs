// SPDX-License-Identifier: GPL-2.0

//! What a VMM may do to a vCPU in the middle of its work: step it, stop it anywhere and go on in
//! another VM, have CPUID fault.

use std::io;

use kvm_bindings::{
    kvm_guest_debug, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, Msrs,
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    config::{Error, Result, MAX_VCPUS},
    machine::{Machine, END_PORT},
};

/// MSR_PLATFORM_INFO; its bit 31 says that CPUID can be made to fault.
const PLATFORM_INFO: (u32, u64) = (0xce, 1 << 31);
/// MISC_FEATURES_ENABLES; its bit 0 makes CPUID fault above CPL 0.
const MISC_FEATURES_ENABLES: (u32, u64) = (0x140, 1);

/// How far [`Machine::step`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// To the end of the guest's program, in so many steps.
    ToTheEnd(u32),
    /// As far as it was told.
    AsTold,
}

impl Machine {
    /// Runs the first vCPU for at most `steps` instructions, each of which ends in the VMM.
    ///
    /// # Errors
    ///
    /// [`Error::Guest`] when it ends otherwise, [`Error::Kvm`] when KVM does not step it.
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
        Ok(Stepped::AsTold)
    }

    /// The same machine as another VM of the same process: memory and the first vCPU's state are
    /// carried over, as a VMM does that restores a saved machine.
    ///
    /// # Errors
    ///
    /// As [`Machine::new`], and [`Error::Kvm`] when KVM does not give or take the state.
    pub fn migrate(mut self) -> Result<Self> {
        let mut other = Self::new(self.config().clone())?;
        other.memory_mut().copy_from(self.memory());
        State::of(self.first_vcpu())?.give(other.first_vcpu())?;
        Ok(other)
    }

    /// Asks KVM for vCPUs that it cannot have, with ids that are taken or out of range. How many
    /// were refused.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] when KVM makes such a vCPU.
    pub fn ask_for_impossible_vcpus(&mut self) -> Result<u64> {
        for id in [0, u64::from(u32::MAX), 1 << 20] {
            if self.vm().create_vcpu(id).is_ok() {
                return Err(Error::Settings(format!("KVM made a second vCPU {id}")));
            }
        }
        Ok(3)
    }

    /// Asks KVM for a vCPU when the process may not open another file, so that it is made and taken
    /// back. No other thread should open files meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] when KVM makes it, [`Error::Kernel`] when the limit cannot be set.
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

    /// Has CPUID fault above CPL 0, for the first vCPU.
    ///
    /// # Errors
    ///
    /// [`Error::Kvm`] when KVM does not know that.
    pub fn make_cpuid_fault(&mut self) -> Result<()> {
        set_msrs(
            self.first_vcpu(),
            &[PLATFORM_INFO, MISC_FEATURES_ENABLES],
            "make CPUID fault",
        )
    }
}

/// What a VMM reads of a vCPU that stands still, and writes to the same or to another one.
pub(crate) struct State {
    sregs: kvm_sregs,
    regs: kvm_regs,
    events: kvm_vcpu_events,
}

impl State {
    /// That of a vCPU.
    pub(crate) fn of(vcpu: &VcpuFd) -> Result<Self> {
        let refused = |error| Error::Kvm("tell a vCPU's state", error);
        Ok(Self {
            sregs: vcpu.get_sregs().map_err(refused)?,
            regs: vcpu.get_regs().map_err(refused)?,
            events: vcpu.get_vcpu_events().map_err(refused)?,
        })
    }

    /// Writes it to a vCPU.
    pub(crate) fn give(&self, vcpu: &VcpuFd) -> Result<()> {
        let refused = |error| Error::Kvm("take a vCPU's state", error);
        vcpu.set_sregs(&self.sregs).map_err(refused)?;
        vcpu.set_regs(&self.regs).map_err(refused)?;
        vcpu.set_vcpu_events(&self.events).map_err(refused)
    }
}

/// Set MSRs of a vCPU, by their numbers, to `what`: an error if KVM does not take one of them.
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
