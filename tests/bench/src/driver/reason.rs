// SPDX-License-Identifier: GPL-2.0

//! Finds where KVM keeps the exit reason. No tracepoint passes it and the layouts are private, so a
//! BPF program on the raw tracepoint needs the offsets.

use anyhow::{ensure, Context as _, Result};
use lab::{
    host::Host,
    setup::{in_root, Setup},
};
use serde::{Deserialize, Serialize};

/// Offsets that lead from a vCPU to its exit reason, in bytes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Offsets {
    /// Offset in the vCPU of the pointer to follow, if there is one.
    pub pointer: Option<u32>,
    /// Offset of the reason, in the vCPU or behind the pointer.
    pub reason: u32,
}

/// Find the offsets in the types that the packaged modules carry (BTF).
pub fn find(prepared: &Setup, host: Host) -> Result<Offsets> {
    let (module, types): (_, &[&str]) = match host {
        Host::Intel => ("kvm-intel", &["vcpu_vmx", "vcpu_vt"]),
        Host::Amd => ("kvm-amd", &["vcpu_svm", "vmcb_control_area"]),
    };
    let mut texts = Vec::new();
    for name in types {
        texts.push(structure(prepared, module, name)?);
    }
    match host {
        Host::Intel => Ok(Offsets {
            pointer: None,
            reason: offset(&texts[0], "vt")? + offset(&texts[1], "exit_reason")?,
        }),
        Host::Amd => Ok(Offsets {
            pointer: Some(offset(&texts[0], "vmcb")?),
            // The control area comes first in a VMCB (APM, appendix B).
            reason: offset(&texts[1], "exit_code")?,
        }),
    }
}

/// Return a structure as pahole prints it.
fn structure(prepared: &Setup, module: &str, name: &str) -> Result<String> {
    let folder = format!(
        "modules/lib/modules/{}/kernel/arch/x86/kvm",
        prepared.release
    );
    let output = in_root(&prepared.root)
        .bind(&prepared.kernel, "/kernel")
        .command("sh")
        .args(["-euc", "objcopy -O binary --only-section=.BTF /kernel/vmlinux /tmp/btf && pahole --btf_base /tmp/btf -C \"$1\" \"$2\"", "sh"])
        .args([name, &format!("/kernel/{folder}/{module}.ko")])
        .output()
        .context("cannot run pahole in the root")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success() && text.contains(name),
        "{module} has no type {name}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(text)
}

/// Return the offset of a member, in bytes, from a line `type  name;  /* offset size */`.
fn offset(structure: &str, member: &str) -> Result<u32> {
    let is_it = |line: &&str| {
        let code = line.split(&[';', '['][..]).next().unwrap_or_default();
        let code = code.split("__attribute__").next().unwrap_or_default();
        code.split_whitespace().last() == Some(member) && line.contains("/*")
    };
    structure
        .lines()
        .find(is_it)
        .and_then(|line| {
            line.split_once("/*")?
                .1
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .with_context(|| format!("there is no member {member}; KVM keeps it elsewhere now"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_offsets_in_the_output_of_pahole() {
        let text = "struct vcpu_vmx {\n\
            \tstruct kvm_vcpu            vcpu;                 /*     0  6456 */\n\
            \t/* --- cacheline 101 boundary (6464 bytes) --- */\n\
            \tstruct vcpu_vt             vt __attribute__((__aligned__(64))); /*  6464   128 */\n\
            \tu8                         fail;                 /*  6592     1 */\n};\n";
        assert_eq!(offset(text, "vt").expect("there"), 6464);
        assert_eq!(offset(text, "fail").expect("there"), 6592);
        assert!(offset(text, "exit_reason").is_err());
    }
}
