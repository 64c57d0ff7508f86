//! exitmeter itself.

use std::{fs, process::Command};

use anyhow::{ensure, Context as _, Result};
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
        let snapshot = Snapshot::parse(&bytes)?;
        // The guests are gone: theirs are in the totals.
        let exits = snapshot.totals().map(|row| row.exits()).sum();
        ensure!(
            snapshot.unmetered() == 0,
            "{} vCPUs ran unmetered",
            snapshot.unmetered()
        );
        let rmmod = Command::new("rmmod").arg("exitmeter").status()?;
        ensure!(rmmod.success(), "exitmeter does not unload");
        Ok(Seen {
            exits: self.counts.then_some(exits),
            remark: None,
        })
    }
}
