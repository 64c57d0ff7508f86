// SPDX-License-Identifier: GPL-2.0

//! Page for people: the host's activity now.
//!
//! The browser reloads the page every few seconds, and each reload reads one snapshot. So nothing
//! is read while nobody looks. The pictures are those of `exitmeter plot`.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use exitmeter_meter::{phase::Phase, reader::Head};

use super::sums::{cycles, Rows, Sums, Vm};
use crate::{
    model::{Cycles, Ledger, Span},
    names::NameBook,
    numbers::{clock_rate, exact, rate, share, time},
    plot::{self, html::section, series::Step, svg::escape, Series},
    recording::read::Ending,
};

/// Value of Content-Type.
pub const CONTENT_TYPE: &str = "text/html; charset=utf-8";

/// Seconds between two reloads of the page.
const RELOAD: u64 = 5;

/// A moment younger than this is shown again.
const FRESH: Duration = Duration::from_secs(1);

/// Time for which moments are kept.
const HISTORY_LENGTH: Duration = Duration::from_secs(600);

/// Maximum number of VMs shown.
const VMS: usize = 20;

/// Moments at which the page was read.
#[derive(Debug, Default)]
pub struct History {
    /// Numbers of the host at each moment, the latest one last.
    moments: VecDeque<Moment>,
    /// VMs of the latest moment and of the one before.
    vms: [BTreeMap<u64, Vm>; 2],
    names: NameBook,
}

#[derive(Debug)]
struct Moment {
    at: Instant,
    sums: KeptSums,
}

/// Part of a host's snapshot that is kept.
#[derive(Debug)]
struct KeptSums {
    head: Head,
    all: Rows,
    vcpus: usize,
    vms: usize,
}

impl History {
    /// Return true if the latest moment is still fresh.
    pub fn is_fresh(&self) -> bool {
        self.moments
            .back()
            .is_some_and(|moment| moment.at.elapsed() < FRESH)
    }

    /// Add a moment.
    pub fn add(&mut self, sums: Sums, names: NameBook) {
        let at = Instant::now();
        let (vcpus, vms) = (sums.vcpus(), sums.vms.len());
        if let Some(last) = self.moments.back() {
            let (last, head) = (&last.sums.head, &sums.head);
            if last.life == head.life && last.now == head.now {
                // A saved snapshot was read again: no time has passed in it.
                self.names = names;
                return;
            }
            if last.life != head.life || last.now > head.now {
                *self = Self::default();
            }
        }
        self.moments.push_back(Moment {
            at,
            sums: KeptSums {
                head: sums.head,
                all: sums.up_to_now(),
                vcpus,
                vms,
            },
        });
        let is_old = |moment: &Moment| at.duration_since(moment.at) > HISTORY_LENGTH;
        while self.moments.front().is_some_and(is_old) {
            self.moments.pop_front();
        }
        let [latest, before] = &mut self.vms;
        *before = std::mem::replace(latest, sums.vms);
        self.names = names;
    }

