// SPDX-License-Identifier: GPL-2.0

//! Part of the initramfs that is the same for all runs with one kernel and root.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use lab_agent::{cpio::Archive, settings};

use super::{cache, elf, ImageError};
use crate::setup::{in_root, Setup};

/// Programs of the host beside busybox: the guest's VMM, and the tool that shows CPUID leaves.
const HOST_PROGRAMS: &[&str] = &["usr/bin/qemu-system-x86_64-microvm", "usr/bin/cpuid"];

/// Firmware that the VMM loads into a guest before its kernel.
const HOST_FILES: &[&str] = &[
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/kvmvapic.bin",
];

/// Modules of the host's kernel and of the guests' kernel, without their dependencies.
const MODULES: &[&str] = &["kvm-intel", "kvm-amd"];

/// Path in the host of the modules of the guests' kernel, for a guest that runs L2 guests.
const GUEST_MODULES: &str = "lab/guest/modules";

/// Programs of a guest beside busybox.
const GUEST_PROGRAMS: &[&str] = &["usr/bin/cpuid"];

/// Modules in a guest's initramfs: the drivers of /dev/cpu/*/cpuid and /dev/cpu/*/msr, by which its kernel executes CPUID
/// and RDMSR.
const GUEST_INITRAMFS_MODULES: &[&str] = &["cpuid", "msr"];

/// Folder of the root's libraries.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Usual folders and their permissions. Files go to usr, as in the root.
const FOLDERS: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("lab", 0o755),
    ("out", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/lib", 0o755),
    ("usr/lib64", 0o755),
    ("usr/local", 0o755),
    ("usr/local/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var", 0o755),
];

/// Links to folders, as in the root.
const LINKS: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("sbin", "usr/sbin"),
];

/// Files with their text.
const TEXTS: &[(&str, &str)] = &[
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/group", "root:x:0:\nkvm:x:104:\n"),
    ("etc/profile", "PS1='lab:\\w# '\n"),
];

/// Return true if the archive has this folder, or a link to one.
pub(super) fn has_folder(path: &str) -> bool {
    FOLDERS.iter().any(|(folder, _)| *folder == path) || LINKS.iter().any(|(link, _)| *link == path)
}

/// Return the path of the image, which is made if it is missing.
pub fn make(prepared: &Setup) -> Result<PathBuf, ImageError> {
    let parts = [
        // The image depends on this file, which makes it.
        include_str!("base.rs").as_bytes(),
        prepared.kernel_key.as_bytes(),
        prepared.root.as_os_str().as_bytes(),
    ];
    cache::get("base", &parts, |target| {
        let mut base = Contents::common();
        base.busybox(prepared)?;
        for program in HOST_PROGRAMS {
            base.program(&prepared.root, program)?;
        }
        for file in HOST_FILES {
            base.copy(file, &prepared.root.join(file));
        }
        base.modules(&prepared.modules(), MODULES)?;
        base.copy(settings::GUEST_KERNEL, &prepared.guest_kernel);
        let folder = base.modules(&prepared.guest_modules, MODULES)?;
        base.entries
            .insert(GUEST_MODULES.to_owned(), Entry::Link(format!("/{folder}")));

        let mut guest = Contents::common();
        guest.busybox(prepared)?;
        for program in GUEST_PROGRAMS {
            guest.program(&prepared.root, program)?;
        }
        guest.modules(&prepared.guest_modules, GUEST_INITRAMFS_MODULES)?;
        base.entries.insert(
            settings::GUEST_INITRAMFS.trim_start_matches('/').to_owned(),
            Entry::Bytes(
                guest
                    .write(Vec::new())
                    .map_err(ImageError::io("write", target))?,
            ),
        );
        let file = File::create(target).map_err(ImageError::io("write", target))?;
        base.write(BufWriter::new(file))
            .map_err(ImageError::io("write", target))?;
        Ok(())
    })
}

/// Contents of an archive, by path.
struct Contents {
    entries: BTreeMap<String, Entry>,
}

enum Entry {
    Folder(u32),
    Link(String),
    Bytes(Vec<u8>),
    Copy(PathBuf),
}

impl Contents {
    fn common() -> Self {
        let mut entries = BTreeMap::new();
        for &(path, permissions) in FOLDERS {
            entries.insert(path.to_owned(), Entry::Folder(permissions));
        }
        for &(path, to) in LINKS {
            entries.insert(path.to_owned(), Entry::Link(to.to_owned()));
        }
        for &(path, text) in TEXTS {
            entries.insert(path.to_owned(), Entry::Bytes(text.into()));
        }
        Self { entries }
    }

