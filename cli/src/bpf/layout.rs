// SPDX-License-Identifier: GPL-2.0

//! Where this kernel's KVM keeps what the programs read, by the kernel's own types (BTF).
//!
//! KVM's structures are types of its modules, which no loader of BPF programs relocates by. So the offsets are looked up
//! here, and given to the programs as constants.

use std::{fs, path::Path};

use exitmeter_meter::{btf::Types, reasons::Isa};

use super::Error;

/// The types of a kernel that adds none: KVM is built into it.
const NOTHING: [u8; 24] = {
    let mut header = [0; 24];
    // Magic, version 1, size of the header.
    [header[0], header[1], header[2], header[4]] = [0x9f, 0xeb, 1, 24];
    header
};

/// In place of an offset: there is no such field.
const ABSENT: u32 = u32::MAX;

/// What the programs are told of VMX alone.
const OF_VMX: [&str; 6] = [
    "vmx_exit_reason",
    "vmx_qualification",
    "qualification_bit",
    "vmx_interruption",
    "interruption_bit",
    "vcpu_available",
];

/// What they are told of SVM alone.
const OF_SVM: [&str; 5] = [
    "svm_vmcb",
    "svm_vmcb01",
    "vmcb_exit_code",
    "vmcb_exit_info_1",
    "vmcb_rip",
];

/// A struct of the kernel's that begins with 64 bits of a number: as such a program reads any number.
const NUMBER: &str = "timespec64";

/// What the programs are told of this kernel, by the names of cli/bpf/known.h.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Whose exits.
    pub isa: Isa,
    /// Name and value.
    pub known: Vec<(&'static str, u32)>,
    /// The id of bpf_rdonly_cast(); 0 before Linux 6.2.
    pub cast: u32,
    /// Functions at whose begin a program can be (fentry), by the ids that kvm's types have of them.
    pub functions: Vec<(&'static str, u32)>,
    /// Whether those are types of a module.
    pub kvm_is_module: bool,
    /// Whether kvm_sched_out() has to be hooked, as the vCPU does not tell that it runs.
    pub hooks_sched_out: bool,
    /// Whether there is a tracepoint before a nested guest runs.
    pub tells_nested_entry: bool,
}

impl Layout {
    /// Look all of it up in `/sys/kernel/btf`.
    ///
    /// # Errors
    ///
    /// [`Error::NoKvm`], [`Error::NoTypes`] and [`Error::Unknown`].
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
        // What is built in has its types in the kernel's.
        let module = |name| match Path::new("/sys/module")
            .join(name)
            .join("initstate")
            .exists()
        {
            true => read(name),
            false => Ok(NOTHING.to_vec()),
        };
        Self::of(isa, &kernel, &module("kvm")?, &module(vendor)?)
    }

    /// Look all of it up in the types of the kernel, of kvm and of the vendor's module.
    ///
    /// # Errors
    ///
    /// [`Error::NoTypes`] and [`Error::Unknown`].
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

        let of_vmx = |member: &str| {
            // In struct vcpu_vt since Linux 6.16, together with trust domains.
            let (vt, inner) = (
                vendor.offset_of("vcpu_vmx", "vt"),
                vendor.offset_of("vcpu_vt", member),
            );
            match vt.zip(inner) {
                Some((vt, inner)) => Ok(vt.wrapping_add(inner)),
                None => offset("vcpu_vmx", member),
            }
        };
        // Renamed in Linux 7.3. Without it no detail is taken from what KVM has read.
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
                ("vmx_exit_reason", of_vmx("exit_reason")?),
                ("vmx_qualification", of_vmx("exit_qualification")?),
                ("qualification_bit", bit("EXIT_INFO_1")),
                ("vmx_interruption", of_vmx("exit_intr_info")?),
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
            Isa::Vmx => &OF_SVM,
            Isa::Svm => &OF_VMX,
        };
        known.extend(others.iter().map(|name| (*name, ABSENT)));
        let kvm_is_module = kvm_bytes.len() > NOTHING.len();
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
