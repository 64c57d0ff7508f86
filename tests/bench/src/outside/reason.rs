// SPDX-License-Identifier: GPL-2.0

//! Where KVM keeps the exit reason: no tracepoint passes it, and the layouts are private,
//! so a BPF program on the raw tracepoint has to be told.

use anyhow::{ensure, Context as _, Result};
use lab::{
    host::Host,
    setup::{in_root, Prepared},
};
use serde::{Deserialize, Serialize};

/// The way from a vCPU to its exit reason.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Place {
    /// Where in the vCPU the pointer to follow is, if there is one.
    pub pointer: Option<u32>,
    /// Where the reason is, there or behind the pointer.
    pub reason: u32,
}

/// Finds it in the types that the packaged modules carry (BTF).
pub fn find(prepared: &Prepared, host: Host) -> Result<Place> {
    let (module, types): (_, &[&str]) = match host {
        Host::Intel => ("kvm-intel", &["vcpu_vmx", "vcpu_vt"]),
        Host::Amd => ("kvm-amd", &["vcpu_svm", "vmcb_control_area"]),
    };
    let mut texts = Vec::new();
    for name in types {
        texts.push(structure(prepared, module, name)?);
    }
    match host {
        Host::Intel => Ok(Place {
            pointer: None,
            reason: offset(&texts[0], "vt")? + offset(&texts[1], "exit_reason")?,
        }),
        Host::Amd => Ok(Place {
            pointer: Some(offset(&texts[0], "vmcb")?),
            // The control area is the first of a VMCB (APM, appendix B).
            reason: offset(&texts[1], "exit_code")?,
        }),
    }
}

/// A structure as pahole writes it.
fn structure(prepared: &Prepared, module: &str, name: &str) -> Result<String> {
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
        .context("pahole cannot be run in the root")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success() && text.contains(name),
        "{module} has no type {name}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(text)
}

/// The offset of a member, in bytes: "type  name;  /* offset size */".
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
    fn reads_what_pahole_writes() {
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
