// SPDX-License-Identifier: GPL-2.0

//! Names of a VM in the command line of its VMM.
//!
//! Sources of the formats: QEMU's manual (`-name`, `-uuid`, `-smbios`), libvirt
//! (src/qemu/qemu_command.c), Proxmox (qemu-server's PVE/QemuServer.pm: `-id`), Firecracker
//! (docs/api_requests and the jailer's docs: `--id`, `--api-sock`) and Cloud Hypervisor
//! (docs/api.md: `--api-socket`, docs of `--platform uuid=`).

use super::{words::clean, VmNames};

/// A known VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Qemu,
    Firecracker,
    CloudHypervisor,
}

/// QEMU options without an argument (qemu-options.hx), including those of old versions. All other
/// options take the next word, whatever it looks like.
const FLAGS: [&str; 46] = [
    "S",
    "alt-grab",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kvm",
    "no-kvm-irqchip",
    "no-kvm-pit",
    "no-kvm-pit-reinjection",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "old-param",
    "only-migratable",
    "portrait",
    "preconfig",
    "rtc-td-hack",
    "s",
    "sdl",
    "semihosting",
    "show-cursor",
    "singlestep",
    "snapshot",
    "tdf",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-create",
    "xen-domid-restrict",
    "nouserconfig",
];

/// Read a command line. `words` begins with the program.
pub fn read(words: &[&[u8]]) -> VmNames {
    let Some((program, arguments)) = words.split_first() else {
        return VmNames::default();
    };
    match vmm_of(program) {
        Some(Program::Qemu) => qemu(arguments),
        Some(Program::Firecracker) => firecracker(arguments),
        Some(Program::CloudHypervisor) => cloud_hypervisor(arguments),
        None => VmNames::default(),
    }
}

/// Return the VMM of a program, by its file name.
fn vmm_of(program: &[u8]) -> Option<Program> {
    let name = program.rsplit(|byte| *byte == b'/').next()?;
    // NixOS renames programs that it wraps: .qemu-system-x86_64-wrapped.
    let name = name.strip_prefix(b".").unwrap_or(name);
    if name == b"kvm" || name.starts_with(b"qemu") {
        Some(Program::Qemu)
    } else if name.starts_with(b"firecracker") {
        Some(Program::Firecracker)
    } else if name.starts_with(b"cloud-hypervisor") {
        Some(Program::CloudHypervisor)
    } else {
        None
    }
}

fn qemu(arguments: &[&[u8]]) -> VmNames {
    let (mut name, mut uuid, mut id, mut hardware) = (None, None, None, Vec::new());
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let option = word.strip_prefix(b"-");
        let option = option.map(|option| option.strip_prefix(b"-").unwrap_or(option));
        let Some(option) = option.filter(|option| !option.is_empty()) else {
            continue;
        };
        if FLAGS.iter().any(|flag| flag.as_bytes() == option) {
            continue;
        }
        let Some(value) = words.next() else {
            break;
        };
        // If an option is given twice, the last one counts.
        match option {
            b"name" => name = find(&parameters(value, b"guest"), b"guest").or(name),
            b"uuid" => uuid = uuid_of(value).or(uuid),
            // Only Proxmox's QEMU has this option.
            b"id" => id = non_empty(value),
            b"smbios" => {
                let fields = parameters(value, b"type");
                if find(&fields, b"type").as_deref() == Some(b"1") {
                    hardware.extend(fields);
                }
            }
            _ => {}
        }
    }
    let says = |key: &[u8], beginning: &[u8]| {
        find(&hardware, key).is_some_and(|value| value.starts_with(beginning))
    };
    let has = |text: &[u8]| arguments.iter().any(|word| contains(word, text));
    let name = name.as_deref();
    let is_libvirt = has(b"masterKey0") || has(b"charmonitor") || has(b"/libvirt/qemu/");
    let manager = if says(b"manufacturer", b"KubeVirt") || has(b"/kubevirt-private/") {
        "kubevirt"
    } else if says(b"product", b"OpenStack") || is_libvirt && name.is_some_and(is_instance) {
        "openstack"
    } else if id.is_some() || has(b"/run/qemu-server/") {
        "proxmox"
    } else if name.is_some_and(|name| name.starts_with(b"sandbox-"))
        && (has(b"/run/vc/") || has(b"/kata"))
    {
        "kata"
    } else if has(b"/incus/") {
        "incus"
    } else if has(b"/lxd/") {
        "lxd"
    } else if is_libvirt {
        "libvirt"
    } else {
        "qemu"
    };
    VmNames {
        name: name.and_then(non_empty),
        uuid: uuid.or_else(|| uuid_of(&find(&hardware, b"uuid")?)),
        manager: Some(manager.to_owned()),
        id,
        ..VmNames::default()
    }
}

