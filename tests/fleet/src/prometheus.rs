// SPDX-License-Identifier: GPL-2.0

//! Debian's Prometheus, and what is used in its place.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context as _, Result};
use serde_json::Value;

/// The rules that are delivered.
pub const RULES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../packaging/prometheus/exitmeter.rules.yml"
);

/// The folder of the console that is delivered.
const CONSOLES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../packaging/prometheus/consoles"
);

/// The path of the console on a Prometheus.
pub const CONSOLE: &str = "/consoles/exitmeter.html";

/// How long it may take to begin.
const READY: Duration = Duration::from_secs(30);

/// Return the folder of Debian's programs, and fetch them at first.
///
/// # Errors
///
/// When they cannot be fetched.
pub fn programs() -> Result<PathBuf> {
    Ok(unpacked(&[])?.join("usr/bin"))
}

/// Return the folder into which Debian's packages are unpacked, and do that at first, with options of scripts/prometheus.sh.
fn unpacked(options: &[&str]) -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(home?.join(".cache")));
    let folder = cache
        .context("HOME is not set")?
        .join("exitmeter/prometheus");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/prometheus.sh");
    let status = Command::new(script).args(options).arg(&folder).status();
    ensure!(
        status
            .with_context(|| format!("{script} cannot be run"))?
            .success(),
        "Debian's Prometheus could not be fetched"
    );
    Ok(folder)
}

/// Which program scrapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Prometheus, with the rules.
    Prometheus,
    /// Prometheus without rules.
    PrometheusWithoutRules,
    /// VictoriaMetrics on one machine, and vmalert, which evaluates the rules for it.
    VictoriaMetrics,
    /// VictoriaMetrics on one machine alone.
    VictoriaMetricsWithoutRules,
}

impl Engine {
    /// Return the program's name.
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

/// How it scrapes.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Which program.
    pub engine: Engine,
    /// Seconds from one scrape to the next, and from one evaluation of the rules to the next.
    pub each: u64,
    /// Whether it goes as in a fleet: alerts wait for as long as their rules say, and groups of rules have their own intervals.
    pub waits: bool,
}

/// What a program took.
#[derive(Clone, Debug)]
pub struct Cost {
    /// The program.
    pub name: String,
    /// Series, where it has some.
    pub series: Option<f64>,
    /// Bytes of memory.
    pub memory: f64,
    /// Seconds of a CPU since it began.
    pub cpu: f64,
}

/// A rule that writes series.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The name of the series.
    pub name: String,
    /// What it evaluates.
    pub query: String,
}

/// A group of rules.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Seconds from one evaluation to the next.
    pub interval: f64,
    /// Seconds that an evaluation of all its rules took by the clock: the last one, or of vmalert half of the last ones.
    pub took: f64,
    /// Evaluations that were left out because the one before took too long.
    pub missed: f64,
    /// Those of its rules that write series.
    pub records: Vec<Rule>,
}

/// The labels of a series.
pub type Labels = Value;

/// Prometheus or VictoriaMetrics, as long as it is to run.
#[derive(Debug)]
pub struct Prometheus {
    engine: Engine,
    scrapes: Program,
    /// vmalert.
    alerts: Option<Program>,
}

