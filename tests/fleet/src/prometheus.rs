// SPDX-License-Identifier: GPL-2.0

//! Runs Debian's Prometheus, or VictoriaMetrics in its place.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use exitmeter::stop::Stop;
use rustix::process::{kill_process_group, Pid, Signal};
use serde_json::Value;

/// File of the rules in the packages.
pub const RULES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../packaging/prometheus/exitmeter.rules.yml"
);

/// Folder of the console in the packages.
const CONSOLES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../packaging/prometheus/consoles"
);

/// Path of the console on a Prometheus server.
pub const CONSOLE: &str = "/consoles/exitmeter.html";

/// Time limit for a program to start, and for an answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Interval at which a wait for a program or for an answer checks for a signal.
const TICK: Duration = Duration::from_millis(50);

/// Return the folder of Debian's programs. The first call fetches them.
///
/// # Errors
///
/// The programs cannot be fetched, or a signal has come.
pub fn programs(stop: &Stop) -> Result<PathBuf> {
    Ok(unpacked(&[], stop)?.join("usr/bin"))
}

/// Unpack Debian's packages with scripts/prometheus.sh and these options, unless they are there, and return the folder.
fn unpacked(options: &[&str], stop: &Stop) -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(home?.join(".cache")));
    let folder = cache
        .context("HOME is not set")?
        .join("exitmeter/prometheus");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/prometheus.sh");
    let mut process = Command::new(script)
        .args(options)
        .arg(&folder)
        // The script's processes can be ended together.
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {script}"))?;
    let status = loop {
        if let Some(status) = process.try_wait()? {
            break status;
        }
        if let Err(stopped) = stop.pause(TICK) {
            // The script removes its temporary folder. The signal fails only if the processes are gone already.
            let _ = kill_process_group(Pid::from_child(&process), Signal::TERM);
            process.wait()?;
            return Err(stopped.into());
        }
    };
    ensure!(status.success(), "cannot fetch Debian's Prometheus");
    Ok(folder)
}

/// Program that scrapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Prometheus, with the rules.
    Prometheus,
    /// Prometheus without rules.
    PrometheusWithoutRules,
    /// VictoriaMetrics on one machine, with vmalert, which evaluates the rules.
    VictoriaMetrics,
    /// VictoriaMetrics on one machine, without vmalert.
    VictoriaMetricsWithoutRules,
}

impl Engine {
    /// Return the name of the program.
    pub fn name(self) -> &'static str {
        if self.is_victoria() {
            "VictoriaMetrics"
        } else {
            "Prometheus"
        }
    }

    fn is_victoria(self) -> bool {
        matches!(
            self,
            Self::VictoriaMetrics | Self::VictoriaMetricsWithoutRules
        )
    }

    /// Return true if the rules are evaluated.
    pub fn has_rules(self) -> bool {
        matches!(self, Self::VictoriaMetrics | Self::Prometheus)
    }
}

/// Options of a server.
#[derive(Clone, Copy, Debug)]
pub struct ScrapeOptions {
    /// Program to run.
    pub engine: Engine,
    /// Interval of scrapes and of evaluations of the rules, in seconds.
    pub each: u64,
    /// True if alerts wait for as long as their rules say, and groups of rules keep their own intervals, as in a real fleet.
    pub real_waits: bool,
}

/// Resources that a program has taken.
#[derive(Clone, Debug)]
pub struct Cost {
    /// Name of the program.
    pub name: String,
    /// Number of series; `None` for vmalert, which has none.
    pub series: Option<f64>,
    /// Memory, in bytes.
    pub memory: f64,
    /// CPU time since the program began, in seconds.
    pub cpu: f64,
}

/// A recording rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Name of the series that it writes.
    pub name: String,
    /// Expression that it evaluates.
    pub query: String,
}

/// A group of rules.
#[derive(Clone, Debug)]
pub struct Group {
    /// Name of the group.
    pub name: String,
    /// Interval of evaluations, in seconds.
    pub interval: f64,
    /// Duration of an evaluation of all its rules, in seconds: the latest one, or with vmalert the median of the latest ones.
    pub took: f64,
    /// Number of evaluations that were skipped because the one before took too long.
    pub missed: f64,
    /// Recording rules of the group.
    pub records: Vec<Rule>,
}

