// SPDX-License-Identifier: GPL-2.0

//! `exitmeter export`: metrics of a host for Prometheus.
//!
//! A scrape reads one snapshot ([`sums`]), gives each VM a stable label ([`label`]), and writes the
//! metrics ([`metrics`]) in the requested format ([`exposition`]). [`Exporter`] keeps the state
//! between scrapes. It serves metrics by HTTP ([`server`]), with a page for people ([`page`]), or
//! writes a file ([`textfile`]).

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use self::{
    details::Details,
    exposition::{Exposition, Format},
    metrics::Scrape,
    page::History,
    server::Site,
    sums::{Detail, Sums},
};
use crate::{model::Span, names::NameBook, report::seconds, source};

pub mod details;
pub mod exposition;
pub mod label;
pub mod metrics;
pub mod page;
pub mod server;
pub mod sums;
pub mod textfile;

/// Default port of `--listen`. Prometheus's list of default ports, 9100 to 9999, is full.
pub const PORT: u16 = 10479;

/// On the host: serve exits, phases and their cost to Prometheus.
///
/// /metrics has the metrics of one fresh snapshot, in Prometheus's text format, or in OpenMetrics
/// if the client asks for it. / is a page for people. While the meter cannot be read, /metrics has
/// only exitmeter_up, which is then 0.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Metrics of a VM have the label vm: its UUID, else its name, else KVM's name for it. Join with
exitmeter_vm_info by vm for the rest. By default a VM with 20 reasons has 52 series, and a host some
350 more. docs/fleet.md lists all metrics and the number of their series.

For TLS and passwords, put a proxy in front; the default address is therefore 127.0.0.1. If systemd
passes a socket (LISTEN_FDS), --listen is ignored.

Examples:
  exitmeter export
  exitmeter export --listen [::1]:10479 --vcpus
  exitmeter export --textfile /var/lib/prometheus/node-exporter
  curl -s http://127.0.0.1:10479/metrics")]
pub struct Args {
    /// Address and port to listen at.
    #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from(([127, 0, 0, 1], PORT)))]
    listen: SocketAddr,
    /// Instead write DIR/exitmeter.prom once, for node_exporter's textfile collector.
    #[arg(long, value_name = "DIR", conflicts_with = "listen")]
    textfile: Option<PathBuf>,
    /// Write the file again every S seconds, until interrupted.
    #[arg(long, value_name = "S", requires = "textfile", value_parser = seconds)]
    interval: Option<Duration>,
    /// Add exits and phases of each vCPU: 7 series per vCPU.
    #[arg(long)]
    vcpus: bool,
    /// Add histograms of the cost of single exits of each VM: 15 series per reason.
    #[arg(long)]
    histograms: bool,
    /// Add what exits were about (MSRs, ports, vectors), while details are on: up to N labels per
    /// VM. Details are on with the module's parameter details=1, or while exitmeter why or record
    /// --why runs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    details: Option<u16>,
    /// Add to OpenMetrics the start time of each counter: one more series for each. Prometheus uses
    /// it only with the feature created-timestamp-zero-ingestion.
    #[arg(long)]
    created: bool,
    #[command(flatten)]
    asked: source::SourceArgs,
    /// Read a saved snapshot instead of the device.
    #[arg(long, value_name = "FILE", default_value = source::DEVICE)]
    input: PathBuf,
}

impl Args {
    /// Serve until the process ends, or write the file.
    ///
    /// # Errors
    ///
    /// Returns an error if the address cannot be used, or the file cannot be written.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let exporter = Exporter::new(&self);
        match self.textfile {
            Some(folder) => textfile::write(&exporter, &folder, self.interval),
            None => server::serve(exporter, self.listen),
        }
    }
}

/// Source of scrapes of one meter.
#[derive(Debug)]
pub struct Exporter {
    choice: source::Choice,
    input: PathBuf,
    detail: Detail,
    created: bool,
    state: Mutex<State>,
}

/// State kept from one scrape to the next.
#[derive(Debug, Default)]
struct State {
    /// Names of the VMs.
    names: NameBook,
    /// The meter's life number, and the time of its start since 1970.
    meter_start: Option<(u64, Duration)>,
    /// Highest number of vCPUs seen for each VM.
    most_vcpus: BTreeMap<u64, usize>,
    /// Counters of details, if requested.
    details: Option<Details>,
    /// Moments that the page has read.
    history: History,
    /// Last error written to the log.
    logged: Option<String>,
}

