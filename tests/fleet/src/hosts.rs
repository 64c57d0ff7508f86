// SPDX-License-Identifier: GPL-2.0

//! Hosts that play tapes.

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
    names::{Book, Given, Line},
};

use crate::tape::{plus, times, Tape};

/// How much later each host is in its tape than the one before.
const APART: Duration = Duration::from_millis(1700);

/// The hosts.
#[derive(Debug)]
pub struct Hosts {
    /// What they play: one after the other, and again from the first.
    pub tapes: Vec<Tape>,
    /// How many there are.
    pub count: usize,
    /// How many VMs each has for one of its tape.
    pub copies: u64,
    /// How fast they play.
    pub speed: f64,
    /// How often a host plays its tape before it holds still; else on and on.
    pub rounds: Option<fn(&Tape) -> u64>,
    /// When they began.
    pub begun: Instant,
    /// The same by the clock.
    pub since: Duration,
}

impl Hosts {
    /// Make some that begin now.
    pub fn new(tapes: Vec<Tape>, count: usize, copies: u64, speed: f64) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            tapes,
            count,
            copies,
            speed,
            rounds: None,
            begun: Instant::now(),
            since: since.unwrap_or_default(),
        }
    }

    /// Return the tape of a host.
    pub fn tape(&self, host: usize) -> &Tape {
        &self.tapes[host % self.tapes.len()]
    }

    /// Return a host's label `instance`.
    pub fn instance(&self, host: usize) -> String {
        format!("host-{host}")
    }

    /// Return true if a host's meter cannot be read: that of the last one.
    pub fn is_gone(&self, host: usize) -> bool {
        host + 1 == self.count
    }

    /// Return the numbers of a host. A VM of the tape is several. When the tape begins anew so do the VMs, and the
    /// host's sums go on.
    fn sums(&self, host: usize) -> Sums {
        let tape = self.tape(host);
        let apart = APART * u32::try_from(host).unwrap_or(0);
        let played = (self.begun.elapsed() + apart)
            .mul_f64(self.speed)
            .as_secs_f64();
        let length = tape.length().as_secs_f64();
        let (mut rounds, mut at) = ((played / length) as u64, played % length);
        if let Some(most) = self
            .rounds
            .map(|of| of(tape))
            .filter(|most| rounds >= *most)
        {
            (rounds, at) = (most - 1, length);
        }
        let now = tape.at(Duration::from_secs_f64(at));
        let mut sums = now.clone();
        let before = times(&tape.end().all, rounds);
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
        let mut names = Book::default();
        names.look_up(&sums.running());
        for number in sums.vms.keys() {
            let given = Given {
                name: Some(format!("vm-{}-{}", number & 0xffff, number >> 16)),
                uuid: Some(format!("00000000-0000-4000-8000-{host:04x}{number:08x}")),
                manager: Some("fleet".to_owned()),
                ..Given::default()
            };
            let life = sums.head.life;
            names.note(Line {
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
            begun: self.since,
            took: Duration::ZERO,
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

/// Return the recordings of the study that are of whole guests, those of both hosts.
pub fn recordings() -> impl Iterator<Item = PathBuf> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/study"));
    ["smp", "pc", "microvm", "cloud"]
        .into_iter()
        .flat_map(move |guest| {
            let folder = folder.clone();
            ["intel", "amd"].map(|host| folder.join(format!("{host}-{guest}-nested.rec")))
        })
}
