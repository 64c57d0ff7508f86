// SPDX-License-Identifier: GPL-2.0

//! `make fleet`.

use std::{
    collections::BTreeSet,
    net::TcpListener,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use exitmeter::export::server;
use fleet::{
    boards::BOARDS,
    hosts::{recordings, Hosts},
    prometheus::{Engine, How, Prometheus},
    tape::Tape,
};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

/// Runs Debian's Prometheus on hosts that recordings of emulated hosts play, with the rules and alerts of exitmeter.
#[derive(Debug, Parser)]
struct Args {
    /// How many hosts. The meter of the last one cannot be read.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u64).range(2..=2000))]
    hosts: u64,
    /// How many VMs a host has for each of its recording.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1000))]
    vms: u64,
    /// How many times as fast as they were recorded the hosts play.
    #[arg(long, value_name = "TIMES", default_value_t = 4.0)]
    speed: f64,
    /// Which program scrapes them.
    #[arg(long, value_enum, default_value = "prometheus")]
    engine: Engine,
    /// Seconds from one scrape to the next.
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    each: u64,
    /// Tells after so many minutes what the program has taken for each of them, and ends.
    #[arg(long, value_name = "MINUTES", conflicts_with = "check", value_parser = clap::value_parser!(u32).range(1..))]
    measure: Option<u32>,
    /// Checks after a minute that the alerts fire that should, and that sums are those of the recordings; ends then.
    #[arg(long)]
    check: bool,
}

/// For how long the hosts play when it is a check.
const CHECKED: Duration = Duration::from_secs(60);

/// When the panels of the boards are looked at.
const PLAYED: Duration = Duration::from_secs(40);

/// How long Prometheus may take to have scraped and evaluated what there is then.
const SETTLED: Duration = Duration::from_secs(10);

/// The share of steal of a host on which ExitmeterStealHigh surely fires, and of one on which ExitmeterSteal surely does not.
const MUCH: f64 = 0.15;
/// See [`MUCH`].
const LITTLE: f64 = 0.02;

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let tapes = recordings().map(|path| Tape::read(&path));
    let tapes: Vec<Tape> = tapes.collect::<Result<_>>()?;
    let mut hosts = Hosts::new(tapes, args.hosts as usize, args.vms, args.speed);
    if args.check {
        hosts.rounds = Some(rounds);
    }
    let hosts = Arc::new(hosts);
    let folder = tempfile::tempdir()?;
    let listener = TcpListener::bind("127.0.0.1:0").context("no port is free")?;
    let served = listener.local_addr()?;
    let site = Arc::clone(&hosts);
    thread::spawn(move || server::serve_at(site, listener));
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let how = How {
        engine: args.engine,
        each: args.each,
        // Who looks on has no half hour.
        waits: args.measure.is_some(),
    };
    let prometheus = Prometheus::start(folder.path(), &hosts, served, how)?;
    if args.check {
        return check(&hosts, &prometheus);
    }
    if let Some(minutes) = args.measure {
        return measure(&prometheus, minutes);
    }
    let url = prometheus.url();
    println!(
        "{} hosts, {} times as fast as they were recorded",
        hosts.count, args.speed
    );
    println!("  metrics of a host   http://{served}/host/0/metrics");
    println!("  alerts              {url}/alerts");
    println!("  rules               {url}/rules");
    println!("  exits by reason     {url}/graph?g0.expr=sum%20by%20(reason)(instance_reason%3Aexitmeter_host_exits%3Arate5m)&g0.tab=0&g0.range_input=10m");
    println!("  steal by VM         {url}/graph?g0.expr=vm%3Aexitmeter_preempted%3Aratio_rate5m&g0.tab=0&g0.range_input=10m");
    println!("Ctrl-C ends it.");
    signals.forever().next();
    drop(prometheus);
    println!("ended");
    Ok(ExitCode::SUCCESS)
}

/// Tell what each minute took.
fn measure(prometheus: &Prometheus, minutes: u32) -> Result<ExitCode> {
    let mut before = 0.0;
    for minute in 1..=minutes {
        thread::sleep(Duration::from_secs(60));
        let cost = prometheus.cost()?;
        println!(
            "minute {minute}: {:.0} series, {:.0} MB, {:.1} s of a CPU",
            cost.series,
            cost.memory / 1e6,
            cost.cpu - before
        );
        before = cost.cpu;
    }
    Ok(ExitCode::SUCCESS)
}

/// Return how often a host plays its tape in a check: it is done before the time is over.
fn rounds(tape: &Tape) -> u64 {
    // At the speed that is the default.
    let times = CHECKED.mul_f64(4.0).as_secs_f64() / tape.length().as_secs_f64();
    (times as u64).max(1)
}

fn check(hosts: &Hosts, prometheus: &Prometheus) -> Result<ExitCode> {
    // While VMs come and go, and when the hosts have come to their end.
    let played = PLAYED.saturating_sub(hosts.begun.elapsed());
    let passed = eventually(played, || panels(prometheus))?;
    let left = CHECKED.saturating_sub(hosts.begun.elapsed());
    let passed = passed + eventually(left, || verdict(hosts, prometheus))?;
    println!("{passed} passed, 0 failed");
    Ok(ExitCode::SUCCESS)
}

