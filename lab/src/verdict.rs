// SPDX-License-Identifier: GPL-2.0

//! Verdict on a run, from the host's console, its kernel log, its messages, and its silence.
//!
//! The code is pure: bytes, messages and times go in, an [`RunEnd`] comes out.

use std::{fmt, time::Duration};

use lab_agent::channel::Message;

/// Longest pause in the output that follows a fault. A run with a fault ends after such a pause, so that the host can
/// report more about it.
const SETTLE_PAUSE: Duration = Duration::from_millis(1500);

/// Longest time from a fault to the end of its run.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// Facility of the kernel's own records in its log. Others come from programs that write to /dev/kmsg.
const KERNEL_FACILITY: u32 = 0;

/// Fault that the kernel found in itself. Later ones are worse.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Fault {
    /// A WARN.
    Warning,
    /// A stuck CPU or task: soft or hard lockup, RCU stall, hung task.
    Lockup,
    /// An oops or another BUG.
    Oops,
    /// A panic.
    Panic,
}

/// End of a run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RunEnd {
    /// The script ended with this status, or 128 + N for signal N.
    Script(u32),
    /// The host could not do what it was started for, for this reason.
    Failure(String),
    /// The host's kernel found a fault in itself.
    Fault(Fault),
    /// The emulator died, or was killed.
    EmulatorDied,
    /// The host said nothing for too long.
    Silence(Duration),
    /// The run took too long.
    TimeLimit(Duration),
    /// The host ended or its messages were damaged, as the text says, so that there is no reliable verdict.
    NoVerdict(String),
    /// The user interrupted the run.
    Interrupted,
}

impl RunEnd {
    /// Return the exit status of `cargo lab run`.
    pub fn status(&self) -> u8 {
        match self {
            // CAST: at most 99.
            Self::Script(status) => (*status).min(99) as u8,
            Self::Failure(_) => 100,
            Self::Fault(Fault::Panic) => 101,
            Self::Fault(Fault::Oops) => 102,
            Self::Fault(Fault::Warning) => 103,
            Self::Fault(Fault::Lockup) => 104,
            Self::EmulatorDied => 105,
            Self::Silence(_) => 106,
            Self::TimeLimit(_) => 107,
            Self::NoVerdict(_) => 108,
            Self::Interrupted => 130,
        }
    }
}

impl fmt::Display for RunEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Script(status) => write!(f, "the script ended with status {status}"),
            Self::Failure(text) => write!(f, "the host could not start: {text}"),
            Self::Fault(Fault::Panic) => f.write_str("the host's kernel panicked"),
            Self::Fault(Fault::Oops) => f.write_str("the host's kernel reported a BUG or an oops"),
            Self::Fault(Fault::Warning) => {
                f.write_str("the host's kernel warned of a fault (WARN)")
            }
            Self::Fault(Fault::Lockup) => f.write_str("a CPU or task of the host is stuck"),
            Self::EmulatorDied => f.write_str("the emulator died"),
            Self::Silence(limit) => {
                write!(
                    f,
                    "the host said nothing for {} s (--silence)",
                    limit.as_secs()
                )
            }
            Self::TimeLimit(limit) => {
                write!(
                    f,
                    "the run took longer than {} s (--timeout)",
                    limit.as_secs()
                )
            }
            Self::NoVerdict(text) => write!(f, "the run has no verdict: {text}"),
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

/// Time limits of a run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Longest duration of the run.
    pub time: Duration,
    /// Longest time without a byte on the console or a message.
    pub silence: Duration,
}

/// Watcher of one run. All times are since its start.
#[derive(Debug)]
pub struct Watch {
    limits: Limits,
    last_sign: Duration,
    /// The console's last line, which has not ended yet.
    line: Vec<u8>,
    /// Judge of the console's lines.
    console: Judge,
    /// Judge of the kernel log's lines.
    log: Judge,
    fault: Option<(Fault, Duration)>,
    failure: Option<String>,
    verdict: Option<u32>,
    damage: Option<String>,
    /// Set when the emulator is gone: true if it ended by itself with status 0.
    gone: Option<bool>,
}

