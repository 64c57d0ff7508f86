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

/// Seconds from one scrape to the next, and from one evaluation of the rules to the next.
const EACH: u32 = 2;

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

/// Prometheus, as long as it is to run.
#[derive(Debug)]
pub struct Prometheus {
    process: Child,
    address: SocketAddr,
}

impl Prometheus {
    /// Start it in a folder, on hosts that are served at an address. Alerts do not wait: who looks on has no half hour.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn start(folder: &Path, hosts: &Hosts, served: SocketAddr) -> Result<Self> {
        let rules = fs::read_to_string(RULES)?;
        let rules: String = rules.lines().fold(String::new(), |mut all, line| {
            match line.trim_start().starts_with("for: ") {
                true => all.push_str("        for: 0s\n"),
                false => {
                    all.push_str(line);
                    all.push('\n');
                }
            }
            all
        });
        fs::write(folder.join("rules.yml"), rules)?;
        let mut config = format!(
            "global: {{scrape_interval: {EACH}s, evaluation_interval: {EACH}s}}\n\
             rule_files: [rules.yml]\nscrape_configs:\n- job_name: exitmeter\n  static_configs:\n"
        );
        for host in 0..hosts.count {
            let instance = hosts.instance(host);
            writeln!(
                config,
                "  - targets: ['{served}']\n    labels: {{instance: {instance}, __metrics_path__: /host/{host}/metrics}}"
            )?;
        }
        fs::write(folder.join("prometheus.yml"), config)?;
        // Nobody else takes it in this moment, or Prometheus says so.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let log = File::create(folder.join("prometheus.log"))?;
        let mut process = Command::new(programs()?.join("prometheus"))
            .arg(format!(
                "--config.file={}",
                folder.join("prometheus.yml").display()
            ))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("Prometheus cannot be run")?;
        let begun = Instant::now();
        while get(address, "/-/ready").is_err() {
            let ended = process.try_wait()?;
            if ended.is_some() || begun.elapsed() > READY {
                let _ = process.kill();
                let log = fs::read_to_string(folder.join("prometheus.log")).unwrap_or_default();
                bail!("Prometheus does not start: {log}");
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(Self { process, address })
    }

    /// Return where it can be looked at.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
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
