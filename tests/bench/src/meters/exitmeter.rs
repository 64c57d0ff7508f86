// SPDX-License-Identifier: GPL-2.0

//! exitmeter itself, and its BPF programs.

use std::{fs, process::Command};

use anyhow::{ensure, Context as _, Result};
use exitmeter::bpf::attach::{Attached, VCPUS};
use exitmeter_meter::reader::Snapshot;

use super::{Meter, Seen, Watch, PARTS_FOLDER};

/// The module, loaded.
pub struct Loaded {
    counts: bool,
}

impl Loaded {
    /// Loads it with these parameters.
    pub fn new(parameters: &[&str]) -> Result<Self> {
        insmod("/root/exitmeter.ko", parameters)?;
        Ok(Self { counts: true })
    }

    /// Loads a build with one part alone, without the redirect of CPUID.
    pub fn part(meter: Meter) -> Result<Self> {
        let part = meter.part().context("it is no part of exitmeter")?;
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
        .context("insmod cannot be run")?;
    ensure!(insmod.success(), "{path} does not load; see the kernel log");
    Ok(())
}

impl Watch for Loaded {
    fn stop(self: Box<Self>) -> Result<Seen> {
        let bytes = fs::read("/dev/exitmeter").context("/dev/exitmeter cannot be read")?;
        let exits = exits(&bytes)?;
        let rmmod = Command::new("rmmod").arg("exitmeter").status()?;
        ensure!(rmmod.success(), "exitmeter does not unload");
        Ok(Seen {
            exits: self.counts.then_some(exits),
            remark: None,
        })
    }
}

/// Return how many exits a snapshot has of the vCPUs that are gone; all have to have been metered.
fn exits(bytes: &[u8]) -> Result<u64> {
    let snapshot = Snapshot::parse(bytes)?;
    ensure!(
        snapshot.unmetered() == 0,
        "{} vCPUs ran unmetered",
        snapshot.unmetered()
    );
    Ok(snapshot.totals().map(|row| row.exits()).sum())
}

/// The BPF programs, attached.
pub struct ByBpf(Attached);

impl ByBpf {
    /// Attaches them.
    pub fn new() -> Result<Self> {
        Ok(Self(Attached::new(VCPUS, false)?))
    }
}

impl Watch for ByBpf {
    fn stop(self: Box<Self>) -> Result<Seen> {
        Ok(Seen {
            exits: Some(exits(&self.0.maps().snapshot(true)?)?),
            remark: None,
        })
    }
}
