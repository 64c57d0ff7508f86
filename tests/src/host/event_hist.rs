// SPDX-License-Identifier: GPL-2.0

//! The kernel's own counts of KVM's trace events, keyed by any of their fields. The detail oracle is
//! built from these histograms.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    path::Path,
};

use anyhow::{bail, ensure, Context as _, Result};

const EVENTS: &str = "/sys/kernel/tracing/events/kvm";

/// Number of events by the values of their keys.
pub type Counts = BTreeMap<Vec<u64>, u64>;

/// A histogram on a tracepoint, which counts until it is dropped.
#[derive(Debug)]
pub struct EventHist {
    event: &'static str,
    keys: &'static [&'static str],
}

impl EventHist {
    /// Begin to count a KVM event by some of its fields, from 0. No guest may run. One event can have
    /// several histograms with different keys.
    pub fn begin(event: &'static str, keys: &'static [&'static str]) -> Result<Self> {
        super::hist::mount()?;
        let hist = Self { event, keys };
        let trigger = hist.file("trigger");
        // The keys include the CPU, for the reason given at `hist::KEYS`.
        append(&trigger, &hist.words())
            .with_context(|| format!("{trigger} does not take a histogram"))?;
        ensure!(
            hist.read()?.is_empty(),
            "the histogram of {event} begins with events"
        );
        Ok(hist)
    }

    fn file(&self, name: &str) -> String {
        format!("{EVENTS}/{}/{name}", self.event)
    }

    fn words(&self) -> String {
        format!("hist:keys=common_cpu,{}:size=8192", self.keys.join(","))
    }

    /// Read the counts so far.
    pub fn read(&self) -> Result<Counts> {
        let file = self.file("hist");
        let text = fs::read_to_string(&file).with_context(|| format!("{file} cannot be read"))?;
        let own = section(&text, self.keys);
        parse(
            own.with_context(|| format!("{file} has no histogram by {:?}", self.keys))?,
            self.keys,
        )
    }
}

impl Drop for EventHist {
    fn drop(&mut self) {
        if let Err(error) = append(&self.file("trigger"), &format!("!{}", self.words())) {
            eprintln!("The histogram of {} cannot be removed: {error}", self.event);
        }
    }
}

/// Append to a trigger file. Opening it with O_TRUNC, as [`fs::write`] does, would remove the triggers
/// that are set (`event_trigger_regex_open()`).
fn append(path: &str, words: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(words.as_bytes())
}

/// Remove all histograms of KVM's events, such as a killed case leaves.
pub fn remove_all() -> Result<()> {
    if !Path::new(EVENTS).is_dir() {
        return Ok(());
    }
    for event in fs::read_dir(EVENTS)? {
        let trigger = event?.path().join("trigger");
        let armed = fs::read_to_string(&trigger).unwrap_or_default();
        if armed.contains("hist:") {
            fs::write(&trigger, "").with_context(|| format!("{trigger:?} keeps its histogram"))?;
        }
    }
    Ok(())
}

/// Find the histogram keyed by CPU and `keys` among all histograms of an event.
fn section<'a>(text: &'a str, keys: &[&str]) -> Option<&'a str> {
    // Linux 7.3 writes the name of that field twice (print_hist_trigger()).
    let own = format!("common_cpu,{}:", keys.join(","));
    let mut sections = text.split("# event histogram\n");
    sections.find(|section| section.contains(&own))
}

/// Parse the text of a histogram keyed by CPU and `keys`, and sum over the CPUs.
pub(super) fn parse(text: &str, keys: &[&str]) -> Result<Counts> {
    let mut counts = Counts::new();
    let (mut hits, mut dropped) = (None, None);
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') || line == "Totals:" {
            continue;
        }
        let number = |text: &str| {
            text.trim()
                .parse::<u64>()
                .with_context(|| format!("'{line}' of a histogram has no number"))
        };
        if let Some(entry) = line.strip_prefix("{ ") {
            let (fields, hits) = entry
                .split_once("} hitcount:")
                .with_context(|| format!("'{line}' is no entry of a histogram"))?;
            ensure!(
                fields.split(',').count() == keys.len() + 1,
                "'{line}' has other keys than {keys:?}"
            );
            let mut values = Vec::new();
            for (field, key) in fields.split(',').zip(["common_cpu"].iter().chain(keys)) {
                let (name, value) = field.split_once(':').unwrap_or_default();
                ensure!(name.trim() == *key, "'{line}' has no {key}");
                values.push(number(value)?);
            }
            values.remove(0);
            *counts.entry(values).or_insert(0) += number(hits)?;
        } else if let Some(text) = line.strip_prefix("Hits:") {
            hits = Some(number(text)?);
        } else if let Some(text) = line.strip_prefix("Dropped:") {
            dropped = Some(number(text)?);
        } else if !line.starts_with("Entries:") {
            bail!("a histogram holds an unknown line: '{line}'");
        }
    }
    ensure!(
        dropped == Some(0),
        "the histogram dropped events: {dropped:?}"
    );
    ensure!(
        hits == Some(counts.values().sum()),
        "the histogram's total, {hits:?}, is not the sum of its entries"
    );
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A histogram as read on the emulated AMD host.
    const SAVED: &str = "\
# event histogram
#
# trigger info: hist:keys=common_cpu,port,rw:vals=hitcount:sort=hitcount:size=8192 [active]
#

{ common_cpu:          0, port:        244, rw:          1 } hitcount:          1
{ common_cpu:          1, port:       1008, rw:          1 } hitcount:        150
{ common_cpu:          0, port:       1008, rw:          1 } hitcount:         50

Totals:
    Hits: 201
    Entries: 3
    Dropped: 0
";

    #[test]
    fn parse_reads_the_kernels_text() -> Result<()> {
        let expected = Counts::from([(vec![244, 1], 1), (vec![1008, 1], 200)]);
        assert_eq!(parse(SAVED, &["port", "rw"])?, expected);
        let both = SAVED
            .replace("port,rw", "port")
            .replace(", rw:          1", "")
            + "\n\n"
            + SAVED;
        let own = |keys| parse(section(&both, keys).context("its section")?, keys);
        assert_eq!(own(&["port", "rw"])?, expected);
        assert_eq!(own(&["port"])?.get(&vec![1008]), Some(&200));
        assert!(own(&["rw"]).is_err());
        assert!(parse(SAVED, &["port"]).is_err());
        assert!(parse(&SAVED.replace("Hits: 201", "Hits: 202"), &["port", "rw"]).is_err());
        assert!(parse(&SAVED.replace("Dropped: 0", "Dropped: 1"), &["port", "rw"]).is_err());
        Ok(())
    }
}
