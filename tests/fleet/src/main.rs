// SPDX-License-Identifier: GPL-2.0

//! `make fleet`.

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
use exitmeter::export::server;
use fleet::{
    boards::{Board, BOARDS},
    hosts::{recordings, Hosts},
    prometheus::{Engine, Group, How, Labels, Prometheus, Rule, CONSOLE},
    tape::Tape,
    tiers::Tiers,
};
use serde_json::Value;
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
    /// Runs so many Prometheuses, which share the hosts, and one above them that takes the results of their rules.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100))]
    leaves: Option<u64>,
    /// Seconds from one scrape to the next.
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    each: u64,
    /// Tells after each of so many minutes what the programs have taken for it, and ends.
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
    let how = How {
        engine: args.engine,
        each: args.each,
        // Who looks on has no half hour.
        waits: args.measure.is_some(),
    };
    let leaves = args.leaves.map(|leaves| leaves as usize);
    let tiers = Tiers::start(folder.path(), &hosts, served, how, leaves)?;
    if args.check {
        return check(&hosts, &tiers, how);
    }
    if let Some(minutes) = args.measure {
        return measure(&tiers, minutes);
    }
    // From here on: Ctrl-C ends a check or a measurement at once, and what it started ends with it.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let url = tiers.all().url();
    println!(
        "{} hosts, {} times as fast as they were recorded",
        hosts.count, args.speed
    );
    println!("  metrics of a host   http://{served}/host/0/metrics");
    if how.engine.has_rules() {
        for leaf in &tiers.leaves {
            let (name, url) = (leaf.name(), leaf.url_of_alerts());
            println!("  alerts, rules       {url}/alerts  {url}/rules  ({name})");
        }
    }
    if how.engine.name() == "Prometheus" {
        // The last ten minutes, up to now.
        println!(
            "  the fleet           {url}{CONSOLE}#pctc%7B%22duration%22:600,%22endTime%22:0%7D"
        );
    }
    println!("  exits by reason     {url}/graph?g0.expr=sum%20by%20(reason)(instance_reason%3Aexitmeter_host_exits%3Arate5m)&g0.tab=0&g0.range_input=10m");
    println!("  steal by VM         {url}/graph?g0.expr=vm%3Aexitmeter_preempted%3Aratio_rate5m&g0.tab=0&g0.range_input=10m");
    println!("Ctrl-C ends it.");
    signals.forever().next();
    drop(tiers);
    println!("ended");
    Ok(ExitCode::SUCCESS)
}