impl Watch {
    /// Start to watch a run.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            last_sign: Duration::ZERO,
            line: Vec::new(),
            console: Judge::default(),
            log: Judge::default(),
            fault: None,
            failure: None,
            verdict: None,
            damage: None,
            gone: None,
        }
    }

    /// Take bytes of the console.
    pub fn console(&mut self, now: Duration, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.last_sign = now;
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                let fault = self.console.fault_in(&String::from_utf8_lossy(&line));
                self.add_fault(now, fault);
            } else {
                self.line.push(byte);
            }
        }
    }

    /// Take a message of the host.
    pub fn message(&mut self, now: Duration, message: &Message) {
        self.last_sign = now;
        match message {
            Message::Kernel(record) => {
                if let Some(record) = KernelRecord::parse(record) {
                    if record.facility == KERNEL_FACILITY {
                        let fault = self.log.fault_in(&record.text);
                        self.add_fault(now, fault);
                    }
                }
            }
            Message::Verdict(status) => match self.verdict {
                Some(_) => self.damage("it gave two verdicts"),
                None => self.verdict = Some(*status),
            },
            Message::Failure(text) => self.failure = Some(text.clone()),
            _ => {}
        }
    }

    /// Note that a message was lost or garbled.
    pub fn damage(&mut self, text: &str) {
        self.damage.get_or_insert_with(|| text.to_owned());
    }

    /// Note that the emulator is gone. `success` is true if it ended by itself with status 0.
    pub fn gone(&mut self, success: bool) {
        self.gone = Some(success);
    }

    /// Return the end of the run, if it has ended.
    pub fn end(&self, now: Duration) -> Option<RunEnd> {
        let decided = self.verdict.is_some() || self.failure.is_some() || self.gone.is_some();
        if let Some((fault, since)) = self.fault() {
            let quiet = now.saturating_sub(self.last_sign) >= SETTLE_PAUSE;
            if decided || quiet || now.saturating_sub(since) >= SETTLE_LIMIT {
                return Some(RunEnd::Fault(fault));
            }
            return None;
        }
        if let Some(text) = &self.failure {
            return Some(RunEnd::Failure(text.clone()));
        }
        if let Some(status) = self.verdict {
            return Some(match &self.damage {
                None => RunEnd::Script(status),
                Some(damage) => RunEnd::NoVerdict(format!("its messages are damaged ({damage})")),
            });
        }
        match self.gone {
            Some(true) => {
                return Some(RunEnd::NoVerdict(
                    "the host ended before the script".to_owned(),
                ))
            }
            Some(false) => return Some(RunEnd::EmulatorDied),
            None => {}
        }
        if now >= self.limits.time {
            return Some(RunEnd::TimeLimit(self.limits.time));
        }
        if now.saturating_sub(self.last_sign) >= self.limits.silence {
            return Some(RunEnd::Silence(self.limits.silence));
        }
        None
    }

    /// Return the worst fault so far, and the time of the first one.
    fn fault(&self) -> Option<(Fault, Duration)> {
        // A panic may be the console's last output, without an end of line.
        let unfinished = String::from_utf8_lossy(&self.line);
        let unfinished = self.console.clone().fault_in(&unfinished);
        match (self.fault, unfinished) {
            (Some((fault, since)), Some(unfinished)) => Some((fault.max(unfinished), since)),
            (None, Some(unfinished)) => Some((unfinished, self.last_sign)),
            (known, None) => known,
        }
    }

    fn add_fault(&mut self, now: Duration, fault: Option<Fault>) {
        self.fault = match (self.fault, fault) {
            (Some((known, since)), Some(fault)) => Some((fault.max(known), since)),
            (None, Some(fault)) => Some((fault, now)),
            (known, None) => known,
        };
    }
}

/// Judge of the lines of one source, in order.
#[derive(Clone, Debug, Default)]
struct Judge {
    /// True if a report of a data race has begun and not ended.
    race: bool,
}

impl Judge {
    /// Return the fault that a line reports. A data race (KCSAN) only counts if one of our modules is on its stacks: the
    /// kernel has races of its own, which are not what a run looks for.
    fn fault_in(&mut self, line: &str) -> Option<Fault> {
        let title = line.contains("BUG: KCSAN:");
        self.race |= title;
        let ours = self.race && OUR_MODULES.iter().any(|name| line.contains(name));
        if line.contains("Reported by Kernel Concurrency Sanitizer") {
            self.race = false;
        }
        match title || ours {
            true => ours.then_some(Fault::Oops),
            false => fault_in(line),
        }
    }
}

