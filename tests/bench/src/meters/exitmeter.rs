// SPDX-License-Identifier: GPL-2.0

//! Runs exitmeter itself: the module, or its BPF programs.

use std::{fs, process::Command};

use anyhow::{ensure, Context as _, Result};
use exitmeter::bpf::attach::{Attached, VCPUS};
use exitmeter_meter::reader::Snapshot;

use super::{CountedExits, Meter, RunningMeter, PARTS_FOLDER};

/// The loaded module.
pub struct Loaded {
    counts: bool,
}

impl Loaded {
    /// Load the module with these parameters.
    pub fn new(parameters: &[&str]) -> Result<Self> {
        insmod("/root/exitmeter.ko", parameters)?;
        Ok(Self { counts: true })
    }

    /// Load a build that contains a single part, without the redirect of CPUID.
    pub fn part(meter: Meter) -> Result<Self> {
        let part = meter.part().context("not a part of exitmeter")?;
        insmod(&format!("{PARTS_FOLDER}/{part}.ko"), &["leaf_map=0"])?;
        Ok(Self {
            counts: meter == Meter::OnlyCounts,
        })
    }
}

fn insmod(path: &str, parameters: &[&str]) -> Result<()> {
    let insmod = Command::new("insmod")
        .arg(path)
        .args(parameters)
        .status()
        .context("cannot run insmod")?;
    ensure!(insmod.success(), "cannot load {path}; see the kernel log");
    Ok(())
}

impl RunningMeter for Loaded {
    fn stop(self: Box<Self>) -> Result<CountedExits> {
        let bytes = fs::read("/dev/exitmeter").context("cannot read /dev/exitmeter")?;
        let exits = exits(&bytes)?;
        let rmmod = Command::new("rmmod").arg("exitmeter").status()?;
        ensure!(rmmod.success(), "cannot unload exitmeter");
        Ok(CountedExits {
            exits: self.counts.then_some(exits),
            remark: None,
        })
    }
}

/// Return the exits of the departed vCPUs in a snapshot. Fails if a vCPU ran unmetered.
fn exits(bytes: &[u8]) -> Result<u64> {
    let snapshot = Snapshot::parse(bytes)?;
    ensure!(
        snapshot.unmetered() == 0,
        "{} vCPUs ran unmetered",
        snapshot.unmetered()
    );
    Ok(snapshot.totals().map(|row| row.exits()).sum())
}

/// The attached BPF programs.
pub struct ByBpf(Attached);

impl ByBpf {
    /// Attach the programs.
    pub fn new() -> Result<Self> {
        Ok(Self(Attached::new(VCPUS, false)?))
    }
}

impl RunningMeter for ByBpf {
    fn stop(self: Box<Self>) -> Result<CountedExits> {
        Ok(CountedExits {
            exits: Some(exits(&self.0.maps().snapshot(true)?)?),
            remark: None,
        })
    }
}
