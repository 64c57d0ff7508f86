// SPDX-License-Identifier: GPL-2.0

//! The kernel's own count of exits: a histogram on the tracepoint kvm:kvm_exit, for one thread
//! only, in a tracefs instance of its own. It touches no other triggers.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use exitmeter_meter::reasons::Isa;

use super::own::Exits;
use crate::names::process::HOST_NAMESPACE;

const TRACING: &str = "/sys/kernel/tracing";
/// Prefix of the instance names; the process id follows.
const PREFIX: &str = "exitmeter-verify-";

/// Reason why there is no histogram.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// tracefs is not mounted.
    #[error("tracefs is not mounted: mount -t tracefs tracefs {TRACING}")]
    NotMounted,
    /// The user may not use tracefs.
    #[error("no right to use tracefs; root has it")]
    NoRight,
    /// There are no events of KVM.
    #[error("tracefs has no event kvm:kvm_exit")]
    NoEvent,
    /// The process has other ids in its namespace than in the kernel's events.
    #[error(
        "this runs in a PID namespace of its own, where thread ids differ from those in tracefs"
    )]
    Namespace,
    /// Another error of tracefs.
    #[error("tracefs: {0}: {1}")]
    Refused(&'static str, io::Error),
    /// The histogram cannot be parsed.
    #[error("the kernel's histogram is damaged: {0}")]
    Damaged(String),
}

/// A histogram that counts until it is dropped.
#[derive(Debug)]
pub struct Hist {
    instance: PathBuf,
    trigger: String,
    isa: Isa,
}

/// Return true if this process is in the host's own PID namespace, so that the kernel's events have its
/// ids.
pub fn is_in_host_pid_namespace() -> bool {
    fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link == Path::new(HOST_NAMESPACE))
}

impl Hist {
    /// Start to count the exits of a thread, from 0.
    ///
    /// # Errors
    ///
    /// Returns any [`Error`].
    pub fn begin(thread: u32, isa: Isa) -> Result<Self, Error> {
        if !is_in_host_pid_namespace() {
            return Err(Error::Namespace);
        }
        let refused = |what| {
            move |error: io::Error| match error.kind() {
                ErrorKind::PermissionDenied => Error::NoRight,
                _ => Error::Refused(what, error),
            }
        };
        match fs::metadata(format!("{TRACING}/instances")) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(Error::NotMounted),
            found => found.map_err(refused("it cannot be accessed"))?,
        };
        match fs::metadata(format!("{TRACING}/events/kvm/kvm_exit")) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(Error::NoEvent),
            found => found.map_err(refused("it cannot be accessed"))?,
        };
        sweep();
        let instance = format!("{TRACING}/instances/{PREFIX}{}", std::process::id());
        fs::create_dir(&instance).map_err(refused("cannot create an instance"))?;
        let hist = Self {
            instance: instance.into(),
            // Also key by CPU: if two CPUs add the same new key at once, the kernel may drop the
            // events of one.
            trigger: format!("hist:keys=common_cpu,exit_reason:size=1024 if common_pid=={thread}"),
            isa,
        };
        fs::write(hist.file("trigger"), &hist.trigger)
            .map_err(refused("it refuses the histogram (CONFIG_HIST_TRIGGERS)"))?;
        Ok(hist)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.instance.join("events/kvm/kvm_exit").join(name)
    }

    /// Return the exits so far.
    ///
    /// # Errors
    ///
    /// Returns an error if the histogram cannot be read, or the kernel has dropped events.
    pub fn read(&self) -> Result<Exits, Error> {
        let text = fs::read_to_string(self.file("hist"))
            .map_err(|error| Error::Refused("the histogram cannot be read", error))?;
        parse(&text, self.isa).map_err(Error::Damaged)
    }
}

impl Drop for Hist {
    fn drop(&mut self) {
        // Removing the instance also removes its triggers (`__remove_instance()`,
        // kernel/trace/trace.c).
        if let Err(error) = fs::remove_dir(&self.instance) {
            eprintln!(
                "exitmeter: {} cannot be removed: {error}; rmdir removes it",
                self.instance.display()
            );
        }
    }
}

/// Remove the instances of processes that were killed.
fn sweep() {
    let entries = fs::read_dir(format!("{TRACING}/instances"));
    for entry in entries.into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        let is_number = process.parse::<u32>().is_ok();
        if is_number && !Path::new("/proc").join(process).exists() {
            // An instance that cannot be removed is not in the way.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Parse a histogram by CPU and reason, and return the sums over all CPUs. On VMX, the basic
/// reason is the low half of the tracepoint's number.
fn parse(text: &str, isa: Isa) -> Result<Exits, String> {
    let mut exits = Exits::new();
    let (mut hits, mut dropped) = (None, None);
    for line in text.lines().map(str::trim) {
        let number = |text: &str| -> Result<u64, String> {
            let number = text.trim().parse();
            number.map_err(|_| format!("'{line}' has no number"))
        };
        if let Some(entry) = line.strip_prefix("{ common_cpu:") {
            let reason = entry.split_once(", exit_reason:");
            let reason = reason.and_then(|(_, rest)| rest.split_once("} hitcount:"));
            let (reason, count) = reason.ok_or_else(|| format!("'{line}' is no entry"))?;
            let reason = u32::try_from(number(reason)?).map_err(|_| format!("'{line}'"))?;
            let reason = match isa {
                Isa::Vmx => reason & 0xffff,
                Isa::Svm => reason,
            };
            *exits.entry(reason).or_insert(0) += number(count)?;
        } else if let Some(text) = line.strip_prefix("Hits:") {
            hits = Some(number(text)?);
        } else if let Some(text) = line.strip_prefix("Dropped:") {
            dropped = Some(number(text)?);
        }
    }
    if dropped != Some(0) {
        return Err(format!("it dropped {dropped:?} events"));
    }
    if hits != Some(exits.values().sum()) {
        return Err(format!("its total {hits:?} is not the sum of its entries"));
    }
    Ok(exits)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Histogram of the emulated AMD host.
    const SAVED: &str = "\
# event histogram
#
# trigger info: hist:keys=common_cpu,exit_reason:vals=hitcount:sort=hitcount:size=1024 if common_pid==99 [active]
#

{ common_cpu:          0, exit_reason:        123 } hitcount:          1
{ common_cpu:          1, exit_reason:        123 } hitcount:          6
{ common_cpu:          0, exit_reason: 4294967295 } hitcount:          2

Totals:
    Hits: 9
    Entries: 3
    Dropped: 0
";

    #[test]
    fn histogram_is_parsed() {
        assert_eq!(
            parse(SAVED, Isa::Svm),
            Ok(Exits::from([(123, 7), (u32::MAX, 2)]))
        );
        // A failed entry has bit 31 set.
        let text = SAVED.replace("4294967295", "2147483681");
        assert_eq!(parse(&text, Isa::Vmx), Ok(Exits::from([(123, 7), (33, 2)])));
    }

    #[test]
    fn incomplete_histogram_is_refused() {
        for (from, to) in [
            ("Hits: 9", "Hits: 10"),
            ("Dropped: 0", "Dropped: 1"),
            ("    Dropped: 0\n", ""),
            ("hitcount:          6", "hitcount:"),
            (
                "exit_reason:        123 } hitcount:          6",
                "isa: 1 } hitcount: 6",
            ),
        ] {
            assert!(parse(&SAVED.replace(from, to), Isa::Svm).is_err(), "{to}");
        }
        assert!(parse("", Isa::Svm).is_err());
    }
}
