// SPDX-License-Identifier: GPL-2.0

//! Offsets in this kernel's KVM, from the kernel's own types (BTF).
//!
//! KVM's structures are types of its modules, and no loader of BPF programs relocates against
//! those. So the tool looks up the offsets and patches them into the programs as constants.

use std::{fs, path::Path};

use exitmeter_meter::{btf::Types, reasons::Isa};

use super::Error;

/// BTF without types, for a KVM module that is built into the kernel.
const NO_TYPES: [u8; 24] = {
    let mut header = [0; 24];
    // Magic, version 1, size of the header.
    [header[0], header[1], header[2], header[4]] = [0x9f, 0xeb, 1, 24];
    header
};

/// Value in place of an offset for a field that does not exist.
const ABSENT: u32 = u32::MAX;

/// Values used only on VMX.
const VMX_ONLY: [&str; 6] = [
    "vmx_exit_reason",
    "vmx_qualification",
    "qualification_bit",
    "vmx_interruption",
    "interruption_bit",
    "vcpu_available",
];

/// Values used only on SVM.
const SVM_ONLY: [&str; 5] = [
    "svm_vmcb",
    "svm_vmcb01",
    "vmcb_exit_code",
    "vmcb_exit_info_1",
    "vmcb_rip",
];

/// A struct of the kernel that begins with a 64-bit number. The programs read any number as such a
/// struct.
const NUMBER: &str = "timespec64";