/// Try again for some seconds after a time, until it holds.
fn eventually(after: Duration, holds: impl Fn() -> Result<u64>) -> Result<u64> {
    thread::sleep(after);
    let begun = Instant::now();
    loop {
        let result = holds();
        if result.is_ok() || begun.elapsed() > SETTLED {
            return result;
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Demand that each panel of the boards has data, for the host and the VM whose VMM works most.
fn panels(prometheus: &Prometheus) -> Result<u64> {
    let query = "topk(1, sum by (instance, vm) (rate(exitmeter_user_seconds_total[1m])) and on (instance, vm) exitmeter_vm_info)";
    let busiest = prometheus.query(query)?;
    let (labels, _) = busiest.first().context("a VM runs")?;
    let text = |name: &str| labels[name].as_str().unwrap_or_default();
    let (instance, vm) = (text("instance"), text("vm"));
    let mut queries = 0;
    for board in BOARDS {
        for (title, query) in board.queries(instance, vm) {
            let found = prometheus.query(&query)?;
            let has_data = found.iter().any(|(_, value)| value.is_finite());
            ensure!(has_data, "{}: no data for '{title}': {query}", board.name);
            queries += 1;
        }
    }
    println!("ok: each of the {queries} panels has data, for VM {vm} of {instance}");
    Ok(1)
}

/// Return how many things hold: all of them.
fn verdict(hosts: &Hosts, prometheus: &Prometheus) -> Result<u64> {
    let mut passed = 0;
    // To the last exit: what the recordings have, as often as they were played.
    let mut all = 0;
    for host in 0..hosts.count {
        let instance = hosts.instance(host);
        let query = format!("sum(exitmeter_host_exits_total{{instance=\"{instance}\"}})");
        let found = prometheus.query(&query)?;
        if hosts.is_gone(host) {
            ensure!(found.is_empty(), "{query}: {found:?}");
            continue;
        }
        let tape = hosts.tape(host);
        let exits = tape.exits() * rounds(tape) * hosts.copies;
        all += exits;
        let found = found.first().map(|(_, value)| *value);
        ensure!(
            found == Some(exits as f64),
            "{instance} ({}): {found:?}, and not {exits}",
            tape.name
        );
        passed += 1;
    }
    let found = prometheus.query("sum(exitmeter_host_exits_total)")?;
    ensure!(
        found.iter().map(|(_, value)| *value).eq([all as f64]),
        "{found:?}, and not {all}"
    );
    println!(
        "ok: the sum over {} hosts is {all} exits, to the last one",
        hosts.count
    );

    let firing = prometheus.query("ALERTS{alertstate=\"firing\"}")?;
    let text = |labels: &serde_json::Value, name: &str| {
        labels[name].as_str().unwrap_or_default().to_owned()
    };
    let firing: BTreeSet<_> = firing
        .iter()
        .map(|(labels, _)| (text(labels, "alertname"), text(labels, "instance")))
        .collect();
    for (alert, instance) in &firing {
        println!("firing: {alert} of {instance}");
    }
    let of = |alert: &str| -> BTreeSet<String> {
        let those = firing.iter().filter(|(name, _)| name == alert);
        those.map(|(_, instance)| instance.clone()).collect()
    };
    let gone: BTreeSet<_> = [hosts.instance(hosts.count - 1)].into();
    ensure!(
        of("ExitmeterGone") == gone,
        "ExitmeterGone fires for {:?}",
        of("ExitmeterGone")
    );
    println!("ok: ExitmeterGone fires for the host whose meter cannot be read, and no other");
    let (steal, high) = (of("ExitmeterSteal"), of("ExitmeterStealHigh"));
    for host in (0..hosts.count).filter(|host| !hosts.is_gone(*host)) {
        let (tape, instance) = (hosts.tape(host), hosts.instance(host));
        let share = tape.steal();
        println!("{instance} ({}): {:.1}% steal", tape.name, share * 100.0);
        // Between these it depends on the minutes that Prometheus looks at.
        ensure!(
            share < MUCH || high.contains(&instance),
            "{instance}: no ExitmeterStealHigh"
        );
        ensure!(
            share > LITTLE || !steal.contains(&instance),
            "{instance}: ExitmeterSteal"
        );
    }
    ensure!(!high.is_empty(), "no recording has steal");
    println!("ok: ExitmeterStealHigh fires for the hosts whose VMs lacked a CPU, ExitmeterSteal for none that had one");
    let weeks = of("ExitmeterSlowExits");
    ensure!(
        weeks.is_empty(),
        "no host has a week, and ExitmeterSlowExits fires for {weeks:?}"
    );
    println!("ok: ExitmeterSlowExits is silent without a week before");
    Ok(passed + 4)
}
