// SPDX-License-Identifier: GPL-2.0

//! `make fleet`: runs Prometheus on hosts that play recordings, and checks alerts, rules and boards.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::TcpListener,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use exitmeter::{export::server, stop::Stop};
use fleet::{
    boards::{Board, BOARDS},
    hosts::{recording_paths, Hosts},
    prometheus::{Engine, Group, Labels, Prometheus, Rule, ScrapeOptions, CONSOLE},
    recording::Recording,
    tiers::Tiers,
};
use serde_json::Value;

/// Run Debian's Prometheus, with exitmeter's rules and alerts, on hosts that play recordings of emulated hosts.
#[derive(Debug, Parser)]
struct Args {
    /// Number of hosts. The meter of the last one cannot be read.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u64).range(2..=2000))]
    hosts: u64,
    /// VMs of a host for each VM of its recording.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1000))]
    vms: u64,
    /// Speed of the hosts, as a multiple of that of the recordings.
    #[arg(long, value_name = "TIMES", default_value_t = 4.0)]
    speed: f64,
    /// Program that scrapes the hosts.
    #[arg(long, value_enum, default_value = "prometheus")]
    engine: Engine,
    /// Run N Prometheus servers that share the hosts, and one above them that takes the results of their rules.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100))]
    leaves: Option<u64>,
    /// Seconds from one scrape to the next.
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    each: u64,
    /// Print after each minute the memory and CPU time that the programs take, and end after MINUTES.
    #[arg(long, value_name = "MINUTES", conflicts_with = "check", value_parser = clap::value_parser!(u32).range(1..))]
    measure: Option<u32>,
    /// Check for about a minute that the right alerts fire and that the sums are those of the recordings, and end.
    #[arg(long)]
    check: bool,
}

/// Time for which the hosts play in a check.
const PLAY_TIME: Duration = Duration::from_secs(60);

/// Time of the check of the panels, while VMs still come and go.
const PANEL_CHECK: Duration = Duration::from_secs(40);

/// Time limit for Prometheus to scrape and evaluate what a check expects.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Share of steal above which ExitmeterStealHigh surely fires.
const HIGH_STEAL: f64 = 0.15;
/// Share of steal below which ExitmeterSteal surely does not fire.
const LOW_STEAL: f64 = 0.02;

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let stop = Stop::default();
    stop.begin().context("cannot wait for signals")?;
    let result = run(&args, &stop);
    match stop.check() {
        // Ctrl-C on a terminal also reaches the servers, so the error may be that one of them is gone.
        Err(stopped) if result.is_err() => {
            eprintln!("fleet: {stopped}");
            Ok(stopped.status().into())
        }
        _ => result,
    }
}

/// Start hosts and servers, and check, measure or show them. A signal ends this early, and nothing is left of it.
fn run(args: &Args, stop: &Stop) -> Result<ExitCode> {
    let recordings = recording_paths().map(|path| Recording::read(&path));
    let recordings: Vec<Recording> = recordings.collect::<Result<_>>()?;
    let mut hosts = Hosts::new(recordings, args.hosts as usize, args.vms, args.speed);
    if args.check {
        hosts.rounds = Some(rounds);
    }
    let hosts = Arc::new(hosts);
    let folder = tempfile::tempdir()?;
    let listener = TcpListener::bind("127.0.0.1:0").context("no port is free")?;
    let served = listener.local_addr()?;
    let site = Arc::clone(&hosts);
    thread::spawn(move || server::serve_at(site, listener));
    let options = ScrapeOptions {
        engine: args.engine,
        each: args.each,
        // Nobody who watches wants to wait half an hour for an alert.
        real_waits: args.measure.is_some(),
    };
    let leaves = args.leaves.map(|leaves| leaves as usize);
    let tiers = Tiers::start(folder.path(), &hosts, served, options, leaves, stop)?;
    if args.check {
        return check(&hosts, &tiers, options, stop);
    }
    if let Some(minutes) = args.measure {
        return measure(&tiers, minutes, stop);
    }
    let url = tiers.top_or_only().url();
    println!(
        "{} hosts, {} times as fast as they were recorded",
        hosts.count, args.speed
    );
    println!("  metrics of a host   http://{served}/host/0/metrics");
    if options.engine.has_rules() {
        for leaf in &tiers.leaves {
            let (name, url) = (leaf.name(), leaf.url_of_alerts());
            println!("  alerts, rules       {url}/alerts  {url}/rules  ({name})");
        }
    }
    if options.engine.name() == "Prometheus" {
        // This URL shows the last ten minutes.
        println!(
            "  the fleet           {url}{CONSOLE}#pctc%7B%22duration%22:600,%22endTime%22:0%7D"
        );
    }
    println!("  exits by reason     {url}/graph?g0.expr=sum%20by%20(reason)(instance_reason%3Aexitmeter_host_exits%3Arate5m)&g0.tab=0&g0.range_input=10m");
    println!("  steal by VM         {url}/graph?g0.expr=vm%3Aexitmeter_preempted%3Aratio_rate5m&g0.tab=0&g0.range_input=10m");
    println!("Ctrl-C ends it.");
    while stop.pause(Duration::MAX).is_ok() {}
    drop(tiers);
    println!("ended");
    Ok(ExitCode::SUCCESS)
}