impl Exporter {
    fn new(args: &Args) -> Self {
        Self {
            choice: args.asked.source,
            input: args.input.clone(),
            detail: Detail {
                spreads: args.histograms,
                vcpus: args.vcpus,
                details: args.details.is_some(),
            },
            created: args.created,
            state: Mutex::new(State {
                details: args.details.map(|limit| Details::new(limit.into())),
                ..State::default()
            }),
        }
    }

    /// Make a scrape. Also returns true if the meter could be read.
    pub fn scrape(&self, format: Format) -> (String, bool) {
        let mut to = Exposition::new(format);
        let begin = Instant::now();
        let read = self.read(self.detail);
        let read_time = begin.elapsed();
        let is_up = read.is_ok();
        match read {
            Ok((mut sums, names)) => {
                let mut state = self.state();
                let meter_start = state.meter_start(&sums);
                let mut labels = label::labels(&sums, &names);
                state.remove_dying(&mut labels, &sums);
                let details = state.details.as_mut().map(|details| {
                    details.add(&mut sums);
                    details.vms().clone()
                });
                drop(state);
                let scrape = Scrape {
                    sums: &sums,
                    labels: &labels,
                    names: &names,
                    details: details.as_ref(),
                    meter_start,
                    read_time,
                    created: self.created,
                };
                metrics::write(&mut to, &scrape);
            }
            Err(error) => {
                self.log_once(&error.to_string());
                metrics::write_up(&mut to, false);
            }
        }
        (to.done(), is_up)
    }

    /// Make the page for people.
    pub fn page(&self) -> String {
        // A reload within a second shows the same moment.
        if !self.state().history.is_fresh() {
            match self.read(Detail::default()) {
                Ok((sums, names)) => self.state().history.add(sums, names),
                Err(error) => return page::error(&error.to_string()),
            }
        }
        self.state().history.page()
    }

    /// Read the meter, and look up the names of its VMs.
    fn read(&self, detail: Detail) -> Result<(Sums, NameBook), source::Error> {
        let path = self.choice.open(&self.input)?;
        let sums = Sums::read(&path, detail)?;
        let running = sums.running();
        let mut names = match self.state().names.clone() {
            empty if empty == NameBook::default() => NameBook::of(&path),
            names => names,
        };
        // Do not hold the lock here: a process that hangs can take long to return its command line.
        names.look_up(&running);
        names.forget_others(&running);
        let mut state = self.state();
        state.names = names.clone();
        state.logged = None;
        Ok((sums, names))
    }

    /// Log an error, unless it is the same as the last one.
    fn log_once(&self, error: &str) {
        let mut state = self.state();
        if state.logged.as_deref() != Some(error) {
            log(error);
            state.logged = Some(error.to_owned());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Site for Exporter {
    fn content(&self, path: &str, format: Format) -> Option<(&'static str, String)> {
        match path {
            "/metrics" => Some((format.content_type(), self.scrape(format).0)),
            "/" => Some((page::CONTENT_TYPE, self.page())),
            _ => None,
        }
    }
}

/// Write a line to the log. Ignore errors: the server runs on if nobody reads its log.
fn log(text: &str) {
    let _ = writeln!(io::stderr(), "exitmeter: {text}");
}

impl State {
    /// Return the start time of the meter since 1970. It is constant for the meter's life.
    fn meter_start(&mut self, sums: &Sums) -> Duration {
        let head = &sums.head;
        if let Some((life, meter_start)) = self.meter_start {
            if life == head.life {
                return meter_start;
            }
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let ticks = head.now.saturating_sub(head.loaded);
        let age = Span::of(ticks, head.tsc_khz).seconds;
        let age = age.map(Duration::from_secs_f64);
        let meter_start = now.saturating_sub(age.unwrap_or_default());
        self.meter_start = Some((head.life, meter_start));
        self.most_vcpus.clear();
        meter_start
    }

    /// Remove the labels of VMs that have lost a vCPU.
    ///
    /// KVM destroys all vCPUs of a VM together with the VM (`kvm_destroy_vcpus()`,
    /// virt/kvm/kvm_main.c), never a single one. A snapshot of that moment has only some of them.
    /// Their sum is less than before, and a counter must not fall.
    fn remove_dying(&mut self, labels: &mut BTreeMap<u64, String>, sums: &Sums) {
        self.most_vcpus
            .retain(|number, _| sums.vms.contains_key(number));
        for (number, vm) in &sums.vms {
            let most_vcpus = self.most_vcpus.entry(*number).or_insert(vm.vcpus);
            *most_vcpus = vm.vcpus.max(*most_vcpus);
            if vm.vcpus < *most_vcpus {
                labels.remove(number);
            }
        }
    }
}