/// Return true if the name matches the default of Nova's setting `instance_name_template`.
fn is_instance(name: &[u8]) -> bool {
    name.strip_prefix(b"instance-")
        .is_some_and(|number| number.len() == 8 && number.iter().all(u8::is_ascii_hexdigit))
}

fn firecracker(arguments: &[&[u8]]) -> VmNames {
    let id = long_option(arguments, b"id");
    let socket = long_option(arguments, b"api-sock");
    let called = id.or_else(|| socket.and_then(stem));
    VmNames {
        name: called.and_then(non_empty),
        manager: Some("firecracker".to_owned()),
        id: id.or(socket).and_then(non_empty),
        ..VmNames::default()
    }
}

fn cloud_hypervisor(arguments: &[&[u8]]) -> VmNames {
    let socket = long_option(arguments, b"api-socket");
    // The value is `path=PATH` or `fd=FD`, in old versions only PATH.
    let socket = socket.and_then(|value| match value.strip_prefix(b"path=") {
        Some(path) => path.split(|byte| *byte == b',').next(),
        None => Some(value).filter(|value| !value.starts_with(b"fd=")),
    });
    let platform = long_option(arguments, b"platform").unwrap_or_default();
    let platform = parameters(platform, b"");
    let kata =
        socket.is_some_and(|socket| contains(socket, b"/run/vc/") || contains(socket, b"/kata/"));
    VmNames {
        name: socket.and_then(stem).and_then(non_empty),
        uuid: find(&platform, b"uuid").and_then(|uuid| uuid_of(&uuid)),
        manager: Some(if kata { "kata" } else { "cloud-hypervisor" }.to_owned()),
        id: socket.and_then(non_empty),
        ..VmNames::default()
    }
}

/// Return the value of an option `--NAME VALUE` or `--NAME=VALUE`.
fn long_option<'a>(arguments: &[&'a [u8]], name: &[u8]) -> Option<&'a [u8]> {
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let Some(option) = word.strip_prefix(b"--") else {
            continue;
        };
        match option.strip_prefix(name) {
            Some(b"") => return words.next().copied(),
            Some([b'=', value @ ..]) => return Some(value),
            _ => {}
        }
    }
    None
}

/// Return a VM's name from the path of its socket: the file name without its extension, or the
/// folder's name if the file name is the same for all VMs.
fn stem(path: &[u8]) -> Option<&[u8]> {
    const GENERIC: [&[u8]; 9] = [
        b"api",
        b"ch",
        b"ch-api",
        b"clh-api",
        b"cloud-hypervisor",
        b"firecracker",
        b"run",
        b"root",
        b"sock",
    ];
    let parts = path.rsplit(|byte| *byte == b'/');
    parts
        .map(|part| match part.iter().rposition(|byte| *byte == b'.') {
            Some(at @ 1..) => part.get(..at).unwrap_or(part),
            _ => part,
        })
        .find(|part| !part.is_empty() && !GENERIC.contains(part))
}

/// Split QEMU's `key=value,key=value`. A comma in a value is doubled, and a first value without a
/// key gets the implied one (`opts_do_parse()` in QEMU's util/qemu-option.c).
fn parameters(text: &[u8], implied: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut found = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let stop = rest.iter().position(|byte| matches!(byte, b'=' | b','));
        let (key, value) = match stop.and_then(|at| rest.split_at_checked(at)) {
            Some((key, [b'=', value @ ..])) => (key, value),
            _ if found.is_empty() => (implied, rest),
            // A switch that is on.
            Some((key, after)) => (key, after),
            None => (rest, &b""[..]),
        };
        let (value, next) = value_of(value);
        found.push((key.to_vec(), value));
        rest = next;
    }
    found
}

/// Split at the first comma that is not doubled.
fn value_of(text: &[u8]) -> (Vec<u8>, &[u8]) {
    let mut value = Vec::new();
    let mut rest = text;
    loop {
        match rest {
            [b',', b',', next @ ..] => {
                value.push(b',');
                rest = next;
            }
            [b',', next @ ..] => return (value, next),
            [byte, next @ ..] => {
                value.push(*byte);
                rest = next;
            }
            [] => return (value, rest),
        }
    }
}

/// Return the last value of a key.
fn find(fields: &[(Vec<u8>, Vec<u8>)], key: &[u8]) -> Option<Vec<u8>> {
    let mut fields = fields.iter().rev();
    let (_, value) = fields.find(|(one, _)| one == key)?;
    Some(value.clone())
}

/// Return a UUID in lower case, or `None` if `text` is not a UUID.
fn uuid_of(text: &[u8]) -> Option<String> {
    let is_uuid = text.len() == 36
        && text.iter().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    is_uuid.then(|| clean(text).to_ascii_lowercase())
}

/// Return a text, or `None` if it is empty.
fn non_empty(text: &[u8]) -> Option<String> {
    (!text.is_empty()).then(|| clean(text))
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}
