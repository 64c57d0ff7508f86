// SPDX-License-Identifier: GPL-2.0

//! Simulates hosts that play recordings.

use std::{
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use exitmeter::{
    export::{
        exposition::{Exposition, Format},
        label,
        metrics::{self, Scrape},
        server::Site,
        sums::Sums,
    },
    names::{NameBook, NameLine, VmNames},
};

use crate::recording::{plus, times, Recording};

/// Offset in the recording from one host to the next.
const HOST_OFFSET: Duration = Duration::from_millis(1700);

/// Simulated hosts.
#[derive(Debug)]
pub struct Hosts {
    /// Recordings. The hosts take them in turn.
    pub recordings: Vec<Recording>,
    /// Number of hosts.
    pub count: usize,
    /// VMs of a host for each VM of its recording.
    pub copies: u64,
    /// Speed, as a multiple of that of the recording.
    pub speed: f64,
    /// Number of times that a host plays its recording before it stops; `None` is forever.
    pub rounds: Option<fn(&Recording) -> u64>,
    /// Start, by the monotonic clock.
    pub begun: Instant,
    /// Start, as time since 1970.
    pub since: Duration,
}

impl Hosts {
    /// Create hosts that start to play now.
    pub fn new(recordings: Vec<Recording>, count: usize, copies: u64, speed: f64) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            recordings,
            count,
            copies,
            speed,
            rounds: None,
            begun: Instant::now(),
            since: since.unwrap_or_default(),
        }
    }

    /// Return the recording of a host.
    pub fn recording(&self, host: usize) -> &Recording {
        &self.recordings[host % self.recordings.len()]
    }

    /// Return the label `instance` of a host.
    pub fn instance(&self, host: usize) -> String {
        format!("host-{host}")
    }

    /// Return true if the meter of a host cannot be read, which is so for the last host.
    pub fn is_gone(&self, host: usize) -> bool {
        host + 1 == self.count
    }

    /// Return the sums of a host at this moment. Each VM of the recording stands for several. When the recording starts again, so do
    /// the VMs, while the sums of the host continue.
    fn sums(&self, host: usize) -> Sums {
        let recording = self.recording(host);
        let offset = HOST_OFFSET * u32::try_from(host).unwrap_or(0);
        let played = (self.begun.elapsed() + offset)
            .mul_f64(self.speed)
            .as_secs_f64();
        let length = recording.length().as_secs_f64();
        let (mut rounds, mut at) = ((played / length) as u64, played % length);
        if let Some(most) = self
            .rounds
            .map(|of| of(recording))
            .filter(|most| rounds >= *most)
        {
            (rounds, at) = (most - 1, length);
        }
        let now = recording.at(Duration::from_secs_f64(at));
        let mut sums = now.clone();
        let before = times(&recording.end().all, rounds);
        sums.all = times(&plus(before, &now.all), self.copies);
        sums.vms = (0..self.copies)
            .flat_map(|copy| {
                let vms = now.vms.iter();
                vms.map(move |(number, vm)| (copy << 16 | number, vm.clone()))
            })
            .collect();
        sums
    }

    fn metrics(&self, host: usize, format: Format) -> String {
        let mut to = Exposition::new(format);
        if self.is_gone(host) {
            metrics::write_up(&mut to, false);
            return to.done();
        }
        let sums = self.sums(host);
        let mut names = NameBook::default();
        names.look_up(&sums.running());
        for number in sums.vms.keys() {
            let given = VmNames {
                name: Some(format!("vm-{}-{}", number & 0xffff, number >> 16)),
                uuid: Some(format!("00000000-0000-4000-8000-{host:04x}{number:08x}")),
                manager: Some("fleet".to_owned()),
                ..VmNames::default()
            };
            let life = sums.head.life;
            names.add(NameLine {
                life,
                vm: *number,
                given,
            });
        }
        let labels = label::labels(&sums, &names);
        let scrape = Scrape {
            sums: &sums,
            labels: &labels,
            names: &names,
            details: None,
            meter_start: self.since,
            read_time: Duration::ZERO,
            created: false,
        };
        metrics::write(&mut to, &scrape);
        to.done()
    }
}

impl Site for Hosts {
    fn content(&self, path: &str, format: Format) -> Option<(&'static str, String)> {
        let host = path.strip_prefix("/host/")?.strip_suffix("/metrics")?;
        let host: usize = host.parse().ok().filter(|host| *host < self.count)?;
        Some((format.content_type(), self.metrics(host, format)))
    }
}

/// Return the paths of the study's recordings of Linux guests, of both emulated hosts.
pub fn recording_paths() -> impl Iterator<Item = PathBuf> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/study"));
    ["smp", "pc", "microvm", "cloud"]
        .into_iter()
        .flat_map(move |guest| {
            let folder = folder.clone();
            ["intel", "amd"].map(|host| folder.join(format!("{host}-{guest}-nested.rec")))
        })
}
