// SPDX-License-Identifier: GPL-2.0

//! Names of a VM from the /proc files of its process.

use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::time::{clock_gettime, ClockId};

use super::{command, unit, VmNames};

/// Maximum number of bytes read from a command line. Names are near its beginning, and a command
/// line with many devices has about ten thousand bytes.
const CMDLINE_SIZE: u64 = 256 << 10;

/// Maximum number of bytes read from any other file.
const FILE_SIZE: u64 = 64 << 10;

/// Link in /proc to the host's own PID namespace, by its inode (`PROC_PID_INIT_INO` in the kernel's
/// include/linux/proc_ns.h).
pub(crate) const HOST_NAMESPACE: &str = "pid:[4026531836]";

/// Ticks per second in /proc/PID/stat (`USER_HZ`, 100 on x86).
const USER_HZ: u64 = 100;

/// Processes by the ids that KVM uses: those of the host's own PID namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processes {
    root: PathBuf,
    /// Time since boot, set by tests.
    now: Option<Duration>,
}

impl Processes {
    /// Use the processes of this host. Returns `None` if /proc shows another PID namespace, as in a
    /// container: KVM's process 1234 is a different process there, or none.
    pub fn of_this_host() -> Option<Self> {
        Self::in_folder(Path::new("/proc"))
    }

    /// Use a folder in the format of /proc.
    pub fn in_folder(root: &Path) -> Option<Self> {
        let namespace = |of: &str| fs::read_link(root.join(of).join("ns/pid")).ok();
        let own = namespace("self");
        // A kernel without PID namespaces has no such link.
        let is_hosts = own.is_none_or(|own| own == Path::new(HOST_NAMESPACE))
            // A container may see the host's /proc.
            || namespace("1").is_some_and(|first| first == Path::new(HOST_NAMESPACE));
        is_hosts.then(|| Self {
            root: root.to_owned(),
            now: None,
        })
    }

    /// Use `now` as the time since boot.
    pub fn at(self, now: Duration) -> Self {
        Self {
            now: Some(now),
            ..self
        }
    }

    /// Return the names that a process has for its VM. `age` is the age of the VM.
    ///
    /// Returns `None` if there is no such process, or if it started after its VM did: then another
    /// process got its number.
    pub fn given(&self, pid: u32, age: Option<Duration>) -> Option<VmNames> {
        let start_time = self.start_time(pid)?;
        if age.is_some_and(|age| self.is_too_young(start_time, age)) {
            return None;
        }
        let line = self.read(pid, "cmdline", CMDLINE_SIZE).unwrap_or_default();
        let mut words: Vec<_> = line.split(|byte| *byte == 0).collect();
        // The part behind the last NUL is empty, or a word that was cut off.
        if words.len() > 1 {
            words.pop();
        }
        // Kernel threads and zombies have no command line.
        let mut given = command::read(if line.is_empty() { &[] } else { &words });
        unit::add(
            &mut given,
            &self.read(pid, "cgroup", FILE_SIZE).unwrap_or_default(),
        );
        given.inner_pids = self.inner_pids(pid);
        // The process may have been replaced meanwhile.
        (self.start_time(pid) == Some(start_time)).then_some(given)
    }

    /// Return true if a process is younger than a VM of age `age`. The TSC and the kernel's clock
    /// differ by less than 1%. Allow two more seconds, as both ages were read a moment ago.
    fn is_too_young(&self, start_time: Duration, age: Duration) -> bool {
        let now = self.now.unwrap_or_else(|| {
            let now = clock_gettime(ClockId::Boottime);
            Duration::new(
                u64::try_from(now.tv_sec).unwrap_or(0),
                u32::try_from(now.tv_nsec).unwrap_or(0),
            )
        });
        let slack = age / 100 + Duration::from_secs(2);
        now.saturating_sub(start_time).saturating_add(slack) < age
    }

    /// Return the start time of a process, since boot (proc_pid_stat(5), field 22).
    fn start_time(&self, pid: u32) -> Option<Duration> {
        let stat = self.read(pid, "stat", FILE_SIZE)?;
        // The process name before it may contain anything, but no ')' follows it.
        let end = stat.iter().rposition(|byte| *byte == b')')?;
        let fields = String::from_utf8_lossy(stat.get(end + 1..)?).into_owned();
        let ticks: u64 = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
        let millis = ticks.saturating_mul(1000 / USER_HZ);
        Some(Duration::from_millis(millis))
    }

    /// Return the ids of a process in the PID namespaces below the one of /proc (`NSpid`,
    /// proc_pid_status(5)).
    fn inner_pids(&self, pid: u32) -> Vec<u32> {
        let status = self.read(pid, "status", FILE_SIZE).unwrap_or_default();
        let status = String::from_utf8_lossy(&status);
        let pids = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .unwrap_or_default();
        let pids = pids.split_ascii_whitespace().skip(1);
        pids.filter_map(|pid| pid.parse().ok()).collect()
    }

    fn read(&self, pid: u32, name: &str, most: u64) -> Option<Vec<u8>> {
        let file = File::open(self.root.join(pid.to_string()).join(name)).ok()?;
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }
}
