// SPDX-License-Identifier: GPL-2.0

//! Names of a VM from the systemd unit, or cgroup, of its process.

use super::{words::clean, VmNames};

/// Add the names in the content of /proc/PID/cgroup (cgroups(7)).
pub fn add(given: &mut VmNames, cgroup: &[u8]) {
    let Some(path) = path(cgroup) else {
        return;
    };
    let is_unit = |part: &&[u8]| part.ends_with(b".scope") || part.ends_with(b".service");
    let parts = path.split(|byte| *byte == b'/');
    let unit = parts.clone().rfind(is_unit);
    given.unit = Some(clean(unit.unwrap_or(path)));

    let named = |scope: &[u8]| {
        let name = scope.strip_suffix(b".scope")?;
        Some(unescape(name.strip_prefix(b"machine-")?))
    };
    let machine = parts.clone().find_map(named);
    let machine = machine
        .as_deref()
        .and_then(|name| name.strip_prefix(b"qemu-"));
    // KubeVirt runs each domain in a libvirt of its own, where its id is always 1.
    if let Some(machine) = machine.filter(|_| given.manager.as_deref() != Some("kubevirt")) {
        add_libvirt(given, machine);
    }
    // Proxmox names the scope after the VM's id.
    if given.id.is_none() && given.manager.as_deref() == Some("proxmox") {
        let id = unit.and_then(|unit| unit.strip_suffix(b".scope"));
        let id = id.filter(|id| !id.is_empty() && id.iter().all(u8::is_ascii_digit));
        given.id = id.map(clean);
    }
}

/// Add the names in libvirt's machine name: `ID-NAME`, or `NAME` before version 1.3. libvirt
/// removes all but letters, digits, dots and dashes from the name
/// (`virDomainDriverGenerateMachineName()`).
fn add_libvirt(given: &mut VmNames, machine: &[u8]) {
    let dash = machine.iter().position(|byte| *byte == b'-');
    let (id, name) = match dash.and_then(|at| machine.split_at_checked(at)) {
        Some((id, [_, name @ ..])) if !id.is_empty() && id.iter().all(u8::is_ascii_digit) => {
            (Some(id), name)
        }
        _ => (None, machine),
    };
    if given.id.is_none() {
        given.id = id.map(clean);
    }
    if given.name.is_none() && !name.is_empty() {
        given.name = Some(clean(name));
    }
    if matches!(given.manager.as_deref(), None | Some("qemu")) {
        given.manager = Some("libvirt".to_owned());
    }
}

/// Return the path of the cgroup: of version 2, else of systemd's own hierarchy in version 1, else
/// of any.
fn path(cgroup: &[u8]) -> Option<&[u8]> {
    let lines = cgroup.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.splitn(3, |byte| *byte == b':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        (path.len() > 1).then_some((controllers, path))
    });
    let rank = |controllers: &[u8]| match controllers {
        b"" => 0,
        b"name=systemd" => 1,
        _ => 2,
    };
    let (_, path) = lines.min_by_key(|(controllers, _)| rank(controllers))?;
    Some(path)
}

/// Return a systemd name without its escapes: `\x2d` is a dash (systemd.unit(5), "String Escaping
/// for Inclusion in Unit Names").
pub fn unescape(name: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    loop {
        rest = match rest {
            [b'\\', b'x', high, low, next @ ..] => {
                let byte = digit(*high)
                    .zip(digit(*low))
                    .and_then(|(high, low)| u8::try_from(high << 4 | low).ok());
                match byte {
                    Some(byte) => {
                        plain.push(byte);
                        next
                    }
                    None => {
                        plain.push(b'\\');
                        &rest[1..]
                    }
                }
            }
            [byte, next @ ..] => {
                plain.push(*byte);
                next
            }
            [] => return plain,
        };
    }
}
