//! exitmeter itself.

use std::{fs, process::Command};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reader::Snapshot;

use super::{Seen, Watch};

/// The module, loaded.
pub struct Loaded(());

impl Loaded {
    /// Loads it with these parameters.
    pub fn new(parameters: &[&str]) -> Result<Self> {
        let insmod = Command::new("insmod")
            .arg("/root/exitmeter.ko")
            .args(parameters)
            .status()
            .context("insmod cannot be run")?;
        ensure!(
            insmod.success(),
            "exitmeter.ko does not load; see the kernel log"
        );
        Ok(Self(()))
    }
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
            exits,
            remark: None,
        })
    }
}