/// Properties of this kernel that are patched into the programs, named as in cli/bpf/known.h.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Vendor whose exits are metered.
    pub isa: Isa,
    /// Names and values.
    pub known: Vec<(&'static str, u32)>,
    /// Id of bpf_rdonly_cast(); 0 before Linux 6.2.
    pub cast: u32,
    /// Functions that fentry can hook, with their ids in kvm's types.
    pub functions: Vec<(&'static str, u32)>,
    /// True if kvm is a module, so that the ids are those of its own types.
    pub kvm_is_module: bool,
    /// True if kvm_sched_out() must be hooked: the vCPU has no flag that tells it is being
    /// scheduled out.
    pub hooks_sched_out: bool,
    /// True if a tracepoint fires before a nested guest runs.
    pub tells_nested_entry: bool,
}

impl Layout {
    /// Look up the layout of the running kernel in `/sys/kernel/btf`.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NoKvm`], [`Error::NoTypes`] or [`Error::Unknown`].
    pub fn find() -> Result<Self, Error> {
        let loaded = |name| Path::new("/sys/module").join(name).exists();
        let (isa, vendor) = match (loaded("kvm_intel"), loaded("kvm_amd")) {
            (true, _) => (Isa::Vmx, "kvm_intel"),
            (_, true) => (Isa::Svm, "kvm_amd"),
            _ => return Err(Error::NoKvm),
        };
        let types = Path::new("/sys/kernel/btf");
        let read = |name: &str| {
            let path = types.join(name);
            fs::read(&path).map_err(|error| Error::NoTypes(format!("{}: {error}", path.display())))
        };
        let kernel = read("vmlinux")?;
        // A built-in module has its types in those of the kernel.
        let module = |name| match Path::new("/sys/module")
            .join(name)
            .join("initstate")
            .exists()
        {
            true => read(name),
            false => Ok(NO_TYPES.to_vec()),
        };
        Self::of(isa, &kernel, &module("kvm")?, &module(vendor)?)
    }

    /// Look up the layout in the types of the kernel, of kvm and of the vendor's module.
    ///
    /// # Errors
    ///
    /// Returns [`Error::NoTypes`] or [`Error::Unknown`].
    pub fn of(isa: Isa, kernel: &[u8], kvm: &[u8], vendor: &[u8]) -> Result<Self, Error> {
        let types = |module| {
            Types::read(kernel, module)
                .map_err(|_| Error::NoTypes("they cannot be read".to_owned()))
        };
        let (kvm_bytes, kvm, vendor) = (kvm, types(kvm)?, types(vendor)?);
        let optional = |structure, member| vendor.offset_of(structure, member).unwrap_or(ABSENT);
        let offset = |structure: &str, member: &str| {
            vendor
                .offset_of(structure, member)
                .ok_or_else(|| Error::Unknown(format!("{member} in struct {structure}")))
        };
        let before = |tracepoint: &str| {
            kvm.parameters_before(tracepoint, "kvm_vcpu")
                .ok_or_else(|| Error::Unknown(format!("vCPU in {tracepoint}")))
        };

        let vmx_offset = |member: &str| {
            // These are in struct vcpu_vt since Linux 6.16, shared with trust domains.
            let (vt, inner) = (
                vendor.offset_of("vcpu_vmx", "vt"),
                vendor.offset_of("vcpu_vt", member),
            );
            match vt.zip(inner) {
                Some((vt, inner)) => Ok(vt.wrapping_add(inner)),
                None => offset("vcpu_vmx", member),
            }
        };
        // The bits were renamed in Linux 7.3. Without them, the programs take no detail from the
        // VMCS fields that KVM has read.
        let bit = |name: &str| {
            let named = |before| vendor.enumerator(&format!("{before}{name}"));
            named("VCPU_REG_")
                .or_else(|| named("VCPU_EXREG_"))
                .unwrap_or(ABSENT)
        };
        let scheduled_out = optional("kvm_vcpu", "scheduled_out");
        let tells_nested_entry = isa == Isa::Vmx && kvm.has_typedef("btf_trace_kvm_nested_vmenter");
        let cast = kvm.kernel_function_id("bpf_rdonly_cast");
        let (cast, number) = cast.zip(kvm.kernel_struct_id(NUMBER)).unwrap_or_default();
        let mut known = vec![
            ("is_svm", u32::from(isa == Isa::Svm)),
            ("can_cast", u32::from(cast != 0)),
            ("number_type", number),
            ("nests_always", u32::from(!tells_nested_entry)),
            ("task_on_rq", offset("task_struct", "on_rq")?),
            (
                "task_sched_delayed",
                optional("task_struct", "se.sched_delayed"),
            ),
            ("vcpu_kvm", offset("kvm_vcpu", "kvm")?),
            ("vcpu_id", offset("kvm_vcpu", "vcpu_id")?),
            ("vcpu_preempted", offset("kvm_vcpu", "preempted")?),
            ("vcpu_scheduled_out", scheduled_out),
            ("vcpu_guest_mode", offset("kvm_vcpu", "stat.guest_mode")?),
            (
                "vcpu_blocking",
                offset("kvm_vcpu", "stat.generic.blocking")?,
            ),
            (
                "vcpu_poll_success",
                offset("kvm_vcpu", "stat.generic.halt_poll_success_ns")?,
            ),
            (
                "vcpu_poll_fail",
                offset("kvm_vcpu", "stat.generic.halt_poll_fail_ns")?,
            ),
            ("kvm_userspace_pid", offset("kvm", "userspace_pid")?),
            ("kvm_stats_id", offset("kvm", "stats_id")?),
            ("kvm_vm_type", optional("kvm", "arch.vm_type")),
            ("vcpu_registers", offset("kvm_vcpu", "arch.regs")?),
            ("vcpu_hyperv", optional("kvm_vcpu", "arch.hyperv_enabled")),
            ("vcpu_efer", offset("kvm_vcpu", "arch.efer")?),
            ("vcpu_run", offset("kvm_vcpu", "run")?),
            ("vcpu_wants_to_run", optional("kvm_vcpu", "wants_to_run")),
            (
                "vcpu_protected",
                optional("kvm_vcpu", "arch.guest_state_protected"),
            ),
            (
                "kvm_guest_os",
                optional("kvm", "arch.hyperv.hv_guest_os_id"),
            ),
        ];
        for (tracepoint, name) in [
            ("btf_trace_kvm_exit", "kvm_exit"),
            ("btf_trace_kvm_entry", "kvm_entry"),
        ] {
            if before(tracepoint)? != 0 {
                return Err(Error::Unknown(format!("vCPU first in {name}")));
            }
        }
        match isa {
            Isa::Vmx => known.extend([
                ("vmx_exit_reason", vmx_offset("exit_reason")?),
                ("vmx_qualification", vmx_offset("exit_qualification")?),
                ("qualification_bit", bit("EXIT_INFO_1")),
                ("vmx_interruption", vmx_offset("exit_intr_info")?),
                ("interruption_bit", bit("EXIT_INFO_2")),
                ("vcpu_available", offset("kvm_vcpu", "arch.regs_avail")?),
            ]),
            Isa::Svm => known.extend([
                ("svm_vmcb", offset("vcpu_svm", "vmcb")?),
                ("svm_vmcb01", offset("vcpu_svm", "vmcb01.ptr")?),
                // The control area is the first of a VMCB (AMD64 Architecture Programmer's Manual 2, appendix B).
                ("vmcb_exit_code", offset("vmcb_control_area", "exit_code")?),
                (
                    "vmcb_exit_info_1",
                    offset("vmcb_control_area", "exit_info_1")?,
                ),
                ("vmcb_rip", offset("vmcb", "save.rip")?),
            ]),
        }
        let others: &[&str] = match isa {
            Isa::Vmx => &SVM_ONLY,
            Isa::Svm => &VMX_ONLY,
        };
        known.extend(others.iter().map(|name| (*name, ABSENT)));
        let kvm_is_module = kvm_bytes.len() > NO_TYPES.len();
        let functions = super::attach::FUNCTIONS.iter().filter_map(|function| {
            let id = match kvm_is_module {
                true => kvm.module_function_id(function),
                false => kvm.kernel_function_id(function),
            };
            Some((*function, id?))
        });
        Ok(Self {
            isa,
            cast,
            functions: functions.collect(),
            kvm_is_module,
            known,
            hooks_sched_out: scheduled_out == ABSENT,
            tells_nested_entry,
        })
    }
}
