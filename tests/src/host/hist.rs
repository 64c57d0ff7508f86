// SPDX-License-Identifier: GPL-2.0

//! The kernel's own count of VM exits: a histogram on the tracepoint kvm:kvm_exit, by reason. The
//! meter's counts are compared with it.

use std::{collections::BTreeMap, ffi::CStr, fs, path::Path};

use anyhow::{ensure, Context as _, Result};
use exitmeter_meter::reasons::Isa;

use super::{event_hist, vendor};

const TRACING: &CStr = c"/sys/kernel/tracing";
/// File that sets the triggers of the tracepoint.
pub const TRIGGER: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/trigger";
const HIST: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/hist";
/// The histogram's trigger. Its keys include the CPU: when two CPUs insert the same new key at once,
/// the kernel may drop the exits of one while the other is held up, as emulated CPUs are.
const KEYS: &str = "hist:keys=common_cpu,exit_reason:size=4096";

/// Number of exits by the code of their reason.
pub type Exits = BTreeMap<u32, u64>;

/// The histogram of exits, which counts until it is dropped.
#[derive(Debug)]
pub struct Hist(());

impl Hist {
    /// Begin to count, from 0. No guest may run.
    pub fn begin() -> Result<Self> {
        mount()?;
        remove()?;
        fs::write(TRIGGER, KEYS)
            .with_context(|| format!("{TRIGGER} does not take a histogram; is kvm.ko loaded?"))?;
        let hist = Self(());
        ensure!(
            hist.read()?.is_empty(),
            "the histogram begins with exits: a guest is running"
        );
        Ok(hist)
    }

    /// Read the exits so far.
    pub fn read(&self) -> Result<Exits> {
        let text = fs::read_to_string(HIST).with_context(|| format!("{HIST} cannot be read"))?;
        parse(&text, vendor()?)
    }
}

impl Drop for Hist {
    fn drop(&mut self) {
        if let Err(error) = remove() {
            eprintln!("The histogram cannot be removed: {error:#}");
        }
    }
}

/// Remove the histogram, if there is one.
pub fn remove() -> Result<()> {
    let armed = fs::read_to_string(TRIGGER).unwrap_or_default();
    if armed.contains("hist:") {
        fs::write(TRIGGER, format!("!{KEYS}"))
            .with_context(|| format!("{TRIGGER} keeps its histogram"))?;
    }
    Ok(())
}

/// Mount tracefs, unless it is mounted.
pub(super) fn mount() -> Result<()> {
    if Path::new("/sys/kernel/tracing/events").is_dir() {
        return Ok(());
    }
    super::mount(c"tracefs", TRACING)
}

/// Parse the text of a histogram keyed by CPU and exit_reason, and sum over the CPUs. On VMX the basic
/// reason is the low half of the tracepoint's field.
fn parse(text: &str, vendor: Isa) -> Result<Exits> {
    let mut exits = Exits::new();
    for (keys, hits) in event_hist::parse(text, &["exit_reason"])? {
        let reason = keys.first().copied().context("an entry has its key")?;
        let reason = u32::try_from(reason).context("a reason has 32 bits")?;
        let reason = match vendor {
            Isa::Vmx => reason & 0xffff,
            Isa::Svm => reason,
        };
        *exits.entry(reason).or_insert(0) += hits;
    }
    Ok(exits)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A histogram as read on the emulated AMD host.
    const SAVED: &str = "\
# event histogram
#
# trigger info: hist:keys=common_cpu,exit_reason:vals=hitcount:sort=hitcount:size=4096 [active]
#

{ common_cpu:          0, exit_reason:        123 } hitcount:          1
{ common_cpu:          1, exit_reason:         96 } hitcount:          7
{ common_cpu:          0, exit_reason: 4294967295 } hitcount:          2
{ common_cpu:          1, exit_reason:        120 } hitcount:         40
{ common_cpu:          0, exit_reason:        120 } hitcount:         60

Totals:
    Hits: 110
    Entries: 5
    Dropped: 0
";

    #[test]
    fn parse_reads_the_kernels_text() -> Result<()> {
        let svm = parse(SAVED, Isa::Svm)?;
        assert_eq!(
            svm,
            Exits::from([(96, 7), (120, 100), (123, 1), (u32::MAX, 2)])
        );
        // A failed entry has bit 31 set.
        let text = SAVED.replace("4294967295", "2147483681");
        assert_eq!(parse(&text, Isa::Vmx)?.get(&33), Some(&2));
        let empty = "# event histogram\n\nTotals:\n    Hits: 0\n    Entries: 0\n    Dropped: 0\n";
        assert!(parse(empty, Isa::Vmx)?.is_empty());
        Ok(())
    }

    #[test]
    fn parse_refuses_incomplete_text() {
        for (from, to) in [
            ("Hits: 110", "Hits: 111"),
            ("Dropped: 0", "Dropped: 1"),
            ("    Dropped: 0\n", ""),
            ("hitcount:          7", "hitcount:"),
            ("exit_reason:         96 }", "isa:         96 }"),
            ("{ common_cpu:          1,", "{ cpu:          1,"),
        ] {
            assert!(parse(&SAVED.replace(from, to), Isa::Svm).is_err(), "{to}");
        }
        assert!(parse("", Isa::Svm).is_err());
    }
}
