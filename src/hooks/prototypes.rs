// SPDX-License-Identifier: GPL-2.0

//! Check of the tracepoints' prototypes: KVM must call probes of the types that ours have.

use kernel::prelude::*;

use crate::{
    linux::btf::BtfFile,
    meter::btf::{
        Parameter,
        Probe,
        Types,
        Unknown,
        Verdict, //
    },
};

/// Type of the probes of kvm:kvm_exit, such as `on_exit_vmx`.
const EXIT_PROBE: Probe = Probe {
    typedef: "btf_trace_kvm_exit",
    parameters: &[
        Parameter::Pointer,
        Parameter::PointerTo("kvm_vcpu"),
        Parameter::U32,
    ],
};

/// Type of the probe of kvm:kvm_entry, `on_entry`. Its `u8` is KVM's bool, which is one byte.
const ENTRY_PROBE: Probe = Probe {
    typedef: "btf_trace_kvm_entry",
    parameters: &[
        Parameter::Pointer,
        Parameter::PointerTo("kvm_vcpu"),
        Parameter::Bool,
    ],
};

/// Check that KVM's tracepoints call probes of our types, if the kernel has BTF of them.
///
/// KVM stays loaded meanwhile, because this module uses its symbols.
pub(crate) fn check() -> Result {
    // The small file first: most kernels without one of them have neither.
    let files = BtfFile::read(c"/sys/kernel/btf/kvm")
        .and_then(|module| Some((BtfFile::read(c"/sys/kernel/btf/vmlinux")?, module)));
    let Some((kernel, module)) = files else {
        pr_info!("kvm_exit and kvm_entry are taken for what they were when exitmeter was written: this kernel shows no types of kvm (/sys/kernel/btf)\n");
        return Ok(());
    };
    let types = Types::read(kernel.bytes(), module.bytes());
    for (tracepoint, probe) in [("kvm_exit", EXIT_PROBE), ("kvm_entry", ENTRY_PROBE)] {
        let verdict = match &types {
            Ok(types) => types.compare(&probe),
            Err(unknown) => Err(*unknown),
        };
        match verdict {
            Ok(Verdict::Fits) => (),
            Ok(Verdict::Differs(place, found)) => {
                pr_err!(
                    "this kernel's tracepoint kvm:{tracepoint} calls {}, and exitmeter takes {}: they differ in {}\n",
                    Shown(found),
                    Shown(probe),
                    Shown(place)
                );
                return Err(ENOEXEC);
            }
            Err(why) => pr_warn!(
                "{tracepoint} is taken for what it was when exitmeter was written: {}\n",
                match why {
                    Unknown::Damaged => "the types of kvm in /sys/kernel/btf cannot be read",
                    Unknown::Missing => "the types of kvm in /sys/kernel/btf do not hold it",
                }
            ),
        }
    }
    Ok(())
}

/// Formats by the kernel's own trait a value that implements core's.
struct Shown<T>(T);

impl<T: core::fmt::Display> kernel::fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        core::fmt::Display::fmt(&self.0, f)
    }
}
