// SPDX-License-Identifier: GPL-2.0

//! Defines Grafana's boards of the fleet, of a host and of a VM.
//!
//! This is their only source. `cargo run -p fleet --bin boards` writes packaging/prometheus/grafana/*.json, and a test compares
//! them. `make fleet-check` runs each query on Prometheus and fails on a panel without data. `make boards-check` validates the
//! files against Grafana's schema.

use serde_json::{json, Value};

/// A board of Grafana's.
#[derive(Clone, Copy, Debug)]
pub struct Board {
    /// Name of the file, and `uid` of the board.
    pub name: &'static str,
    title: &'static str,
    /// Variables that the viewer can choose.
    variables: &'static [Variable],
    panels: &'static [Panel],
}

/// A variable of a board, chosen at its top.
#[derive(Clone, Copy, Debug)]
struct Variable {
    name: &'static str,
    query: &'static str,
}

/// A panel of a board.
#[derive(Clone, Copy, Debug)]
struct Panel {
    title: &'static str,
    help: &'static str,
    kind: PanelKind,
    /// Unit, as Grafana names it.
    unit: &'static str,
    /// Width in Grafana's columns, at most 24.
    width: u32,
    query: &'static str,
    legend: &'static str,
}

#[derive(Clone, Copy, Debug)]
enum PanelKind {
    /// Lines over time.
    Lines,
    /// Stacked areas over time.
    Areas,
    /// The latest value as a number.
    Number,
    /// A table of the latest values.
    Table,
}

const INSTANCE: Variable = Variable {
    name: "instance",
    query: "label_values(exitmeter_up, instance)",
};

const VM: Variable = Variable {
    name: "vm",
    query: "label_values(exitmeter_vm_info{instance=\"$instance\"}, vm)",
};

/// Height of a panel, in Grafana's rows.
const HEIGHT: u32 = 8;

/// Folder of the files.
pub const FOLDER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../packaging/prometheus/grafana"
);

