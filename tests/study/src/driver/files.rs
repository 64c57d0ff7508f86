// SPDX-License-Identifier: GPL-2.0

//! Collects the files that a host needs for a run.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context as _, Result};
use lab::{
    host::Host,
    image::payload::FileSpec,
    programs,
    setup::{self, in_root, Setup, SetupOptions},
};

use crate::plan::{GuestKind, Run};

/// Modules: the guest's drivers of disk and network, and the host's driver of a tap.
const MODULES: [&str; 11] = [
    "virtio",
    "virtio_ring",
    "virtio_mmio",
    "virtio_pci",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "tun",
];

/// QEMU with PCI, and the firmware that it loads into the guest. Its libraries come besides.
const QEMU: &str = "usr/bin/qemu-system-x86_64";
const QEMU_FILES: [&str; 3] = [
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/vgabios-stdvga.bin",
    "usr/share/qemu/efi-virtio.rom",
];

/// Files and kernel of a run.
pub struct Files {
    /// Files, with their paths here and in the host.
    pub specs: Vec<FileSpec>,
    /// Kernel of host and guest; `None` is the newest of Debian's usual ones.
    pub kernel: Option<String>,
}

impl Files {
    /// Collect the files, and build or fetch what is missing.
    pub fn get(run: Run) -> Result<Self> {
        let this = env::current_exe().context("cannot find the path of this program")?;
        let mut specs = vec![FileSpec::at(this, "/usr/local/bin/study")];
        if run.guest == GuestKind::Loops {
            return Ok(Self {
                specs,
                kernel: None,
            });
        }
        let kernel = match run.guest {
            GuestKind::Cloud => Some(cloud_kernel()?),
            _ => None,
        };
        let prepared = setup::prepare(&SetupOptions {
            kernel: kernel.clone(),
            tree: true,
            bochs: run.host == Host::Intel,
            ..SetupOptions::default()
        })?;
        specs.push(FileSpec::at(
            programs::program("study", "work")?,
            "/usr/local/bin/work",
        ));
        specs.push(FileSpec::at(modules(&prepared)?, "/root/modules"));
        if run.guest == GuestKind::Pc {
            specs.extend(qemu(&prepared)?);
            let kernel = prepared.kernel.join("vmlinuz");
            specs.push(FileSpec::at(kernel, "/root/vmlinuz"));
        }
        Ok(Self { specs, kernel })
    }
}

/// Return the release of Debian's cloud kernel with the same version as its newest usual one.
fn cloud_kernel() -> Result<String> {
    let usual = setup::prepare(&SetupOptions::default())?;
    let version = usual.release.strip_suffix("-amd64");
    let version = version.with_context(|| format!("{} is no kernel for amd64", usual.release))?;
    Ok(format!("{version}-cloud-amd64"))
}

/// Unpack the kernel's modules and return their folder. The package is the one that the set-up fetched, or is fetched anew.
fn modules(prepared: &Setup) -> Result<PathBuf> {
    const SCRIPT: &str = r#"
        cd /tmp
        deb=$(ls /downloads/linux-modules-"$RELEASE"_*.deb /downloads/linux-image-"$RELEASE"_*.deb 2>/dev/null | head -n 1)
        if [ -z "$deb" ]; then
          apt-get update && { apt-get download linux-modules-"$RELEASE" || apt-get download linux-image-"$RELEASE"; }
          deb=$(ls /tmp/*.deb)
        fi
        patterns=()
        for name in $NAMES; do patterns+=("./*/$name.ko*"); done
        mkdir unpacked
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C unpacked --wildcards "${patterns[@]}" 2>/dev/null || true
        find unpacked -name '*.ko*' -exec cp -t /out {} +
        find /out -name '*.xz' -exec xz --decompress {} +
        [ -e /out/virtio_net.ko ] && [ -e /out/tun.ko ]"#;
    let folder = setup::repository()
        .join("build/study")
        .join(&prepared.release);
    if folder.join("tun.ko").is_file() {
        return Ok(folder);
    }
    let part = folder.with_extension("part");
    let _ = fs::remove_dir_all(&part);
    let downloads = setup::cache()?.join("downloads/kernel");
    for path in [&part, &downloads] {
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let output = in_root(&prepared.root)
        .bind(&downloads, "/downloads")
        .bind(&part, "/out")
        .command("env")
        .arg(format!("RELEASE={}", prepared.release))
        .arg(format!("NAMES={}", MODULES.join(" ")))
        .args(["bash", "-euc", SCRIPT])
        .output()?;
    ensure!(
        output.status.success(),
        "cannot get the modules of {}: {}{}",
        prepared.release,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let _ = fs::remove_dir_all(&folder);
    fs::rename(&part, &folder)?;
    Ok(folder)
}

/// Return QEMU, its libraries and its firmware, with the same paths as in the root.
fn qemu(prepared: &Setup) -> Result<Vec<FileSpec>> {
    let output = in_root(&prepared.root)
        .command("ldd")
        .arg(Path::new("/").join(QEMU))
        .output()?;
    ensure!(
        output.status.success(),
        "ldd cannot list the libraries of {QEMU}"
    );
    let text = String::from_utf8(output.stdout)?;
    let libraries = text.lines().filter_map(|line| {
        let path = line.split_once("=> /")?.1.split_whitespace().next()?;
        // The root has /lib as a link to usr/lib.
        Some(match path.starts_with("usr/") {
            true => path.to_owned(),
            false => format!("usr/{path}"),
        })
    });
    let files = libraries
        .chain([QEMU.to_owned()])
        .chain(QEMU_FILES.map(str::to_owned));
    Ok(files
        .map(|path| FileSpec::at(prepared.root.join(&path), format!("/{path}")))
        .collect())
}