/// Labels of a series.
pub type Labels = Value;

/// A running Prometheus or VictoriaMetrics. It ends when this is dropped.
#[derive(Debug)]
pub struct Prometheus {
    engine: Engine,
    scrapes: Server,
    /// The process of vmalert, if there is one.
    alerts: Option<Server>,
}

impl Prometheus {
    /// Start a server in a folder. `scrapes` is the part `scrape_configs` of its configuration.
    ///
    /// # Errors
    ///
    /// The server does not start, or a signal has come.
    pub fn start(
        folder: &Path,
        name: &str,
        options: ScrapeOptions,
        scrapes: &str,
        stop: &Stop,
    ) -> Result<Self> {
        let ScrapeOptions { engine, each, .. } = options;
        fs::create_dir_all(folder)?;
        let rules = folder.join("rules.yml");
        if engine.has_rules() {
            fs::write(&rules, self::rules(options)?)?;
        }
        let mut config =
            format!("global: {{scrape_interval: {each}s, evaluation_interval: {each}s}}\n");
        if engine == Engine::Prometheus {
            config += "rule_files: [rules.yml]\n";
        }
        if engine.is_victoria() {
            // VictoriaMetrics has no rules, and refuses a configuration that names them.
            config = format!("global: {{scrape_interval: {each}s}}\n");
        }
        let file = folder.join("prometheus.yml");
        fs::write(&file, config + scrapes)?;
        let (file, data) = (file.display(), folder.join("data"));
        let data = data.display();
        if !engine.is_victoria() {
            let scrapes = Server::start(folder, name, "prometheus", stop, |address| {
                vec![
                    format!("--config.file={file}"),
                    format!("--storage.tsdb.path={data}"),
                    format!("--web.listen-address={address}"),
                    format!("--web.console.templates={CONSOLES}"),
                    // Debian has the libraries in the package's documentation.
                    "--web.console.libraries=/usr/share/doc/prometheus/examples/console_libraries"
                        .to_owned(),
                ]
            })?;
            return Ok(Self {
                engine,
                scrapes,
                alerts: None,
            });
        }
        let scrapes = Server::start(folder, name, "victoria-metrics", stop, |address| {
            let mut arguments = vec![
                format!("-promscrape.config={file}"),
                format!("-storageDataPath={data}"),
                format!("-httpListenAddr={address}"),
            ];
            if !options.real_waits {
                // Otherwise answers are half a minute old.
                arguments.push("-search.latencyOffset=0s".to_owned());
            }
            arguments
        })?;
        let mut alerts = None;
        if engine.has_rules() {
            // vmalert insists on a configuration of notifiers; this one names none.
            let notifier = folder.join("notifier.yml");
            fs::write(&notifier, "static_configs: []\n")?;
            let url = scrapes.url();
            let vmalert = Server::start(folder, "vmalert", "vmalert", stop, |address| {
                vec![
                    format!("-rule={}", rules.display()),
                    format!("-datasource.url={url}"),
                    format!("-remoteWrite.url={url}"),
                    format!("-notifier.config={}", notifier.display()),
                    format!("-evaluationInterval={each}s"),
                    format!("-httpListenAddr={address}"),
                ]
            });
            alerts = Some(vmalert?);
        }
        Ok(Self {
            engine,
            scrapes,
            alerts,
        })
    }

    /// Return the URL of the server.
    pub fn url(&self) -> String {
        self.scrapes.url()
    }

    /// Return the base URL of the pages of alerts and rules.
    pub fn url_of_alerts(&self) -> String {
        let program = self.alerts.as_ref().unwrap_or(&self.scrapes);
        // Debian's Prometheus has only the classic pages, from before React.
        let is_classic = program.get("/classic/alerts").is_ok();
        program.url() + if is_classic { "/classic" } else { "" }
    }

    /// Return the text of the console; `None` from VictoriaMetrics, which has no consoles.
    ///
    /// # Errors
    ///
    /// Prometheus does not serve it.
    pub fn console(&self) -> Result<Option<String>> {
        if self.engine.is_victoria() {
            return Ok(None);
        }
        self.scrapes.get(CONSOLE).map(Some)
    }

    /// Check that the server serves a file of its pages.
    ///
    /// # Errors
    ///
    /// The server does not serve the file, or it is empty.
    pub fn serves(&self, path: &str) -> Result<()> {
        ensure!(!self.scrapes.get(path)?.is_empty(), "{path} is empty");
        Ok(())
    }

