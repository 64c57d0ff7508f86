// SPDX-License-Identifier: GPL-2.0

//! Runs the kernel's own tracing: a hist trigger, or events in the ring buffer.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result};

use super::{CountedExits, RunningMeter};

const EVENTS: &str = "/sys/kernel/tracing/events/kvm";
const KEYS: &str = "hist:keys=exit_reason:size=2048";

/// Write a setting of tracefs. Mounts tracefs first where needed.
fn set(path: &str, value: &str) -> Result<()> {
    mount()?;
    fs::write(path, value).with_context(|| format!("cannot write '{value}' to {path}"))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

/// Return the number after `word` at the beginning of a line.
pub fn number_after(text: &str, word: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.trim().strip_prefix(word)?.trim().parse().ok())
}

/// Mount tracefs in its usual place.
pub fn mount() -> Result<()> {
    if Path::new(EVENTS).is_dir() {
        return Ok(());
    }
    // SAFETY: All strings end with a NUL; this file system takes no data.
    let mounted = unsafe {
        libc::mount(
            c"tracefs".as_ptr(),
            c"/sys/kernel/tracing".as_ptr(),
            c"tracefs".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if mounted != 0 {
        return Err(io::Error::last_os_error()).context("cannot mount tracefs");
    }
    Ok(())
}

/// A hist trigger on kvm_exit.
pub struct Hist(());

impl Hist {
    /// Start to count.
    pub fn new() -> Result<Self> {
        set(&format!("{EVENTS}/kvm_exit/trigger"), KEYS)?;
        Ok(Self(()))
    }
}

impl RunningMeter for Hist {
    fn stop(self: Box<Self>) -> Result<CountedExits> {
        let text = read(&format!("{EVENTS}/kvm_exit/hist"))?;
        set(&format!("{EVENTS}/kvm_exit/trigger"), &format!("!{KEYS}"))?;
        let exits = number_after(&text, "Hits:").context("the histogram has no total")?;
        Ok(CountedExits {
            exits: Some(exits),
            remark: None,
        })
    }
}

/// Exits and entries in the ring buffer. The newest overwrite the oldest.
pub struct Ring(());

const TRACED: [&str; 2] = ["kvm_exit", "kvm_entry"];

impl Ring {
    /// Start to trace.
    pub fn new() -> Result<Self> {
        for event in TRACED {
            set(&format!("{EVENTS}/{event}/enable"), "1")?;
        }
        Ok(Self(()))
    }
}

impl RunningMeter for Ring {
    fn stop(self: Box<Self>) -> Result<CountedExits> {
        for event in TRACED {
            set(&format!("{EVENTS}/{event}/enable"), "0")?;
        }
        let mut events = 0;
        for cpu in fs::read_dir("/sys/kernel/tracing/per_cpu")? {
            let stats = read(&cpu?.path().join("stats").to_string_lossy())?;
            for word in ["entries:", "overrun:"] {
                events += number_after(&stats, word).context("a ring buffer has no numbers")?;
            }
        }
        set("/sys/kernel/tracing/trace", "")?;
        Ok(CountedExits {
            // Each exit but the last of a guest is followed by an entry.
            exits: Some(events / 2),
            remark: Some(format!("{events} events")),
        })
    }
}
