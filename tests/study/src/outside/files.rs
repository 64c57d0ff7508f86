// SPDX-License-Identifier: GPL-2.0

//! What a host gets for a run.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context as _, Result};
use lab::{
    host::Host,
    image::payload::FileSpec,
    programs,
    setup::{self, in_root, Prepared, Wanted},
};

use crate::plan::{Guest, Run};

/// The guest's drivers of disk and network, and the host's own of a tap.
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

/// QEMU with PCI, beside its libraries: what it loads into the guest.
const QEMU: &str = "usr/bin/qemu-system-x86_64";
const QEMU_FILES: [&str; 3] = [
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/vgabios-stdvga.bin",
    "usr/share/qemu/efi-virtio.rom",
];

/// The files of a run.
pub struct Files {
    /// Where they are, and where the host has them.
    pub specs: Vec<FileSpec>,
    /// Which kernel host and guest have; the newest of Debian's usual ones when `None`.
    pub kernel: Option<String>,
}

impl Files {
    /// Makes what is missing.
    pub fn get(run: Run) -> Result<Self> {
        let this = env::current_exe().context("the path of this program is not known")?;
        let mut specs = vec![FileSpec::at(this, "/usr/local/bin/study")];
        if run.guest == Guest::Loops {
            return Ok(Self {
                specs,
                kernel: None,
            });
        }
        let kernel = match run.guest {
            Guest::Cloud => Some(cloud_kernel()?),
            _ => None,
        };
        let prepared = setup::prepare(&Wanted {
            kernel: kernel.clone(),
            tree: true,
            bochs: run.host == Host::Intel,
            ..Wanted::default()
        })?;
        specs.push(FileSpec::at(
            programs::program("study", "work")?,
            "/usr/local/bin/work",
        ));
        specs.push(FileSpec::at(modules(&prepared)?, "/root/modules"));
        if run.guest == Guest::Pc {
            specs.extend(qemu(&prepared)?);
            let kernel = prepared.kernel.join("vmlinuz");
            specs.push(FileSpec::at(kernel, "/root/vmlinuz"));
        }
        Ok(Self { specs, kernel })
    }
}

/// Debian's kernel for clouds, of the same version as its newest usual one.
fn cloud_kernel() -> Result<String> {
    let usual = setup::prepare(&Wanted::default())?;
    let version = usual.release.strip_suffix("-amd64");
    let version = version.with_context(|| format!("{} is no kernel for amd64", usual.release))?;
    Ok(format!("{version}-cloud-amd64"))
}

/// The kernel's modules, out of the package that the set-up fetched, or fetched anew.
fn modules(prepared: &Prepared) -> Result<PathBuf> {
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
        "the modules of {} cannot be had: {}{}",
        prepared.release,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let _ = fs::remove_dir_all(&folder);
    fs::rename(&part, &folder)?;
    Ok(folder)
}

/// QEMU and its libraries, each where the root has it.
fn qemu(prepared: &Prepared) -> Result<Vec<FileSpec>> {
    let output = in_root(&prepared.root)
        .command("ldd")
        .arg(Path::new("/").join(QEMU))
        .output()?;
    ensure!(
        output.status.success(),
        "the libraries of {QEMU} are not known"
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