    /// Return the address of the server.
    pub fn address(&self) -> SocketAddr {
        self.scrapes.address
    }

    /// Return the name of the server.
    pub fn name(&self) -> &str {
        &self.scrapes.name
    }

    /// Return the resources that each of the server's programs has taken so far, from their own metrics.
    ///
    /// # Errors
    ///
    /// A program does not answer, or lacks a metric.
    pub fn costs(&self) -> Result<Vec<Cost>> {
        let series = if self.engine.is_victoria() {
            "vm_cache_entries{type=\"storage/hour_metric_ids\"}"
        } else {
            "prometheus_tsdb_head_series"
        };
        let mut costs = vec![self.scrapes.cost(Some(series))?];
        if let Some(alerts) = &self.alerts {
            costs.push(alerts.cost(None)?);
        }
        Ok(costs)
    }

    /// Return the groups of rules.
    ///
    /// # Errors
    ///
    /// There is no answer, or it has no groups.
    pub fn groups(&self) -> Result<Vec<Group>> {
        let program = self.alerts.as_ref().unwrap_or(&self.scrapes);
        let answer: Value = serde_json::from_str(&program.get("/api/v1/rules")?)?;
        let groups = answer["data"]["groups"].as_array().context("no groups")?;
        let metrics = program.get("/metrics")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        groups
            .iter()
            .map(|group| {
                let rules = group["rules"].as_array().context("no rules")?;
                let name = text(&group["name"]);
                let (label, took, missed) = if self.alerts.is_some() {
                    let label = format!("{{group=\"{name}\"");
                    let took = ["vmalert_iteration_duration_seconds{", "quantile=\"0.5\""];
                    (label, took, "vmalert_iteration_missed_total{")
                } else {
                    let label = format!(";{name}\"}}");
                    let took = ["prometheus_rule_group_last_duration_seconds{", ""];
                    let missed = "prometheus_rule_group_iterations_missed_total{";
                    (label, took, missed)
                };
                let value = |parts: [&str; 2]| -> Result<f64> {
                    let mut lines = metrics.lines();
                    let line = lines.find(|line| {
                        line.starts_with(parts[0])
                            && line.contains(&label)
                            && line.contains(parts[1])
                    });
                    // vmalert has no durations before the first evaluation.
                    let value = line.and_then(|line| line.rsplit(' ').next());
                    Ok(value.map_or(Ok(0.0), str::parse)?)
                };
                let records = rules.iter().filter(|rule| rule["type"] == "recording");
                let records = records.map(|rule| Rule {
                    name: text(&rule["name"]),
                    query: text(&rule["query"]),
                });
                Ok(Group {
                    interval: group["interval"].as_f64().context("no interval")?,
                    took: value(took)?,
                    missed: value([missed, ""])?,
                    name,
                    records: records.collect(),
                })
            })
            .collect()
    }

    /// Return the raw result of a query at a moment (seconds since 1970), or now.
    fn result(&self, query: &str, at: Option<f64>) -> Result<Vec<Value>> {
        // With nocache, VictoriaMetrics takes new samples into account.
        let mut path = "/api/v1/query?nocache=1&query=".to_owned();
        for byte in query.bytes() {
            write!(path, "%{byte:02X}")?;
        }
        if let Some(at) = at {
            write!(path, "&time={at:.3}")?;
        }
        let mut answer: Value = serde_json::from_str(&self.scrapes.get(&path)?)?;
        match answer["data"]["result"].take() {
            Value::Array(result) => Ok(result),
            _ => bail!("{query}: {answer}"),
        }
    }

    /// Return the samples of a query, each with labels and value.
    ///
    /// # Errors
    ///
    /// Prometheus does not answer the query.
    pub fn query(&self, query: &str) -> Result<Vec<(Labels, f64)>> {
        self.query_at(query, None)
    }

    /// Return the samples of a query at a moment (seconds since 1970), or now.
    ///
    /// # Errors
    ///
    /// Prometheus does not answer the query.
    pub fn query_at(&self, query: &str, at: Option<f64>) -> Result<Vec<(Labels, f64)>> {
        let samples = self.result(query, at)?;
        samples
            .iter()
            .map(|sample| {
                let value = sample["value"][1]
                    .as_str()
                    .and_then(|value| value.parse().ok());
                let value = value.with_context(|| format!("{query}: {sample}"))?;
                Ok((sample["metric"].clone(), value))
            })
            .collect()
    }