/// Names, as the kernel prints them behind functions, of our modules: the meter, and the module with faults.
const OUR_MODULES: [&str; 2] = ["[exitmeter]", "[fault]"];

/// Return the fault that a line of the kernel reports, if any. The line may be garbled around the words.
pub fn fault_in(line: &str) -> Option<Fault> {
    let any = |words: &[&str]| words.iter().any(|word| line.contains(word));
    if any(LOCKUPS) {
        Some(Fault::Lockup)
    } else if line.contains("Kernel panic - not syncing") {
        Some(Fault::Panic)
    } else if any(OOPSES) {
        Some(Fault::Oops)
    } else if line.contains("WARNING: ") && (any(LOCKDEP) || any(WARN_PLACES)) || any(CHECKERS) {
        Some(Fault::Warning)
    } else {
        None
    }
}

/// Reports of stuck CPUs and tasks.
const LOCKUPS: &[&str] = &[
    "soft lockup",
    "softlockup: hung tasks",
    "LOCKUP",
    "workqueue lockup",
    "detected stall",
    "self-detected stall",
    "RCU Stall",
    "blocked for more than",
    "hung_task: blocked tasks",
    "kthread starved for",
];

/// Reports of oopses and other BUGs.
const OOPSES: &[&str] = &[
    "Oops:",
    "Oops -",
    "BUG: ",
    "kernel BUG at",
    "Internal error:",
    "general protection fault",
    "double fault:",
    "stack guard page was hit",
    "UBSAN:",
    "refcount_t:",
    "unable to handle page fault",
    "unable to handle kernel",
];

/// Words that tell a WARN from other lines with "WARNING: ": the CPU, as kernels up to 6.17 print it, and later ones.
const WARN_PLACES: &[&str] = &[" CPU: ", ", CPU#"];

/// Reports of lockdep (kernel/locking/lockdep.c).
const LOCKDEP: &[&str] = &[
    "possible circular locking",
    "possible recursive locking",
    "possible irq lock inversion",
    "lock order detected",
    "inconsistent lock state",
    "bad unlock balance",
    "bad contention",
    "held lock freed",
    "still has locks held",
    "lock held when returning",
    "Nested lock was not taken",
    "chain_key collision",
    "suspicious RCU usage",
];

/// Reports of the kernel's other checkers. A checker that gives up counts as a fault, since it can find none any more.
const CHECKERS: &[&str] = &[
    "new suspected memory leaks",
    "memory leak detector disabled",
    "trying to register non-static key",
    "turning off the locking correctness validator",
];

/// Record of /dev/kmsg.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KernelRecord {
    /// Facility of the writer; 0 is the kernel.
    pub facility: u32,
    /// Log level, from 0 (most urgent) to 7.
    pub level: u32,
    /// Time since the host's start, in microseconds.
    pub time: u64,
    /// Text, without the dictionary that follows it.
    pub text: String,
}

impl KernelRecord {
    /// Parse a record. Return `None` if it is malformed.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let record = String::from_utf8_lossy(bytes);
        let (head, text) = record.split_once(';')?;
        let mut fields = head.split(',');
        let priority: u32 = fields.next()?.parse().ok()?;
        let time = fields.nth(1)?.parse().ok()?;
        let text = text.split_once('\n').map_or(text, |(text, _)| text);
        Some(Self {
            facility: priority >> 3,
            level: priority & 7,
            time,
            text: unescape(text),
        })
    }
}

/// Decode the escapes \xNN, which stand for all bytes that are not plain ASCII and for line ends in a record.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let escaped = || {
            let digits = std::str::from_utf8(behind.strip_prefix(b"x")?.get(..2)?).ok()?;
            u8::from_str_radix(digits, 16).ok()
        };
        match (first, escaped()) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &behind[3..];
            }
            _ => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl fmt::Display for KernelRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, micros) = (self.time / 1_000_000, self.time % 1_000_000);
        for line in self.text.split('\n') {
            writeln!(f, "[{seconds:5}.{micros:06}] {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