/// All boards.
pub const BOARDS: [Board; 3] = [
    Board {
        name: "exitmeter-fleet",
        title: "exitmeter: the fleet",
        variables: &[],
        panels: &[
            Panel {
                title: "Hosts with a meter",
                help: "Hosts whose meter can be read.",
                kind: PanelKind::Number,
                unit: "short",
                width: 6,
                query: "sum(exitmeter_up)",
                legend: "hosts",
            },
            Panel {
                title: "Hosts without a meter",
                help: "Hosts whose exporter answers but whose meter cannot be read.",
                kind: PanelKind::Number,
                unit: "short",
                width: 6,
                query: "count(exitmeter_up) - sum(exitmeter_up)",
                legend: "hosts",
            },
            Panel {
                title: "vCPUs",
                help: "Metered vCPUs that exist now.",
                kind: PanelKind::Number,
                unit: "short",
                width: 6,
                query: "sum(exitmeter_vcpus)",
                legend: "vCPUs",
            },
            Panel {
                title: "Exits",
                help: "VM exits per second of all hosts.",
                kind: PanelKind::Number,
                unit: "ops",
                width: 6,
                query: "sum(instance_reason:exitmeter_host_exits:rate5m)",
                legend: "exits",
            },
            Panel {
                title: "Exits by reason",
                help: "VM exits per second of all hosts.",
                kind: PanelKind::Areas,
                unit: "ops",
                width: 12,
                query: "topk(10, sum by (reason) (instance_reason:exitmeter_host_exits:rate5m))",
                legend: "{{reason}}",
            },
            Panel {
                title: "Exits by host",
                help: "VM exits per second.",
                kind: PanelKind::Lines,
                unit: "ops",
                width: 12,
                query: "topk(10, sum by (instance) (instance_reason:exitmeter_host_exits:rate5m))",
                legend: "{{instance}}",
            },
            Panel {
                title: "VMs that lack a CPU",
                help: "Steal: of the time in which a VM's vCPUs wanted a CPU, the share in which they had none.",
                kind: PanelKind::Table,
                unit: "percentunit",
                width: 12,
                query: "topk(20, vm:exitmeter_preempted:ratio_rate5m)",
                legend: "",
            },
            Panel {
                title: "VMs whose VMM is busy",
                help: "The VMM's share of the time in which the vCPUs did not sleep.",
                kind: PanelKind::Table,
                unit: "percentunit",
                width: 12,
                query: "topk(20, vm:exitmeter_user:ratio_rate5m)",
                legend: "",
            },
        ],
    },
    Board {
        name: "exitmeter-host",
        title: "exitmeter: a host",
        variables: &[INSTANCE],
        panels: &[
            Panel {
                title: "Where the time of the vCPUs goes",
                help: "vCPU seconds per second, by phase.",
                kind: PanelKind::Areas,
                unit: "short",
                width: 12,
                query: "sum by (phase) (vm_phase:exitmeter_phase_seconds:rate5m{instance=\"$instance\"})",
                legend: "{{phase}}",
            },
            Panel {
                title: "Exits by reason",
                help: "VM exits per second.",
                kind: PanelKind::Areas,
                unit: "ops",
                width: 12,
                query: "topk(10, instance_reason:exitmeter_host_exits:rate5m{instance=\"$instance\"})",
                legend: "{{reason}}",
            },
            Panel {
                title: "KVM's time by reason",
                help: "Seconds per second that KVM spends on exits.",
                kind: PanelKind::Areas,
                unit: "s",
                width: 12,
                query: "topk(10, rate(exitmeter_host_kernel_seconds_total{instance=\"$instance\"}[$__rate_interval]))",
                legend: "{{reason}}",
            },
            Panel {
                title: "The VMMs' time by reason",
                help: "Seconds per second that VMMs spend on exits.",
                kind: PanelKind::Areas,
                unit: "s",
                width: 12,
                query: "topk(10, rate(exitmeter_host_user_seconds_total{instance=\"$instance\"}[$__rate_interval]))",
                legend: "{{reason}}",
            },
            Panel {
                title: "p99 of single exits",
                help: "99th percentile of the time that one exit takes in the kernel, by reason. HLT includes KVM's polling.",
                kind: PanelKind::Lines,
                unit: "s",
                width: 12,
                query: "histogram_quantile(0.99, sum by (reason, le) (rate(exitmeter_host_exit_duration_seconds_bucket{instance=\"$instance\"}[$__rate_interval])))",
                legend: "{{reason}}",
            },
            Panel {
                title: "Steal by VM",
                help: "Of the time in which a VM's vCPUs wanted a CPU, the share in which they had none.",
                kind: PanelKind::Lines,
                unit: "percentunit",
                width: 12,
                query: "topk(10, vm:exitmeter_preempted:ratio_rate5m{instance=\"$instance\"})",
                legend: "{{vm}}",
            },
            Panel {
                title: "VMs",
                help: "Labels of each VM: names, UUID and VMM.",
                kind: PanelKind::Table,
                unit: "short",
                width: 24,
                query: "exitmeter_vm_info{instance=\"$instance\"}",
                legend: "",
            },
        ],
    },
    Board {
        name: "exitmeter-vm",
        title: "exitmeter: a VM",
        variables: &[INSTANCE, VM],
        panels: &[
            Panel {
                title: "Where the time of its vCPUs goes",
                help: "vCPU seconds per second, by phase.",
                kind: PanelKind::Areas,
                unit: "short",
                width: 12,
                query: "vm_phase:exitmeter_phase_seconds:rate5m{instance=\"$instance\", vm=\"$vm\"}",
                legend: "{{phase}}",
            },
            Panel {
                title: "Exits by reason",
                help: "VM exits per second.",
                kind: PanelKind::Areas,
                unit: "ops",
                width: 12,
                query: "topk(10, rate(exitmeter_exits_total{instance=\"$instance\", vm=\"$vm\"}[$__rate_interval]))",
                legend: "{{reason}}",
            },
            Panel {
                title: "KVM's time by reason",
                help: "Seconds per second that KVM spends on exits.",
                kind: PanelKind::Areas,
                unit: "s",
                width: 12,
                query: "topk(10, rate(exitmeter_kernel_seconds_total{instance=\"$instance\", vm=\"$vm\"}[$__rate_interval]))",
                legend: "{{reason}}",
            },
            Panel {
                title: "The VMM's time by reason",
                help: "Seconds per second that the VMM spends on exits.",
                kind: PanelKind::Areas,
                unit: "s",
                width: 12,
                query: "topk(10, rate(exitmeter_user_seconds_total{instance=\"$instance\", vm=\"$vm\"}[$__rate_interval]))",
                legend: "{{reason}}",
            },
            Panel {
                title: "Steal",
                help: "Of the time in which its vCPUs wanted a CPU, the share in which they had none.",
                kind: PanelKind::Lines,
                unit: "percentunit",
                width: 12,
                query: "vm:exitmeter_preempted:ratio_rate5m{instance=\"$instance\", vm=\"$vm\"}",
                legend: "steal",
            },
            Panel {
                title: "Exits of a vCPU",
                help: "VM exits per second and vCPU.",
                kind: PanelKind::Lines,
                unit: "ops",
                width: 12,
                query: "vm:exitmeter_exits_per_vcpu:rate5m{instance=\"$instance\", vm=\"$vm\"}",
                legend: "exits",
            },
        ],
    },
];

