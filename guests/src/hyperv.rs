// SPDX-License-Identifier: GPL-2.0

//! A guest that uses Hyper-V's interface: its hypercalls follow Hyper-V's convention (TLFS,
//! "Hypercall Interface").

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use crate::{
    catalogue::Program,
    config::{Config, Error, Result},
    interfere::set_msrs,
    machine::{with_apic_id, TinyVm},
};

/// First leaves of a hypervisor: its name, and its interface.
const VENDOR_LEAF: u32 = 0x4000_0000;
const INTERFACE_LEAF: u32 = 0x4000_0001;
/// Signature `Hv#1`.
const INTERFACE: u32 = 0x3123_7648;
/// MSR HV_X64_MSR_GUEST_OS_ID and its value. Hypercalls need any number but 0.
const GUEST_OS_ID: (u32, u64) = (0x4000_0000, 1);

/// Hypercall HvCallNotifyLongSpinWait, which only yields the CPU.
pub const NOTIFY_LONG_SPIN_WAIT: u16 = 8;

impl TinyVm {
    /// Create a VM of one vCPU that runs [`Program::Hypercall`] with Hyper-V's
    /// [`NOTIFY_LONG_SPIN_WAIT`].
    ///
    /// # Errors
    ///
    /// See [`TinyVm::new`]. Also returns [`Error::Kvm`] if KVM was built without Hyper-V's
    /// interface.
    pub fn with_hyperv(config: Config) -> Result<Self> {
        if config.program != Program::Hypercall {
            return Err(Error::Settings(
                "a guest that uses Hyper-V's interface runs the program hypercall".to_owned(),
            ));
        }
        let mut machine = Self::new(config)?;
        let cpuid = Kvm::new()
            .and_then(|kvm| kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
            .map_err(|error| Error::Kvm("list the CPUID leaves that it supports", error))?;
        let others = cpuid.as_slice().iter();
        let others = others.filter(|leaf| leaf.function >> 16 != VENDOR_LEAF >> 16);
        let mut leaves: Vec<_> = others.copied().collect();
        for (function, eax) in [(VENDOR_LEAF, INTERFACE_LEAF), (INTERFACE_LEAF, INTERFACE)] {
            leaves.push(kvm_cpuid_entry2 {
                function,
                eax,
                ..Default::default()
            });
        }
        let vcpu = machine.first_vcpu();
        let refused = |error| Error::Kvm("enable Hyper-V's interface for a vCPU", error);
        let leaves = CpuId::from_entries(&leaves)
            .map_err(|_| refused(kvm_ioctls::Error::new(libc::EINVAL)))?;
        vcpu.set_cpuid2(&with_apic_id(&leaves, 0))
            .map_err(refused)?;
        set_msrs(
            vcpu,
            &[GUEST_OS_ID],
            "enable Hyper-V's interface for a vCPU",
        )?;
        let mut registers = vcpu.get_regs().map_err(refused)?;
        registers.rcx = NOTIFY_LONG_SPIN_WAIT.into();
        vcpu.set_regs(&registers).map_err(refused)?;
        Ok(machine)
    }
}