/// Print what the programs take in each minute, and then the times of rules and scrapes.
fn measure(tiers: &Tiers, minutes: u32, stop: &Stop) -> Result<ExitCode> {
    let mut before = BTreeMap::new();
    for minute in 1..=minutes {
        stop.pause(Duration::from_secs(60))?;
        for program in tiers.servers() {
            for cost in program.costs()? {
                let series = cost.series.map(|series| format!("{series:.0} series, "));
                let cpu = cost.cpu - before.get(&cost.name).unwrap_or(&0.0);
                println!(
                    "minute {minute}: {}: {}{:.0} MB, {cpu:.1} s of a CPU",
                    cost.name,
                    series.unwrap_or_default(),
                    cost.memory / 1e6,
                );
                before.insert(cost.name, cost.cpu);
            }
        }
    }
    for program in &tiers.leaves {
        // VictoriaMetrics without vmalert has no rules.
        for group in program.groups().unwrap_or_default() {
            let Group {
                name,
                interval,
                took,
                missed,
                ..
            } = group;
            println!(
                "{}: the rules of {name}, each {interval} s, take {took:.2} s; {missed} evaluations are left out",
                program.name(),
            );
        }
    }
    let query = "max by (job) (max_over_time(scrape_duration_seconds[2m]))";
    for program in tiers.servers() {
        let name = program.name();
        let failed = program.query("count(up == 0) or vector(0)");
        let (Ok(found), Ok(failed)) = (program.query(query), failed) else {
            stop.check()?;
            println!("{name} is too busy to answer");
            continue;
        };
        let failed = failed.first().map_or(0.0, |(_, value)| *value);
        for (labels, took) in found {
            println!(
                "{name}: the longest scrape of {} takes {took:.2} s, and {failed} fail",
                labels["job"]
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Return how often a host plays its recording in a check, such that it ends before [`PLAY_TIME`] is over.
fn rounds(recording: &Recording) -> u64 {
    // 4 is the default speed.
    let times = PLAY_TIME.mul_f64(4.0).as_secs_f64() / recording.length().as_secs_f64();
    (times as u64).max(1)
}

fn check(hosts: &Hosts, tiers: &Tiers, options: ScrapeOptions, stop: &Stop) -> Result<ExitCode> {
    // Panels, page and rules are checked while VMs come and go, the sums after the hosts have stopped.
    let played = PANEL_CHECK.saturating_sub(hosts.begun.elapsed());
    let mut passed = eventually(played, stop, || check_panels(tiers))?;
    for program in tiers.servers() {
        let played = PANEL_CHECK.saturating_sub(hosts.begun.elapsed());
        passed += eventually(played, stop, || check_console(hosts, program))?;
    }
    for program in &tiers.leaves {
        passed += eventually(Duration::ZERO, stop, || check_rules(program, options.each))?;
    }
    let left = PLAY_TIME.saturating_sub(hosts.begun.elapsed());
    passed += eventually(left, stop, || check_sums_and_alerts(hosts, tiers))?;
    if tiers.top.is_some() {
        passed += eventually(Duration::ZERO, stop, || {
            check_top(hosts, tiers, options.each)
        })?;
    }
    println!("{passed} passed, 0 failed");
    Ok(ExitCode::SUCCESS)
}

/// Check that the page on Prometheus shows its hosts and the VMs that lead the tables, and that its graphs have data.
fn check_console(hosts: &Hosts, program: &Prometheus) -> Result<u64> {
    let Some(page) = program.console()? else {
        return Ok(0);
    };
    let name = program.name();
    // If a template fails, the page ends early or has these words in place of a value.
    for wrong in ["error executing template", "no value", "%!"] {
        ensure!(!page.contains(wrong), "{name}: {wrong}: {page}");
    }
    ensure!(page.ends_with("</html>\n"), "{name}: the page ends early");
    let rows = |table: &str| -> Result<Vec<&str>> {
        let (_, rest) = page
            .split_once(&format!("id=\"{table}\""))
            .context("no such table")?;
        let (table, _) = rest.split_once("</table>").context("a table ends")?;
        Ok(table.lines().filter(|l| l.starts_with("<tr><td")).collect())
    };
    let shown = rows("table-of-hosts")?;
    let known = program.query("exitmeter_up")?;
    ensure!(
        shown.len() == known.len() && !known.is_empty(),
        "{name}: {} hosts, and {} on the page",
        known.len(),
        shown.len()
    );
    let gone = hosts.instance(hosts.count - 1);
    for (labels, _) in &known {
        let instance = labels["instance"].as_str().unwrap_or_default();
        let row = shown
            .iter()
            .find(|row| row.starts_with(&format!("<tr><td>{instance}</td>")));
        let row = row.with_context(|| format!("{name}: {instance} is not on the page"))?;
        // The links are vCPUs, exits and steal.
        let numbers = row.matches("</a>").count();
        let expected = if instance == gone { 0 } else { 3 };
        ensure!(numbers == expected, "{name}: {instance} has {row}");
    }
    for (table, rule) in [
        ("table-of-steal", "vm:exitmeter_preempted:ratio_rate5m"),
        ("table-of-vmms", "vm:exitmeter_user:ratio_rate5m"),
        ("table-of-exits", "vm:exitmeter_exits_per_vcpu:rate5m"),
    ] {
        let most = program.query(&format!("topk(1, {rule} >= 0)"))?;
        let (labels, _) = most.first().context("a VM runs")?;
        let text = |label: &str| labels[label].as_str().unwrap_or_default();
        let (instance, vm) = (text("instance"), text("vm"));
        let first = format!("<tr><td>{instance}</td>");
        let has = |row: &&str| row.starts_with(&first) && row.contains(vm);
        ensure!(
            rows(table)?.iter().any(has),
            "{name}: {table} lacks VM {vm} of {instance}"
        );
    }
    let graphs: Vec<_> = page
        .lines()
        .filter_map(|line| line.trim().strip_prefix("expr: \"")?.strip_suffix("\","))
        .collect();
    ensure!(!graphs.is_empty(), "{name}: no graphs");
    for graph in &graphs {
        let found = program.query(graph)?;
        ensure!(
            found.iter().any(|(_, value)| value.is_finite()),
            "{name}: no data for {graph}"
        );
    }
    let files = page.split('"').filter(|part| part.contains("/static/"));
    // Debian's prom.lib names two files that Debian does not have. Graphs are drawn without them.
    let files =
        files.filter(|file| !file.ends_with("d3.layout.min.js") && !file.ends_with("popper.js"));
    let mut served = 0;
    for file in files {
        program.serves(file)?;
        served += 1;
    }
    ensure!(served > 4, "{name}: {served} files");
    println!(
        "ok: {name}: {CONSOLE} has its {} hosts, the VMs with most steal, exits and time of the VMM, {} graphs with data, and their {served} files",
        known.len(),
        graphs.len()
    );
    Ok(1)
}

/// Check that each rule has written the values of its expression.
fn check_rules(program: &Prometheus, each: u64) -> Result<u64> {
    let mut series = 0;
    let groups = program.groups()?;
    let records: Vec<_> = groups.iter().flat_map(|group| &group.records).collect();
    ensure!(records.len() > 6, "{} has the rules", program.name());
    for rule in records.iter().copied() {
        let name = &rule.name;
        let stored = program.stored(&format!("{name}[{}s]", 6 * each), now()?)?;
        // VictoriaMetrics has no samples that are not a number, and vmalert ends a series at a time of its own.
        let stored: Vec<(String, f64, f64)> = stored
            .iter()
            .filter_map(|(labels, samples)| {
                let mut samples = samples.iter().rev().filter_map(|sample| {
                    let value: f64 = sample[1].as_str()?.parse().ok()?;
                    Some((sample[0].as_f64()?, value))
                });
                let (at, value) = samples.find(|(_, value)| value.is_finite())?;
                Some((without_name(labels), at, value))
            })
            .collect();
        let last = stored.iter().map(|(_, at, _)| *at).fold(0.0, f64::max);
        let written = stored.into_iter().filter(|(_, at, _)| *at == last);
        let written: BTreeMap<_, _> = written.map(|(labels, _, value)| (labels, value)).collect();
        ensure!(!written.is_empty(), "{name} has no series");
        check_rule(program, rule, last, each, &written)?;
        series += written.len();
    }
    println!(
        "ok: {}: the {} rules have written the {series} series that their expressions give",
        program.name(),
        records.len()
    );
    Ok(1)
}

/// Check that a rule has written at a moment what its expression gives then, or gave a few scrapes earlier.
///
/// VictoriaMetrics shows a sample only some time after it has taken it, so vmalert does not see the latest ones, and VMs come
/// and go. So a series that the expression gave all the while must be written, a series that it never gave must not, and each
/// value must be close to one that the expression gave.
fn check_rule(
    program: &Prometheus,
    rule: &Rule,
    at: f64,
    each: u64,
    written: &BTreeMap<String, f64>,
) -> Result<()> {
    let name = &rule.name;
    let mut given: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let before = [0, 1, 2, 3];
    for scrapes in before {
        let at = at - (scrapes * each) as f64;
        for (labels, value) in program.query_at(&rule.query, Some(at))? {
            if value.is_finite() {
                given.entry(without_name(&labels)).or_default().push(value);
            }
        }
    }
    for (labels, written) in written {
        let values = given.get(labels);
        let values = values.with_context(|| {
            format!("{name}{labels} is written, but its expression does not give it")
        })?;
        ensure!(
            values
                .iter()
                .any(|value| (written - value).abs() <= 0.1 * value.abs()),
            "{name}{labels} is {written}, but its expression gives {values:?}"
        );
    }
    let throughout = given
        .iter()
        .filter(|(_, values)| values.len() == before.len());
    let mut count = 0;
    for (labels, _) in throughout {
        ensure!(
            written.contains_key(labels),
            "{name}{labels} is not written"
        );
        count += 1;
    }
    ensure!(
        count > 0,
        "{name}: its expression gives no series all the while"
    );
    Ok(())
}

fn without_name(labels: &Labels) -> String {
    let mut labels = labels.clone();
    if let Value::Object(labels) = &mut labels {
        labels.remove("__name__");
    }
    labels.to_string()
}

/// Return the seconds since 1970.
fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}

/// Check that the top has all that it takes from the leaves, and no more.
fn check_top(hosts: &Hosts, tiers: &Tiers, each: u64) -> Result<u64> {
    let series = tiers.compare(now()?, each)?;
    println!(
        "ok: the top has the {series} series that it takes from the leaves, with the same samples"
    );
    let top = tiers.top_or_only();
    for rule in tiers.leaves[0]
        .groups()?
        .iter()
        .flat_map(|group| &group.records)
    {
        let found = top.query(&format!(
            "count(count by (instance) (last_over_time({}[2m])))",
            rule.name
        ))?;
        let found = found.first().map_or(0.0, |(_, value)| *value);
        let read = hosts.count - 1;
        ensure!(
            found == read as f64,
            "{}: {found} hosts on the top instead of {read}",
            rule.name
        );
    }
    println!("ok: each rule has a result on the top for each host whose meter can be read");
    Ok(2)
}

/// Wait for `after`, then repeat a check until it passes, for up to [`SETTLE_TIMEOUT`].
fn eventually(after: Duration, stop: &Stop, holds: impl Fn() -> Result<u64>) -> Result<u64> {
    stop.pause(after)?;
    let begun = Instant::now();
    loop {
        let result = holds();
        if result.is_ok() || begun.elapsed() > SETTLE_TIMEOUT {
            return result;
        }
        stop.pause(Duration::from_secs(1))?;
    }
}

/// Check that each panel of the boards has data, for the VM with the busiest VMM. The top needs data only for the fleet's board.
fn check_panels(tiers: &Tiers) -> Result<u64> {
    let mut passed = 0;
    let user = "topk(1, sum by (instance, vm) (rate(exitmeter_user_seconds_total[1m])) and on (instance, vm) exitmeter_vm_info)";
    for program in &tiers.leaves {
        passed += check_panels_of(program, &BOARDS, user)?;
    }
    if let Some(top) = &tiers.top {
        // The top lacks these metrics, and the board of the fleet needs no VM.
        passed += check_panels_of(top, &BOARDS[..1], "topk(1, vm:exitmeter_user:ratio_rate5m)")?;
    }
    Ok(passed)
}

/// Check that each panel of `boards` has data, for the host and the VM that `query` gives.
fn check_panels_of(prometheus: &Prometheus, boards: &[Board], query: &str) -> Result<u64> {
    let busiest = prometheus.query(query)?;
    let (labels, _) = busiest.first().context("a VM runs")?;
    let text = |name: &str| labels[name].as_str().unwrap_or_default();
    let (instance, vm) = (text("instance"), text("vm"));
    let mut queries = 0;
    for board in boards {
        for (title, query) in board.queries(instance, vm) {
            let found = prometheus.query(&query)?;
            let has_data = found.iter().any(|(_, value)| value.is_finite());
            ensure!(has_data, "{}: no data for '{title}': {query}", board.name);
            queries += 1;
        }
    }
    let name = prometheus.name();
    println!("ok: {name}: each of the {queries} panels has data, for VM {vm} of {instance}");
    Ok(1)
}

/// Check the sums of exits and the alerts, and return the number of checks.
fn check_sums_and_alerts(hosts: &Hosts, tiers: &Tiers) -> Result<u64> {
    let mut passed = 0;
    // The exits of the recordings, times the number of times they were played.
    let mut all = 0;
    for host in 0..hosts.count {
        let instance = hosts.instance(host);
        let query = format!("sum(exitmeter_host_exits_total{{instance=\"{instance}\"}})");
        let found = tiers.server_of(host).query(&query)?;
        if hosts.is_gone(host) {
            ensure!(found.is_empty(), "{query}: {found:?}");
            continue;
        }
        let recording = hosts.recording(host);
        let exits = recording.exits() * rounds(recording) * hosts.copies;
        all += exits;
        let found = found.first().map(|(_, value)| *value);
        ensure!(
            found == Some(exits as f64),
            "{instance} ({}): {found:?} instead of {exits}",
            recording.name
        );
        passed += 1;
    }
    let mut found = 0.0;
    for leaf in &tiers.leaves {
        let sum = leaf.query("sum(exitmeter_host_exits_total)")?;
        found += sum.iter().map(|(_, value)| *value).sum::<f64>();
    }
    ensure!(found == all as f64, "the sum is {found} instead of {all}");
    println!(
        "ok: the sum over {} hosts is exactly {all} exits",
        hosts.count
    );

    let firing = tiers.top_or_only().query("ALERTS{alertstate=\"firing\"}")?;
    let text = |labels: &Labels, name: &str| labels[name].as_str().unwrap_or_default().to_owned();
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
    println!("ok: ExitmeterGone fires only for the host whose meter cannot be read");
    let (steal, high) = (of("ExitmeterSteal"), of("ExitmeterStealHigh"));
    for host in (0..hosts.count).filter(|host| !hosts.is_gone(*host)) {
        let (recording, instance) = (hosts.recording(host), hosts.instance(host));
        let share = recording.steal();
        println!(
            "{instance} ({}): {:.1}% steal",
            recording.name,
            share * 100.0
        );
        // In between, the result depends on the minutes that Prometheus evaluates.
        ensure!(
            share < HIGH_STEAL || high.contains(&instance),
            "{instance}: ExitmeterStealHigh does not fire"
        );
        ensure!(
            share > LOW_STEAL || !steal.contains(&instance),
            "{instance}: ExitmeterSteal fires"
        );
    }
    ensure!(!high.is_empty(), "no recording has steal");
    println!("ok: ExitmeterStealHigh fires for the hosts whose VMs lack a CPU, and ExitmeterSteal for no host whose VMs have one");
    let slow = of("ExitmeterSlowExits");
    ensure!(
        slow.is_empty(),
        "no host has data of a week ago, but ExitmeterSlowExits fires for {slow:?}"
    );
    println!("ok: ExitmeterSlowExits does not fire without data of a week ago");
    Ok(passed + 4)
}
