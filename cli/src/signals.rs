// SPDX-License-Identifier: GPL-2.0

//! Signals that would end the tool, delivered as events.

use std::{fs, io, sync::mpsc::Sender, thread};

use signal_hook::iterator::Signals;

/// Return true if `signal` is ignored, as after nohup(1) or in a shell's background job. A tool
/// that installs a handler all the same passes the signal to its child commands with the default
/// action, which ends them.
pub fn is_ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let bit = u32::try_from(signal - 1)
        .ok()
        .and_then(|bit| 1_u64.checked_shl(bit));
    mask.zip(bit).is_some_and(|(mask, bit)| mask & bit != 0)
}

/// Send an event to `to` for each of `signals` that arrives from now on. Signals that are ignored
/// stay ignored.
///
/// # Errors
///
/// Returns an error if no handler can be installed.
pub fn send<E: Send + 'static>(
    signals: &[i32],
    to: Sender<E>,
    event: fn(i32) -> E,
) -> io::Result<()> {
    let signals = signals.iter().filter(|signal| !is_ignored(**signal));
    let mut signals = Signals::new(signals)?;
    thread::spawn(move || {
        // Sending fails once the receiver is gone.
        signals
            .forever()
            .try_for_each(|signal| to.send(event(signal)))
    });
    Ok(())
}