impl Prometheus {
    /// Start it in a folder, with a part `scrape_configs` of its configuration.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn start(folder: &Path, name: &str, how: How, scrapes: &str) -> Result<Self> {
        let How { engine, each, .. } = how;
        fs::create_dir_all(folder)?;
        let rules = folder.join("rules.yml");
        if engine.has_rules() {
            fs::write(&rules, self::rules(how)?)?;
        }
        let mut config =
            format!("global: {{scrape_interval: {each}s, evaluation_interval: {each}s}}\n");
        if engine == Engine::Prometheus {
            config += "rule_files: [rules.yml]\n";
        }
        if engine.is_victoria() {
            // It has no rules, and refuses to be told of them.
            config = format!("global: {{scrape_interval: {each}s}}\n");
        }
        let file = folder.join("prometheus.yml");
        fs::write(&file, config + scrapes)?;
        let (file, data) = (file.display(), folder.join("data"));
        let data = data.display();
        if !engine.is_victoria() {
            let scrapes = Program::start(folder, name, "prometheus", |address| {
                vec![
                    format!("--config.file={file}"),
                    format!("--storage.tsdb.path={data}"),
                    format!("--web.listen-address={address}"),
                    format!("--web.console.templates={CONSOLES}"),
                    // Where Debian has them, in the package's documentation.
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
        let scrapes = Program::start(folder, name, "victoria-metrics", |address| {
            let mut arguments = vec![
                format!("-promscrape.config={file}"),
                format!("-storageDataPath={data}"),
                format!("-httpListenAddr={address}"),
            ];
            if !how.waits {
                // It tells of half a minute ago, else.
                arguments.push("-search.latencyOffset=0s".to_owned());
            }
            arguments
        })?;
        let mut alerts = None;
        if engine.has_rules() {
            // It wants to be told whom it tells of alerts: nobody.
            let notifier = folder.join("notifier.yml");
            fs::write(&notifier, "static_configs: []\n")?;
            let url = scrapes.url();
            let vmalert = Program::start(folder, "vmalert", "vmalert", |address| {
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

    /// Return where it can be looked at.
    pub fn url(&self) -> String {
        self.scrapes.url()
    }

    /// Return where its alerts and rules can be looked at.
    pub fn url_of_alerts(&self) -> String {
        let program = self.alerts.as_ref().unwrap_or(&self.scrapes);
        // Debian's Prometheus has the pages of before React alone.
        let is_classic = get(program.address, "/classic/alerts").is_ok();
        program.url() + if is_classic { "/classic" } else { "" }
    }

    /// Return the console's text. VictoriaMetrics has none.
    ///
    /// # Errors
    ///
    /// When Prometheus does not answer with it.
    pub fn console(&self) -> Result<Option<String>> {
        if self.engine.is_victoria() {
            return Ok(None);
        }
        get(self.scrapes.address, CONSOLE).map(Some)
    }

    /// Demand that it serves a file of its pages.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn serves(&self, path: &str) -> Result<()> {
        ensure!(
            !get(self.scrapes.address, path)?.is_empty(),
            "{path} is empty"
        );
        Ok(())
    }

    /// Return its address.
    pub fn address(&self) -> SocketAddr {
        self.scrapes.address
    }

    /// Return its name.
    pub fn name(&self) -> &str {
        &self.scrapes.name
    }

    /// Return what each of its programs has taken up to now, as they tell themselves.
    ///
    /// # Errors
    ///
    /// When one does not.
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

    /// Return the groups of rules that are evaluated.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn groups(&self) -> Result<Vec<Group>> {
        let program = self.alerts.as_ref().unwrap_or(&self.scrapes);
        let answer: Value = serde_json::from_str(&get(program.address, "/api/v1/rules")?)?;
        let groups = answer["data"]["groups"].as_array().context("no groups")?;
        let metrics = get(program.address, "/metrics")?;
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
                    // vmalert has no times before the first evaluation.
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

    /// Return the result of a query at a moment (seconds since 1970), or now.
    fn result(&self, query: &str, at: Option<f64>) -> Result<Vec<Value>> {
        // VictoriaMetrics takes new samples into account then.
        let mut path = "/api/v1/query?nocache=1&query=".to_owned();
        for byte in query.bytes() {
            write!(path, "%{byte:02X}")?;
        }
        if let Some(at) = at {
            write!(path, "&time={at:.3}")?;
        }
        let mut answer: Value = serde_json::from_str(&get(self.scrapes.address, &path)?)?;
        match answer["data"]["result"].take() {
            Value::Array(result) => Ok(result),
            _ => bail!("{query}: {answer}"),
        }
    }

    /// Return the samples of a query: the labels, and the value.
    ///
    /// # Errors
    ///
    /// When Prometheus does not answer it.
    pub fn query(&self, query: &str) -> Result<Vec<(Labels, f64)>> {
        self.query_at(query, None)
    }

    /// Return the samples of a query at a moment (seconds since 1970), or now.
    ///
    /// # Errors
    ///
    /// When Prometheus does not answer it.
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

    /// Return the samples as they are stored, for each series of a selector with a range: the time and the value, as text.
    ///
    /// # Errors
    ///
    /// When Prometheus does not answer it.
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

/// Return the rules as they are to be evaluated.
fn rules(how: How) -> Result<String> {
    let rules = fs::read_to_string(RULES)?;
    if how.waits {
        return Ok(rules);
    }
    // Who looks on has no half hour.
    let lines = rules.lines().map(|line| match line.trim_start() {
        part if part.starts_with("for: ") => "        for: 0s\n".to_owned(),
        part if part.starts_with("interval: ") => format!("    interval: {}s\n", how.each),
        _ => format!("{line}\n"),
    });
    Ok(lines.collect())
}

/// A program that serves HTTP, as long as it is to run.
#[derive(Debug)]
struct Program {
    name: String,
    process: Child,
    address: SocketAddr,
}

impl Program {
    /// Start one of Debian's programs, with arguments for the address at which it is to serve, and wait until it does.
    fn start(
        folder: &Path,
        name: &str,
        program: &str,
        arguments: impl FnOnce(SocketAddr) -> Vec<String>,
    ) -> Result<Self> {
        // Nobody else takes it in this moment, or the program says so.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let path = folder.join(format!("{program}.log"));
        let log = File::create(&path)?;
        let run = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../scripts/prometheus-run.sh"
        );
        let folder_of_programs = unpacked(&[])?;
        unpacked(&["--pages"])?;
        let process = with_us(Path::new(run))
            .arg(&folder_of_programs)
            .arg(program)
            .args(arguments(address))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{program} cannot be run"))?;
        let mut started = Self {
            name: name.to_owned(),
            process,
            address,
        };
        let begun = Instant::now();
        while get(address, "/-/healthy").is_err() {
            let ended = started.process.try_wait()?;
            if ended.is_some() || begun.elapsed() > READY {
                let log = fs::read_to_string(path).unwrap_or_default();
                bail!("{program} does not start: {log}");
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(started)
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Return what it has taken, and how many series it has by a metric of its own.
    fn cost(&self, series: Option<&str>) -> Result<Cost> {
        let text = get(self.address, "/metrics")?;
        let value = |name: &str| -> Result<f64> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let value = line.with_context(|| format!("{} does not tell {name}", self.name))?;
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

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Prepare to run a program that ends when this one does, however that ends.
fn with_us(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Return the body of an answer.
fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(READY))?;
    // Of this version an answer comes in one piece.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.contains(" 200 "), "{path}: {head}\n{body}");
    Ok(body.to_owned())
}
