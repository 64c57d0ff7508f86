// SPDX-License-Identifier: GPL-2.0

//! Runs a guest in the emulated host, from its boot to its end, and records it.

mod guest;
mod network;
mod recorder;

use std::{path::Path, process::ExitCode, thread, time::Duration};

use anyhow::{Context as _, Result};
use exitmeter::record;
use lab_agent::settings;
use system_tests::host::module;
use tiny_guests::{Config, Mode, Program, TinyVm};

use self::{guest::Guest, recorder::Recorder};
use crate::{
    plan::{GuestKind, Run},
    vmm::{self, SerialPorts},
};

/// Intervals of the snapshots, on hosts whose TSC counts instructions and on hosts whose TSC is the wall clock.
const INTERVAL: Duration = Duration::from_millis(20);
const WALL_INTERVAL: Duration = Duration::from_millis(200);

/// Time for which a guest is left idle.
const IDLE: Duration = Duration::from_secs(1);

/// Command of the guest that loads the drivers of disk and network, in the order of their dependencies. Drivers that are
/// built into the kernel have no file.
const DRIVERS: &str =
    "for name in virtio virtio_ring virtio_mmio virtio_pci_legacy_dev virtio_pci_modern_dev \
                       virtio_pci virtio_blk failover net_failover virtio_net; do \
                       [ ! -e $name.ko ] || insmod $name.ko || exit 1; done";

/// Iterations of a loop.
pub const LOOPS: u32 = 2000;

/// Run the VMM of the guest "tiny". It is a process of its own, as the other VMMs are.
pub fn vmm(initramfs: &Path) -> Result<ExitCode> {
    let ports = SerialPorts {
        commands: guest::SOCKET,
        console: guest::CONSOLE,
    };
    vmm::run(Path::new(settings::GUEST_KERNEL), initramfs, &ports)?;
    Ok(ExitCode::SUCCESS)
}

/// Make a run.
pub fn run(run: Run) -> Result<ExitCode> {
    module::load("log_queries=0")?;
    let mut about = record::about_host();
    about.push(("run", run.to_string()));
    let path = format!("/out/{run}.rec");
    if matches!(run.guest, GuestKind::Microvm | GuestKind::Pc) {
        network::set_up()?;
    }
    let interval = match run.counts_instructions() {
        true => INTERVAL,
        false => WALL_INTERVAL,
    };
    let recorder = Recorder::begin(Path::new(&path), interval, about)?;
    match run.guest {
        GuestKind::Loops => loops(&recorder)?,
        kind => linux(kind, &recorder)?,
    }
    recorder.end()?;
    Ok(ExitCode::SUCCESS)
}

/// Run Linux: its boot, some work, a reboot.
fn linux(kind: GuestKind, recorder: &Recorder) -> Result<()> {
    recorder.mark("boot")?;
    let mut guest = Guest::boot(kind, kind == GuestKind::Pc).context("the guest does not boot")?;
    recorder.mark("idle")?;
    thread::sleep(IDLE);
    match kind {
        GuestKind::Smp => work(&mut guest, recorder, &["ipi", "wake"])?,
        _ => work(
            &mut guest,
            recorder,
            &["compute", "timers", "processes", "memory", "console"],
        )?,
    }
    if kind == GuestKind::Pc {
        with_devices(&mut guest, recorder)?;
    }
    recorder.mark("reboot")?;
    guest.reboot()?;
    recorder.mark("stop")?;
    drop(guest);
    if kind == GuestKind::Microvm {
        // A second guest: with a disk, this machine's firmware does not come back from a reset.
        recorder.mark("boot 2")?;
        let mut guest = Guest::boot(kind, true).context("the guest with devices does not boot")?;
        with_devices(&mut guest, recorder)?;
        recorder.mark("stop 2")?;
    }
    Ok(())
}

/// Have the guest do pieces of work, with a mark at each.
fn work(guest: &mut Guest, recorder: &Recorder, names: &[&str]) -> Result<()> {
    for name in names {
        recorder.mark(name)?;
        guest.run(&format!("./work {name}"))?;
    }
    Ok(())
}

/// Have the guest use its disk and its network.
fn with_devices(guest: &mut Guest, recorder: &Recorder) -> Result<()> {
    recorder.mark("drivers")?;
    guest.run(&format!("{DRIVERS}; {}", network::GUEST))?;
    work(guest, recorder, &["write", "read", "ping", "stream"])
}

/// Run loops around one instruction each.
fn loops(recorder: &Recorder) -> Result<()> {
    use Program::*;
    for program in [
        Cpuid, OutUser, InKernel, OutEventfd, Rdmsr, Wrmsr, CrWrite, Hypercall, Wbinvd, Touch,
    ] {
        let mut machine = TinyVm::new(Config::new(program, Mode::Long, LOOPS))?;
        recorder.mark(&format!("{program:?}"))?;
        machine.run()?;
    }
    Ok(())
}