impl Board {
    /// Return the title and the query of each panel, with a host and a VM in place of the variables.
    pub fn queries<'a>(
        &'a self,
        instance: &'a str,
        vm: &'a str,
    ) -> impl Iterator<Item = (&'static str, String)> + 'a {
        self.panels.iter().map(move |panel| {
            let query = panel.query.replace("$__rate_interval", "1m");
            let query = query.replace("$instance", instance).replace("$vm", vm);
            (panel.title, query)
        })
    }

    /// Return the text of the file.
    pub fn text(&self) -> String {
        format!("{:#}\n", self.json())
    }

    /// Return the board as Grafana imports it (schema version 39, Grafana 10.4 and later).
    pub fn json(&self) -> Value {
        let source = json!({"type": "prometheus", "uid": "${datasource}"});
        let mut variables = vec![json!({
            "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
        })];
        variables.extend(self.variables.iter().map(|variable| {
            json!({
                "name": variable.name, "type": "query", "datasource": source,
                "query": {"query": variable.query, "refId": variable.name}, "refresh": 2, "sort": 1,
            })
        }));
        let (mut x, mut y) = (0, 0);
        let panels = self.panels.iter().zip(1..).map(|(panel, id)| {
            if x + panel.width > 24 {
                (x, y) = (0, y + HEIGHT);
            }
            let place = json!({"x": x, "y": y, "w": panel.width, "h": HEIGHT});
            x += panel.width;
            panel.json(id, &place, &source)
        });
        let panels: Vec<_> = panels.collect();
        json!({
            "uid": self.name, "title": self.title, "tags": ["exitmeter", "kvm"], "schemaVersion": 39, "version": 1,
            "editable": true, "refresh": "30s", "time": {"from": "now-6h", "to": "now"}, "timezone": "",
            "templating": {"list": variables}, "annotations": {"list": []}, "panels": panels,
            "links": [{
                "type": "dashboards", "title": "exitmeter", "tags": ["exitmeter"], "asDropdown": true,
                "icon": "external link", "tooltip": "", "targetBlank": false, "includeVars": true, "keepTime": true,
            }],
        })
    }
}

impl Panel {
    fn json(&self, id: u32, place: &Value, source: &Value) -> Value {
        let (kind, custom, options) = match self.kind {
            PanelKind::Lines => (
                "timeseries",
                json!({"drawStyle": "line", "fillOpacity": 0}),
                legend(),
            ),
            PanelKind::Areas => (
                "timeseries",
                json!({"drawStyle": "line", "fillOpacity": 60, "stacking": {"mode": "normal", "group": "A"}}),
                legend(),
            ),
            PanelKind::Number => (
                "stat",
                json!({}),
                json!({"colorMode": "value", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"], "values": false}}),
            ),
            PanelKind::Table => ("table", json!({}), json!({"showHeader": true})),
        };
        let is_table = matches!(self.kind, PanelKind::Table);
        json!({
            "id": id, "title": self.title, "description": self.help, "type": kind, "datasource": source,
            "gridPos": place, "options": options,
            "fieldConfig": {"defaults": {"unit": self.unit, "min": 0, "custom": custom}, "overrides": []},
            "targets": [{
                "refId": "A", "datasource": source, "expr": self.query, "legendFormat": self.legend,
                "instant": is_table, "range": !is_table, "format": if is_table { "table" } else { "time_series" },
            }],
        })
    }
}

fn legend() -> Value {
    json!({
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": true, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    })
}
