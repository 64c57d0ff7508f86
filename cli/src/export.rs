// SPDX-License-Identifier: GPL-2.0

//! `exitmeter export`: the numbers of a host for Prometheus.
//!
//! A scrape reads one snapshot ([`sums`]), gives each VM a label that stays ([`label`]), and writes the metrics ([`metrics`]) in
//! the format that was asked for ([`exposition`]). [`Exporter`] keeps what a scrape has to know of those before. Its ways
//! out are HTTP ([`server`]), with a page for people ([`page`]), and a file ([`textfile`]).

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{model::Span, names::Book, report::seconds, source};

pub mod details;
pub mod exposition;
pub mod label;
pub mod metrics;
pub mod page;
pub mod server;
pub mod sums;
pub mod textfile;

use self::{
    details::Details,
    exposition::{Exposition, Format},
    metrics::Scrape,
    page::History,
    server::Site,
    sums::{Detail, Sums},
};

/// The port of `--listen`. Prometheus's list of default ports, 9100 to 9999, has no free one any more.
pub const PORT: u16 = 10479;

/// On the host: serves exits, phases and what they cost to Prometheus.
///
/// /metrics has the metrics of one fresh snapshot, in Prometheus's text format, or OpenMetrics where that is asked for. / is a
/// page for people. While the meter cannot be read there is the metric exitmeter_up alone, which is 0 then.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Metrics of a VM have the label vm: its UUID, else its name, else KVM's name for it. exitmeter_vm_info
has all that is known of it: join by vm. By default a VM with 20 reasons has 52 series, and a host some 350 more.
docs/fleet.md lists all metrics, and says how many series there are.

TLS and passwords are left to a proxy in front, hence the address 127.0.0.1. With a socket from
systemd (LISTEN_FDS) --listen is not used.

Examples:
  exitmeter export
  exitmeter export --listen [::1]:10479 --vcpus
  exitmeter export --textfile /var/lib/prometheus/node-exporter
  curl -s http://127.0.0.1:10479/metrics")]
pub struct Args {
    /// The address and port to serve at.
    #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from(([127, 0, 0, 1], PORT)))]
    listen: SocketAddr,
    /// Writes DIR/exitmeter.prom for node_exporter's textfile collector instead, once.
    #[arg(long, value_name = "DIR", conflicts_with = "listen")]
    textfile: Option<PathBuf>,
    /// Writes the file again each S seconds, until it is interrupted.
    #[arg(long, value_name = "S", requires = "textfile", value_parser = seconds)]
    interval: Option<Duration>,
    /// Adds exits and phases of each vCPU: 7 series for one.
    #[arg(long)]
    vcpus: bool,
    /// Adds what single exits cost for each VM: 15 series for each of its reasons.
    #[arg(long)]
    histograms: bool,
    /// Adds what exits were about (MSRs, ports, vectors), while details are on: up to N labels for each VM.
    /// Details are on with the module's parameter details=1, or while exitmeter why or record --why runs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    details: Option<u16>,
    /// Adds to OpenMetrics when each counter began: one more series for each. Prometheus takes them as what
    /// they are with the feature created-timestamp-zero-ingestion alone.
    #[arg(long)]
    created: bool,
    #[command(flatten)]
    asked: source::Asked,
    /// Reads a saved snapshot instead of the device.
    #[arg(long, value_name = "FILE", default_value = source::DEVICE)]
    input: PathBuf,
}

impl Args {
    /// Serve until the process ends, or write the file.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened at, or the file cannot be written.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let exporter = Exporter::new(&self);
        match self.textfile {
            Some(folder) => textfile::write(&exporter, &folder, self.interval),
            None => server::serve(exporter, self.listen),
        }
    }
}

/// Makes scrapes of one meter.
#[derive(Debug)]
pub struct Exporter {
    choice: source::Choice,
    input: PathBuf,
    detail: Detail,
    created: bool,
    kept: Mutex<Kept>,
}

