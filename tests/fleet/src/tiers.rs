// SPDX-License-Identifier: GPL-2.0

//! One Prometheus for all hosts, or two tiers of them.
//!
//! In two tiers each leaf scrapes its share of the hosts and evaluates the rules. The top scrapes the leaves, and takes only
//! what docs/fleet.md says: the rules' results, the alerts, and two metrics of each host.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, ops::Range, path::Path};

use anyhow::{ensure, Context as _, Result};
use serde_json::Value;

use crate::{
    hosts::Hosts,
    prometheus::{Engine, How, Labels, Prometheus},
};

/// The selectors of what the top takes, as docs/fleet.md has them.
pub const TAKEN: [&str; 2] = [
    r#"{__name__=~".+:exitmeter_.+|exitmeter_up|exitmeter_vcpus"}"#,
    r#"ALERTS{alertname=~"Exitmeter.+"}"#,
];

/// The programs that scrape.
#[derive(Debug)]
pub struct Tiers {
    /// Those that scrape hosts.
    pub leaves: Vec<Prometheus>,
    /// The one above them, if there is one.
    pub top: Option<Prometheus>,
    hosts: usize,
}

impl Tiers {
    /// Start them in a folder, on hosts that are served at an address: in two tiers if there are to be leaves.
    ///
    /// # Errors
    ///
    /// When one does not start.
    pub fn start(
        folder: &Path,
        hosts: &Hosts,
        served: SocketAddr,
        how: How,
        leaves: Option<usize>,
    ) -> Result<Self> {
        let name = how.engine.name();
        let Some(count) = leaves else {
            let scrapes = of_hosts(hosts, 0..hosts.count, served)?;
            let one = Prometheus::start(folder, name, how, &scrapes)?;
            return Ok(Self {
                leaves: vec![one],
                top: None,
                hosts: hosts.count,
            });
        };
        ensure!(
            how.engine == Engine::Prometheus,
            "leaves are Prometheuses with the rules"
        );
        ensure!(count <= hosts.count, "each leaf takes a host");
        let leaves = (0..count).map(|leaf| {
            let name = format!("leaf {leaf}");
            let scrapes = of_hosts(hosts, share(leaf, count, hosts.count), served)?;
            Prometheus::start(&folder.join(leaf.to_string()), &name, how, &scrapes)
        });
        let leaves: Vec<_> = leaves.collect::<Result<_>>()?;
        let scrapes = of_leaves(&leaves)?;
        let how = How {
            engine: Engine::PrometheusWithoutRules,
            ..how
        };
        let top = Prometheus::start(&folder.join("top"), "top", how, &scrapes)?;
        Ok(Self {
            leaves,
            top: Some(top),
            hosts: hosts.count,
        })
    }

    /// Return the one that has the results of all rules.
    pub fn all(&self) -> &Prometheus {
        self.top.as_ref().unwrap_or(&self.leaves[0])
    }

    /// Return each of them.
    pub fn each(&self) -> impl Iterator<Item = &Prometheus> {
        self.leaves.iter().chain(&self.top)
    }

    /// Return the one that scrapes a host.
    pub fn of_host(&self, host: usize) -> &Prometheus {
        let count = self.leaves.len();
        let leaf = (0..count).find(|leaf| share(*leaf, count, self.hosts).contains(&host));
        &self.leaves[leaf.unwrap_or(0)]
    }

    /// Demand that the top has what the leaves have of what it takes, to the last sample, and no more. Return the number of series.
    ///
    /// # Errors
    ///
    /// When it does not hold.
    pub fn compare(&self, at: f64, each: u64) -> Result<usize> {
        let top = self.top.as_ref().context("one tier")?;
        // A sample of a leaf is on the top after one scrape, with the time that it has on the leaf.
        let (long, late) = (20 * each, 3 * each);
        let mut on_leaves = BTreeMap::new();
        for leaf in &self.leaves {
            for taken in TAKEN {
                for (labels, samples) in leaf.stored(&format!("{taken}[{long}s]"), at)? {
                    let before = on_leaves.insert(key(&labels), samples);
                    ensure!(before.is_none(), "two leaves have {labels}");
                }
            }
        }
        // What each scrape tells of itself is no series of a leaf.
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
                    "{labels}: the top has {sample}, and the leaf has not"
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

/// Return the hosts of a leaf.
fn share(leaf: usize, leaves: usize, hosts: usize) -> Range<usize> {
    leaf * hosts / leaves..(leaf + 1) * hosts / leaves
}

/// Return labels as they are on a leaf: the top adds its job where there is none.
fn key(labels: &Labels) -> String {
    let mut labels = labels.clone();
    if labels["job"] == "exitmeter-rules" {
        if let Value::Object(labels) = &mut labels {
            labels.remove("job");
        }
    }
    labels.to_string()
}

fn of_hosts(hosts: &Hosts, those: Range<usize>, served: SocketAddr) -> Result<String> {
    let mut text = "scrape_configs:\n- job_name: exitmeter\n  static_configs:\n".to_owned();
    for host in those {
        let instance = hosts.instance(host);
        writeln!(
            text,
            "  - targets: ['{served}']\n    labels: {{instance: {instance}, __metrics_path__: /host/{host}/metrics}}"
        )?;
    }
    Ok(text)
}

/// Return the configuration of a top, but for its targets, as docs/fleet.md has it.
pub fn federation() -> String {
    let [series, alerts] = TAKEN;
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

fn of_leaves(leaves: &[Prometheus]) -> Result<String> {
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
    fn each_host_is_of_one_leaf() {
        for (leaves, hosts) in [(1, 9), (3, 9), (2, 9), (4, 9), (9, 9), (7, 300)] {
            let shares = (0..leaves).map(|leaf| share(leaf, leaves, hosts));
            let all: Vec<usize> = shares.clone().flatten().collect();
            assert_eq!(all, (0..hosts).collect::<Vec<_>>());
            assert!(shares.into_iter().all(|share| !share.is_empty()));
        }
    }
}