    /// Add a file of this machine and its parent folders.
    fn copy(&mut self, path: &str, source: &Path) {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            self.entries
                .entry(path[..at].to_owned())
                .or_insert(Entry::Folder(0o755));
        }
        self.entries
            .insert(path.to_owned(), Entry::Copy(source.to_owned()));
    }

    /// Add busybox under the names of all its commands.
    fn busybox(&mut self, prepared: &Setup) -> Result<(), ImageError> {
        const BUSYBOX: &str = "usr/bin/busybox";
        let path = prepared.root.join(BUSYBOX);
        let list = in_root(&prepared.root)
            .command("busybox")
            .arg("--list")
            .output()
            .map_err(ImageError::io("run", &path))?;
        let names = String::from_utf8_lossy(&list.stdout);
        if !list.status.success() || !names.lines().any(|name| name == "sh") {
            return Err(ImageError::content(&path, "it does not run, or has no sh"));
        }
        for name in names.lines().filter(|&name| name != "busybox") {
            self.entries
                .insert(format!("usr/bin/{name}"), Entry::Link("busybox".to_owned()));
        }
        self.copy(BUSYBOX, &path);
        Ok(())
    }

    /// Add a program of the root, with all its libraries and their loader.
    fn program(&mut self, root: &Path, path: &str) -> Result<(), ImageError> {
        let mut left = vec![path.to_owned()];
        let mut seen = BTreeSet::new();
        while let Some(path) = left.pop() {
            if !seen.insert(path.clone()) {
                continue;
            }
            let source = root.join(&path);
            let bytes = fs::read(&source).map_err(ImageError::io("read", &source))?;
            let needs = elf::needs(&source, &bytes)?;
            self.copy(&path, &source);
            left.extend(needs.libraries.iter().map(|name| match name.as_str() {
                // The loader is listed as a library, but has a place of its own.
                "ld-linux-x86-64.so.2" => "usr/lib64/ld-linux-x86-64.so.2".to_owned(),
                name => format!("{LIBRARIES}/{name}"),
            }));
            left.extend(
                needs
                    .loader
                    .map(|loader| format!("usr/{}", loader.trim_start_matches('/'))),
            );
        }
        Ok(())
    }

    /// Add modules of a kernel's folder with their dependencies, and a modules.dep that lists only these. Return their
    /// folder in the archive.
    fn modules(&mut self, folder: &Path, names: &[&str]) -> Result<String, ImageError> {
        let release = folder.file_name().unwrap_or_default().to_string_lossy();
        let list = folder.join("modules.dep");
        let text = fs::read_to_string(&list).map_err(ImageError::io("read", &list))?;
        let lines: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .collect();
        let named = |name: &str| {
            lines
                .keys()
                .copied()
                .find(|path| path.ends_with(&format!("/{name}.ko")))
                .ok_or_else(|| ImageError::content(&list, format!("it has no module {name}")))
        };
        let mut wanted = BTreeSet::new();
        for name in names {
            let path = named(name)?;
            wanted.insert(path);
            wanted.extend(lines[path].split_whitespace());
        }
        let target = format!("usr/lib/modules/{release}");
        let mut kept = String::new();
        for path in wanted {
            self.copy(&format!("{target}/{path}"), &folder.join(path));
            let needs = lines.get(path).copied().unwrap_or_default();
            kept.push_str(&format!("{path}:{needs}\n"));
        }
        self.entries
            .insert(format!("{target}/modules.dep"), Entry::Bytes(kept.into()));
        Ok(target)
    }

    /// Write the archive. A folder precedes its entries, since a path sorts after its own prefix.
    fn write<W: Write>(&self, target: W) -> io::Result<W> {
        let mut archive = Archive::new(target);
        for (path, entry) in &self.entries {
            match entry {
                Entry::Folder(permissions) => archive.folder(path, *permissions)?,
                Entry::Link(to) => archive.link(path, to)?,
                Entry::Bytes(bytes) => archive.bytes(path, 0o644, bytes)?,
                Entry::Copy(source) => {
                    let file = File::open(source).map_err(|error| {
                        io::Error::new(error.kind(), format!("{}: {error}", source.display()))
                    })?;
                    let facts = file.metadata()?;
                    let permissions = std::os::unix::fs::MetadataExt::mode(&facts) & 0o777;
                    archive.file(path, permissions, facts.len(), file)?;
                }
            }
        }
        archive.finish(4096, 0)
    }
}