/// What is kept from one scrape to the next.
#[derive(Debug, Default)]
struct Kept {
    /// The names of VMs.
    names: Book,
    /// The meter's life, and when it began since 1970.
    begun: Option<(u64, Duration)>,
    /// The most vCPUs that each VM has had.
    most: BTreeMap<u64, usize>,
    /// What exits were about, when that was asked for.
    details: Option<Details>,
    /// What the page has seen.
    history: History,
    /// The last error that was told.
    told: Option<String>,
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
            kept: Mutex::new(Kept {
                details: args.details.map(|limit| Details::new(limit.into())),
                ..Kept::default()
            }),
        }
    }

    /// Make a scrape, and tell whether the meter could be read.
    pub fn scrape(&self, format: Format) -> (String, bool) {
        let mut to = Exposition::new(format);
        let begin = Instant::now();
        let read = self.read(self.detail);
        let took = begin.elapsed();
        let is_up = read.is_ok();
        match read {
            Ok((mut sums, names)) => {
                let mut kept = self.kept();
                let begun = kept.begun(&sums);
                let mut labels = label::labels(&sums, &names);
                kept.take_out(&mut labels, &sums);
                let details = kept.details.as_mut().map(|details| {
                    details.add(&mut sums);
                    details.vms().clone()
                });
                drop(kept);
                let scrape = Scrape {
                    sums: &sums,
                    labels: &labels,
                    names: &names,
                    details: details.as_ref(),
                    begun,
                    took,
                    created: self.created,
                };
                metrics::write(&mut to, &scrape);
            }
            Err(error) => {
                self.tell(&error.to_string());
                metrics::write_up(&mut to, false);
            }
        }
        (to.done(), is_up)
    }

    /// Make the page for people.
    pub fn page(&self) -> String {
        // Who reloads at once sees the same.
        if !self.kept().history.is_fresh() {
            match self.read(Detail::default()) {
                Ok((sums, names)) => self.kept().history.add(sums, names),
                Err(error) => return page::error(&error.to_string()),
            }
        }
        self.kept().history.page()
    }

    /// Read the meter, and look up the names of its VMs.
    fn read(&self, detail: Detail) -> Result<(Sums, Book), source::Error> {
        let path = self.choice.open(&self.input)?;
        let sums = Sums::read(&path, detail)?;
        let running = sums.running();
        let mut names = match self.kept().names.clone() {
            empty if empty == Book::default() => Book::of(&path),
            names => names,
        };
        // Not under the lock: a process that hangs can take long to tell its command line.
        names.look_up(&running);
        names.forget_others(&running);
        let mut kept = self.kept();
        kept.names = names.clone();
        kept.told = None;
        Ok((sums, names))
    }

    /// Tell an error once, and again when another one came between.
    fn tell(&self, error: &str) {
        let mut kept = self.kept();
        if kept.told.as_deref() != Some(error) {
            say(error);
            kept.told = Some(error.to_owned());
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Tell the journal. A server goes on where nobody takes what it says.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "exitmeter: {text}");
}

impl Kept {
    /// Return when the meter began, since 1970: the same for all its life.
    fn begun(&mut self, sums: &Sums) -> Duration {
        let head = &sums.head;
        if let Some((life, begun)) = self.begun {
            if life == head.life {
                return begun;
            }
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let ticks = head.now.saturating_sub(head.loaded);
        let age = Span::of(ticks, head.tsc_khz).seconds;
        let age = age.map(Duration::from_secs_f64);
        let begun = now.saturating_sub(age.unwrap_or_default());
        self.begun = Some((head.life, begun));
        self.most.clear();
        begun
    }

    /// Take out the VMs of which a vCPU has gone.
    ///
    /// KVM lets all vCPUs of a VM go when the VM does (`kvm_destroy_vcpus()`, virt/kvm/kvm_main.c), and never one alone. A
    /// snapshot of that moment has some of them. Their sum is less than it was, and a counter must not fall.
    fn take_out(&mut self, labels: &mut BTreeMap<u64, String>, sums: &Sums) {
        self.most.retain(|number, _| sums.vms.contains_key(number));
        for (number, vm) in &sums.vms {
            let most = self.most.entry(*number).or_insert(vm.vcpus);
            *most = vm.vcpus.max(*most);
            if vm.vcpus < *most {
                labels.remove(number);
            }
        }
    }
}
