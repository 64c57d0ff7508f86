// SPDX-License-Identifier: GPL-2.0

//! Runs one Prometheus for all hosts, or two tiers of Prometheus servers.
//!
//! In two tiers each leaf scrapes its share of the hosts and evaluates the rules. The top scrapes the leaves, and takes only
//! what docs/fleet.md says: the results of the rules, the alerts, and two metrics of each host.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, ops::Range, path::Path};

use anyhow::{ensure, Context as _, Result};
use exitmeter::stop::Stop;
use serde_json::Value;

use crate::{
    hosts::Hosts,
    prometheus::{Engine, Labels, Prometheus, ScrapeOptions},
};

/// Selectors of the series that the top takes, the same as in docs/fleet.md.
pub const FEDERATED: [&str; 2] = [
    r#"{__name__=~".+:exitmeter_.+|exitmeter_up|exitmeter_vcpus"}"#,
    r#"ALERTS{alertname=~"Exitmeter.+"}"#,
];

/// The servers that scrape.
#[derive(Debug)]
pub struct Tiers {
    /// Servers that scrape hosts.
    pub leaves: Vec<Prometheus>,
    /// Server above the leaves, if there are two tiers.
    pub top: Option<Prometheus>,
    hosts: usize,
}

impl Tiers {
    /// Start the servers in a folder. `served` is the address of the hosts. With a number of leaves there are two tiers.
    ///
    /// # Errors
    ///
    /// A server does not start, the options do not fit leaves, or a signal has come.
    pub fn start(
        folder: &Path,
        hosts: &Hosts,
        served: SocketAddr,
        options: ScrapeOptions,
        leaves: Option<usize>,
        stop: &Stop,
    ) -> Result<Self> {
        let name = options.engine.name();
        let Some(count) = leaves else {
            let scrapes = scrape_hosts(hosts, 0..hosts.count, served)?;
            let one = Prometheus::start(folder, name, options, &scrapes, stop)?;
            return Ok(Self {
                leaves: vec![one],
                top: None,
                hosts: hosts.count,
            });
        };
        ensure!(
            options.engine == Engine::Prometheus,
            "--leaves needs the engine prometheus"
        );
        ensure!(count <= hosts.count, "there are more leaves than hosts");
        let leaves = (0..count).map(|leaf| {
            let name = format!("leaf {leaf}");
            let scrapes = scrape_hosts(hosts, share(leaf, count, hosts.count), served)?;
            let folder = folder.join(leaf.to_string());
            Prometheus::start(&folder, &name, options, &scrapes, stop)
        });
        let leaves: Vec<_> = leaves.collect::<Result<_>>()?;
        let scrapes = scrape_leaves(&leaves)?;
        let options = ScrapeOptions {
            engine: Engine::PrometheusWithoutRules,
            ..options
        };
        let top = Prometheus::start(&folder.join("top"), "top", options, &scrapes, stop)?;
        Ok(Self {
            leaves,
            top: Some(top),
            hosts: hosts.count,
        })
    }

    /// Return the server that has the results of all rules: the top, or the only one.
    pub fn top_or_only(&self) -> &Prometheus {
        self.top.as_ref().unwrap_or(&self.leaves[0])
    }

    /// Return all servers.
    pub fn servers(&self) -> impl Iterator<Item = &Prometheus> {
        self.leaves.iter().chain(&self.top)
    }

    /// Return the server that scrapes a host.
    pub fn server_of(&self, host: usize) -> &Prometheus {
        let count = self.leaves.len();
        let leaf = (0..count).find(|leaf| share(*leaf, count, self.hosts).contains(&host));
        &self.leaves[leaf.unwrap_or(0)]
    }

    /// Check that the top has exactly the samples of the leaves' series that it takes, and no other series. Return the number of
    /// series.
    ///
    /// # Errors
    ///
    /// The check fails, or there is one tier only.
    pub fn compare(&self, at: f64, each: u64) -> Result<usize> {
        let top = self.top.as_ref().context("one tier")?;
        // A sample of a leaf is on the top after one scrape, with its time on the leaf.
        let (long, late) = (20 * each, 3 * each);
        let mut on_leaves = BTreeMap::new();
        for leaf in &self.leaves {
            for taken in FEDERATED {
                for (labels, samples) in leaf.stored(&format!("{taken}[{long}s]"), at)? {
                    let before = on_leaves.insert(key(&labels), samples);
                    ensure!(before.is_none(), "two leaves have {labels}");
                }
            }
        }
        // The top's own series about its scrapes are not series of a leaf.
        let stored = top.stored(
            &format!(
                "{{__name__=~\".+\",__name__!=\"up\",__name__!~\"scrape_.*\"}}[{}s]",
                4 * each
            ),
            at,
        )?;
        let mut on_top = BTreeMap::new();
        for (labels, samples) in stored {
            let key = key(&labels);
            let of_leaf = on_leaves.get(&key);
            let of_leaf = of_leaf.with_context(|| format!("no leaf has {labels}"))?;
            for sample in &samples {
                ensure!(
                    of_leaf.contains(sample),
                    "{labels}: the top has {sample}, but the leaf does not"
                );
            }
            on_top.insert(key, samples);
        }
        for (key, samples) in &on_leaves {
            let last = samples
                .last()
                .and_then(|sample| sample[0].as_f64())
                .unwrap_or(0.0);
            ensure!(
                last < at - late as f64 || on_top.contains_key(key),
                "the top lacks {key}"
            );
        }
        ensure!(!on_top.is_empty(), "the top has nothing");
        Ok(on_top.len())
    }
}

/// Return the hosts that a leaf scrapes.
fn share(leaf: usize, leaves: usize, hosts: usize) -> Range<usize> {
    leaf * hosts / leaves..(leaf + 1) * hosts / leaves
}

/// Return the labels as on a leaf. The top adds its job to series that have none.
fn key(labels: &Labels) -> String {
    let mut labels = labels.clone();
    if labels["job"] == "exitmeter-rules" {
        if let Value::Object(labels) = &mut labels {
            labels.remove("job");
        }
    }
    labels.to_string()
}

fn scrape_hosts(hosts: &Hosts, range: Range<usize>, served: SocketAddr) -> Result<String> {
    let mut text = "scrape_configs:\n- job_name: exitmeter\n  static_configs:\n".to_owned();
    for host in range {
        let instance = hosts.instance(host);
        writeln!(
            text,
            "  - targets: ['{served}']\n    labels: {{instance: {instance}, __metrics_path__: /host/{host}/metrics}}"
        )?;
    }
    Ok(text)
}

/// Return the configuration of a top without its targets, the same as in docs/fleet.md.
pub fn federation() -> String {
    let [series, alerts] = FEDERATED;
    format!(
        "scrape_configs:
- job_name: exitmeter-rules
  honor_labels: true
  metrics_path: /federate
  params:
    match[]:
    - '{series}'
    - '{alerts}'
  static_configs:
"
    )
}

fn scrape_leaves(leaves: &[Prometheus]) -> Result<String> {
    let mut text = federation();
    for leaf in leaves {
        writeln!(text, "  - targets: ['{}']", leaf.address())?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_belongs_to_one_leaf() {
        for (leaves, hosts) in [(1, 9), (3, 9), (2, 9), (4, 9), (9, 9), (7, 300)] {
            let shares = (0..leaves).map(|leaf| share(leaf, leaves, hosts));
            let all: Vec<usize> = shares.clone().flatten().collect();
            assert_eq!(all, (0..hosts).collect::<Vec<_>>());
            assert!(shares.into_iter().all(|share| !share.is_empty()));
        }
    }
}
