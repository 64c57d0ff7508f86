// SPDX-License-Identifier: GPL-2.0

//! What /proc says of a process.

use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::time::{clock_gettime, ClockId};

use super::{command, unit, Given};

/// Bytes that are read of a command line. What a VM is called stands near its beginning; one with many
/// devices has some ten thousand.
const LONGEST: u64 = 256 << 10;

/// Bytes that are read of any other file.
const LONG: u64 = 64 << 10;

/// The inode of the host's own PID namespace (`PROC_PID_INIT_INO` in the kernel's
/// include/linux/proc_ns.h), as its link in /proc reads.
const OF_THE_HOST: &str = "pid:[4026531836]";

/// Ticks of a second in /proc/PID/stat (`USER_HZ`, 100 on x86).
const USER_HZ: u64 = 100;

/// Processes, by their numbers as KVM notes them: those of the host's own PID namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processes {
    root: PathBuf,
    /// The time since boot, for tests.
    now: Option<Duration>,
}

impl Processes {
    /// Make those of this host. `None` where /proc has others, as in a container with PIDs of its
    /// own: what is 1234 to KVM is another process there, or none.
    pub fn of_this_host() -> Option<Self> {
        Self::in_folder(Path::new("/proc"))
    }

    /// Make those of a folder that is as /proc.
    pub fn in_folder(root: &Path) -> Option<Self> {
        let namespace = |of: &str| fs::read_link(root.join(of).join("ns/pid")).ok();
        let own = namespace("self");
        // Without a link, the kernel has no PID namespaces.
        let is_hosts = own.is_none_or(|own| own == Path::new(OF_THE_HOST))
            // The host's /proc in a container.
            || namespace("1").is_some_and(|first| first == Path::new(OF_THE_HOST));
        is_hosts.then(|| Self {
            root: root.to_owned(),
            now: None,
        })
    }

    /// Take this for the time since boot.
    pub fn at(self, now: Duration) -> Self {
        Self {
            now: Some(now),
            ..self
        }
    }

    /// Return what a process says about its VM, which it has had for so long.
    ///
    /// `None` if there is no such process, or it is another one that has got the number since: it
    /// began after its VM did.
    pub fn given(&self, pid: u32, age: Option<Duration>) -> Option<Given> {
        let begun = self.begun(pid)?;
        if age.is_some_and(|age| self.is_too_young(begun, age)) {
            return None;
        }
        let line = self.read(pid, "cmdline", LONGEST).unwrap_or_default();
        let mut words: Vec<_> = line.split(|byte| *byte == 0).collect();
        // Behind the last NUL there is nothing, or a word that was cut off.
        if words.len() > 1 {
            words.pop();
        }
        // A kernel thread has no command line, and neither has a zombie.
        let mut given = command::read(if line.is_empty() { &[] } else { &words });
        unit::add(
            &mut given,
            &self.read(pid, "cgroup", LONG).unwrap_or_default(),
        );
        given.inner_pids = self.inner_pids(pid);
        // It may have been replaced meanwhile.
        (self.begun(pid) == Some(begun)).then_some(given)
    }

    /// Return true if a process is younger than a VM of that age. The TSC and the clock of the
    /// kernel part by less than a hundredth; two seconds more, since both ages are of a moment ago.
    fn is_too_young(&self, begun: Duration, age: Duration) -> bool {
        let now = self.now.unwrap_or_else(|| {
            let now = clock_gettime(ClockId::Boottime);
            Duration::new(
                u64::try_from(now.tv_sec).unwrap_or(0),
                u32::try_from(now.tv_nsec).unwrap_or(0),
            )
        });
        let slack = age / 100 + Duration::from_secs(2);
        now.saturating_sub(begun).saturating_add(slack) < age
    }

    /// Return when a process began, since boot (proc_pid_stat(5), field 22).
    fn begun(&self, pid: u32) -> Option<Duration> {
        let stat = self.read(pid, "stat", LONG)?;
        // The name in front may hold whatever it likes, but no ')' follows it.
        let end = stat.iter().rposition(|byte| *byte == b')')?;
        let fields = String::from_utf8_lossy(stat.get(end + 1..)?).into_owned();
        let ticks: u64 = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
        let millis = ticks.saturating_mul(1000 / USER_HZ);
        Some(Duration::from_millis(millis))
    }

    /// Return a process's numbers in the PID namespaces that it is in below that of /proc
    /// (`NSpid`, proc_pid_status(5)).
    fn inner_pids(&self, pid: u32) -> Vec<u32> {
        let status = self.read(pid, "status", LONG).unwrap_or_default();
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
