// SPDX-License-Identifier: GPL-2.0

//! The inside: in the emulated host, a guest from its boot to its end, recorded.

mod guest;
mod network;
mod tape;

use std::{path::Path, process::ExitCode, thread, time::Duration};

use anyhow::{Context as _, Result};
use exitmeter::record;
use lab_agent::settings;
use system_tests::host::module;
use tiny_guests::{Config, Machine, Mode, Program};

use self::{guest::Guest, tape::Tape};
use crate::{
    plan::{Guest as Kind, Run},
    vmm::{self, Lines},
};

/// From one snapshot to the next, on hosts whose TSC counts instructions, and on those where it is the wall clock.
const INTERVAL: Duration = Duration::from_millis(20);
const WALL_INTERVAL: Duration = Duration::from_millis(200);

/// How long a guest is left alone.
const IDLE: Duration = Duration::from_secs(1);

/// Drivers of disk and network, in the order in which they stand on each other. Those that the kernel has built in are
/// not there.
const DRIVERS: &str =
    "for name in virtio virtio_ring virtio_mmio virtio_pci_legacy_dev virtio_pci_modern_dev \
                       virtio_pci virtio_blk failover net_failover virtio_net; do \
                       [ ! -e $name.ko ] || insmod $name.ko || exit 1; done";

/// How often a loop goes around its instruction.
pub const LOOPS: u32 = 2000;

/// The VMM of the guest "tiny": a process of its own, as the others are.
pub fn vmm(initramfs: &Path) -> Result<ExitCode> {
    let lines = Lines {
        commands: guest::SOCKET,
        console: guest::CONSOLE,
    };
    vmm::run(Path::new(settings::GUEST_KERNEL), initramfs, &lines)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes a run.
pub fn run(run: Run) -> Result<ExitCode> {
    module::load("log_queries=0")?;
    let mut about = record::about_host();
    about.push(("run", run.to_string()));
    let path = format!("/out/{run}.rec");
    if matches!(run.guest, Kind::Microvm | Kind::Pc) {
        network::begin()?;
    }
    let interval = match run.counts_instructions() {
        true => INTERVAL,
        false => WALL_INTERVAL,
    };
    let tape = Tape::begin(Path::new(&path), interval, about)?;
    match run.guest {
        Kind::Loops => loops(&tape)?,
        kind => linux(kind, &tape)?,
    }
    tape.end()?;
    Ok(ExitCode::SUCCESS)
}

/// Linux: its boot, some work, a reboot.
fn linux(kind: Kind, tape: &Tape) -> Result<()> {
    tape.mark("boot")?;
    let mut guest = Guest::boot(kind, kind == Kind::Pc).context("the guest does not boot")?;
    tape.mark("idle")?;
    thread::sleep(IDLE);
    match kind {
        Kind::Smp => work(&mut guest, tape, &["ipi", "wake"])?,
        _ => work(
            &mut guest,
            tape,
            &["compute", "timers", "processes", "memory", "console"],
        )?,
    }
    if kind == Kind::Pc {
        with_devices(&mut guest, tape)?;
    }
    tape.mark("reboot")?;
    guest.reboot()?;
    tape.mark("stop")?;
    drop(guest);
    if kind == Kind::Microvm {
        // One of its own: with a disk, this machine's firmware does not come back from a reset.
        tape.mark("boot 2")?;
        let mut guest = Guest::boot(kind, true).context("the guest with devices does not boot")?;
        with_devices(&mut guest, tape)?;
        tape.mark("stop 2")?;
    }
    Ok(())
}

/// Has the guest do some work, with a mark at each.
fn work(guest: &mut Guest, tape: &Tape, names: &[&str]) -> Result<()> {
    for name in names {
        tape.mark(name)?;
        guest.run(&format!("./work {name}"))?;
    }
    Ok(())
}

/// Has it use its disk and its network.
fn with_devices(guest: &mut Guest, tape: &Tape) -> Result<()> {
    tape.mark("drivers")?;
    guest.run(&format!("{DRIVERS}; {}", network::GUEST))?;
    work(guest, tape, &["write", "read", "ping", "stream"])
}

/// Loops around one instruction each.
fn loops(tape: &Tape) -> Result<()> {
    use Program::*;
    for program in [
        Cpuid, OutUser, InKernel, OutEventfd, Rdmsr, Wrmsr, CrWrite, Hypercall, Wbinvd, Touch,
    ] {
        let mut machine = Machine::new(Config::new(program, Mode::Long, LOOPS))?;
        tape.mark(&format!("{program:?}"))?;
        machine.run()?;
    }
    Ok(())
}