/// Tell what each minute took.
fn measure(tiers: &Tiers, minutes: u32) -> Result<ExitCode> {
    let mut before = BTreeMap::new();
    for minute in 1..=minutes {
        thread::sleep(Duration::from_secs(60));
        for program in tiers.each() {
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
        // VictoriaMetrics without vmalert does not know what rules are.
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
    for program in tiers.each() {
        let name = program.name();
        let failed = program.query("count(up == 0) or vector(0)");
        let (Ok(found), Ok(failed)) = (program.query(query), failed) else {
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

/// Return how often a host plays its tape in a check: it is done before the time is over.
fn rounds(tape: &Tape) -> u64 {
    // At the speed that is the default.
    let times = CHECKED.mul_f64(4.0).as_secs_f64() / tape.length().as_secs_f64();
    (times as u64).max(1)
}

fn check(hosts: &Hosts, tiers: &Tiers, how: How) -> Result<ExitCode> {
    // While VMs come and go, and when the hosts have come to their end.
    let played = PLAYED.saturating_sub(hosts.begun.elapsed());
    let mut passed = eventually(played, || panels(tiers))?;
    for program in tiers.each() {
        let played = PLAYED.saturating_sub(hosts.begun.elapsed());
        passed += eventually(played, || console(hosts, program))?;
    }
    for program in &tiers.leaves {
        passed += eventually(Duration::ZERO, || recorded(program, how.each))?;
    }
    let left = CHECKED.saturating_sub(hosts.begun.elapsed());
    passed += eventually(left, || verdict(hosts, tiers))?;
    if tiers.top.is_some() {
        passed += eventually(Duration::ZERO, || federated(hosts, tiers, how.each))?;
    }
    println!("{passed} passed, 0 failed");
    Ok(ExitCode::SUCCESS)
}

/// Demand that Prometheus's own page shows its hosts, the VM that lacks a CPU most, and what graphs are drawn from.
fn console(hosts: &Hosts, program: &Prometheus) -> Result<u64> {
    let Some(page) = program.console()? else {
        return Ok(0);
    };
    let name = program.name();
    // Where a template fails, the page ends, or has these words in place of a value.
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
        // vCPUs, exits and steal.
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
    // Debian's prom.lib names two more, which Debian does not have: graphs are drawn without them.
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

/// Demand that each rule has written what its expression gives.
fn recorded(program: &Prometheus, each: u64) -> Result<u64> {
    let mut series = 0;
    let groups = program.groups()?;
    let records: Vec<_> = groups.iter().flat_map(|group| &group.records).collect();
    ensure!(records.len() > 6, "{} has the rules", program.name());
    for rule in records.iter().copied() {
        let name = &rule.name;
        let stored = program.stored(&format!("{name}[{}s]", 6 * each), now()?)?;
        // VictoriaMetrics has no samples that are no number, and vmalert ends a series at a time of its own.
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
        agrees(program, rule, last, each, &written)?;
        series += written.len();
    }
    println!(
        "ok: {}: the {} rules have written the {series} series that their expressions give",
        program.name(),
        records.len()
    );
    Ok(1)
}

/// Demand that a rule has written at a moment what its expression gives there, or gave a few scrapes before.
///
/// VictoriaMetrics shows a sample only a while after it has taken it, so vmalert did not see the last ones, and VMs come and go.
/// So each series that there was all the while is written, none that there never was, and none has a value that is far from each
/// that its expression gave.
fn agrees(
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
        let values = values.with_context(|| format!("{name}{labels}: nothing gives it"))?;
        ensure!(
            values
                .iter()
                .any(|value| (written - value).abs() <= 0.1 * value.abs()),
            "{name}{labels} is {written}, and its expression gives {values:?}"
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
    ensure!(count > 0, "{name}: its expression gives nothing for long");
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

/// Demand that the top has all that it is to take, and no more.
fn federated(hosts: &Hosts, tiers: &Tiers, each: u64) -> Result<u64> {
    let series = tiers.compare(now()?, each)?;
    println!("ok: the top has the {series} series that it takes from the leaves, each sample as they have it");
    let top = tiers.all();
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
            "{}: {found} hosts on the top, and not {read}",
            rule.name
        );
    }
    println!("ok: each rule has a result on the top for each host whose meter can be read");
    Ok(2)
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

/// Demand that each panel of the boards has data for the host and the VM whose VMM works most, and on a top each of the fleet's board.
fn panels(tiers: &Tiers) -> Result<u64> {
    let mut passed = 0;
    let user = "topk(1, sum by (instance, vm) (rate(exitmeter_user_seconds_total[1m])) and on (instance, vm) exitmeter_vm_info)";
    for program in &tiers.leaves {
        passed += panels_of(program, &BOARDS, user)?;
    }
    if let Some(top) = &tiers.top {
        // It has no VM by these, and the board of the fleet needs none.
        passed += panels_of(top, &BOARDS[..1], "topk(1, vm:exitmeter_user:ratio_rate5m)")?;
    }
    Ok(passed)
}

/// Demand that each panel of boards has data, for the host and the VM that a query gives.
fn panels_of(prometheus: &Prometheus, boards: &[Board], query: &str) -> Result<u64> {
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

/// Return how many things hold: all of them.
fn verdict(hosts: &Hosts, tiers: &Tiers) -> Result<u64> {
    let mut passed = 0;
    // To the last exit: what the recordings have, as often as they were played.
    let mut all = 0;
    for host in 0..hosts.count {
        let instance = hosts.instance(host);
        let query = format!("sum(exitmeter_host_exits_total{{instance=\"{instance}\"}})");
        let found = tiers.of_host(host).query(&query)?;
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
    let mut found = 0.0;
    for leaf in &tiers.leaves {
        let sum = leaf.query("sum(exitmeter_host_exits_total)")?;
        found += sum.iter().map(|(_, value)| *value).sum::<f64>();
    }
    ensure!(found == all as f64, "{found}, and not {all}");
    println!(
        "ok: the sum over {} hosts is {all} exits, to the last one",
        hosts.count
    );

    let firing = tiers.all().query("ALERTS{alertstate=\"firing\"}")?;
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