    /// Return the page.
    pub fn page(&self) -> String {
        let Some(latest) = self.moments.back() else {
            return error("no snapshot was read yet");
        };
        let series = self.series(latest);
        let host = &latest.sums;
        let (from, to) = series.range();
        let span = format!("the last {:.0} s", (to - from).max(1.0));
        let facts = [
            ("VMs", exact(host.vms as u64)),
            ("vCPUs", exact(host.vcpus as u64)),
            ("not metered", exact(host.head.unmetered)),
            ("gone", exact(host.head.gone)),
            (
                "kept by",
                if host.head.by_bpf {
                    "BPF programs"
                } else {
                    "the module"
                }
                .to_owned(),
            ),
            ("clock", clock_rate(host.head.tsc_khz)),
            ("shown", span),
        ];
        let facts: String = facts
            .iter()
            .map(|(name, text)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(text)))
            .collect();
        // Without any vCPU there is nothing to draw.
        let pictures = match series.sum.cycles.sum() {
            0 => Vec::new(),
            _ => plot::live(&series),
        };
        let figures: String = pictures
            .into_iter()
            .map(|svg| format!("<figure>\n{svg}</figure>\n"))
            .collect();
        let body = format!(
            "<dl>\n{facts}</dl>\n{}{figures}{}<p><a href=\"metrics\">metrics</a> for Prometheus</p>\n",
            self.vms(series.tsc_khz),
            reasons(&series),
        );
        page("VM exits on this host", &body)
    }

    /// Return the activity between the moments, for the pictures. With only one moment, return all
    /// since the meter began.
    fn series(&self, latest: &Moment) -> Series {
        let mut steps = Vec::new();
        let mut sum = Ledger::of([]);
        let khz = latest.sums.head.tsc_khz;
        let seconds = |ticks: u64| Span::of(ticks, khz).seconds.unwrap_or(ticks as f64);
        let last = latest.sums.head.now;
        let before = |tsc: u64| -seconds(last.saturating_sub(tsc));
        let none = Rows::new();
        let mut add = |from: u64, to: u64, old: &Rows, new: &Rows| {
            let rows = since(new, old);
            let mut step = Step {
                from: before(from),
                to: before(to),
                ..Step::default()
            };
            step.cycles = cycles(&rows);
            step.exits = rows.iter().map(|(key, row)| (*key, row.exits)).collect();
            steps.push(step);
        };
        let moments = self.moments.iter().zip(self.moments.iter().skip(1));
        for (old, new) in moments {
            let (old, new) = (&old.sums, &new.sums);
            add(old.head.now, new.head.now, &old.all, &new.all);
        }
        let first = match self.moments.front() {
            Some(first) if self.moments.len() > 1 => &first.sums.all,
            _ => {
                let host = &latest.sums;
                add(host.head.loaded, host.head.now, &none, &host.all);
                &none
            }
        };
        let rows = since(&latest.sums.all, first);
        sum.reasons.extend(rows.into_values());
        Series {
            steps,
            sum: Ledger::of(sum.reasons),
            isa: latest.sums.head.isa,
            details: None,
            slow: Vec::new(),
            tsc_khz: khz,
            about: BTreeMap::new(),
            vms: BTreeSet::new(),
            marks: Vec::new(),
            breaks: Vec::new(),
            snapshots: self.moments.len(),
            ending: Ending::Complete(String::new()),
        }
    }

    /// Return the table of VMs, sorted by time that KVM, the VMM and the host took from the guest.
    fn vms(&self, khz: Option<u32>) -> String {
        let [latest, before] = &self.vms;
        if latest.is_empty() {
            return notice("No VM runs");
        }
        let span = self.span(khz);
        let mut vms: Vec<_> = latest
            .iter()
            .map(|(number, vm)| {
                let rows = match before.get(number) {
                    Some(before) => since(&vm.report_rows(), &before.report_rows()),
                    None => vm.report_rows(),
                };
                (*number, vm, Ledger::of(rows.into_values()))
            })
            .collect();
        vms.sort_by_key(|(.., ledger)| {
            let of = &ledger.cycles;
            Reverse(of.kernel + of.user + of.preempted)
        });
        let rows = vms.iter().take(VMS).map(|(number, vm, ledger)| {
            let all = ledger.cycles.sum();
            let given = self.names.vm(*number);
            let mut cells = vec![
                vm.vcpus.to_string(),
                given.label(&vm.name),
                rate(span.and_then(|span| span.per_second(ledger.exits))),
            ];
            cells.extend(of_phases(&ledger.cycles).map(|ticks| share(ticks, all)));
            let leads = ledger.reasons.first();
            cells.push(leads.map_or_else(String::new, |row| row.label.to_string()));
            cells
        });
        let titles = [
            "vCPUs",
            "VM",
            "exits/s",
            "guest",
            "kernel",
            "user",
            "halted",
            "waiting",
            "preempted",
            "most kernel time",
        ];
        let title = match vms.len() {
            some if some > VMS => format!("VMs, {VMS} of {}", exact(some as u64)),
            _ => "VMs".to_owned(),
        };
        section(&title, "vms", &titles, rows.collect())
    }

    /// Return the time between the two latest moments, or since the meter began.
    fn span(&self, khz: Option<u32>) -> Option<Span> {
        let mut moments = self.moments.iter().rev();
        let latest = &moments.next()?.sums.head;
        let before = moments
            .next()
            .map_or(latest.loaded, |moment| moment.sums.head.now);
        let ticks = latest.now.saturating_sub(before);
        Some(Span::of(ticks, khz))
    }
}

/// Return the ticks of the phases, in display order.
fn of_phases(cycles: &Cycles) -> [u128; 6] {
    Phase::SHOWN.map(|phase| cycles.of(phase))
}

/// Return the table of reasons.
fn reasons(series: &Series) -> String {
    let seconds = series.range().1 - series.range().0;
    let rows = series.sum.reasons.iter().map(|row| {
        let quantile = |percent| {
            let ticks = row.spread.and_then(|spread| spread.quantile(percent));
            ticks.map_or_else(|| "-".to_owned(), |ticks| time(ticks, series.tsc_khz))
        };
        vec![
            exact(row.exits),
            row.label.to_string(),
            rate((seconds > 0.0).then_some(row.exits as f64 / seconds)),
            share(row.cycles.kernel, series.sum.cycles.kernel),
            share(row.cycles.user, series.sum.cycles.user),
            quantile(50),
            quantile(99),
        ]
    });
    let titles = [
        "exits",
        "reason",
        "per second",
        "of KVM's time",
        "of the VMMs'",
        "p50",
        "p99",
    ];
    section("Reasons", "reasons", &titles, rows.collect())
}

/// Return the rows added since an earlier moment. Unlike [`Ledger::since`], which fails as a whole,
/// this only drops the rows that have fallen.
fn since(new: &Rows, old: &Rows) -> Rows {
    let rows = new.iter().filter_map(|(key, row)| {
        let row = match old.get(key) {
            // One of the two moments is damaged.
            Some(old) => row.since(old)?,
            None => *row,
        };
        row.has_moved().then_some((*key, row))
    });
    rows.collect()
}

/// Return a page with only an error message.
pub fn error(text: &str) -> String {
    page("VM exits on this host", &notice(text))
}

/// Return a section with only a heading.
fn notice(text: &str) -> String {
    format!("<section>\n<h2>{}</h2>\n</section>\n", escape(text))
}

fn page(title: &str, body: &str) -> String {
    let head = format!("<meta http-equiv=\"refresh\" content=\"{RELOAD}\">\n");
    plot::html::document(title, &head, body)
}
