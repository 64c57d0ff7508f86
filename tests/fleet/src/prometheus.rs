// SPDX-License-Identifier: GPL-2.0

//! Debian's Prometheus on the hosts of this fleet.

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

use crate::hosts::Hosts;

/// The rules that are delivered.
pub const RULES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../packaging/prometheus/exitmeter.rules.yml"
);

/// How long it may take to begin.
const READY: Duration = Duration::from_secs(30);

/// Return the folder of Debian's programs, and fetch them at first.
///
/// # Errors
///
/// When they cannot be fetched.
pub fn programs() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(home?.join(".cache")));
    let folder = cache
        .context("HOME is not set")?
        .join("exitmeter/prometheus");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/prometheus.sh");
    let status = Command::new(script).arg(&folder).status();
    ensure!(
        status
            .with_context(|| format!("{script} cannot be run"))?
            .success(),
        "Debian's Prometheus could not be fetched"
    );
    Ok(folder.join("usr/bin"))
}

/// Which program scrapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// Prometheus, with the rules.
    Prometheus,
    /// Prometheus without rules.
    PrometheusWithoutRules,
    /// VictoriaMetrics on one machine, which has no rules of its own.
    VictoriaMetrics,
}

/// How it scrapes.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Which program.
    pub engine: Engine,
    /// Seconds from one scrape to the next, and from one evaluation of the rules to the next.
    pub each: u64,
    /// Whether alerts wait for as long as their rules say.
    pub waits: bool,
}

/// What it took.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Series.
    pub series: f64,
    /// Bytes of memory.
    pub memory: f64,
    /// Seconds of a CPU since it began.
    pub cpu: f64,
}

/// Prometheus, as long as it is to run.
#[derive(Debug)]
pub struct Prometheus {
    engine: Engine,
    process: Child,
    address: SocketAddr,
}

impl Prometheus {
    /// Start it in a folder, on hosts that are served at an address.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn start(folder: &Path, hosts: &Hosts, served: SocketAddr, how: How) -> Result<Self> {
        let (engine, each) = (how.engine, how.each);
        let mut config = format!("global: {{scrape_interval: {each}s}}\n");
        if engine == Engine::Prometheus {
            let rules = fs::read_to_string(RULES)?;
            let rules = rules.lines().map(|line| match line.trim_start() {
                line if line.starts_with("for: ") && !how.waits => "        for: 0s\n".to_owned(),
                _ => format!("{line}\n"),
            });
            fs::write(folder.join("rules.yml"), rules.collect::<String>())?;
            config = format!(
                "global: {{scrape_interval: {each}s, evaluation_interval: {each}s}}\nrule_files: [rules.yml]\n"
            );
        }
        config += "scrape_configs:\n- job_name: exitmeter\n  static_configs:\n";
        for host in 0..hosts.count {
            let instance = hosts.instance(host);
            writeln!(
                config,
                "  - targets: ['{served}']\n    labels: {{instance: {instance}, __metrics_path__: /host/{host}/metrics}}"
            )?;
        }
        let file = folder.join("prometheus.yml");
        fs::write(&file, config)?;
        let (file, data) = (file.display(), folder.join("data"));
        // Nobody else takes it in this moment, or Prometheus says so.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let log = File::create(folder.join("prometheus.log"))?;
        let programs = programs()?;
        let mut command;
        if engine == Engine::VictoriaMetrics {
            command = with_us(&programs.join("victoria-metrics"));
            command
                .arg(format!("-promscrape.config={file}"))
                .arg(format!("-storageDataPath={}", data.display()))
                .arg(format!("-httpListenAddr={address}"));
        } else {
            command = with_us(&programs.join("prometheus"));
            command
                .arg(format!("--config.file={file}"))
                .arg(format!("--storage.tsdb.path={}", data.display()))
                .arg(format!("--web.listen-address={address}"));
        }
        let mut process = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("Prometheus cannot be run")?;
        let begun = Instant::now();
        while get(address, "/-/healthy").is_err() {
            let ended = process.try_wait()?;
            if ended.is_some() || begun.elapsed() > READY {
                let _ = process.kill();
                let log = fs::read_to_string(folder.join("prometheus.log")).unwrap_or_default();
                bail!("Prometheus does not start: {log}");
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(Self {
            engine,
            process,
            address,
        })
    }

    /// Return where it can be looked at.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Return what it has taken up to now, as it tells itself.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn cost(&self) -> Result<Cost> {
        let text = get(self.address, "/metrics")?;
        let value = |name: &str| -> Result<f64> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let value = line.with_context(|| format!("it does not tell {name}"))?;
            Ok(value.parse()?)
        };
        let series = match self.engine {
            Engine::VictoriaMetrics => "vm_cache_entries{type=\"storage/hour_metric_ids\"}",
            _ => "prometheus_tsdb_head_series",
        };
        Ok(Cost {
            series: value(series)?,
            memory: value("process_resident_memory_bytes")?,
            cpu: value("process_cpu_seconds_total")?,
        })
    }

    /// Return the samples of a query: the labels, and the value.
    ///
    /// # Errors
    ///
    /// When Prometheus does not answer it.
    pub fn query(&self, query: &str) -> Result<Vec<(Value, f64)>> {
        let mut path = "/api/v1/query?query=".to_owned();
        for byte in query.bytes() {
            write!(path, "%{byte:02X}")?;
        }
        let answer: Value = serde_json::from_str(&get(self.address, &path)?)?;
        let samples = answer["data"]["result"].as_array();
        let samples = samples.with_context(|| format!("{query}: {answer}"))?;
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
}

impl Drop for Prometheus {
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