    /// Return the stored samples of each series of a range selector: pairs of the time and the value, which is text.
    ///
    /// # Errors
    ///
    /// Prometheus does not answer the query.
    pub fn stored(&self, selector: &str, at: f64) -> Result<Vec<(Labels, Vec<Value>)>> {
        let series = self.result(selector, Some(at))?;
        series
            .into_iter()
            .map(|mut series| match series["values"].take() {
                Value::Array(values) => Ok((series["metric"].take(), values)),
                _ => bail!("{selector}: {series}"),
            })
            .collect()
    }
}

/// Return the text of the rules, without waits unless the options ask for them.
fn rules(options: ScrapeOptions) -> Result<String> {
    let rules = fs::read_to_string(RULES)?;
    if options.real_waits {
        return Ok(rules);
    }
    // Nobody who watches wants to wait half an hour for an alert.
    let lines = rules.lines().map(|line| match line.trim_start() {
        part if part.starts_with("for: ") => "        for: 0s\n".to_owned(),
        part if part.starts_with("interval: ") => format!("    interval: {}s\n", options.each),
        _ => format!("{line}\n"),
    });
    Ok(lines.collect())
}

/// A running program that serves HTTP. It ends when this is dropped.
#[derive(Debug)]
struct Server {
    name: String,
    process: Child,
    address: SocketAddr,
    stop: Stop,
}

impl Server {
    /// Start one of Debian's programs and wait until it serves. `arguments` returns its arguments, given the address to serve at.
    fn start(
        folder: &Path,
        name: &str,
        program: &str,
        stop: &Stop,
        arguments: impl FnOnce(SocketAddr) -> Vec<String>,
    ) -> Result<Self> {
        // If another process takes the port meanwhile, the program fails with an error.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let path = folder.join(format!("{program}.log"));
        let log = File::create(&path)?;
        let run = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../scripts/prometheus-run.sh"
        );
        let folder_of_programs = unpacked(&[], stop)?;
        unpacked(&["--pages"], stop)?;
        let process = command_that_ends_with_us(Path::new(run))
            .arg(&folder_of_programs)
            .arg(program)
            .args(arguments(address))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        let mut started = Self {
            name: name.to_owned(),
            process,
            address,
            stop: stop.clone(),
        };
        let begun = Instant::now();
        while started.get("/-/healthy").is_err() {
            stop.pause(TICK)?;
            let ended = started.process.try_wait()?;
            if ended.is_some() || begun.elapsed() > TIMEOUT {
                let log = fs::read_to_string(path).unwrap_or_default();
                bail!("{program} does not start: {log}");
            }
        }
        Ok(started)
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Send a GET request and return the body of the answer. Fail at once if a signal has come.
    fn get(&self, path: &str) -> Result<String> {
        self.stop.check()?;
        let begun = Instant::now();
        let address = self.address;
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(TICK))?;
        // With HTTP/1.0 the answer is not chunked.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        let mut answer = Vec::new();
        while let Err(error) = stream.read_to_end(&mut answer) {
            let is_late = begun.elapsed() > TIMEOUT;
            if error.kind() != io::ErrorKind::WouldBlock || is_late {
                return Err(error.into());
            }
            self.stop.check()?;
        }
        let answer = String::from_utf8(answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.contains(" 200 "), "{path}: {head}\n{body}");
        Ok(body.to_owned())
    }

    /// Return the resources that the program has taken. `series` names the metric that counts its series.
    fn cost(&self, series: Option<&str>) -> Result<Cost> {
        let text = self.get("/metrics")?;
        let value = |name: &str| -> Result<f64> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let value = line.with_context(|| format!("{} has no metric {name}", self.name))?;
            Ok(value.parse()?)
        };
        Ok(Cost {
            name: self.name.clone(),
            series: series.map(value).transpose()?,
            memory: value("process_resident_memory_bytes")?,
            cpu: value("process_cpu_seconds_total")?,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Return a command for a program that is killed when this process ends, in whatever way.
fn command_that_ends_with_us(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
